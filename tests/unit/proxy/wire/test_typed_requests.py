"""What bounds the cost of the Responses API's requests and of Anthropic's messages."""

from typing import Any

import msgspec
import pytest

from pricing.usage import MAX_TOKENS
from proxy.errors import InvalidRequestError
from proxy.wire.request import Request
from proxy.wire.typed_requests import (
    parse_count_request,
    parse_messages_request,
    parse_responses_request,
)

PNG = "A" * 4000
SAY: list[Any] = [{"role": "user", "content": "hi"}]


def responses(**members: object) -> Request:
    return parse_responses_request(msgspec.json.encode({"model": "m", "input": "x", **members}))


def messages(**members: object) -> Request:
    body = {"model": "m", "messages": SAY, "max_tokens": 10, **members}
    return parse_messages_request(msgspec.json.encode(body))


def content(*blocks: object) -> Request:
    return messages(messages=[{"role": "user", "content": list(blocks)}])


def counts(request: Request) -> tuple[int, int, int]:
    return request.images, request.audio_clips, request.files


def refused_param(parse: Any, **members: object) -> str | None:
    with pytest.raises(InvalidRequestError) as refused:
        parse(**members)
    return refused.value.param


def test_response_is_read() -> None:
    request = responses(
        max_output_tokens=9,
        stream=True,
        service_tier="flex",
        previous_response_id="resp_1",
        stream_options={"tallygate": {"live_cost": True}},
    )
    assert (request.output_limit, request.stream, request.n) == (9, True, 1)
    assert (request.service_tier, request.continues) == ("flex", "resp_1")
    assert request.live_cost
    # Instructions, schemas and what was said before come on top: nothing is counted exactly.
    assert request.text is None


def test_previous_response_of_null_is_none() -> None:
    assert responses(previous_response_id=None).continues is None


@pytest.mark.parametrize("given", [None, "", [], {}, 5, True])
def test_input_is_a_text_or_items(given: object) -> None:
    assert refused_param(responses, input=given) == "input"


@pytest.mark.parametrize(
    "item",
    [
        {"id": "msg_1"},
        {"id": "msg_1", "type": None},
        {"id": "msg_1", "type": ["message"]},
        {"type": "item_reference", "id": "msg_1"},
        {"type": "image_generation_call", "id": "ig_1", "result": None},
        "msg_1",
        5,
        None,
        ["x"],
        {"role": "user", "content": [{"type": "item_reference", "id": "x"}]},
        {"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]},
        {"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]},
        {
            "type": "computer_call_output",
            "output": {"type": "computer_screenshot", "file_id": "file-1"},
        },
    ],
)
def test_item_that_stands_for_what_is_stored_is_refused(item: object) -> None:
    assert refused_param(responses, input=[*SAY, item]) == "input"


@pytest.mark.parametrize(
    "item, counted",
    [
        ({"role": "user", "content": "x"}, (0, 0, 0)),
        ({"type": "message", "role": "user", "content": [{"type": "input_text"}]}, (0, 0, 0)),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}, (0, 0, 0)),
        ({"type": "reasoning", "id": "rs_1", "summary": []}, (0, 0, 0)),
        (
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}],
            },
            (1, 0, 0),
        ),
        (
            {"type": "function_call_output", "output": [{"type": "input_image", "image_url": "x"}]},
            (1, 0, 0),
        ),
        (
            {
                "type": "computer_call_output",
                "output": {"type": "computer_screenshot", "image_url": "https://example.com/a"},
            },
            (1, 0, 0),
        ),
        (
            {"role": "user", "content": [{"type": "input_file", "file_url": "https://a.b/c"}]},
            (0, 0, 1),
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A"}}]},
            (0, 1, 0),
        ),
    ],
)
def test_media_in_items_are_counted(item: object, counted: tuple[int, int, int]) -> None:
    request = responses(input=[item])
    assert counts(request) == counted
    assert request.has_images == bool(counted[0])
    assert request.has_audio == bool(counted[1])


