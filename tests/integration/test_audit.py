"""The audit names each invariant that is broken, and none where all is well."""

import json
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
    "actions": {"message": "0.0001"},
}


REVIEW = {"status": "needs_review", "review_reason": "usage_missing"}


def resolve(money: Money, request: dict[str, object], decision: str, price: int | None) -> None:
    rule = None if price is None else "review"
    answer = money.one(
        "SELECT outcome FROM resolve_review(%s, %s, %s, NULL, %s, 0, %s, NULL, NULL, %s, 'me', '')",
        *(money.account_id, request["request_id"], decision, price, rule, uuid4()),
    )
    assert answer == ("resolved",)


@pytest.fixture
def ledger(account: NewAccount) -> Money:
    """A ledger in which everything that can happen has happened."""
    money = account(funds=1_000_000, max_concurrency=1000)
    money.one("SELECT publish_price_book(%s, 1000000, %s, 'test')", json.dumps(BOOK), uuid4())
    money.settle(capture(money.hold(1000), 600))
    money.settle(capture(money.hold(1000), 1500))
    money.settle(capture(money.hold(1000), 1, cost_picos=333, rounding_attos=334_000_000))
    money.settle(void(money.hold(1000)))
    money.settle(void(money.hold(1000), status="needs_review", review_reason="price_missing"))
    cheap = money.hold(10, model="cheap")
    money.settle(capture(cheap, 1, rule="rules[0]", markup_ppm=500_000, cost_picos=2000))
    tokens = capture(money.hold(5, model="tokens"), 3000, rule="rules[1]", markup_ppm=None)
    money.settle({**tokens, "cost_picos": None, "input_tokens": 1, "output_tokens": 1})
    byok = capture(money.hold(0, byok=True), 5, status="byok", markup_ppm=None, cost_picos=50_000)
    money.settle(byok)
    late, _, amended = (money.hold(100, ttl_s=0) for _ in range(3))
    assert money.one("SELECT expire_holds(10, 0)") == (3,)
    assert money.settle(capture(late, 70), void(amended)) == ["captured_late", "amended"]
    unknown = money.hold(100)
    money.settle(void(unknown, status="needs_review", review_reason="cost_unknown"))
    assert money.settle(capture(unknown, 80, cost_source="witness")) == ["captured_late"]
    for number, decision in enumerate(("charge", "waive")):
        money.settle(void(review := money.hold(100), **REVIEW))
        resolve(money, review, decision, None if number else 33)
    flagged = money.hold(100)
    money.settle(capture(flagged, 90, cost_picos=45_000, review_reason="cost_mismatch"))
    resolve(money, flagged, "reprice", 44)
    money.hold(300)
    money.hold(400)
    money.fund(-500, "correction", "adjustment")
    # An account that is overdrawn and whose key has no limits, and one without a history.
    poor = account(funds=100)
    poor.settle(capture(poor.hold(100), 250))
    poor.hold(0)
    account()
    # One whose credits expire: some are spent, some have expired, some are held yet.
    thrifty = account()
    thrifty.fund(5, "own", "deposit")
    thrifty.fund_expiring(50, "used")
    thrifty.settle(capture(thrifty.hold(20), 20))
    thrifty.hold(10)
    assert thrifty.one("SELECT expire_credits(10)") == (1,)
    corrected(account(funds=1000))
    money.connection.execute("SET session_replication_role = replica")  # no triggers
    return money


def corrected(money: Money) -> None:
    """Let an account pay for an action, get it refunded twice, and go below zero for a while."""
    action = {"endpoint": "charges", "model": "message"}
    charge = {"rule": "actions.message", "markup_ppm": None, "cost_picos": 0, "quantity": 2}
    request = money.hold(200, **action)
    money.settle(capture(request, 200, **charge, input_tokens=None, output_tokens=None))
    for reference in ("half", "the same half"):
        row = money.one(
            "SELECT outcome, entry_id FROM refund(%s, %s, %s, 100, %s, 'why', 'me')",
            *(money.account_id, uuid4(), request["request_id"], reference),
        )
        assert row[0] == "posted"
    reversed_by = money.one(
        "SELECT outcome FROM reverse_funding(%s, %s, %s, 'twice', 'why', 'me')",
        *(money.account_id, uuid4(), row[1]),
    )
    assert reversed_by == ("posted",)
    money.fund(150, "goodwill", "refund")
    money.fund(-150, "of old", "reversal")
    limit = "SELECT outcome FROM set_credit_limit(%s, %s, 'why', %s, 'me')"
    assert money.one(limit, money.account_id, 5000, uuid4()) == ("set",)
    money.settle(void(money.hold(5900)))
    assert money.one(limit, money.account_id, 0, uuid4()) == ("set",)


