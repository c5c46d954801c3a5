"""What the witness inside LiteLLM tells the ledger: late truth, notes, and what is read for it."""

import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest

from proxy.accounts import Accounts
from proxy.db import Pool, make_pool
from proxy.ids import uuid7
from proxy.ledger import Ledger, WitnessNote
from proxy.reports import Reports
from tests.integration.money import Money, NewAccount, capture, void, wait_for_waiters

Request = dict[str, object]


def unknown_cost(money: Money, amount: int = 400, **changes: object) -> Request:
    """A request that ended uncharged because nobody knew its cost."""
    request = money.hold(amount)
    ending: dict[str, object] = {
        "status": "needs_review",
        "review_reason": "client_gone_cost_unknown",
        "model_answered": "m-2025",
        "input_tokens": 7,
        "cached_input_tokens": 5,
        "output_tokens": 2,
        "upstream_status": 200,
        "client_gone": True,
        "first_byte_ms": 3,
        "duration_ms": 4,
        "error_code": "client_gone",
        "answer_id": "chatcmpl-1",
        "service_tier": "flex",
        "rated_picos": 9,
    }
    assert money.settle(void(request, **(ending | changes))) == ["voided"]
    return request


def witness(request: Request, price: int, **changes: object) -> dict[str, object]:
    tokens = {"input_tokens": None, "output_tokens": None}
    return capture(request, price, cost_source="witness", **(tokens | changes))


def test_the_witness_brings_the_cost_of_a_void_for_review_once(account: NewAccount) -> None:
    money = account(funds=1000, budget=10_000)
    request = unknown_cost(money)
    assert money.settle(witness(request, 150)) == ["captured_late"]
    assert money.settle(witness(request, 150), void(request)) == ["already_captured"] * 2
    assert money.balance() == (850, 0, 0)
    assert money.kinds() == ["grant", "hold", "void", "late_capture"]
    assert money.one("SELECT sum(spent)::bigint FROM scope_counters") == (150,)
    row = money.usage(request)
    assert (row["status"], row["price"], row["cost_picos"], row["review_reason"]) == (
        "billed",
        150,
        75_000,
        None,
    )


def test_late_truth_keeps_what_the_row_knows_and_it_does_not_bring(account: NewAccount) -> None:
    money = account(funds=1000)
    request = unknown_cost(money)
    before = money.usage(request)
    money.settle(witness(request, 150))
    after = money.usage(request)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        *("settled_at", "status", "cost_picos", "cost_source", "price", "rounding_attos", "rule"),
        *("markup_ppm", "review_reason"),
    }


def test_usage_that_the_witness_brings_replaces_the_other_whole(account: NewAccount) -> None:
    money = account(funds=1000)
    request = unknown_cost(money)
    money.settle(witness(request, 150, input_tokens=3, output_tokens=4))
    row = money.usage(request)
    assert (row["input_tokens"], row["output_tokens"], row["cached_input_tokens"]) == (3, 4, None)
    assert row["model_answered"] == "m-2025"


def test_witness_may_charge_and_ask_for_a_review(account: NewAccount) -> None:
    money = account(funds=100)
    doubtful, dear = unknown_cost(money, 10), unknown_cost(money, 10)
    money.settle(witness(doubtful, 50, review_reason="cost_mismatch"), witness(dear, 150))
    assert money.usage(doubtful)["review_reason"] == "cost_mismatch"
    row = money.usage(dear)
    assert (row["review_reason"], row["overdraft"]) == ("overdraft", 100)
    assert money.balance() == (-100, 0, 100)


