"""The price book in force, the old ones by their version, and those that are to come.

To publish is to say: from this time on these prices, whatever was said of that time before. Which
version is in force at a time is decided by `price_book_at` in `schema.sql`, for every replica.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from pricing.price_book import PriceBook, parse_price_book
from proxy.db import CONNECTION_ERRORS, Pool, unavailable
from proxy.ids import uuid7

log = logging.getLogger(__name__)

# How soon after its time a version is looked for, so that PostgreSQL's clock has reached it.
_SWITCH_MARGIN_S = 0.01
_LAST_VERSION = 2**31 - 1

_VERSIONS: LiteralString = (
    "SELECT p.version, p.valid_from, p.document, p.nanos_per_credit, p.published_by, CASE"
    " WHEN c.version IS NOT NULL THEN 'cancelled'"
    " WHEN p.version = (SELECT price_book_at(clock_timestamp())) THEN 'in_force'"
    " WHEN p.version <> price_book_at(p.valid_from) THEN 'overtaken'"
    " WHEN p.valid_from > clock_timestamp() THEN 'scheduled' ELSE 'past' END AS state"
    " FROM price_books AS p LEFT JOIN price_book_cancellations AS c ON p.version = c.version"
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PublishedBook:
    """A price book with the version under which its charges stand."""

    version: int
    book: PriceBook
    nanos_per_credit: int


@dataclass(frozen=True, slots=True)
class Publication:
    """What became of a publication; outcomes are documented at the functions of `schema.sql`.

    `version` is the one that says so now, or the one in the way; `overtaken` are versions that were
    to come and never will.
    """

    outcome: str
    version: int | None
    overtaken: list[int]


class PriceBooks:
    """Publishes, and follows what any replica has published."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._current: PublishedBook | None = None

    @property
    def is_known(self) -> bool:
        """Whether any version was read yet."""
        return self._current is not None

    @property
    def current(self) -> PublishedBook:
        """The newest version that this process knows.

        MeteringUnavailableError before the first `refresh` that succeeded.
        """
        if self._current is None:
            raise unavailable()
        return self._current

    async def freeze_nanos_per_credit(self, nanos: int) -> int:
        """Fix what a credit is worth, at first use; returns what it is fixed at."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT freeze_nanos_per_credit(%s)", (nanos,))
            row = await cursor.fetchone()
        if row is None:  # pragma: no cover - the function always answers a row
            msg = "freeze_nanos_per_credit answered no row"
            raise RuntimeError(msg)
        return int(row[0])

    async def publish(
        self,
        document: Mapping[str, object],
        *,
        nanos_per_credit: int,
        actor: str,
        valid_from: datetime | None = None,
        based_on: int | None = None,
        detail: Mapping[str, object] | None = None,
    ) -> Publication:
        """Publish a document for a time to come, None: now; see `publish_price_book`.

        `based_on` is the version that it is to follow, `detail` goes to the audit trail. Raises
        pricing's InvalidPriceBookError for a document that makes no sense.
        """
        canonical = await _canonical(document)
        return await self._publish(
            "SELECT outcome, version, overtaken"
            " FROM publish_price_book(%s, %s, %s, %s, %s, %s, %s)",
            Jsonb(canonical),
            nanos_per_credit,
            uuid7(),
            actor,
            valid_from,
            based_on,
            Jsonb(dict(detail or {})),
        )

    async def publish_configured(
        self, document: Mapping[str, object], *, nanos_per_credit: int
    ) -> Publication:
        """Publish the configuration's document unless it was its last; raises as `publish`.

        Outcome `kept`: what operators published since is in force, or what it said itself.
        """
        canonical = await _canonical(document)
        return await self._publish(
            "SELECT outcome, version, overtaken FROM publish_configured_price_book(%s, %s, %s)",
            Jsonb(canonical),
            nanos_per_credit,
            uuid7(),
        )

    async def revalue(self, nanos_per_credit: int) -> int:
        """Have what is in force and to come published anew where a credit was worth other nanos.

        Returns how many versions that made.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT revalue_price_books(%s, %s)", (nanos_per_credit, uuid7())
            )
            ((made,),) = await cursor.fetchall()
        return int(made)

    async def cancel(self, version: int, *, actor: str) -> str:
        """Call a version off before its time; answers as `cancel_price_book`."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT cancel_price_book(%s, %s, %s)", (version, uuid7(), actor)
            )
            ((outcome,),) = await cursor.fetchall()
        return str(outcome)

    async def _publish(self, call: LiteralString, *parameters: object) -> Publication:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Publication)) as cursor,
        ):
            await cursor.execute(call, parameters)
            (publication,) = await cursor.fetchall()
        return publication

    async def read(self, version: int) -> PublishedBook | None:
        """Read a version, whether it is in force or not; None where there never was such."""
        if self._current is not None and self._current.version == version:
            return self._current
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT version, document, nanos_per_credit FROM price_books WHERE version = %s",
                (version,),
            )
            row = await cursor.fetchone()
        return None if row is None else PublishedBook(row[0], parse_price_book(row[1]), row[2])

    async def versions(self, *, before: int | None, limit: int) -> list[Row]:
        """Read versions, newest first, each with its `state`; cursor: version.

        States: in_force, scheduled, overtaken (its time came or comes, and a later publication is
        in force by then), cancelled, past.
        """
        return await self._rows(
            _VERSIONS + " WHERE p.version < %s ORDER BY p.version DESC LIMIT %s",
            (_LAST_VERSION if before is None else min(before, _LAST_VERSION), limit),
        )

    async def version(self, version: int) -> Row | None:
        """Read one version as `versions` has it; None where there never was such."""
        rows = await self._rows(_VERSIONS + " WHERE p.version = %s", (version,))
        return rows[0] if rows else None

    async def in_force(self) -> PublishedBook | None:
        """Read the version in force, as of now; None where nothing was published."""
        known = self._current
        rows = await self._rows(
            # A book may have thousands of rules: it is read once.
            "SELECT version, nanos_per_credit,"
            " CASE WHEN version <> %s THEN document END AS document"
            " FROM price_books WHERE version = (SELECT price_book_at(clock_timestamp()))",
            (-1 if known is None else known.version,),
        )
        if not rows:
            return None
        (row,) = rows
        if known is not None and row["version"] == known.version:
            return known
        book = await asyncio.to_thread(parse_price_book, row["document"])
        return PublishedBook(row["version"], book, row["nanos_per_credit"])

    async def refresh(self) -> PublishedBook:
        """Read the version in force, and use it from now on."""
        found = await self.in_force()
        if found is None:
            msg = "the database has no price book"
            raise RuntimeError(msg)
        self._current = found
        return found

    async def next_scheduled(self) -> int | None:
        """Read the version that comes into force next; None where none is to."""
        rows = await self._rows(
            "SELECT version FROM price_books WHERE valid_from > clock_timestamp()"
            " AND version = price_book_at(valid_from) ORDER BY valid_from LIMIT 1",
            (),
        )
        return rows[0]["version"] if rows else None

    async def _seconds_to_next(self) -> float | None:
        """How long until another version's time comes; None where none is to come."""
        rows = await self._rows(
            "SELECT extract(EPOCH FROM min(valid_from) - clock_timestamp())::float8 AS left_s"
            " FROM price_books WHERE valid_from > clock_timestamp()",
            (),
        )
        return rows[0]["left_s"]

    async def _rows(self, query: LiteralString, parameters: tuple[object, ...]) -> list[Row]:
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(query, parameters)
            return await cursor.fetchall()

    async def run(self, *, interval_s: float) -> None:
        """Follow new versions until cancelled: within the interval, a scheduled one at its time."""
        left_s: float | None = None
        while True:
            wait_s = interval_s if left_s is None else min(interval_s, left_s + _SWITCH_MARGIN_S)
            await asyncio.sleep(wait_s)
            try:
                await self.refresh()
                left_s = await self._seconds_to_next()
            except CONNECTION_ERRORS as error:
                left_s = None
                log.warning("price book not refreshed", extra={"error": type(error).__name__})


async def _canonical(document: Mapping[str, object]) -> dict[str, object]:
    """Check a document; in a thread, because one of thousands of rules takes seconds."""
    book = await asyncio.to_thread(parse_price_book, document)
    return book.canonical_document()
