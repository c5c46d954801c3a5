"""Projects, which an account's keys are grouped by, as the database keeps them."""

from collections.abc import Mapping
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from proxy.db import Pool
from proxy.ids import uuid7

Row = dict[str, Any]

_PROJECTS: LiteralString = (
    "SELECT p.project_id, p.name, p.status, p.created_at, p.archived_at, p.budget,"
    " p.budget_period, p.budget - c.reserved - CASE"
    " WHEN c.period = period_start(p.budget_period, clock_timestamp()) THEN c.spent ELSE 0"
    " END AS budget_left"
    " FROM projects AS p"
    " JOIN scope_counters AS c ON p.account_id = c.account_id AND p.project_id = c.scope_id"
)


class Projects:
    """Reads and writes projects. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(
        self,
        account_id: UUID,
        *,
        name: str,
        budget_nanos: int | None,
        budget_period: str,
        actor: str,
    ) -> UUID | None:
        """Make a project; None where there is no such open account."""
        project_id = uuid7()
        document = {"name": name, "budget": budget_nanos, "budget_period": budget_period}
        is_made = await self._call(
            "SELECT create_project(%s, %s, %s, %s)",
            (account_id, project_id, Jsonb(document), actor),
        )
        return project_id if is_made else None

    async def project(self, account_id: UUID, project_id: UUID) -> Row | None:
        """Read one project of an account; None where it has no such."""
        rows = await self._rows(
            _PROJECTS + " WHERE p.account_id = %(account_id)s AND p.project_id = %(project_id)s",
            {"account_id": account_id, "project_id": project_id},
        )
        return rows[0] if rows else None

    async def projects(self, account_id: UUID, *, before: UUID | None, limit: int) -> list[Row]:
        """Read an account's projects, newest first."""
        return await self._rows(
            _PROJECTS + " WHERE p.account_id = %(account_id)s"
            " AND (%(before)s::uuid IS NULL OR p.project_id < %(before)s)"
            " ORDER BY p.project_id DESC LIMIT %(limit)s",
            {"account_id": account_id, "before": before, "limit": limit},
        )

    async def update(
        self, account_id: UUID, project_id: UUID, changes: Mapping[str, object], *, actor: str
    ) -> str:
        """Change what is named of name, budget, budget_period; outcomes of `update_project`."""
        return await self._call(
            "SELECT update_project(%s, %s, %s, %s, %s)",
            (account_id, project_id, Jsonb(changes), uuid7(), actor),
        )

    async def archive(self, account_id: UUID, project_id: UUID, *, actor: str) -> bool:
        """Archive a project and revoke its keys, at once; False where there is no such project."""
        outcome: str = await self._call(
            "SELECT archive_project(%s, %s, %s, %s)", (account_id, project_id, uuid7(), actor)
        )
        return outcome == "archived"

    async def _call(self, query: LiteralString, parameters: tuple[object, ...]) -> Any:  # noqa: ANN401
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query, parameters)
            (answer,) = await cursor.fetchone() or (None,)
        return answer

    async def _rows(self, query: LiteralString, parameters: Mapping[str, object]) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
