"""However a stream is cut into chunks, the client gets the same bytes and the bill is the same.

The recordings are LiteLLM's own. What they come to stands in a table, as a person reads it in
them, so that no parser agrees only with itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pricing.usage import Usage
from proxy.wire.chat_stream import ChatStreamMeter
from proxy.wire.meter import StreamMeter
from proxy.wire.sse import DONE_EVENT, EventSplitter
from proxy.wire.typed_stream import MESSAGES, RESPONSES, TypedStreamMeter

RECORDINGS = {
    path.stem: path.read_bytes()
    for path in sorted((Path(__file__).parents[1] / "support" / "recordings").glob("*.sse"))
}
PRICE = "0.00777"
MAX_EVENT_BYTES = 100_000

PLAIN = Usage(input_tokens=10, output_tokens=5)
# 10 tokens that no cache served, 1000 that one did, 300 written to it, 100 of them for an hour.
CACHED = Usage(
    input_tokens=1310,
    cached_input_tokens=1000,
    cache_creation_tokens=300,
    cache_creation_1h_tokens=100,
    output_tokens=5,
)
# What LiteLLM makes up where the provider was cut, or told none.
CUT = Usage(input_tokens=8, output_tokens=9)
COUNTED = Usage(input_tokens=8, output_tokens=17)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a person reads in a recording.

    `breaks_at` stands in the event that says that it failed; nothing from there on is passed on.
    """

    usage: Usage | None = PLAIN
    cost: str | None = None
    model: str
    id: str | None
    breaks_at: bytes | None = None
    is_whole: bool = True


def _chat(
    usage: Usage, cost: str | None, model: str = "priced", answer: str = "chatcmpl-1"
) -> Read:
    return Read(usage=usage, cost=cost, model=model, id=answer)


def _broken_chat(said: bytes) -> Read:
    return Read(usage=None, model="priced", id="chatcmpl-1", breaks_at=said, is_whole=False)


def _text(usage: Usage, cost: str | None, model: str = "instruct") -> Read:
    return Read(usage=usage, cost=cost, model=model, id="cmpl-1")


def _broken_text(said: bytes) -> Read:
    return Read(usage=None, model="instruct", id="cmpl-1", breaks_at=said, is_whole=False)


def _response(usage: Usage, cost: str | None, model: str = "priced") -> Read:
    # Its id is LiteLLM's, encrypted, and another one each time.
    return Read(usage=usage, cost=cost, model=model, id=None)


def _broken_response(said: bytes) -> Read:
    return Read(usage=None, model="priced", id=None, breaks_at=said, is_whole=False)


def _message(usage: Usage | None = CACHED, model: str = "claude") -> Read:
    return Read(usage=usage, model=model, id="msg_1")


def _broken_message(said: bytes | None) -> Read:
    return Read(usage=None, model="claude", id="msg_1", breaks_at=said, is_whole=False)


