"""Settlements that the ledger did not take, posted by a human."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.audit import audit
from proxy.ids import uuid7
from proxy.spool import Spool
from tests.integration.money import Money, NewAccount, capture, void
from tests.integration.test_cli import Run, run

__all__ = ["run"]

Put = Callable[..., None]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def put(spool: Spool) -> Put:
    """Set settlements aside, as the service does."""

    def put(*settlements: dict[str, object]) -> None:
        for settlement in settlements:
            spool.set_aside(json.dumps(settlement).encode())

    return put


@pytest.fixture
def money(account: NewAccount) -> Money:
    made = account(funds=1000)
    made.one("SELECT publish_price_book('{}', 1000000, %s, 'test')", made.key_id)
    return made


def outcomes(document: dict[str, Any]) -> list[str]:
    return [row["outcome"] for row in document["data"]]


def test_what_was_set_aside_is_listed_and_posted_once(
    money: Money, put: Put, spool: Spool, run: Run, database_url: str
) -> None:
    assert run("rejected", "list", plain=True) == "none\n"
    first, second = money.request(500), money.request(500)
    put(capture(first, 1200, model_answered="m-2"), capture(second, 30))
    listed = run("rejected", "list")["data"]
    assert [(row["model"], row["price_usd"]) for row in listed] == [
        ("m-2", "0.0000012"),
        (None, "0.00000003"),
    ]

    assert outcomes(run("rejected", "post", str(second["request_id"]))) == ["charged"]
    assert outcomes(run("rejected", "post")) == ["charged"]
    assert run("rejected", "post")["data"] == []

    # More than there was: overdraft, as with every charge.
    assert money.balance() == (-230, 0, 230)
    assert spool.rejected() == 0
    row = money.usage(first)
    assert (row["status"], row["price"], row["resolution"]) == ("billed", 1200, "charge")
    ((detail,),) = money.all(
        "SELECT detail FROM audit_trail WHERE action = 'review.charge'"
        " AND detail ->> 'request_id' = %s",
        first["request_id"],
    )
    assert detail["reason"] == "the ledger was restored to before its hold"
    assert not [found for found in audit(database_url) if found.violations]


def test_what_was_begun_is_ended(money: Money, put: Put, run: Run) -> None:
    request = money.hold(0)
    money.settle(void(request, status="needs_review", review_reason="hold_missing"))
    put(capture(request, 30))
    assert outcomes(run("rejected", "post")) == ["charged"]
    assert money.balance() == (970, 0, 0)


def test_a_defect_that_was_mended_is_posted_like_any_other(
    money: Money, put: Put, spool: Spool, run: Run
) -> None:
    settled, open_, voided = money.hold(50), money.hold(50), money.hold(50)
    money.settle(capture(settled, 30))
    put(capture(settled, 30), capture(open_, 40), void(voided))
    assert outcomes(run("rejected", "post")) == ["already_captured", "captured", "voided"]
    assert (money.balance(), spool.rejected()) == ((930, 0, 0), 0)


def test_what_can_not_be_posted_stays_and_says_why(
    money: Money, account: NewAccount, put: Put, spool: Spool, run: Run
) -> None:
    keyless = account(funds=1000)
    names = (keyless.account_id, keyless.key_id, uuid7())
    keyless.one("SELECT revoke_key(%s, %s, %s, 'me')", *names)
    busy = account(funds=1000, max_concurrency=1)
    busy.hold(1)
    waived = money.hold(50)
    money.settle(void(waived))
    put(
        capture(money.hold(50), -5),
        capture(keyless.request(1), 1),
        capture(busy.request(1), 1),
        capture(waived, 1),
    )
    document = run("rejected", "post", code=1)
    assert outcomes(document) == ["refused", "no_key", "max_concurrency", "already_voided"]
    assert "violates check constraint" in document["data"][0]["detail"]
    assert spool.rejected() == 4


def test_looking_makes_nothing(run: Run, tmp_path: Path) -> None:
    assert run("rejected", "list")["data"] == []
    assert not (tmp_path / "spool").exists()


def test_what_is_given_up_is_dropped_by_its_name(
    money: Money, put: Put, spool: Spool, run: Run
) -> None:
    request, other = money.request(1), money.request(1)
    put(capture(request, 1), capture(other, 1))
    assert "was set aside" in run("rejected", "drop", str(money.key_id), code=1)
    assert len(run("rejected", "drop", str(request["request_id"]))["data"]) == 1
    (left,) = spool.rejected_payloads()
    assert msgspec.json.decode(left)["request_id"] == other["request_id"]
    spool.forget_rejected(b"{}")
    assert spool.rejected() == 1
