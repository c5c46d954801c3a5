"""Requests that come again, from SDKs over broken connections and with an Idempotency-Key.

Whatever the network does, an answer is charged once, and whoever asks again gets it.
"""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import openai
import psycopg
import pytest

from tests.e2e.conftest import CHAT, Guest, House, wait_for
from tests.e2e.sdk.conftest import CLIENTS, NODE, TEXT, Program
from tests.support.litellm import MODELS
from tests.support.provider import FakeProvider, Gate, Reply
from tests.support.service import Customer, Service, free_port
from tests.support.wire import Fault, Wire, wire_to

MESSAGES: Any = [{"role": "user", "content": "hi"}]
# 10 prompt and 5 completion tokens at 1 and 10 dollars a million: 60 micro-dollars, sold double.
PRICE_NANOS = 120_000
START_NANOS = 1_000_000_000
RETRY = "x-stainless-retry-count"
REPLAY_OF = "x-tallygate-replay-of"
# What breaks off an answer in a way that every SDK asks again after.
NO_ANSWER = Fault(after_bytes=0)
CUT_IN_HEAD = Fault(after_bytes=20)
CUT_BEFORE_BODY = Fault(after_bytes=0, in_body=True)
CUT_IN_BODY = Fault(after_bytes=30, in_body=True)
STALLED = Fault(after_bytes=30, in_body=True, stalls=True)


def make_stand_in(
    make_house: Callable[..., House], provider: FakeProvider, **environ: str
) -> House:
    """A service whose LiteLLM is the fake provider: what LiteLLM does is not the question here."""
    provider.deployments = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}"}, "model_info": info}
        for name, info in MODELS.items()
    ]
    prefixed = {f"TALLYGATE_{name}": text for name, text in environ.items()}
    return make_house(litellm_url=provider.root_url, environ=prefixed)


@pytest.fixture(scope="module")
def shop(make_house: Callable[..., House], provider_server: FakeProvider) -> House:
    """A service with the default settings but for the times of holds, which a test moves on."""
    return make_stand_in(
        make_house,
        provider_server,
        HOLDS__SWEEP_INTERVAL_S="0.1",
        HOLDS__SWEEP_GRACE_S="0",
    )


@pytest.fixture(scope="module")
def replica(shop: House) -> Iterator[House]:
    """Another service on the same database."""
    port = free_port()
    home = shop.service.data_dir.parent
    other = Service(
        port=port,
        data_dir=home / "replica",
        environ={
            **shop.service.environ,
            "TALLYGATE_PORT": str(port),
            "TALLYGATE_DATA_DIR": str(home / "replica"),
        },
        log_path=home / "replica.log",
    )
    other.start()
    yield House(other, shop.database_url)
    other.stop()


@pytest.fixture(scope="module")
def narrow(make_house: Callable[..., House], provider_server: FakeProvider) -> House:
    """A service that keeps little."""
    return make_stand_in(
        make_house,
        provider_server,
        REPEATS__RETRY_ANSWER_BYTES="2000",
        REPEATS__RETRY_BYTES="6000",
        REPEATS__IDEMPOTENCY_ANSWER_BYTES="2000",
    )


@pytest.fixture
def buyer(shop: House, provider: FakeProvider) -> Guest:
    """A customer with 1000 credits, which are one dollar."""
    del provider
    return shop.customer()


@pytest.fixture
def wire(shop: House) -> Iterator[Wire]:
    """What lies between the customer and the service."""
    with wire_to(shop.service.port) as wire:
        yield wire


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """openai-node, in a process of its own."""
    program = Program([NODE, CLIENTS / "openai.mjs"], tmp_path_factory.mktemp("home"))
    yield program
    program.close()


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long the SDKs wait before they ask again is their own business."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("anthropic._base_client.INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def python(wire: Wire, buyer: Guest) -> Iterator[openai.OpenAI]:
    """openai-python with its default retries, over the wire."""
    client = openai.OpenAI(base_url=f"{wire.url}/v1", api_key=buyer.customer.key, timeout=30)
    assert client.max_retries == 2
    yield client
    client.close()


def charged(guest: Guest, *, count: int = 1) -> None:
    """Hold that the account paid for so many answers, and nothing is held."""
    guest.wait_settled(count=count)
    row = guest.usage(count=count)
    assert (row["status"], row["price"], row["review_reason"]) == ("billed", PRICE_NANOS, None)
    assert guest.balance() == (START_NANOS - count * PRICE_NANOS, 0)


