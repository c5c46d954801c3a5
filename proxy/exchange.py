"""One HTTP request and its answer, straight on ASGI.

The relay needs to hold the end of an answer back until it is settled, to know when the client has
gone, and to spend nothing on what it does not use. So the data plane works on this, and nothing in
it runs after the answer is complete.
"""

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Mapping,
    MutableMapping,
)
from functools import partial
from typing import Any
from uuid import UUID

import msgspec

from proxy.dialect import Dialect
from proxy.errors import InvalidRequestError, RequestTooLargeError, TallygateError
from proxy.ids import uuid7

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# How much of a refused body is read on, so that a client that is still sending gets the answer
# rather than a reset connection.
_REFUSED_BODY_BYTES = 32 * 1024 * 1024


class Exchange:
    """Reads the request once, answers it once."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, *, stall_timeout_s: float = 60.0
    ) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._on_gone: Callable[[], None] | None = None
        # Set by whoever knows which endpoint this is, before anything can fail.
        self.dialect = Dialect.OPENAI
        self._receive = receive
        self._send = send
        self.request_id: UUID = uuid7()
        self.request_text = str(self.request_id)
        # The first of several equal names counts, as it does for the SDKs' own servers.
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self._client: tuple[str, int] | None = scope.get("client")
        self.status: int | None = None
        self.is_streaming = False
        self.is_gone = False
        self._is_finished = False
        # The loop's time of the last part that was sent.
        self.sent_at = 0.0
        self._watcher: asyncio.Task[None] | None = None
        # Known from the start of a streamed answer on.
        self._loop: asyncio.AbstractEventLoop

    def header(self, name: bytes) -> str | None:
        """Return a request header by its lower-case name."""
        value = self._headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def peer(self) -> str | None:
        """The address of whoever connected to us, which may be a proxy."""
        return None if self._client is None else self._client[0]

    @property
    def virtual_key(self) -> str | None:
        """The key that the client sent."""
        authorization = self._headers.get(b"authorization", b"")
        if authorization.startswith(b"Bearer sk-"):  # as every SDK sends it
            return authorization[7:].decode("latin-1").strip()
        return virtual_key(lambda name: self.header(name.encode()))

    async def read_body(self, limit: int) -> bytes:
        """Read the whole body; RequestTooLargeError above `limit` bytes."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            body: bytes = message.get("body", b"")
            if len(body) <= limit:
                return body
        parts = [part async for part in self.body_parts(limit, message)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def body_parts(self, limit: int, first: Message | None = None) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; RequestTooLargeError above `limit` bytes.

        `first` is the message that was received already, if one was.
        """
        declared = self._headers.get(b"content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            if first is None or first.get("more_body", False):
                await self._discard(0)
            raise _too_large(limit)
        size = 0
        while True:
            message = first or await self._receive()
            first = None
            if message["type"] != "http.request":
                self.is_gone = True
                msg = "The connection ended before the request was complete."
                raise InvalidRequestError(msg)
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                if message.get("more_body", False):
                    await self._discard(size)
                raise _too_large(limit)
            yield part
            if not message.get("more_body", False):
                return

    async def _discard(self, size: int) -> None:
        while size <= _REFUSED_BODY_BYTES:
            message = await self._receive()
            if message["type"] != "http.request":
                self.is_gone = True
                return
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    async def respond(
        self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        """Send a whole answer."""
        self.status = status
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"content-length", b"%d" % len(body)), *self._ids()],
            }
        )
        await self._send({"type": "http.response.body", "body": body})

    def _ids(self) -> list[tuple[bytes, bytes]]:
        request_id = self.request_text.encode()
        if self.dialect is Dialect.ANTHROPIC:
            # Where Anthropic's SDK looks for it.
            return [(b"x-request-id", request_id), (b"request-id", request_id)]
        return [(b"x-request-id", request_id)]

    async def respond_json(
        self, status: int, content: object, headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a JSON answer."""
        pairs = [(b"content-type", b"application/json")]
        pairs += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await self.respond(status, msgspec.json.encode(content), pairs)

    async def respond_error(self, error: TallygateError) -> None:
        """Send an error in the shape that the endpoint's clients know."""
        body = self.dialect.error_body(error, self.request_id)
        await self.respond_json(error.status, body, error.response_headers())

    def when_gone(self, on_gone: Callable[[], None]) -> None:
        """Have `on_gone` called if the client hangs up before the answer's end, or has already."""
        self._on_gone = on_gone
        if self.is_gone:
            on_gone()

    async def start(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Begin a streamed answer."""
        self.status = 200
        self.is_streaming = True
        self._loop = asyncio.get_running_loop()
        self.sent_at = self._loop.time()
        await self._send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*headers, *self._ids()],
            }
        )
        self._watcher = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self.is_gone = True
        if self._on_gone is not None:
            self._on_gone()

    async def write(self, chunk: bytes) -> None:
        """Send a part; waits while the client does not take it, nothing once it is gone.

        A client that takes nothing for the stall timeout counts as gone: it would hold its money,
        a connection to the provider and this process's memory for as long as it likes.
        """
        if self.is_gone or self._is_finished:
            return
        self.sent_at = self._loop.time()
        message = {"type": "http.response.body", "body": chunk, "more_body": True}
        if not await self._is_taken(message):
            self._leave()

    async def finish(self, tail: bytes) -> None:
        """Send the last part of a streamed answer and end it."""
        self.stop_watching()
        self._is_finished = True
        if self.is_gone:
            return
        if not await self._is_taken({"type": "http.response.body", "body": tail}):
            self.is_gone = True

    async def _is_taken(self, message: Message) -> bool:
        """Send a message; False if it was not taken within the stall timeout.

        Nearly always there is room for it, and a timer for each would cost more than the rest.
        """
        sending = self._send(message).__await__()
        try:
            waits_for = next(sending)
        except StopIteration:
            return True
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await _Rest(sending, waits_for)
        except TimeoutError:
            return False
        return True

    def stop_watching(self) -> None:
        """End the watch for the client's hanging up: from now on it makes no difference."""
        self._on_gone = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None


class _Rest:
    """What is left to await of something that was begun by hand and waits for `waits_for`."""

    def __init__(self, begun: Generator[Any, Any, None], waits_for: object) -> None:
        self._begun = begun
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                result = yield waits_for
            except BaseException as error:  # noqa: BLE001 - whatever it is, it is the other's
                step = partial(self._begun.throw, error)
            else:
                step = partial(self._begun.send, result)
            try:
                waits_for = step()
            except StopIteration:
                return


def virtual_key(header: Callable[[str], str | None]) -> str | None:
    """Return the key of `Authorization: Bearer` or `x-api-key`; None if neither holds one."""
    scheme, _, key = (header("authorization") or "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return (header("x-api-key") or "").strip() or None


def _too_large(limit: int) -> RequestTooLargeError:
    msg = f"The request body is larger than {limit} bytes, which is the most that is accepted."
    return RequestTooLargeError(msg)