PROVIDER_BROKE = b"the provider broke"
NOT_COMPLETED = b"Response payload is not completed"
REASONED = Usage(input_tokens=10, output_tokens=5, reasoning_tokens=3)
READ: Mapping[str, Read] = {
    "chat-bridged": _chat(
        CACHED, "0.00061", "claude", "chatcmpl-21fe0034-ecb4-47a0-b094-330d86a71e29"
    ),
    "chat-cut": _chat(CUT, "0.00009800000000000001"),
    "chat-error": _broken_chat(PROVIDER_BROKE),
    "chat-error-then-usage": _broken_chat(PROVIDER_BROKE),
    "chat-n2": _chat(PLAIN, "0.00006"),
    "chat-no-usage": _chat(COUNTED, "0.00017800000000000002"),
    "chat-reset": _broken_chat(NOT_COMPLETED),
    "chat-text": _chat(PLAIN, "0.00006"),
    "chat-thinking": _chat(REASONED, "0.00006000000000000001"),
    "chat-thinking-tools": _chat(
        Usage(input_tokens=10, output_tokens=5, reasoning_tokens=5), "0.00006"
    ),
    "chat-tools": _chat(PLAIN, "0.00006"),
    "chat-unpriced": _chat(PLAIN, None, "unpriced"),
    "chat-usage-twice": _chat(PLAIN, "0.00006"),
    "completions-cut": _text(CUT, "0.00003"),
    "completions-error": _broken_text(PROVIDER_BROKE),
    "completions-error-then-usage": _broken_text(PROVIDER_BROKE),
    "completions-no-usage": _text(COUNTED, "0.000046"),
    "completions-reset": _broken_text(b"peer closed connection"),
    "completions-text": _text(PLAIN, "0.000024999999999999998"),
    "completions-unpriced": _text(PLAIN, None, "instruct-unpriced"),
    "completions-usage-twice": _text(PLAIN, "0.000024999999999999998"),
    "messages-bridged": Read(model="priced", id="msg_5d7bc367-696c-47dc-a6d9-d1d69c4974cb"),
    "messages-cut": _broken_message(None),
    "messages-error": _broken_message(b"overloaded_error"),
    "messages-error-then-usage": _broken_message(b"overloaded_error"),
    "messages-no-usage": _message(None),
    "messages-reset": _broken_message(NOT_COMPLETED),
    "messages-text": _message(),
    "messages-thinking": _message(),
    "messages-thinking-tools": _message(),
    "messages-tools": _message(),
    "messages-unpriced": _message(model="claude-unpriced"),
    "messages-usage-twice": _message(),
    "responses-bridged": _response(PLAIN, "0.00006", "claude"),
    "responses-cut": _broken_response(b"before any terminal event"),
    "responses-error": _broken_response(b"in-stream error"),
    "responses-error-then-usage": _broken_response(b"in-stream error"),
    "responses-failed": _broken_response(b"the provider failed"),
    "responses-incomplete": _response(PLAIN, "0.00006"),
    "responses-no-usage": _response(COUNTED, "0.00017800000000000002"),
    "responses-reset": _broken_response(NOT_COMPLETED),
    "responses-text": _response(PLAIN, "0.00006"),
    "responses-thinking": _response(REASONED, "0.00006000000000000001"),
    "responses-thinking-tools": _response(PLAIN, "0.00006"),
    "responses-tools": _response(PLAIN, "0.00006"),
    "responses-unpriced": _response(PLAIN, None, "unpriced"),
    "responses-usage-twice": _response(PLAIN, "0.00006"),
}

MakeMeter = Callable[[bool], StreamMeter]
METERS: Mapping[str, MakeMeter] = {
    "chat": lambda told: ChatStreamMeter(told, MAX_EVENT_BYTES),
    "completions": lambda told: ChatStreamMeter(told, MAX_EVENT_BYTES),
    "responses": lambda told: TypedStreamMeter(RESPONSES, MAX_EVENT_BYTES, tells_price=told),
    "messages": lambda told: TypedStreamMeter(MESSAGES, MAX_EVENT_BYTES, tells_price=told),
}


def meter_for(name: str, *, told: bool) -> StreamMeter:
    """The meter of a recording; `told` is whether the client asked for usage, or for prices."""
    return METERS[name.partition("-")[0]](told)


@dataclass(frozen=True, kw_only=True)
class Metered:
    """All that the relay takes from a meter, and what the client gets."""

    client: bytes
    usage: Usage | None
    cost: str | None
    model: str | None
    id: str | None
    service_tier: str | None
    error: bytes | None
    saw_done: bool
    has_final_usage: bool
    output_bytes: int


def _chunks(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[a:b] for a, b in pairwise(edges)]


def _relay(meter: StreamMeter, chunks: list[bytes]) -> Metered:
    client = b"".join([meter.feed(chunk) for chunk in chunks])
    meter.end()
    # As the relay does it: what is no whole answer ends in an error event of the relay's own.
    if (meter.error is None and meter.saw_done) or meter.has_final_usage:
        client += meter.closing(PRICE)
    return Metered(
        client=client,
        usage=meter.usage,
        cost=meter.cost_text,
        model=meter.model,
        id=meter.answer_id,
        service_tier=meter.service_tier,
        error=meter.error,
        saw_done=meter.saw_done,
        has_final_usage=meter.has_final_usage,
        output_bytes=meter.output_bytes,
    )


def test_every_recording_stands_in_the_table() -> None:
    assert sorted(READ) == sorted(RECORDINGS)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", RECORDINGS)
