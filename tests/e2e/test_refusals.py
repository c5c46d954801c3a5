"""Bad input: a clear error in the SDK's own shape, nothing asked of a provider, nothing charged."""

from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import CHAT, Guest, House
from tests.support.provider import FakeProvider

MESSAGES: Any = [{"role": "user", "content": "hi"}]


def send(guest: Guest, content: bytes, **headers: str) -> httpx.Response:
    with guest.house.service.client(guest.customer.key) as client:
        return client.post(CHAT, content=content, headers=headers)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"{}" * 2,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model":"priced","messages":[{"a":NaN}]}',
        b'{"model":"priced","messages":[{"content":"\\ud800"}]}',
    ],
)
def test_malformed_json_is_refused(guest: Guest, provider: FakeProvider, content: bytes) -> None:
    answer = send(guest, content)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert not provider.requests
    assert guest.uncharged()


@pytest.mark.parametrize(
    "field, value",
    [
        ("model", None),
        ("model", 7),
        ("model", ""),
        ("model", ["priced"]),
        ("model", "x" * 300),
        ("messages", None),
        ("messages", []),
        ("messages", "hi"),
        ("messages", {}),
        ("stream", "true"),
        ("stream", 1),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "50"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", 10**30),
        ("max_completion_tokens", "x"),
        ("n", 0),
        ("n", True),
        ("n", 10**9),
        ("stream_options", "x"),
    ],
)
def test_wrong_types_are_refused_by_the_name_of_the_field(
    guest: Guest, provider: FakeProvider, field: str, value: Any
) -> None:
    answer = guest.chat(**{field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert answer.headers["x-should-retry"] == "false"
    assert not provider.requests
    assert guest.uncharged()


def test_duplicate_names_reach_the_provider_once(guest: Guest, provider: FakeProvider) -> None:
    body = (
        b'{"model":"dear","model":"priced","max_tokens":9,"max_tokens":5,'
        b'"messages":[{"role":"user","content":"hi"}]}'
    )
    assert send(guest, body).status_code == 200
    assert provider.last().model == "priced"
    assert provider.last().body.count(b"max_tokens") == 1


def test_body_over_the_limit_is_refused_however_it_is_sent(
    guest: Guest, provider: FakeProvider
) -> None:
    big = b'{"model":"priced","messages":[{"role":"user","content":"' + b"x" * 11_000_000
    declared = send(guest, big + b'"}]}')
    chunked: httpx.Response
    with guest.house.service.client(guest.customer.key) as client:
        chunked = client.post(CHAT, content=iter([big, b'"}]}']))
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert not provider.requests
    assert guest.uncharged()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Basic abc"},
        {"authorization": "Bearer sk-" + "x" * 43},
        {"x-api-key": ""},
        {"authorization": "Bearer \xff\xfe"},
        {"x-api-key": "sk-' OR 1=1"},
    ],
)
def test_missing_and_unknown_keys_are_401(house: House, headers: dict[str, str]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    answer = httpx.post(
        house.service.base_url + CHAT, json={"model": "priced", "messages": MESSAGES}, headers=raw
    )
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_key_is_taken_from_x_api_key_too(guest: Guest) -> None:
    with httpx.Client(base_url=guest.house.service.base_url) as client:
        answer = client.post(
            CHAT,
            json={"model": "priced", "messages": MESSAGES, "max_tokens": 5},
            headers={"x-api-key": guest.customer.key},
        )
    assert answer.status_code == 200


def test_revoked_key_is_refused_on_the_very_next_request(guest: Guest) -> None:
    assert guest.chat().status_code == 200
    customer = guest.customer
    guest.house.service.admin(
        "DELETE", f"/admin/v1/accounts/{customer.account_id}/keys/{customer.key_id}"
    )
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        guest.sdk().chat.completions.create(model="priced", messages=MESSAGES)


def test_expired_key_is_403(guest: Guest) -> None:
    assert guest.chat().status_code == 200
    guest.house.rows(
        "UPDATE virtual_keys SET expires_at = now() WHERE account_id = %s RETURNING 1",
        guest.customer.account_id,
    )
    with pytest.raises(openai.PermissionDeniedError, match="expired"):
        guest.sdk().chat.completions.create(model="priced", messages=MESSAGES)


def test_unknown_model_is_404_and_one_not_allowed_403(house: House) -> None:
    guest = house.customer(allowed_models=["priced"])
    everything = house.customer()
    with pytest.raises(openai.NotFoundError) as missing:
        everything.sdk().chat.completions.create(model="gpt-none", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.PermissionDeniedError) as refused:
        guest.sdk().chat.completions.create(model="dear", messages=MESSAGES)
    assert refused.value.code == "model_not_allowed"


def test_short_of_credits_is_402_and_says_what_is_affordable(
    house: House, provider: FakeProvider
) -> None:
    guest = house.customer(credits="1")  # a thousandth of a dollar: 100 tokens out cost two of it
    answer = guest.chat(max_tokens=100)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (402, "insufficient_credits")
    assert answer.headers["x-should-retry"] == "false"
    assert error["balance"] == {"credits": "1", "usd": "0.001"}
    affordable = error["affordable"]["max_tokens"]
    assert 0 < affordable < 100
    assert not provider.requests
    assert guest.chat(max_tokens=affordable).status_code == 200


def test_answer_is_clamped_to_the_balance_where_the_client_set_no_limit(
    house: House, provider: FakeProvider
) -> None:
    guest = house.customer(credits="2")
    assert guest.chat(max_tokens=None).status_code == 200
    sent = provider.last().json()
    assert 16 <= sent["max_tokens"] < 100
    assert guest.usage()["hold"] <= 2_000_000


def test_balance_below_the_shortest_useful_answer_is_402(house: House) -> None:
    guest = house.customer(credits="0.1")
    assert guest.chat(max_tokens=None).status_code == 402


def test_empty_account_is_402(house: House) -> None:
    guest = house.customer(credits="0")
    with pytest.raises(openai.APIStatusError) as caught:
        guest.sdk(max_retries=2).chat.completions.create(model="priced", messages=MESSAGES)
    assert caught.value.status_code == 402


def test_requests_per_minute_are_429_with_the_headers_that_sdks_read(house: House) -> None:
    guest = house.customer(requests_per_minute=1)
    first = guest.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    second = guest.chat()
    if second.status_code == 200:  # the minute turned between the two
        second = guest.chat()
    assert second.status_code == 429
    assert second.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(second.headers["retry-after"]) <= 60
    with pytest.raises(openai.RateLimitError):
        guest.sdk().chat.completions.create(model="priced", messages=MESSAGES)


def test_budget_of_a_key_is_402(house: House) -> None:
    guest = house.customer(budget={"credits": "0.5", "period": "day"})
    answer = guest.chat(max_tokens=1000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (402, "budget_exceeded")


@pytest.mark.parametrize(
    "name, value",
    [
        ("api_key", "sk-mine"),
        ("api_base", "http://127.0.0.1:1"),
        ("base_url", "http://x"),
        ("custom_llm_provider", "anthropic"),
        ("fallbacks", ["dear"]),
        ("num_retries", 50),
        ("timeout", 0.001),
        ("cache", {"no-cache": True}),
        ("extra_headers", {"a": "b"}),
        ("headers", {"Authorization": "x"}),
        ("mock_response", "free"),
        ("model_info", {}),
        ("user_config", {}),
        ("organization", "x"),
        ("api_version", "x"),
        ("input_cost_per_token", 0),
        ("output_cost_per_second", 0),
        ("litellm_params", {}),
        ("extra_body", {"api_base": "http://x"}),
        ("guardrails", []),
        ("langfuse_host", "http://x"),
        ("aws_role_name", "x"),
        ("vertex_credentials", "x"),
        ("specific_deployment", True),
        ("API_BASE", "http://x"),
        ("Model", "dear"),
    ],
)
def test_hostile_parameters_are_refused(
    guest: Guest, provider: FakeProvider, name: str, value: Any
) -> None:
    answer = guest.chat(**{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    assert not provider.requests


@pytest.mark.parametrize("name", ["metadata", "no-log", "litellm_call_id"])
def test_harmless_strangers_are_dropped(guest: Guest, provider: FakeProvider, name: str) -> None:
    answer = guest.chat(**{name: {"a": "b"}})
    assert answer.status_code in {200, 400}
    if answer.status_code == 200:
        assert name not in provider.last().json()


def test_customers_litellm_headers_do_not_get_through(guest: Guest, provider: FakeProvider) -> None:
    answer = guest.chat(
        http_headers={
            "x-litellm-call-id": "mine",
            "x-litellm-timeout": "0.001",
            "x-litellm-tags": "a",
            "cookie": "a=b",
            "openai-organization": "org-1",
        }
    )
    assert answer.status_code == 200
    assert not {"cookie", "openai-organization"} & set(provider.last().headers)
