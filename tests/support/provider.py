"""A provider that speaks OpenAI's API over a real socket and does what a test tells it.

    provider.reply("priced", Reply(content="hi", prompt_tokens=10, completion_tokens=5))
    provider.reply_once("priced", Reply(status=429, headers={"retry-after": "7"}))
    provider.last().headers["authorization"]

A name without a script gets `Reply()`. An endpoint is one method here: add to `ENDPOINTS`.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import pytest
from aiohttp import web

WAIT_S = 30


class Gate:
    """Holds an answer back until the test lets it go; no test needs to sleep.

    The provider stops when `after_chunks` chunks of a stream are out (or, with 0 or a plain
    answer, before the first byte).
    """

    def __init__(self, *, after_chunks: int = 0) -> None:
        self.after_chunks = after_chunks
        self._reached = threading.Event()
        self._open = threading.Event()

    def wait_reached(self) -> None:
        """Wait in the test until the provider stands at the gate."""
        assert self._reached.wait(WAIT_S), "the provider never reached the gate"

    def open(self) -> None:
        """Let the provider go on, now and later."""
        self._open.set()

    async def pass_through(self) -> None:
        """Wait in the provider."""
        self._reached.set()
        # The event is a thread's, set by the test; a loop that waits can be cancelled.
        while not self._open.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the provider answers.

    `usage` is sent instead of the one made from the token counts; `{}` sends none at all.
    `cut_after` ends the connection after so many chunks: with a clean end of the body, or with
    `reset` by closing the socket in the middle. `error_after` sends an error event instead.
    """

    content: str = "Hello from the provider."
    prompt_tokens: int = 10
    completion_tokens: int = 5
    usage: Mapping[str, Any] | None = None
    model: str | None = None
    finish_reason: str = "stop"
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    raw_body: bytes | None = None
    first_byte_delay_s: float = 0.0
    chunks: int = 3
    chunk_delay_s: float = 0.0
    cut_after: int | None = None
    reset: bool = False
    error_after: int | None = None
    gate: Gate | None = None

    def usage_object(self) -> dict[str, Any]:
        """Return the usage as the provider reports it; empty for none."""
        if self.usage is not None:
            return dict(self.usage)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass
class Received:
    """One request that the provider saw, and how it ended."""

    path: str
    headers: Mapping[str, str]
    body: bytes
    model: str
    # Set when the answer is over: `finished`, or `closed_early` where the caller hung up first.
    ended: threading.Event = field(default_factory=threading.Event)
    finished: bool = False
    closed_early: bool = False

    def json(self) -> dict[str, Any]:
        """Return the body, parsed."""
        return json.loads(self.body)

    def wait_ended(self) -> Self:
        """Wait until the provider is through with it."""
        assert self.ended.wait(WAIT_S), "the provider is still answering"
        return self


class FakeProvider:
    """The server, in a thread with a loop of its own; `url` is its `api_base`."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        # Deployments to answer `GET /model/info` with, where it stands in for LiteLLM itself.
        self.deployments: list[dict[str, Any]] = []
        self._always: dict[str, Reply] = {}
        self._once: dict[str, deque[Reply]] = {}
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._port = 0
        self._thread = threading.Thread(target=self._run, name="provider", daemon=True)

    @property
    def url(self) -> str:
        """The `api_base` that LiteLLM is given."""
        return f"http://127.0.0.1:{self._port}/v1"

    def reply(self, model: str, reply: Reply) -> None:
        """Answer every request for a model so, from now on."""
        self._always[model] = reply

    def reply_once(self, model: str, *replies: Reply) -> None:
        """Answer the next requests for a model so, one each, before what reply() says."""
        self._once.setdefault(model, deque()).extend(replies)

    def reset(self) -> None:
        """Forget scripts and requests."""
        self.requests.clear()
        self._always.clear()
        self._once.clear()

    def last(self) -> Received:
        """Return the newest request."""
        assert self.requests, "the provider was not asked"
        return self.requests[-1]

    def start(self) -> Self:
        """Start serving."""
        self._thread.start()
        assert self._started.wait(WAIT_S), "the provider does not start"
        return self

    def stop(self) -> None:
        """Stop serving; open answers are cut."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=64 * 1024 * 1024)
        application.router.add_post("/{path:.*}", self._handle)
        application.router.add_get("/model/info", self._model_info)
        application.router.add_get("/health/liveliness", self._model_info)
        runner = web.AppRunner(
            application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self._port = runner.addresses[0][1]
        self._started.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())
        self._loop.close()

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"data": self.deployments})

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        received = Received(request.path, dict(_lowered(request.headers)), body, _model(body))
        self.requests.append(received)
        try:
            response = await self._answer(request, received)
        except (asyncio.CancelledError, ConnectionError):
            received.closed_early = True
            raise
        else:
            received.finished = True
            return response
        finally:
            received.ended.set()

    async def _answer(self, request: web.Request, received: Received) -> web.StreamResponse:
        once = self._once.get(received.model)
        reply = once.popleft() if once else self._always.get(received.model, Reply())
        if reply.first_byte_delay_s:
            await asyncio.sleep(reply.first_byte_delay_s)
        if reply.gate is not None and reply.gate.after_chunks == 0:
            await reply.gate.pass_through()
        if reply.status >= 400 or reply.raw_body is not None:
            return _plain(reply)
        endpoint = ENDPOINTS.get(request.path)
        if endpoint is None:
            return web.json_response({"error": {"message": f"no {request.path}"}}, status=404)
        return await endpoint(request, received, reply)


