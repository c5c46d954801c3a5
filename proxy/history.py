"""Reads of usage and of ledger entries by filter, in pages either way; no page reads without bound.

A time is a bound of request ids or of entries' numbers, so that a page begins with one descent of
an index and reads no month that is not asked for. What else is filtered is looked for in a stretch
of rows; a page that finds too few of them there says where the next one begins.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, dict_row, tuple_row

from proxy.db import Pool
from proxy.ids import first_uuid7
from proxy.reports import USAGE_ROWS

Row = dict[str, Any]

# How many rows a page looks at, where a filter may pass all of them by.
STRETCH = 10_000
_FIRST_UUID = UUID(int=0)
_LAST_UUID = UUID(int=2**128 - 1)
_LAST_SEQ = 2**63 - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_END = datetime(9999, 1, 1, tzinfo=UTC)

_MATCHES: LiteralString = (
    " AND (%(model)s::text IS NULL OR model = %(model)s)"
    " AND (%(key_id)s::uuid IS NULL OR key_id = %(key_id)s)"
    " AND (%(project_id)s::uuid IS NULL OR project_id = %(project_id)s)"
    " AND (%(status)s::text IS NULL OR status = %(status)s)"
    " AND (%(endpoint)s::text IS NULL OR endpoint = %(endpoint)s)"
)
# Of rows with low < request_id < high.
_OF_ACCOUNT: LiteralString = (
    " WHERE account_id = %(account_id)s AND request_id > %(low)s AND request_id < %(high)s"
)
_IDS: LiteralString = "SELECT request_id FROM usage_history"
_EDGE_DOWN: LiteralString = (
    _IDS + _OF_ACCOUNT + " ORDER BY request_id DESC OFFSET %(stretch)s LIMIT 1"
)
_EDGE_UP: LiteralString = _IDS + _OF_ACCOUNT + " ORDER BY request_id OFFSET %(stretch)s LIMIT 1"
_ENTRIES: LiteralString = (
    "SELECT request_id, phase, kind, seq, amount, posted_delta, reserved_delta, posted_after,"
    " reserved_after, reason, reference, at FROM entries"
    " WHERE account_id = %(account_id)s AND seq > %(low)s AND seq < %(high)s"
    " AND (%(kind)s::text IS NULL OR kind = %(kind)s)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """From `since` up to, and without, `until`; None is no bound."""

    since: datetime | None = None
    until: datetime | None = None

    @property
    def begin(self) -> datetime:
        """The bound or, where there is none, a time before all requests."""
        return max(self.since or _EPOCH, _EPOCH)

    @property
    def end(self) -> datetime:
        """The bound or, where there is none, a time after all requests."""
        return max(min(self.until or _END, _END), _EPOCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter(Span):
    """Which requests are meant; None is any."""

    model: str | None = None
    key_id: UUID | None = None
    project_id: UUID | None = None
    status: str | None = None
    endpoint: str | None = None

    @property
    def matches(self) -> dict[str, object]:
        """The parameters of what is filtered beside the time."""
        return {
            "model": self.model,
            "key_id": self.key_id,
            "project_id": self.project_id,
            "status": self.status,
            "endpoint": self.endpoint,
        }

    @property
    def is_by_time_alone(self) -> bool:
        """Whether every request of the time is meant."""
        return not any(value is not None for value in self.matches.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFilter(Span):
    """Which ledger entries are meant; None is any."""

    kind: str | None = None


ANY_USAGE = UsageFilter()
_ANY_ENTRY = EntryFilter()


@dataclass(frozen=True, slots=True)
class Found:
    """Rows in order, as many as were asked for or all up to `edge`; None where that is the end."""

    rows: list[Row]
    edge: Any | None


class History:
    """Reads, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def usage(
        self, account_id: UUID, wanted: UsageFilter, *, before: UUID | None, limit: int
    ) -> Found:
        """Read an account's requests, pending ones included, newest first."""
        high = first_uuid7(wanted.end) if wanted.until else _LAST_UUID
        bounds = {
            "account_id": account_id,
            "low": _below(wanted.begin),
            "high": min(high, before or _LAST_UUID),
            "limit": limit,
            "stretch": STRETCH - 1,
        }
        async with self._pool.connection() as connection:
            edge = None
            if not wanted.is_by_time_alone:
                edge = await _first(connection, _EDGE_DOWN, bounds)
                bounds["low"] = bounds["low"] if edge is None else UUID(int=edge.int - 1)
            rows = await _rows(
                connection,
                USAGE_ROWS + _OF_ACCOUNT + _MATCHES + " ORDER BY request_id DESC LIMIT %(limit)s",
                {**bounds, **wanted.matches},
            )
            return Found(rows, edge if len(rows) < limit else None)

    async def usage_onwards(
        self, account_id: UUID, wanted: UsageFilter, *, after: UUID | None, limit: int
    ) -> Found:
        """Read the same, oldest first."""
        bounds = {
            "account_id": account_id,
            "low": max(_below(wanted.begin), after or _FIRST_UUID),
            "high": first_uuid7(wanted.end) if wanted.until else _LAST_UUID,
            "limit": limit,
            "stretch": STRETCH - 1,
        }
        async with self._pool.connection() as connection:
            edge = None
            if not wanted.is_by_time_alone:
                edge = await _first(connection, _EDGE_UP, bounds)
                bounds["high"] = bounds["high"] if edge is None else UUID(int=edge.int + 1)
            rows = await _rows(
                connection,
                USAGE_ROWS + _OF_ACCOUNT + _MATCHES + " ORDER BY request_id LIMIT %(limit)s",
                {**bounds, **wanted.matches},
            )
            return Found(rows, edge if len(rows) < limit else None)

    async def entries(
        self, account_id: UUID, wanted: EntryFilter, *, before: int | None, limit: int
    ) -> Found:
        """Read an account's ledger entries, newest first."""
        async with self._pool.connection() as connection:
            low, high = await _numbers(connection, account_id, wanted)
            high = min(high, _LAST_SEQ if before is None else before)
            # Numbers have no gaps but those of detached months: so many numbers, so many rows.
            stop = max(low, high - STRETCH - 1) if wanted.kind else low
            rows = await _rows(
                connection,
                _ENTRIES + " ORDER BY seq DESC LIMIT %(limit)s",
                {
                    "account_id": account_id,
                    "low": stop,
                    "high": high,
                    "kind": wanted.kind,
                    "limit": limit,
                },
            )
            return Found(rows, stop + 1 if len(rows) < limit and stop > low else None)

    async def entries_onwards(
        self, account_id: UUID, wanted: EntryFilter, *, after: int | None, limit: int
    ) -> Found:
        """Read the same, oldest first."""
        async with self._pool.connection() as connection:
            low, high = await _numbers(connection, account_id, wanted)
            low = max(low, -1 if after is None else after)
            stop = min(high, low + STRETCH + 1) if wanted.kind else high
            rows = await _rows(
                connection,
                _ENTRIES + " ORDER BY seq LIMIT %(limit)s",
                {
                    "account_id": account_id,
                    "low": low,
                    "high": stop,
                    "kind": wanted.kind,
                    "limit": limit,
                },
            )
            return Found(rows, stop - 1 if len(rows) < limit and stop < high else None)


