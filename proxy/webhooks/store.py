"""Receivers, events and what came of them, as the database keeps them: see schema.sql."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from proxy.db import CONNECTION_ERRORS, Pool
from proxy.ids import uuid7

Row = dict[str, Any]

_LAST_UUID = UUID(int=2**128 - 1)
_IDS_A_PAGE = 200

_RECEIVER: LiteralString = (
    "SELECT receiver_id, url, description, event_types, status, is_gone, created_at,"
    " CASE WHEN old_secret_until > clock_timestamp() THEN old_secret_until END AS old_secret_until"
    " FROM webhook_receivers"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a receiver is, and what signs for it."""

    url: str
    secrets: list[str]


@dataclass(frozen=True, slots=True)
class Claimed:
    """An event that is due, for as long as the lease lasts."""

    account_id: UUID
    number: int
    event_id: UUID
    type: str
    data: dict[str, Any]
    at: datetime
    attempts: int
    lease: datetime


@dataclass(frozen=True, slots=True)
class Page:
    """What a look at some accounts has found; see watch_page in schema.sql."""

    is_due: bool
    events: int
    is_last: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What is not delivered, of all receivers that are not paused."""

    pending: int
    oldest_s: float
    failed: int


class WebhookStore:
    """Reads and writes over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    # --- receivers, for operators ---

    async def receivers(self, *, before: UUID | None, limit: int) -> list[Row]:
        """Read receivers without their secrets, newest first; cursor: receiver_id."""
        return await self._rows(
            _RECEIVER + " WHERE receiver_id < %s ORDER BY receiver_id DESC LIMIT %s",
            (before or _LAST_UUID, limit),
        )

    async def receiver(self, receiver_id: UUID) -> Row | None:
        """Read a receiver without its secrets; None where there is no such."""
        rows = await self._rows(_RECEIVER + " WHERE receiver_id = %s", (receiver_id,))
        return rows[0] if rows else None

    async def create(
        self, *, url: str, description: str, event_types: list[str] | None, secret: str, actor: str
    ) -> UUID:
        """Make a receiver; None for event_types is every type."""
        receiver_id = uuid7()
        await self._call(
            "SELECT create_webhook(%s, %s, %s, %s, %s, %s)",
            (receiver_id, url, description, event_types, secret, actor),
        )
        return receiver_id

    async def change(self, receiver_id: UUID, change: dict[str, Any], *, actor: str) -> bool:
        """Change any of url, description, event_types and status; False: no such receiver."""
        return await self._call(
            "SELECT change_webhook(%s, %s, %s, %s)", (receiver_id, Jsonb(change), uuid7(), actor)
        )

    async def rotate(self, receiver_id: UUID, secret: str, *, overlap_s: int, actor: str) -> bool:
        """Sign with this secret, and for a while with the one before; False: no such receiver."""
        return await self._call(
            "SELECT rotate_webhook_secret(%s, %s, %s, %s, %s)",
            (receiver_id, secret, overlap_s, uuid7(), actor),
        )

    async def delete(self, receiver_id: UUID, *, actor: str) -> bool:
        """Delete a receiver and what was pending for it; False: no such receiver."""
        return await self._call("SELECT delete_webhook(%s, %s, %s)", (receiver_id, uuid7(), actor))

    async def test(self, receiver_id: UUID, *, actor: str) -> UUID | None:
        """Queue an event that tells nothing; its id, or None where there is no such receiver."""
        event_id = uuid7()
        is_queued = await self._call(
            "SELECT test_webhook(%s, %s, %s)", (receiver_id, event_id, actor)
        )
        return event_id if is_queued else None

    async def replay(
        self, receiver_id: UUID, *, event_id: UUID | None, since: datetime | None, actor: str
    ) -> int | None:
        """Queue one event, or all since a time, again; how many, or None: no such receiver."""
        return await self._call(
            "SELECT replay_webhooks(%s, %s, %s, %s, %s)",
            (receiver_id, event_id, since, uuid7(), actor),
        )

    async def deliveries(
        self, receiver_id: UUID, *, status: str | None, before: UUID | None, limit: int
    ) -> list[Row]:
        """Read what came of a receiver's events, newest first; cursor: event_id.

        `next_attempt_at` is None where the event waits for an older one, or for nothing.
        """
        return await self._rows(
            "SELECT d.account_id, d.event_id, d.status, d.attempts, d.queued_at,"
            " d.last_attempt_at, d.last_status, d.last_error, e.type, e.at,"
            " CASE WHEN d.status = 'pending' AND NOT EXISTS (SELECT 1 FROM webhook_deliveries AS o"
            " WHERE o.account_id = d.account_id AND o.receiver_id = d.receiver_id"
            " AND o.status = 'pending' AND o.number < d.number) THEN l.due_at END"
            " AS next_attempt_at"
            " FROM webhook_deliveries AS d INNER JOIN webhook_events AS e"
            " ON d.account_id = e.account_id AND d.number = e.number"
            " LEFT JOIN webhook_lanes AS l"
            " ON d.account_id = l.account_id AND d.receiver_id = l.receiver_id"
            " WHERE d.receiver_id = %(receiver_id)s AND d.event_id < %(before)s"
            " AND (%(status)s::text IS NULL OR d.status = %(status)s)"
            " ORDER BY d.event_id DESC LIMIT %(limit)s",
            {
                "receiver_id": receiver_id,
                "status": status,
                "before": before or _LAST_UUID,
                "limit": limit,
            },
        )

    async def backlog(self) -> Backlog | None:
        """Count what is not delivered; None where PostgreSQL does not answer."""
        try:
            async with (
                self._pool.connection(timeout=2) as connection,
                connection.cursor(row_factory=class_row(Backlog)) as cursor,
            ):
                await cursor.execute(
                    "SELECT count(*) FILTER (WHERE d.status = 'pending') AS pending,"
                    " coalesce(extract(EPOCH FROM clock_timestamp() - min(d.queued_at)"
                    " FILTER (WHERE d.status = 'pending')), 0)::float8 AS oldest_s,"
                    " count(*) FILTER (WHERE d.status = 'failed') AS failed"
                    " FROM webhook_deliveries AS d"
                    " INNER JOIN webhook_receivers AS e ON d.receiver_id = e.receiver_id"
                    " WHERE d.status <> 'delivered' AND e.status = 'active'"
                )
                return await cursor.fetchone()
        except CONNECTION_ERRORS:
            return None

    # --- the watch and the delivery ---

    async def watch(self, *, accounts: int, pause_s: float, interval_s: float) -> Page:
        """Look at the next accounts, if that is due, and write down what is to be told."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Page)) as cursor,
        ):
            await cursor.execute(
                "SELECT is_due, events, is_last FROM watch_page(%s, %s, %s, %s)",
                (accounts, pause_s, interval_s, [uuid7() for _ in range(_IDS_A_PAGE)]),
            )
            (page,) = await cursor.fetchall()
            return page

    async def purge(self, *, age_s: float, limit: int) -> int:
        """Forget events that are older and done with; returns how many."""
        return await self._call("SELECT purge_webhook_events(%s, %s)", (age_s, limit))

    async def due_receivers(self) -> list[UUID]:
        """List the receivers that something is due for."""
        rows = await self._rows(
            "SELECT e.receiver_id FROM webhook_receivers AS e WHERE e.status = 'active'"
            " AND EXISTS (SELECT 1 FROM webhook_lanes AS l WHERE l.receiver_id = e.receiver_id"
            " AND l.due_at <= clock_timestamp())",
            (),
        )
        return [row["receiver_id"] for row in rows]

    async def target(self, receiver_id: UUID) -> Target | None:
        """Read where a receiver is and what signs for it; None where there is none any more."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Target)) as cursor,
        ):
            await cursor.execute(
                "SELECT url, array_remove(ARRAY[secret, CASE"
                " WHEN old_secret_until > clock_timestamp() THEN old_secret END], NULL) AS secrets"
                " FROM webhook_receivers WHERE receiver_id = %s",
                (receiver_id,),
            )
            return await cursor.fetchone()

    async def claim(self, receiver_id: UUID, *, limit: int, lease_s: float) -> list[Claimed]:
        """Take what is due for a receiver: of each account the oldest event."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Claimed)) as cursor,
        ):
            await cursor.execute(
                "SELECT account_id, number, event_id, type, data, at, attempts, lease"
                " FROM claim_webhooks(%s, %s, %s)",
                (receiver_id, limit, lease_s),
            )
            return await cursor.fetchall()

    async def finish(
        self,
        receiver_id: UUID,
        claimed: Claimed,
        *,
        outcome: str,
        status: int | None,
        error: str | None,
        retry_s: float,
        give_up_s: float,
    ) -> str:
        """Say what came of an event; answers what becomes of it: see finish_webhook."""
        return await self._call(
            "SELECT finish_webhook(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            (
                claimed.account_id,
                receiver_id,
                claimed.number,
                claimed.lease,
                outcome,
                status,
                error,
                retry_s,
                give_up_s,
            ),
        )

    async def _call(self, query: LiteralString, parameters: tuple[object, ...]) -> Any:  # noqa: ANN401
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query, parameters)
            ((value,),) = await cursor.fetchall()
            return value

    async def _rows(
        self, query: LiteralString, parameters: tuple[object, ...] | dict[str, object]
    ) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
