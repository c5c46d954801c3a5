"""Shorthands for driving the money functions over SQL."""

import json
import os
from collections.abc import Callable
from typing import Any
from uuid import UUID

import psycopg
import psycopg.rows

from proxy.ids import uuid7

Row = tuple[Any, ...]


class Money:
    """An account with a key, and the functions of schema.sql on it."""

    def __init__(self, url: str, *, funds: int = 0, **limits: object) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self.connection.execute("SET search_path = tallygate")
        self.account_id = uuid7()
        self.key_id = uuid7()
        self.version = 2
        self.one("SELECT create_account(%s, 'a', 'default', 0, 'test')", self.account_id)
        key = {"key_id": str(self.key_id), "name": "k", "prefix": "sk-", **limits}
        self.one(
            "SELECT create_key(%s, %s, %s, 'test')",
            self.account_id,
            os.urandom(32),
            json.dumps(key),
        )
        if funds:
            self.fund(funds)

    def all(self, query: str, *parameters: object) -> list[Row]:
        return self.connection.execute(query.encode(), parameters).fetchall()

    def one(self, query: str, *parameters: object) -> Row:
        (row,) = self.all(query, *parameters)
        return row

    def fund(self, amount: int, external_id: str = "first", kind: str = "grant") -> Row:
        return self.one(
            "SELECT * FROM fund(%s, %s, %s, %s, 'test', %s, 'why', 'tester')",
            self.account_id,
            uuid7(),
            kind,
            amount,
            external_id,
        )

    def fund_expiring(self, amount: int, external_id: str, in_s: float = 0) -> Row:
        """Grant credits that expire in so many seconds."""
        return self.one(
            "SELECT * FROM fund_expiring(%s, %s, %s, 'test', %s, 'why', 'tester',"
            " clock_timestamp() + make_interval(secs => %s))",
            self.account_id,
            uuid7(),
            amount,
            external_id,
            in_s,
        )

    def request(self, amount: int, **changes: object) -> dict[str, object]:
        return {
            "account_id": str(self.account_id),
            "request_id": str(uuid7()),
            "key_id": str(self.key_id),
            "version": self.version,
            "amount": amount,
            "tokens": 10,
            "ttl_s": 900,
            "endpoint": "chat.completions",
            "model": "m",
            "tier": "default",
            "streamed": False,
            "byok": False,
            "price_version": 1,
            **changes,
        }

    def authorize(self, *requests: dict[str, object]) -> list[str]:
        rows = self.all("SELECT outcome FROM authorize_batch(%s)", json.dumps(requests))
        return [row[0] for row in rows]

    def hold(self, amount: int, **changes: object) -> dict[str, object]:
        request = self.request(amount, **changes)
        # As a proxy would that knows what switches of models there are.
        (switches,) = self.one(
            "SELECT coalesce(max(value::integer), 0) FROM meta WHERE name = 'models_version'"
        )
        request["version"] = self.version + switches
        assert self.authorize(request) == ["held"]
        return request

    def settle(self, *settlements: dict[str, object], grace_s: int = 0) -> list[str]:
        rows = self.all(
            "SELECT outcome FROM settle_batch(%s, %s) ORDER BY ord",
            json.dumps(settlements),
            grace_s,
        )
        return [row[0] for row in rows]

    def balance(self) -> Row:
        """posted, reserved, overdraft."""
        return self.one(
            "SELECT posted, reserved, overdraft FROM balances WHERE account_id = %s",
            self.account_id,
        )

    def kinds(self) -> list[str]:
        """Kinds of the account's entries, in the order of their sequence."""
        rows = self.all(
            "SELECT kind, seq FROM entries WHERE account_id = %s ORDER BY seq", self.account_id
        )
        assert [row[1] for row in rows] == list(range(1, len(rows) + 1))
        return [row[0] for row in rows]

    def usage(self, request: dict[str, object]) -> dict[str, Any]:
        cursor = self.connection.cursor(row_factory=psycopg.rows.dict_row)
        cursor.execute(
            "SELECT * FROM usage WHERE request_id = %s", (UUID(str(request["request_id"])),)
        )
        row = cursor.fetchone()
        assert row is not None
        return row


NewAccount = Callable[..., Money]


def wait_for_waiters(money: Money, number: int) -> None:
    """Return once so many connections to this database wait for a lock."""
    while money.one(
        "SELECT count(*) < %s FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'",
        number,
    )[0]:
        # Inside a transaction the activity would be the same for ever.
        money.all("SELECT pg_stat_clear_snapshot()")


def capture(request: dict[str, object], price: int, **changes: object) -> dict[str, object]:
    return {
        "account_id": request["account_id"],
        "request_id": request["request_id"],
        "action": "capture",
        "status": "billed",
        "price": price,
        "input_tokens": 3,
        "output_tokens": 4,
        "cost_picos": price * 500,
        "cost_source": "header",
        "rounding_attos": 0,
        "rule": "default",
        "markup_ppm": 2_000_000,
        **changes,
    }


def void(request: dict[str, object], **changes: object) -> dict[str, object]:
    return {
        "account_id": request["account_id"],
        "request_id": request["request_id"],
        "action": "void",
        "status": "void",
        **changes,
    }
