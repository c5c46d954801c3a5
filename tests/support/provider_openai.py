"""OpenAI's chat, completions, embeddings and moderations, as the fake provider serves them."""

import base64
import struct
from collections.abc import AsyncIterator
from typing import Any, cast

from aiohttp import web

from tests.support.provider_reply import Received, Reply
from tests.support.provider_wire import Event, send_events, send_json

CREATED = 1_700_000_000


async def chat(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/chat/completions."""
    asked = received.json()
    if asked.get("stream"):
        events = _chat_events(received, reply, wants_usage=_wants_usage(asked))
        return await send_events(request, reply, events)
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        message |= {"content": None, "tool_calls": list(reply.tool_calls)}
    answer: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": CREATED,
        "model": reply.model or received.model,
        "choices": [
            {"index": n, "message": message, "finish_reason": reply.finish_reason}
            for n in range(asked.get("n") or 1)
        ],
    }
    if usage := reply.usage_object():
        answer["usage"] = usage
    return await send_json(request, reply, answer)


async def _chat_events(
    received: Received, reply: Reply, *, wants_usage: bool
) -> AsyncIterator[Event]:
    """Yield the content in `chunks` pieces, then the finish, then the usage."""
    base: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": reply.model or received.model,
    }
    if reply.thinking:
        thought = {"index": 0, "delta": {"reasoning_content": reply.thinking}}
        yield Event({**base, "choices": [{**thought, "finish_reason": None}]})
    for n, piece in enumerate(reply.pieces()):
        delta: dict[str, Any] = {"content": piece}
        if n == 0:
            delta["role"] = "assistant"
            if reply.tool_calls:
                delta["tool_calls"] = [
                    {"index": i, **call} for i, call in enumerate(reply.tool_calls)
                ]
        yield Event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    finish: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": reply.finish_reason}
    yield Event({**base, "choices": [finish]})
    if wants_usage and (usage := reply.usage_object()):
        for _ in range(reply.usage_times):
            yield Event({**base, "choices": [], "usage": usage}, is_usage=True)


async def completions(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/completions."""
    asked = received.json()
    if asked.get("stream"):
        events = _completion_events(received, reply, wants_usage=_wants_usage(asked))
        return await send_events(request, reply, events)
    prompts = _listed(asked["prompt"])
    answer: dict[str, Any] = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": CREATED,
        "model": reply.model or received.model,
        "choices": [
            _text_choice(n, reply.content, reply.finish_reason)
            for n in range(len(prompts) * (asked.get("n") or 1))
        ],
    }
    if usage := reply.usage_object():
        answer["usage"] = usage
    return await send_json(request, reply, answer)


async def _completion_events(
    received: Received, reply: Reply, *, wants_usage: bool
) -> AsyncIterator[Event]:
    base: dict[str, Any] = {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": CREATED,
        "model": reply.model or received.model,
    }
    for piece in reply.pieces():
        yield Event({**base, "choices": [_text_choice(0, piece, None)]})
    yield Event({**base, "choices": [_text_choice(0, "", reply.finish_reason)]})
    if wants_usage and (usage := reply.usage_object()):
        for _ in range(reply.usage_times):
            yield Event({**base, "choices": [], "usage": usage}, is_usage=True)


def _listed(given: Any) -> list[Any]:
    return cast("list[Any]", given) if isinstance(given, list) else [given]


def _text_choice(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def _wants_usage(asked: dict[str, Any]) -> bool:
    options: dict[str, Any] = asked.get("stream_options") or {}
    return bool(options.get("include_usage"))


async def embeddings(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/embeddings with three dimensions, as floats or as base64."""
    asked = received.json()
    given: Any = asked["input"]
    # A list of token numbers is one input, a list of texts or of such lists is many.
    texts = _listed(given)
    count = 1 if isinstance(texts[0], int) else len(texts)
    vector: Any = [0.25, -0.5, 1.0]
    if asked.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack("<3f", *vector)).decode()
    answer: dict[str, Any] = {
        "object": "list",
        "data": [{"object": "embedding", "index": n, "embedding": vector} for n in range(count)],
        "model": reply.model or received.model,
    }
    if reply.usage is None:
        tokens = reply.prompt_tokens
        answer["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    elif reply.usage:
        answer["usage"] = dict(reply.usage)
    return await send_json(request, reply, answer)


async def moderations(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/moderations; no provider reports a usage there."""
    given: Any = received.json()["input"]
    texts = _listed(given)
    verdict = {
        "flagged": False,
        "categories": {"violence": False, "hate": False},
        "category_scores": {"violence": 0.001, "hate": 0.0002},
        "category_applied_input_types": {"violence": ["text"], "hate": ["text"]},
    }
    answer: dict[str, Any] = {
        "id": "modr-1",
        "model": reply.model or received.model,
        "results": [verdict] * len(texts),
    }
    if reply.usage:
        answer["usage"] = dict(reply.usage)
    return await send_json(request, reply, answer)
