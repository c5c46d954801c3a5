"""The incremental audit sees what the full one sees, of what is new."""

import asyncio

import psycopg
import pytest

from proxy.audit import INVARIANTS, Increment, Run, audit_increment
from tests.integration.money import Money, NewAccount, capture, void
from tests.integration.test_audit import BREAKS, ledger
from tests.integration.test_seals import seal, tamper

__all__ = ["ledger"]

# What speaks of the view of the double entry, which is the ledger's as a whole.
OF_THE_WHOLE = {"double_entry_balances", "liability_equals_balances"}
# What compares sums with all the rows that they are of.
OF_SUMS = {"rollups_equal_usage", "rollups_equal_days"}
# What begins at a usage row, a trail or a decision, and not at an entry or a balance.
ONLY_FULL = {
    "usage without a request": set[str](),
    "a balance that is gone": {"reserved_equals_open_holds"},
    "books with one side": set[str](),
    "books without a liability": set[str](),
}


def broken(url: str) -> set[str]:
    return {found.name for found in audit_increment(url).findings if found.violations}


def vouch(url: str) -> Increment:
    run = Run.begin(url)
    increment = audit_increment(url)
    assert run.end(url, "incremental", increment.findings, entries=increment.entries)
    return increment


@pytest.mark.usefixtures("ledger")
def test_a_ledger_in_which_everything_happened_is_clean(database_url: str) -> None:
    increment = audit_increment(database_url)

    assert [found for found in increment.findings if found.violations] == []
    assert all(found.checked for found in increment.findings)
    names = {found.name for found in increment.findings}
    priced = {"charges_recompute", "prices_cover_costs"}
    assert names == {invariant.name for invariant in INVARIANTS} - OF_THE_WHOLE | priced


def test_an_empty_ledger_is_clean(database_url: str) -> None:
    assert broken(database_url) == set()


@pytest.mark.parametrize("case", BREAKS)
def test_what_is_broken_is_named(case: str, ledger: Money, database_url: str) -> None:
    statement, expected = BREAKS[case]
    ledger.connection.execute(statement.encode())

    assert broken(database_url) == ONLY_FULL.get(case, expected - OF_THE_WHOLE - OF_SUMS)


def test_it_begins_at_the_newest_seal_that_a_clean_audit_vouches_for(
    ledger: Money, database_url: str
) -> None:
    (entries,) = ledger.one("SELECT count(*) FROM entries")
    first = vouch(database_url)
    assert (first.since_seal, first.through_seal, first.entries) == (0, 0, entries)
    seal(database_url)
    # It is sealed, and nobody has vouched for it yet.
    second = vouch(database_url)
    assert (second.since_seal, second.through_seal, second.entries) == (0, 1, entries)
    ledger.fund(5, "one more")
    third = vouch(database_url)
    assert (third.since_seal, third.through_seal, third.entries) == (1, 1, 1)
    assert third.accounts == 5


def test_an_audit_that_found_something_vouches_for_nothing(
    ledger: Money, database_url: str
) -> None:
    seal(database_url)
    ledger.connection.execute("UPDATE balances SET overdraft = overdraft + 7")
    assert any(found.violations for found in vouch(database_url).findings)
    ledger.connection.execute("UPDATE balances SET overdraft = overdraft - 7")

    assert audit_increment(database_url).since_seal == 0


@pytest.fixture
def vouched(ledger: Money, database_url: str) -> Money:
    """A ledger whose past is sealed and audited, with requests that straddle the seal."""
    held = [ledger.hold(100) for _ in range(3)]
    seal(database_url)
    vouch(database_url)
    ledger.settle(capture(held[0], 60), void(held[1]))
    ledger.settle(capture(ledger.hold(40), 30))
    ledger.fund(9, "after the seal")
    return ledger


def test_what_began_before_the_seal_and_ended_after_is_seen_whole(
    vouched: Money, database_url: str
) -> None:
    increment = audit_increment(database_url)

    assert [found for found in increment.findings if found.violations] == []
    assert (increment.since_seal, increment.entries) == (1, 5)
    (captured,) = [found for found in increment.findings if found.name == "charges_recompute"]
    assert captured.checked == 2
    assert vouched.balance()[1] == 800


@pytest.mark.parametrize(
    "statement, expected",
    [
        ("UPDATE entries SET amount = 99, reserved_delta = 99 WHERE kind = 'hold' AND seq = 39",
         {"endings_release_their_hold", "usage_agrees_with_journal"}),
        ("DELETE FROM open_holds WHERE amount = 100", {"reserved_equals_open_holds",
         "counters_equal_open_holds"}),
        ("UPDATE balances SET posted = posted + 1 WHERE posted > 0", {"balances_equal_journal"}),
        ("UPDATE balances SET seq = seq + 1 WHERE overdraft > 0", {"sequence_ends_at_balance"}),
        ("DELETE FROM entries WHERE amount = 9", {"sequence_ends_at_balance",
         "balances_equal_journal", "funding_equals_entries"}),
        ("UPDATE usage SET cost_picos = 1 WHERE price = 30", {"charges_recompute"}),
        ("DELETE FROM usage WHERE price = 60", {"captures_equal_usage",
         "usage_agrees_with_journal"}),
    ],
)  # fmt: skip
def test_what_breaks_after_the_seal_is_named(
    statement: str, expected: set[str], vouched: Money, database_url: str
) -> None:
    tamper(vouched, statement)
    assert broken(database_url) == expected


def test_what_was_vouched_for_is_not_looked_at_again(vouched: Money, database_url: str) -> None:
    tamper(vouched, "UPDATE usage SET cost_picos = 1 WHERE price = 600")
    assert broken(database_url) == set()


def test_pages_are_short_and_cover_every_account(account: NewAccount, database_url: str) -> None:
    accounts = [account(funds=100) for _ in range(5)]
    for _ in range(4):
        accounts[2].hold(1)
    run = audit_increment(database_url, page_entries=3)

    assert (run.accounts, run.entries) == (5, 9)
    # Two and two before and behind the one that fills a page by itself.
    assert run.pages == 3
    assert [found for found in run.findings if found.violations] == []


def test_it_waits_for_nobody_and_nobody_for_it(ledger: Money, database_url: str) -> None:
    with psycopg.connect(database_url) as mover:
        mover.execute("SELECT 1 FROM tallygate.balances FOR NO KEY UPDATE")
        ledger.connection.execute("SET lock_timeout = '1s'")

        assert broken(database_url) == set()


def test_the_service_has_the_rights_that_it_takes(ledger: Money, database_url: str) -> None:
    as_service = f"{database_url}&options=-crole%3Dtallygate_app"
    assert ledger.balance()
    assert broken(as_service) == set()
    run = Run.begin(as_service)
    assert run.end(as_service, "full", [], entries=0)


def test_a_result_that_can_not_be_kept_is_no_failure(database_url: str) -> None:
    read_only = f"{database_url}&options=-cdefault_transaction_read_only%3Don"
    assert not Run.begin(read_only).end(read_only, "full", [], entries=0)
    assert broken(read_only) == set()


def test_money_that_moves_meanwhile_breaks_nothing(account: NewAccount, database_url: str) -> None:
    money = account(funds=1_000_000)

    async def move(stop: asyncio.Event) -> None:
        while not stop.is_set():
            await asyncio.to_thread(lambda: money.settle(void(money.hold(10))))

    async def run() -> list[set[str]]:
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(move(stop))
            found = [await asyncio.to_thread(broken, database_url) for _ in range(5)]
            stop.set()
        return found

    assert asyncio.run(run()) == [set()] * 5
