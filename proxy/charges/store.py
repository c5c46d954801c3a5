"""Charges as the database keeps them: see schema.sql.

Every call is safe to repeat, and is sent once more after a lost connection. Where the database is
away all of them raise MeteringUnavailableError.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

import msgspec
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from pricing.price_book import PriceBook, parse_price_book
from proxy.db import CONNECTION_ERRORS, Pool, unavailable
from proxy.ids import uuid7
from proxy.ledger import Settled, Settlement

Row = dict[str, Any]

_LAST_UUID = UUID(int=2**128 - 1)

# A charge with what the ledger says of it; `price` is None until it is captured.
_CHARGE: LiteralString = (
    "SELECT c.account_id, c.request_id, c.action, c.quantity AS asked_quantity,"
    " c.price AS asked_price, c.rounding_attos, c.is_hold, c.operator, c.recurring_id,"
    " c.description, c.metadata, u.key_id, u.status, u.price, u.quantity, u.price_version,"
    " u.created_at, u.settled_at, u.error_code, h.expires_at,"
    " refunded(c.account_id, c.request_id) AS refunded"
    " FROM charges AS c CROSS JOIN LATERAL (SELECT * FROM usage_history AS k"
    " WHERE k.account_id = c.account_id AND k.request_id = c.request_id) AS u"
    " LEFT JOIN open_holds AS h ON c.account_id = h.account_id AND c.request_id = h.request_id"
)


@dataclass(frozen=True, slots=True)
class Begun:
    """What to go on with; `outcome` as documented at begin_charge, the price in nano-USD."""

    outcome: str
    request_id: UUID
    price: int
    rounding_attos: int
    price_version: int


@dataclass(frozen=True, slots=True)
class AccountTerms:
    """What a charge by the account itself needs to know of it."""

    version: int
    tier: str


@dataclass(frozen=True, slots=True)
class BookOfVersion:
    """A version of the price book; `nanos_per_credit` as it was then."""

    book: PriceBook
    nanos_per_credit: int


class ChargeStore:
    """Reads and writes charges, over the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def begin(self, charge: Mapping[str, object]) -> Begun:
        """Note what is asked; `charge` has the columns of `charges`, bytes as hexadecimal text."""
        row = await self._one(
            "SELECT outcome, request_id, price, rounding_attos, price_version"
            " FROM begin_charge(%s, %s)",
            (Jsonb(charge), uuid7()),
        )
        return Begun(**row)

    async def forget(self, account_id: UUID, request_id: UUID, refusal: str) -> None:
        """Forget a charge that has no hold; keeps one that has."""
        await self._one(
            "SELECT forget_charge(%s, %s, %s, %s)", (account_id, request_id, refusal, uuid7())
        )

    async def end(self, settlement: Settlement, *, operator: str | None) -> Settled:
        """End the hold of a charge; an operator's name goes to the audit trail."""
        row = await self._one(
            "SELECT outcome, overdraft FROM end_charge(%s::json, %s, %s)",
            (msgspec.json.encode(settlement).decode(), uuid7(), operator),
        )
        return Settled(row["outcome"], row["overdraft"])

    async def charge(self, account_id: UUID, request_id: UUID) -> Row | None:
        """Read one charge; None where the account has no such."""
        rows = await self._rows(
            _CHARGE + " WHERE c.account_id = %s AND c.request_id = %s", (account_id, request_id)
        )
        return rows[0] if rows else None

    async def charges(self, account_id: UUID, *, before: UUID | None, limit: int) -> list[Row]:
        """Read an account's charges, newest first; cursor: request_id."""
        return await self._rows(
            _CHARGE + " WHERE c.account_id = %s AND c.request_id < %s"
            " ORDER BY c.request_id DESC LIMIT %s",
            (account_id, before or _LAST_UUID, limit),
        )

    async def terms(self, account_id: UUID) -> AccountTerms:
        """Read an account as a charge needs it."""
        row = await self._one(
            "SELECT version, tier FROM accounts WHERE account_id = %s", (account_id,)
        )
        return AccountTerms(**row)

    async def book(self, version: int) -> BookOfVersion:
        """Read a version of the price book."""
        row = await self._one(
            "SELECT document, nanos_per_credit FROM price_books WHERE version = %s", (version,)
        )
        return BookOfVersion(parse_price_book(row["document"]), row["nanos_per_credit"])

    async def _one(self, query: LiteralString, parameters: tuple[object, ...]) -> Row:
        (row,) = await self._rows(query, parameters)
        return row

    async def _rows(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Row]:
        try:
            return await self._ask(query, parameters)
        except CONNECTION_ERRORS:
            pass  # it may have been done: done again, it answers the same
        try:
            return await self._ask(query, parameters)
        except CONNECTION_ERRORS as error:
            raise unavailable() from error

    async def _ask(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