@pytest.mark.parametrize(
    "members, param",
    [
        ({"background": True}, "background"),
        ({"background": "yes"}, "background"),
        ({"previous_response_id": ""}, "previous_response_id"),
        ({"previous_response_id": "x" * 1025}, "previous_response_id"),
        ({"previous_response_id": 5}, "previous_response_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**20}, "max_output_tokens"),
        ({"max_output_tokens": "9"}, "max_output_tokens"),
        ({"stream": "true"}, "stream"),
        ({"service_tier": 1}, "service_tier"),
        ({"model": "a,b"}, "model"),
    ],
)
def test_response_of_a_wrong_kind_is_refused(members: dict[str, Any], param: str) -> None:
    assert refused_param(responses, **members) == param


def test_background_of_false_is_none() -> None:
    assert responses(background=False).model == "m"


@pytest.mark.parametrize("limit", [1, 10, MAX_TOKENS])
def test_message_is_bounded_by_its_limit(limit: int) -> None:
    request = messages(max_tokens=limit)
    assert (request.output_limit, request.n, request.output_allowance) == (limit, 1, None)


WRONG_MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": MAX_TOKENS + 1}, "max_tokens"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [["x"]]}, "messages"),
    ({"stream": 1}, "stream"),
    ({"system": [{"type": "image", "source": {"type": "url"}}]}, "system"),
    ({"system": [{"type": "document", "source": {}}]}, "system"),
    ({"system": [{"type": "container_upload", "file_id": "f"}]}, "system"),
]


@pytest.mark.parametrize("members, param", WRONG_MESSAGES)
def test_message_of_a_wrong_kind_is_refused(members: dict[str, Any], param: str) -> None:
    assert refused_param(messages, **members) == param


@pytest.mark.parametrize(
    "block, counted, bytes_of_it",
    [
        ({"type": "text", "text": "x"}, (0, 0, 0), 0),
        (
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": PNG},
            },
            (1, 0, 0),
            0,
        ),
        # What only claims to be a picture keeps its bytes: they may become tokens.
        (
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "text/plain", "data": PNG},
            },
            (1, 0, 0),
            4000,
        ),
        ({"type": "image", "source": {"type": "url", "url": "https://a.b/c.png"}}, (1, 0, 0), 0),
        (
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "application/pdf", "data": PNG},
            },
            (0, 0, 1),
            4000,
        ),
        ({"type": "document", "source": {"type": "text", "data": PNG}}, (0, 0, 1), 4000),
        (
            {
                "type": "tool_result",
                "tool_use_id": "t",
                "content": [
                    {"type": "text", "text": "x"},
                    {"type": "image", "source": {"media_type": "image/jpeg", "data": PNG}},
                ],
            },
            (1, 0, 0),
            0,
        ),
        ({"type": "search_result", "content": [{"type": "text", "text": PNG}]}, (0, 0, 0), 4000),
        ({"type": "thinking", "thinking": PNG, "signature": "x"}, (0, 0, 0), 4000),
    ],
)
def test_blocks_of_anthropics_are_counted(
    block: dict[str, Any], counted: tuple[int, int, int], bytes_of_it: int
) -> None:
    request = content(block)
    assert counts(request) == counted
    assert bytes_of_it <= request.prompt_bytes < bytes_of_it + 400


@pytest.mark.parametrize(
    "block",
    [
        {"type": "container_upload", "file_id": "file_1"},
        {"type": "image", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "document", "source": {"type": "file", "file_id": "file_1"}},
        {"type": "document", "source": {"type": "url", "url": "gs://b/a.pdf"}},
        {"type": "tool_result", "content": [{"type": "container_upload", "file_id": "f"}]},
        {
            "type": "document",
            "source": {"type": "content", "content": [{"source": {"file_id": "file_1"}}]},
        },
    ],
)
def test_block_that_stands_for_what_is_stored_is_refused(block: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        content(block)
    assert refused.value.param == "messages"


def test_system_and_tools_count_as_bytes_of_the_prompt() -> None:
    request = messages(system=[{"type": "text", "text": "s" * 700}], tools=[{"name": "t" * 300}])
    assert request.prompt_bytes > 1000


def test_tokens_are_counted_without_a_limit() -> None:
    request = parse_count_request(msgspec.json.encode({"model": "m", "messages": SAY}))
    assert request.output_limit is None
    with pytest.raises(InvalidRequestError):
        parse_count_request(msgspec.json.encode({"model": "m", "messages": []}))
