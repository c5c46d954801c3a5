"""The audit names each invariant that is broken, and none where all is well."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest

from proxy.audit import INVARIANTS, MAX_EXAMPLES, Finding, audit
from tests.integration.money import Money, NewAccount, capture, void

BOOK = {
    "default": {"kind": "markup", "factor": "2.0", "byok_fee_percent": "10"},
    "rules": [
        {"model": "cheap", "kind": "markup", "factor": "0.5", "allow_loss": True},
        {
            "model": "tokens",
            "kind": "per_token",
            "credits": {"input": "1", "output": "2"},
            "allow_loss": True,
        },
    ],
}


@pytest.fixture
def ledger(database_url: str, account: NewAccount) -> Iterator[Money]:
    """A ledger in which everything that can happen has happened."""
    money = account(funds=1_000_000, max_concurrency=1000)
    money.one("SELECT freeze_nanos_per_credit(1000000)")
    money.one("SELECT publish_price_book(%s, 1000000, %s, 'test')", json.dumps(BOOK), uuid4())
    money.settle(capture(money.hold(1000), 600))
    money.settle(capture(money.hold(1000), 1500))
    money.settle(void(money.hold(1000)))
    money.settle(void(money.hold(1000), status="needs_review", review_reason="price_missing"))
    money.settle(capture(money.hold(10, model="cheap"), 1, markup_ppm=500_000, rule="rules[0]"))
    tokens = money.hold(20_000_000_000, model="tokens") if False else money.hold(5, model="tokens")
    money.settle(
        capture(
            tokens,
            3000,
            rule="rules[1]",
            markup_ppm=None,
            cost_picos=None,
            input_tokens=1,
            output_tokens=1,
        )
    )
    byok = money.hold(0, byok=True)
    money.settle(capture(byok, 5, status="byok", markup_ppm=None, cost_picos=50_000))
    late, orphan, amended = (money.hold(100, ttl_s=0) for _ in range(3))
    assert money.one("SELECT expire_holds(10, 0)") == (3,)
    assert money.settle(capture(late, 70), void(amended)) == ["captured_late", "amended"]
    assert orphan is not None
    money.hold(300)
    money.hold(400)
    money.fund(-500, "correction", "adjustment")
    # An account that is overdrawn, one whose keys have no limits, and one without a history.
    poor = account(funds=100)
    poor.settle(capture(poor.hold(100), 250))
    poor.hold(0)
    account()
    money.connection.execute("SET session_replication_role = replica")  # no triggers
    yield money


def broken(url: str) -> dict[str, Finding]:
    return {found.name: found for found in audit(url) if found.violations}
