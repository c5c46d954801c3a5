"""Bring your own key: credits are bypassed, usage is recorded, the key is nobody's."""

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from proxy.embedded.litellm import LiteLLMChild
from tests.e2e.conftest import Guest, House
from tests.e2e.surface import credential
from tests.support.calls import CALLS, STREAMED, Call
from tests.support.litellm import (
    AMBIENT_KEY,
    MASTER_KEY,
    PROVIDER_KEY,
    RunningLiteLLM,
    litellm_section,
)
from tests.support.provider import FakeProvider, Received, Reply

OWN_KEY = "sk-the-customers-own-provider-key"
WITH_OWN_KEY = {"X-Provider-Key": OWN_KEY}
HONOURED = {path: call for path, call in CALLS.items() if path != "/v1/moderations"}
MODERATIONS = CALLS["/v1/moderations"]
EVERYWHERE = pytest.mark.parametrize("call", HONOURED.values(), ids=HONOURED)


def send(guest: Guest, call: Call, members: Any = None, headers: Any = WITH_OWN_KEY) -> Any:
    with guest.house.service.client(guest.customer.key) as client:
        return call.send(client, guest.customer.key, members, headers)


def assert_only_own_key(received: Received) -> None:
    assert credential(received) == OWN_KEY
    seen = f"{received.path} {received.query} {received.headers} {received.body!r}"
    assert seen.count(OWN_KEY) == 1
    for key in (PROVIDER_KEY, AMBIENT_KEY, MASTER_KEY, "disable_fallbacks", "api_key"):
        assert key not in seen


@EVERYWHERE
def test_call_goes_out_with_the_customers_key_and_costs_no_credits(
    house: House, provider: FakeProvider, call: Call
) -> None:
    guest = house.customer(credits="0")
    answer = send(guest, call)
    assert answer.status_code == 200, answer.text
    (received,) = provider.requests
    assert_only_own_key(received)
    row = guest.usage()
    assert (row["status"], row["price"], row["byok"], row["hold"]) == ("byok", 0, True, 0)
    assert guest.balance() == (0, 0)


