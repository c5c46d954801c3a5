"""The envelope around the APIs, on scopes that no client of theirs can make."""

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.api.web import Envelope
from proxy.errors import NotFoundError
from proxy.log import RequestLog
from proxy.networks import Addresses

pytestmark = pytest.mark.anyio


def _envelope(app: ASGIApp) -> Envelope:
    return Envelope(app, log=RequestLog(), addresses=Addresses(), hsts_max_age_s=0)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def test_answer_that_had_begun_is_broken_off_and_not_begun_again() -> None:
    sent: list[Message] = []

    async def begins(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise NotFoundError("too late")

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(NotFoundError):
        await _envelope(begins)(
            {"type": "http", "method": "GET", "path": "/", "headers": []}, _nothing, send
        )
    (start,) = sent
    assert [name for name, _ in start["headers"]].count(b"x-request-id") == 1


async def test_what_is_no_http_passes_untouched() -> None:
    seen: list[Scope] = []

    async def records(scope: Scope, receive: Receive, send: Send) -> None:
        del receive, send
        seen.append(scope)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope: Scope = {"type": "lifespan"}
    await _envelope(records)(scope, _nothing, send)
    assert seen[0] is scope
