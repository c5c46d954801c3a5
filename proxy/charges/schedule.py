"""Recurring charges as the database keeps them: see schema.sql.

Raises MeteringUnavailableError where the database is away.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, LiteralString
from uuid import UUID

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from proxy.db import CONNECTION_ERRORS, Pool, unavailable
from proxy.ids import uuid7

Row = dict[str, Any]
Change = Literal["pause", "resume", "cancel"]
Outcome = Literal["charged", "again", "later", "refused"]

_LAST_UUID = UUID(int=2**128 - 1)

_RECURRING: LiteralString = (
    "SELECT account_id, recurring_id, action, quantity, every, starts_at, ends_at, operator,"
    " description, metadata, status, period, attempts, problem, skipped, last_charge_id,"
    " created_at, due_at, recurring_period(starts_at, every, period) AS next_at"
    " FROM recurring_charges"
)


@dataclass(frozen=True, slots=True)
class Due:
    """A period that is to be charged, for as long as the lease lasts."""

    account_id: UUID
    recurring_id: UUID
    period: int
    generation: int
    period_at: datetime
    action: str
    quantity: int
    operator: str | None
    description: str | None
    metadata: dict[str, str]


class RecurringStore:
    """Reads and writes recurring charges, over the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(self, recurring: Mapping[str, object], *, actor: str) -> tuple[str, UUID]:
        """Make one; `recurring` has the columns of its table, bytes as hexadecimal text.

        Returns the outcome of create_recurring_charge, and whose id it is about.
        """
        (row,) = await self._rows(
            "SELECT outcome, recurring_id FROM create_recurring_charge(%s, %s, %s)",
            (Jsonb(recurring), uuid7(), actor),
        )
        return row["outcome"], row["recurring_id"]

    async def change(
        self,
        account_id: UUID,
        recurring_id: UUID,
        change: Change,
        *,
        is_operator: bool,
        actor: str,
    ) -> str:
        """Pause, resume or cancel one; returns the outcome of change_recurring_charge."""
        (row,) = await self._rows(
            "SELECT change_recurring_charge(%s, %s, %s, %s, %s, %s) AS outcome",
            (account_id, recurring_id, change, is_operator, uuid7(), actor),
        )
        return row["outcome"]

    async def recurring(self, account_id: UUID, recurring_id: UUID) -> Row | None:
        """Read one; None where the account has no such."""
        rows = await self._rows(
            _RECURRING + " WHERE account_id = %s AND recurring_id = %s",
            (account_id, recurring_id),
        )
        return rows[0] if rows else None

    async def page(self, account_id: UUID, *, before: UUID | None, limit: int) -> list[Row]:
        """Read an account's, newest first; cursor: recurring_id."""
        return await self._rows(
            _RECURRING + " WHERE account_id = %s AND recurring_id < %s"
            " ORDER BY recurring_id DESC LIMIT %s",
            (account_id, before or _LAST_UUID, limit),
        )

    async def claim(self, *, limit: int, lease_s: int, catch_up_s: int) -> list[Due]:
        """Take what is due; nothing while another replica does.

        Raises one of CONNECTION_ERRORS where the database is away, as `finish` does.
        """
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Due)) as cursor,
        ):
            await cursor.execute(
                "SELECT account_id, recurring_id, period, generation, period_at, action, quantity,"
                " operator, description, metadata FROM claim_recurring_charges(%s, %s, %s)",
                (limit, lease_s, catch_up_s),
            )
            return await cursor.fetchall()

    async def finish(
        self,
        due: Due,
        outcome: Outcome,
        *,
        charge_id: UUID | None = None,
        problem: str | None = None,
        retry_s: int = 0,
        attempts: int = 1,
    ) -> None:
        """Say what came of a period; see finish_recurring_charge."""
        async with self._pool.connection() as connection:
            await connection.execute(
                "SELECT finish_recurring_charge(%s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    due.account_id,
                    due.recurring_id,
                    due.period,
                    outcome,
                    charge_id,
                    problem,
                    retry_s,
                    attempts,
                ),
            )

    async def _rows(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Row]:
        try:
            async with (
                self._pool.connection() as connection,
                connection.cursor(row_factory=dict_row) as cursor,
            ):
                await cursor.execute(query, parameters)
                return await cursor.fetchall()
        except CONNECTION_ERRORS as error:
            raise unavailable() from error
