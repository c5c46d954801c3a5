"""The judge finds what is wrong: one discrepancy at a time, on a ledger made by hand."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy.ids import uuid7
from tests.chaos.accounts import Account
from tests.chaos.journal import Journal
from tests.chaos.script import answer_id, price_nanos
from tests.chaos.verdict import Judge, Verdict

FUNDS = 1_000_000
COST_PICOS = 50_000_000
PRICE = price_nanos(COST_PICOS)


@dataclass
class Court:
    """A ledger with one account, and what everybody says of its requests."""

    url: str
    home: Path
    account: Account

    def sql(self, query: str, *parameters: object) -> None:
        with psycopg.connect(self.url) as connection:
            connection.execute("SET search_path = tallygate")
            connection.execute(query.encode(), parameters)

    def hold(self, request_id: str, *, ttl_s: int = 60) -> None:
        request = {
            "account_id": str(self.account.account_id),
            "request_id": request_id,
            "key_id": str(self.account.key_id),
            "version": 2,
            "amount": 2 * PRICE,
            "tokens": 1,
            "ttl_s": ttl_s,
            "endpoint": "chat.completions",
            "model": "chaos",
            "tier": "default",
            "streamed": False,
            "byok": False,
            "price_version": 1,
        }
        self.sql("SELECT authorize_batch(%s)", json.dumps([request]))

    def settle(self, request_id: str, nonce: str, **changes: object) -> None:
        settlement = {
            "account_id": str(self.account.account_id),
            "request_id": request_id,
            "action": "capture",
            "status": "billed",
            "price": PRICE,
            "cost_picos": COST_PICOS,
            "cost_source": "header",
            "rounding_attos": 0,
            "rule": "default",
            "markup_ppm": 2_000_000,
            "answer_id": answer_id(nonce),
            **changes,
        }
        self.sql("SELECT settle_batch(%s)", json.dumps([settlement]))

    def provider_says(self, request_id: str, nonce: str, cost: int = COST_PICOS) -> None:
        journal = Journal(self.home / "provider.jsonl")
        journal.write(event="begun", id=request_id, nonce=nonce, cost=cost)
        journal.close()

    def customer_says(self, request_id: str, nonce: str, **changes: object) -> None:
        told: dict[str, Any] = {
            "kind": "chat",
            "nonce": nonce,
            "status": 200,
            "id": request_id,
            "replay_of": None,
            "charge": PRICE,
            "whole": True,
            "error": None,
            **changes,
        }
        journal = Journal(self.home / "customers.jsonl")
        journal.write(**told)
        journal.close()

    def answer(self, nonce: str = "n") -> str:
        """Have one request answered and charged, and everybody agree on it."""
        request_id = str(uuid7())
        self.hold(request_id)
        self.provider_says(request_id, nonce)
        self.settle(request_id, nonce)
        self.customer_says(request_id, nonce)
        return request_id

    def orphan(self, nonce: str = "n") -> str:
        """Have a request reach the provider, and its hold expire."""
        request_id = str(uuid7())
        self.hold(request_id, ttl_s=0)
        self.provider_says(request_id, nonce)
        self.sql("SELECT expire_holds(10, 0)")
        return request_id

    def judge(self) -> Verdict:
        judge = Judge(self.url, [self.account], self.home / "provider.jsonl", [self.home / "spool"])
        return judge.judge([self.home / "customers.jsonl"])


@pytest.fixture
def court(database_url: str, tmp_path: Path) -> Court:
    account = Account(database_url, "rich")
    account.fund(FUNDS)
    (tmp_path / "spool").mkdir()
    court = Court(database_url, tmp_path, account)
    book = '{"default": {"kind": "markup", "factor": "2.0"}}'
    court.sql("SELECT publish_price_book(%s, 1000000, %s, 'test')", book, uuid7())
    return court


def test_what_everybody_agrees_on_is_clean(court: Court) -> None:
    court.answer()
    verdict = court.judge()
    assert verdict.failings == []
    assert verdict.acknowledged == 1


def never_settled(court: Court) -> None:
    court.customer_says(court.orphan(), "n")


def never_held(court: Court) -> None:
    court.customer_says(str(uuid7()), "n")


def reached_the_provider_without_a_hold(court: Court) -> None:
    court.provider_says(str(uuid7()), "n")


def voided(court: Court) -> None:
    request_id = str(uuid7())
    court.hold(request_id)
    court.provider_says(request_id, "n")
    court.settle(request_id, "n", action="void", status="void", price=None, error_code="e")
    court.customer_says(request_id, "n")


@pytest.mark.parametrize(
    "lose", [never_settled, never_held, reached_the_provider_without_a_hold, voided]
)
def test_answer_that_is_not_charged_is_lost(court: Court, lose: Callable[[Court], None]) -> None:
    court.answer("before")
    lose(court)
    verdict = court.judge()
    assert len(verdict.lost) == 1
    assert verdict.doubled + verdict.overspent + verdict.wrong == []


def charged_again(court: Court) -> None:
    request_id = str(uuid7())
    court.hold(request_id)
    court.provider_says(request_id, "n")
    court.settle(request_id, "n")


def charged_although_refused(court: Court) -> None:
    request_id = str(uuid7())
    court.hold(request_id)
    court.provider_says(request_id, "other")
    court.settle(request_id, "other")
    court.customer_says(request_id, "other", status=503, whole=False, charge=None)


def charged_for_nothing(court: Court) -> None:
    request_id = str(uuid7())
    court.hold(request_id)
    court.settle(request_id, "nobody's")


@pytest.mark.parametrize("double", [charged_again, charged_although_refused, charged_for_nothing])
def test_charge_without_an_answer_of_its_own_is_doubled(
    court: Court, double: Callable[[Court], None]
) -> None:
    court.answer("n")
    double(court)
    verdict = court.judge()
    assert len(verdict.doubled) == 1
    assert verdict.lost + verdict.overspent + verdict.wrong == []


def test_second_entry_for_a_request_is_doubled(court: Court) -> None:
    request_id = court.answer()
    court.sql(
        "INSERT INTO entries SELECT account_id, request_id, 2, 'late_capture', seq + 1, amount,"
        " -amount, 0, posted_after - amount, reserved_after, NULL, NULL, at FROM entries"
        " WHERE request_id = %s AND phase = 1",
        request_id,
    )
    court.sql("UPDATE balances SET posted = posted - %s, seq = seq + 1", PRICE)
    verdict = court.judge()
    assert len(verdict.doubled) == 1
    assert "must have" in " ".join(verdict.wrong)


def test_hold_beyond_what_is_left_is_overspent(court: Court) -> None:
    request_id = court.answer()
    court.sql("ALTER TABLE entries DISABLE TRIGGER USER")
    court.sql("UPDATE entries SET posted_after = 1 WHERE request_id = %s", request_id)
    (overspent,) = court.judge().overspent
    assert overspent.startswith(request_id)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"charge": PRICE + 1}, f"told {PRICE + 1}, charged {PRICE}"),
        ({"kind": "byok"}, "answered, and billed"),
    ],
)
def test_customer_who_was_told_something_else_is_wronged(
    court: Court, changes: dict[str, object], found: str
) -> None:
    request_id = court.answer()
    court.customer_says(request_id, "n", **changes)
    (wrong,) = court.judge().wrong
    assert wrong.endswith(found)


def test_price_that_does_not_follow_from_the_cost_is_wrong(court: Court) -> None:
    court.answer()
    court.provider_says("", "n", cost=COST_PICOS + 1_000)
    (wrong,) = court.judge().wrong
    assert wrong.endswith(f"charged {PRICE}")


def test_hold_that_is_left_is_wrong_and_told_once(court: Court) -> None:
    court.hold(str(uuid7()))
    judge = Judge(court.url, [court.account], court.home / "none", [])
    assert any("is left" in wrong for wrong in judge.judge([]).wrong)
    assert judge.judge([]).failings == []


def test_settlement_that_was_set_aside_is_wrong(court: Court) -> None:
    court.answer()
    (court.home / "spool" / "rejected.jsonl").write_text("{}\n")
    (wrong,) = court.judge().wrong
    assert wrong.endswith("set aside")


def test_answer_that_is_given_again_may_wait_for_review(court: Court) -> None:
    court.customer_says(str(uuid7()), "n", replay_of=court.orphan(), charge=None)
    verdict = court.judge()
    assert verdict.failings == []
    assert verdict.told == {"answered again": 1}
