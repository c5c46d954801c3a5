"""What the account API, the admin API and the ops endpoints share of HTTP.

Handlers raise, and `Envelope` is the one place where an error becomes an answer.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.db import CONNECTION_ERRORS, unavailable
from proxy.errors import MethodNotAllowedError, NotFoundError, TallygateError
from proxy.exchange import Exchange
from proxy.log import RequestLog
from proxy.networks import Addresses
from proxy.rates import Rates

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

_EXCHANGE = "tallygate.exchange"
_NOTES = "tallygate.notes"
# Nothing that is answered here is a page, or belongs into one.
_SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]
# Whose requests are an audit trail: see docs/operations.md.
_LOGGED_PLANES = {"/api/v1": "account", "/admin/v1": "admin"}
_SHOWN_PATH_CHARACTERS = 200
_PATH_NAMES = {"request_id": "about_request_id"}


@dataclass(slots=True)
class Notes:
    """What is found out about a request while it is served, for its log line and its headers."""

    operation: str | None = None
    # Never a key: an operator's name, or a virtual key's id.
    caller: str | None = None
    ids: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: dict[str, str] = field(default_factory=dict[str, str])


class Envelope:
    """Middleware: an id and headers for every answer, OpenAI's shape for every error, a log line.

    `hsts_max_age_s` is how long browsers are told to insist on HTTPS, 0 for nothing of it.
    """

    def __init__(
        self, app: ASGIApp, *, log: RequestLog, addresses: Addresses, hsts_max_age_s: int
    ) -> None:
        self._app = app
        self._log = log
        self._addresses = addresses
        self._headers = list(_SECURITY_HEADERS)
        if hsts_max_age_s:
            hsts = f"max-age={hsts_max_age_s}"
            self._headers.append((b"strict-transport-security", hsts.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status: int | None = None
        notes = Notes()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = self._complete(message["headers"], exchange, notes)
            await send(message)

        exchange = Exchange(scope, receive, send_with_headers)
        try:
            served = {**scope, _EXCHANGE: exchange, _NOTES: notes}
            await self._app(served, receive, send_with_headers)
        except Exception as error:
            if status is not None:
                raise
            await exchange.respond_error(_as_answer(error, exchange))
        finally:
            self._write(scope, exchange, notes, status, time.monotonic() - started)

    def _complete(
        self, headers: list[tuple[bytes, bytes]], exchange: Exchange, notes: Notes
    ) -> list[tuple[bytes, bytes]]:
        names = {name for name, _ in headers}
        more = [
            (b"x-request-id", exchange.request_text.encode()),
            (b"cache-control", b"no-store"),
            *self._headers,
            *((name.encode(), value.encode()) for name, value in notes.headers.items()),
        ]
        return [*headers, *(pair for pair in more if pair[0] not in names)]

    def _write(
        self, scope: Scope, exchange: Exchange, notes: Notes, status: int | None, seconds: float
    ) -> None:
        """Log the request: who did what on which ids. No query, for somebody may put a key there.

        Requests of the ops endpoints come all the time, and change nothing.
        """
        plane = _LOGGED_PLANES.get("/".join(scope["path"].split("/", 3)[:3]))
        if plane is None:
            return
        address = self._addresses.of(exchange.peer, exchange.header(b"x-forwarded-for"))
        # A path's request is another than this one.
        ids = {_PATH_NAMES.get(name, name): found for name, found in notes.ids.items()}
        self._log.write(
            request_id=exchange.request_text,
            plane=plane,
            operation=notes.operation,
            caller=notes.caller,
            address=None if address is None else str(address),
            **ids,
            status=status,
            ms=round(seconds * 1000, 1),
        )


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


def notes_of(request: Request) -> Notes:
    """Return what the envelope is to say of this request."""
    return request.scope[_NOTES]


def take_turn(request: Request, rates: Rates, subject: Hashable, *, caller: str) -> None:
    """Note who calls, and count the call for `subject`: RateLimitError where it comes too often."""
    notes = notes_of(request)
    notes.caller = caller
    rate = rates.take(subject)
    if not rate.is_allowed:
        message = (
            f"More than {rate.limit} calls of this API came in a minute. Wait "
            f"{rate.retry_after_s} s."
        )
        raise rate.refusal(message)
    notes.headers.update(rate.headers())


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
    raise NotFoundError(f"There is no {path} here. GET /openapi.json lists what there is.")


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
