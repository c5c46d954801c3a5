"""What Citus needs of the schema, read from a database's catalog and from its functions' text."""

import re
from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg

# Reached by account, on one shard each.
DISTRIBUTED = frozenset(
    {
        "accounts", "audit_trail", "balances", "carried_floors", "carried_seams", "carried_totals",
        "charges", "credit_allocations", "entries", "expiring_credits", "funding",
        "idempotency_keys", "key_uses", "open_holds", "projects", "recurring_charges",
        "scope_counters", "seal_points", "usage", "usage_active_days", "usage_dirty",
        "usage_rollups", "virtual_keys", "webhook_counts", "webhook_deliveries", "webhook_events",
        "webhook_lanes", "webhook_told",
    }
)  # fmt: skip
# On every node, because they are read beside accounts' rows and hardly ever written.
REFERENCE = {
    "meta": "views join it for what a credit is worth",
    "price_book_cancellations": "read with price_books",
    "price_books": "receipts and the audit read it beside usage",
    "seals": "checks of seals join it to seal_points",
    "usage_rollup_state": "summaries read it beside usage",
    "webhook_receivers": "what is pending is read beside it",
}
# On the coordinator alone: about the whole ledger, and joined to nothing.
LOCAL = {
    "admin_keys": "one row an operator",
    "audit_runs": "one row an audit",
    "detached_months": "one row a month",
    "model_switches": "a few rows, by operators",
    "monthly_walk": "one row",
    "price_book_drafts": "a few rows, by operators",
    "reconciliations": "one row a comparison with a provider",
    "usage_days": "sums over all accounts",
    "webhook_watch": "one row",
}
# Functions that look at all accounts, and why no request waits for them.
OVER_ALL_ACCOUNTS = {
    "expire_holds": "the sweeper: finds what is due, and hands it to settle_batch by account",
    "expire_credits": "the sweeper: finds what is due, and goes on by account",
    "grant_monthly_credits": "a walk over all accounts in pages; each gets its credits by itself",
    "purge_idempotency_keys": "the sweeper",
    "seal_page": "once a day, accounts in pages",
    "seal_content": "once a day",
    "close_seal": "once a day",
    "watch_page": "the watch for webhooks, accounts in pages",
    "claim_recurring_charges": "in the background: finds what is due",
    "claim_webhooks": "a receiver's events of all accounts; each is taken by account",
    "change_webhook": "by an operator: what is pending for a receiver",
    "delete_webhook": "by an operator: what is pending for a receiver",
    "replay_webhooks": "by an operator: events since a time",
    "purge_webhook_events": "the watch for webhooks",
    "retention_obstacle": "once a month, by an operator",
    "detach_month": "once a month, by an operator",
    "roll_up_usage": "once an hour; beside requests, not before them",
    "refresh_rollups": "a few hours of a few accounts, every minute",
    "sum_usage": "told the accounts by roll_up_usage and refresh_rollups",
    "put_rollups": "told the accounts by roll_up_usage and refresh_rollups",
    "publish_price_book": "writes the trail of the whole house, under the nil account",
}
# The only function that a trigger may call: it refuses, and looks at nothing.
REFUSAL = "refuse_change"

_RULES: dict[str, LiteralString] = {
    "is a table that nobody has decided about": """
        SELECT c.relname FROM pg_class AS c
        WHERE c.relnamespace = 'tallygate'::regnamespace AND c.relkind IN ('r', 'p')
            AND NOT c.relispartition AND c.relname <> ALL(%(known)s)
    """,
    "has no account_id that is there in every row": """
        SELECT t.name FROM unnest(%(distributed)s::text[]) AS t (name)
        WHERE NOT EXISTS (
            SELECT 1 FROM pg_attribute AS a
            WHERE a.attrelid = to_regclass('tallygate.' || quote_ident(t.name))
                AND a.attname = 'account_id' AND a.attnotnull AND a.atttypid = 'uuid'::regtype
        )
    """,
    "has a key that does not lead with account_id": """
        SELECT c.relname || ': ' || i.indexrelid::regclass::text
        FROM pg_index AS i INNER JOIN pg_class AS c ON i.indrelid = c.oid
        LEFT JOIN pg_attribute AS a ON c.oid = a.attrelid AND i.indkey[0] = a.attnum
        WHERE c.relnamespace = 'tallygate'::regnamespace AND c.relname = ANY(%(distributed)s)
            AND (i.indisunique OR i.indisexclusion)
            AND coalesce(a.attname <> 'account_id', true)
    """,
    "refers to another table": """
        SELECT conrelid::regclass::text || ': ' || conname FROM pg_constraint
        WHERE connamespace = 'tallygate'::regnamespace AND contype = 'f'
    """,
    "counts with a sequence": """
        SELECT c.relname FROM pg_class AS c
        WHERE c.relnamespace = 'tallygate'::regnamespace AND c.relkind = 'S'
        UNION ALL
        SELECT d.adrelid::regclass::text FROM pg_attrdef AS d
        INNER JOIN pg_class AS c ON d.adrelid = c.oid
        WHERE c.relnamespace = 'tallygate'::regnamespace
            AND pg_get_expr(d.adbin, d.adrelid) LIKE '%%nextval(%%'
    """,
    "has a trigger that may look elsewhere": """
        SELECT g.tgrelid::regclass::text || ': ' || g.tgname
        FROM pg_trigger AS g INNER JOIN pg_proc AS f ON g.tgfoid = f.oid
        INNER JOIN pg_class AS c ON g.tgrelid = c.oid
        WHERE c.relnamespace = 'tallygate'::regnamespace AND NOT g.tgisinternal
            AND (f.proname <> %(refusal)s OR f.prosrc ~* '\\m(select|perform|insert|from)\\M')
    """,
}


def breaches(connection: psycopg.Connection[Any]) -> list[str]:
    """Say what of the schema Citus could not distribute; empty where it can."""
    parameters = {
        "distributed": sorted(DISTRIBUTED),
        "known": sorted(DISTRIBUTED | REFERENCE.keys() | LOCAL.keys()),
        "refusal": REFUSAL,
    }
    return [
        f"{row[0]} {what}"
        for what, query in _RULES.items()
        for row in connection.execute(query, parameters)
    ] + [
        f"{name} does not say which account of {table} it is about: {statement}"
        for name, source in _functions(connection)
        if name not in OVER_ALL_ACCOUNTS
        for table, statement in statements_without_account(source)
    ]


def _functions(connection: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    return connection.execute(
        "SELECT proname::text, prosrc FROM pg_proc"
        " WHERE pronamespace = 'tallygate'::regnamespace AND prokind = 'f' AND prosrc <> ''"
    ).fetchall()


def statements_without_account(source: str) -> Iterator[tuple[str, str]]:
    """Yield tables and statements that read or change a distributed one over all its shards.

    Each table that a statement names must be held to an account that is known before it runs: a
    parameter or a variable, not the column of another table.
    """
    tables = "|".join(sorted(DISTRIBUTED))
    text = re.sub(r"--[^\n]*", "", source)
    for statement in text.split(";"):
        named = re.findall(
            rf"\b(?:FROM|JOIN|UPDATE|USING)\s+(?:tallygate\.)?({tables})\b(?:\s+AS\s+(\w+))?",
            statement,
        )
        for table, alias in named:
            name = alias or table
            told = re.findall(rf"\b{name}\.account_id = [pv]_\w+(?:\.account_id)?\b", statement)
            uses = sum((other_alias or other) == name for other, other_alias in named)
            if len(told) < uses:
                yield table, " ".join(statement.split())[:120]
