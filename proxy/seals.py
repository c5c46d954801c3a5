"""Seals: a hash of what was written since the last one, chained, to be kept elsewhere.

Whoever may write to the database can change its past and every trace of it in there, but not a
line that an operator has kept. PostgreSQL makes the hashes (`seal_page` in schema.sql), off the
path of any request and a page of accounts at a time, in time proportional to what is new.
"""

import asyncio
import logging
import random
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from uuid import UUID

import msgspec
import psycopg

from proxy.db import CONNECTION_ERRORS, Pool
from proxy.errors import ConfigurationError

log = logging.getLogger(__name__)

# Of entries in one transaction: some tenths of a second.
_PAGE = 20_000
_NIL = UUID(int=0)


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """One seal as it is printed and kept; hashes are hexadecimal."""

    number: int
    sealed_at: datetime
    accounts: int
    entries: int
    # The root of the seal before; empty for the first.
    previous: str
    root: str


def line_of(seal: Seal) -> str:
    """Return the line that an operator keeps."""
    return msgspec.json.encode(seal).decode()


def read_kept(path: Path) -> list[Seal]:
    """Read lines that were kept; ConfigurationError where the file is none of ours."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        msg = f"{path} can't be read: {error.strerror}"
        raise ConfigurationError(msg) from None
    kept: list[Seal] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            kept.append(msgspec.json.decode(line, type=Seal))
        except msgspec.MsgspecError as error:
            msg = f"{path}, line {number}, is no seal: {error}"
            raise ConfigurationError(msg) from None
    return kept


def seals_of(rows: Iterable[tuple[int, datetime, int, int, bytes, bytes]]) -> list[Seal]:
    """Make seals of rows of their table, with its columns in order."""
    return [
        Seal(
            number=number,
            sealed_at=sealed_at,
            accounts=accounts,
            entries=entries,
            previous=bytes(previous).hex(),
            root=bytes(root).hex(),
        )
        for number, sealed_at, accounts, entries, previous, root in rows
    ]


class Sealer:
    """Makes seals, one a day if it runs; any number of replicas may."""

    def __init__(self, pool: Pool, *, interval_s: float = 600) -> None:
        self._pool = pool
        self._interval_s = interval_s

    async def seal(self) -> Seal | None:
        """Seal everything that is written; None where somebody else did it in this moment.

        Raises psycopg.Error where the journal has gaps: what is broken is not sealed.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT coalesce(max(number), 0) + 1 FROM seals")
            ((number,),) = await cursor.fetchall()
            after, is_last = _NIL, False
            while not is_last:
                cursor = await connection.execute(
                    "SELECT next_after, is_last FROM seal_page(%s, %s, %s)", (number, after, _PAGE)
                )
                page = await cursor.fetchone()
                if page is None:
                    return None
                after, is_last = page
            cursor = await connection.execute(
                "SELECT number, sealed_at, accounts, entries, previous, root FROM close_seal(%s)",
                (number,),
            )
            made = seals_of(await cursor.fetchall())
        return made[0] if made else None

    async def seal_daily(self) -> Seal | None:
        """Seal unless that was done today, which begins at midnight UTC."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT coalesce(max(sealed_at) < date_trunc('day', now(), 'UTC'), true) FROM seals"
            )
            ((is_due,),) = await cursor.fetchall()
        return await self.seal() if is_due else None

    async def seals(self) -> list[Seal]:
        """Read every seal, oldest first."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT number, sealed_at, accounts, entries, previous, root FROM seals"
                " ORDER BY number"
            )
            return seals_of(await cursor.fetchall())

    async def run(self) -> None:
        """Seal once a day until cancelled, at a random time so that replicas don't come at once."""
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                seal = await self.seal_daily()
            except CONNECTION_ERRORS as error:
                log.warning("not sealed", extra={"error": type(error).__name__})
            except psycopg.Error as error:
                log.critical("the journal can't be sealed", extra={"error": str(error)})
            else:
                if seal is not None:
                    log.info("sealed", extra={"seal": seal.number, "root": seal.root})
