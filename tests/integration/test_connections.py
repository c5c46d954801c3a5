"""Clients that keep a connection waiting are let go; those that are slow for a reason are not."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from proxy.connections import BoundedConnection

pytestmark = pytest.mark.anyio

LIMIT_S = 0.2


class Hasty(BoundedConnection):
    """The same within a fraction of a second."""

    look_s = 0.02
    head_s = LIMIT_S
    body_idle_s = LIMIT_S
    max_head_bytes = 2000


class House:
    """Reads a body, thinks as long as the path says, and answers."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.port = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            self.received.append(message["type"])
            if message["type"] == "http.disconnect":
                return
            if not message.get("more_body", False):
                break
        if scope["path"] == "/slow":
            await asyncio.sleep(2 * LIMIT_S)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    async def call(self, *parts: bytes, pause_s: float = 0.0) -> bytes:
        """Send these parts and return all that comes until the service closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for part in parts:
            if reader.at_eof():
                break
            writer.write(part)
            await asyncio.sleep(pause_s)
        try:
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionResetError:
            return b""
        finally:
            writer.close()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    app = House()
    config = uvicorn.Config(app, timeout_keep_alive=60)
    config.load()
    loop = asyncio.get_running_loop()
    state = ServerState()
    server = await loop.create_server(lambda: Hasty(config, state, {}, loop), "127.0.0.1", 0)
    app.port = server.sockets[0].getsockname()[1]
    yield app
    server.close()
    for connection in list(state.connections):
        connection.transport.abort()
    await asyncio.sleep(0)


async def test_connection_that_says_nothing_is_closed(house: House) -> None:
    assert await house.call() == b""


async def test_head_that_comes_a_letter_at_a_time_is_not_waited_for(house: House) -> None:
    letters = [b"%c" % letter for letter in b"GET /" + 40 * b"a"]
    assert await house.call(*letters, pause_s=LIMIT_S / 10) == b""
    assert house.received == []


async def test_body_that_stops_is_not_waited_for(house: House) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
    assert await house.call(head, b"half of it") == b""
    assert house.received[-1] == "http.disconnect"


async def test_body_that_goes_on_may_take_its_time(house: House) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 8\r\n\r\n"
    answer = await house.call(head, *(8 * [b"x"]), pause_s=LIMIT_S / 4)
    assert answer.endswith(b"ok")


async def test_answer_that_takes_long_is_waited_for(house: House) -> None:
    answer = await house.call(b"GET /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.endswith(b"ok")


async def test_connection_that_is_kept_between_requests_stays(house: House) -> None:
    first = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answers = await house.call(first, last, pause_s=2 * LIMIT_S)
    assert answers.count(b"ok") == 2


async def test_head_that_never_ends_is_refused(house: House) -> None:
    answer = await house.call(b"GET / HTTP/1.1\r\n", 3000 * b"a", pause_s=0.01)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert house.received == []
