"""Everything but the data plane: one Starlette application, one place that renders errors."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.api.account import AccountApi
from proxy.api.admin import AdminApi
from proxy.api.ops import OpsApi
from proxy.api.services import Services
from proxy.db import CONNECTION_ERRORS, unavailable
from proxy.errors import NotFoundError, TallygateError
from proxy.ids import uuid7

log = logging.getLogger(__name__)

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


def make_application(services: Services, lifespan: Lifespan) -> ASGIApp:
    """Put the account, admin and ops endpoints together."""
    handlers: dict[type[Exception], Callable[[Request, Exception], JSONResponse]] = {
        TallygateError: _render,
        HTTPException: _render_http,
        Exception: _render_defect,
        **dict.fromkeys(CONNECTION_ERRORS, _render_outage),
    }
    return _WithRequestId(
        Starlette(
            routes=[
                *AccountApi(services).routes(),
                *AdminApi(services).routes(),
                *OpsApi(services).routes(),
            ],
            exception_handlers=handlers,
            lifespan=lifespan,
        )
    )


def _render(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, TallygateError)  # noqa: S101 - what it is registered for
    return JSONResponse(error.body(), status_code=error.status, headers=error.response_headers())


def _render_http(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such path, or not by this method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    ours = NotFoundError(f"There is no {request.method} {request.url.path} here.")
    answer = _render(request, ours)
    answer.status_code = error.status_code
    return answer


def _render_outage(request: Request, error: Exception) -> JSONResponse:
    log.warning("database away", extra={"error": type(error).__name__})
    return _render(request, unavailable())


def _render_defect(request: Request, error: Exception) -> JSONResponse:
    """Tell the log everything and the client nothing but that it failed."""
    log.error("request failed", extra={"path": request.url.path}, exc_info=error)
    return _render(request, TallygateError("The request failed here. Try again, or report it."))


class _WithRequestId:
    """Puts `x-request-id` on every answer."""

    def __init__(self, application: ASGIApp) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        request_id = str(uuid7()).encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self._application(scope, receive, send_with_id)