def _below(moment: datetime) -> UUID:
    """Return an id that is below every one of that time."""
    return UUID(int=max(first_uuid7(moment).int - 1, 0))


async def _numbers(
    connection: AsyncConnection[TupleRow], account_id: UUID, wanted: EntryFilter
) -> tuple[int, int]:
    """Return what the numbers of the entries lie between: those it has not itself."""
    if wanted == _ANY_ENTRY:
        return -1, _LAST_SEQ
    parameters = {"account_id": account_id, "since": wanted.since, "until": wanted.until}
    async with connection.cursor(row_factory=tuple_row) as cursor:
        await cursor.execute(
            "SELECT k.first_seq, k.last_seq,"
            " entry_before(%(account_id)s, %(since)s), entry_before(%(account_id)s, %(until)s)"
            " FROM (SELECT"
            " (SELECT seq FROM entries WHERE account_id = %(account_id)s ORDER BY seq LIMIT 1)"
            " AS first_seq,"
            " (SELECT seq FROM entries WHERE account_id = %(account_id)s ORDER BY seq DESC LIMIT 1)"
            " AS last_seq) AS k",
            parameters,
        )
        ((first, last, since, until),) = await cursor.fetchall()
    if first is None:
        return 0, 0
    if wanted.until is not None:
        last = first - 1 if until is None else until
    return first - 1 if since is None else since, last + 1


async def _first(
    connection: AsyncConnection[TupleRow], query: LiteralString, parameters: dict[str, Any]
) -> UUID | None:
    async with connection.cursor(row_factory=tuple_row) as cursor:
        await cursor.execute(query, parameters)
        row = await cursor.fetchone()
    return None if row is None else row[0]


async def _rows(
    connection: AsyncConnection[TupleRow], query: LiteralString, parameters: dict[str, Any]
) -> list[Row]:
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(query, parameters)
        return await cursor.fetchall()