def _plain(reply: Reply) -> web.Response:
    """Answer with an error, or with whatever bytes the test wants."""
    error = {"error": {"message": "the provider says no", "type": "provider_error", "code": None}}
    body = json.dumps(error).encode() if reply.raw_body is None else reply.raw_body
    headers = {"content-type": "application/json", **reply.headers}
    return web.Response(status=reply.status, body=body, headers=headers)


async def _chat(request: web.Request, received: Received, reply: Reply) -> web.StreamResponse:
    asked = received.json()
    if asked.get("stream"):
        options: dict[str, Any] = asked.get("stream_options") or {}
        wants_usage = bool(options.get("include_usage"))
        return await _stream(request, reply, _chat_events(received, reply, wants_usage=wants_usage))
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.tool_calls:
        message |= {"content": None, "tool_calls": list(reply.tool_calls)}
    answer: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": reply.model or received.model,
        "choices": [
            {"index": n, "message": message, "finish_reason": reply.finish_reason}
            for n in range(asked.get("n") or 1)
        ],
    }
    if usage := reply.usage_object():
        answer["usage"] = usage
    return web.json_response(answer, headers=dict(reply.headers))


async def _chat_events(
    received: Received, reply: Reply, *, wants_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    """Yield the content in `chunks` pieces, then the finish, then the usage."""
    base: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": reply.model or received.model,
    }
    size = -(-len(reply.content) // reply.chunks)
    for n in range(reply.chunks):
        delta: dict[str, Any] = {"content": reply.content[n * size : (n + 1) * size]}
        if n == 0:
            delta["role"] = "assistant"
            if reply.tool_calls:
                delta["tool_calls"] = [
                    {"index": i, **call} for i, call in enumerate(reply.tool_calls)
                ]
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    finish: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": reply.finish_reason}
    yield {**base, "choices": [finish]}
    if wants_usage and (usage := reply.usage_object()):
        yield {**base, "choices": [], "usage": usage}


async def _stream(
    request: web.Request, reply: Reply, events: AsyncIterator[dict[str, Any]]
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream", **reply.headers})
    response.enable_chunked_encoding()
    await response.prepare(request)
    sent = 0
    async for event in events:
        if sent == reply.cut_after:
            return await _cut(request, response, reply)
        if sent == reply.error_after:
            event = {"error": {"message": "the provider broke", "code": 500}}  # noqa: PLW2901
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        if sent == reply.error_after:
            return response
        sent += 1
        if reply.gate is not None and sent == reply.gate.after_chunks:
            await reply.gate.pass_through()
        if reply.chunk_delay_s:
            await asyncio.sleep(reply.chunk_delay_s)
    await response.write(b"data: [DONE]\n\n")
    return response


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


ENDPOINTS: Mapping[str, Callable[..., Any]] = {
    "/v1/chat/completions": _chat,
}


def _lowered(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((name.lower(), text) for name, text in headers.items())


def _model(body: bytes) -> str:
    """Return the model that a JSON body names, empty where it names none."""
    try:
        return str(json.loads(body)["model"])
    except (ValueError, KeyError, TypeError):
        return ""


@pytest.fixture(scope="session")
def provider_server() -> Iterator[FakeProvider]:
    """The worker's provider, as LiteLLM knows it; tests ask for `provider`."""
    server = FakeProvider().start()
    yield server
    server.stop()


@pytest.fixture
def provider(provider_server: FakeProvider) -> FakeProvider:
    """The worker's provider without scripts and without a past."""
    provider_server.reset()
    return provider_server
