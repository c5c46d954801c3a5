from typing import Any

import msgspec
import pytest

from pricing.usage import Usage
from proxy.errors import UpstreamProtocolError
from proxy.wire.chat_stream import ChatStreamMeter

USAGE = {
    "completion_tokens": 24,
    "prompt_tokens": 8,
    "total_tokens": 32,
    "completion_tokens_details": {"reasoning_tokens": 0, "text_tokens": 24},
}
DONE = b"data: [DONE]\n\n"


def event(**members: object) -> bytes:
    """An event in the shape of LiteLLM's."""
    envelope = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "demo"}
    return b"data: " + msgspec.json.encode({**envelope, **members}) + b"\n\n"


def delta(finish: str | None = None, **members: object) -> list[dict[str, Any]]:
    choice: dict[str, Any] = {"index": 0, "delta": members}
    return [choice if finish is None else {**choice, "finish_reason": finish}]


def words(text: str) -> bytes:
    return event(choices=delta(content=text))


def usage_event(cost: object = 0.00026000000000000003, **members: object) -> bytes:
    return event(**{"choices": delta(), "usage": {**USAGE, "cost": cost}, **members})


def payloads(stream: bytes) -> list[Any]:
    lines = [line for line in stream.split(b"\n\n") if line]
    return [msgspec.json.decode(line[6:]) for line in lines if line != DONE.strip()]


def metered(*chunks: bytes, wants_usage: bool = True) -> tuple[ChatStreamMeter, bytes]:
    meter = ChatStreamMeter(wants_usage, 10_000)
    passed = b"".join([meter.feed(chunk) for chunk in chunks])
    meter.end()
    return meter, passed


def test_words_leave_at_once_and_unchanged() -> None:
    meter = ChatStreamMeter(client_wants_usage=True, max_event_bytes=10_000)
    first = event(choices=delta(role="assistant", content="Good"))
    for chunk in (first, words("bye!"), b": ping\n\n", words("a") + words("b")):
        assert meter.feed(chunk) == chunk
    assert meter.model == "demo"
    assert meter.output_bytes == len("Goodbye!ab")
    assert meter.usage is None
    assert not meter.saw_done


def test_usage_and_done_are_held_back_until_the_price_is_known() -> None:
    meter, passed = metered(words("Hi"), usage_event(), DONE)
    assert passed == words("Hi")
    assert meter.usage == Usage(input_tokens=8, output_tokens=24)
    assert meter.cost_text == "0.00026000000000000003"
    assert meter.saw_done
    tail = meter.closing("0.00052")
    assert tail.endswith(b"}\n\n" + DONE)
    assert b'"cost":0.00052}' in tail
    assert (
        payloads(tail)[0] == payloads(event(choices=delta(), usage={**USAGE, "cost": 0.00052}))[0]
    )


def test_unknown_price_is_null_and_no_cost_of_the_provider_is_told() -> None:
    usage = {**USAGE, "cost": 1, "cost_details": {"upstream_inference_cost": 1}}
    meter, _ = metered(event(choices=[], usage=usage), DONE)
    assert payloads(meter.closing(None))[0]["usage"] == {**USAGE, "cost": None}


def test_client_that_did_not_ask_gets_no_usage() -> None:
    meter, passed = metered(words("Hi"), usage_event(), DONE, wants_usage=False)
    assert passed == words("Hi")
    assert meter.usage == Usage(input_tokens=8, output_tokens=24)
    assert meter.closing("0.00052") == DONE


@pytest.mark.parametrize(
    "members",
    [
        {"choices": delta("stop")},
        {"choices": delta(content="!")},
        {"choices": delta(), "citations": ["https://example.com"]},
        {"choices": [{"index": 0, "delta": {}, "logprobs": {"content": ["x"]}}]},
    ],
)
def test_content_in_the_usage_event_reaches_a_client_that_did_not_ask(
    members: dict[str, Any],
) -> None:
    meter, passed = metered(words("Hi"), usage_event(**members), DONE, wants_usage=False)
    assert passed == words("Hi")
    assert meter.closing("1") == event(**members) + DONE


@pytest.mark.parametrize(
    "choices", [None, "x", ["x"], [{"delta": None}], [{"delta": {"content": ""}, "index": 0}]]
)
def test_choices_without_content_are_not_passed_on_for_their_own_sake(choices: object) -> None:
    meter, _ = metered(usage_event(choices=choices), DONE, wants_usage=False)
    assert meter.closing("1") == DONE


def test_usage_on_every_event_does_not_hold_the_words_back() -> None:
    meter = ChatStreamMeter(client_wants_usage=False, max_event_bytes=10_000)
    first = event(choices=delta(content="a"), usage={"prompt_tokens": 8, "completion_tokens": 1})
    second = event(choices=delta(content="b"), usage={**USAGE, "cost": 1})
    assert meter.feed(first) == b""
    assert meter.feed(second) == words("a")
    assert meter.feed(words("c")) == words("b") + words("c")
    assert meter.feed(words("d")) == words("d")
    assert meter.usage == Usage(input_tokens=8, output_tokens=24)
    assert meter.cost_text == "1"
    assert meter.closing("2") == DONE


def test_usage_comes_last_to_a_client_that_asked_even_if_words_came_after_it() -> None:
    meter, passed = metered(usage_event(choices=delta(content="a")), words("b"), DONE)
    assert passed == words("a") + words("b")
    expected = event(choices=[], usage={**USAGE, "cost": 3})
    assert payloads(meter.closing("3")) == payloads(expected)


