"""Streams as they really go: clients that leave, providers that break, silence, and great length.

Every test holds what the customer sees, what it pays, and that nothing stays held.
"""

import json
import re
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import httpx
import openai
import pytest

from tests.e2e.conftest import Guest, House, wait_for
from tests.support.litellm import MODELS
from tests.support.provider import FakeProvider, Gate, Reply
from tests.support.wire import Fault, Wire, wire_to

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TEXT = "Hello from the provider."
START_NANOS = 1_000_000_000
# 10 prompt and 5 completion tokens at 1 and 10 dollars a million: 60 micro-dollars, sold double.
PRICE_NANOS = 120_000
COMMENT = b": tallygate is waiting for the model\n\n"
MIB = 1024 * 1024


class Endpoint(NamedTuple):
    """How an endpoint is asked, and where its stream can be broken."""

    path: str
    body: Mapping[str, Any]
    # Its price per prompt and completion token, in nano-dollars, as the customer is charged.
    prices: tuple[int, int]
    # After this many of the provider's events there is text, and more to come.
    middle: int
    # How many there are before the usage.
    before_usage: int
    # What ends the stream.
    end: bytes


ENDPOINTS: Mapping[str, Endpoint] = {
    "chat": Endpoint(
        "/v1/chat/completions",
        {"model": "priced", "messages": MESSAGES, "max_tokens": 50},
        (2_000, 20_000),
        2,
        4,
        b"data: [DONE]\n\n",
    ),
    "completions": Endpoint(
        "/v1/completions",
        {"model": "instruct", "prompt": "hi", "max_tokens": 50},
        (3_000, 4_000),
        2,
        4,
        b"data: [DONE]\n\n",
    ),
    "responses": Endpoint(
        "/v1/responses",
        {"model": "priced", "input": "hi", "max_output_tokens": 50},
        (2_000, 20_000),
        6,
        10,
        b'"response.completed"',
    ),
    "messages": Endpoint(
        "/v1/messages",
        {"model": "claude", "messages": MESSAGES, "max_tokens": 50},
        (2_000, 20_000),
        5,
        7,
        b'"message_stop"',
    ),
}
ALL = list(ENDPOINTS)
# Where the error of a broken stream stands: what makes each SDK raise.
ERROR_MARKS = {
    "chat": b'data: {"error":{',
    "completions": b'data: {"error":{',
    "responses": b'event: error\ndata: {"type":"error","code":',
    "messages": b'event: error\ndata: {"type":"error","error":{',
}


def make_stand_in(
    make_house: Callable[..., House], provider: FakeProvider, url: str, **environ: str
) -> House:
    """A service whose LiteLLM is the fake provider, so that it does what LiteLLM never would."""
    provider.deployments = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}"}, "model_info": info}
        for name, info in MODELS.items()
    ]
    prefixed = {f"TALLYGATE_{name}": text for name, text in environ.items()}
    return make_house(litellm_url=url, environ=prefixed)


@pytest.fixture(scope="module")
def upstream_wire(provider_server: FakeProvider) -> Iterator[Wire]:
    """What lies between the stand-in's service and its provider."""
    with wire_to(int(provider_server.root_url.rpartition(":")[2])) as wire:
        yield wire


@pytest.fixture(scope="module")
def stand_in(
    make_house: Callable[..., House], provider_server: FakeProvider, upstream_wire: Wire
) -> House:
    """A service that speaks up after a tenth of a second, and has little patience."""
    return make_stand_in(
        make_house,
        provider_server,
        upstream_wire.url,
        KEEP_ALIVE_S="0.1",
        UPSTREAM__READ_TIMEOUT_S="3",
        UPSTREAM__DRAIN_TIMEOUT_S="0.3",
        UPSTREAM__DRAIN_BYTES=str(MIB),
    )


@pytest.fixture
def patron(stand_in: House, provider: FakeProvider) -> Guest:
    """A customer of that service."""
    del provider
    return stand_in.customer()


def body_of(name: str, **more: Any) -> dict[str, Any]:
    """The body of a streamed call."""
    return {**ENDPOINTS[name].body, "stream": True, **more}


