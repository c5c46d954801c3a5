"""Accounts and virtual keys, as the database keeps them.

A key is 256 random bits; what is stored is their SHA-256, which needs no salt and no slow hash for
a secret that nobody can guess. The key itself is returned once, by `create_key`.
"""

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from proxy.db import Pool
from proxy.ids import uuid7

KEY_PREFIX = "sk-"
_SHOWN_CHARACTERS = 10


def hash_key(key: str) -> bytes:
    """SHA-256 of a virtual key, as stored."""
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is: an account by one of its keys, as the database last said."""

    account_id: UUID
    key_id: UUID
    tier: str
    # The account's version plus the key's: authorize_batch refuses a copy that is outdated.
    version: int
    allowed_models: list[str] | None
    key_status: str
    account_status: str
    expires_at: datetime | None
    is_expired: bool
    # Whether the account wants an SDK's own retry answered from the answers that are kept for it.
    replay_retries: bool
    # The account's id as text, for every request of the key.
    account_text: str = field(init=False)

    def __post_init__(self) -> None:
        """Write the id once."""
        object.__setattr__(self, "account_text", str(self.account_id))


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What a key may use; None for no limit. The budget is in nano-USD."""

    expires_at: datetime | None = None
    allowed_models: list[str] | None = None
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
    prefix: str


class Accounts:
    """Reads and writes accounts and keys. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create_account(
        self, *, name: str, tier: str, credit_limit_nanos: int, actor: str
    ) -> UUID:
        """Make an account with a balance of nothing."""
        account_id = uuid7()
        async with self._pool.connection() as connection:
            await connection.execute(
                "SELECT create_account(%s, %s, %s, %s, %s)",
                (account_id, name, tier, credit_limit_nanos, actor),
            )
        return account_id

    async def account(self, account_id: UUID) -> dict[str, Any] | None:
        """Read one account with its balance; None where there is none."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(
                "SELECT a.account_id, a.name, a.tier, a.status, a.created_at,"
                " a.replay_retries, b.posted,"
                " b.reserved, b.credit_limit FROM accounts AS a"
                " JOIN balances AS b ON a.account_id = b.account_id WHERE a.account_id = %s",
                (account_id,),
            )
            return await cursor.fetchone()

    async def accounts(self, *, before: UUID | None, limit: int) -> list[dict[str, Any]]:
        """Read accounts with their balances, newest first."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(
                "SELECT a.account_id, a.name, a.tier, a.status, a.created_at,"
                " a.replay_retries, b.posted,"
                " b.reserved, b.credit_limit FROM accounts AS a"
                " JOIN balances AS b ON a.account_id = b.account_id"
                " WHERE (%(before)s::uuid IS NULL OR a.account_id < %(before)s)"
                " ORDER BY a.account_id DESC LIMIT %(limit)s",
                {"before": before, "limit": limit},
            )
            return await cursor.fetchall()

    async def set_options(self, account_id: UUID, *, replay_retries: bool, actor: str) -> bool:
        """Change how an account is served, on every replica; False where there is no account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT set_account_options(%s, %s, %s, %s)",
                (account_id, replay_retries, uuid7(), actor),
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])

    async def create_key(
        self, account_id: UUID, *, name: str, limits: KeyLimits, actor: str
    ) -> NewKey | None:
        """Make a virtual key; None where there is no such open account."""
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        key_id = uuid7()
        prefix = secret[:_SHOWN_CHARACTERS]
        document: dict[str, object] = {
            "key_id": str(key_id),
            "name": name,
            "prefix": prefix,
            "expires_at": limits.expires_at.isoformat() if limits.expires_at else None,
            "allowed_models": limits.allowed_models,
            "requests_per_minute": limits.requests_per_minute,
            "tokens_per_minute": limits.tokens_per_minute,
            "max_concurrency": limits.max_concurrency,
            "budget": limits.budget,
            "budget_period": limits.budget_period,
        }
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT create_key(%s, %s, %s, %s)",
                (account_id, hash_key(secret), Jsonb(document), actor),
            )
            row = await cursor.fetchone()
        return NewKey(key_id, secret, prefix) if row is not None and row[0] else None

    async def keys(
        self, account_id: UUID, *, before: UUID | None, limit: int
    ) -> list[dict[str, Any]]:
        """Read an account's keys, newest first, without anything of the secret but its prefix."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(
                "SELECT key_id, name, prefix, status, created_at, revoked_at, expires_at,"
                " allowed_models, requests_per_minute, tokens_per_minute, max_concurrency,"
                " budget, budget_period FROM virtual_keys"
                " WHERE account_id = %(account_id)s"
                " AND (%(before)s::uuid IS NULL OR key_id < %(before)s)"
                " ORDER BY key_id DESC LIMIT %(limit)s",
                {"account_id": account_id, "before": before, "limit": limit},
            )
            return await cursor.fetchall()

    async def revoke_key(self, account_id: UUID, key_id: UUID, *, actor: str) -> bool:
        """Revoke a key, at once and on every replica; False where there is no such key."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT revoke_key(%s, %s, %s, %s)", (account_id, key_id, uuid7(), actor)
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])

    async def principal(self, key_hash: bytes) -> Principal | None:
        """Find whose key this is; None if unknown. Its status is for the caller to judge."""
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=class_row(Principal)) as cursor,
        ):
            await cursor.execute(
                "SELECT k.account_id, k.key_id, a.tier, a.version + k.version AS version,"
                " k.allowed_models, k.status AS key_status, a.status AS account_status,"
                " k.expires_at, coalesce(k.expires_at <= clock_timestamp(), false) AS is_expired,"
                " a.replay_retries"
                " FROM virtual_keys AS k JOIN accounts AS a ON k.account_id = a.account_id"
                " WHERE k.key_hash = %s",
                (key_hash,),
            )
            return await cursor.fetchone()
