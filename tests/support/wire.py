"""A wire between a client and a server that a test can cut, or let go dead, in an answer's middle.

    wire.break_next(Fault(after_bytes=0))

The bytes are those of real sockets, so that whoever is at either end sees what it would see in a
network: its connection is gone, or nothing comes any more.
"""

import socket
import threading
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Self

_HEAD_END = b"\r\n\r\n"
# How much of the answers a test can look at.
_SEEN_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to an answer once `after_bytes` of it, or of its body, have passed.

    The connection is closed on both sides, or with `stalls` stays open and silent.
    """

    after_bytes: int
    in_body: bool = False
    stalls: bool = False


class Wire:
    """Passes on every connection to a port of this machine; `url` is where to connect instead."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._faults: deque[Fault] = deque()
        self._always: Fault | None = None
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self.requests = 0
        self.seen = bytearray()

    @property
    def url(self) -> str:
        """The root of every path, without a slash at the end."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def break_next(self, *faults: Fault) -> None:
        """Do this to the next answers, one each."""
        self._faults.extend(faults)

    def break_all(self, fault: Fault) -> None:
        """Do this to every answer from now on."""
        self._always = fault

    def start(self) -> Self:
        """Start passing on."""
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def stop(self) -> None:
        """Close whatever is open."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            _close(each)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                link = _Link(self, client, server)
                for work in (link.pass_requests, link.pass_answers):
                    threading.Thread(target=work, daemon=True).start()

    def next_fault(self) -> Fault | None:
        """Count a request and take what is to happen to its answer."""
        with self._lock:
            self.requests += 1
            return self._faults.popleft() if self._faults else self._always

    def note(self, data: bytes) -> None:
        """Remember what was answered."""
        self.seen += data[: _SEEN_BYTES - len(self.seen)]


@dataclass
class _Link:
    """One connection; requests follow each other, each after the answer to the one before."""

    wire: Wire
    client: socket.socket
    server: socket.socket
    fault: Fault | None = None
    is_new: bool = True
    passed: bytearray = field(default_factory=bytearray)

    def pass_requests(self) -> None:
        with suppress(OSError):
            while data := self.client.recv(65536):
                if self.is_new:
                    self.is_new = False
                    self.passed.clear()
                    self.fault = self.wire.next_fault()
                self.server.sendall(data)
        _close(self.server)

    def pass_answers(self) -> None:
        with suppress(OSError):
            while data := self.server.recv(65536):
                self.is_new = True
                if not self._answer(data):
                    return
        _close(self.client)

    def _answer(self, data: bytes) -> bool:
        """Pass on what may pass; returns whether the connection goes on."""
        fault = self.fault
        if fault is None:
            self.wire.note(data)
            self.client.sendall(data)
            return True
        before = len(self.passed)
        self.passed += data
        limit = self._limit(fault)
        self.client.sendall(self.passed[before:limit])
        if limit is None or len(self.passed) < limit:
            return True
        if fault.stalls:
            # Nothing comes any more, until one of the two gives up.
            while self.server.recv(65536):
                pass
        _close(self.server)
        _close(self.client)
        return False

    def _limit(self, fault: Fault) -> int | None:
        """How much of this answer may pass; None while its head is not whole."""
        if not fault.in_body:
            return fault.after_bytes
        head = self.passed.find(_HEAD_END)
        return None if head < 0 else head + len(_HEAD_END) + fault.after_bytes


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def wire_to(port: int) -> Generator[Wire]:
    """A wire to that port for as long as it is needed."""
    wire = Wire(port).start()
    try:
        yield wire
    finally:
        wire.stop()
