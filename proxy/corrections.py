"""What operators correct: refunds, reversals and credit limits, each by a function of schema.sql.

Raises psycopg's errors where the database is away; all of it is safe to repeat.
"""

from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import dict_row

from proxy.db import Pool
from proxy.ids import uuid7
from proxy.ledger import Balance


@dataclass(frozen=True, slots=True)
class Corrected:
    """What came of it, as documented at the function; nano-USD, and the balance after it.

    `refunded` is what was refunded of the request in all, None where it is about none.
    """

    outcome: str
    balance: Balance
    entry_id: UUID | None = None
    amount: int | None = None
    refunded: int | None = None

    @property
    def is_done(self) -> bool:
        """Whether it stands, now or since before."""
        return self.outcome in {"posted", "set", "exists"}


class Corrections:
    """Corrects, over the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def refund(
        self,
        account_id: UUID,
        *,
        request_id: UUID | None,
        amount_nanos: int | None,
        reference: str,
        reason: str,
        actor: str,
    ) -> Corrected:
        """Give back what a request was sold for; None for the amount is all that is left of it."""
        row = await self._call(
            "SELECT outcome, entry_id, amount, refunded, posted, reserved, credit_limit"
            " FROM refund(%s, %s, %s, %s, %s, %s, %s)",
            (account_id, uuid7(), request_id, amount_nanos, reference, reason, actor),
        )
        return Corrected(
            row["outcome"],
            _balance(row),
            row["entry_id"],
            row["amount"],
            None if request_id is None else row["refunded"],
        )

    async def reverse(
        self, account_id: UUID, entry_id: UUID, *, reference: str, reason: str, actor: str
    ) -> Corrected:
        """Take back a deposit, grant, refund or adjustment."""
        row = await self._call(
            "SELECT outcome, entry_id, amount, posted, reserved, credit_limit"
            " FROM reverse_funding(%s, %s, %s, %s, %s, %s)",
            (account_id, uuid7(), entry_id, reference, reason, actor),
        )
        return Corrected(row["outcome"], _balance(row), row["entry_id"], row["amount"])

    async def set_credit_limit(
        self, account_id: UUID, limit_nanos: int, *, reason: str, actor: str
    ) -> Corrected:
        """Say how far an account may go below zero."""
        row = await self._call(
            "SELECT outcome, posted, reserved, credit_limit"
            " FROM set_credit_limit(%s, %s, %s, %s, %s)",
            (account_id, limit_nanos, reason, uuid7(), actor),
        )
        return Corrected(row["outcome"], _balance(row))

    async def _call(self, query: LiteralString, parameters: tuple[object, ...]) -> dict[str, Any]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            (row,) = await cursor.fetchall()
            return row


def _balance(row: dict[str, Any]) -> Balance:
    return Balance(row["posted"], row["reserved"], row["credit_limit"])