def test_recording_is_read_as_a_person_reads_it(name: str, told: bool) -> None:  # noqa: FBT001
    wanted = READ[name]
    got = _relay(meter_for(name, told=told), [RECORDINGS[name]])
    assert (got.usage, got.cost, got.model) == (wanted.usage, wanted.cost, wanted.model)
    assert wanted.id in (None, got.id)
    assert got.id is not None
    assert f'"id":"{got.id}"'.encode() in RECORDINGS[name].replace(b'": "', b'":"')
    assert got.saw_done == wanted.is_whole
    assert got.has_final_usage == (wanted.is_whole and wanted.usage is not None)
    if wanted.breaks_at is None:
        assert got.error is None
    else:
        assert got.error is not None
        assert wanted.breaks_at in got.error


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("name", RECORDINGS)
def test_client_gets_what_litellm_sent_and_our_price_for_its_cost(
    name: str,
    told: bool,  # noqa: FBT001
) -> None:
    got = _relay(meter_for(name, told=told), [RECORDINGS[name]]).client
    assert got.endswith(b"\n\n")
    sent = list(_expected(name, RECORDINGS[name].split(b"\n\n")[:-1], told=told))
    passed = got.split(b"\n\n")[:-1]
    assert len(passed) == len(sent)
    for event, wanted in zip(passed, sent, strict=True):
        if isinstance(wanted, bytes):
            assert event == wanted
        else:
            head, _, data = event.partition(b"data: ")
            assert (head, msgspec.json.decode(data)) == wanted


def _expected(
    name: str, events: list[bytes], *, told: bool
) -> "list[bytes | tuple[bytes, dict[str, Any]]]":
    """Each event for the client: bytes as LiteLLM sent them, or what its data say."""
    is_chat = name.startswith(("chat", "completions"))
    breaks_at = READ[name].breaks_at
    wanted: list[bytes | tuple[bytes, dict[str, Any]]] = []
    ended = False
    for event in events:
        if breaks_at is not None and breaks_at in event:
            break
        head, _, data = event.partition(b"data: ")
        if data == b"[DONE]":
            wanted += [event] if is_chat else []
            continue
        fields = cast("dict[str, Any]", msgspec.json.decode(data))
        if is_chat and "usage" in fields:
            fields["usage"]["cost"] = float(PRICE)
            wanted += [(head, fields)] if told else []
        elif fields.get("type") in {"response.completed", "response.incomplete"}:
            usage = fields["response"]["usage"]
            wanted += [] if ended else [(head, _priced(fields, usage, told=told))]
            ended = True
        elif fields.get("type") == "message_delta":
            wanted.append((head, _priced(fields, fields["usage"], told=told)))
        else:
            wanted.append(event)
    return wanted


def _priced(fields: dict[str, Any], usage: dict[str, Any], *, told: bool) -> dict[str, Any]:
    usage.pop("cost", None)
    if told:
        usage["cost"] = float(PRICE)
    return fields


def _names_no_cost(name: str, client: bytes, *, told: bool) -> None:
    """Hold that the provider's cost is nowhere, and ours only where it was asked for."""
    assert client.count(b'"cost"') == client.count(b'"cost":' + PRICE.encode())
    assert told or b'"cost"' not in client
    cost = READ[name].cost
    assert cost is None or cost.encode() not in client


CUTS = st.lists(st.integers(0, 10_000), max_size=40)


@given(name=st.sampled_from(sorted(RECORDINGS)), cuts=CUTS, told=st.booleans())
def test_recording_is_the_same_for_any_split(name: str, cuts: list[int], *, told: bool) -> None:
    stream = RECORDINGS[name]
    got = _relay(meter_for(name, told=told), _chunks(stream, cuts))
    assert got == _relay(meter_for(name, told=told), [stream])
    _names_no_cost(name, got.client, told=told)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recording_is_the_same_byte_by_byte(name: str) -> None:
    stream = RECORDINGS[name]
    for told in (True, False):
        got = _relay(meter_for(name, told=told), [stream[n : n + 1] for n in range(len(stream))])
        assert got == _relay(meter_for(name, told=told), [stream])
        _names_no_cost(name, got.client, told=told)


@given(
    name=st.sampled_from(sorted(RECORDINGS)),
    end=st.integers(0, 10_000),
    cuts=CUTS,
    told=st.booleans(),
)
def test_recording_that_is_cut_anywhere_is_the_same_for_any_split(
    name: str, end: int, cuts: list[int], *, told: bool
) -> None:
    stream = RECORDINGS[name][: end % len(RECORDINGS[name])]
    got = _relay(meter_for(name, told=told), _chunks(stream, cuts))
    assert got == _relay(meter_for(name, told=told), [stream])
    _names_no_cost(name, got.client, told=told)
    if got.has_final_usage:
        assert got.usage == READ[name].usage


