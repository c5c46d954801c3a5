"""The network between a replica and PostgreSQL, which can be cut, slowed down and put to silence.

One thread passes every connection from a port of this machine on to the server's Unix socket. The
bytes are looked at only so far as to know what is being asked and where an answer ends: to lose
the word that a transaction was committed, one has to wait for that word.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Self

# The names of the functions that move money, as they stand in the statements.
_MONEY = (b"authorize_batch", b"settle_batch")
# ReadyForQuery outside of a transaction: whatever was asked is done and committed.
_COMMITTED = b"Z\x00\x00\x00\x05I"


class PostgresWire:
    """Passes connections on; its methods may be called from any thread."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self.port = 0
        # What the links look at; written by the loop's thread alone.
        self.delay_s = 0.0
        self.refuses = False
        self.to_lose = 0
        self.flowing = asyncio.Event()
        # How many answers to a committed transaction were lost.
        self.lost = 0

    def start(self) -> Self:
        """Listen on a free port."""
        self._thread.start()
        self._run(self._start())
        return self

    async def _start(self) -> None:
        self.flowing.set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Cut everything and end."""
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self._cut()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def cut(self) -> None:
        """Close every connection, at both ends."""
        self._call(self._cut)

    def _cut(self) -> None:
        for link in list(self._links):
            link.close()

    def part(self) -> None:
        """Close every connection and refuse new ones, until `heal`."""
        self._call(lambda: (setattr(self, "refuses", True), self._cut()))

    def stall(self) -> None:
        """Pass nothing on in either direction, until `heal`; the connections stay open."""
        self._call(self.flowing.clear)

    def slow(self, delay_s: float) -> None:
        """Hold back every answer for so long, until `heal`."""
        self._call(lambda: setattr(self, "delay_s", delay_s))

    def lose_commits(self, count: int) -> None:
        """Lose the answers to so many transactions that moved money, once they are committed."""
        self._call(lambda: setattr(self, "to_lose", count))

    def heal(self) -> None:
        """Let everything pass again."""

        def heal() -> None:
            self.refuses, self.delay_s, self.to_lose = False, 0.0, 0
            self.flowing.set()

        self._call(heal)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses:
            writer.transport.abort()
            return
        try:
            server = await asyncio.open_unix_connection(self._socket_path)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(self, (reader, writer), server)
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)
            link.close()

    def _call(self, change: Callable[[], object]) -> None:
        async def do() -> None:
            change()

        self._run(do())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


_Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Link:
    """One connection."""

    def __init__(self, wire: PostgresWire, client: _Pair, server: _Pair) -> None:
        self._wire = wire
        self._client = client
        self._server = server
        self._moves_money = False
        # The end of an answer that is being held back to be lost; None where none is.
        self._held: bytes | None = None

    async def run(self) -> None:
        """Pass on until either end closes."""
        ways = [asyncio.create_task(way) for way in (self._ask(), self._answer())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    def close(self) -> None:
        """Break it off."""
        self._client[1].transport.abort()
        self._server[1].transport.abort()

    async def _ask(self) -> None:
        with suppress(OSError):
            while data := await self._client[0].read(65536):
                await self._wire.flowing.wait()
                self._moves_money = any(name in data for name in _MONEY)
                self._server[1].write(data)
                await self._server[1].drain()

    async def _answer(self) -> None:
        with suppress(OSError):
            while data := await self._server[0].read(65536):
                await self._wire.flowing.wait()
                if self._wire.delay_s:
                    await asyncio.sleep(self._wire.delay_s)
                if self._is_to_be_lost():
                    self._held = (self._held or b"")[-16:] + data
                    if not self._held.endswith(_COMMITTED):
                        continue
                    self._wire.lost += 1
                    return
                self._client[1].write(data)
                await self._client[1].drain()

    def _is_to_be_lost(self) -> bool:
        """Whether this is an answer to lose, or one more part of it."""
        if self._held is not None:
            return True
        if not self._moves_money or self._wire.to_lose <= 0:
            return False
        self._wire.to_lose -= 1
        return True
