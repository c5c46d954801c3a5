"""Statements: what moved an account's balance in a month, exactly, by kind and model.

A month's entries are those that were posted in it, and have consecutive numbers: the balance after
the one before them is the opening, and with their amounts it makes the closing. They are added up a
stretch of numbers at a time; entries never change, so the stretches agree with each other.
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import tuple_row

from proxy.db import Pool

_STRETCH = 20_000
# Of the newest months; a statement is there for older ones as well.
_MAX_MONTHS = 240

_BOUNDS: LiteralString = (
    "SELECT entry_before(%(account_id)s, %(begin)s), entry_before(%(account_id)s, %(end)s)"
)
# Entries up to a number are not kept where their month was detached; what they came to is.
_FIRST: LiteralString = (
    "SELECT e.seq - 1, e.posted_after - e.posted_delta, e.at FROM entries AS e"
    " WHERE e.account_id = %s ORDER BY e.seq LIMIT 1"
)
_AFTER: LiteralString = "SELECT posted_after FROM entries WHERE account_id = %s AND seq = %s"
_MOVED: LiteralString = """
SELECT m.kind, m.model, count(*), sum(m.posted_delta)
FROM (
    SELECT e.kind, u.model, e.posted_delta
    FROM (
        SELECT n.account_id, n.request_id, n.kind, n.posted_delta FROM entries AS n
        WHERE n.account_id = %(account_id)s AND n.seq > %(low)s AND n.seq <= %(high)s
            AND n.kind NOT IN ('hold', 'void', 'expire')
    ) AS e
    LEFT JOIN LATERAL (
        SELECT v.model FROM usage AS v
        WHERE v.account_id = %(account_id)s AND v.request_id = e.request_id
    ) AS u ON true
    UNION ALL
    -- Of requests of detached months that ended in this one nothing else is known.
    SELECT 'detached', NULL, c.posted_delta FROM carried_seams AS c
    WHERE c.account_id = %(account_id)s AND c.seq > %(low)s AND c.seq <= %(high)s
        AND c.posted_delta <> 0
) AS m
GROUP BY m.kind, m.model
"""


@dataclass(frozen=True, slots=True)
class Movement:
    """What entries of a kind came to, of a model where they are of requests."""

    kind: str
    model: str | None
    entries: int
    amount_nanos: int


@dataclass(frozen=True, slots=True)
class Statement:
    """A month of an account; opening and movements add up to the closing."""

    month: date
    opening_nanos: int
    closing_nanos: int
    movements: list[Movement]
    # Whether nothing can be added to it any more.
    is_final: bool
    # Whether what was posted before the first entry that is kept is in the opening.
    is_carried_over: bool


class Statements:
    """Reads, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def months(self, account_id: UUID) -> list[date]:
        """List the months in which something was posted, newest first, as far as that is kept."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=tuple_row) as cursor,
        ):
            await cursor.execute(_FIRST, (account_id,))
            first = await cursor.fetchone()
            if first is None:
                return []
            month, found = _month_of(datetime.now(UTC)), list[date]()
            for _ in range(_MAX_MONTHS):
                low, high = _begin(month), _begin(_next(month))
                await cursor.execute(_BOUNDS, {"account_id": account_id, "begin": low, "end": high})
                ((before, last),) = await cursor.fetchall()
                if before != last:
                    found.append(month)
                if before is None:
                    break
                month = _before(month)
            return found

    async def statement(self, account_id: UUID, month: date) -> Statement | None:
        """Add a month up; None where it has no entry, or none that is kept."""
        begin, end = _begin(month), _begin(_next(month))
        is_final = datetime.now(UTC) >= end
        moved: defaultdict[tuple[str, str | None], list[int]] = defaultdict(lambda: [0, 0])
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=tuple_row) as cursor,
        ):
            await cursor.execute(_BOUNDS, {"account_id": account_id, "begin": begin, "end": end})
            ((before, last),) = await cursor.fetchall()
            if last is None or before == last:
                return None
            if before is None:
                await cursor.execute(_FIRST, (account_id,))
                ((low, opening, _),) = await cursor.fetchall()
            else:
                await cursor.execute(_AFTER, (account_id, before))
                ((opening,),) = await cursor.fetchall()
                low = before
            is_carried_over = before is None and low > 0
            await cursor.execute(_AFTER, (account_id, last))
            ((closing,),) = await cursor.fetchall()
        while low < last:
            high = min(low + _STRETCH, last)
            # A connection for each, so that a long statement keeps nobody from his.
            async with (
                self._pool.connection() as connection,
                connection.cursor(row_factory=tuple_row) as cursor,
            ):
                await cursor.execute(_MOVED, {"account_id": account_id, "low": low, "high": high})
                for kind, model, entries, amount in await cursor.fetchall():
                    sums = moved[kind, model]
                    sums[0] += entries
                    sums[1] += int(amount)
            low = high
        return Statement(
            month,
            opening,
            closing,
            [
                Movement(kind, model, entries, amount)
                for (kind, model), (entries, amount) in sorted(
                    moved.items(), key=lambda item: (item[0][0], item[0][1] or "")
                )
            ],
            is_final,
            is_carried_over,
        )


def _month_of(moment: datetime) -> date:
    return moment.date().replace(day=1)


def _next(month: date) -> date:
    years, months = divmod(month.month, 12)
    return date(month.year + years, months + 1, 1)


def _before(month: date) -> date:
    return date(month.year - (month.month == 1), (month.month - 2) % 12 + 1, 1)


def _begin(month: date) -> datetime:
    return datetime(month.year, month.month, 1, tzinfo=UTC)
