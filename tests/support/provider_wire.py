"""How the fake provider sends an answer, and how it breaks off in the middle of one."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from aiohttp import web

from tests.support.provider_reply import Reply


class Event(NamedTuple):
    """One event of a stream; OpenAI's older ones have no name."""

    data: Mapping[str, Any]
    name: str | None = None
    # Said at the end, also where an error came before and the test wants both.
    is_usage: bool = False

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        line = b"data: " + json.dumps(self.data).encode() + b"\n\n"
        return line if self.name is None else f"event: {self.name}\n".encode() + line


BROKEN = Event({"error": {"message": "the provider broke", "code": 500}})
DONE = b"data: [DONE]\n\n"


async def send_json(
    request: web.Request, reply: Reply, answer: object, *, content_type: str = "application/json"
) -> web.StreamResponse:
    """Answer as a whole; text is sent as it is."""
    body = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
    headers = {"content-type": content_type, **reply.headers}
    if reply.cut_after is None:
        return web.Response(body=body, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    return await _cut(request, response, reply)


async def send_events(
    request: web.Request,
    reply: Reply,
    events: AsyncIterator[Event],
    *,
    error: Event = BROKEN,
    end: bytes = DONE,
) -> web.StreamResponse:
    """Answer with server-sent events."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream", **reply.headers})
    response.enable_chunked_encoding()
    await response.prepare(request)
    sent = 0
    broken = False
    async for event in events:
        if broken and not event.is_usage:
            continue
        if sent == reply.cut_after:
            return await _cut(request, response, reply)
        if sent == reply.error_after:
            await response.write(error.encode())
            broken = True
            if not reply.keep_usage_after_error:
                return response
            if not event.is_usage:
                sent += 1
                continue
        await response.write(event.encode())
        sent += 1
        await _between_chunks(reply, sent)
    await response.write(end)
    return response


async def send_bytes(
    request: web.Request, reply: Reply, *, content_type: str
) -> web.StreamResponse:
    """Answer with the reply's binary, in `chunks` pieces."""
    response = web.StreamResponse(headers={"content-type": content_type, **reply.headers})
    response.enable_chunked_encoding()
    await response.prepare(request)
    size = len(reply.binary) if reply.repeat_content else -(-len(reply.binary) // reply.chunks)
    for n in range(reply.chunks):
        if n == reply.cut_after:
            return await _cut(request, response, reply)
        start = 0 if reply.repeat_content else n * size
        await response.write(reply.binary[start : start + size])
        await _between_chunks(reply, n + 1)
    return response


def send_plain(reply: Reply, error: Mapping[str, Any]) -> web.Response:
    """Answer with an error, or with whatever bytes the test wants."""
    body = json.dumps(error).encode() if reply.raw_body is None else reply.raw_body
    headers = {"content-type": "application/json", **reply.headers}
    return web.Response(status=reply.status, body=body, headers=headers)


async def _between_chunks(reply: Reply, sent: int) -> None:
    if reply.gate is not None and sent == reply.gate.after_chunks:
        await reply.gate.pass_through()
    if reply.chunk_delay_s:
        await asyncio.sleep(reply.chunk_delay_s)


async def _cut(
    request: web.Request, response: web.StreamResponse, reply: Reply
) -> web.StreamResponse:
    """End the answer in its middle."""
    if reply.reset and request.transport is not None:
        request.transport.abort()
    else:
        with suppress(ConnectionError):
            await response.write_eof()
    return response
