"""OpenAI's images and audio, as the fake provider serves them."""

import base64
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from tests.support.provider_openai import CREATED
from tests.support.provider_reply import Received, Reply
from tests.support.provider_wire import Event, send_bytes, send_events, send_json

SPEECH_TYPES = {"mp3": "audio/mpeg", "wav": "audio/wav", "opus": "audio/opus", "pcm": "audio/pcm"}
TEXT_FORMATS = ("text", "srt", "vtt")


async def generations(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/images/generations."""
    return await _images(request, received, reply, "image_generation")


async def edits(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/images/edits, which is a form."""
    return await _images(request, received, reply, "image_edit")


async def _images(
    request: web.Request, received: Received, reply: Reply, kind: str
) -> web.StreamResponse:
    asked = received.asked()
    image = base64.b64encode(reply.binary).decode()
    usage = _image_usage(reply)
    if _is_true(asked.get("stream")):
        partial = int(asked.get("partial_images") or 0)
        events = _image_events(kind, image, usage, partial=partial)
        return await send_events(request, reply, events, end=b"")
    one = {"b64_json": image}
    if asked.get("response_format") == "url":
        one = {"url": "http://127.0.0.1/image.png"}
    answer: dict[str, Any] = {"created": CREATED, "data": [one] * int(asked.get("n") or 1)}
    answer |= {key: asked[key] for key in ("size", "quality") if key in asked}
    if usage:
        answer["usage"] = usage
    return await send_json(request, reply, answer)


async def _image_events(
    kind: str, image: str, usage: dict[str, Any], *, partial: int
) -> AsyncIterator[Event]:
    for n in range(partial):
        name = f"{kind}.partial_image"
        yield Event({"type": name, "partial_image_index": n, "b64_json": image}, name)
    name = f"{kind}.completed"
    yield Event({"type": name, "b64_json": image, "usage": usage}, name, is_usage=True)


def _image_usage(reply: Reply) -> dict[str, Any]:
    if reply.usage is not None:
        return dict(reply.usage)
    return {
        "input_tokens": reply.prompt_tokens,
        "input_tokens_details": {"text_tokens": reply.prompt_tokens, "image_tokens": 0},
        "output_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


async def speech(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    """Answer /v1/audio/speech: the bytes, or with `stream_format: sse` events with a usage."""
    asked = received.json()
    if asked.get("stream_format") == "sse":
        return await send_events(request, reply, _speech_events(reply), end=b"")
    kind = SPEECH_TYPES.get(asked.get("response_format", "mp3"), "application/octet-stream")
    return await send_bytes(request, reply, content_type=kind)


async def _speech_events(reply: Reply) -> AsyncIterator[Event]:
    size = -(-len(reply.binary) // reply.chunks)
    for n in range(reply.chunks):
        audio = base64.b64encode(reply.binary[n * size : (n + 1) * size]).decode()
        yield Event({"type": "speech.audio.delta", "audio": audio})
    yield Event({"type": "speech.audio.done", "usage": _tokens(reply)}, is_usage=True)


async def transcriptions(
    request: web.Request, received: Received, reply: Reply
) -> web.StreamResponse:
    """Answer /v1/audio/transcriptions and /translations, which are forms."""
    asked = received.asked()
    if _is_true(asked.get("stream")):
        return await send_events(request, reply, _transcript_events(reply), end=b"")
    wanted = asked.get("response_format", "json")
    if wanted in TEXT_FORMATS:
        kind = "text/plain; charset=utf-8"
        return await send_json(request, reply, reply.content + "\n", content_type=kind)
    answer: dict[str, Any] = {"text": reply.content}
    if wanted == "verbose_json":
        length = 1.0 if reply.seconds is None else reply.seconds
        segment = {"id": 0, "start": 0.0, "end": length, "text": reply.content}
        answer |= {"task": "transcribe", "language": "english", "duration": length}
        answer["segments"] = [segment]
    if usage := _audio_usage(reply):
        answer["usage"] = usage
    return await send_json(request, reply, answer)


async def _transcript_events(reply: Reply) -> AsyncIterator[Event]:
    for piece in reply.pieces():
        yield Event({"type": "transcript.text.delta", "delta": piece})
    done: dict[str, Any] = {"type": "transcript.text.done", "text": reply.content}
    if usage := _audio_usage(reply):
        done["usage"] = usage
    yield Event(done, is_usage=True)


def _audio_usage(reply: Reply) -> dict[str, Any]:
    if reply.usage is not None:
        return dict(reply.usage)
    if reply.seconds is not None:
        return {"type": "duration", "seconds": reply.seconds}
    details = {"text_tokens": 0, "audio_tokens": reply.prompt_tokens}
    return {"type": "tokens", **_tokens(reply), "input_token_details": details}


def _tokens(reply: Reply) -> dict[str, Any]:
    if reply.usage is not None:
        return dict(reply.usage)
    return {
        "input_tokens": reply.prompt_tokens,
        "output_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def _is_true(field: object) -> bool:
    return field is True or str(field).lower() == "true"
