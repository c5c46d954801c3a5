"""Connections of clients, held to a time and a size while something of a request is still to come.

uvicorn waits for ever for the rest of a head or a body, and gathers a head of any size: a few
hundred slow connections would keep a worker busy with nothing. What is sent back is another matter:
see `Exchange.write`.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class BoundedConnection(HttpToolsProtocol):
    """A connection that is closed when its client keeps it waiting.

    One timer a connection looks every `look_s`, so that a request costs nothing more for it.
    """

    look_s: ClassVar[float] = 5.0
    # For a whole head, and between two parts of a body.
    head_s: ClassVar[float] = 20.0
    body_idle_s: ClassVar[float] = 30.0
    # One read of the socket may come on top.
    max_head_bytes: ClassVar[int] = 64 * 1024

    _timer: asyncio.TimerHandle
    _heard_at: float
    _head_bytes: int = 0
    # Which head is waited for, by the scope that it becomes, and since when.
    _awaited: object = None
    _awaited_since: float

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to look."""
        super().connection_made(transport)
        self._heard_at = self._awaited_since = self.loop.time()
        self._timer = self.loop.call_later(self.look_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """End it."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, and refuse a head that grows too large."""
        self._heard_at = self.loop.time()
        super().data_received(data)
        cycle: Any = self.cycle
        scope: Any = self.scope
        if scope is None or (cycle is not None and cycle.scope is scope):
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > self.max_head_bytes:
            self.transport.write(_TOO_LARGE)
            self.transport.close()

    def _look(self) -> None:
        now = self.loop.time()
        self._timer = self.loop.call_later(self.look_s, self._look)
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete:
            # Between two requests uvicorn counts by itself, until anything comes.
            if self.timeout_keep_alive_task is not None or self._awaited is not self._current():
                self._awaited, self._awaited_since = self._current(), now
            elif now - self._awaited_since >= self.head_s:
                self.transport.close()
        elif (
            cycle.more_body
            and not self.flow.read_paused
            and now - self._heard_at >= self.body_idle_s
        ):
            self.transport.close()

    def _current(self) -> object:
        """What tells one head from the next; itself where nothing of the first has come."""
        scope: Any = self.scope
        return self if scope is None else scope