_DETAILED = {"prompt_tokens": 8, "completion_tokens": 2, "cost": 1, "cost_details": {"secret": 1}}
_CHAT_USAGES = st.sampled_from(
    [
        None,
        _DETAILED,
        {"prompt_tokens": 8, "completion_tokens": 3},
        {"prompt_tokens": 0, "completion_tokens": 0},
        "garbage",
    ]
)
_TYPED_USAGES = st.sampled_from(
    [
        None,
        {"input_tokens": 8, "output_tokens": 2, "cost": 1, "cost_details": {"secret": 1}},
        {"input_tokens": 8, "output_tokens": 3},
        {"output_tokens": 4, "cost": 0.0},
        {"input_tokens": 0, "output_tokens": 0},
        "garbage",
    ]
)
_TEXT = st.text(st.sampled_from('a"\\\r\n[]é😀'), max_size=6) | st.sampled_from(
    ["[DONE]", '"usage"', '"error"', '"message_delta"', "data: ", "\n\n"]
)


def _chat_event(text: str, usage: object, *, with_usage: bool, model: str) -> bytes:
    fields: dict[str, object] = {"model": model, "choices": [{"delta": {"content": text}}]}
    return b"data: " + msgspec.json.encode({**fields, "usage": usage} if with_usage else fields)


def _typed_event(kind: str, member: str | None, text: str, usage: object, model: str) -> bytes:
    body: dict[str, object] = {"id": "a", "model": model, "usage": usage, "text": text}
    fields = {"type": kind, "delta": text, **(body if member is None else {member: body})}
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(fields)


_ODDITIES = st.sampled_from(
    [
        b": comment",
        b"",
        b"data: [DONE]",
        b'data: {"error": {"code": 500}}',
        b'event: error\ndata: {"type": "error"}',
        b"data: {broken",
        b'data: {"usage": broken',
        b'data: {"type": "message_delta", broken',
        b'event: x\ndata: {"model":\ndata: "demo", "choices": []}',
    ]
)
_MODELS = st.sampled_from(["", "demo"])
_CHAT = st.builds(_chat_event, _TEXT, _CHAT_USAGES, with_usage=st.booleans(), model=_MODELS)
_TYPED = st.builds(
    _typed_event,
    st.sampled_from(
        [
            *("response.created", "response.output_text.delta", "response.completed"),
            *("response.failed", "message_start", "content_block_delta", "message_delta"),
            "message_stop",
        ]
    ),
    st.sampled_from([None, "response", "message"]),
    _TEXT,
    _TYPED_USAGES,
    _MODELS,
)
_ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(["chat", "responses", "messages"]))
    event = _CHAT if kind == "chat" else _TYPED
    events = draw(st.lists(event | _ODDITIES, max_size=8))
    rest = draw(st.sampled_from([b"", b"data: {", b"\n", b"\r"]))
    return kind, b"".join([event + draw(_ENDS) for event in events]) + rest


@given(kind_and_stream=streams(), cuts=CUTS, told=st.booleans())
@example(
    kind_and_stream=("messages", b'data: {"type": "message_stop"}\r\r\n' * 2),
    cuts=[32, 33],
    told=True,
)
@example(
    kind_and_stream=(
        "chat",
        _chat_event("", _DETAILED, with_usage=True, model="a") + b"\n\n" + DONE_EVENT,
    ),
    cuts=[],
    told=True,
)
# One line end more is the next event's.
@example(kind_and_stream=("responses", b": a\n\n: b\n\n\n"), cuts=[1], told=False)
@example(kind_and_stream=("responses", b": a\n\n: b\r\n\n"), cuts=[1], told=False)
def test_any_stream_is_the_same_for_any_split(
    *, kind_and_stream: tuple[str, bytes], cuts: list[int], told: bool
) -> None:
    kind, stream = kind_and_stream
    got = _relay(meter_for(kind, told=told), _chunks(stream, cuts))
    assert got == _relay(meter_for(kind, told=told), [stream])
    assert b'"cost":1' not in got.client
    assert b"secret" not in got.client


@given(st.text(st.sampled_from("a\r\n:"), max_size=30).map(str.encode), CUTS)
def test_events_and_the_rest_are_the_stream_again_for_any_split(
    stream: bytes, cuts: list[int]
) -> None:
    splitter = EventSplitter(100)
    whole = splitter.feed(stream) + splitter.end()
    cut = EventSplitter(100)
    events = [event for chunk in _chunks(stream, cuts) for event in cut.feed(chunk)]
    assert events + cut.end() == whole
    assert stream.startswith(b"".join(whole))
    assert splitter.is_between_events == (b"".join(whole) == stream)