def ask(
    guest: Guest, name: str, *, http_headers: dict[str, str] | None = None, **more: Any
) -> httpx.Response:
    """Call an endpoint as a stream, and read it to its end."""
    with guest.house.service.client(guest.customer.key) as client:
        return client.post(ENDPOINTS[name].path, json=body_of(name, **more), headers=http_headers)


@contextmanager
def asking(
    guest: Guest, name: str, *, buffer_bytes: int = 0, **more: Any
) -> Generator[socket.socket]:
    """Call an endpoint over a socket of one's own, which can be left at any time."""
    body = json.dumps(body_of(name, **more)).encode()
    with socket.socket() as connection:
        if buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", guest.house.service.port))
        connection.sendall(
            b"POST %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
            % (ENDPOINTS[name].path.encode(), guest.customer.key.encode(), len(body))
            + body
        )
        yield connection


def read_until(connection: socket.socket, what: bytes, *, times: int = 1) -> bytes:
    """Read until that was sent so many times."""
    received = b""
    while received.count(what) < times:
        data = connection.recv(65536)
        assert data, received
        received += data
    return received


def settled(
    guest: Guest, *, status: str = "billed", reason: str | None = None, price: int | None = None
) -> dict[str, Any]:
    """Hold how the only request of a customer ended; returns its usage row."""
    guest.wait_settled()
    row = guest.usage()
    assert (row["status"], row["review_reason"], row["price"]) == (status, reason, price), row
    assert guest.balance() == (START_NANOS - (price or 0), 0)
    assert not guest.house.rows(
        "SELECT 1 FROM open_holds WHERE account_id = %s", guest.customer.account_id
    )
    return row


def price_of(name: str, prompt: int = 10, completion: int = 5) -> int:
    """What an answer costs its customer, in nano-dollars."""
    given, made = ENDPOINTS[name].prices
    return prompt * given + completion * made


def ends_whole(name: str, stream: bytes) -> bool:
    """Whether a stream has its end, and no error."""
    last = stream.rstrip().rpartition(b"\n\n")[2]
    return ENDPOINTS[name].end.strip() in last and b'"error":{' not in stream


# -------------------------------------------------------------------------------------------------
# The client leaves
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_client_that_leaves_in_mid_stream_pays_for_what_was_generated(
    guest: Guest, provider: FakeProvider, name: str
) -> None:
    gate = Gate(after_chunks=ENDPOINTS[name].middle)
    reply = Reply(chunks=20, completion_tokens=30, gate=gate)
    provider.reply(str(ENDPOINTS[name].body["model"]), reply)
    with asking(guest, name) as connection:
        read_until(connection, b"data: ")
        gate.wait_reached()
        assert guest.balance()[1] > 0
    gate.open()
    assert provider.last().wait_ended().finished
    row = settled(guest, price=price_of(name, completion=30))
    assert (row["client_gone"], row["output_tokens"]) == (True, 30)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_client_that_leaves_before_the_first_byte_pays_for_what_was_generated(
    patron: Guest,
    provider: FakeProvider,
    name: str,
    stream: bool,  # noqa: FBT001
) -> None:
    gate = Gate()
    provider.reply(str(ENDPOINTS[name].body["model"]), Reply(gate=gate))
    with asking(patron, name, stream=stream):
        gate.wait_reached()
    gate.open()
    assert provider.last().wait_ended().finished
    settled(patron, price=price_of(name))


@pytest.mark.parametrize("name", ALL)
def test_drain_is_bounded_in_time(patron: Guest, provider: FakeProvider, name: str) -> None:
    gate = Gate(after_chunks=ENDPOINTS[name].middle)
    provider.reply(str(ENDPOINTS[name].body["model"]), Reply(gate=gate))
    with asking(patron, name) as connection:
        read_until(connection, b"data: ")
        gate.wait_reached()
    assert provider.last().wait_ended().closed_early
    row = settled(patron, status="needs_review", reason="client_gone")
    assert (row["client_gone"], row["error_code"]) == (True, "drain_timeout")