def test_empty_usage_does_not_undo_a_true_one() -> None:
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    late = event(choices=delta("stop"), usage=zeros)
    meter, passed = metered(usage_event(), late, DONE)
    assert passed == b""
    assert meter.usage == Usage(input_tokens=8, output_tokens=24)
    finish, usage = payloads(meter.closing("3"))
    assert finish == payloads(event(choices=delta("stop")))[0]
    assert usage["usage"]["prompt_tokens"] == 8


def test_usage_that_tells_nothing_is_none_until_a_better_one_comes() -> None:
    meter = ChatStreamMeter(client_wants_usage=True, max_event_bytes=10_000)
    meter.feed(event(choices=[], usage="lots"))
    assert meter.usage is None
    assert meter.cost_text is None
    assert payloads(meter.closing("1"))[0]["usage"] == "lots"
    meter.feed(usage_event())
    assert meter.usage == Usage(input_tokens=8, output_tokens=24)


def test_null_usage_is_passed_on() -> None:
    chunk = event(choices=delta(content="a"), usage=None)
    meter, passed = metered(chunk, DONE)
    assert passed == chunk
    assert meter.closing("1") == DONE


def test_error_event_is_kept_and_nothing_after_it_passes() -> None:
    error = b'{"error": {"message": "boom", "code": "500"}}'
    meter, passed = metered(words("a"), b"data: " + error + b"\n\n", words("b"), words("c") + DONE)
    assert passed == words("a")
    assert meter.error == error
    assert not meter.saw_done


@pytest.mark.parametrize(
    "chunk",
    [
        words('a model may say "usage", "error" or [DONE]'),
        event(choices=delta(content="a"), error=None),
        event(choices=delta(tool_calls=[{"function": {"name": "usage"}}])),
    ],
)
def test_words_that_look_like_the_end_pass_unchanged(chunk: bytes) -> None:
    meter, passed = metered(words("x"), chunk)
    assert passed == words("x") + chunk
    assert meter.error is None
    assert not meter.saw_done


def test_events_that_nobody_can_read_are_dropped_where_they_could_give_something_away() -> None:
    broken = b'data: {"usage": {"cost": 1\n\n'
    assert metered(words("a"), broken, words("b"))[1] == words("a") + words("b")


def test_nothing_passes_after_done() -> None:
    meter, passed = metered(words("a"), DONE + words("b"), words("c"))
    assert passed == words("a")
    assert meter.saw_done


def test_unfinished_event_at_the_end_is_dropped() -> None:
    meter, passed = metered(words("a"), words("b")[:-1])
    assert passed == words("a")
    assert meter.truncated
    assert not metered(words("a"))[0].truncated


def test_events_that_end_in_bare_carriage_returns_are_not_lost_at_the_end() -> None:
    cr = words("b").replace(b"\n", b"\r")
    meter, passed = metered(words("a"), cr)
    assert passed == words("a")
    assert not meter.truncated
    assert meter.closing(None) == cr + DONE
    assert meter.output_bytes == 2


def test_model_is_the_first_that_an_event_names() -> None:
    unnamed = event(model="", choices=delta(content="a"))
    meter, passed = metered(unnamed, event(model=5), words("b"), event(model="other"))
    assert passed == unnamed + event(model=5) + words("b") + event(model="other")
    assert meter.model == "demo"


def test_event_beyond_the_limit_is_a_protocol_error() -> None:
    meter = ChatStreamMeter(client_wants_usage=True, max_event_bytes=100)
    with pytest.raises(UpstreamProtocolError):
        meter.feed(b"data: " + b"x" * 100)


def test_output_is_all_that_the_model_said_and_nothing_else() -> None:
    call = {"index": 0, "id": "call_1", "type": "function"}
    meter, _ = metered(
        event(choices=delta(role="assistant", content=None)),
        event(choices=delta(content="\u00e9\n")),
        event(choices=delta(reasoning_content="abcd", thinking_blocks=[{"thinking": "abcd"}])),
        event(choices=delta(tool_calls=[{**call, "function": {"name": "f", "arguments": '{"'}}])),
        event(choices=delta(tool_calls=[call])),
        event(choices=delta(function_call={"arguments": "xy"})),
        event(choices=delta(audio={"transcript": "12345", "data": "AAAA"})),
        event(choices=[{"index": 0}, *delta(refusal="no")]),
        event(choices=delta(content=["odd"])),
        b": comment\n\n",
    )
    assert meter.output_bytes == 3 + 4 + 3 + 2 + 5 + 2


def test_output_of_long_streams_is_counted_in_bounded_memory() -> None:
    meter = ChatStreamMeter(client_wants_usage=True, max_event_bytes=10_000)
    for _ in range(5000):
        meter.feed(words("four"))
    assert meter.output_bytes == 20_000


def test_usage_on_every_event_is_final_only_at_the_end() -> None:
    meter = ChatStreamMeter(client_wants_usage=False, max_event_bytes=10_000)
    usage = b'"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":2}'
    for number in (1, 2):
        delta = b'"choices":[{"index":0,"delta":{"content":"x"}}]'
        meter.feed(b'data: {"model":"m",' + delta + b"," + usage % number + b"}\n\n")
        assert not meter.has_final_usage
    meter.feed(b"data: [DONE]\n\n")
    meter.end()
    assert meter.has_final_usage


def test_usage_in_an_event_of_its_own_is_final_although_the_stream_is_cut_after_it() -> None:
    meter = ChatStreamMeter(client_wants_usage=False, max_event_bytes=10_000)
    assert not meter.has_final_usage
    meter.feed(
        b'data: {"model":"m","choices":[{"index":0,"delta":{}}],'
        b'"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}\n\n'
    )
    meter.end()
    assert meter.has_final_usage
