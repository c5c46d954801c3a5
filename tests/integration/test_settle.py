"""settle_batch, expire_holds, fund: every hold ends once, and money adds up."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from proxy.ids import uuid7
from tests.integration.money import Money, NewAccount, capture, void, wait_for_waiters


def test_capture_takes_the_price_and_frees_the_hold(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    assert money.settle(capture(request, 150)) == ["captured"]
    assert money.balance() == (850, 0, 0)
    row = money.usage(request)
    assert (row["status"], row["price"], row["cost_picos"], row["hold"]) == (
        "billed",
        150,
        75_000,
        400,
    )


def test_void_frees_the_hold_and_charges_nothing(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    assert money.settle(void(request, error_code="upstream_error")) == ["voided"]
    assert money.balance() == (1000, 0, 0)
    assert money.usage(request)["price"] is None


def test_settling_again_changes_nothing(account: NewAccount) -> None:
    money = account(funds=1000)
    captured, voided = money.hold(400), money.hold(100)
    money.settle(capture(captured, 150), void(voided))
    assert money.settle(capture(captured, 150), void(captured)) == ["already_captured"] * 2
    assert money.settle(capture(voided, 9), void(voided)) == ["already_voided"] * 2
    assert money.balance() == (850, 0, 0)


def test_a_batch_that_settles_one_request_twice_settles_it_once(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    assert money.settle(capture(request, 150), void(request)) == ["captured", "already_captured"]
    assert money.balance() == (850, 0, 0)


def test_unknown_hold_is_said_to_be_unknown(account: NewAccount) -> None:
    money = account(funds=1000)
    assert money.settle(capture(money.request(1), 1)) == ["unknown"]
    assert money.balance() == (1000, 0, 0)


def test_capture_beyond_the_hold_takes_from_what_is_available(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(100)
    money.settle(capture(request, 700))
    assert money.balance() == (300, 0, 0)
    assert money.usage(request)["review_reason"] is None


def test_capture_beyond_everything_is_booked_as_overdraft(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(100)
    assert money.settle(capture(request, 1500)) == ["captured"]
    assert money.balance() == (-500, 0, 500)
    row = money.usage(request)
    assert (row["status"], row["overdraft"], row["review_reason"]) == ("billed", 500, "overdraft")
    assert money.authorize(money.request(1)) == ["insufficient_credits"]


def test_overdraft_is_cleared_by_the_next_deposit(account: NewAccount) -> None:
    money = account(funds=1000)
    money.settle(capture(money.hold(100), 1500))
    money.fund(600, "second", "deposit")
    assert money.balance() == (100, 0, 0)
    assert money.authorize(money.request(100)) == ["held"]


def test_overdue_hold_expires_uncharged_and_asks_for_review(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400, ttl_s=0)
    assert money.one("SELECT expire_holds(10, 0)") == (1,)
    assert money.balance() == (1000, 0, 0)
    row = money.usage(request)
    assert (row["status"], row["review_reason"], row["price"]) == ("needs_review", "orphaned", None)
    assert money.one("SELECT expire_holds(10, 0)") == (0,)


def test_live_hold_is_not_expired_and_neither_is_one_within_its_grace(account: NewAccount) -> None:
    money = account(funds=1000)
    money.hold(400)
    money.hold(400, ttl_s=0)
    assert money.one("SELECT expire_holds(10, 60)") == (0,)


def test_heartbeat_saves_a_hold_that_the_sweeper_has_chosen(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400, ttl_s=0)
    money.one("SELECT extend_holds(%s, %s, 900)", [money.account_id], [str(request["request_id"])])
    expiry = {
        "account_id": request["account_id"],
        "request_id": request["request_id"],
        "action": "expire",
    }
    assert money.settle(expiry) == ["not_due"]
    assert money.balance() == (1000, 400, 0)


def test_late_capture_is_charged_once_after_expiry(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    assert money.settle(capture(request, 150)) == ["captured_late"]
    assert money.settle(capture(request, 150)) == ["already_captured"]
    assert money.settle(void(request)) == ["already_captured"]
    assert money.balance() == (850, 0, 0)
    assert money.kinds() == ["grant", "hold", "expire", "late_capture"]
    row = money.usage(request)
    assert (row["status"], row["price"], row["review_reason"]) == ("billed", 150, None)


def test_late_capture_beyond_the_balance_is_overdraft(account: NewAccount) -> None:
    money = account(funds=100)
    request = money.hold(100, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    money.settle(capture(request, 150))
    assert money.balance() == (-50, 0, 50)
    assert money.usage(request)["review_reason"] == "overdraft"


def test_late_void_amends_the_orphan_without_an_entry(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    assert money.settle(void(request)) == ["amended"]
    assert money.settle(void(request)) == ["already_expired"]
    assert money.kinds() == ["grant", "hold", "expire"]


def test_hold_that_has_ended_does_not_expire(account: NewAccount) -> None:
    money = account(funds=1000)
    expired, captured, voided = (money.hold(10, ttl_s=0) for _ in range(3))
    money.settle(capture(captured, 5), void(voided))
    money.one("SELECT expire_holds(10, 0)")
    expiries = [void(request, action="expire") for request in (expired, captured, voided)]
    assert money.settle(*expiries) == ["already_expired", "already_captured", "already_voided"]


def test_late_capture_does_not_overrule_an_operator(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    money.connection.execute("UPDATE usage SET resolved_at = now()")
    assert money.settle(capture(request, 150)) == ["already_expired"]
    assert money.balance() == (1000, 0, 0)


@pytest.mark.parametrize("function", ["authorize_batch", "settle_batch"])
def test_batches_lock_balances_in_one_order(account: NewAccount, function: str) -> None:
    first, second = sorted((account(funds=100), account(funds=100)), key=lambda m: m.account_id)
    batch = [money.request(1) for money in (second, first)]
    if function == "settle_batch":
        batch = [capture(money.hold(1), 1) for money in (second, first)]
    lock = "SELECT 1 FROM balances WHERE account_id = %s FOR NO KEY UPDATE NOWAIT"
    with ThreadPoolExecutor(1) as thread:
        with first.connection.transaction():
            first.one(lock, first.account_id)
            call = f"SELECT outcome FROM {function}(%s)"
            told = thread.submit(second.all, call, json.dumps(batch))
            wait_for_waiters(first, 1)
            # It waits for the first of them, and so must not have taken the second.
            first.one(lock, second.account_id)
        assert {row[0] for row in told.result()} <= {"held", "captured"}


@pytest.mark.parametrize("function", ["authorize_batch", "settle_batch", "fund"])
def test_whoever_waited_sees_what_was_committed_meanwhile(
    account: NewAccount, database_url: str, function: str
) -> None:
    money = account(funds=100)
    asked = json.dumps([money.request(40)])
    ends = [json.dumps([capture(money.hold(10), price)]) for price in (7, 8)]
    payment = [(money.account_id, uuid7(), "grant", 5, "test", "p", "why", "me") for _ in "12"]
    # The same request and the same payment twice, and two requests of one account.
    calls: dict[str, tuple[str, Sequence[object], Sequence[object], str]] = {
        "authorize_batch": ("(%s)", [asked], [asked], "exists"),
        "settle_batch": ("(%s)", ends[:1], ends[1:], "captured"),
        "fund": ("(%s, %s, %s, %s, %s, %s, %s, %s)", payment[0], payment[1], "exists"),
    }
    parameters, first, second, outcome = calls[function]
    query = f"SELECT outcome FROM {function}{parameters}"
    client = Money(database_url)
    with ThreadPoolExecutor(1) as thread:
        with money.connection.transaction():
            money.all(query, *first)
            told = thread.submit(client.all, query, *second)
            wait_for_waiters(money, 1)
        assert told.result() == [(outcome,)]
    client.connection.close()
    money.kinds()  # and that they are numbered without a gap


def test_unknown_cost_is_a_state_and_never_a_price_of_zero(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    with pytest.raises(psycopg.errors.CheckViolation, match="usage_billed_has_price"):
        money.settle(void(request, status="billed"))
    money.settle(void(request, status="needs_review", review_reason="price_missing"))
    assert money.usage(request)["price"] is None


def test_price_stands_while_its_cost_is_in_doubt(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    assert money.settle(capture(request, 150, review_reason="cost_mismatch")) == ["captured"]
    row = money.usage(request)
    assert (row["status"], row["price"], row["review_reason"]) == ("billed", 150, "cost_mismatch")
    assert money.balance() == (850, 0, 0)


WHAT_WAS_USED = {
    "input_characters": 11,
    "audio_ms": 12,
    "queries": 13,
    "service_tier": "flex",
    "rated_picos": 14,
    "answer_id": "resp_1",
}


def test_whatever_was_used_is_written_down(account: NewAccount) -> None:
    money = account(funds=1000)
    in_time, late = money.hold(400), money.hold(400, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    money.settle(capture(in_time, 150, **WHAT_WAS_USED), capture(late, 150, **WHAT_WAS_USED))
    for request in (in_time, late):
        row = money.usage(request)
        assert {name: row[name] for name in WHAT_WAS_USED} == WHAT_WAS_USED
        assert (row["attempts"], row["witness_picos"]) == (None, None)
        (shown,) = money.all(
            "SELECT to_jsonb(h) = to_jsonb(u) FROM usage_history AS h JOIN usage AS u"
            " USING (request_id) WHERE request_id = %s",
            str(request["request_id"]),
        )
        assert shown == (True,)


def test_fund_is_idempotent_by_source_and_reference(account: NewAccount) -> None:
    money = account()
    first = money.fund(500)
    again = money.fund(500)
    assert (first[0], again[0], again[1]) == ("posted", "exists", first[1])
    assert money.fund(501)[0] == "conflict"
    assert money.balance() == (500, 0, 0)


def test_adjustment_can_not_take_what_is_held(account: NewAccount) -> None:
    money = account(funds=500)
    money.hold(400)
    assert money.fund(-101, "adjust", "adjustment")[0] == "insufficient_credits"
    assert money.fund(-100, "adjust", "adjustment")[0] == "posted"


def test_fund_of_an_unknown_account_posts_nothing(account: NewAccount) -> None:
    money = account()
    money.account_id = uuid7()
    assert money.fund(5)[0] == "unknown_account"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET amount = 0",
        "DELETE FROM entries",
        "INSERT INTO entries SELECT * FROM entries",
        "UPDATE balances SET posted = 1",
        "UPDATE usage SET price = 1",
        "DELETE FROM open_holds",
        "UPDATE virtual_keys SET status = 'active'",
        "DELETE FROM audit_trail",
        "SELECT settle_without_hold('[]', '{}')",
    ],
)
def test_the_services_role_can_not_touch_the_books(account: NewAccount, statement: str) -> None:
    money = account(funds=500)
    money.connection.execute("SET ROLE tallygate_app")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        money.connection.execute(statement.encode())


def test_functions_can_be_called_by_nobody_but_whom_they_were_granted(account: NewAccount) -> None:
    everybodys = account().all(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'tallygate'::regnamespace"
        " AND (proacl IS NULL OR EXISTS (SELECT 1 FROM aclexplode(proacl) WHERE grantee = 0))"
    )
    assert everybodys == []


@pytest.mark.parametrize("statement", ["UPDATE entries SET amount = 0", "DELETE FROM entries"])
def test_entries_are_append_only_for_their_owner_too(account: NewAccount, statement: str) -> None:
    money = account(funds=500)
    with pytest.raises(psycopg.errors.RestrictViolation, match="append-only"):
        money.connection.execute(statement.encode())


def test_double_entry_view_adds_up(account: NewAccount) -> None:
    money = account(funds=1000)
    money.fund(300, "paid", "deposit")
    money.settle(capture(money.hold(400), 150))
    books = {
        row[0]: row[1]
        for row in money.all("SELECT book, sum(debit - credit) FROM double_entry GROUP BY book")
    }
    assert books == {
        "cash": 300,
        "promotions_and_adjustments": 1000,
        "revenue": -150,
        "customer_liability": -1150,
        "provider_cost": 75,
        "provider_payable": -75,
    }


def test_partitions_are_made_ahead_and_only_once(account: NewAccount) -> None:
    money = account()
    assert money.one("SELECT ensure_partitions(now(), 3)") == (0,)
    assert money.one("SELECT ensure_partitions(now(), 5)") == (4,)


def test_entries_land_in_the_partition_of_their_month(account: NewAccount) -> None:
    money = account(funds=1000)
    money.hold(1)
    assert money.one("SELECT count(*) FROM entries_default") == (0,)
    (partition,) = {row[0] for row in money.all("SELECT tableoid::regclass::text FROM entries")}
    assert (
        partition
        == money.one("SELECT 'entries_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM')")[0]
    )
