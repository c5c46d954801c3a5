"""Models and providers that operators have switched off, for every replica at once.

A copy is used without asking, and its version goes with each authorization: `authorize_batch`
answers `stale` to a copy that is outdated, as it does for keys. So the next call after a switch is
refused wherever it arrives, and nobody asks the database who need not.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from uuid import UUID

from proxy.db import CONNECTION_ERRORS, Pool, unavailable
from proxy.errors import PermissionDeniedError
from proxy.ids import uuid7


@dataclass(frozen=True, slots=True)
class Switch:
    """What is off: models of this name or pattern, or all of a provider."""

    switch_id: UUID
    kind: str
    pattern: str
    reason: str
    switched_by: str
    switched_at: datetime

    def covers(self, model: str, providers: Collection[str]) -> bool:
        """Whether it switches this model off; of several providers any one is enough."""
        if self.kind == "provider":
            return self.pattern in providers
        return fnmatchcase(model, self.pattern)


@dataclass(frozen=True, slots=True)
class Switched:
    """All that is off as of a version."""

    version: int = 0
    switches: tuple[Switch, ...] = ()

    def find(self, model: str, providers: Collection[str]) -> Switch | None:
        """The switch that turns this model off, if one does."""
        return next((each for each in self.switches if each.covers(model, providers)), None)

    def check(self, model: str, providers: Collection[str]) -> None:
        """Refuse a model that is off: PermissionDeniedError."""
        if self.find(model, providers) is not None:
            message = (
                f"The model {model!r} is switched off for now. GET /v1/models lists those that "
                "are on."
            )
            raise PermissionDeniedError(message, code="model_disabled", param="model")


class Switches:
    """Reads and writes the switches."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # As this process last read it.
        self.current = Switched()

    async def refresh(self) -> Switched:
        """Read what is off now; MeteringUnavailableError where the database is away."""
        try:
            async with self._pool.connection() as connection:
                cursor = await connection.execute(
                    "SELECT m.value, s.switch_id, s.kind, s.pattern, s.reason, s.switched_by,"
                    " s.switched_at FROM meta AS m LEFT JOIN model_switches AS s ON true"
                    " WHERE m.name = 'models_version' ORDER BY s.switch_id"
                )
                rows = await cursor.fetchall()
        except CONNECTION_ERRORS as error:
            raise unavailable() from error
        switches = tuple(Switch(*row[1:]) for row in rows if row[1] is not None)
        self.current = Switched(int(rows[0][0]), switches)
        return self.current

    async def switch_off(self, *, kind: str, pattern: str, reason: str, actor: str) -> UUID:
        """Switch models off; returns the switch that says so now, which may be an earlier one."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT switch_models_off(%s, %s, %s, %s, %s)",
                (uuid7(), kind, pattern, reason, actor),
            )
            row = await cursor.fetchone()
        if row is None:  # pragma: no cover - the function always answers a row
            msg = "switch_models_off answered no row"
            raise RuntimeError(msg)
        return row[0]

    async def switch_on(self, switch_id: UUID, *, actor: str) -> bool:
        """Take a switch back; False where there is none."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT switch_models_on(%s, %s, %s)", (switch_id, uuid7(), actor)
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])
