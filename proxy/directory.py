"""Accounts as operators look them up, and what their standing is.

A search looks at a bounded number of accounts, whatever it is for, and says where it came to: a
page may hold fewer rows than were asked for, none even, and have another behind it. Names of three
letters and more, and the prefixes of keys, are found by their indexes first.
"""

from dataclasses import dataclass
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import dict_row

from proxy.db import Pool
from proxy.ids import uuid7

Row = dict[str, Any]

# How many accounts a page of a search looks at: some 20 ms of PostgreSQL's time.
_SCANNED_ACCOUNTS = 10_000
# From so many on, the index of names knows them.
_INDEXED_LETTERS = 3
_LAST_UUID = UUID(int=2**128 - 1)

# A name is compared as its index has it: in small letters.
_SEARCH: LiteralString = (
    "WITH looked_at AS MATERIALIZED (SELECT a.* FROM accounts AS a"
    " WHERE a.account_id < %(before)s"
    " AND (NOT %(by_name)s OR a.account_id = ANY(ARRAY(SELECT n.account_id FROM accounts AS n"
    " WHERE name_trigrams(n.name) @> name_trigrams(%(name)s))))"
    " AND (%(key_prefix)s::text IS NULL OR a.account_id = ANY(ARRAY(SELECT k.account_id"
    ' FROM virtual_keys AS k WHERE k.prefix COLLATE "C" = %(key_prefix)s)))'
    " ORDER BY a.account_id DESC LIMIT %(scanned)s),"
    " found AS (SELECT a.account_id, a.name, a.tier, a.status, a.created_at, a.replay_retries,"
    " b.posted, b.reserved, b.credit_limit FROM looked_at AS a"
    " JOIN balances AS b ON a.account_id = b.account_id"
    " WHERE (%(name)s::text IS NULL OR strpos(lower(a.name), lower(%(name)s)) > 0)"
    " AND (%(tier)s::text IS NULL OR a.tier = %(tier)s)"
    " AND (%(status)s::text IS NULL OR a.status = %(status)s)"
    " AND (%(min_balance)s::bigint IS NULL OR b.posted >= %(min_balance)s)"
    " AND (%(max_balance)s::bigint IS NULL OR b.posted <= %(max_balance)s)"
    " ORDER BY a.account_id DESC LIMIT %(limit)s)"
    " SELECT f.*, e.scanned, e.last_account_id"
    " FROM (SELECT count(*) AS scanned, (array_agg(l.account_id ORDER BY l.account_id))[1]"
    " AS last_account_id FROM looked_at AS l) AS e"
    " LEFT JOIN found AS f ON true ORDER BY f.account_id DESC"
)


@dataclass(frozen=True, slots=True)
class AccountFilter:
    """Which accounts to find; None for any. Balances are posted, in nano-USD, ends included."""

    # Some of the name's letters, small or not.
    name: str | None = None
    tier: str | None = None
    status: str | None = None
    # As it is shown: the first characters of a key.
    key_prefix: str | None = None
    min_balance: int | None = None
    max_balance: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Accounts of a search, and behind which one it goes on where there was more to look at."""

    rows: list[Row]
    goes_on_before: UUID | None


class Directory:
    """Finds accounts, tells of them, and changes their standing."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def search(self, wanted: AccountFilter, *, before: UUID | None, limit: int) -> Found:
        """Find accounts with their balances, newest first: at most `limit` of them."""
        # What many names have in them is found sooner among the newest accounts than by its index.
        found = await self._search(wanted, before=before, limit=limit, by_name=False)
        if (
            found.goes_on_before is None
            or len(found.rows) >= limit
            or len((wanted.name or "").lower()) < _INDEXED_LETTERS
        ):
            return found
        return await self._search(wanted, before=before, limit=limit, by_name=True)

    async def _search(
        self, wanted: AccountFilter, *, before: UUID | None, limit: int, by_name: bool
    ) -> Found:
        is_any = wanted == AccountFilter()
        scanned = limit if is_any else _SCANNED_ACCOUNTS
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            # Planned each time, by what is asked for: a plan for all questions would use no index.
            await cursor.execute(
                _SEARCH,
                {
                    "before": before or _LAST_UUID,
                    "name": wanted.name,
                    "tier": wanted.tier,
                    "status": wanted.status,
                    "key_prefix": wanted.key_prefix,
                    "min_balance": wanted.min_balance,
                    "max_balance": wanted.max_balance,
                    "by_name": by_name,
                    "scanned": scanned,
                    "limit": limit,
                },
                prepare=False,
            )
            rows = await cursor.fetchall()
        has_more = not is_any and rows[0]["scanned"] == scanned
        return Found(
            [row for row in rows if row["account_id"] is not None],
            rows[0]["last_account_id"] if has_more else None,
        )

    async def detail(self, account_id: UUID) -> Row | None:
        """Read what else there is to know of an account; None where there is none.

        `last_request_at` is when its newest request began; `status_reason` why it was suspended or
        closed.
        """
        async with (
            self._pool.connection() as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            await cursor.execute(
                "SELECT a.overrides,"
                " (SELECT count(*) FROM virtual_keys AS k WHERE k.account_id = a.account_id"
                " AND k.status = 'active') AS active_keys,"
                " (SELECT count(*) FROM virtual_keys AS k WHERE k.account_id = a.account_id)"
                " AS all_keys,"
                " greatest((SELECT u.created_at FROM usage AS u WHERE u.account_id = a.account_id"
                " ORDER BY u.request_id DESC LIMIT 1), (SELECT max(h.created_at)"
                " FROM open_holds AS h WHERE h.account_id = a.account_id)) AS last_request_at,"
                " CASE WHEN a.status <> 'active' THEN (SELECT t.detail ->> 'reason'"
                " FROM audit_trail AS t WHERE t.account_id = a.account_id"
                " AND t.action IN ('account.suspend', 'account.close')"
                " ORDER BY t.event_id DESC LIMIT 1) END AS status_reason"
                " FROM accounts AS a WHERE a.account_id = %s",
                (account_id,),
            )
            return await cursor.fetchone()

    async def set_status(
        self, account_id: UUID, status: str, *, reason: str | None, actor: str
    ) -> str | None:
        """Suspend, resume or close an account, on every replica at once.

        Returns what `set_account_status` answers; None where there is no such account.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT set_account_status(%s, %s, %s, %s, %s)",
                (account_id, status, reason, uuid7(), actor),
            )
            row = await cursor.fetchone()
        return None if row is None else row[0]

    async def rename(self, account_id: UUID, name: str, *, actor: str) -> bool:
        """Give an account another name; False where there is none."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT rename_account(%s, %s, %s, %s)", (account_id, name, uuid7(), actor)
            )
            row = await cursor.fetchone()
        return row is not None and bool(row[0])
