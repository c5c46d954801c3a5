"""authorize_batch: what may start, decided in one call."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from proxy.ids import uuid7
from tests.integration.money import NewAccount, capture, void


def test_hold_reserves_and_leaves_an_entry(account: NewAccount) -> None:
    money = account(funds=1000)
    money.hold(400)
    assert money.balance() == (1000, 400, 0)
    assert money.kinds() == ["grant", "hold"]


def test_an_oversized_request_does_not_refuse_those_behind_it(account: NewAccount) -> None:
    money = account(funds=1000)
    outcomes = money.authorize(*[money.request(amount) for amount in (400, 5000, 400, 300, 200)])
    assert outcomes == ["held", "insufficient_credits", "held", "insufficient_credits", "held"]
    assert money.balance() == (1000, 1000, 0)


def test_replay_answers_exists_and_holds_once(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    assert money.authorize(request) == ["exists"]
    assert money.authorize(request | {"amount": 401}) == ["conflict"]
    assert money.balance() == (1000, 400, 0)


def test_replay_after_settlement_does_not_hold_again(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.hold(400)
    money.settle(capture(request, 10))
    assert money.authorize(request) == ["already_settled"]
    assert money.balance() == (990, 0, 0)


def test_duplicate_within_a_batch_holds_once(account: NewAccount) -> None:
    money = account(funds=1000)
    request = money.request(400)
    assert money.authorize(request, request) == ["held", "duplicate"]
    assert money.balance() == (1000, 400, 0)


def test_hold_of_nothing_passes_on_an_empty_account(account: NewAccount) -> None:
    money = account()
    assert money.authorize(money.request(0), money.request(1)) == ["held", "insufficient_credits"]


def test_credit_limit_can_be_used(account: NewAccount) -> None:
    money = account(funds=10)
    money.all(
        "UPDATE balances SET credit_limit = 50 WHERE account_id = %s RETURNING 1", money.account_id
    )
    assert money.authorize(money.request(60), money.request(1)) == ["held", "insufficient_credits"]


@pytest.mark.parametrize(
    "change, outcome",
    [
        ("UPDATE virtual_keys SET status = 'revoked'", "key_revoked"),
        ("UPDATE virtual_keys SET expires_at = now()", "key_expired"),
        ("UPDATE accounts SET status = 'suspended'", "account_suspended"),
        ("UPDATE accounts SET status = 'closed'", "account_closed"),
        ("UPDATE accounts SET version = version + 1", "stale"),
        ("UPDATE virtual_keys SET version = version + 1", "stale"),
        ("DELETE FROM virtual_keys", "unknown_key"),
    ],
)
def test_key_and_account_are_judged_in_the_same_call(
    account: NewAccount, change: str, outcome: str
) -> None:
    money = account(funds=1000)
    money.connection.execute(f"{change} WHERE account_id = '{money.account_id}'".encode())
    assert money.authorize(money.request(1)) == [outcome]
    assert money.balance() == (1000, 0, 0)


def test_revoked_key_is_refused_on_the_next_request(account: NewAccount) -> None:
    money = account(funds=1000)
    money.hold(1)
    money.one("SELECT revoke_key(%s, %s, %s, 'tester')", money.account_id, money.key_id, uuid7())
    assert money.authorize(money.request(1)) == ["key_revoked"]


def test_requests_per_minute_hold_within_and_across_batches(account: NewAccount) -> None:
    money = account(funds=1000, requests_per_minute=3)
    assert money.authorize(money.request(1), money.request(1)) == ["held", "held"]
    assert money.authorize(money.request(1), money.request(1)) == ["held", "requests_per_minute"]


def test_requests_per_minute_start_anew_with_the_minute(account: NewAccount) -> None:
    money = account(funds=1000, requests_per_minute=1)
    money.hold(1)
    money.connection.execute("UPDATE scope_counters SET minute = minute - interval '1 minute'")
    assert money.authorize(money.request(1)) == ["held"]


def test_tokens_per_minute_count_what_was_used_once_it_is_known(account: NewAccount) -> None:
    money = account(funds=1000, tokens_per_minute=25)
    first, second = money.request(1, tokens=20), money.request(1, tokens=10)
    assert money.authorize(first, second) == ["held", "tokens_per_minute"]
    money.settle(capture(first, 1, input_tokens=3, output_tokens=4))
    assert money.authorize(second) == ["held"]


def test_concurrency_is_free_again_after_settlement(account: NewAccount) -> None:
    money = account(funds=1000, max_concurrency=2)
    first = money.request(1)
    assert money.authorize(first, money.request(1), money.request(1))[-1] == "max_concurrency"
    assert money.authorize(money.request(1)) == ["max_concurrency"]
    money.settle(void(first))
    assert money.authorize(money.request(1)) == ["held"]


def test_budget_counts_what_is_spent_and_what_is_held(account: NewAccount) -> None:
    money = account(funds=10_000, budget=1000, budget_period="day")
    first = money.hold(600)
    assert money.authorize(money.request(500)) == ["budget_exceeded"]
    money.settle(capture(first, 100))
    assert money.authorize(money.request(901)) == ["budget_exceeded"]
    assert money.authorize(money.request(900)) == ["held"]


def test_budget_starts_anew_with_its_period(account: NewAccount) -> None:
    money = account(funds=10_000, budget=1000, budget_period="day")
    money.settle(capture(money.hold(1000), 1000))
    assert money.authorize(money.request(1)) == ["budget_exceeded"]
    money.connection.execute("UPDATE scope_counters SET period = period - interval '1 day'")
    assert money.authorize(money.request(1)) == ["held"]


def test_a_key_without_limits_is_not_held_up_by_its_neighbours(account: NewAccount) -> None:
    money = account(funds=1000, requests_per_minute=1)
    other = account(funds=1000)
    assert money.authorize(
        money.request(1), money.request(1), other.request(1), other.request(1)
    ) == ["held", "requests_per_minute", "held", "held"]


def test_concurrent_batches_never_hold_more_than_there_is(account: NewAccount) -> None:
    accounts = [account(funds=1000) for _ in range(3)]
    start = threading.Barrier(8)

    def load(number: int) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        own = account().connection
        start.wait()
        for turn in range(10):
            batch = [money.request(7) for money in accounts for _ in range(8)]
            if (number + turn) % 2:  # arrival orders that would deadlock without sorted locks
                batch.reverse()
            rows = own.execute(
                "SELECT outcome FROM authorize_batch(%s)", (json.dumps(batch),)
            ).fetchall()
            outcomes.update(row[0] for row in rows)
        return outcomes

    with ThreadPoolExecutor(8) as pool:
        total = sum(pool.map(load, range(8)), Counter[str]())
    assert total["held"] == 3 * (1000 // 7)
    assert set(total) == {"held", "insufficient_credits"}
    for money in accounts:
        assert money.balance() == (1000, 994, 0)


def test_check_constraint_stops_what_the_function_would_let_through(account: NewAccount) -> None:
    money = account(funds=1000)
    with pytest.raises(psycopg.errors.CheckViolation, match="balances_no_overspend"):
        money.connection.execute("UPDATE balances SET reserved = 1001")
