"""Reads of usage, ledger and operations; nothing here writes."""

from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import dict_row

from proxy.db import Pool

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Operations:
    """What a scrape reads from the database: amounts in nano-USD, ages in seconds."""

    holds_open: int
    reserved_nanos: int
    reviews_open: int
    review_oldest_s: float
    rows_without_partition: int


class Reports:
    """Queries over the pool; lists are newest first and go on below a cursor."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def usage(self, account_id: UUID, *, before: UUID | None, limit: int) -> list[Row]:
        """Read an account's requests, those that are pending among them."""
        return await self._rows(
            "SELECT * FROM usage_history WHERE account_id = %(account_id)s"
            " AND (%(before)s::uuid IS NULL OR request_id < %(before)s)"
            " ORDER BY request_id DESC LIMIT %(limit)s",
            account_id=account_id,
            before=before,
            limit=limit,
        )

    async def entries(self, account_id: UUID, *, before: int | None, limit: int) -> list[Row]:
        """Read an account's ledger entries."""
        return await self._rows(
            "SELECT * FROM entries WHERE account_id = %(account_id)s"
            " AND (%(before)s::bigint IS NULL OR seq < %(before)s)"
            " ORDER BY seq DESC LIMIT %(limit)s",
            account_id=account_id,
            before=before,
            limit=limit,
        )

    async def reviews(self, *, before: UUID | None, limit: int) -> list[Row]:
        """Read the requests of all accounts that wait for a decision."""
        return await self._rows(
            "SELECT * FROM usage WHERE review_reason IS NOT NULL AND resolved_at IS NULL"
            " AND (%(before)s::uuid IS NULL OR request_id < %(before)s)"
            " ORDER BY request_id DESC LIMIT %(limit)s",
            before=before,
            limit=limit,
        )

    async def price_books(self, *, before: int | None, limit: int) -> list[Row]:
        """Read the versions of the price book."""
        return await self._rows(
            "SELECT * FROM price_books WHERE (%(before)s::integer IS NULL OR version < %(before)s)"
            " ORDER BY version DESC LIMIT %(limit)s",
            before=before,
            limit=limit,
        )

    async def audit_trail(self, *, before: UUID | None, limit: int) -> list[Row]:
        """Read what operators did."""
        return await self._rows(
            "SELECT * FROM audit_trail WHERE (%(before)s::uuid IS NULL OR event_id < %(before)s)"
            " ORDER BY event_id DESC LIMIT %(limit)s",
            before=before,
            limit=limit,
        )

    async def operations(self) -> Operations:
        """Read the gauges of a scrape."""
        (row,) = await self._rows(
            "SELECT"
            " (SELECT count(*) FROM open_holds) AS holds_open,"
            " (SELECT coalesce(sum(amount), 0)::bigint FROM open_holds) AS reserved_nanos,"
            " r.reviews_open, r.review_oldest_s,"
            " (SELECT count(*) FROM entries_default) + (SELECT count(*) FROM usage_default)"
            "  AS rows_without_partition"
            " FROM (SELECT count(*) AS reviews_open,"
            "  coalesce(extract(EPOCH FROM clock_timestamp() - min(created_at)), 0)::float8"
            "  AS review_oldest_s"
            "  FROM usage WHERE review_reason IS NOT NULL AND resolved_at IS NULL) AS r"
        )
        return Operations(**row)

    async def _rows(self, query: LiteralString, **parameters: object) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
