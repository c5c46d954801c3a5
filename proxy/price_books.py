"""The price book in force, and the old ones by their version."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from psycopg.types.json import Jsonb

from pricing.price_book import PriceBook, parse_price_book
from proxy.db import CONNECTION_ERRORS, Pool, unavailable
from proxy.ids import uuid7

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PublishedBook:
    """A price book with the version under which its charges stand."""

    version: int
    book: PriceBook
    nanos_per_credit: int


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
        self, document: Mapping[str, object], *, nanos_per_credit: int, actor: str
    ) -> int:
        """Publish a document unless it is what is in force; returns the version in force.

        Raises pricing's InvalidPriceBookError for a document that makes no sense.
        """
        canonical = parse_price_book(document).canonical_document()
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT publish_price_book(%s, %s, %s, %s)",
                (Jsonb(canonical), nanos_per_credit, uuid7(), actor),
            )
            row = await cursor.fetchone()
        if row is None:  # pragma: no cover - the function always answers a row
            msg = "publish_price_book answered no row"
            raise RuntimeError(msg)
        return int(row[0])

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

    async def newest(self) -> int | None:
        """Read the newest version's number; None where nothing was published."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT max(version) FROM price_books")
            row = await cursor.fetchone()
        return None if row is None else row[0]

    async def refresh(self) -> PublishedBook:
        """Read the version in force."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT version, document, nanos_per_credit FROM price_books"
                " WHERE valid_from <= clock_timestamp() ORDER BY version DESC LIMIT 1"
            )
            row = await cursor.fetchone()
        if row is None:
            msg = "the database has no price book"
            raise RuntimeError(msg)
        if self._current is None or self._current.version != row[0]:
            self._current = PublishedBook(row[0], parse_price_book(row[1]), row[2])
        return self._current

    async def run(self, *, interval_s: float) -> None:
        """Follow new versions until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.refresh()
            except CONNECTION_ERRORS as error:
                log.warning("price book not refreshed", extra={"error": type(error).__name__})
