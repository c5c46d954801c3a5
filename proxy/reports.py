"""Read-only queries on usage, entries, reviews and the audit trail; newest first.

A page begins after a cursor, which is the last key of the page before, so that rows that arrive
meanwhile shift nothing. Amounts are as in `schema.sql`: integers of nano-USD.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, dict_row

from proxy.db import CONNECTION_ERRORS, Pool, unavailable

Row = dict[str, Any]

# Above every key, for the page that begins at the newest row.
_LAST_UUID = UUID(int=2**128 - 1)
_PING_TIMEOUT_S = 2.0
_OPERATIONS_TIMEOUT_S = 5.0

# Requests that ended and pending ones, with every column.
USAGE_ROWS: LiteralString = (
    "SELECT account_id, request_id, key_id, created_at, settled_at, endpoint, model,"
    " model_answered, tier, streamed, byok, status, input_tokens, cached_input_tokens,"
    " cache_creation_tokens, cache_creation_1h_tokens, output_tokens, reasoning_tokens,"
    " audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images,"
    " cost_picos, cost_source, price, rounding_attos, rule, markup_ppm, price_version, hold,"
    " overdraft, review_reason, resolved_at, error_code, upstream_status, client_gone,"
    " first_byte_ms, duration_ms, input_characters, audio_ms, queries, service_tier, rated_picos,"
    " answer_id, attempts, witness_picos, resolution, project_id, quantity FROM usage_history"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewFilter:
    """Which requests of the review queue are meant; None is any."""

    reason: str | None = None
    account_id: UUID | None = None
    model: str | None = None
    older_than: timedelta | None = None


_ANY_REVIEW = ReviewFilter()


@dataclass(frozen=True, slots=True)
class Operations:
    """The state of the ledger as a whole; nano-USD and seconds."""

    open_holds: int
    reserved_nanos: int
    reviews: int
    oldest_review_s: float
    reviews_by_reason: dict[str, int]
    # The newest reconciliation of each source: drift_usd (None: no costs told), age_s, within.
    reconciliations: dict[str, dict[str, float | None]]
    # Rows that fit no month's partition, counted up to 10,000.
    misplaced_rows: int
    # Unix time of the newest audit that found nothing, 0 where there is none; and what the newest
    # found.
    audit_clean_at: float
    audit_findings: int


class Reports:
    """Reads, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def requests(self, keys: Sequence[tuple[UUID, UUID]]) -> list[Row]:
        """Read requests by (account_id, request_id), pending ones included, in no order.

        A key that is unknown has no row; one that is given twice has two.
        """
        accounts, requests = [key[0] for key in keys], [key[1] for key in keys]
        return await self._rows(
            USAGE_ROWS + " JOIN unnest(%s::uuid[], %s::uuid[]) AS k (owner, wanted)"
            " ON account_id = k.owner AND request_id = k.wanted",
            (accounts, requests),
        )

    async def usage_row(self, account_id: UUID, request_id: UUID) -> Row | None:
        """Read one request with what a receipt needs; None where the account has no such.

        Beside the columns of usage: `document` and `nanos_per_credit` of its version of the price
        book, None where there is no such, `refunded` in nano-USD, and `entries`, the request's
        ledger entries in order.
        """
        async with (
            self._pool.connection() as connection,
            connection.transaction(),
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            # One moment for both: a hold that ends between them would be pending and captured.
            await cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            key = (account_id, request_id)
            await cursor.execute(USAGE_ROWS + " WHERE account_id = %s AND request_id = %s", key)
            row = await cursor.fetchone()
            if row is None:
                return None
            await cursor.execute(
                "SELECT document, nanos_per_credit FROM price_books WHERE version = %s",
                (row["price_version"],),
            )
            book = await cursor.fetchone() or {"document": None, "nanos_per_credit": None}
            await cursor.execute("SELECT refunded(%s, %s)", key)
            (refunded,) = await cursor.fetchall()
            await cursor.execute(
                "SELECT seq, phase, kind, amount, posted_delta, reserved_delta, at FROM entries"
                " WHERE account_id = %s AND request_id = %s ORDER BY phase",
                key,
            )
            return {**row, **book, **refunded, "entries": await cursor.fetchall()}

    async def model_of_answer(self, account_id: UUID, answer_id: str) -> str | None:
        """Return the model of a stored response of this account; None where it has none such.

        Raises MeteringUnavailableError where the database is away.
        """
        try:
            rows = await self._rows(
                "SELECT model FROM usage"
                " WHERE account_id = %s AND answer_id = %s AND endpoint = 'responses' LIMIT 1",
                (account_id, answer_id),
            )
        except CONNECTION_ERRORS as error:
            raise unavailable() from error
        return None if not rows else str(rows[0]["model"])

    async def recent_output_tokens(self, account_id: UUID, model: str) -> int | None:
        """Average the output of the account's newest 50 charged requests of a model.

        Looks at no more than its newest 500 requests; None where none of them tells.
        """
        (row,) = await self._rows(
            "SELECT round(avg(m.output_tokens))::bigint AS average FROM ("
            "SELECT n.output_tokens FROM (SELECT request_id, model, status, output_tokens"
            " FROM usage WHERE account_id = %s ORDER BY request_id DESC LIMIT 500) AS n"
            " WHERE n.model = %s AND n.status IN ('billed', 'byok') AND n.output_tokens IS NOT NULL"
            " ORDER BY n.request_id DESC LIMIT 50) AS m",
            (account_id, model),
        )
        return row["average"]

    async def budget_left(self, account_id: UUID, key_id: UUID) -> int | None:
        """Read what is left of a key's and its project's budget, in nano-USD; None without one."""
        rows = await self._rows(
            "SELECT least(k.budget - coalesce(c.reserved, 0) - coalesce(CASE"
            " WHEN c.period = period_start(k.budget_period, clock_timestamp()) THEN c.spent"
            " ELSE 0 END, 0), p.budget - coalesce(cp.reserved, 0) - coalesce(CASE"
            " WHEN cp.period = period_start(p.budget_period, clock_timestamp()) THEN cp.spent"
            " ELSE 0 END, 0)) AS budget_left FROM virtual_keys AS k"
            " LEFT JOIN scope_counters AS c"
            " ON k.account_id = c.account_id AND k.key_id = c.scope_id"
            " LEFT JOIN projects AS p"
            " ON k.account_id = p.account_id AND k.project_id = p.project_id"
            " LEFT JOIN scope_counters AS cp"
            " ON p.account_id = cp.account_id AND p.project_id = cp.scope_id"
            " WHERE k.account_id = %s AND k.key_id = %s",
            (account_id, key_id),
        )
        return rows[0]["budget_left"] if rows else None

    async def reviews(
        self, wanted: ReviewFilter = _ANY_REVIEW, *, before: UUID | None, limit: int
    ) -> list[Row]:
        """Read the requests that wait for an operator; cursor: request_id."""
        return await self._rows(
            USAGE_ROWS + " WHERE review_reason IS NOT NULL AND resolved_at IS NULL"
            " AND request_id < %(before)s"
            " AND (%(reason)s::text IS NULL OR review_reason = %(reason)s)"
            " AND (%(account_id)s::uuid IS NULL OR account_id = %(account_id)s)"
            " AND (%(model)s::text IS NULL OR model = %(model)s)"
            " AND (%(older_than)s::interval IS NULL"
            " OR created_at < clock_timestamp() - %(older_than)s::interval)"
            " ORDER BY request_id DESC LIMIT %(limit)s",
            {
                "before": before or _LAST_UUID,
                "reason": wanted.reason,
                "account_id": wanted.account_id,
                "model": wanted.model,
                "older_than": wanted.older_than,
                "limit": limit,
            },
        )

    async def review_counts(self) -> list[Row]:
        """Count what waits for an operator by reason, and by whether it was charged."""
        return await self._rows(
            "SELECT review_reason, price IS NOT NULL AS is_charged, count(*) AS requests,"
            " min(created_at) AS oldest_at, sum(hold)::bigint AS held"
            " FROM usage WHERE review_reason IS NOT NULL AND resolved_at IS NULL"
            " GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2",
            (),
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
                    " r.reviews_by_reason, c.reconciliations,"
                    " e.misplaced + u.misplaced AS misplaced_rows,"
                    " coalesce((SELECT extract(EPOCH FROM a.at)::float8 FROM audit_runs AS a"
                    " WHERE a.findings = 0 ORDER BY a.run_id DESC LIMIT 1), 0) AS audit_clean_at,"
                    " coalesce((SELECT a.findings FROM audit_runs AS a"
                    " ORDER BY a.run_id DESC LIMIT 1), 0) AS audit_findings"
                    " FROM (SELECT count(*) AS open_holds,"
                    " coalesce(sum(amount), 0)::bigint AS reserved_nanos FROM open_holds) AS h,"
                    " (SELECT coalesce(sum(n), 0)::bigint AS reviews, greatest(0, coalesce("
                    "extract(EPOCH FROM clock_timestamp() - min(oldest)), 0)::float8)"
                    " AS oldest_review_s, coalesce(jsonb_object_agg(review_reason, n), '{}')"
                    " AS reviews_by_reason FROM (SELECT review_reason, count(*) AS n,"
                    " min(created_at) AS oldest FROM usage"
                    " WHERE review_reason IS NOT NULL AND resolved_at IS NULL"
                    " GROUP BY review_reason) AS g) AS r,"
                    " (SELECT coalesce(jsonb_object_agg(n.source, jsonb_build_object("
                    "'drift_usd', n.drift_picos / 1e12, 'within', n.is_within::integer, 'age_s',"
                    " extract(EPOCH FROM clock_timestamp() - n.at))), '{}') AS reconciliations"
                    " FROM (SELECT DISTINCT ON (source) * FROM reconciliations"
                    " ORDER BY source, reconciliation_id DESC) AS n) AS c,"
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

    async def _rows(
        self, query: LiteralString, parameters: tuple[object, ...] | Mapping[str, object]
    ) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
