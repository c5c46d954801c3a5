"""Requests through the service's own ledger, as a worker has it: holds, then captures."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from proxy.db import Session, make_pool
from proxy.ids import uuid7
from proxy.ledger import HoldRequest, Ledger, Settlement
from proxy.settlement import Settler
from proxy.spool import Spool
from tests.growth.cpu import Cpu

PRICE = 12_345_678
_VERSION = 2


@dataclass(slots=True)
class Round:
    """What one stretch of traffic did."""

    seconds: float = 0.0
    requests: int = 0
    # Of each admission, in milliseconds.
    admissions_ms: list[float] = field(default_factory=list[float])
    settlements_ms: list[float] = field(default_factory=list[float])
    # Of the processors, for all of them.
    server_s: float = 0.0
    own_s: float = 0.0

    @property
    def per_second(self) -> float:
        """How many requests were admitted and settled in a second."""
        return self.requests / self.seconds


class Traffic:
    """So many requests in flight at any time, spread over accounts."""

    def __init__(
        self, url: str, spool: Path, keys: list[tuple[UUID, UUID]], *, in_flight: int
    ) -> None:
        self._url = url
        self._spool = spool
        self._keys = keys
        self._in_flight = in_flight
        self._random = random.Random(1)

    async def run(self, seconds: float) -> Round:
        """Keep going for that long, then end what was begun."""
        done = Round()
        async with make_pool(self._url, max_size=1) as pool:
            ledger = Ledger(self._url, pool)
            settler = Settler(
                ledger.settle_sessions,
                Session(self._url, timeout_s=30),
                Spool(self._spool),
                nanos_per_credit=1_000_000,
            )
            # Connections are opened, and plans made, before the clock runs.
            await self._requests(ledger, settler, Round(), time.perf_counter() + 0.5)
            cpu = Cpu(self._url)
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for _ in range(self._in_flight):
                    group.create_task(self._requests(ledger, settler, done, began + seconds))
            done.seconds = time.perf_counter() - began
            done.server_s, done.own_s = cpu.taken_s()
            await settler.drain()
            await ledger.close()
        return done

    async def _requests(self, ledger: Ledger, settler: Settler, done: Round, until: float) -> None:
        while time.perf_counter() < until:
            account_id, key_id = self._random.choice(self._keys)
            request = HoldRequest(
                account_id=account_id,
                request_id=uuid7(),
                key_id=key_id,
                version=_VERSION,
                amount=2 * PRICE,
                tokens=1000,
                ttl_s=900,
                endpoint="chat.completions",
                model="model-1",
                tier="default",
                streamed=False,
                byok=False,
                price_version=1,
            )
            began = time.perf_counter()
            answer = await ledger.authorize(request)
            held = time.perf_counter()
            assert answer.outcome == "held", answer
            settled = await settler.settle(_settlement(request))
            done.settlements_ms.append((time.perf_counter() - held) * 1000)
            done.admissions_ms.append((held - began) * 1000)
            assert settled.outcome == "captured", settled
            done.requests += 1


def _settlement(request: HoldRequest) -> Settlement:
    return Settlement(
        account_id=request.account_id,
        request_id=request.request_id,
        action="capture",
        status="billed",
        price=PRICE,
        model_answered="model-1-2026",
        input_tokens=500,
        output_tokens=200,
        cost_picos=PRICE * 500,
        cost_source="header",
        rounding_attos=0,
        rule="default",
        markup_ppm=2_000_000,
        upstream_status=200,
        rated_picos=PRICE * 500,
    )
