"""What the account API, the admin API and the ops endpoints share of HTTP.

Handlers raise, and `Envelope` is the one place where an error becomes an answer.
"""

import logging
from collections.abc import Awaitable, Callable

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.db import CONNECTION_ERRORS, unavailable
from proxy.errors import MethodNotAllowedError, NotFoundError, TallygateError
from proxy.exchange import Exchange

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

_EXCHANGE = "tallygate.exchange"
_SHOWN_PATH_CHARACTERS = 200


class Envelope:
    """Middleware: an id for every request, and an answer in OpenAI's shape for every error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False
        exchange = Exchange(scope, receive, send)

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                request_id = str(exchange.request_id).encode()
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app({**scope, _EXCHANGE: exchange}, receive, send_with_id)
        except Exception as error:
            if has_begun:
                raise
            await exchange.respond_error(_as_answer(error, exchange))


def _as_answer(error: Exception, exchange: Exchange) -> TallygateError:
    if isinstance(error, TallygateError):
        return error
    if isinstance(error, CONNECTION_ERRORS):
        return unavailable()
    log.error("request failed", exc_info=error, extra={"request_id": exchange.request_id})
    message = (
        "The request failed here, and an operator will look at it. "
        f"Quote the request id {exchange.request_id} to them."
    )
    return TallygateError(message)


def exchange_of(request: Request) -> Exchange:
    """Return the exchange that the envelope made of this request: headers, key, body, id."""
    return request.scope[_EXCHANGE]


async def refuse_route(request: Request, error: Exception) -> Response:
    """Starlette's exception handler: turn what routing refuses, 404 and 405, into our errors."""
    if not isinstance(error, HTTPException):  # pragma: no cover - registered for nothing else
        raise error
    path = request.url.path[:_SHOWN_PATH_CHARACTERS]
    if error.status_code == MethodNotAllowedError.status:
        allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        refusal = MethodNotAllowedError(f"{path} does not take {request.method}. Use {allowed}.")
        refusal.headers["allow"] = allowed
        raise refusal
    raise NotFoundError(f"There is no {path} here. Check the path.")


def resource(path: str, **handlers: Handler) -> Route:
    """Route a path to a handler for each method."""

    async def endpoint(request: Request) -> Response:
        # Starlette takes HEAD wherever it takes GET.
        method = "GET" if request.method == "HEAD" else request.method
        return await handlers[method](request)

    return Route(path, endpoint, methods=list(handlers))


def answer(content: object, status: int = 200) -> Response:
    """Answer with JSON, which nobody on the way may keep."""
    return Response(
        msgspec.json.encode(content),
        status,
        headers={"cache-control": "no-store"},
        media_type="application/json",
    )


def bearer(exchange: Exchange) -> bytes | None:
    """Return the credential of `Authorization: Bearer` as it was sent; None without one."""
    scheme, _, credential = (exchange.header(b"authorization") or "").partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        return None
    return credential.strip().encode("latin-1")
