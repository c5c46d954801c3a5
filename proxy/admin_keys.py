"""Admin keys, as the database keeps them: the SHA-256 of 256 random bits, as for virtual keys."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from proxy.db import Pool
from proxy.ids import uuid7

PREFIX = "tga-"
_SHOWN_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class AdminKey:
    """Whose key was sent; whether it still counts is for the caller to judge."""

    admin_key_id: UUID
    name: str
    role: str
    is_revoked: bool
    is_expired: bool


class AdminKeys:
    """Reads and writes admin keys. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def use(self, sent: bytes) -> AdminKey | None:
        """Find whose key this is, and write down that it was used; None for nobody's."""
        if not sent.startswith(PREFIX.encode()):
            return None
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(AdminKey)) as cursor,
        ):
            await cursor.execute(
                "SELECT admin_key_id, name, role, is_revoked, is_expired FROM use_admin_key(%s)",
                (hashlib.sha256(sent).digest(),),
            )
            return await cursor.fetchone()

    async def create(
        self, *, name: str, role: str, expires_at: datetime | None, actor: str
    ) -> tuple[UUID, str] | None:
        """Make a key; returns its id and its secret, which exists nowhere else.

        None where another key has the name.
        """
        secret = PREFIX + secrets.token_urlsafe(32)
        admin_key_id = uuid7()
        document = {
            "name": name,
            "role": role,
            "prefix": secret[:_SHOWN_CHARACTERS],
            "expires_at": expires_at.isoformat() if expires_at else None,
        }
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT create_admin_key(%s, %s, %s, %s)",
                (admin_key_id, hashlib.sha256(secret.encode()).digest(), Jsonb(document), actor),
            )
            row = await cursor.fetchone()
        return (admin_key_id, secret) if row is not None and row[0] else None

    async def list(self, *, before: UUID | None, limit: int) -> list[dict[str, Any]]:
        """Read keys, newest first; cursor: admin_key_id."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(
                "SELECT admin_key_id, prefix, name, role, created_at, created_by, expires_at,"
                " revoked_at, last_used_at FROM admin_keys"
                " WHERE (%(before)s::uuid IS NULL OR admin_key_id < %(before)s)"
                " ORDER BY admin_key_id DESC LIMIT %(limit)s",
                {"before": before, "limit": limit},
            )
            return await cursor.fetchall()

    async def revoke(self, admin_key_id: UUID, *, actor: str) -> bool:
        """Revoke a key, at once; False where there is none."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT revoke_admin_key(%s, %s, %s)", (admin_key_id, uuid7(), actor)
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])
