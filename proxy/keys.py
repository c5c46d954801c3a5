"""Virtual keys, as the database keeps them: made, changed, rotated and revoked.

A key is 256 random bits; what is stored is their SHA-256, which needs no salt and no slow hash for
a secret that nobody can guess. The key itself is returned once, by `create` and `rotate`.
"""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

import msgspec
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from proxy.accounts import KEY_PREFIX, hash_key
from proxy.db import Pool
from proxy.ids import uuid7

# How much of a key is stored in clear and shown, to tell it from others.
SHOWN_CHARACTERS = 10

Row = dict[str, Any]

_KEYS: LiteralString = (
    "SELECT k.account_id, k.key_id, k.name, k.prefix, k.status, k.role, k.project_id,"
    " k.created_at, k.expires_at, k.revoked_at, k.replaced_by, u.last_used_at, k.allowed_models,"
    " k.allowed_endpoints, k.allowed_networks::text[] AS allowed_networks,"
    " k.requests_per_minute, k.tokens_per_minute, k.max_concurrency, k.budget, k.budget_period,"
    " k.budget - c.reserved - CASE"
    " WHEN c.period = period_start(k.budget_period, clock_timestamp()) THEN c.spent ELSE 0"
    " END AS budget_left"
    " FROM virtual_keys AS k"
    " LEFT JOIN key_uses AS u ON k.account_id = u.account_id AND k.key_id = u.key_id"
    " LEFT JOIN scope_counters AS c ON k.account_id = c.account_id AND k.key_id = c.scope_id"
)


@dataclass(frozen=True, slots=True)
class KeySettings:
    """What a key is good for and what it may use; None for no limit. The budget is in nano-USD."""

    role: str = "inference"
    project_id: UUID | None = None
    expires_at: datetime | None = None
    allowed_models: list[str] | None = None
    allowed_endpoints: list[str] | None = None
    allowed_networks: list[str] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    budget: int | None = None
    budget_period: str = "total"


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; `secret` exists nowhere else."""

    key_id: UUID
    secret: str


@dataclass(frozen=True, slots=True)
class Rotated:
    """What came of a rotation: outcomes are those of `rotate_key`; the key where it was done."""

    outcome: str
    key: NewKey | None


class Keys:
    """Reads and writes keys. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create(
        self, account_id: UUID, *, name: str, settings: KeySettings, actor: str
    ) -> NewKey | None:
        """Make a key; None where there is no such open account, or no such active project of it."""
        made, prefix = _new_key()
        document = {
            "key_id": made.key_id,
            "name": name,
            "prefix": prefix,
            **asdict(settings),
        }
        is_made = await self._call(
            "SELECT create_key(%s, %s, %s, %s)",
            (account_id, hash_key(made.secret), _document(document), actor),
        )
        return made if is_made else None

    async def key(self, account_id: UUID, key_id: UUID) -> Row | None:
        """Read one key of an account; None where it has no such."""
        rows = await self._rows(
            _KEYS + " WHERE k.account_id = %(account_id)s AND k.key_id = %(key_id)s",
            {"account_id": account_id, "key_id": key_id},
        )
        return rows[0] if rows else None

    async def keys(
        self,
        account_id: UUID,
        *,
        project_id: UUID | None = None,
        before: UUID | None,
        limit: int,
    ) -> list[Row]:
        """Read an account's keys, newest first, without anything of the secret but its prefix."""
        return await self._rows(
            _KEYS + " WHERE k.account_id = %(account_id)s"
            " AND (%(project_id)s::uuid IS NULL OR k.project_id = %(project_id)s)"
            " AND (%(before)s::uuid IS NULL OR k.key_id < %(before)s)"
            " ORDER BY k.key_id DESC LIMIT %(limit)s",
            {"account_id": account_id, "project_id": project_id, "before": before, "limit": limit},
        )

    async def keys_of_all(
        self, *, prefix: str | None, status: str | None, before: UUID | None, limit: int
    ) -> list[Row]:
        """Read keys of all accounts, newest first: those that begin so, of this status."""
        query = _KEYS + (
            " WHERE (%(status)s::text IS NULL OR k.status = %(status)s) AND k.key_id < %(before)s"
        )
        if prefix is not None:
            # Keys are of A-Z, a-z, 0-9, - and _, all of which come before ~.
            query += ' AND k.prefix COLLATE "C" >= %(prefix)s'
            query += " AND k.prefix COLLATE \"C\" < %(prefix)s || '~'"
        return await self._rows(
            query + " ORDER BY k.key_id DESC LIMIT %(limit)s",
            {
                "status": status,
                "prefix": prefix,
                "before": before or UUID(int=2**128 - 1),
                "limit": limit,
            },
        )

    async def update(
        self, account_id: UUID, key_id: UUID, changes: Mapping[str, object], *, actor: str
    ) -> str:
        """Change what is named of a key's columns, on every replica; outcomes of `update_key`."""
        return await self._call(
            "SELECT update_key(%s, %s, %s, %s, %s)",
            (account_id, key_id, _document(changes), uuid7(), actor),
        )

    async def rotate(
        self, account_id: UUID, key_id: UUID, *, overlap_s: int, actor: str
    ) -> Rotated:
        """Put a new key in a key's place, which ends after so many seconds, or at once for 0."""
        made, prefix = _new_key()
        outcome: str = await self._call(
            "SELECT rotate_key(%s, %s, %s, %s, %s, %s, %s)",
            (account_id, key_id, made.key_id, hash_key(made.secret), prefix, overlap_s, actor),
        )
        return Rotated(outcome, made if outcome == "rotated" else None)

    async def revoke(self, account_id: UUID, key_id: UUID, *, actor: str) -> bool:
        """Revoke a key, at once and on every replica; False where there is no such key."""
        return await self._call(
            "SELECT revoke_key(%s, %s, %s, %s)", (account_id, key_id, uuid7(), actor)
        )

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


def _new_key() -> tuple[NewKey, str]:
    """Make a key, and what is shown of it."""
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    return NewKey(uuid7(), secret), secret[:SHOWN_CHARACTERS]


def _document(members: Mapping[str, object]) -> Jsonb:
    return Jsonb(members, dumps=msgspec.json.encode)
