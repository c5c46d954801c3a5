"""Anthropic's /v1/messages and /v1/messages/count_tokens, as the fake provider serves them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.support.provider_reply import Received, Reply
from tests.support.provider_wire import Event, send_events, send_json

OVERLOADED = Event(
    {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "error"
)
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# How many output tokens Anthropic has counted when it begins to speak.
FIRST_OUTPUT_TOKENS = 1


def error_body(reply: Reply) -> dict[str, Any]:
    """Return an error as Anthropic words it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error", 529: "overloaded_error"}
    kind = kinds.get(reply.status, "api_error" if reply.status >= 500 else "invalid_request_error")
    error = {"type": kind, "message": "the provider says no"}
    return {"type": "error", "error": error, "request_id": "req_1"}


async def messages(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/messages."""
    asked = received.json()
    blocks = _blocks(reply)
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": reply.model or received.model,
        "content": blocks,
        "stop_reason": STOP_REASONS.get(reply.finish_reason, reply.finish_reason),
        "stop_sequence": None,
    }
    if reply.tool_calls:
        message["stop_reason"] = "tool_use"
    usage = _usage(reply)
    if asked.get("stream"):
        # It has no [DONE]: message_stop is the end.
        events = _events(reply, message, usage)
        return await send_events(request, reply, events, error=OVERLOADED, end=b"")
    if usage:
        message["usage"] = usage
    return await send_json(request, reply, message)


async def count_tokens(request: web.Request, _: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/messages/count_tokens."""
    return await send_json(request, reply, {"input_tokens": reply.prompt_tokens})


def _blocks(reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if reply.thinking:
        blocks.append({"type": "thinking", "thinking": reply.thinking, "signature": "c2lnbmVk"})
    text = reply.content * (reply.chunks if reply.repeat_content else 1)
    blocks.append({"type": "text", "text": text})
    blocks += [
        {
            "type": "tool_use",
            "id": call["id"],
            "name": call["function"]["name"],
            "input": json.loads(call["function"]["arguments"]),
        }
        for call in reply.tool_calls
    ]
    return blocks


def _usage(reply: Reply) -> dict[str, Any]:
    if reply.usage is not None:
        return dict(reply.usage)
    hour = reply.cache_write_1h_tokens
    return {
        "input_tokens": reply.prompt_tokens,
        "cache_creation_input_tokens": reply.cache_write_tokens,
        "cache_read_input_tokens": reply.cached_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": reply.cache_write_tokens - hour,
            "ephemeral_1h_input_tokens": hour,
        },
        "output_tokens": reply.completion_tokens,
        "service_tier": "standard",
    }


async def _events(
    reply: Reply, message: dict[str, Any], usage: dict[str, Any]
) -> AsyncIterator[Event]:
    """Yield the input's usage with the start, and the output's before the stop."""
    first = {**usage, "output_tokens": FIRST_OUTPUT_TOKENS} if usage else {"output_tokens": 0}
    begun: dict[str, Any] = {**message, "content": [], "stop_reason": None, "usage": first}
    yield _event("message_start", message=begun)
    for index, block in enumerate(message["content"]):
        for event in _block_events(reply, index, block):
            yield event
            if index == 0 and event.name == "content_block_start":
                yield _event("ping")
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    last = {"output_tokens": usage.get("output_tokens", 0)} if usage else {"output_tokens": 0}
    for _ in range(reply.usage_times):
        yield _event("message_delta", delta=delta, usage=last)._replace(is_usage=True)
    yield _event("message_stop")._replace(is_usage=True)


def _block_events(reply: Reply, index: int, block: dict[str, Any]) -> list[Event]:
    if block["type"] == "text":
        empty: dict[str, Any] = {"type": "text", "text": ""}
        deltas = [{"type": "text_delta", "text": piece} for piece in reply.pieces()]
    elif block["type"] == "thinking":
        empty = {"type": "thinking", "thinking": "", "signature": ""}
        deltas = [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    else:
        empty = {**block, "input": {}}
        text = json.dumps(block["input"])
        half = len(text) // 2
        deltas = [
            {"type": "input_json_delta", "partial_json": piece}
            for piece in ("", text[:half], text[half:])
        ]
    return [
        _event("content_block_start", index=index, content_block=empty),
        *(_event("content_block_delta", index=index, delta=delta) for delta in deltas),
        _event("content_block_stop", index=index),
    ]


def _event(kind: str, **fields: Any) -> Event:
    return Event({"type": kind, **fields}, kind)