def test_drain_is_bounded_in_bytes(patron: Guest, provider: FakeProvider) -> None:
    gate = Gate(after_chunks=1)
    content = "x" * 100_000
    provider.reply("priced", Reply(content=content, repeat_content=True, chunks=400, gate=gate))
    with asking(patron, "chat") as connection:
        read_until(connection, b"data: ")
    gate.open()
    assert provider.last().wait_ended().closed_early
    row = settled(patron, status="needs_review", reason="client_gone")
    assert (row["client_gone"], row["error_code"]) == (True, "drain_bytes")


def test_drain_that_ends_before_the_first_word_waits_for_review(
    patron: Guest, provider: FakeProvider, upstream_wire: Wire
) -> None:
    # The provider's headers come, and nothing else: it may be thinking, and that costs.
    upstream_wire.break_next(Fault(after_bytes=0, in_body=True, stalls=True))
    with asking(patron, "chat") as connection:
        read_until(connection, COMMENT)
    assert len(provider.requests) == 1
    settled(patron, status="needs_review", reason="client_gone")


# -------------------------------------------------------------------------------------------------
# The provider breaks, as LiteLLM tells it
# -------------------------------------------------------------------------------------------------


def _break(how: str, after: int) -> dict[str, Any]:
    """What tells the provider to break its stream after so many events."""
    if how.startswith("error"):
        return {"error_after": after, "keep_usage_after_error": how == "error-then-usage"}
    return {"cut_after": after, "reset": how == "reset"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["error", "error-then-usage", "cut", "reset"])
def test_broken_stream_ends_in_an_error_and_waits_for_review(
    guest: Guest, provider: FakeProvider, name: str, how: str
) -> None:
    # Slow enough for LiteLLM to have passed on what came before.
    reply = Reply(chunks=5, chunk_delay_s=0.02, **_break(how, ENDPOINTS[name].middle))
    provider.reply(str(ENDPOINTS[name].body["model"]), reply)
    answer = ask(guest, name)
    assert answer.status_code == 200
    assert TEXT[:4] in answer.text
    if how == "cut" and name in {"chat", "completions"}:
        # LiteLLM makes up a `stop` and a usage, and nothing tells them from the provider's.
        assert ends_whole(name, answer.content)
        row = guest.usage()
        settled(guest, price=price_of(name, row["input_tokens"], row["output_tokens"]))
        assert row["output_tokens"] > 0
        return
    assert ERROR_MARKS[name] in answer.content
    assert not ends_whole(name, answer.content)
    assert "litellm" not in answer.text.lower()
    settled(guest, status="needs_review", reason="stream_cut")


@pytest.mark.parametrize("name", ALL)
def test_usage_that_comes_twice_is_charged_once(
    guest: Guest, provider: FakeProvider, name: str
) -> None:
    provider.reply(str(ENDPOINTS[name].body["model"]), Reply(usage_times=2))
    assert ends_whole(name, ask(guest, name).content)
    settled(guest, price=price_of(name))


@pytest.mark.parametrize("name", ["chat", "responses", "messages"])
def test_stream_without_a_usage_is_delivered_and_waits_for_review(
    patron: Guest, provider: FakeProvider, name: str
) -> None:
    provider.reply(str(ENDPOINTS[name].body["model"]), Reply(usage={}))
    assert ends_whole(name, ask(patron, name).content)
    settled(patron, status="needs_review", reason="usage_missing")


@pytest.mark.parametrize(
    "name, free", [("chat", "free"), ("completions", "instruct-free"), ("messages", "claude-free")]
)
def test_free_stream_costs_nothing_and_is_billed(guest: Guest, name: str, free: str) -> None:
    assert ends_whole(name, ask(guest, name, model=free).content)
    settled(guest, price=0)


@pytest.mark.parametrize("name", ALL)
def test_unpriced_stream_waits_for_review(guest: Guest, name: str) -> None:
    model = {"chat": "unpriced", "responses": "unpriced"}.get(name)
    model = model or f"{ENDPOINTS[name].body['model']}-unpriced"
    assert ends_whole(name, ask(guest, name, model=model).content)
    settled(guest, status="needs_review", reason="price_missing")


@pytest.mark.parametrize("how", ["error", "cut", "reset"])
@pytest.mark.parametrize("name", ALL)
def test_what_breaks_after_the_usage_is_a_whole_answer(
    patron: Guest, provider: FakeProvider, name: str, how: str
) -> None:
    reply = Reply(usage_times=2, **_break(how, ENDPOINTS[name].before_usage + 1))
    provider.reply(str(ENDPOINTS[name].body["model"]), reply)
    answer = ask(patron, name)
    assert ends_whole(name, answer.content), answer.text
    settled(patron, price=price_of(name))