def broken(url: str) -> dict[str, Finding]:
    return {found.name: found for found in audit(url) if found.violations}


@pytest.mark.usefixtures("ledger")
def test_a_ledger_in_which_everything_happened_is_clean(database_url: str) -> None:
    findings = audit(database_url)

    assert [found for found in findings if found.violations] == []
    assert all(found.checked for found in findings)


def test_an_empty_ledger_is_clean(database_url: str) -> None:
    assert broken(database_url) == {}


BREAKS = {
    "more refunded than the price": (
        ("UPDATE funding SET subject_id = (SELECT request_id FROM usage WHERE quantity = 2)"
        " WHERE external_id = 'goodwill'"),
        {"refunds_within_price"},
    ),
    "money that was reversed twice": (
        ("UPDATE funding SET subject_id = (SELECT subject_id FROM funding"
        " WHERE external_id = 'twice') WHERE external_id = 'of old'"),
        {"refunds_within_price"},
    ),
    "more of an action than was paid for": (
        "UPDATE usage SET quantity = 3 WHERE quantity = 2",
        {"charges_recompute"},
    ),
    "an action without its quantity": (
        "UPDATE usage SET quantity = NULL WHERE quantity = 2",
        {"charges_recompute"},
    ),
    "an action that is not in the book": (
        "UPDATE usage SET model = 'letter' WHERE quantity = 2",
        {"charges_recompute"},
    ),
    "a hold beyond a limit that never was": (
        ("UPDATE audit_trail SET detail = detail || '{\"before\": 0}'"
        " WHERE action = 'account.credit_limit' AND detail ->> 'credit_limit' = '0'"),
        {"holds_within_available"},
    ),
    "credits that nobody granted": (
        ("INSERT INTO expiring_credits SELECT account_id, gen_random_uuid(), 5, 5, 0, at, at, at"
        " FROM funding WHERE kind = 'credit_expiry'"),
        {"expired_credits_were_granted"},
    ),
    "credits that expired before their time": (
        "UPDATE expiring_credits SET expires_at = now() + interval '1 hour'",
        {"expired_credits_were_granted"},
    ),
    "more credits expired than are said to be": (
        "UPDATE expiring_credits SET expired = expired - 1",
        {"expired_credits_were_granted"},
    ),
    "an expiry of credits without its entry": (
        "UPDATE entries SET kind = 'adjustment' WHERE kind = 'credit_expiry'",
        {"funding_equals_entries"},
    ),
    "a gap in the sequence": (
        "UPDATE entries SET seq = seq + 100 WHERE kind = 'adjustment'",
        {"sequence_without_gaps", "sequence_ends_at_balance"},
    ),
    "a number that is given twice": (
        "UPDATE entries SET seq = 2 WHERE kind = 'adjustment'",
        {"sequence_without_gaps", "sequence_ends_at_balance", "running_balances_chain"},
    ),
    "an entry that the balance does not count": (
        "UPDATE balances SET seq = seq - 1 WHERE posted > 0",
        {"sequence_ends_at_balance"},
    ),
    "an edited running balance": (
        "UPDATE entries SET posted_after = posted_after + 1 WHERE kind = 'late_capture'",
        {"running_balances_chain"},
    ),
    "an edited running reserve": (
        "UPDATE entries SET reserved_after = reserved_after + 1 WHERE kind = 'late_capture'",
        {"running_balances_chain"},
    ),
    "a balance that grew by itself": (
        "UPDATE balances SET posted = posted + 1 WHERE posted > 0",
        {"balances_equal_journal", "liability_equals_balances"},
    ),
    "a reserve that grew by itself": (
        "UPDATE balances SET reserved = reserved + 1 WHERE posted > 0",
        {"balances_equal_journal", "reserved_equals_open_holds"},
    ),
    "a balance that is gone": (
        "DELETE FROM balances WHERE posted > 0",
        {
            "sequence_ends_at_balance", "balances_equal_journal", "reserved_equals_open_holds",
            "liability_equals_balances",
        },
    ),
    "an edited open hold": (
        "UPDATE open_holds SET amount = amount + 1 WHERE amount = 300",
        {"reserved_equals_open_holds", "holds_end_once", "counters_equal_open_holds"},
    ),
    "a hold that vanished": (
        "DELETE FROM open_holds WHERE amount = 0",
        {"holds_end_once"},
    ),
    "a hold that ended and is still open": (
        ("INSERT INTO open_holds SELECT account_id, request_id, key_id, hold, 1, NULL, now(),"
        " now(), 'e', 'm', 't', false, false, 1 FROM usage WHERE price = 1500"),
        {"holds_end_once", "reserved_equals_open_holds"},
    ),
    "an open hold that was never placed": (
        ("INSERT INTO open_holds SELECT account_id, gen_random_uuid(), gen_random_uuid(), 0, 1,"
        " NULL, now(), now(), 'e', 'm', 't', false, false, 1 FROM balances WHERE overdraft > 0"),
        {"holds_end_once"},
    ),
    "a capture that kept some of its hold": (
        "UPDATE entries SET reserved_delta = reserved_delta + 1 WHERE amount = 600",
        {"endings_release_their_hold", "running_balances_chain", "balances_equal_journal"},
    ),
    "an ending without a hold": (
        ("DELETE FROM entries WHERE kind = 'hold' AND request_id ="
        " (SELECT request_id FROM usage WHERE status = 'byok')"),
        {
            "endings_release_their_hold", "holds_end_once", "usage_agrees_with_journal",
            "sequence_without_gaps",
        },
    ),
    "a late capture of what was not expired": (
        "UPDATE entries SET kind = 'void' WHERE kind = 'expire'",
        {"late_captures_bring_late_truth"},
    ),
    "a late capture of what was voided by nobody's word": (
        "UPDATE usage SET cost_source = 'header' WHERE cost_source = 'witness'",
        {"late_captures_bring_late_truth"},
    ),
    "a capture at another price": (
        "UPDATE usage SET price = price + 1 WHERE price = 600",
        {"captures_equal_usage", "charges_recompute"},
    ),
    "a capture without usage": (
        "DELETE FROM usage WHERE price = 600",
        {"captures_equal_usage", "usage_agrees_with_journal"},
    ),
    "a void without usage": (
        "DELETE FROM usage WHERE review_reason = 'price_missing'",
        {"usage_agrees_with_journal"},
    ),
    "usage without a request": (
        ("INSERT INTO usage (account_id, request_id, key_id, created_at, settled_at, endpoint,"
        " model, tier, streamed, byok, status, price_version, hold) SELECT account_id,"
        " gen_random_uuid(), key_id, now(), now(), 'e', 'm', 't', false, false, 'void', 1, 0"
        " FROM usage WHERE price = 600"),
        {"usage_agrees_with_journal"},
    ),
    "a billed request that was voided": (
        "UPDATE usage SET status = 'billed', price = 0 WHERE review_reason = 'price_missing'",
        {
            "usage_agrees_with_journal", "captures_equal_usage", "charges_recompute",
            "prices_cover_costs",
        },
    ),
    "a voided request that was captured": (
        "UPDATE usage SET status = 'void', price = NULL WHERE price = 600",
        {"usage_agrees_with_journal", "captures_equal_usage"},
    ),
    "usage that tells of another hold": (
        "UPDATE usage SET hold = hold + 1 WHERE price = 600",
        {"usage_agrees_with_journal"},
    ),
    "BYOK that is billed": (
        "UPDATE usage SET status = 'billed' WHERE status = 'byok'",
        {"usage_agrees_with_journal", "prices_cover_costs"},
    ),
    "an overdraft that is not one": (
        "UPDATE balances SET overdraft = overdraft + 7",
        {"no_overspend"},
    ),
    "a balance below zero": (
        ("ALTER TABLE balances DROP CONSTRAINT balances_no_overspend;"
        " UPDATE balances SET overdraft = 0"),
        {"no_overspend"},
    ),
    "a hold beyond what there was": (
        "UPDATE entries SET posted_after = 0 WHERE kind = 'hold' AND amount = 400",
        {"holds_within_available", "running_balances_chain"},
    ),
    "a grant of another amount": (
        "UPDATE funding SET amount = amount + 1 WHERE kind = 'grant'",
        {"funding_equals_entries", "expired_credits_were_granted"},
    ),
    "an adjustment that nobody made": (
        "DELETE FROM funding WHERE kind = 'adjustment'",
        {"funding_equals_entries"},
    ),
    "a grant that was never posted": (
        ("INSERT INTO funding SELECT account_id, 'x', 'y', gen_random_uuid(), kind, amount, reason,"
        " actor, at FROM funding WHERE kind = 'grant'"),
        {"funding_equals_entries"},
    ),
    "a correction of nothing": (
        "DELETE FROM entries WHERE kind = 'capture' AND amount = 90",
        {
            "captures_equal_usage", "holds_end_once", "usage_agrees_with_journal",
            "sequence_without_gaps", "running_balances_chain", "balances_equal_journal",
            "liability_equals_balances",
        },
    ),
    "a correction that nobody decided on": (
        "UPDATE usage SET resolution = 'waive' WHERE price = 44",
        {
            "captures_equal_usage", "decisions_stand_in_the_trail", "charges_recompute",
            "prices_cover_costs",
        },
    ),
    "a decision that the trail tells otherwise": (
        "UPDATE audit_trail SET detail = detail || '{\"price\": 1}' WHERE action = 'review.charge'",
        {"decisions_stand_in_the_trail"},
    ),
    "a decision that nobody made": (
        "UPDATE usage SET resolution = 'waive', resolved_at = now() WHERE price = 600",
        {"decisions_stand_in_the_trail"},
    ),
    "a charge that nobody decided on": (
        "UPDATE usage SET resolution = NULL WHERE price = 33",
        {"late_captures_bring_late_truth", "charges_recompute", "prices_cover_costs"},
    ),
    "another rounding": (
        "UPDATE usage SET rounding_attos = 0 WHERE rounding_attos > 0",
        {"charges_recompute"},
    ),
    "another markup": (
        "UPDATE usage SET markup_ppm = 1 WHERE price = 600",
        {"charges_recompute"},
    ),
    "another rule": (
        "UPDATE usage SET rule = 'rules[9]' WHERE price = 600",
        {"charges_recompute"},
    ),
    "other tokens": (
        "UPDATE usage SET output_tokens = 2 WHERE model = 'tokens'",
        {"charges_recompute"},
    ),
    "impossible tokens": (
        "UPDATE usage SET cached_input_tokens = 2 WHERE model = 'tokens'",
        {"charges_recompute"},
    ),
    "another fee": (
        "UPDATE usage SET cost_picos = cost_picos * 2 WHERE status = 'byok'",
        {"charges_recompute"},
    ),
    "an unknown version of the price book": (
        "UPDATE usage SET price_version = 9 WHERE price = 600",
        {"charges_recompute"},
    ),
    "an edited price book": (
        "UPDATE price_books SET document = '{\"default\": {\"kind\": \"flat\"}}'",
        {"charges_recompute", "prices_cover_costs"},
    ),
    "a price below its cost": (
        "UPDATE usage SET cost_picos = 600001 WHERE price = 600",
        {"charges_recompute", "prices_cover_costs"},
    ),
    "a price without a cost": (
        "UPDATE usage SET cost_picos = NULL WHERE price = 600",
        {"charges_recompute", "prices_cover_costs"},
    ),
    "a sum of requests that nobody made": (
        ("INSERT INTO usage_rollups (account_id, hour, number, key_id, model, tier, endpoint,"
        " status, requests) SELECT account_id, '2025-01-01Z', 1, key_id, 'm', 'default', 'e',"
        " 'void', 1 FROM virtual_keys LIMIT 1"),
        {"rollups_equal_usage", "rollups_equal_days"},
    ),
    "a sum of a day without its hours": (
        "INSERT INTO usage_days VALUES ('2025-01-01', 'd', 'm', 'e', 'void', '', 1, 0, 0, 0, 0)",
        {"rollups_equal_days"},
    ),
    "books with one side": (
        ("CREATE OR REPLACE VIEW double_entry AS SELECT account_id, request_id AS transaction_id,"
        " at, 'customer_liability'::text AS book, greatest(-posted_delta, 0)::numeric AS debit,"
        " greatest(posted_delta, 0)::numeric AS credit FROM entries WHERE posted_delta <> 0"),
        {"double_entry_balances"},
    ),
    "books without a liability": (
        ("CREATE OR REPLACE VIEW double_entry AS SELECT account_id, request_id AS transaction_id,"
        " at, 'cash'::text AS book, 0::numeric AS debit, 0::numeric AS credit FROM entries"),
        {"liability_equals_balances"},
    ),
    "a counter of holds that is off": (
        "UPDATE scope_counters SET holds = holds + 1 WHERE holds > 0",
        {"counters_equal_open_holds"},
    ),
    "a counter of money that is off": (
        "UPDATE scope_counters SET reserved = 0",
        {"counters_equal_open_holds"},
    ),
    "counters that are gone": (
        "DELETE FROM scope_counters",
        {"counters_equal_open_holds"},
    ),
    "a right to change entries": (
        "GRANT UPDATE ON entries TO tallygate_app",
        {"journal_is_append_only"},
    ),
    "a right to change one column": (
        "GRANT UPDATE (posted) ON balances TO tallygate_app",
        {"journal_is_append_only"},
    ),
    "everybody's right to add usage": (
        "GRANT INSERT ON usage TO PUBLIC",
        {"journal_is_append_only"},
    ),
    "a right to empty a table": (
        "GRANT TRUNCATE ON open_holds TO tallygate_app",
        {"journal_is_append_only"},
    ),
    "no trigger": (
        "DROP TRIGGER entries_append_only ON entries",
        {"journal_is_append_only"},
    ),
    "a trigger that is off": (
        "ALTER TABLE entries DISABLE TRIGGER ALL",
        {"journal_is_append_only"},
    ),
    "a trigger that is off in one partition": (
        "ALTER TABLE entries_default DISABLE TRIGGER ALL",
        {"journal_is_append_only"},
    ),
    "a trigger that only replication fires": (
        "ALTER TABLE audit_trail ENABLE REPLICA TRIGGER audit_trail_append_only",
        {"journal_is_append_only"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_what_is_broken_is_named(case: str, ledger: Money, database_url: str) -> None:
    statement, expected = BREAKS[case]
    ledger.connection.execute(statement.encode())

    found = broken(database_url)

    assert set(found) == expected
    assert all(len(each.rows) == min(each.violations, MAX_EXAMPLES) for each in found.values())


def test_every_invariant_is_broken_by_a_test() -> None:
    tested = {name for _, names in BREAKS.values() for name in names}
    priced = {"charges_recompute", "prices_cover_costs"}
    assert tested == {invariant.name for invariant in INVARIANTS} | priced


def test_the_offending_row_is_shown_with_what_was_expected(
    ledger: Money, database_url: str
) -> None:
    ledger.all("UPDATE usage SET price = 601 WHERE price = 600 RETURNING 1")

    (row,) = broken(database_url)["charges_recompute"].rows

    assert row["account_id"] == ledger.account_id
    assert (row["price"], row["price_expected"]) == (601, 600)


def test_all_violations_are_counted_and_the_first_are_shown(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=1000)
    money.authorize(*(money.request(1) for _ in range(30)))
    money.all("DELETE FROM open_holds RETURNING 1")

    found = broken(database_url)["holds_end_once"]

    assert (found.checked, found.violations, len(found.rows)) == (30, 30, MAX_EXAMPLES)


def test_a_role_that_may_do_what_the_owner_may_is_named(ledger: Money, database_url: str) -> None:
    # Memberships belong to the cluster, which other tests share.
    ledger.connection.execute("GRANT tallygate_owner TO tallygate_app")
    try:
        found = broken(database_url)
    finally:
        ledger.connection.execute("REVOKE tallygate_owner FROM tallygate_app")

    assert "journal_is_append_only" in found


@pytest.mark.usefixtures("ledger")
def test_the_service_has_the_rights_that_it_takes(database_url: str) -> None:
    assert broken(f"{database_url}&options=-crole%3Dtallygate_app") == {}


def test_it_sees_one_moment_of_a_ledger_that_moves(ledger: Money, database_url: str) -> None:
    with psycopg.connect(database_url) as mover:
        mover.execute("SELECT 1 FROM tallygate.balances FOR NO KEY UPDATE")
        ledger.connection.execute("SET lock_timeout = '1s'")

        assert broken(database_url) == {}