@pytest.mark.parametrize("path", STREAMED)
def test_stream_goes_out_with_the_customers_key(
    house: House, provider: FakeProvider, path: str
) -> None:
    guest = house.customer(credits="0")
    answer = send(guest, CALLS[path], {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert_only_own_key(provider.last())
    row = guest.usage()
    assert (row["status"], row["price"], row["output_tokens"]) == ("byok", 0, 5)


@pytest.mark.parametrize("header", ["X-Provider-Key", "X-OpenAI-Key", "x-openai-key"])
def test_header_of_the_models_provider_is_taken(
    guest: Guest, provider: FakeProvider, header: str
) -> None:
    assert guest.chat(http_headers={header: OWN_KEY}).status_code == 200
    assert_only_own_key(provider.last())


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_stored_response_is_asked_for_with_the_customers_key(
    guest: Guest, provider: FakeProvider, method: str
) -> None:
    stored = send(guest, CALLS["/v1/responses"], headers={}).json()["id"]
    path = f"/v1/responses/{stored}"
    provider.reset()
    with guest.house.service.client(guest.customer.key) as client:
        for blank in ("", b"\xa0"):
            answer = client.request(method, path, headers=cast("Any", {"X-Provider-Key": blank}))
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "blank_provider_key")
        assert not provider.requests
        provider.reply_once("priced", Reply(status=401))
        refused = client.request(method, path, headers=WITH_OWN_KEY)
        assert refused.json()["error"]["code"] == "invalid_provider_key"
        answer = client.request(method, path, headers=WITH_OWN_KEY)
        assert (answer.status_code, answer.json()["id"]) == (200, stored)
    assert [credential(received) for received in provider.requests] == [OWN_KEY, OWN_KEY]


def test_response_made_with_an_own_key_is_gone_on_from_but_not_read_back(
    guest: Guest, provider: FakeProvider
) -> None:
    stored = send(guest, CALLS["/v1/responses"]).json()["id"]
    follow = send(guest, CALLS["/v1/responses"], {"previous_response_id": stored})
    assert follow.status_code == 200, follow.text
    assert_only_own_key(provider.last())
    # LiteLLM 1.106.2 puts a deployment of that moment into the id, and does not find it again.
    with guest.house.service.client(guest.customer.key, **WITH_OWN_KEY) as client:
        answer = client.get(f"/v1/responses/{stored}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "response_not_found")


def test_moderations_are_refused_since_litellm_would_use_the_operators_key(
    guest: Guest, provider: FakeProvider
) -> None:
    answer = send(guest, MODERATIONS)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "provider_key_not_supported"
    assert not provider.requests
    assert guest.uncharged()


# HTTP itself takes spaces and tabs off a header, but not this one.
@pytest.mark.parametrize("key", ["", b"\xa0"], ids=["empty", "space"])
def test_blank_key_is_refused_everywhere(guest: Guest, provider: FakeProvider, key: Any) -> None:
    for call in CALLS.values():
        for header in ("X-Provider-Key", "X-OpenAI-Key", "X-Anthropic-Key"):
            answer = send(guest, call, headers={header: key})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "blank_provider_key"), call.path
            assert error["param"] == header
    assert not provider.requests
    assert guest.uncharged()


def test_key_for_another_provider_is_left_alone(guest: Guest, provider: FakeProvider) -> None:
    assert guest.chat(http_headers={"X-Anthropic-Key": OWN_KEY}).status_code == 200
    assert OWN_KEY not in str(provider.last())
    assert guest.usage()["status"] == "billed"


@EVERYWHERE
@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_is_401_in_words_that_blame_the_right_one(
    guest: Guest, provider: FakeProvider, call: Call, status: int
) -> None:
    provider.reply(call.model, Reply(status=status))
    answer = send(guest, call)
    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (401, "invalid_provider_key")
    assert answer.headers["x-should-retry"] == "false"
    if call.path == "/v1/messages":
        assert (body["type"], body["error"]["type"]) == ("error", "authentication_error")
        assert answer.headers["request-id"] == body["request_id"]
    else:
        assert body["error"]["type"] == "invalid_request_error"
    assert OWN_KEY not in answer.text
    for received in provider.requests:
        assert_only_own_key(received)
    assert guest.usage()["status"] == "void"
    assert guest.uncharged()
    provider.reset()
    assert send(guest, call, headers={}).status_code == 200  # nobody's cooldown
    assert credential(provider.last()) == PROVIDER_KEY


# A model of the same kind for each, which the operator falls back to.
SPARES = {
    "priced": "dear",
    "instruct": "instruct-free",
    "claude": "claude-free",
    "embed": "embed-free",
    "image": "image-free",
    "speech": "speech-free",
    "transcribe-tokens": "transcribe-free",
    "rerank": "rerank-free",
}
CONTEXT = (
    b'{"error": {"message": "maximum context length is 10", "code": "context_length_exceeded"}}'
)
POLICY = b'{"error": {"message": "content_policy_violation: rejected by our safety system"}}'


@pytest.fixture(scope="module")
def falling_house(
    make_house: Callable[..., House],
    provider_server: FakeProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    """A service before a LiteLLM with fallbacks of every kind, and deployments in an order."""
    section = litellm_section(provider_server.url)
    fallbacks = [{model: [spare]} for model, spare in SPARES.items()]
    section["router_settings"] |= {
        "fallbacks": fallbacks,
        "context_window_fallbacks": fallbacks,
        "content_policy_fallbacks": fallbacks,
        "default_fallbacks": ["dear"],
    }
    child = LiteLLMChild(
        section,
        data_dir=tmp_path_factory.mktemp("falling"),
        master_key=MASTER_KEY,
        environ={**os.environ, "PROVIDER_KEY": PROVIDER_KEY},
    )
    child.start()
    try:
        yield make_house(
            environ={"TALLYGATE_LITELLM_URL": child.url, "TALLYGATE_LITELLM_KEY": MASTER_KEY}
        )
    finally:
        child.stop()


@EVERYWHERE
def test_operators_fallbacks_never_see_the_customers_key(
    falling_house: House, provider: FakeProvider, call: Call
) -> None:
    guest = falling_house.customer()
    kind = {"content-type": "application/json"}
    # None that LiteLLM's own client tries again, which takes its time.
    failures = (
        Reply(status=401),
        Reply(status=400, raw_body=CONTEXT, headers=kind),
        Reply(status=400, raw_body=POLICY, headers=kind),
    )
    for failure in failures:
        provider.reply(call.model, failure)
        assert send(guest, call).status_code >= 400
        assert {received.model for received in provider.requests} == {call.model}
        for received in provider.requests:
            assert_only_own_key(received)
        provider.reset()
    # What shows that they are there: a call that is paid with credits is caught by them.
    provider.reply(call.model, failures[0])
    assert send(guest, call, headers={}).status_code == 200
    assert provider.last().model == SPARES[call.model]


def test_key_is_stored_and_logged_nowhere(
    house: House, provider: FakeProvider, litellm: RunningLiteLLM
) -> None:
    guest = house.customer()
    prompt = "a-secret-prompt"
    for call in HONOURED.values():
        send(guest, call)
        provider.reply_once(call.model, Reply(status=401))
        send(guest, call)
        provider.reset()
    for path in STREAMED:
        send(guest, CALLS[path], {"stream": True})
    guest.chat(http_headers=WITH_OWN_KEY, messages=[{"role": "user", "content": prompt}])
    send(guest, CALLS["/v1/images/edits"], {"prompt": prompt})
    secrets = (OWN_KEY, prompt, guest.customer.key)
    names = house.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'tallygate'")
    assert {"usage", "entries", "open_holds"} <= {row["tablename"] for row in names}
    for table in (row["tablename"] for row in names):
        text = str(house.rows(f"SELECT t::text FROM {table} AS t"))
        assert not [secret for secret in secrets if secret in text], table
    folders = (house.service.data_dir, litellm.child.log_path.parent)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert litellm.child.log_path in files
    for path in [*files, house.service.log_path]:
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], path


def test_fee_in_percent_of_the_cost_is_charged_where_the_price_book_has_one(
    make_house: Callable[..., House], provider: FakeProvider
) -> None:
    del provider  # without the scripts of other tests
    house = make_house(
        config='price_book: {default: {kind: markup, factor: "2.0", byok_fee_percent: "5"}}\n'
    )
    guest = house.customer()
    assert guest.chat(http_headers=WITH_OWN_KEY).status_code == 200
    row = guest.usage()
    assert (row["status"], row["price"]) == ("byok", 3000)  # 5% of 60 micro-dollars
    assert guest.balance() == (1_000_000_000 - 3000, 0)