# -------------------------------------------------------------------------------------------------
# Silence
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_comments_fill_the_silence_before_the_first_byte_and_in_the_middle(
    patron: Guest, provider: FakeProvider, name: str
) -> None:
    for gate in (Gate(), Gate(after_chunks=ENDPOINTS[name].middle)):
        guest = patron.house.customer()
        provider.reply(str(ENDPOINTS[name].body["model"]), Reply(gate=gate))
        with asking(guest, name) as connection:
            received = read_until(connection, COMMENT, times=2)
            gate.open()
            received += read_until(connection, b"\r\n0\r\n\r\n")
        stream = _unchunked(received)
        assert TEXT[:4].encode() in stream
        assert ends_whole(name, stream)
        settled(guest, price=price_of(name))


@pytest.mark.parametrize(
    "name, status, code",
    [
        ("chat", 429, "upstream_rate_limited"),
        ("chat", None, "upstream_timeout"),
        ("responses", 500, "upstream_error"),
        ("messages", 500, "upstream_error"),
    ],
)
def test_failure_after_the_comments_began_is_an_event_and_charges_nothing(
    patron: Guest, provider: FakeProvider, name: str, status: int | None, code: str
) -> None:
    gate = Gate()
    provider.reply(str(ENDPOINTS[name].body["model"]), Reply(status=status or 200, gate=gate))
    with asking(patron, name) as connection:
        received = read_until(connection, COMMENT)
        assert received.startswith(b"HTTP/1.1 200")
        if status is not None:
            gate.open()
        received += read_until(connection, b"\r\n0\r\n\r\n")
    stream = _unchunked(received)
    assert ERROR_MARKS[name] in stream
    assert code.encode() in stream
    row = settled(patron, status="void")
    assert row["error_code"] == code


@contextmanager
def _quiet_for_a_while(guest: Guest, gate: Gate) -> Generator[str]:
    """A wire on which comments are seen before the provider goes on; yields its URL."""
    with wire_to(guest.house.service.port) as wire:

        def let_go() -> None:
            wait_for(lambda: wire.seen.count(COMMENT) >= 2, "two comments")
            gate.open()

        opener = threading.Thread(target=let_go)
        opener.start()
        yield wire.url
        opener.join()


@pytest.mark.parametrize("after", [0, 2])
def test_openai_sdk_takes_no_notice_of_comments(
    patron: Guest, provider: FakeProvider, after: int
) -> None:
    gate = Gate(after_chunks=after)
    provider.reply("priced", Reply(gate=gate))
    with (
        _quiet_for_a_while(patron, gate) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=patron.customer.key, timeout=30) as client,
    ):
        stream = client.chat.completions.create(model="priced", messages=MESSAGES, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == TEXT
    settled(patron, price=PRICE_NANOS)


@pytest.mark.parametrize("after", [0, 6])
def test_openai_sdk_takes_no_notice_of_comments_in_responses(
    patron: Guest, provider: FakeProvider, after: int
) -> None:
    gate = Gate(after_chunks=after)
    provider.reply("priced", Reply(gate=gate))
    with (
        _quiet_for_a_while(patron, gate) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=patron.customer.key, timeout=30) as client,
        client.responses.stream(model="priced", input="hi") as stream,
    ):
        assert stream.get_final_response().output_text == TEXT
    settled(patron, price=PRICE_NANOS)


@pytest.mark.parametrize("after", [0, 5])
def test_anthropic_sdk_takes_no_notice_of_comments(
    patron: Guest, provider: FakeProvider, after: int
) -> None:
    gate = Gate(after_chunks=after)
    provider.reply("claude", Reply(gate=gate))
    with (
        _quiet_for_a_while(patron, gate) as url,
        anthropic.Anthropic(base_url=url, api_key=patron.customer.key, timeout=30) as client,
        client.messages.stream(model="claude", max_tokens=50, messages=MESSAGES) as stream,
    ):
        assert stream.get_final_text() == TEXT
        assert stream.get_final_message().stop_reason == "end_turn"
    settled(patron, price=PRICE_NANOS)


