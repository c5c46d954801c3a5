"""Read-only queries on usage, entries, reviews, the audit trail and price books; newest first.

A page begins after a cursor, which is the last key of the page before, so that rows that arrive
meanwhile shift nothing. Amounts are as in `schema.sql`: integers of nano-USD.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, dict_row

from proxy.db import CONNECTION_ERRORS, Pool

Row = dict[str, Any]

# Above every key, for the page that begins at the newest row.
_LAST_UUID = UUID(int=2**128 - 1)
_LAST_INTEGER = 2**63 - 1
_PING_TIMEOUT_S = 2.0
_OPERATIONS_TIMEOUT_S = 5.0

_USAGE: LiteralString = (
    "SELECT account_id, request_id, key_id, created_at, settled_at, endpoint, model,"
    " model_answered, tier, streamed, byok, status, input_tokens, cached_input_tokens,"
    " cache_creation_tokens, cache_creation_1h_tokens, output_tokens, reasoning_tokens,"
    " audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images,"
    " cost_picos, cost_source, price, rounding_attos, rule, markup_ppm, price_version, hold,"
    " overdraft, review_reason, resolved_at, error_code, upstream_status, client_gone,"
    " first_byte_ms, duration_ms FROM usage_history"
)


@dataclass(frozen=True, slots=True)
class Operations:
    """The state of the ledger as a whole; nano-USD and seconds."""

    open_holds: int
    reserved_nanos: int
    reviews: int
    oldest_review_s: float
    # Rows that fit no month's partition, counted up to 10,000.
    misplaced_rows: int


class Reports:
    """Reads, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def usage(self, account_id: UUID, *, before: UUID | None, limit: int) -> list[Row]:
        """Read an account's requests, those that are pending included; cursor: request_id."""
        return await self._rows(
            _USAGE + " WHERE account_id = %s AND request_id < %s ORDER BY request_id DESC LIMIT %s",
            (account_id, before or _LAST_UUID, limit),
        )

    async def entries(self, account_id: UUID, *, before: int | None, limit: int) -> list[Row]:
        """Read an account's ledger entries; cursor: seq."""
        return await self._rows(
            "SELECT request_id, phase, kind, seq, amount, posted_delta, reserved_delta,"
            " posted_after, reserved_after, reason, reference, at FROM entries"
            " WHERE account_id = %s AND seq < %s ORDER BY seq DESC LIMIT %s",
            (account_id, _LAST_INTEGER if before is None else before, limit),
        )

    async def reviews(self, *, before: UUID | None, limit: int) -> list[Row]:
        """Read the requests of all accounts that wait for an operator; cursor: request_id."""
        return await self._rows(
            _USAGE + " WHERE review_reason IS NOT NULL AND resolved_at IS NULL"
            " AND request_id < %s ORDER BY request_id DESC LIMIT %s",
            (before or _LAST_UUID, limit),
        )

    async def audit_trail(self, *, before: UUID | None, limit: int) -> list[Row]:
        """Read what operators did; cursor: event_id, which is a uuidv7 as well."""
        return await self._rows(
            "SELECT account_id, event_id, at, actor, action, detail FROM audit_trail"
            " WHERE event_id < %s ORDER BY event_id DESC LIMIT %s",
            (before or _LAST_UUID, limit),
        )

    async def price_books(self, *, before: int | None, limit: int) -> list[Row]:
        """Read the price books; cursor: version."""
        return await self._rows(
            "SELECT version, valid_from, document, nanos_per_credit, published_by"
            " FROM price_books WHERE version < %s ORDER BY version DESC LIMIT %s",
            (_LAST_INTEGER if before is None else before, limit),
        )

    async def operations(self) -> Operations | None:
        """Read what a scrape shows of the ledger; None where PostgreSQL does not answer in time."""
        try:
            async with (
                asyncio.timeout(_OPERATIONS_TIMEOUT_S),
                self._pool.connection(timeout=_PING_TIMEOUT_S) as connection,
                connection.cursor(row_factory=class_row(Operations)) as cursor,
            ):
                await cursor.execute(
                    "SELECT h.open_holds, h.reserved_nanos, r.reviews, r.oldest_review_s,"
                    " e.misplaced + u.misplaced AS misplaced_rows"
                    " FROM (SELECT count(*) AS open_holds,"
                    " coalesce(sum(amount), 0)::bigint AS reserved_nanos FROM open_holds) AS h,"
                    " (SELECT count(*) AS reviews, greatest(0, coalesce("
                    "extract(EPOCH FROM clock_timestamp() - min(created_at)), 0)::float8)"
                    " AS oldest_review_s FROM usage"
                    " WHERE review_reason IS NOT NULL AND resolved_at IS NULL) AS r,"
                    " (SELECT count(*) AS misplaced"
                    " FROM (SELECT 1 FROM entries_default LIMIT 5000) AS d) AS e,"
                    " (SELECT count(*) AS misplaced"
                    " FROM (SELECT 1 FROM usage_default LIMIT 5000) AS d) AS u"
                )
                return await cursor.fetchone()
        except CONNECTION_ERRORS:
            return None

    async def is_alive(self) -> bool:
        """Whether PostgreSQL answers, within two seconds."""
        try:
            async with (
                asyncio.timeout(_PING_TIMEOUT_S),
                self._pool.connection(timeout=_PING_TIMEOUT_S) as connection,
            ):
                await connection.execute("SELECT 1")
        except CONNECTION_ERRORS:
            return False
        return True

    async def _rows(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
