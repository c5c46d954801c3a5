"""Comments in silent streams: when they come, and that they never come into another's words."""

import asyncio
from collections.abc import Callable

import pytest

from proxy.call import Call
from proxy.exchange import Message
from proxy.keepalive import KeepAlive
from tests.support.admitted import Client, make_call

pytestmark = pytest.mark.anyio

INTERVAL_S = 0.01


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go on until something has happened."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - it is the loop that is waited for
            await asyncio.sleep(0)


async def while_running(*calls: Call, condition: Callable[[], bool]) -> KeepAlive:
    """Keep these alive until something has happened."""
    keep_alive = KeepAlive(INTERVAL_S)
    for call in calls:
        keep_alive.add(call)
    task = asyncio.create_task(keep_alive.run())
    await until(condition)
    task.cancel()
    return keep_alive


async def test_silence_before_the_first_byte_is_opened_and_filled() -> None:
    client = Client()
    call = make_call(client)
    await while_running(call, condition=lambda: len(client.sent) >= 3)
    call.exchange.stop_watching()
    assert client.types()[:3] == ["start", "body", "body"]
    headers = dict(client.sent[0]["headers"])
    assert client.sent[0]["status"] == 200
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert (headers[b"x-accel-buffering"], headers[b"cache-control"]) == (b"no", b"no-cache")
    assert headers[b"x-ratelimit-limit-requests"] == b"10"
    assert client.body().startswith(b": tallygate is waiting for the model\n\n" * 2)


async def test_stream_that_speaks_is_not_interrupted() -> None:
    client, silent = Client(), Client()
    call, other = make_call(client), make_call(silent)
    loop = asyncio.get_running_loop()
    keep_alive = KeepAlive(INTERVAL_S)
    for each in (call, other):
        keep_alive.add(each)
    # As if it went on speaking all the time.
    call.exchange.sent_at = loop.time() + 1000
    task = asyncio.create_task(keep_alive.run())
    await until(lambda: len(silent.sent) >= 3)
    task.cancel()
    other.exchange.stop_watching()
    assert client.sent == []


async def test_client_that_has_gone_is_not_spoken_to() -> None:
    client, silent = Client(), Client()
    call, other = make_call(client), make_call(silent)
    call.exchange.is_gone = True
    await while_running(call, other, condition=lambda: len(silent.sent) >= 3)
    other.exchange.stop_watching()
    assert client.sent == []


async def test_stream_that_ends_in_the_same_moment_gets_no_comment() -> None:
    class Removing(Client):
        """Ends the other's stream when its own comment comes."""

        async def send(self, message: Message) -> None:
            await super().send(message)
            for call in calls:
                if call.exchange is not mine[id(self)]:
                    keep_alive.remove(call)

    clients = [Removing(), Removing()]
    calls = [make_call(client) for client in clients]
    mine = {id(client): call.exchange for client, call in zip(clients, calls, strict=True)}
    keep_alive = KeepAlive(INTERVAL_S)
    for call in calls:
        keep_alive.add(call)
    task = asyncio.create_task(keep_alive.run())
    await until(lambda: max(len(client.sent) for client in clients) >= 3)
    task.cancel()
    for call in calls:
        call.exchange.stop_watching()
    assert min(len(client.sent) for client in clients) == 0


async def test_client_that_takes_nothing_does_not_keep_the_others_waiting() -> None:
    class Stuck(Client):
        async def send(self, message: Message) -> None:
            await super().send(message)
            await asyncio.Event().wait()

    stuck, other = Stuck(), Client()
    calls = [make_call(stuck), make_call(other)]
    keep_alive = await while_running(*calls, condition=lambda: len(other.sent) >= 4)
    for call in calls:
        keep_alive.remove(call)
        call.exchange.stop_watching()
    assert len(stuck.sent) >= 1
