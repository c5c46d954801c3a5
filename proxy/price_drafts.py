"""Price books that operators work on: nobody is charged by them until they are published."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from proxy.db import Pool
from proxy.ids import uuid7
from proxy.price_books import Publication

Row = dict[str, Any]

_LAST_UUID = UUID(int=2**128 - 1)
_DRAFTS: LiteralString = (
    "SELECT draft_id, name, document, based_on, created_at, created_by, updated_at,"
    " published_version FROM price_book_drafts"
)


class PriceDrafts:
    """Keeps drafts; documents are canonical, as pricing writes them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def drafts(self, *, before: UUID | None, limit: int) -> list[Row]:
        """Read drafts, newest first; cursor: draft_id."""
        return await self._rows(
            _DRAFTS + " WHERE draft_id < %s ORDER BY draft_id DESC LIMIT %s",
            (before or _LAST_UUID, limit),
        )

    async def draft(self, draft_id: UUID) -> Row | None:
        """Read one draft; None where there is none such."""
        rows = await self._rows(_DRAFTS + " WHERE draft_id = %s", (draft_id,))
        return rows[0] if rows else None

    async def create(self, name: str, document: Mapping[str, object], *, actor: str) -> UUID:
        """Make a draft; returns its id."""
        draft_id = uuid7()
        await self._call(
            "SELECT create_price_book_draft(%s, %s, %s, %s, %s)",
            (draft_id, name, Jsonb(document), uuid7(), actor),
        )
        return draft_id

    async def change(
        self, draft_id: UUID, name: str, document: Mapping[str, object], *, actor: str
    ) -> str:
        """Give it another name and document; answers as `change_price_book_draft`."""
        return await self._call(
            "SELECT change_price_book_draft(%s, %s, %s, %s, %s)",
            (draft_id, name, Jsonb(document), uuid7(), actor),
        )

    async def delete(self, draft_id: UUID, *, actor: str) -> bool:
        """Throw a draft away; whether there was one."""
        return await self._call(
            "SELECT delete_price_book_draft(%s, %s, %s)", (draft_id, uuid7(), actor)
        )

    async def publish(
        self,
        draft_id: UUID,
        *,
        nanos_per_credit: int,
        actor: str,
        valid_from: datetime | None,
        based_on: int | None,
    ) -> Publication:
        """Publish a draft, once, for a time to come (None: now); see `publish_price_book_draft`."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Publication)) as cursor,
        ):
            await cursor.execute(
                "SELECT outcome, version, overtaken"
                " FROM publish_price_book_draft(%s, %s, %s, %s, %s, %s)",
                (draft_id, nanos_per_credit, uuid7(), actor, valid_from, based_on),
            )
            (publication,) = await cursor.fetchall()
        return publication

    async def _call(self, call: LiteralString, parameters: tuple[object, ...]) -> Any:  # noqa: ANN401
        async with self._pool.connection() as connection:
            cursor = await connection.execute(call, parameters)
            ((answer,),) = await cursor.fetchall()
        return answer

    async def _rows(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()
