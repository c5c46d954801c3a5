"""Keys and projects in schema.sql: what is open and spent counts from the moment a limit is set."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from proxy.audit import audit
from proxy.ids import uuid7
from tests.integration.money import Money, NewAccount, capture, void, wait_for_waiters

BOOK = {"default": {"kind": "markup", "factor": "2.0"}}


@pytest.fixture(autouse=True)
def _price_book(database_url: str) -> None:
    """What the audit recomputes charges with."""
    with psycopg.connect(database_url) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute(
            "SELECT publish_price_book(%s, 1000000, %s, 'test')", (json.dumps(BOOK), uuid7())
        )


def change(money: Money, **changes: object) -> str:
    """Change the account's key; the outcome."""
    money.version += 1
    return money.one(
        "SELECT update_key(%s, %s, %s, %s, 'ada')",
        money.account_id,
        money.key_id,
        json.dumps(changes),
        uuid7(),
    )[0]


def project(money: Money, **settings: object) -> str:
    """Make a project of the account, and put its key in."""
    project_id = str(uuid7())
    document = json.dumps({"name": "p", **settings})
    args = (money.account_id, project_id, document)
    assert money.one("SELECT create_project(%s, %s, %s, 'ada')", *args) == (True,)
    assert change(money, project_id=project_id) == "changed"
    return project_id


def change_project(money: Money, project_id: str, **changes: object) -> str:
    return money.one(
        "SELECT update_project(%s, %s, %s, %s, 'ada')",
        money.account_id,
        project_id,
        json.dumps(changes),
        uuid7(),
    )[0]


def archive(money: Money, project_id: str) -> str:
    args = (money.account_id, project_id, uuid7())
    return money.one("SELECT archive_project(%s, %s, %s, 'ada')", *args)[0]


def rotate(money: Money, *, overlap_s: int = 0) -> tuple[str, UUID]:
    """Rotate the account's key; the outcome, and the id of the new key."""
    new = uuid7()
    (outcome,) = money.one(
        "SELECT rotate_key(%s, %s, %s, %s, 'sk-new', %s, 'ada')",
        money.account_id,
        money.key_id,
        new,
        os.urandom(32),
        overlap_s,
    )
    return outcome, new


def counters(money: Money, scope_id: object) -> tuple[Any, ...]:
    """Holds, reserved and spent of a key or project."""
    return money.one(
        "SELECT holds, reserved, spent FROM scope_counters WHERE scope_id = %s", scope_id
    )


def acts(money: Money, action: str) -> list[dict[str, Any]]:
    rows = money.all("SELECT detail FROM audit_trail WHERE action = %s ORDER BY at", action)
    return [row[0] for row in rows]


def assert_clean(url: str) -> None:
    assert [finding for finding in audit(url) if finding.violations] == []


@pytest.mark.parametrize("whose", ["key", "project"])
def test_a_budget_set_late_counts_what_is_open_and_what_was_spent(
    account: NewAccount, database_url: str, whose: str
) -> None:
    money = account(funds=10_000)
    project_id = project(money)
    scope_id = project_id if whose == "project" else money.key_id
    money.settle(capture(money.hold(300), 200), void(money.hold(50)))
    pending = money.hold(400)

    if whose == "project":
        assert change_project(money, project_id, budget=1000, budget_period="day") == "changed"
    else:
        assert change(money, budget=1000, budget_period="day") == "changed"

    assert counters(money, scope_id) == (1, 400, 200)
    assert_clean(database_url)
    exceeded = "budget_exceeded" if whose == "key" else "project_budget_exceeded"
    assert money.authorize(money.request(401), money.request(400)) == [exceeded, "held"]
    money.settle(capture(pending, 100))
    assert counters(money, scope_id) == (1, 400, 300)
    assert money.authorize(money.request(301), money.request(300)) == [exceeded, "held"]
    assert_clean(database_url)


