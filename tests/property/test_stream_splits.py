"""However a stream is cut into chunks, the client gets the same bytes and the bill is the same."""

from itertools import pairwise

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from pricing.usage import Usage
from proxy.wire.chat_stream import ChatStreamMeter
from proxy.wire.sse import EventSplitter

_HEAD = b'data: {"id":"chatcmpl-4646","object":"chat.completion.chunk","created":1795208696,'

# As LiteLLM 1.106.2 sent it, with some of its words left out.
RECORDED = (
    _HEAD + b'"model":"demo","choices":[{"index":0,"delta":{"role":"assistant","content":"Good"}}]}'
    b"\n\n"
    + _HEAD
    + b'"model":"demo","choices":[{"index":0,"delta":{"content":"bye! \xc3\xa9"}}]}\n\n'
    + _HEAD
    + b'"model":"demo","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"chatcmpl-4646","created":1795208696,"model":"demo",'
    b'"object":"chat.completion.chunk","choices":[{"index":0,"delta":{}}],"usage":'
    b'{"completion_tokens":24,"prompt_tokens":8,"total_tokens":32,"completion_tokens_details":'
    b'{"reasoning_tokens":0,"text_tokens":24},"cost":0.00026000000000000003}}\n\n'
    b"data: [DONE]\n\n"
)
WORDS = RECORDED[: RECORDED.index(b'data: {"id":"chatcmpl-4646","created"')]


def _chunks(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[a:b] for a, b in pairwise(edges)]


def _relay(chunks: list[bytes], *, wants_usage: bool) -> tuple[object, ...]:
    meter = ChatStreamMeter(wants_usage, 100_000)
    passed = b"".join([meter.feed(chunk) for chunk in chunks])
    meter.end()
    return (
        passed + meter.closing("0.00052"),
        meter.usage,
        meter.cost_text,
        meter.model,
        meter.error,
        meter.saw_done,
        meter.truncated,
        meter.output_bytes,
    )


CUTS = st.lists(st.integers(0, 10_000), max_size=40)


@given(cuts=CUTS, wants_usage=st.booleans())
@example(cuts=list(range(2000)), wants_usage=True)
def test_recorded_stream_is_the_same_for_any_split(*, cuts: list[int], wants_usage: bool) -> None:
    got = _relay(_chunks(RECORDED, cuts), wants_usage=wants_usage)
    assert got == _relay([RECORDED], wants_usage=wants_usage)
    usage = Usage(input_tokens=8, output_tokens=24)
    assert got[1:] == (usage, "0.00026000000000000003", "demo", None, True, False, 11)
    assert isinstance(got[0], bytes)
    assert got[0].startswith(WORDS)
    assert (b'"cost":0.00052' in got[0]) == wants_usage
    assert b"0.00026" not in got[0]


_USAGES = st.sampled_from(
    [
        None,
        {"prompt_tokens": 8, "completion_tokens": 2, "cost": 1},
        {"prompt_tokens": 8, "completion_tokens": 3},
        {"prompt_tokens": 0, "completion_tokens": 0},
        "garbage",
    ]
)
_TEXT = st.text(st.sampled_from('a"\\\r\n[]é😀'), max_size=6) | st.sampled_from(
    ["[DONE]", '"usage"', '"error"', "data: ", "\n\n"]
)


def _event(text: str, usage: object, *, with_usage: bool, model: str) -> bytes:
    fields: dict[str, object] = {"model": model, "choices": [{"delta": {"content": text}}]}
    return b"data: " + msgspec.json.encode({**fields, "usage": usage} if with_usage else fields)


EVENTS = st.one_of(
    st.builds(
        _event, _TEXT, _USAGES, with_usage=st.booleans(), model=st.sampled_from(["", "demo"])
    ),
    st.sampled_from(
        [
            b": comment",
            b"",
            b"data: [DONE]",
            b'data: {"error": {"code": 500}}',
            b"data: {broken",
            b'data: {"usage": broken',
            b'event: x\ndata: {"model":\ndata: "demo", "choices": []}',
        ]
    ),
)
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"])


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    events = draw(st.lists(EVENTS, max_size=8))
    rest = draw(st.sampled_from([b"", b"data: {", b"\n", b"\r"]))
    return b"".join([event + draw(ENDS) for event in events]) + rest


@given(stream=streams(), cuts=CUTS, wants_usage=st.booleans())
def test_any_stream_is_the_same_for_any_split(
    *, stream: bytes, cuts: list[int], wants_usage: bool
) -> None:
    assert _relay(_chunks(stream, cuts), wants_usage=wants_usage) == _relay(
        [stream], wants_usage=wants_usage
    )


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
