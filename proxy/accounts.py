"""Accounts, and whose a virtual key is, as the database keeps them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from types import MappingProxyType
from typing import Any
from uuid import UUID

import msgspec
from psycopg.rows import class_row, dict_row

from proxy.db import Pool
from proxy.ids import uuid7
from proxy.tiers import NO_TERMS, Tier

KEY_PREFIX = "sk-"
# What a key of each role is good for: to look at the account, to spend its money, to change it.
ROLES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "inference": frozenset({"read", "use"}),
        "read-only": frozenset({"read"}),
        "manage": frozenset({"read", "use", "manage"}),
    }
)


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
    role: str = "inference"
    project_id: UUID | None = None
    # Patterns of the names of endpoints, and where requests may come from; None for any.
    allowed_endpoints: list[str] | None = None
    allowed_networks: list[IPv4Network | IPv6Network] | None = None
    # What of the tier does not hold for this account, and the terms that come of both.
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    terms: Tier = NO_TERMS
    # The account's id as text, for every request of the key.
    account_text: str = field(init=False)

    def __post_init__(self) -> None:
        """Write the id once."""
        object.__setattr__(self, "account_text", str(self.account_id))

    def may(self, needs: str) -> bool:
        """Whether the key's role allows what a request needs."""
        return needs in ROLES[self.role]


class Accounts:
    """Reads and writes accounts. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def create_account(
        self,
        *,
        name: str,
        tier: str,
        credit_limit_nanos: int,
        actor: str,
        starter_nanos: int = 0,
        monthly_nanos: Mapping[str, int] | None = None,
    ) -> UUID:
        """Make an account with credits to start with, and this month's of its tier."""
        account_id = uuid7()
        monthly = msgspec.json.encode(monthly_nanos or {}).decode()
        async with self._pool.connection() as connection:
            await connection.execute(
                "SELECT open_account(%s, %s, %s, %s, %s, %s, %s)",
                (account_id, name, tier, credit_limit_nanos, actor, starter_nanos, monthly),
            )
        return account_id

    async def terms(self, account_id: UUID) -> tuple[str, dict[str, Any]] | None:
        """Read an account's tier and what it has otherwise; None where there is no account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT tier, overrides FROM accounts WHERE account_id = %s", (account_id,)
            )
            return await cursor.fetchone()

    async def set_tier(self, account_id: UUID, tier: str, *, actor: str) -> bool:
        """Change an account's tier, on every replica; False where there is no account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT set_account_tier(%s, %s, %s, %s)", (account_id, tier, uuid7(), actor)
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])

    async def set_overrides(
        self, account_id: UUID, overrides: Mapping[str, Any], *, actor: str
    ) -> bool:
        """Replace what an account has otherwise than its tier; False where there is no account."""
        document = msgspec.json.encode(overrides).decode()
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT set_account_overrides(%s, %s, %s, %s)",
                (account_id, document, uuid7(), actor),
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])

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

    async def set_options(self, account_id: UUID, *, replay_retries: bool, actor: str) -> bool:
        """Change how an account is served, on every replica; False where there is no account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT set_account_options(%s, %s, %s, %s)",
                (account_id, replay_retries, uuid7(), actor),
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])

    async def low_balance(self, account_id: UUID) -> int | None:
        """Read below what the account's balance is low, in nano-USD; None where that is not set."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT low_balance_threshold FROM accounts WHERE account_id = %s", (account_id,)
            )
            row = await cursor.fetchone()
        return None if row is None else row[0]

    async def set_low_balance(
        self, account_id: UUID, threshold_nanos: int | None, *, actor: str
    ) -> bool:
        """Set it, or None for nothing; False where there is no such account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT set_low_balance(%s, %s, %s, %s)",
                (account_id, threshold_nanos, uuid7(), actor),
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
                " a.replay_retries, k.role, k.project_id, k.allowed_endpoints, k.allowed_networks,"
                " a.overrides"
                " FROM virtual_keys AS k JOIN accounts AS a ON k.account_id = a.account_id"
                " WHERE k.key_hash = %s",
                (key_hash,),
            )
            return await cursor.fetchone()
