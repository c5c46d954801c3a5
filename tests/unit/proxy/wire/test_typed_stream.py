"""Metering streams of typed events: what passes at once, what is held back, what is never told."""

import base64
from typing import Any

import msgspec
import pytest

from pricing.usage import Usage
from proxy.errors import UpstreamProtocolError
from proxy.wire.typed_stream import MESSAGES, RESPONSES, EventFormat, TypedStreamMeter

USED: dict[str, Any] = {"input_tokens": 10, "output_tokens": 5}
USAGE = Usage(input_tokens=10, output_tokens=5)
MESSAGE_STOP = b'event: message_stop\ndata: {"type": "message_stop"}\n\n'
DEPLOYMENT = "litellm:custom_llm_provider:openai;model_id:1234;response_id:resp_own"
BRIDGED_ID = "resp_" + base64.b64encode(DEPLOYMENT.encode()).decode().rstrip("=")


def event(kind: str, **members: Any) -> bytes:
    """An event as Anthropic names it; the Responses API's come without the name."""
    data = msgspec.json.encode({"type": kind, **members})
    return f"event: {kind}\n".encode() + b"data: " + data + b"\n\n"


def bare(kind: str, **members: Any) -> bytes:
    return b"data: " + msgspec.json.encode({"type": kind, **members}) + b"\n\n"


def said(stream: bytes) -> list[Any]:
    lines = [line for line in stream.splitlines() if line.startswith(b"data: ")]
    return [msgspec.json.decode(line[6:]) for line in lines]


def meter_of(form: EventFormat, *, tells_price: bool = False) -> TypedStreamMeter:
    return TypedStreamMeter(form, 10_000, tells_price=tells_price)


START = event("message_start", message={"id": "msg_1", "model": "claude", "usage": {**USED}})
WORDS = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi!"})
DELTA = event("message_delta", delta={}, usage={"output_tokens": 5, "cost": 5e-05})
CREATED = bare("response.created", response={"id": "resp_1", "model": "priced", "usage": None})
SAID = bare("response.output_text.delta", delta="Hi!")
COMPLETED = bare(
    "response.completed",
    response={"id": "resp_1", "model": "priced", "usage": {**USED, "cost": 6e-05}},
)


@pytest.mark.parametrize(
    "form, passing", [(MESSAGES, [START, WORDS]), (RESPONSES, [CREATED, SAID])]
)
def test_words_leave_at_once_and_unchanged(form: EventFormat, passing: list[bytes]) -> None:
    meter = meter_of(form)
    for chunk in (*passing, b": ping\n\n", passing[1] * 3):
        assert meter.feed(chunk) == chunk
    assert meter.output_bytes == 4 * len("Hi!")
    assert meter.usage is None
    assert not meter.saw_done


def test_what_is_said_in_every_way_is_counted() -> None:
    messages, responses = meter_of(MESSAGES), meter_of(RESPONSES)
    for delta in ({"thinking": "é"}, {"partial_json": "{}"}, {"text": "a"}, {"signature": "xyz"}):
        messages.feed(event("content_block_delta", delta=delta))
    assert messages.output_bytes == 5
    responses.feed(bare("response.function_call_arguments.delta", delta="{}"))
    responses.feed(bare("response.output_text.delta", delta="é"))
    responses.feed(bare("response.output_item.done", item={"text": "not again"}))
    assert responses.output_bytes == 4


def test_end_is_held_back_from_the_usage_on() -> None:
    meter = meter_of(MESSAGES)
    meter.feed(START + WORDS)
    assert meter.feed(DELTA) == b""
    assert meter.has_final_usage
    assert meter.feed(MESSAGE_STOP) == b""
    meter.end()
    assert (meter.saw_done, meter.usage, meter.model) == (True, USAGE, "claude")
    delta, stop = said(meter.closing("0.00012"))
    assert (delta["usage"], stop) == ({"output_tokens": 5}, {"type": "message_stop"})


