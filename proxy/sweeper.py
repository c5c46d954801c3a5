"""Time and holds: live requests get more of it, dead ones are given up.

A hold whose proxy died would keep its money for ever. The sweeper expires it: the customer is not
charged, and the usage row asks for review. A request that lives longer than its hold's time has
that extended by the heartbeat of the process that relays it.
"""

import asyncio
import logging
import random
import time
from uuid import UUID

from proxy.db import CONNECTION_ERRORS
from proxy.ledger import Ledger
from proxy.metrics import HOLDS_EXPIRED, REVIEWS
from proxy.replays import IdempotencyStore

log = logging.getLogger(__name__)

_SWEEP_LIMIT = 200
_PURGE_LIMIT = 1000
_PARTITIONS_EVERY_S = 6 * 3600


class Sweeper:
    """Expires overdue holds, at random times so that replicas don't come all at once."""

    def __init__(
        self,
        ledger: Ledger,
        idempotency: IdempotencyStore,
        *,
        interval_s: float,
        grace_s: int,
    ) -> None:
        self._ledger = ledger
        self._idempotency = idempotency
        self._interval_s = interval_s
        self._grace_s = grace_s

    async def sweep(self) -> int:
        """Expire everything that is overdue; returns how many holds that were."""
        total = 0
        while True:
            expired = await self._ledger.expire_holds(limit=_SWEEP_LIMIT, grace_s=self._grace_s)
            total += expired
            if expired < _SWEEP_LIMIT:
                break
        if total:
            HOLDS_EXPIRED.inc(total)
            REVIEWS.labels("orphaned").inc(total)
            log.warning("holds expired", extra={"holds": total})
        return total

    async def run(self) -> None:
        """Sweep, forget old idempotency keys, keep partitions ahead of time; until cancelled."""
        partitions_due = 0.0
        while True:
            try:
                if time.monotonic() >= partitions_due:
                    await self._ledger.ensure_partitions()
                    partitions_due = time.monotonic() + _PARTITIONS_EVERY_S
                # After an outage the spools of all proxies go first: see HoldSettings.
                await asyncio.sleep(self._interval_s * random.uniform(0.5, 1.5))  # noqa: S311
                await self.sweep()
                while await self._idempotency.purge(limit=_PURGE_LIMIT) == _PURGE_LIMIT:
                    pass
            except CONNECTION_ERRORS as error:
                log.warning("sweeper can't reach PostgreSQL", extra={"error": type(error).__name__})
                await asyncio.sleep(1)


class Heartbeat:
    """Extends the holds of the requests that this process is relaying."""

    def __init__(self, ledger: Ledger, *, interval_s: float, ttl_s: int) -> None:
        self._ledger = ledger
        self._interval_s = interval_s
        self._ttl_s = ttl_s
        self._live: dict[UUID, tuple[UUID, float]] = {}

    def add(self, account_id: UUID, request_id: UUID) -> None:
        """Keep this request's hold alive until it is removed."""
        self._live[request_id] = (account_id, time.monotonic())

    def remove(self, request_id: UUID) -> None:
        """The request has ended."""
        self._live.pop(request_id, None)

    async def beat(self) -> int:
        """Extend holds at least one interval old; returns how many. Younger ones have time."""
        oldest = time.monotonic() - self._interval_s
        holds = [
            (account_id, request_id)
            for request_id, (account_id, since) in self._live.items()
            if since <= oldest
        ]
        if holds:
            await self._ledger.extend_holds(holds, self._ttl_s)
        return len(holds)

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.beat()
            except CONNECTION_ERRORS as error:
                log.warning("heartbeat missed", extra={"error": type(error).__name__})
