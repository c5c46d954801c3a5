"""Keeps usage summed up by the hour; any number of replicas may, one works at a time.

What is rolled up when, and why that is exact, stands in schema.sql.
"""

import asyncio
import logging
import random
import time

from psycopg.rows import tuple_row

from proxy.db import CONNECTION_ERRORS, Pool

log = logging.getLogger(__name__)

_MARKS = 500
# A step takes a fraction of a second; more of them at once only where there is much to make up for.
_MAX_STEPS = 500


class Rollups:
    """Rolls up what is due, and again what changed."""

    def __init__(self, pool: Pool, *, interval_s: float = 60) -> None:
        self._pool = pool
        self._interval_s = interval_s

    async def step(self) -> str:
        """Roll up the next hour; returns what `roll_up_usage` says."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT roll_up_usage()")
            ((outcome,),) = await cursor.fetchall()
        return outcome

    async def refresh(self) -> int:
        """Roll up marked hours again; returns how many marks are gone."""
        total = 0
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=tuple_row) as cursor,
        ):
            while True:
                await cursor.execute("SELECT refresh_rollups(%s)", (_MARKS,))
                ((taken,),) = await cursor.fetchall()
                total += taken or 0
                if (taken or 0) < _MARKS:
                    return total

    async def catch_up(self) -> int:
        """Roll up all that is due; returns how many hours that were."""
        hours = 0
        while hours < _MAX_STEPS:
            outcome = await self.step()
            if outcome == "rolled":
                hours += 1
            elif outcome != "fenced":
                break
            elif hours:
                # What runs now may take a while: the next round looks again.
                break
        return hours

    async def run(self) -> None:
        """Do so until cancelled, at random times so that replicas don't come all at once."""
        while True:
            await asyncio.sleep(self._interval_s * random.uniform(0.5, 1.5))  # noqa: S311
            began = time.monotonic()
            try:
                hours, marks = await self.catch_up(), await self.refresh()
            except CONNECTION_ERRORS as error:
                log.warning("usage is not rolled up", extra={"error": type(error).__name__})
                continue
            if hours or marks:
                took = round(time.monotonic() - began, 3)
                log.info("usage rolled up", extra={"hours": hours, "marks": marks, "seconds": took})
