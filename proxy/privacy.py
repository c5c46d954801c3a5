"""What is known of an account: read whole, as of one moment, or erased."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, dict_row

from proxy.db import CONNECTION_ERRORS, Pool
from proxy.errors import RateLimitError
from proxy.ids import uuid7

log = logging.getLogger(__name__)

Row = dict[str, Any]

# Rows that are in memory at a time.
_PAGE = 500
# Each reads for as long as its client takes, on a connection of the pool that everybody shares.
_AT_ONCE = 2
_ERASED_AT_ONCE = 100
_ERASE_EVERY_S = 3600


class Snapshot:
    """One account, as it was when the snapshot was taken."""

    def __init__(self, connection: AsyncConnection[TupleRow], account_id: UUID) -> None:
        self._connection = connection
        self._account_id = account_id

    async def balance(self) -> Row:
        """The balance: posted, reserved and credit_limit, in nano-USD."""
        async with self._connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute(
                "SELECT posted, reserved, credit_limit FROM balances WHERE account_id = %s",
                (self._account_id,),
            )
            (row,) = await cursor.fetchall()
            return row

    def usage(self) -> AsyncIterator[list[Row]]:
        """Requests in pages, oldest first, those that are pending included."""
        return self._pages("SELECT * FROM usage_history WHERE account_id = %s ORDER BY request_id")

    def entries(self) -> AsyncIterator[list[Row]]:
        """Ledger entries in pages, by their numbers."""
        return self._pages("SELECT * FROM entries WHERE account_id = %s ORDER BY seq")

    def funding(self) -> AsyncIterator[list[Row]]:
        """Deposits, grants and their like in pages."""
        return self._pages(
            "SELECT f.source, f.external_id, f.entry_id, f.kind, f.amount, f.reason, f.actor, f.at,"
            " x.expires_at FROM funding AS f LEFT JOIN expiring_credits AS x"
            " ON f.account_id = x.account_id AND f.entry_id = x.grant_id"
            " WHERE f.account_id = %s ORDER BY f.entry_id"
        )

    def charges(self) -> AsyncIterator[list[Row]]:
        """Metered actions in pages."""
        return self._pages(
            "SELECT request_id, recurring_id, action, quantity, price, description, metadata"
            " FROM charges WHERE account_id = %s ORDER BY request_id"
        )

    def recurring_charges(self) -> AsyncIterator[list[Row]]:
        """What is charged again each period, in pages."""
        return self._pages(
            "SELECT recurring_id, action, quantity, every, starts_at, ends_at, status, created_at,"
            " description, metadata FROM recurring_charges"
            " WHERE account_id = %s ORDER BY recurring_id"
        )

    def audit_trail(self) -> AsyncIterator[list[Row]]:
        """What operators did to the account, in pages."""
        return self._pages(
            "SELECT account_id, event_id, at, actor, action, detail FROM audit_trail"
            " WHERE account_id = %s ORDER BY event_id"
        )

    async def _pages(self, query: LiteralString) -> AsyncIterator[list[Row]]:
        # A cursor of the server's: the rows stay there until they are fetched.
        async with self._connection.cursor(name="pages", row_factory=dict_row) as cursor:
            await cursor.execute(query, (self._account_id,))
            while rows := await cursor.fetchmany(_PAGE):
                yield rows


class Privacy:
    """Exports and erasures, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool, *, stall_timeout_s: float) -> None:
        self._pool = pool
        # A client may be silent for so long between two pages, and PostgreSQL must wait as well.
        self._idle_ms = str(int(stall_timeout_s * 1000) + 30_000)
        self._under_way = 0

    def begin(self) -> None:
        """Take one of the few turns for an export; RateLimitError where there is none."""
        if self._under_way >= _AT_ONCE:
            message = "Other exports are under way. Try again in a minute."
            raise RateLimitError(message, retry_after_s=60)
        self._under_way += 1

    def end(self) -> None:
        """Give a turn back."""
        self._under_way -= 1

    @asynccontextmanager
    async def snapshot(self, account_id: UUID) -> AsyncGenerator[Snapshot]:
        """Read an account as of now, however long that takes and whatever is written meanwhile."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            await connection.execute(
                "SELECT set_config('idle_in_transaction_session_timeout', %s, true)",
                (self._idle_ms,),
            )
            yield Snapshot(connection, account_id)

    async def erase(self, account_id: UUID, *, reason: str, actor: str) -> str:
        """Erase what tells of a person; answers what came of it: see erase_account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT erase_account(%s, %s, %s, %s)", (account_id, uuid7(), actor, reason)
            )
            ((outcome,),) = await cursor.fetchall()
            return outcome

    async def erase_closed(self, *, after_days: int) -> int:
        """Erase accounts that were closed so long ago; returns how many."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT a.account_id FROM accounts AS a"
                " WHERE a.status = 'closed' AND a.erased_at IS NULL AND (SELECT max(t.at)"
                " FROM audit_trail AS t WHERE t.account_id = a.account_id"
                " AND t.action = 'account.close') < clock_timestamp() - make_interval(days => %s)"
                " ORDER BY a.account_id LIMIT %s",
                (after_days, _ERASED_AT_ONCE),
            )
            due = await cursor.fetchall()
        reason = f"closed for {after_days} days"
        outcomes = [await self.erase(row[0], reason=reason, actor="retention") for row in due]
        return outcomes.count("erased")

    async def run(self, *, after_days: int) -> None:
        """Erase what was closed so long ago, now and then until cancelled; never where it is 0."""
        while after_days:
            try:
                while await self.erase_closed(after_days=after_days) == _ERASED_AT_ONCE:
                    pass
            except CONNECTION_ERRORS as error:
                log.warning("nothing erased", extra={"error": type(error).__name__})
            await asyncio.sleep(_ERASE_EVERY_S * random.uniform(0.5, 1.5))  # noqa: S311
        await asyncio.Event().wait()

    async def erased_at(self, account_id: UUID) -> datetime:
        """When an account was erased that was."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT erased_at FROM accounts WHERE account_id = %s", (account_id,)
            )
            ((erased_at,),) = await cursor.fetchall()
            return erased_at
