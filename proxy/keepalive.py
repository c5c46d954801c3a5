"""Comments in silent streams, so that nobody on the way takes a thinking model for a dead one.

A stream whose provider has not even begun is opened after the same time: from then on an error can
only be told as an event of the stream.
"""

import asyncio

from proxy.call import Call

# Comments are nothing to any reader of server-sent events; OpenRouter sends them too.
_COMMENT = b": tallygate is waiting for the model\n\n"
STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))
EVENT_STREAM = b"text/event-stream; charset=utf-8"


class KeepAlive:
    """Watches the streams of this process; `run` looks at them at intervals."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._calls: set[Call] = set()
        self._writes: set[asyncio.Task[None]] = set()

    def add(self, call: Call) -> None:
        """Keep this stream alive until it is removed."""
        call.exchange.sent_at = asyncio.get_running_loop().time()
        self._calls.add(call)

    def remove(self, call: Call) -> None:
        """The stream ends now: whatever follows is written by whoever ends it."""
        self._calls.discard(call)

    async def run(self) -> None:
        """Write where nothing was written for an interval, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._interval_s / 4)
            silent_since = loop.time() - self._interval_s
            for call in tuple(self._calls):
                if call.exchange.sent_at <= silent_since and not call.exchange.is_gone:
                    # Each on its own: a client that takes nothing must not keep the others waiting.
                    task = loop.create_task(self._write(call))
                    self._writes.add(task)
                    task.add_done_callback(self._writes.discard)

    async def _write(self, call: Call) -> None:
        if call not in self._calls:
            return  # its end came first, and may be no stream at all
        exchange = call.exchange
        if not exchange.is_streaming:
            await exchange.start([*call.headers(EVENT_STREAM), *STREAM_HEADERS])
        await exchange.write(_COMMENT)