def test_sdks_raise_for_a_failure_after_the_comments_began(
    patron: Guest, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(status=500, gate=gate))
    with (
        _quiet_for_a_while(patron, gate) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=patron.customer.key, timeout=30) as client,
        pytest.raises(openai.APIError, match="failed to answer"),
    ):
        list(client.chat.completions.create(model="priced", messages=MESSAGES, stream=True))
    settled(patron, status="void")
    guest = patron.house.customer()
    gate = Gate()
    provider.reply("claude", Reply(status=500, gate=gate))
    with (
        _quiet_for_a_while(guest, gate) as url,
        anthropic.Anthropic(base_url=url, api_key=guest.customer.key, timeout=30) as client,
        pytest.raises(anthropic.APIError, match="failed to answer"),
        client.messages.stream(model="claude", max_tokens=50, messages=MESSAGES) as stream,
    ):
        stream.get_final_text()
    settled(guest, status="void")


# -------------------------------------------------------------------------------------------------
# Length
# -------------------------------------------------------------------------------------------------


def test_slow_client_of_a_long_stream_takes_no_memory(
    patron: Guest, provider: FakeProvider
) -> None:
    pieces = 110
    reply = Reply(content="x" * MIB, repeat_content=True, chunks=pieces)
    provider.reply("priced", reply)
    before = _peak_bytes(patron.house)
    with asking(patron, "chat", buffer_bytes=65536) as connection:
        received = len(read_until(connection, b"data: "))
        # Nobody reads, so nobody may write: who does in the meantime has taken it into memory.
        assert not provider.last().ended.wait(1)
        assert _resident_bytes(patron.house) - before < 40 * MIB
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = connection.recv(MIB)
            received += len(data)
            tail = (tail + data)[-100:]
    assert received > pieces * MIB
    assert b"data: [DONE]" in tail
    assert _peak_bytes(patron.house) - before < 40 * MIB
    settled(patron, price=PRICE_NANOS)


def test_whole_answer_of_a_hundred_megabytes_is_delivered_and_charged(
    patron: Guest, provider: FakeProvider
) -> None:
    usage = b'{"prompt_tokens": 10, "completion_tokens": 5}'
    words = b"x" * (100 * MIB)
    body = b'{"choices": [{"message": {"content": "%b"}}], "usage": %b}' % (words, usage)
    provider.reply("priced", Reply(raw_body=body))
    answer = patron.chat()
    assert answer.status_code == 200
    assert answer.content == body
    settled(patron, price=PRICE_NANOS)


