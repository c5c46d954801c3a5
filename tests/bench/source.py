"""A source of streams that stands in for LiteLLM.

`python -m tests.bench.source PORT`. `GET /pace/EVENTS_PER_S/EVENTS` says how the streams after it
are: each event has its moment, counted from the start of its stream, so that a stream lasts as
long as it should however busy the machine is; at 0 a second they come as fast as they are taken.
`GET /sent` answers how many bytes of events were sent since. Straight on a protocol: the source
must cost little beside what is measured.
"""

import asyncio
import sys
from typing import cast

import httptools
import uvloop

from tests.bench import canned

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
# So many events of a flood are written at once.
_BLOCK = 16


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


EVENT = _chunk(canned.content_event())
CLOSING = _chunk(canned.closing_events()) + b"0\r\n\r\n"


class Pace:
    """How streams are, and what was sent of them."""

    def __init__(self) -> None:
        self.events_per_s = 50.0
        self.events = 50
        self.sent = 0

    def set(self, events_per_s: float, events: int) -> None:
        """From now on streams are like this."""
        self.events_per_s, self.events, self.sent = events_per_s, events, 0


class Source(asyncio.Protocol):
    """One connection; its requests come one after another."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._timer: asyncio.Handle | None = None
        self._is_paused = False
        # Of a flood: the events that are left.
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be called by the loop."""
        # uvloop's is one without being derived from it.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Be called by the loop."""
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Be called by the loop."""
        del exc  # the signature is the loop's
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        """Be called by the loop: the reader takes nothing now."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """Be called by the loop: it takes again."""
        self._is_paused = False
        if self._left:
            self._flood()

    def on_url(self, url: bytes) -> None:
        """Be called by the parser."""
        self._path = url

    def on_message_complete(self) -> None:
        """Be called by the parser: the request is whole."""
        pace = self._pace
        if self._path == b"/v1/chat/completions":
            self._write(_HEAD)
            if pace.events_per_s:
                self._send(0, self._loop.time(), 1 / pace.events_per_s, pace.events)
            else:
                self._left = pace.events
                self._flood()
        elif self._path.startswith(b"/pace/"):
            events_per_s, events = self._path.split(b"/")[2:]
            pace.set(float(events_per_s), int(events))
            self._answer(b"{}")
        else:
            self._answer(b"%d" % pace.sent if self._path == b"/sent" else canned.models())

    def _answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._write(head % len(body) + body)

    def _send(self, sent: int, started: float, interval_s: float, events: int) -> None:
        if sent == events:
            self._write(CLOSING)
            return
        self._write(EVENT)
        due = started + (sent + 1) * interval_s
        self._timer = self._loop.call_at(due, self._send, sent + 1, started, interval_s, events)

    def _flood(self) -> None:
        """Write one block, and the next when the loop has looked after the others."""
        if self._transport is None or self._is_paused:
            return
        count = min(_BLOCK, self._left)
        self._write(EVENT * count)
        self._pace.sent += len(EVENT) * count
        self._left -= count
        if self._left:
            self._timer = self._loop.call_soon(self._flood)
        else:
            self._write(CLOSING)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def main(port: int) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    pace = Pace()
    server = await loop.create_server(lambda: Source(pace), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