def test_price_is_told_to_who_asked_in_the_place_of_the_cost() -> None:
    for form, stream in (
        (MESSAGES, START + DELTA + MESSAGE_STOP),
        (RESPONSES, CREATED + COMPLETED),
    ):
        meter = meter_of(form, tells_price=True)
        passed = meter.feed(stream)
        meter.end()
        assert b"cost" not in passed
        for price, cost in (("0.00012", 0.00012), (None, None)):
            last = said(meter.closing(price))[0]
            assert last.get("response", last)["usage"]["cost"] == cost


def test_cost_of_litellm_is_trusted_where_it_is_that_of_the_whole_answer() -> None:
    messages, responses = meter_of(MESSAGES), meter_of(RESPONSES)
    messages.feed(START + DELTA + MESSAGE_STOP)
    responses.feed(CREATED + COMPLETED)
    assert (messages.cost_text, responses.cost_text) == (None, "0.00006")
    assert (messages.usage, responses.usage) == (USAGE, USAGE)


def test_cost_is_hidden_wherever_a_usage_stands() -> None:
    usage = {**USED, "cost": 1, "cost_details": {"upstream": 1}}
    for kind, members in (
        ("response.in_progress", {"response": {"id": "a", "usage": usage}}),
        ("message_start", {"message": {"id": "a", "usage": usage}}),
        ("ping", {"usage": usage}),
        ("response.created", {"usage": usage}),
    ):
        for form in (MESSAGES, RESPONSES):
            meter = meter_of(form, tells_price=True)
            (passed,) = said(meter.feed(bare(kind, **members)))
            assert b"cost" not in msgspec.json.encode(passed)
            assert b'"input_tokens":10' in msgspec.json.encode(passed)


def test_deployment_in_an_id_is_hidden() -> None:
    meter = meter_of(RESPONSES)
    answer: dict[str, Any] = {"id": BRIDGED_ID, "model": "priced", "usage": None}
    (created,) = said(meter.feed(bare("response.created", response=answer)))
    meter.feed(bare("response.completed", response={**answer, "usage": USED}))
    (completed,) = said(meter.closing(None))
    ids = {meter.answer_id, created["response"]["id"], completed["response"]["id"]}
    assert ids == {"resp_own"}


def test_what_comes_after_a_usage_shows_that_it_was_not_the_end() -> None:
    meter = meter_of(MESSAGES, tells_price=True)
    meter.feed(START)
    assert meter.feed(DELTA) == b""
    passed = meter.feed(WORDS)
    assert passed.endswith(WORDS)
    assert said(passed)[0]["usage"] == {"output_tokens": 5}
    assert not meter.has_final_usage
    meter.feed(event("message_delta", delta={}, usage={"output_tokens": 9}) + MESSAGE_STOP)
    meter.end()
    assert meter.usage == Usage(input_tokens=10, output_tokens=9)
    assert [each["type"] for each in said(meter.closing("1"))] == ["message_delta", "message_stop"]


def test_stream_that_is_cut_behind_its_usage_gets_its_end() -> None:
    meter = meter_of(MESSAGES)
    meter.feed(START + WORDS + DELTA)
    meter.end()
    assert (meter.saw_done, meter.has_final_usage) == (False, True)
    assert meter.closing(None).endswith(b"\n\n" + MESSAGE_STOP)


def test_stream_that_is_cut_before_its_usage_has_none() -> None:
    for form, stream in ((MESSAGES, START + WORDS), (RESPONSES, CREATED + SAID)):
        meter = meter_of(form)
        meter.feed(stream)
        meter.end()
        assert (meter.usage, meter.has_final_usage, meter.saw_done) == (None, False, False)


def test_nothing_passes_after_the_end() -> None:
    meter = meter_of(RESPONSES)
    meter.feed(CREATED + COMPLETED)
    late = bare("error", message="late") + COMPLETED + SAID + b"data: [DONE]\n\n"
    assert meter.feed(late) == b""
    meter.end()
    assert meter.error is None
    assert [each["type"] for each in said(meter.closing(None))] == ["response.completed"]


