"""Errors as Anthropic's clients know them, and which of two keys counts."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.e2e.conftest import Guest, House
from tests.support.calls import CALLS
from tests.support.provider import FakeProvider, Reply

PATH = "/v1/messages"
SAY: Any = [{"role": "user", "content": "hi"}]
PLAIN: dict[str, Any] = {"model": "claude", "max_tokens": 20, "messages": SAY}
STRANGER = "sk-" + "x" * 43


def send(guest: Guest, key: str | None = None, **members: Any) -> httpx.Response:
    with guest.house.service.client(key or guest.customer.key) as client:
        return client.post(PATH, json={**PLAIN, **members})


def no_credits(guest: Guest) -> httpx.Response:
    return send(guest.house.customer(credits="0"))


def not_allowed(guest: Guest) -> httpx.Response:
    return send(guest.house.customer(allowed_models=["priced"]))


def too_large(guest: Guest) -> httpx.Response:
    return send(guest, system="x" * 11_000_000)


def too_often(guest: Guest) -> httpx.Response:
    limited = guest.house.customer(requests_per_minute=1)
    answers = [send(limited) for _ in range(3)]  # the minute may turn between two of them
    return answers[-1] if answers[-1].status_code == 429 else send(limited)


REFUSALS: dict[str, tuple[Callable[[Guest], httpx.Response], int, str]] = {
    "no such key": (lambda guest: send(guest, STRANGER), 401, "authentication_error"),
    "no credits": (no_credits, 402, "billing_error"),
    "model not allowed": (not_allowed, 403, "permission_error"),
    "no such model": (lambda guest: send(guest, model="nope"), 404, "not_found_error"),
    "no JSON object": (lambda guest: send(guest, max_tokens="x"), 400, "invalid_request_error"),
    "too large": (too_large, 413, "request_too_large"),
    "too often": (too_often, 429, "rate_limit_error"),
}


def assert_anthropics(answer: httpx.Response, status: int, kind: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert body["error"]["message"]
    ids = {answer.headers["request-id"], answer.headers["x-request-id"], body["request_id"]}
    assert len(ids) == 1
    assert "litellm" not in answer.text.lower()


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal_is_in_anthropics_shape(guest: Guest, case: str) -> None:
    provoke, status, kind = REFUSALS[case]
    answer = provoke(guest)
    assert_anthropics(answer, status, kind)
    if status == 429:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    else:
        assert answer.headers["x-should-retry"] == "false"
    if status == 402:
        assert {"balance", "required"} <= set(answer.json()["error"])


# The provider's status -> ours, the type of error, and what the SDK raises.
FAILURES: list[tuple[int, int, str, type[anthropic.APIStatusError]]] = [
    (400, 400, "invalid_request_error", anthropic.BadRequestError),
    (401, 502, "api_error", anthropic.InternalServerError),
    (403, 502, "api_error", anthropic.InternalServerError),
    # LiteLLM makes 400 of a 413, and 500 of a 529.
    (413, 400, "invalid_request_error", anthropic.BadRequestError),
    (429, 429, "rate_limit_error", anthropic.RateLimitError),
    (500, 502, "api_error", anthropic.InternalServerError),
    (503, 503, "overloaded_error", anthropic.InternalServerError),
    (504, 504, "timeout_error", anthropic.InternalServerError),
    (529, 502, "api_error", anthropic.InternalServerError),
]


@pytest.fixture
def sdk(guest: Guest) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=guest.house.service.base_url, api_key=guest.customer.key, max_retries=0
    ) as client:
        yield client


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("theirs, ours, kind, raised", FAILURES)
def test_providers_failure_is_in_anthropics_shape_and_raised_as_such(
    guest: Guest,
    provider: FakeProvider,
    sdk: anthropic.Anthropic,
    theirs: int,
    ours: int,
    kind: str,
    raised: type[anthropic.APIStatusError],
    streamed: bool,  # noqa: FBT001
) -> None:
    provider.reply("claude", Reply(status=theirs))
    assert_anthropics(send(guest, stream=streamed), ours, kind)
    with pytest.raises(raised) as caught:
        sdk.messages.create(**PLAIN, stream=streamed)
    assert caught.value.status_code == ours
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]
    assert guest.uncharged()


def test_error_in_the_middle_of_a_stream_is_an_event_that_the_sdk_raises(
    guest: Guest, provider: FakeProvider, sdk: anthropic.Anthropic
) -> None:
    provider.reply("claude", Reply(error_after=5))
    answer = send(guest, stream=True)
    *_, last = answer.text.strip().split("\n\n")
    name, data = last.split("\n")
    body = json.loads(data.removeprefix("data: "))
    assert (name, body["type"]) == ("event: error", "error")
    assert body["error"]["type"] == "api_error"
    assert body["request_id"] == answer.headers["request-id"]
    assert "[DONE]" not in answer.text
    with pytest.raises(anthropic.APIStatusError, match="before its answer was complete"):
        list(sdk.messages.create(**PLAIN, stream=True))


def test_error_in_the_middle_of_a_response_is_an_event_of_its_own(
    guest: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(error_after=5))
    with guest.house.service.client(guest.customer.key) as client:
        answer = client.post(
            "/v1/responses", json={"model": "priced", "input": "hi", "stream": True}
        )
    *_, last = answer.text.strip().split("\n\n")
    name, data = last.split("\n")
    body = json.loads(data.removeprefix("data: "))
    assert (name, body["type"]) == ("event: error", "error")
    assert body["code"] == body["error"]["code"] == "upstream_error"


@pytest.mark.parametrize("path", [path for path in CALLS if path != PATH])
def test_other_endpoints_keep_openais_shape(guest: Guest, path: str) -> None:
    with guest.house.service.client(guest.customer.key) as client:
        answer = CALLS[path].send(client, guest.customer.key, {"model": "nope"})
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}
    assert "request-id" not in answer.headers


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
@pytest.mark.parametrize(
    "bearer, x_api_key, status",
    [
        ("own", None, 200),
        (None, "own", 200),
        ("own", "own", 200),
        # The bearer counts: SDKs that send both have put the key that was set last there.
        ("own", "stranger", 200),
        ("stranger", "own", 401),
        ("own", "", 200),
        # What is no bearer at all gives way.
        ("", "own", 200),
        (None, None, 401),
    ],
)
def test_bearer_counts_before_x_api_key(
    house: House, guest: Guest, path: str, bearer: str | None, x_api_key: str | None, status: int
) -> None:
    keys = {"own": guest.customer.key, "stranger": STRANGER, "": ""}
    headers: dict[str, str] = {}
    if bearer is not None:
        headers["authorization"] = f"Bearer {keys[bearer]}".strip()
    if x_api_key is not None:
        headers["x-api-key"] = keys[x_api_key]
    answer = httpx.post(house.service.base_url + path, json=PLAIN, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    if status == 401 and path == PATH:
        assert_anthropics(answer, 401, "authentication_error")
