"""OpenAI's /v1/responses, as the fake provider serves it.

An id holds its model, so that `GET` and `DELETE` find the script of that model again.
"""

import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from tests.support.provider_openai import CREATED
from tests.support.provider_reply import Received, Reply
from tests.support.provider_wire import Event, send_events, send_json

PATH = "/v1/responses"
ERROR = Event(
    {
        "type": "error",
        "sequence_number": 99,
        "code": "server_error",
        "message": "the provider broke",
        "param": None,
    },
    "error",
)
STATUS = {"length": "incomplete", "error": "failed"}


async def responses(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer POST /v1/responses; `finish_reason` "length" and "error" end it incomplete, failed."""
    asked = received.json()
    response = _response(received.model, reply, asked)
    if asked.get("stream"):
        # It has no [DONE]: the last typed event is the end.
        events = _events(reply, response)
        return await send_events(request, reply, events, error=ERROR, end=b"")
    return await send_json(request, reply, response)


async def stored(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer GET and DELETE /v1/responses/{id} and GET …/input_items."""
    response_id, _, rest = request.path.removeprefix(PATH + "/").partition("/")
    if request.method == "DELETE":
        answer: dict[str, Any] = {"id": response_id, "object": "response", "deleted": True}
    elif rest == "input_items":
        item = {"type": "message", "role": "user", "id": "msg_in"}
        content = [{"type": "input_text", "text": "What was asked."}]
        answer = {"object": "list", "data": [{**item, "content": content}], "has_more": False}
    else:
        answer = {**_response(received.model, reply, {}), "id": response_id}
    return await send_json(request, reply, answer)


def model_of(path: str) -> str:
    """Return the model of a stored response from its path."""
    response_id = path.removeprefix(PATH + "/").partition("/")[0]
    return response_id.partition("-")[2]


def _response(model: str, reply: Reply, asked: Mapping[str, Any]) -> dict[str, Any]:
    status = STATUS.get(reply.finish_reason, "completed")
    error = {"code": "server_error", "message": "the provider failed"}
    response: dict[str, Any] = {
        "id": f"resp_{secrets.token_hex(8)}-{model}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "background": False,
        "error": error if status == "failed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "model": reply.model or model,
        "output": _output(reply),
        "parallel_tool_calls": True,
        "previous_response_id": asked.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "store": asked.get("store", True),
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": asked.get("tools") or [],
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
        "metadata": asked.get("metadata") or {},
    }
    if asked.get("service_tier"):
        response["service_tier"] = asked["service_tier"]
    if usage := _usage(reply):
        response["usage"] = usage
    return response


def _output(reply: Reply) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if reply.thinking:
        summary = [{"type": "summary_text", "text": reply.thinking}]
        items.append({"type": "reasoning", "id": "rs_1", "summary": summary})
    items += [
        {
            "type": "function_call",
            "id": f"fc_{n}",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
            "status": "completed",
        }
        for n, call in enumerate(reply.tool_calls)
    ]
    if not reply.tool_calls:
        text = reply.content * (reply.chunks if reply.repeat_content else 1)
        part: dict[str, Any] = {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": [],
        }
        message = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
        items.append({**message, "content": [part]})
    return items


def _usage(reply: Reply) -> dict[str, Any]:
    if reply.usage is not None:
        return dict(reply.usage)
    return {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.cached_tokens},
        "output_tokens": reply.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reply.reasoning_tokens},
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


async def _events(reply: Reply, response: dict[str, Any]) -> AsyncIterator[Event]:
    """Yield the typed events, numbered in their order."""
    begun: dict[str, Any] = {**response, "status": "in_progress", "output": [], "usage": None}
    begun |= {"error": None, "incomplete_details": None}
    events: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": begun}),
        ("response.in_progress", {"response": begun}),
    ]
    for index, item in enumerate(response["output"]):
        events += _item_events(reply, index, item)
    end = f"response.{response['status']}"
    events += [(end, {"response": response})] * reply.usage_times
    for number, (kind, fields) in enumerate(events):
        data = {"type": kind, "sequence_number": number, **fields}
        yield Event(data, kind, is_usage=kind == end)


def _item_events(
    reply: Reply, index: int, item: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    begun: dict[str, Any] = {**item, "status": "in_progress"}
    where: dict[str, Any] = {"output_index": index, "item_id": item["id"]}
    middle: list[tuple[str, dict[str, Any]]]
    if item["type"] == "message":
        begun["content"] = []
        part = item["content"][0]
        at: dict[str, Any] = {**where, "content_index": 0}
        middle = [
            ("response.content_part.added", {**at, "part": {**part, "text": ""}}),
            *(
                ("response.output_text.delta", {**at, "delta": piece, "logprobs": []})
                for piece in reply.pieces()
            ),
            ("response.output_text.done", {**at, "text": part["text"], "logprobs": []}),
            ("response.content_part.done", {**at, "part": part}),
        ]
    elif item["type"] == "function_call":
        begun["arguments"] = ""
        arguments = item["arguments"]
        half = len(arguments) // 2
        kind = "response.function_call_arguments"
        middle = [
            (f"{kind}.delta", {**where, "delta": arguments[:half]}),
            (f"{kind}.delta", {**where, "delta": arguments[half:]}),
            (f"{kind}.done", {**where, "arguments": arguments}),
        ]
    else:
        begun = {**item, "summary": []}
        at = {**where, "summary_index": 0}
        text = reply.thinking
        kind = "response.reasoning_summary"
        middle = [
            (f"{kind}_part.added", {**at, "part": {"type": "summary_text", "text": ""}}),
            (f"{kind}_text.delta", {**at, "delta": text}),
            (f"{kind}_text.done", {**at, "text": text}),
            (f"{kind}_part.done", {**at, "part": {"type": "summary_text", "text": text}}),
        ]
    return [
        ("response.output_item.added", {"output_index": index, "item": begun}),
        *middle,
        ("response.output_item.done", {"output_index": index, "item": item}),
    ]