@pytest.mark.parametrize(
    "form, failed",
    [
        (MESSAGES, event("error", error={"type": "overloaded_error", "message": "x"})),
        (RESPONSES, bare("error", message="x")),
        (RESPONSES, bare("response.failed", response={"error": {"message": "x"}})),
        (RESPONSES, b'data: {"error": {"message": "x"}}\n\n'),
    ],
)
def test_failure_is_kept_and_nothing_after_it_passes(form: EventFormat, failed: bytes) -> None:
    meter = meter_of(form)
    stream = START + WORDS if form is MESSAGES else CREATED + SAID
    assert meter.feed(stream + failed + WORDS + DELTA + COMPLETED) == stream
    meter.end()
    assert meter.error is not None
    assert b'"x"' in meter.error
    assert (meter.usage, meter.has_final_usage, meter.saw_done) == (None, False, False)


def test_done_of_litellm_is_dropped() -> None:
    meter = meter_of(RESPONSES)
    assert meter.feed(SAID + b"data: [DONE]\n\n" + SAID) == SAID + SAID
    assert not meter.saw_done


@pytest.mark.parametrize(
    "text", ['"error"', '"usage"', '"message_delta"', 'data: {"type":"error"}', "x\n\ny"]
)
def test_words_that_look_like_the_streams_own_pass_unchanged(text: str) -> None:
    chunk = event("content_block_delta", delta={"type": "text_delta", "text": text})
    assert meter_of(MESSAGES).feed(chunk) == chunk


def test_events_that_nobody_can_read_are_dropped_where_they_could_give_something_away() -> None:
    meter = meter_of(MESSAGES)
    assert meter.feed(b'data: {"usage": {"cost": 1}, broken\n\n' + WORDS) == WORDS
    assert meter.feed(b'data: ["message_delta"]\n\n' + WORDS) == WORDS


def test_comments_behind_the_usage_leave_with_it() -> None:
    meter = meter_of(MESSAGES)
    meter.feed(START)
    assert meter.feed(DELTA + b": ping\n\n") == b""
    assert meter.closing(None).endswith(b": ping\n\n" + MESSAGE_STOP)


def test_other_lines_of_an_event_stay() -> None:
    meter = meter_of(MESSAGES)
    meter.feed(START)
    meter.feed(b"id: 7\r\n" + DELTA.replace(b"\n", b"\r\n"))
    assert meter.closing(None).startswith(b"id: 7\nevent: message_delta\ndata: {")


def test_unfinished_event_at_the_end_is_dropped() -> None:
    meter = meter_of(MESSAGES)
    assert meter.feed(START + DELTA[:-2]) == START
    meter.end()
    assert meter.usage is None
    assert not meter.has_final_usage


def test_end_in_bare_carriage_returns_is_not_lost() -> None:
    meter = meter_of(RESPONSES)
    assert meter.feed(CREATED + COMPLETED.replace(b"\n", b"\r")) == CREATED
    assert not meter.saw_done
    meter.end()
    assert (meter.saw_done, meter.usage) == (True, USAGE)


def test_model_and_tier_are_the_providers() -> None:
    meter = meter_of(RESPONSES)
    for tier in ("auto", "flex"):
        answer = {"id": "resp_1", "model": f"model-{tier}", "service_tier": tier, "usage": USED}
        kind = "response.created" if tier == "auto" else "response.completed"
        meter.feed(bare(kind, response=answer))
    assert (meter.model, meter.service_tier, meter.answer_id) == ("model-auto", "flex", "resp_1")


def test_event_beyond_the_limit_is_a_protocol_error() -> None:
    meter = meter_of(MESSAGES)
    with pytest.raises(UpstreamProtocolError, match="larger"):
        meter.feed(b"data: " + b"x" * 10_001)
