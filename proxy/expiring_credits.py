"""Credits that expire: granted, shown, taken back when their time is over, and given each month.

What is spent is taken from those that expire first. That is reckoned when somebody looks, and not
while requests are settled: see `expiring_credits_left` of `schema.sql`.
"""

import asyncio
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import msgspec

from proxy.db import CONNECTION_ERRORS, Pool
from proxy.ledger import Balance, Funded

log = logging.getLogger(__name__)

_LIMIT = 100
# Accounts are made and changed with their credits of the month at once; a walk over all of them
# finds the one whose service died in between, and the one that was suspended on the first.
_WALK_EVERY_S = 3600


@dataclass(frozen=True, slots=True)
class Expiring:
    """Part of a balance in nano-USD, and when it is gone."""

    nanos: int
    expires_at: datetime


class ExpiringCredits:
    """Calls the functions of `schema.sql`. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def grant(
        self,
        account_id: UUID,
        entry_id: UUID,
        *,
        amount_nanos: int,
        source: str,
        external_id: str,
        reason: str,
        actor: str,
        expires_at: datetime,
    ) -> Funded:
        """Grant credits that expire, once for each (source, external_id)."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT outcome, entry_id, posted, reserved, credit_limit"
                " FROM fund_expiring(%s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    account_id,
                    entry_id,
                    amount_nanos,
                    source,
                    external_id,
                    reason,
                    actor,
                    expires_at,
                ),
            )
            row = await cursor.fetchone()
        if row is None or row[2] is None:
            return Funded("unknown_account", None, None)
        return Funded(row[0], row[1], Balance(row[2], row[3], row[4]))

    async def balance(self, account_id: UUID) -> tuple[Balance, list[Expiring]] | None:
        """Read a balance with what of it expires, the first first; None without such an account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT b.posted, b.reserved, b.credit_limit, l.nanos, l.expires_at"
                " FROM balances AS b LEFT JOIN LATERAL ("
                "SELECT e.expires_at, sum(e.remaining)::bigint AS nanos"
                " FROM expiring_credits_left(b.account_id) AS e"
                " WHERE e.remaining > 0 GROUP BY e.expires_at) AS l ON true"
                " WHERE b.account_id = %s ORDER BY l.expires_at",
                (account_id,),
            )
            rows = await cursor.fetchall()
        if not rows:
            return None
        expiring = [Expiring(row[3], row[4]) for row in rows if row[3] is not None]
        return Balance(*rows[0][:3]), expiring

    async def expire(self, *, limit: int) -> int:
        """Take back credits whose time is over; returns how many grants were looked at."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT expire_credits(%s)", (limit,))
            row = await cursor.fetchone()
        return 0 if row is None else row[0]

    async def grant_month(self, account_id: UUID, monthly_nanos: Mapping[str, int]) -> None:
        """Give an account what it has not got yet of this month's credits of its tier."""
        async with self._pool.connection() as connection:
            await connection.execute(
                "SELECT grant_month(%s, %s)",
                (account_id, msgspec.json.encode(monthly_nanos).decode()),
            )

    async def grant_months(
        self, monthly_nanos: Mapping[str, int], *, limit: int, interval_s: int
    ) -> bool:
        """Do so for the next accounts, if it is time; returns whether there are more to do now."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT grant_monthly_credits(%s, %s, %s)",
                (msgspec.json.encode(monthly_nanos).decode(), limit, interval_s),
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])


class CreditSweeper:
    """Expires credits and gives those of the month, at random times as the sweeper of holds."""

    def __init__(
        self, credits_: ExpiringCredits, monthly_nanos: Mapping[str, int], *, interval_s: float
    ) -> None:
        self._credits = credits_
        self._monthly_nanos = dict(monthly_nanos)
        self._interval_s = interval_s

    async def sweep(self) -> None:
        """Do everything that is due."""
        while await self._credits.expire(limit=_LIMIT) == _LIMIT:
            pass
        while await self._credits.grant_months(
            self._monthly_nanos, limit=_LIMIT, interval_s=_WALK_EVERY_S
        ):
            pass

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except CONNECTION_ERRORS as error:
                log.warning("credits not swept", extra={"error": type(error).__name__})
            await asyncio.sleep(self._interval_s * random.uniform(0.5, 1.5))  # noqa: S311
