"""A provider that speaks OpenAI's, Anthropic's and Cohere's API over a real socket.

It does what a test tells it:

    provider.reply("priced", Reply(content="hi", prompt_tokens=10, completion_tokens=5))
    provider.reply_once("priced", Reply(status=429, headers={"retry-after": "7"}))
    provider.last().headers["authorization"]

A name without a script gets `Reply()`. An endpoint is one function: add to `ENDPOINTS`.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import pytest
from aiohttp import web

from tests.support import (
    provider_anthropic,
    provider_cohere,
    provider_media,
    provider_openai,
    provider_responses,
)
from tests.support.provider_reply import WAIT_S, Gate, Received, Reply, is_form, parts
from tests.support.provider_wire import send_plain

__all__ = ["FakeProvider", "Gate", "Received", "Reply"]

# Uploads and prompts of a hundred megabytes are asked for in earnest.
MAX_BODY_BYTES = 256 * 1024 * 1024


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
        return f"{self.root_url}/v1"

    @property
    def root_url(self) -> str:
        """The `api_base` without the version, as Anthropic's and Cohere's are given."""
        return f"http://127.0.0.1:{self._port}"

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
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_get("/model/info", self._model_info)
        application.router.add_get("/health/liveliness", self._model_info)
        application.router.add_route("*", "/{path:.*}", self._handle)
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
        headers = dict(_lowered(request.headers))
        received = Received(
            request.path,
            headers,
            body,
            _model(request.path, headers, body),
            method=request.method,
            query=request.query_string,
        )
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
            return send_plain(reply, _error(request.path, reply))
        endpoint = ENDPOINTS.get(request.path)
        if request.path.startswith(provider_responses.PATH + "/"):
            endpoint = provider_responses.stored
        if endpoint is None:
            return web.json_response({"error": {"message": f"no {request.path}"}}, status=404)
        return await endpoint(request, received, reply)


def _error(path: str, reply: Reply) -> dict[str, Any]:
    if path.startswith("/v1/messages"):
        return provider_anthropic.error_body(reply)
    if path.endswith("/rerank"):
        return {"message": "the provider says no"}
    return {"error": {"message": "the provider says no", "type": "provider_error", "code": None}}


ENDPOINTS: Mapping[str, Callable[..., Any]] = {
    "/v1/chat/completions": provider_openai.chat,
    "/v1/completions": provider_openai.completions,
    "/v1/embeddings": provider_openai.embeddings,
    "/v1/moderations": provider_openai.moderations,
    "/v1/responses": provider_responses.responses,
    "/v1/images/generations": provider_media.generations,
    "/v1/images/edits": provider_media.edits,
    "/v1/audio/speech": provider_media.speech,
    "/v1/audio/transcriptions": provider_media.transcriptions,
    "/v1/audio/translations": provider_media.transcriptions,
    "/v1/messages": provider_anthropic.messages,
    "/v1/messages/count_tokens": provider_anthropic.count_tokens,
    "/v1/rerank": provider_cohere.rerank,
    "/v2/rerank": provider_cohere.rerank,
}


def _lowered(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((name.lower(), text) for name, text in headers.items())


def _model(path: str, headers: Mapping[str, str], body: bytes) -> str:
    """Return the model that a body or a stored response's id names, empty where none does."""
    if path.startswith(provider_responses.PATH + "/"):
        return provider_responses.model_of(path)
    if is_form(headers):
        named = (part.data.decode() for part in parts(headers, body) if part.name == "model")
        return next(named, "")
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