def test_a_limit_set_late_counts_requests_under_way(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    first, _ = money.hold(1, tokens=20), money.hold(1, tokens=20)
    change(money, max_concurrency=2, tokens_per_minute=50)
    assert money.authorize(money.request(1)) == ["max_concurrency"]
    assert_clean(database_url)
    money.settle(capture(first, 1, input_tokens=3, output_tokens=4))
    # 7 used and 20 held in this minute, unless it ended meanwhile.
    assert money.authorize(money.request(1, tokens=51)) == ["tokens_per_minute"]
    assert money.authorize(money.request(1, tokens=10)) == ["held"]
    assert_clean(database_url)


def test_a_limit_taken_away_and_set_again_counts_everything_between(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=10_000, budget=1000)
    before = money.hold(100)
    change(money, budget=None, budget_period="total")
    between = money.hold(200)
    money.settle(capture(money.hold(50), 50))
    assert_clean(database_url)
    change(money, budget=1000, budget_period="total")
    assert counters(money, money.key_id) == (2, 300, 50)
    money.settle(capture(before, 100), void(between))
    assert counters(money, money.key_id) == (0, 0, 150)
    assert_clean(database_url)


def test_another_period_counts_what_that_period_has_taken(account: NewAccount) -> None:
    money = account(funds=10_000, budget=1000, budget_period="total")
    money.settle(capture(money.hold(10), 10))
    with money.connection.transaction():
        # As if all of that had been forty days ago: in another month.
        money.connection.execute("SET LOCAL session_replication_role = replica")
        money.connection.execute("UPDATE entries SET at = at - interval '40 days'")
        money.connection.execute("UPDATE usage SET settled_at = settled_at - interval '40 days'")
    money.settle(capture(money.hold(70), 70))
    assert counters(money, money.key_id) == (0, 0, 80)

    assert change(money, budget=1000, budget_period="month") == "changed"
    assert counters(money, money.key_id) == (0, 0, 70)
    assert change(money, budget=1000, budget_period="total") == "changed"
    assert counters(money, money.key_id) == (0, 0, 80)


def test_spending_that_comes_late_is_counted_as_if_it_had_been_counted_at_once(
    account: NewAccount,
) -> None:
    """Two keys see the same: one has its budget from the start, the other gets it at the end."""
    with_budget = account(funds=10_000, budget=5000, budget_period="month")
    without = account(funds=10_000)
    for money in (with_budget, without):
        money.settle(capture(money.hold(100), 100))
        lost = money.hold(100, ttl_s=-1)
        money.one("SELECT expire_holds(10, 0)")
        assert money.settle(capture(lost, 60)) == ["captured_late"]
        priced = money.hold(100)
        money.settle(capture(priced, 100))
        unknown = money.hold(30)
        money.settle(void(unknown, status="needs_review", review_reason="usage_missing"))
        for request, decision, price in ((priced, "reprice", 80), (unknown, "charge", 25)):
            settled_at = money.usage(request)["settled_at"]
            (outcome, _) = money.one(
                "SELECT * FROM resolve_review(%s, %s, %s, %s, %s, 0, 'review', NULL, NULL, %s,"
                " 'ada', 'why')",
                money.account_id,
                request["request_id"],
                decision,
                settled_at,
                price,
                uuid7(),
            )
            assert outcome == "resolved"
        for amount, is_kept in ((30, True), (9, False)):
            refund_id = uuid7()
            args = (money.account_id, refund_id, priced["request_id"], amount, str(amount))
            money.one("SELECT outcome FROM refund(%s, %s, %s, %s, %s, 'why', 'ada')", *args)
            if not is_kept:
                args = (money.account_id, uuid7(), refund_id)
                money.one(
                    "SELECT outcome FROM reverse_funding(%s, %s, %s, 'r', 'why', 'ada')", *args
                )
    change(without, budget=5000, budget_period="month")
    (expected, found) = (counters(money, money.key_id) for money in (with_budget, without))
    assert expected == found == (0, 0, 100 + 60 + 80 + 25 - 30)


def test_what_is_charged_while_a_budget_is_counted_is_in_it(
    account: NewAccount, database_url: str
) -> None:
    """The change waits for the lock behind settlements that its first look has not seen."""
    money = account(funds=10_000)
    money.settle(capture(money.hold(100), 100))
    pending = money.hold(50)
    with psycopg.connect(database_url, autocommit=True) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SET search_path = tallygate")
        with other.transaction():
            other.execute(
                "SELECT outcome FROM settle_batch(%s)", (json.dumps([capture(pending, 40)]),)
            )
            changing = pool.submit(change, money, budget=1000)
            watching = account()
            wait_for_waiters(watching, 1)
        assert changing.result() == "changed"
    assert counters(money, money.key_id) == (0, 0, 140)
    assert_clean(database_url)


def test_budgets_of_projects_are_exact_under_concurrency(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=10_000)
    project_id = project(money, budget=1000)
    (_, other) = rotate(money, overlap_s=3600)
    keys = [(str(money.key_id), money.version + 1), (str(other), 2)]
    start = threading.Barrier(4)

    def load(number: int) -> int:
        key_id, version = keys[number % 2]
        held = 0
        with psycopg.connect(database_url, autocommit=True) as own:
            own.execute("SET search_path = tallygate")
            start.wait()
            for _ in range(10):
                batch = [money.request(7, key_id=key_id, version=version) for _ in range(5)]
                rows = own.execute(
                    "SELECT outcome FROM authorize_batch(%s)", (json.dumps(batch),)
                ).fetchall()
                outcomes = [outcome for (outcome,) in rows]
                assert set(outcomes) <= {"held", "project_budget_exceeded"}
                held += outcomes.count("held")
        return held

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(load, range(4))) == 1000 // 7
    assert counters(money, project_id) == (1000 // 7, 1000 // 7 * 7, 0)
    assert_clean(database_url)


@pytest.mark.parametrize("overlap_s", [0, 3600])
def test_a_rotated_key_goes_on_with_what_was_used(
    account: NewAccount, database_url: str, overlap_s: int
) -> None:
    money = account(funds=10_000, budget=1000, max_concurrency=2)
    money.settle(capture(money.hold(200), 200))
    pending = money.hold(300)

    outcome, new = rotate(money, overlap_s=overlap_s)

    assert outcome == "rotated"
    assert_clean(database_url)
    assert counters(money, new) == counters(money, money.key_id) == (1, 300, 200)
    by_new = {"key_id": str(new), "version": 2}
    assert money.authorize(money.request(501, **by_new)) == ["budget_exceeded"]
    assert money.authorize(money.request(1, **by_new)) == ["held"]
    assert money.authorize(money.request(1, **by_new)) == ["max_concurrency"]
    by_old = money.authorize(money.request(1, version=money.version + 1))
    assert by_old == ["held" if overlap_s else "key_revoked"]
    money.settle(capture(pending, 100))
    assert counters(money, new)[2] == 300
    assert_clean(database_url)
    # A budget of another kind still knows what the key before it has spent.
    money.key_id = new
    change(money, budget=1000, budget_period="month")
    assert counters(money, new)[2] == 300


def test_an_overlap_ends_no_later_than_the_key_would_have(account: NewAccount) -> None:
    soon = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    money = account(funds=10, expires_at=soon)
    _, new = rotate(money, overlap_s=3600)
    rows = money.all("SELECT DISTINCT expires_at FROM virtual_keys")
    assert rows == [(datetime.fromisoformat(soon),)]
    (replaced_by,) = money.one(
        "SELECT replaced_by FROM virtual_keys WHERE key_id = %s", money.key_id
    )
    assert replaced_by == new
    assert rotate(money)[0] == "replaced"


def test_what_can_not_be_rotated_is_said(account: NewAccount) -> None:
    money = account(expires_at="2020-01-01T00:00:00Z")
    assert rotate(money)[0] == "expired"
    money.one("SELECT revoke_key(%s, %s, %s, 'ada')", money.account_id, money.key_id, uuid7())
    assert rotate(money)[0] == "revoked"
    money.key_id = uuid7()
    assert rotate(money)[0] == "unknown"
    closed = account()
    closed.connection.execute("UPDATE accounts SET status = 'closed'")
    assert rotate(closed)[0] == "closed"


def test_archiving_revokes_the_keys_and_takes_no_more(account: NewAccount) -> None:
    money = account(funds=100)
    project_id = project(money, name="north")
    pending = money.hold(10)
    assert archive(money, project_id) == "archived"
    assert archive(money, project_id) == "archived"
    assert archive(money, str(uuid7())) == "unknown"

    assert money.authorize(money.request(1)) == ["key_revoked"]
    assert money.settle(capture(pending, 4)) == ["captured"]
    assert str(money.usage(pending)["project_id"]) == project_id
    assert change_project(money, project_id, name="south") == "archived"
    key = {"key_id": str(uuid7()), "name": "k", "prefix": "sk-", "project_id": project_id}
    args = (money.account_id, os.urandom(32), json.dumps(key))
    assert money.one("SELECT create_key(%s, %s, %s, 'ada')", *args) == (False,)
    (act,) = acts(money, "project.archive")
    assert act == {"project_id": project_id, "revoked_keys": [str(money.key_id)]}
    assert money.one("SELECT name, status FROM projects") == ("north", "archived")


def test_a_key_made_while_its_project_is_archived_is_revoked_with_it(
    account: NewAccount, database_url: str
) -> None:
    money = account()
    project_id = project(money)
    key = {"key_id": str(uuid7()), "name": "k", "prefix": "sk-", "project_id": project_id}
    with psycopg.connect(database_url, autocommit=True) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SET search_path = tallygate")
        with other.transaction():
            args = (money.account_id, os.urandom(32), json.dumps(key))
            other.execute("SELECT create_key(%s, %s, %s, 'ada')", args)
            archiving = pool.submit(archive, money, project_id)
            wait_for_waiters(account(), 1)
        assert archiving.result() == "archived"
    assert money.all("SELECT DISTINCT status FROM virtual_keys WHERE project_id IS NOT NULL") == [
        ("revoked",)
    ]


def test_a_key_goes_to_no_project_that_is_archived_or_another_accounts(account: NewAccount) -> None:
    money, other = account(), account()
    foreign = project(other)
    assert change(money, project_id=foreign) == "unknown_project"
    archive(other, foreign)
    other.key_id = uuid7()
    key = {"key_id": str(other.key_id), "name": "k", "prefix": "sk-"}
    other.one(
        "SELECT create_key(%s, %s, %s, 'ada')", other.account_id, os.urandom(32), json.dumps(key)
    )
    assert change(other, project_id=foreign) == "archived_project"


def test_a_change_is_in_the_audit_trail_with_what_was_before(account: NewAccount) -> None:
    money = account(requests_per_minute=5)
    assert change(money, name="new", requests_per_minute=None, role="manage") == "changed"
    assert acts(money, "key.update") == [
        {
            "key_id": str(money.key_id),
            "before": {"name": "k", "requests_per_minute": 5, "role": "inference"},
            "after": {"name": "new", "requests_per_minute": None, "role": "manage"},
        }
    ]
    assert change(money, name="new") == "changed"
    assert len(acts(money, "key.update")) == 1, "nothing was changed"
    project_id = project(money, budget=5)
    change_project(money, project_id, budget=None)
    (act,) = acts(money, "project.update")
    assert act == {"project_id": project_id, "before": {"budget": 5}, "after": {"budget": None}}


def test_the_later_use_of_a_key_counts_whoever_tells_it_last(account: NewAccount) -> None:
    money = account()
    for age_s in (5.0, 60.0):
        money.one("SELECT note_key_uses(%s, %s, %s)", [money.account_id], [money.key_id], [age_s])
    (age,) = money.one(
        "SELECT extract(EPOCH FROM clock_timestamp() - last_used_at)::float FROM key_uses"
    )
    assert 5 <= age < 60


def test_the_first_entry_since_a_time_is_found_by_halving(account: NewAccount) -> None:
    money = account()
    for number in range(7):
        money.fund(10, external_id=str(number))
    with money.connection.transaction():
        money.connection.execute("SET LOCAL session_replication_role = replica")
        money.connection.execute(
            "UPDATE entries SET at = timestamptz '2026-01-01Z' + seq * interval '1 hour'"
        )
        # As where months were detached.
        money.connection.execute("DELETE FROM entries WHERE seq IN (1, 2, 4)")
    for hour in range(10):
        (found,) = money.one(
            "SELECT first_seq_since(%s, timestamptz '2026-01-01Z' + %s * interval '1 hour')",
            money.account_id,
            hour,
        )
        after = [seq for (seq,) in money.all("SELECT seq FROM entries WHERE seq < %s", found)]
        kept = [seq for (seq,) in money.all("SELECT seq FROM entries WHERE seq >= %s", found)]
        assert all(seq < hour for seq in after)
        assert all(seq >= hour for seq in kept)
