"""Settlements that the ledger did not take, and what becomes of them once a human has looked.

There are two kinds. One the database refused, a defect: mended, it is posted like any other. One
found no hold, because the ledger was restored to a moment before it: the answer was delivered all
the same, so it gets an empty hold, which takes nothing and so is never refused for money, and is
charged by hand at the price that it had. What is not there is overdraft, as with every charge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec
import psycopg

from proxy.db import CONNECTION_ERRORS, Pool, Session
from proxy.ledger import HoldRequest, Ledger, Settlement, settle_batch
from proxy.reports import Reports
from proxy.reviews import Decision, Reviews
from proxy.spool import Spool

# Why such a request is in the review queue, for the moment until it is charged.
REASON = "hold_missing"
# A settlement does not say what was asked for, only what answered.
_UNKNOWN = "unknown"
_HOLD_TTL_S = 900

_DONE = frozenset(
    {
        "captured", "captured_late", "voided", "amended", "already_captured", "already_expired",
        "charged",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Aside:
    """A settlement that was set aside, and the line that keeps it."""

    settlement: Settlement
    payload: bytes


@dataclass(frozen=True, slots=True)
class Posted:
    """What came of one; `is_done` where it is in the ledger and its line is gone.

    Outcomes are those of settle_batch and authorize_batch, and `charged`: without its hold;
    `refused`: the database takes it as little as before; `no_key`: its account is not there, or
    has no key that works.
    """

    settlement: Settlement
    outcome: str
    detail: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be done."""
        return self.outcome in _DONE


def read_aside(spool: Spool) -> list[Aside]:
    """Read what was set aside, oldest first."""
    return [
        Aside(msgspec.json.decode(payload, type=Settlement), payload)
        for payload in spool.rejected_payloads()
    ]


class SetAside:
    """Posts what was set aside. Raises one of CONNECTION_ERRORS where the database is away."""

    def __init__(self, spool: Spool, session: Session, pool: Pool, ledger: Ledger) -> None:
        self._spool = spool
        self._session = session
        self._pool = pool
        self._ledger = ledger
        self._reports = Reports(pool)
        self._reviews = Reviews(pool, self._reports)

    async def post(self, items: Sequence[Aside], *, actor: str) -> list[Posted]:
        """Post them one by one; safe to repeat."""
        posted: list[Posted] = []
        for item in items:
            try:
                outcome = await self._post(item, actor)
                done = Posted(item.settlement, outcome)
            except CONNECTION_ERRORS:
                raise
            except psycopg.Error as error:
                done = Posted(item.settlement, "refused", str(error).partition("\n")[0])
            if done.is_done:
                self._spool.forget_rejected(item.payload)
            posted.append(done)
        return posted

    async def _post(self, item: Aside, actor: str) -> str:
        settlement = item.settlement
        (settled,) = await settle_batch(self._session, [item.payload])
        if settlement.action != "capture" or settlement.price is None:
            return settled.outcome
        if settled.outcome == "already_voided" and await self._is_ours(settlement):
            return await self._charge(settlement, settlement.price, actor)
        if settled.outcome != "unknown":
            return settled.outcome
        refusal = await self._hold(settlement)
        if refusal is not None:
            return refusal
        ended = msgspec.structs.replace(
            settlement,
            action="void",
            status="needs_review",
            price=None,
            rounding_attos=None,
            rule=None,
            markup_ppm=None,
            review_reason=REASON,
        )
        await settle_batch(self._session, [msgspec.json.encode(ended)])
        return await self._charge(settlement, settlement.price, actor)

    async def _is_ours(self, settlement: Settlement) -> bool:
        """Whether a post ended between the hold and the charge."""
        row = await self._reports.usage_row(settlement.account_id, settlement.request_id)
        return row is not None and row["review_reason"] == REASON

    async def _charge(self, settlement: Settlement, price_nanos: int, actor: str) -> str:
        resolved = await self._reviews.resolve(
            settlement.account_id,
            settlement.request_id,
            Decision("charge", price_nanos=price_nanos),
            actor=actor,
            reason="the ledger was restored to before its hold",
        )
        return "charged" if resolved.is_done else resolved.outcome

    async def _hold(self, settlement: Settlement) -> str | None:
        """Place an empty hold; returns why that can't be, None where it stands."""
        key = await self._key(settlement.account_id)
        if key is None:
            return "no_key"
        answer = await self._ledger.authorize(
            HoldRequest(
                account_id=settlement.account_id,
                request_id=settlement.request_id,
                key_id=key["key_id"],
                version=key["version"],
                amount=0,
                tokens=0,
                ttl_s=_HOLD_TTL_S,
                endpoint=_UNKNOWN,
                model=settlement.model_answered or _UNKNOWN,
                tier=key["tier"],
                streamed=False,
                byok=settlement.status == "byok",
                price_version=key["price_version"],
            )
        )
        return None if answer.is_held else answer.outcome

    async def _key(self, account_id: UUID) -> dict[str, Any] | None:
        """Find a key of the account that works, one without limits if there is one."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT k.key_id, a.version + k.version + (SELECT m.value::integer FROM meta AS m"
                " WHERE m.name = 'models_version') AS version, a.tier,"
                " coalesce(price_book_at(clock_timestamp()), 0) AS price_version"
                " FROM virtual_keys AS k INNER JOIN accounts AS a ON k.account_id = a.account_id"
                " WHERE k.account_id = %s AND k.status = 'active'"
                " AND coalesce(k.expires_at > clock_timestamp(), true)"
                " ORDER BY k.is_limited, k.key_id LIMIT 1",
                (account_id,),
            )
            row = await cursor.fetchone()
        names = ("key_id", "version", "tier", "price_version")
        return None if row is None else dict(zip(names, row, strict=True))
