"""Durable before done: a settlement is in PostgreSQL, or on this machine's disk, when it returns.

Settlements are batched like authorizations. Where PostgreSQL is away the batch goes to the spool
and the answer to the customer may go on; the spool is replayed as soon as PostgreSQL is back, and
at start. Every settlement is idempotent, so what was sent twice counts once.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import psycopg

from proxy.batcher import Batcher
from proxy.db import CONNECTION_ERRORS, Session
from proxy.errors import MeteringUnavailableError
from proxy.ledger import Settled, Settlement, settle_batch
from proxy.metrics import (
    MARGIN_USD,
    OVERDRAFT_USD,
    PROVIDER_COST_USD,
    REVIEWS,
    SETTLEMENTS,
    SETTLEMENTS_REJECTED,
    SETTLEMENTS_SPOOLED,
    SOLD_CREDITS,
    SOLD_USD,
)
from proxy.spool import Spool, SpoolFile

log = logging.getLogger(__name__)

_DONE_NOW = frozenset({"captured", "captured_late", "voided", "amended"})
_REPLAY_BATCH = 256
# While PostgreSQL is known to be away, batches go straight to the spool for this long.
_BACK_OFF_S = 0.5
# How long a settlement is tried where neither PostgreSQL nor the disk takes it.
_LAST_RESORT_S = 30.0


class _Item(NamedTuple):
    settlement: Settlement
    payload: bytes


class Settler:
    """Settles, over one lane for each session."""

    def __init__(
        self, sessions: Sequence[Session], replay: Session, spool: Spool, *, nanos_per_credit: int
    ) -> None:
        self._spool = spool
        self._replay_session = replay
        self._nanos_per_credit = nanos_per_credit
        self._away_until = 0.0
        self._batcher = Batcher[_Item, Settled](
            "settle", [self._lane(session) for session in sessions]
        )

    async def settle(self, settlement: Settlement) -> Settled:
        """Make the settlement durable; outcome `spooled` means on disk, still to be posted.

        Raises MeteringUnavailableError if neither PostgreSQL nor the disk takes it: the answer
        must not be completed then, and the hold is left to the sweeper.
        """
        return await self.submit(settlement)

    def submit(self, settlement: Settlement) -> asyncio.Future[Settled]:
        """Begin to settle; for those who can't wait, such as a request that is being cancelled."""
        return self._batcher.submit(_Item(settlement, msgspec.json.encode(settlement)))

    def _lane(self, session: Session):  # noqa: ANN202 - a closure over one connection
        async def flush(batch: Sequence[_Item]) -> Sequence[Settled]:
            return await self._flush(session, batch)

        return flush

    async def _flush(self, session: Session, batch: Sequence[_Item]) -> Sequence[Settled]:
        deadline = time.monotonic() + _LAST_RESORT_S
        while True:
            if time.monotonic() >= self._away_until:
                try:
                    return await self._post(session, batch)
                except CONNECTION_ERRORS as error:
                    self._away_until = time.monotonic() + _BACK_OFF_S
                    log.warning("settle failed, spooling", extra={"error": type(error).__name__})
            try:
                await asyncio.to_thread(self._spool.append, [item.payload for item in batch])
            except OSError as error:
                log.critical("neither ledger nor spool", extra={"error": str(error)})
                if time.monotonic() >= deadline:
                    msg = "The settlement could not be made durable."
                    raise MeteringUnavailableError(msg) from error
                await asyncio.sleep(_BACK_OFF_S)
                continue
            SETTLEMENTS_SPOOLED.inc(len(batch))
            return [Settled("spooled", 0)] * len(batch)

    async def _post(self, session: Session, batch: Sequence[_Item]) -> Sequence[Settled]:
        """Send a batch, once more after a lost connection; set aside what the database refuses."""
        payloads = [item.payload for item in batch]
        try:
            try:
                results = await settle_batch(session, payloads)
            except CONNECTION_ERRORS:
                results = await settle_batch(session, payloads)
        except CONNECTION_ERRORS:
            raise
        except psycopg.Error as error:
            if len(batch) > 1:
                return [done for item in batch for done in await self._post(session, [item])]
            await self._set_aside(batch[0], str(error))
            return [Settled("rejected", 0)]
        for item, settled in zip(batch, results, strict=True):
            if settled.outcome == "unknown" and item.settlement.action == "capture":
                # The ledger was restored to before the hold: the charge must not be forgotten.
                await self._set_aside(item, "the ledger knows no such hold")
        self.observe([item.settlement for item in batch], results)
        return results

    async def _set_aside(self, item: _Item, reason: str) -> None:
        """Keep a settlement that the ledger does not take for a human."""
        try:
            await asyncio.to_thread(self._spool.set_aside, item.payload)
        except OSError as error:
            # Neither here nor there: as long as it is nowhere, its answer is not complete.
            raise psycopg.OperationalError(str(error)) from error
        SETTLEMENTS_REJECTED.inc()
        log.critical(
            "settlement rejected",
            extra={"request_id": item.settlement.request_id, "error": reason},
        )

    def observe(self, settlements: Sequence[Settlement], results: Sequence[Settled]) -> None:
        """Count a batch: sums first, because each touch of a shared metric costs microseconds."""
        price_nanos = cost_picos = overdraft_nanos = 0
        outcomes = Counter(settled.outcome for settled in results)
        for settlement, settled in zip(settlements, results, strict=True):
            if settled.outcome not in _DONE_NOW:
                continue  # repeated: counted when it was done
            overdraft_nanos += settled.overdraft_nanos
            price_nanos += settlement.price or 0
            if settlement.status != "byok":
                cost_picos += settlement.cost_picos or 0
            reason = "overdraft" if settled.overdraft_nanos else settlement.review_reason
            if reason is not None:
                REVIEWS.labels(reason).inc()
        for outcome, count in outcomes.items():
            SETTLEMENTS.labels(outcome).inc(count)
        SOLD_USD.inc(price_nanos / 1e9)
        SOLD_CREDITS.inc(price_nanos / self._nanos_per_credit)
        PROVIDER_COST_USD.inc(cost_picos / 1e12)
        MARGIN_USD.inc(price_nanos / 1e9 - cost_picos / 1e12)
        if overdraft_nanos:
            OVERDRAFT_USD.inc(overdraft_nanos / 1e9)

    async def replay(self) -> int:
        """Post what is in the spool; returns how many settlements that were.

        Raises one of CONNECTION_ERRORS where PostgreSQL is still away; nothing is lost then.
        """
        replayed = 0
        files = await asyncio.to_thread(self._spool.take)
        while files:
            try:
                replayed += await self._replay_file(files[0])
            except BaseException:
                for file in files:
                    file.release()
                raise
            files.pop(0).remove()
        return replayed

    async def _replay_file(self, file: SpoolFile) -> int:
        payloads = await asyncio.to_thread(file.payloads)
        for start in range(0, len(payloads), _REPLAY_BATCH):
            # Decoded by the batch: where PostgreSQL is still away, only the first of many is.
            items = [
                _Item(msgspec.json.decode(payload, type=Settlement), payload)
                for payload in payloads[start : start + _REPLAY_BATCH]
            ]
            await self._post(self._replay_session, items)
        return len(payloads)

    async def run(self, *, interval_s: float = 1.0) -> None:
        """Replay at start and whenever there is something, until cancelled."""
        while True:
            try:
                replayed = await self.replay()
                if replayed:
                    log.info("spool replayed", extra={"settlements": replayed})
            except CONNECTION_ERRORS:
                log.warning("spool waits for PostgreSQL")
            await asyncio.sleep(interval_s)

    async def drain(self) -> None:
        """Wait until everything that was submitted is durable, then close."""
        await self._batcher.drain()
        await self._replay_session.close()
        self._spool.close()