def retried(guest: Guest, number: int = 1, **body: Any) -> httpx.Response:
    """Send what an SDK sends as its `number`th retry; 0 is the first attempt."""
    return guest.chat(http_headers={RETRY: str(number)}, **body)


def keyed(guest: Guest, key: str, **body: Any) -> httpx.Response:
    """Send a chat completion with an Idempotency-Key."""
    return guest.chat(http_headers={"idempotency-key": key}, **body)


def refused(answer: httpx.Response, code: str, *, status: int = 409) -> dict[str, Any]:
    """Hold that it was refused for good; returns the error."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert answer.headers["x-should-retry"] == "false"
    return error


# -------------------------------------------------------------------------------------------------
# SDKs on broken connections
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [NO_ANSWER, CUT_IN_HEAD, CUT_BEFORE_BODY, CUT_IN_BODY, STALLED])
def test_python_sdk_gets_a_broken_answer_again_and_pays_once(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider, fault: Fault
) -> None:
    wire.break_next(fault)
    client = python.with_options(timeout=1) if fault.stalls else python
    answer = client.chat.completions.with_raw_response.create(model="priced", messages=MESSAGES)
    assert answer.parse().choices[0].message.content == TEXT
    assert (wire.requests, len(provider.requests)) == (2, 1)
    assert answer.headers[REPLAY_OF] == str(buyer.usage()["request_id"])
    assert answer.headers["x-tallygate-charge-credits"] == "0.12"
    charged(buyer)


def test_python_sdk_gets_an_answer_that_broke_twice(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider
) -> None:
    wire.break_next(CUT_IN_BODY, NO_ANSWER)
    answer = python.chat.completions.create(model="priced", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    assert (wire.requests, len(provider.requests)) == (3, 1)
    charged(buyer)


def test_python_sdk_that_never_gets_through_pays_once(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider
) -> None:
    wire.break_all(NO_ANSWER)
    with pytest.raises(openai.APIConnectionError):
        python.chat.completions.create(model="priced", messages=MESSAGES)
    assert (wire.requests, len(provider.requests)) == (3, 1)
    charged(buyer)


def test_python_sdk_that_gives_up_too_early_gets_the_answer_of_its_first_attempt(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))

    def let_go() -> None:
        wait_for(lambda: wire.requests == 2, "the retry")
        gate.open()

    opener = threading.Thread(target=let_go)
    opener.start()
    hasty = python.with_options(timeout=1)
    answer = hasty.chat.completions.create(model="priced", messages=MESSAGES)
    opener.join()
    assert answer.choices[0].message.content == TEXT
    assert len(provider.requests) == 1
    charged(buyer)


@pytest.mark.parametrize("fault", [NO_ANSWER, CUT_IN_HEAD])
def test_python_sdk_gets_a_stream_that_never_began_and_pays_once(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider, fault: Fault
) -> None:
    wire.break_next(fault)
    stream = python.chat.completions.create(
        model="priced", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == TEXT
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.total_tokens, (usage.model_extra or {})["cost"]) == (15, 0.00012)
    assert (wire.requests, len(provider.requests)) == (2, 1)
    charged(buyer)


@pytest.mark.parametrize("path", ["responses", "embeddings"])
def test_python_sdk_pays_once_on_other_endpoints(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider, path: str
) -> None:
    wire.break_next(CUT_IN_BODY)
    if path == "responses":
        assert python.responses.create(model="priced", input="hi").output_text == TEXT
    else:
        python.embeddings.create(model="embed", input="hi")
    assert (wire.requests, len(provider.requests)) == (2, 1)
    row = buyer.usage()
    assert row["status"] == "billed"
    assert buyer.balance() == (START_NANOS - row["price"], 0)


def test_anthropic_sdk_gets_a_broken_answer_again_and_pays_once(
    buyer: Guest, wire: Wire, provider: FakeProvider
) -> None:
    wire.break_next(CUT_IN_BODY)
    with anthropic.Anthropic(base_url=wire.url, api_key=buyer.customer.key) as client:
        answer = client.messages.create(model="claude", max_tokens=50, messages=MESSAGES)
    assert [getattr(block, "text", None) for block in answer.content] == [TEXT]
    assert (wire.requests, len(provider.requests)) == (2, 1)
    charged(buyer)


@pytest.mark.parametrize("fault", [NO_ANSWER, CUT_IN_HEAD, STALLED])
def test_node_sdk_gets_a_broken_answer_again_and_pays_once(
    buyer: Guest, wire: Wire, node: Program, provider: FakeProvider, fault: Fault
) -> None:
    wire.break_next(fault)
    timeout = 1000 if fault.stalls else 30_000
    answer = node.do("chat", buyer, base_url=wire.url, retries=2, timeout=timeout)
    assert (answer["text"], answer["usage"]["total_tokens"]) == (TEXT, 15)
    assert (wire.requests, len(provider.requests)) == (2, 1)
    charged(buyer)


def test_node_sdk_gets_a_stream_that_never_began_and_pays_once(
    buyer: Guest, wire: Wire, node: Program, provider: FakeProvider
) -> None:
    wire.break_next(NO_ANSWER)
    assert node.do("stream", buyer, base_url=wire.url, retries=2)["text"] == TEXT
    assert (wire.requests, len(provider.requests)) == (2, 1)
    charged(buyer)


def test_node_sdk_that_gives_up_too_early_gets_the_answer_of_its_first_attempt(
    buyer: Guest, wire: Wire, node: Program, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(node.do, "chat", buyer, base_url=wire.url, retries=2, timeout=1000)
        wait_for(lambda: wire.requests == 2, "the retry")
        gate.open()
        assert asked.result()["text"] == TEXT
    assert len(provider.requests) == 1
    charged(buyer)


# -------------------------------------------------------------------------------------------------
# What a retry is, and what it is not
# -------------------------------------------------------------------------------------------------


def test_retry_is_answered_byte_for_byte_and_says_whose_answer_it_is(
    buyer: Guest, provider: FakeProvider
) -> None:
    for stream in (False, True):
        first, again = retried(buyer, 0, stream=stream), retried(buyer, stream=stream)
        assert again.content == first.content
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers[REPLAY_OF] == first.headers["x-request-id"]
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
        assert REPLAY_OF not in first.headers
    assert len(provider.requests) == 2
    charged(buyer, count=2)


@pytest.mark.parametrize(
    "changed",
    [{"max_tokens": 49}, {"messages": [{"role": "user", "content": "ho"}]}, {"stream": True}],
)
def test_retry_with_another_body_is_another_request(
    buyer: Guest, provider: FakeProvider, changed: dict[str, Any]
) -> None:
    retried(buyer, 0)
    assert retried(buyer, **changed).status_code == 200
    assert len(provider.requests) == 2
    charged(buyer, count=2)


@pytest.mark.parametrize("headers", [{}, {RETRY: "0"}, {RETRY: "x"}, {RETRY: "-1"}])
def test_what_does_not_say_that_it_is_a_retry_is_none(
    buyer: Guest, provider: FakeProvider, headers: dict[str, str]
) -> None:
    retried(buyer, 0)
    buyer.chat(http_headers=headers)
    assert len(provider.requests) == 2
    charged(buyer, count=2)


def test_retry_with_another_key_of_the_account_is_another_request(
    buyer: Guest, provider: FakeProvider
) -> None:
    retried(buyer, 0)
    path = f"/admin/v1/accounts/{buyer.customer.account_id}/keys"
    other = buyer.house.service.admin("POST", path, {"name": "other"})
    same_account = Guest(
        buyer.house, Customer(buyer.customer.account_id, other["id"], other["key"])
    )
    assert retried(same_account).status_code == 200
    assert len(provider.requests) == 2
    charged(buyer, count=2)


def test_retry_with_another_providers_key_is_another_request(
    buyer: Guest, provider: FakeProvider
) -> None:
    for number, key in enumerate(["sk-own-1", "sk-own-2", "sk-own-2"]):
        buyer.chat(http_headers={RETRY: str(number), "x-openai-key": key})
    assert [request.json()["api_key"] for request in provider.requests] == ["sk-own-1", "sk-own-2"]


def test_retry_of_what_failed_is_carried_out(buyer: Guest, provider: FakeProvider) -> None:
    provider.reply_once("priced", Reply(status=500))
    assert retried(buyer, 0).status_code == 502
    assert retried(buyer).status_code == 200
    assert len(provider.requests) == 2
    assert [row["status"] for row in _rows(buyer)] == ["void", "billed"]
    assert buyer.balance() == (START_NANOS - PRICE_NANOS, 0)


def test_retries_that_wait_for_an_attempt_that_fails_are_one_request(
    buyer: Guest, provider: FakeProvider
) -> None:
    failing = Gate()
    provider.reply_once("priced", Reply(status=500, gate=failing))
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(retried, buyer, 0)
        failing.wait_reached()
        # Its client gave up twice, and the second retry is the only one that anybody hears.
        retries = [pool.submit(retried, buyer, 1)]
        wait_for(lambda: _open_requests(buyer.house) == 2, "the first retry")
        retries.append(pool.submit(retried, buyer, 2))
        wait_for(lambda: _open_requests(buyer.house) == 3, "the second retry")
        failing.open()
        assert first.result().status_code == 502
        bodies = {retry.result().content for retry in retries}
    assert len(bodies) == 1
    assert len(provider.requests) == 2
    assert buyer.balance() == (START_NANOS - PRICE_NANOS, 0)


def test_equal_requests_that_are_all_retried_at_once_are_each_carried_out(
    buyer: Guest, provider: FakeProvider
) -> None:
    provider.reply_once("priced", *[Reply(status=429)] * 5)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(retried, [buyer] * 5, [0] * 5))
        gate = Gate()
        provider.reply("priced", Reply(gate=gate))
        retries = [pool.submit(retried, buyer) for _ in range(5)]
        wait_for(lambda: len(provider.requests) == 10, "all five retries at the provider")
        gate.open()
        assert {retry.result().status_code for retry in retries} == {200}
    assert buyer.balance() == (START_NANOS - 5 * PRICE_NANOS, 0)


def test_account_may_have_its_retries_carried_out_and_charged(
    buyer: Guest, provider: FakeProvider
) -> None:
    path = f"/admin/v1/accounts/{buyer.customer.account_id}"
    buyer.house.service.admin("PATCH", path, {"replay_retries": False})
    retried(buyer, 0)
    assert REPLAY_OF not in retried(buyer).headers
    assert len(provider.requests) == 2
    charged(buyer, count=2)


def test_retry_after_the_time_to_live_is_charged(
    make_house: Callable[..., House], provider: FakeProvider
) -> None:
    house = make_stand_in(make_house, provider, REPEATS__RETRY_TTL_S="0")
    guest = house.customer()
    retried(guest, 0)
    assert REPLAY_OF not in retried(guest).headers
    charged(guest, count=2)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_is_too_large_to_be_kept_is_not_charged_twice(
    narrow: House,
    provider: FakeProvider,
    stream: bool,  # noqa: FBT001
) -> None:
    guest = narrow.customer()
    provider.reply("priced", Reply(content="x" * 2000))
    assert retried(guest, 0, stream=stream).status_code == 200
    refused(retried(guest, stream=stream), "retry_answer_not_kept")
    assert len(provider.requests) == 1
    charged(guest)


def test_store_of_answers_stays_within_its_bytes_and_forgets_the_oldest(
    narrow: House, provider: FakeProvider
) -> None:
    guest = narrow.customer()
    for number in range(10):
        retried(guest, 0, user=f"user-{number}")
        assert 0 < _stored_bytes(narrow) <= 6000
    assert REPLAY_OF in retried(guest, user="user-9").headers
    assert REPLAY_OF not in retried(guest, user="user-0").headers
    assert len(provider.requests) == 11
    charged(guest, count=11)


def test_streams_in_flight_keep_no_more_than_the_store_may(
    narrow: House, provider: FakeProvider
) -> None:
    """Ten streams of 1800 bytes each may each be kept, and not all ten at once."""
    guest = narrow.customer()
    gate = Gate(after_chunks=4)
    provider.reply("priced", Reply(content="x" * 300, gate=gate))
    with ThreadPoolExecutor(10) as pool:
        asked = [
            pool.submit(retried, guest, 0, stream=True, user=f"user-{number}")
            for number in range(10)
        ]
        wait_for(lambda: _open_requests(narrow) == 10, "ten streams")
        gate.wait_reached()
        gate.open()
        answers = [each.result() for each in asked]
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    again = [retried(guest, stream=True, user=f"user-{number}") for number in range(10)]
    kept = sum(REPLAY_OF in answer.headers for answer in again)
    assert kept < 10
    assert _stored_bytes(narrow) <= 6000


def test_revoked_key_gets_no_answer_again(buyer: Guest, provider: FakeProvider) -> None:
    retried(buyer, 0)
    keyed(buyer, "k")
    path = f"/admin/v1/accounts/{buyer.customer.account_id}/keys/{buyer.customer.key_id}"
    buyer.house.service.admin("DELETE", path)
    for answer in (retried(buyer), keyed(buyer, "k")):
        refused(answer, "invalid_api_key", status=401)
        assert TEXT not in answer.text
    assert len(provider.requests) == 2
    charged(buyer, count=2)


# -------------------------------------------------------------------------------------------------
# Idempotency-Key
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_same_key_and_body_get_the_answer_again_on_every_replica(
    buyer: Guest,
    replica: House,
    provider: FakeProvider,
    stream: bool,  # noqa: FBT001
) -> None:
    first = keyed(buyer, "k", stream=stream)
    for guest in (buyer, Guest(replica, buyer.customer)):
        again = keyed(guest, "k", stream=stream)
        assert (again.status_code, again.content) == (200, first.content)
        assert again.headers["content-type"] == first.headers["content-type"]
        assert again.headers[REPLAY_OF] == first.headers["x-request-id"]
    assert len(provider.requests) == 1
    charged(buyer)


def test_key_brings_the_answer_back_to_an_sdk_whose_connection_broke(
    buyer: Guest, wire: Wire, python: openai.OpenAI, provider: FakeProvider
) -> None:
    wire.break_next(CUT_IN_BODY)
    answer = python.chat.completions.create(
        model="priced", messages=MESSAGES, extra_headers={"Idempotency-Key": "mine"}
    )
    assert answer.choices[0].message.content == TEXT
    assert (wire.requests, len(provider.requests)) == (2, 1)
    charged(buyer)


def test_key_with_another_body_is_refused(buyer: Guest, provider: FakeProvider) -> None:
    keyed(buyer, "k")
    refused(keyed(buyer, "k", max_tokens=49), "idempotency_key_reused")
    refused(keyed(buyer, "k", stream=True), "idempotency_key_reused")
    assert len(provider.requests) == 1
    charged(buyer)


def test_key_of_another_account_is_another_key(
    buyer: Guest, shop: House, provider: FakeProvider
) -> None:
    other = shop.customer()
    for guest in (buyer, other):
        assert REPLAY_OF not in keyed(guest, "k").headers
        charged(guest)
    assert len(provider.requests) == 2


def test_key_in_flight_is_refused_on_every_replica(
    buyer: Guest, replica: House, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(keyed, buyer, "k")
        gate.wait_reached()
        for guest in (buyer, Guest(replica, buyer.customer)):
            refused(keyed(guest, "k"), "idempotency_in_flight")
        gate.open()
        first = asked.result()
    assert keyed(buyer, "k").content == first.content
    assert len(provider.requests) == 1
    charged(buyer)


def test_refused_and_failed_requests_give_their_key_back(
    shop: House, provider: FakeProvider
) -> None:
    poor = shop.customer(credits="0")
    assert keyed(poor, "k").status_code == 402
    grant = {"credits": "1000", "reason": "test", "reference": poor.customer.account_id}
    shop.service.admin("POST", f"/admin/v1/accounts/{poor.customer.account_id}/grants", grant)
    provider.reply_once("priced", Reply(status=500), Reply(cut_after=1, reset=True))
    assert keyed(poor, "k").status_code == 502
    assert keyed(poor, "k").status_code == 502
    assert keyed(poor, "k").status_code == 200
    assert [request.path for request in provider.requests].count(CHAT) == 3
    assert [row["status"] for row in _rows(poor)] == ["void", "void", "billed"]
    assert poor.balance() == (START_NANOS - PRICE_NANOS, 0)


def test_stream_that_was_cut_gives_its_key_back(buyer: Guest, provider: FakeProvider) -> None:
    provider.reply_once("priced", Reply(cut_after=2, reset=True))
    assert '"error"' in keyed(buyer, "k", stream=True).text
    again = keyed(buyer, "k", stream=True)
    assert again.text.endswith("data: [DONE]\n\n")
    assert REPLAY_OF not in again.headers
    assert [row["status"] for row in _rows(buyer)] == ["needs_review", "billed"]
    assert buyer.balance() == (START_NANOS - PRICE_NANOS, 0)


@pytest.fixture
def broken_keeping(shop: House) -> Iterator[None]:
    """A database that takes no answer, for a reason that nobody has thought of."""
    with psycopg.connect(shop.database_url, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION tallygate.refuse_answer() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'no answers' USING ERRCODE = 'raise_exception'; END $$;"
            " CREATE TRIGGER refuse_answer BEFORE UPDATE ON tallygate.idempotency_keys"
            " FOR EACH ROW WHEN (NEW.state = 'done') EXECUTE FUNCTION tallygate.refuse_answer()"
        )
        yield
        connection.execute(
            "DROP TRIGGER refuse_answer ON tallygate.idempotency_keys;"
            " DROP FUNCTION tallygate.refuse_answer()"
        )


@pytest.mark.usefixtures("broken_keeping")
def test_answer_that_a_defect_keeps_back_is_void_at_once(buyer: Guest) -> None:
    assert keyed(buyer, "k").status_code == 500
    buyer.wait_settled()
    assert buyer.usage()["status"] == "void"
    assert buyer.balance() == (START_NANOS, 0)


@pytest.mark.usefixtures("broken_keeping")
def test_stream_whose_end_a_defect_keeps_back_is_charged_at_once(buyer: Guest) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        keyed(buyer, "k", stream=True)
    charged(buyer)


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_is_too_large_is_named_and_not_charged_twice(
    narrow: House,
    provider: FakeProvider,
    stream: bool,  # noqa: FBT001
) -> None:
    guest = narrow.customer()
    provider.reply("priced", Reply(content="x" * 2000))
    first = keyed(guest, "k", stream=stream)
    error = refused(keyed(guest, "k", stream=stream), "idempotency_answer_not_kept")
    assert error["request_id"] == first.headers["x-request-id"]
    assert guest.get(f"/api/v1/usage/{error['request_id']}")["status"] == "billed"
    assert len(provider.requests) == 1
    charged(guest)


def test_key_whose_time_is_over_is_a_new_one(buyer: Guest, provider: FakeProvider) -> None:
    keyed(buyer, "k")
    change(
        buyer.house,
        "UPDATE idempotency_keys SET expires_at = now() WHERE account_id = %s",
        buyer.customer.account_id,
    )
    assert REPLAY_OF not in keyed(buyer, "k").headers
    assert len(provider.requests) == 2
    charged(buyer, count=2)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_what_can_be_no_key_is_refused(buyer: Guest, provider: FakeProvider, key: str) -> None:
    refused(keyed(buyer, key), "invalid_idempotency_key", status=400)
    assert provider.requests == []
    assert buyer.uncharged()


def test_key_of_a_killed_service_is_free_again_when_its_hold_is_given_up(
    shop: House, buyer: Guest, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply_once("priced", Reply(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(keyed, buyer, "k")
        gate.wait_reached()
        shop.service.kill()
        assert isinstance(asked.exception(), httpx.TransportError)
    shop.service.start()
    gate.open()
    # The key's lease and the hold are still running, and both end in their time.
    refused(keyed(buyer, "k"), "idempotency_in_flight")
    change(shop, "UPDATE idempotency_keys SET lease_until = now()")
    refused(keyed(buyer, "k"), "idempotency_in_flight")
    assert buyer.balance()[1] > 0
    change(shop, "UPDATE open_holds SET expires_at = now()")
    buyer.wait_settled()
    assert keyed(buyer, "k").status_code == 200
    assert len(provider.requests) == 2
    told = [(row["status"], row["review_reason"]) for row in _rows(buyer)]
    assert told == [("needs_review", "orphaned"), ("billed", None)]
    assert buyer.balance() == (START_NANOS - PRICE_NANOS, 0)


def change(house: House, query: str, *parameters: object) -> None:
    """Move times on, as the owner of the database can."""
    with psycopg.connect(house.database_url) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute(query.encode(), parameters)


def _rows(guest: Guest) -> list[dict[str, Any]]:
    """The usage rows in the order in which they were asked for."""
    query = "SELECT * FROM usage WHERE account_id = %s ORDER BY request_id"
    return guest.house.rows(query, guest.customer.account_id)


def _stored_bytes(house: House) -> float:
    return _metric(house, "tallygate_replay_store_bytes")


def _open_requests(house: House) -> float:
    return _metric(house, "tallygate_requests_in_flight")


def _metric(house: House, name: str) -> float:
    text = httpx.get(f"{house.service.base_url}/metrics").text
    return sum(
        float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    )
