"""Customers: they call as an application does, and write down what was acknowledged to them.

`python -m tests.chaos.customers ORDER JOURNAL`, ORDER being the JSON of an `Order`. On SIGTERM they
end what is under way, or give it up after a while, and leave. An answer that is in the journal as
`whole` was theirs to the last byte.
"""

import asyncio
import contextlib
import random
import signal
import sys
from collections.abc import AsyncGenerator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import aiohttp
import msgspec

from proxy.lifeline import die_with_supervisor
from tests.chaos.journal import Journal
from tests.chaos.script import MODEL, OUTPUT_LIMIT, Script

CHAT = "/v1/chat/completions"
NANOS_PER_CREDIT = 1_000_000
_TIMEOUT_S = 60
_LEAVE_S = 20
_DONE = b"data: [DONE]\n\n"

Kind = Literal["chat", "stream", "plain_stream", "keyed", "byok", "aborted", "long", "failing"]
# How often each comes, in percent.
_KINDS: dict[Kind, int] = {
    "chat": 28,
    "stream": 20,
    "plain_stream": 8,
    "keyed": 14,
    "byok": 8,
    "aborted": 10,
    "failing": 12,
}
# How often a keyed request comes again until it is answered.
_TRIES = 40


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the customers of a round do."""

    urls: list[str]
    keys: list[str]
    seed: int
    # As many requests are under way at once, at most.
    customers: int
    # The mean pause of a customer between two requests.
    pause_ms: float
    name: str
    # How providers fail. The real LiteLLM takes a stream that was cut for a whole one.
    failures: list[Literal["error", "cut"]]
    # How many of the customers begin with a stream that outlives its hold's time.
    long: float = 0.15


class Customer:
    """One of them: one request after another, to whichever replica."""

    def __init__(
        self, number: int, order: Order, journal: Journal, session: aiohttp.ClientSession
    ) -> None:
        self._random = random.Random(f"{order.seed}/{order.name}/{number}")
        self._name = f"{order.name}-{number}"
        self._order = order
        self._journal = journal
        self._session = session
        self._sent = 0

    async def live(self, leaving: asyncio.Event) -> None:
        """Go on until it is time to leave."""
        while not leaving.is_set():
            kind = self._random.choices(list(_KINDS), list(_KINDS.values()))[0]
            if self._sent == 0 and self._random.random() < self._order.long:
                kind = "long"
            self._sent += 1
            script = self._script(kind)
            key = self._random.choice(self._order.keys)
            if kind == "keyed":
                is_answered = await self._insist(script, key, leaving)
            else:
                is_answered = await self._call(kind, script, key)
            pause_ms = self._random.expovariate(1 / self._order.pause_ms)
            # Whoever is refused does not come again at once.
            await asyncio.sleep(pause_ms / 1000 + (0 if is_answered else 0.25))

    def _script(self, kind: Kind) -> Script:
        draw = self._random
        is_long = kind == "long"
        return Script(
            nonce=f"{self._name}-{self._sent}",
            tokens=draw.randint(1, OUTPUT_LIMIT),
            wait_ms=draw.choice([0, 5, 20, 60, 300, 800]),
            events=draw.randint(27, 32) if is_long else draw.randint(1, 8),
            gap_ms=200 if is_long else draw.choice([0, 5, 20, 100]),
            failure=draw.choice(self._order.failures) if kind == "failing" else "",
        )

    async def _insist(self, script: Script, key: str, leaving: asyncio.Event) -> bool:
        """Send with an Idempotency-Key, again and again until it is answered."""
        is_stream = self._random.random() < 0.5
        for _ in range(_TRIES):
            if await self._call("keyed", script, key, is_stream=is_stream):
                return True
            if leaving.is_set():
                break
            await asyncio.sleep(0.25)
        return False

    async def _call(
        self, kind: Kind, script: Script, key: str, *, is_stream: bool | None = None
    ) -> bool:
        """Send one request and write down what came of it; returns whether it was answered."""
        if is_stream is None:
            is_stream = kind in {"stream", "plain_stream", "aborted", "long"} or (
                kind in {"failing", "byok"} and self._random.random() < 0.5
            )
        told = Told(kind, script.nonce)
        headers = {"authorization": f"Bearer {key}"}
        if kind == "keyed":
            headers["idempotency-key"] = script.nonce
        elif kind == "byok":
            headers["x-provider-key"] = "key-of-the-customer"
        url = self._random.choice(self._order.urls) + CHAT
        body = _body(script, is_stream=is_stream, asks_usage=kind != "plain_stream")
        try:
            async with self._session.post(url, data=body, headers=headers) as answer:
                told.status = answer.status
                told.request_id = answer.headers.get("x-request-id")
                told.replay_of = answer.headers.get("x-tallygate-replay-of")
                if answer.status != 200:
                    await answer.read()
                elif is_stream:
                    await self._listen(answer, told, aborts=kind == "aborted")
                else:
                    await answer.read()
                    told.is_whole = True
                    told.read_header(answer.headers.get("x-tallygate-charge-credits"))
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            told.error = type(error).__name__
        except asyncio.CancelledError:
            told.error = "left"
            raise
        finally:
            told.write(self._journal)
        return told.is_whole

    async def _listen(self, answer: aiohttp.ClientResponse, told: "Told", *, aborts: bool) -> None:
        """Read a stream to its end, or hang up in its middle."""
        tail = b""
        patience = self._random.randint(0, 3) if aborts else None
        async for part in answer.content.iter_any():
            tail = (tail + part)[-4096:]
            if patience == 0:
                told.error = "aborted"
                answer.close()
                return
            if patience is not None:
                patience -= 1
        told.is_whole = tail.endswith(_DONE)
        told.read_events(tail)


def _body(script: Script, *, is_stream: bool, asks_usage: bool) -> bytes:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": msgspec.json.encode(script).decode()}],
        "max_tokens": OUTPUT_LIMIT,
    }
    if is_stream:
        body["stream"] = True
        if asks_usage:
            body["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(body)


class Told:
    """What a customer was told of one request."""

    def __init__(self, kind: Kind, nonce: str) -> None:
        self._kind = kind
        self._nonce = nonce
        self.status: int | None = None
        self.request_id: str | None = None
        self.replay_of: str | None = None
        self.charge: int | None = None
        self.is_whole = False
        self.error: str | None = None

    def read_header(self, text: str | None) -> None:
        """Read the charge of an answer that is no stream, in credits."""
        if text is not None:
            self.charge = int(Decimal(text) * NANOS_PER_CREDIT)

    def read_events(self, tail: bytes) -> None:
        """Read the charge in a stream's usage, in US dollars."""
        for line in tail.split(b"\n"):
            if line.startswith(b"data: {") and b'"usage":{' in line:
                usage = msgspec.json.decode(line[6:])["usage"]
                if usage.get("cost") is not None:
                    self.charge = int(Decimal(str(usage["cost"])).scaleb(9))

    def write(self, journal: Journal) -> None:
        """Put it on record."""
        journal.write(
            kind=self._kind,
            nonce=self._nonce,
            status=self.status,
            id=self.request_id,
            replay_of=self.replay_of,
            charge=self.charge,
            whole=self.is_whole,
            error=self.error,
        )


@contextlib.asynccontextmanager
async def _session(customers: int) -> AsyncGenerator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=2 * customers)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield session


async def main(order: Order, journal: Journal) -> None:
    """Live until SIGTERM."""
    die_with_supervisor()
    leaving = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.set)
    async with _session(order.customers) as session:
        lives = [
            asyncio.create_task(Customer(number, order, journal, session).live(leaving))
            for number in range(order.customers)
        ]
        await leaving.wait()
        _, late = await asyncio.wait(lives, timeout=_LEAVE_S)
        for life in late:
            life.cancel()
        await asyncio.wait(lives)
        for life in lives:
            if not life.cancelled():
                life.result()  # a defect of theirs must not go unseen


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Order), Journal(Path(sys.argv[2]))))
