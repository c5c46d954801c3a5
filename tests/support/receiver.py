"""Receivers of webhooks: one in the test's own loop, and one in a process that can be killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
from standardwebhooks import Webhook

from tests.support.service import ROOT


@dataclass(frozen=True)
class Received:
    """A webhook as it came over the wire."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verify(self, secret: str) -> Any:
        """Check the signature as receivers do; raises WebhookVerificationError."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass
class Inbox:
    """A receiver that answers 204, or once each what it was told to."""

    port: int
    statuses: list[int] = field(default_factory=list[int])
    # By a text in the body.
    refusals: dict[str, int] = field(default_factory=dict[str, int])
    received: list[Received] = field(default_factory=list[Received])

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}/hooks?from=tallygate"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        # Signatures are case-sensitive, names of headers are not.
        headers["webhook-signature"] = next(
            line.split(": ", 1)[1] for line in head if line.lower().startswith("webhook-signature")
        )
        body = await reader.readexactly(int(headers["content-length"]))
        assert head[0] == "POST /hooks?from=tallygate HTTP/1.1"
        self.received.append(Received(headers, body))
        status = self.statuses.pop(0) if self.statuses else 204
        for text in [text for text in self.refusals if text.encode() in body]:
            status = self.refusals.pop(text)
        writer.write(f"HTTP/1.1 {status} Said\r\ncontent-length: 0\r\n".encode())
        writer.write(b"location: http://localhost/elsewhere\r\n\r\n")
        await writer.drain()
        writer.close()


@asynccontextmanager
async def open_inbox() -> AsyncGenerator[Inbox]:
    """Listen on a port of its own."""
    inbox = Inbox(0)
    server = await asyncio.start_server(inbox.answer, "127.0.0.1", 0)
    inbox.port = server.sockets[0].getsockname()[1]
    async with server:
        yield inbox


@dataclass
class ReceiverProcess:
    """A receiver on a port that stays the same; writes what it verified into a file, by lines."""

    port: int
    secret: str
    path: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it listens a moment later."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.receiver", str(self.port), str(self.path)],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "SECRET": self.secret},
        )

    def kill(self) -> None:
        """Kill it in the middle of whatever it does."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def events(self) -> list[Any]:
        """Every event in the order of arrival, duplicates included; a torn line is none."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")
        return [msgspec.json.decode(line) for line in lines[:-1] if line.endswith(b"}")]


def _serve(port: int, path: Path, secret: str) -> None:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            # A wrong signature ends in a traceback and no answer.
            event = Webhook(secret).verify(body, dict(self.headers))
            line = msgspec.json.encode({"id": self.headers["webhook-id"], **event})
            with lock, path.open("ab") as file:
                # What was torn by a kill stays a line of its own.
                file.write(line + b"\n")
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

    Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]), os.environ["SECRET"])
