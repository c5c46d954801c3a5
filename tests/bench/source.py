"""A paced source of streams that stands in for LiteLLM.

`python -m tests.bench.source PORT EVENTS_PER_SECOND SECONDS`. Each event has its moment, counted
from the start of its stream, so that a stream lasts as long as it should however busy the machine
is. Straight on a protocol: the source must cost little beside what is measured.
"""

import asyncio
import sys
from typing import cast

import httptools
import uvloop

from tests.bench import canned

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(payload), payload)


EVENT = _chunk(canned.content_event())
CLOSING = _chunk(canned.closing_events()) + b"0\r\n\r\n"


class Source(asyncio.Protocol):
    """One connection; its requests come one after another."""

    def __init__(self, events_per_s: float, events: int) -> None:
        self._interval_s = 1 / events_per_s
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._timer: asyncio.TimerHandle | None = None

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

    def on_url(self, url: bytes) -> None:
        """Be called by the parser."""
        self._path = url

    def on_message_complete(self) -> None:
        """Be called by the parser: the request is whole."""
        if self._path == b"/v1/chat/completions":
            self._write(_HEAD)
            self._send(0, self._loop.time())
        else:
            body = canned.models()
            self._write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )

    def _send(self, sent: int, started: float) -> None:
        if sent == self._events:
            self._write(CLOSING)
            return
        self._write(EVENT)
        due = started + (sent + 1) * self._interval_s
        self._timer = self._loop.call_at(due, self._send, sent + 1, started)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def main(port: int, events_per_s: float, seconds: float) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Source(events_per_s, round(events_per_s * seconds)),
        "127.0.0.1",
        port,
        backlog=4096,
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