def test_fee_of_the_customers_own_key_comes_late_too_and_once(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(10, byok=True)
    money.settle(void(request, status="needs_review", review_reason="price_missing"))
    late = witness(request, 5, status="byok")
    assert money.settle(late, late) == ["captured_late", "already_captured"]
    assert money.usage(request)["status"] == "byok"


def test_nobody_but_the_witness_charges_what_was_voided(account: NewAccount) -> None:
    money = account(funds=1000)
    request = unknown_cost(money)
    for source in ("header", "usage", "rated", None):
        assert money.settle(capture(request, 150, cost_source=source)) == ["already_voided"]
    assert money.settle(void(request, cost_source="witness")) == ["already_voided"]
    assert money.balance() == (1000, 0, 0)


def test_the_witness_charges_nothing_that_was_decided(account: NewAccount) -> None:
    money = account(funds=1000)
    failed, billed, resolved = money.hold(100), money.hold(100), unknown_cost(money, 100)
    money.settle(void(failed), capture(billed, 10))
    money.connection.execute(
        "UPDATE usage SET resolved_at = now() WHERE request_id = %s",
        (str(resolved["request_id"]),),
    )
    answers = money.settle(*[witness(request, 150) for request in (failed, billed, resolved)])
    assert answers == ["already_voided", "already_captured", "already_voided"]
    assert money.settle(witness(money.request(1), 1)) == ["unknown"]
    assert money.balance() == (990, 0, 0)


def test_the_witness_knows_an_orphan_and_one_that_was_amended_to_a_review(
    account: NewAccount,
) -> None:
    money = account(funds=1000)
    orphan, amended = money.hold(100, ttl_s=0), money.hold(100, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    review = void(amended, status="needs_review", review_reason="price_missing")
    assert money.settle(review) == ["amended"]
    assert money.settle(capture(amended, 10)) == ["already_expired"]
    answers = money.settle(witness(orphan, 10), witness(amended, 10))
    assert answers == ["captured_late"] * 2
    assert money.balance() == (980, 0, 0)


def note(request: Request, cost_picos: int | None = 5, **changes: object) -> WitnessNote:
    account_id, request_id = UUID(str(request["account_id"])), UUID(str(request["request_id"]))
    values = {"attempts": 1, "mismatch": False} | changes
    return WitnessNote(account_id, request_id, cost_picos, **values)  # pyright: ignore[reportArgumentType]


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = make_pool(database_url)
    await pool.open()
    yield pool
    await pool.close()


@pytest.fixture
async def ledger(database_url: str, pool: Pool) -> AsyncIterator[Ledger]:
    ledger = Ledger(database_url, pool)
    yield ledger
    await ledger.close()


@pytest.mark.anyio
async def test_notes_stand_beside_usage_and_change_neither_price_nor_status(
    account: NewAccount, ledger: Ledger
) -> None:
    money = account(funds=1000)
    agreed, doubtful, pending = money.hold(100), money.hold(100), money.hold(100)
    reviewed = unknown_cost(money, 100)
    money.settle(capture(agreed, 10), capture(doubtful, 10))
    before = [money.usage(request) for request in (agreed, doubtful, reviewed)]
    noted = await ledger.note_witness(
        [
            note(pending),
            note(doubtful, 77, mismatch=True, attempts=3),
            note(agreed),
            note(reviewed, mismatch=True),
            note(money.request(1)),
        ]
    )
    assert noted == [False, True, True, True, False]
    after = [money.usage(request) for request in (agreed, doubtful, reviewed)]
    assert [
        {name: row[name] for name in row if row[name] != old[name]}
        for row, old in zip(after, before, strict=True)
    ] == [
        {"witness_picos": 5, "attempts": 1},
        {"witness_picos": 77, "attempts": 3, "review_reason": "witness_mismatch"},
        {"witness_picos": 5, "attempts": 1},
    ]
    assert money.balance() == (980, 100, 0)


@pytest.mark.anyio
async def test_later_notes_count_and_what_they_do_not_know_stays(
    account: NewAccount, ledger: Ledger
) -> None:
    money = account(funds=1000)
    request = money.hold(100)
    money.settle(capture(request, 10))
    assert await ledger.note_witness([note(request, 1), note(request, 2)]) == [True, True]
    assert money.usage(request)["witness_picos"] == 2
    await ledger.note_witness([note(request, None, attempts=None, mismatch=True)])
    row = money.usage(request)
    assert (row["witness_picos"], row["attempts"]) == (2, 1)
    assert row["review_reason"] == "witness_mismatch"
    money.connection.execute("UPDATE usage SET resolved_at = now()")
    await ledger.note_witness([note(request, 3, mismatch=True)])
    assert money.usage(request)["resolved_at"] is not None


@pytest.mark.parametrize("call", ["note_witness", "settle_batch"])
def test_notes_and_late_settlements_lock_rows_in_one_order(
    account: NewAccount, database_url: str, call: str
) -> None:
    money = account(funds=1000)
    first, second = unknown_cost(money, 10), unknown_cost(money, 10)
    batch = [{**witness(request, 1), "attempts": 1} for request in (second, first)]
    lock = "SELECT 1 FROM usage WHERE request_id = %s FOR UPDATE NOWAIT"
    client = Money(database_url)
    with ThreadPoolExecutor(1) as thread:
        with money.connection.transaction():
            money.all(lock, first["request_id"])
            told = thread.submit(client.all, f"SELECT outcome FROM {call}(%s)", json.dumps(batch))
            wait_for_waiters(money, 1)
            # It waits for the first row, and so must not have taken the second.
            money.all(lock, second["request_id"])
        assert {row[0] for row in told.result()} <= {"noted", "captured_late"}
    client.connection.close()


@pytest.mark.anyio
async def test_requests_are_read_by_their_keys_pending_ones_included(
    account: NewAccount, pool: Pool
) -> None:
    money, other = account(funds=1000), account(funds=1000)
    ended, pending, foreign = money.hold(100), money.hold(50), other.hold(7)
    money.settle(capture(ended, 10, answer_id="chatcmpl-1"))
    keys = [
        (money.account_id, UUID(str(request["request_id"])))
        for request in (ended, pending, foreign)
    ]
    rows = {row["request_id"]: row for row in await Reports(pool).requests(keys)}
    assert rows.keys() == {keys[0][1], keys[1][1]}
    assert (rows[keys[0][1]]["status"], rows[keys[0][1]]["answer_id"]) == ("billed", "chatcmpl-1")
    assert (rows[keys[1][1]]["status"], rows[keys[1][1]]["hold"]) == ("pending", 50)
    assert await Reports(pool).requests([]) == []


@pytest.mark.anyio
async def test_receipt_has_its_price_book_and_its_entries(account: NewAccount, pool: Pool) -> None:
    money = account(funds=1000)
    book = {"default": {"kind": "markup", "factor": "2"}}
    money.one("SELECT publish_price_book(%s, 1000000, %s, 'test')", json.dumps(book), uuid7())
    request, pending = money.hold(100), money.hold(9, price_version=7)
    money.settle(capture(request, 10))
    reports = Reports(pool)
    row = await reports.usage_row(money.account_id, UUID(str(request["request_id"])))
    assert row is not None
    assert (row["price"], row["document"], row["nanos_per_credit"]) == (10, book, 1_000_000)
    assert [
        (entry["phase"], entry["kind"], entry["amount"], entry["reserved_delta"])
        for entry in row["entries"]
    ] == [(0, "hold", 100, 100), (1, "capture", 10, -100)]
    assert row["created_at"] == row["entries"][0]["at"]
    assert row["settled_at"] == row["entries"][1]["at"]
    row = await reports.usage_row(money.account_id, UUID(str(pending["request_id"])))
    assert row is not None
    assert (row["status"], row["document"], len(row["entries"])) == ("pending", None, 1)
    assert await reports.usage_row(uuid7(), UUID(str(request["request_id"]))) is None


@pytest.mark.anyio
async def test_response_belongs_to_the_account_that_it_was_given_to(
    account: NewAccount, pool: Pool
) -> None:
    money, other = account(funds=1000), account()
    for endpoint in ("responses", "chat.completions"):
        request = money.hold(10, endpoint=endpoint)
        money.settle(capture(request, 1, answer_id=f"{endpoint}-1"))
    reports = Reports(pool)
    assert await reports.model_of_answer(money.account_id, "responses-1") is not None
    assert await reports.model_of_answer(other.account_id, "responses-1") is None
    assert await reports.model_of_answer(money.account_id, "chat.completions-1") is None
    plan = money.all(
        "EXPLAIN SELECT 1 FROM usage"
        " WHERE account_id = %s AND answer_id = 'x' AND endpoint = 'responses'",
        money.account_id,
    )
    assert "answer_id" in str(plan)


@pytest.mark.anyio
async def test_recent_output_is_the_average_of_what_was_charged(
    account: NewAccount, pool: Pool
) -> None:
    money = account(funds=100_000)
    reports = Reports(pool)
    assert await reports.recent_output_tokens(money.account_id, "m") is None
    for tokens in (1_000_000, *[10, 21] * 25):
        money.settle(capture(money.hold(10), 1, output_tokens=tokens))
    money.settle(capture(money.hold(10, model="other"), 1, output_tokens=500))
    money.settle(void(money.hold(10), output_tokens=9000))
    money.settle(capture(money.hold(10), 1, output_tokens=None))
    assert await reports.recent_output_tokens(money.account_id, "m") == 16
    assert await reports.recent_output_tokens(uuid7(), "m") is None


@pytest.mark.anyio
async def test_option_of_an_account_is_known_to_its_next_request(
    account: NewAccount, pool: Pool
) -> None:
    money = account(funds=100)
    accounts = Accounts(pool)
    ((key_hash,),) = money.all("SELECT key_hash FROM virtual_keys")
    before = await accounts.principal(key_hash)
    assert before is not None
    assert before.replay_retries
    for _ in range(2):  # the second changes nothing
        assert await accounts.set_options(money.account_id, replay_retries=False, actor="op")
    assert money.authorize(money.request(1)) == ["stale"]
    after = await accounts.principal(key_hash)
    assert after is not None
    assert (after.replay_retries, after.version) == (False, before.version + 1)
    assert money.authorize(money.request(1, version=after.version)) == ["held"]
    assert money.all(
        "SELECT actor, action, detail FROM audit_trail WHERE action LIKE %s", "account.o%"
    ) == [("op", "account.options", {"replay_retries": False})]
    assert not await accounts.set_options(uuid7(), replay_retries=False, actor="op")
