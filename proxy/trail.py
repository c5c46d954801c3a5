"""The audit trail: who did what as an operator, or by a key that may manage.

A search for an actor or an action looks at a bounded number of acts and says where it came to.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from psycopg.rows import dict_row

from proxy.db import Pool
from proxy.ids import first_uuid7

_SCANNED_ACTS = 10_000
_LAST_UUID = UUID(int=2**128 - 1)
_FIRST_UUID = UUID(int=0)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# How far the time of an id may be from that of its act: two clocks, of a proxy and of PostgreSQL.
_SLACK = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class ActFilter:
    """Which acts to find; None for any. `since` is within, `until` is not."""

    account_id: UUID | None = None
    actor: str | None = None
    action: str | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Acts:
    """Acts of a search, and behind which one it goes on where there was more to look at."""

    rows: list[dict[str, Any]]
    goes_on_before: UUID | None


class Trail:
    """Reads the trail. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def acts(self, wanted: ActFilter, *, before: UUID | None, limit: int) -> Acts:
        """Find acts, newest first; cursor: event_id, which is a uuidv7 as well."""
        is_any = wanted in {ActFilter(), ActFilter(account_id=wanted.account_id)}
        scanned = limit if is_any else _SCANNED_ACTS
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            # Planned each time, by what is asked for.
            await cursor.execute(
                "WITH looked_at AS MATERIALIZED (SELECT t.* FROM audit_trail AS t"
                " WHERE t.event_id < %(before)s AND t.event_id >= %(from)s"
                " AND (%(account_id)s::uuid IS NULL OR t.account_id = %(account_id)s)"
                " ORDER BY t.event_id DESC LIMIT %(scanned)s),"
                " found AS (SELECT l.* FROM looked_at AS l"
                " WHERE (%(actor)s::text IS NULL OR l.actor = %(actor)s)"
                " AND (%(action)s::text IS NULL OR l.action = %(action)s)"
                " AND (%(since)s::timestamptz IS NULL OR l.at >= %(since)s)"
                " AND (%(until)s::timestamptz IS NULL OR l.at < %(until)s)"
                " ORDER BY l.event_id DESC LIMIT %(limit)s)"
                " SELECT f.*, e.scanned, e.last_event_id FROM (SELECT count(*) AS scanned,"
                " (array_agg(l.event_id ORDER BY l.event_id))[1] AS last_event_id"
                " FROM looked_at AS l) AS e LEFT JOIN found AS f ON true ORDER BY f.event_id DESC",
                {
                    "before": min(before or _LAST_UUID, _id_behind(wanted.until)),
                    "from": _id_before(wanted.since),
                    "since": wanted.since,
                    "until": wanted.until,
                    "account_id": wanted.account_id,
                    "actor": wanted.actor,
                    "action": wanted.action,
                    "scanned": scanned,
                    "limit": limit,
                },
                prepare=False,
            )
            rows = await cursor.fetchall()
        has_more = not is_any and rows[0]["scanned"] == scanned
        return Acts(
            [row for row in rows if row["event_id"] is not None],
            rows[0]["last_event_id"] if has_more else None,
        )


def _id_before(moment: datetime | None) -> UUID:
    if moment is None or moment - _EPOCH <= _SLACK:
        return _FIRST_UUID
    return first_uuid7(moment - _SLACK)


def _id_behind(moment: datetime | None) -> UUID:
    if moment is None or datetime.max.replace(tzinfo=UTC) - moment <= _SLACK:
        return _LAST_UUID
    return first_uuid7(max(moment, _EPOCH) + _SLACK)
