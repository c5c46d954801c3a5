"""Signatures that the format's own library verifies, addresses that are refused, and waits."""

import re
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from proxy.webhooks import (
    EVENT_TYPES,
    Reach,
    RetryPolicy,
    WebhookAddressError,
    check_url,
    new_secret,
)
from proxy.webhooks import addresses as addresses_module
from proxy.webhooks.addresses import resolve
from proxy.webhooks.signing import signed_headers

ROOT = Path(__file__).parents[3]
EVENT_ID = UUID("0198c0de-0000-7000-8000-000000000001")
STRICT = Reach(allow_http=False, allow_private=False)
OPEN = Reach(allow_http=True, allow_private=True)


def test_every_secret_signs_and_a_changed_body_is_noticed() -> None:
    old, new, body = new_secret(), new_secret(), '{"type":"webhook.test","é":1}'.encode()
    headers = signed_headers([new, old], EVENT_ID, body, now_s=int(time.time()))
    assert headers["webhook-id"] == str(EVENT_ID)
    for secret in (old, new):
        assert Webhook(secret).verify(body, headers)["type"] == "webhook.test"
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(body, headers)


def test_the_snippet_of_the_docs_verifies() -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text()
    (snippet,) = re.findall(r"```python\n(import base64.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)  # noqa: S102 - what receivers are told to run
    secret, body = new_secret(), b"{}"
    headers = signed_headers([new_secret(), secret], EVENT_ID, body, now_s=int(time.time()))
    assert names["verify"](secret, headers, body)
    assert not names["verify"](secret, headers, b"{ }")
    old = signed_headers([secret], EVENT_ID, body, now_s=int(time.time()) - 400)
    assert not names["verify"](secret, old, body)


def test_secrets_are_of_256_random_bits() -> None:
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", new_secret())
    assert new_secret() != new_secret()


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com:8443/a/b?c=d%20e",
        "https://93.184.215.14/",
        "https://[2606:4700::6810:1]/x",
    ],
)
def test_public_https_is_taken(url: str) -> None:
    assert check_url(url, STRICT).geturl() == url


@pytest.mark.parametrize(
    "url, problem",
    [
        ("http://example.com", "https://"),
        ("ftp://example.com", "URL"),
        ("https://", "URL"),
        ("//example.com", "URL"),
        ("https://example.com:0", "URL"),
        ("https://example.com:99999", "URL"),
        ("https://[::1", "URL"),
        ("https://user:secret@example.com", "password"),
        ("https://example.com/#x", "fragment"),
        ("https://exämple.com", "ASCII"),
        ("https://example.com/a b", "ASCII"),
        ("https://example.com/a\r\nx: y", "ASCII"),
        ("https://example.com/" + "a" * 2000, "2000"),
        ("https://localhost", "no address of the internet"),
        ("https://127.0.0.1", "no address of the internet"),
        ("https://10.0.0.7", "no address of the internet"),
        ("https://169.254.169.254/latest/meta-data", "no address of the internet"),
        ("https://100.64.0.1", "no address of the internet"),
        ("https://224.0.0.1", "no address of the internet"),
        ("https://0.0.0.0", "no address of the internet"),
        ("https://[::1]", "no address of the internet"),
        ("https://[fe80::1]", "no address of the internet"),
        ("https://[fd00::1]", "no address of the internet"),
        ("https://[::ffff:10.0.0.7]", "no address of the internet"),
        ("https://[64:ff9b::a00:7]", "no address of the internet"),
        ("https://[2002:a00:7::1]", "no address of the internet"),
        ("https://[2001:0:4136:e378:8000:63bf:f5ff:fff8]", "no address of the internet"),
    ],
)
def test_what_is_no_public_https_is_refused(url: str, problem: str) -> None:
    with pytest.raises(WebhookAddressError, match=problem):
        check_url(url, STRICT)


def test_an_operator_may_allow_neighbours() -> None:
    for url in ("http://localhost:8080/hooks", "http://10.0.0.7", "https://[::1]"):
        assert check_url(url, OPEN)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["127.1", "2130706433", "0x7f.1"])
async def test_other_ways_to_write_an_own_address_lead_nowhere(name: str) -> None:
    parts = check_url(f"https://{name}/", STRICT)
    with pytest.raises(WebhookAddressError, match="no address of the internet"):
        await resolve(parts, STRICT)
    assert await resolve(parts, OPEN) == ["127.0.0.1"]


@pytest.mark.anyio
async def test_only_public_addresses_of_a_name_are_gone_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = ["10.0.0.7", "93.184.215.14", "2606:4700::6810:1", "93.184.215.14"]

    class Loop:
        async def getaddrinfo(self, *_: object, **__: object) -> list[Any]:
            return [(0, 0, 0, "", (address, 443)) for address in found]

    monkeypatch.setattr(addresses_module.asyncio, "get_running_loop", Loop)
    hosts = await resolve(check_url("https://example.com", STRICT), STRICT)
    assert hosts == ["93.184.215.14", "[2606:4700::6810:1]"]
    assert all(ip_address(host.strip("[]")).is_global for host in hosts)


@pytest.mark.anyio
async def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(WebhookAddressError, match="no name"):
        await resolve(check_url(f"https://{'a' * 64}.example", STRICT), STRICT)


def test_waits_grow_to_the_longest_and_vary() -> None:
    policy = RetryPolicy(first_s=5, longest_s=14_400, give_up_s=259_200)
    waits = [policy.delay_s(attempts, jitter=1) for attempts in range(1, 12)]
    assert waits == [5, 15, 45, 135, 405, 1215, 3645, 10_935, 14_400, 14_400, 14_400]
    assert policy.delay_s(100_000, jitter=0) == 7200
    # Each attempt in vain by then, and some more: what is given up was really tried.
    assert sum(waits) < policy.give_up_s


def test_types_are_those_that_are_documented() -> None:
    assert EVENT_TYPES == (
        "balance.low", "balance.exhausted", "key.over_budget", "review.opened", "audit.failed",
    )  # fmt: skip