def _status(house: House, field: str) -> int:
    text = Path(f"/proc/{house.service.pid}/status").read_text()
    (kilobytes,) = re.findall(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(kilobytes) * 1024


def _resident_bytes(house: House) -> int:
    return _status(house, "VmRSS")


def _peak_bytes(house: House) -> int:
    return _status(house, "VmHWM")


# -------------------------------------------------------------------------------------------------
# Usage and running costs, for who asks
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
@pytest.mark.parametrize("name", ["chat", "completions"])
def test_usage_is_told_to_who_asked_and_price_in_the_place_of_cost(
    guest: Guest, provider: FakeProvider, name: str, options: dict[str, Any] | None
) -> None:
    answer = ask(guest, name, **({} if options is None else {"stream_options": options}))
    assert provider.last().json()["stream_options"] == {"include_usage": True}
    assert ends_whole(name, answer.content)
    row = settled(guest, price=price_of(name))
    usages = [event["usage"] for event in _events(answer.content) if "usage" in event]
    if options == {"include_usage": True}:
        (usage,) = usages
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (10, 5)
        assert round(usage["cost"] * 10**9) == row["price"]
    else:
        assert not usages
        assert b"cost" not in answer.content


@pytest.mark.parametrize(
    "name, by_header",
    # Anthropic's API has no stream_options: there it is the header.
    [(name, by_header) for name in ALL for by_header in (True, False)][:-1],
)
def test_running_costs_end_in_the_charge(
    guest: Guest,
    provider: FakeProvider,
    name: str,
    by_header: bool,  # noqa: FBT001
) -> None:
    if by_header:
        answer = ask(guest, name, http_headers={"x-tallygate-live-cost": "true"})
    else:
        answer = ask(guest, name, stream_options={"tallygate": {"live_cost": True}})
    assert b"tallygate" not in provider.last().body
    assert "x-tallygate-live-cost" not in provider.last().headers
    assert ends_whole(name, answer.content)
    row = settled(guest, price=price_of(name))
    *running, final = _costs(answer.content)
    assert running
    assert [each["is_final"] for each in running] == [False] * len(running)
    usd = f"{row['price'] / 10**9:.9f}".rstrip("0")
    assert final == {
        "cost": {"credits": str(row["price"] / 10**6), "usd": usd},
        "output_tokens": 5,
        "is_final": True,
    }


def test_running_costs_are_not_told_to_who_did_not_ask(guest: Guest) -> None:
    for ours in ({}, {"live_cost": False}):
        answer = ask(guest, "chat", stream_options={"tallygate": ours})
        assert b"tallygate" not in answer.content


def test_running_costs_disturb_no_sdk(guest: Guest) -> None:
    options: Any = {"include_usage": True, "tallygate": {"live_cost": True}}
    stream = guest.sdk().chat.completions.create(
        model="priced", messages=MESSAGES, stream=True, stream_options=options
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == TEXT
    with guest.sdk().responses.stream(
        model="priced", input="hi", extra_headers={"x-tallygate-live-cost": "true"}
    ) as events:
        assert events.get_final_response().output_text == TEXT
    with (
        anthropic.Anthropic(
            base_url=guest.house.service.base_url,
            api_key=guest.customer.key,
            default_headers={"x-tallygate-live-cost": "true"},
        ) as client,
        client.messages.stream(model="claude", max_tokens=50, messages=MESSAGES) as said,
    ):
        assert said.get_final_text() == TEXT
    assert guest.balance() == (START_NANOS - 3 * PRICE_NANOS, 0)


def test_running_costs_wait_for_the_first_event_to_be_whole(
    patron: Guest, provider: FakeProvider
) -> None:
    # Too large for one read, so that the first piece of it is nothing to pass on.
    delta = {"index": 0, "delta": {"content": "x" * (3 * MIB)}}
    event = {"id": "a", "model": "priced", "choices": [delta]}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    last: dict[str, Any] = {"id": "a", "model": "priced", "choices": [], "usage": usage}
    stream = b"data: %b\n\ndata: %b\n\ndata: [DONE]\n\n" % (
        json.dumps(event).encode(),
        json.dumps(last).encode(),
    )
    headers = {"content-type": "text/event-stream"}
    provider.reply("priced", Reply(raw_body=stream, headers=headers))
    answer = ask(patron, "chat", http_headers={"x-tallygate-live-cost": "true"})
    assert answer.status_code == 200
    assert len(_costs(answer.content)) == 2
    assert ends_whole("chat", answer.content)
    settled(patron, price=PRICE_NANOS)


def test_running_costs_are_no_part_of_a_file(guest: Guest, provider: FakeProvider) -> None:
    sound = b"ID3" + bytes(range(256)) * 100
    provider.reply("tts-1", Reply(binary=sound))
    with guest.house.service.client(guest.customer.key) as client:
        answer = client.post(
            "/v1/audio/speech",
            json={"model": "tts-1", "input": "hello", "voice": "alloy"},
            headers={"x-tallygate-live-cost": "true"},
        )
    assert answer.content == sound
    row = guest.usage()
    assert row["price"] > 0
    settled(guest, price=row["price"])


def _unchunked(answer: bytes) -> bytes:
    """The body of a raw answer in HTTP's chunks."""
    rest = answer.partition(b"\r\n\r\n")[2]
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


def _events(stream: bytes) -> list[dict[str, Any]]:
    lines = [line[6:] for line in stream.splitlines() if line.startswith(b"data: {")]
    return [json.loads(line) for line in lines]


def _costs(stream: bytes) -> list[dict[str, Any]]:
    mark = b": tallygate {"
    lines = [line for line in stream.splitlines() if line.startswith(mark)]
    return [json.loads(line[len(mark) - 1 :]) for line in lines]
