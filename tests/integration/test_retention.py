"""Old months are detached, and everything still adds up."""

import gzip
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from proxy.audit import Finding, audit, audit_increment, check_seals
from proxy.errors import ConfigurationError
from proxy.ids import uuid7
from proxy.retention import detach, months
from tests.integration.money import Money, NewAccount, capture, void
from tests.integration.test_seals import dump, seal, tamper

# Both long enough ago, and the second follows the first.
FIRST, SECOND, AFTER = date(2025, 1, 1), date(2025, 2, 1), date(2025, 3, 1)
REVIEW = {"status": "needs_review", "review_reason": "usage_missing"}


def old_id(day: date) -> UUID:
    """An id as a proxy made it on that day."""
    milliseconds = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)
    return UUID(int=(milliseconds << 80) | (uuid7().int & (2**80 - 1)))


def hold(money: Money, day: date, amount: int = 100) -> dict[str, object]:
    return money.hold(amount, request_id=str(old_id(day)))


def fund(money: Money, day: date, amount: int, reference: str) -> None:
    money.one(
        "SELECT outcome FROM fund(%s, %s, 'deposit', %s, 'test', %s, NULL, 'tester')",
        *(money.account_id, old_id(day), amount, reference),
    )


def broken(findings: list[Finding]) -> dict[str, list[dict[str, Any]]]:
    return {found.name: found.rows for found in findings if found.violations}


def vouch(money: Money, findings: int = 0) -> None:
    money.one(
        "SELECT record_audit(%s, 'full', (SELECT coalesce(max(number), 0) FROM seals), %s, 0, 0)",
        uuid7(),
        findings,
    )


@pytest.fixture
def aged(account: NewAccount, database_url: str) -> Money:
    """Two old months and today; requests of a month that ended in the next one."""
    money, other = account(), account()
    money.one("SELECT ensure_partitions(%s, 1)", FIRST)
    money.one("SELECT publish_price_book('{}', 1000000, %s, 'test')", uuid4())
    fund(money, FIRST, 1_000_000, "one")
    fund(other, FIRST, 500, "one")
    money.settle(capture(hold(money, FIRST), 60))
    other.settle(void(hold(other, FIRST)))
    straddling = hold(money, FIRST)
    late = hold(money, FIRST + timedelta(days=30), 50)
    money.settle(capture(hold(money, SECOND), 70))
    money.settle(capture(straddling, 80))
    money.settle(void(late, **REVIEW))
    fund(money, SECOND, 1000, "two")
    money.settle(capture(hold(money, SECOND), 90))
    money.one(
        "SELECT outcome FROM resolve_review(%s, %s, 'charge', (SELECT settled_at FROM usage"
        " WHERE request_id = %s), 33, 0, 'review', NULL, NULL, %s, 'me', 'why')",
        *(money.account_id, late["request_id"], late["request_id"], uuid4()),
    )
    money.fund(7, "now")
    money.settle(capture(money.hold(10), 5))
    money.hold(20)
    seal(database_url)
    vouch(money)
    return money


def test_a_month_is_detached_and_the_books_still_add_up(aged: Money, database_url: str) -> None:
    before = aged.all("SELECT * FROM balances ORDER BY account_id")
    totals = aged.all(
        "SELECT book, sum(debit), sum(credit) FROM double_entry GROUP BY 1 ORDER BY 1"
    )

    assert [(m.month, m.obstacle) for m in months(database_url, AFTER)] == [
        (FIRST, None),
        (SECOND, "not_oldest"),
    ]
    (first,) = detach(database_url, SECOND, actor="tester")

    assert first.is_detached
    assert broken(audit(database_url)) == {}
    assert broken(audit_increment(database_url).findings) == {}
    (second,) = detach(database_url, AFTER, actor="tester")
    assert second.is_detached
    assert broken(audit(database_url)) == {}
    assert broken(audit_increment(database_url).findings) == {}
    assert months(database_url, AFTER) == []
    assert aged.all("SELECT * FROM balances ORDER BY account_id") == before
    assert totals == aged.all(
        "SELECT book, sum(debit), sum(credit) FROM double_entry GROUP BY 1 ORDER BY 1"
    )
    assert aged.one("SELECT sum(entries) FROM detached_months") == aged.one(
        "SELECT sum(n) FROM (SELECT count(*) AS n FROM entries_2025_01 UNION ALL"
        " SELECT count(*) FROM entries_2025_02) AS t"
    )
    # Only what came after still fills gaps; the floors lie before it.
    assert aged.all("SELECT * FROM carried_seams") == []
    assert aged.one(
        "SELECT count(*) FROM audit_trail WHERE action = 'retention.detach' AND actor = 'tester'"
    ) == (2,)


def test_requests_that_ended_in_the_next_month_fill_the_gaps_in_its_numbers(
    aged: Money, database_url: str
) -> None:
    detach(database_url, SECOND, actor="tester")

    gaps = [row[0] for row in aged.all("SELECT seq FROM carried_seams ORDER BY seq")]
    kept = [
        row[0]
        for row in aged.all(
            "SELECT seq FROM entries WHERE account_id = %s ORDER BY seq", aged.account_id
        )
    ]
    (floor,) = aged.one("SELECT seq FROM carried_floors WHERE account_id = %s", aged.account_id)
    assert gaps == [8, 9, 13]
    assert sorted([*gaps, *kept]) == list(range(floor + 1, 18))


def test_life_goes_on_after_a_month_was_detached(aged: Money, database_url: str) -> None:
    detach(database_url, AFTER, actor="tester")

    aged.settle(capture(aged.hold(10), 5))
    aged.fund(8, "again")
    seal(database_url)

    assert broken(audit(database_url)) == {}
    assert broken(check_seals(database_url).findings) == {}
    gone = void({"account_id": str(aged.account_id), "request_id": str(old_id(FIRST))})
    assert aged.settle(gone) == ["unknown"]


STATEMENTS = {
    "a carried total": (
        "UPDATE carried_totals SET posted = posted + 1 WHERE kind = 'capture'",
        {"balances_equal_journal", "liability_equals_balances"},
    ),
    "a carried deposit": (
        "UPDATE carried_totals SET posted = posted + 1 WHERE kind = 'deposit'",
        {"balances_equal_journal", "liability_equals_balances", "funding_equals_entries"},
    ),
    "a deposit of a detached month": (
        "UPDATE funding SET amount = amount + 1 WHERE external_id = 'one'",
        {"funding_equals_entries"},
    ),
    "a floor": (
        "UPDATE carried_floors SET posted_after = posted_after + 1 WHERE posted_after > 1000",
        {"running_balances_chain"},
    ),
    "a floor that is lower": (
        "UPDATE carried_floors SET seq = seq - 1 WHERE posted_after > 1000",
        {"sequence_without_gaps"},
    ),
    "a seam": (
        "DELETE FROM carried_seams WHERE seq = 9",
        {"sequence_without_gaps", "running_balances_chain"},
    ),
    "a table that can be changed": (
        "DROP TRIGGER usage_2025_01_append_only ON usage_2025_01",
        {"journal_is_append_only"},
    ),
}


@pytest.mark.parametrize("case", STATEMENTS)
def test_what_is_carried_over_wrongly_is_named(case: str, aged: Money, database_url: str) -> None:
    detach(database_url, SECOND, actor="tester")
    statement, expected = STATEMENTS[case]
    tamper(aged, statement)

    assert set(broken(audit(database_url))) == expected


def obstacle(url: str) -> str | None:
    return detach(url, SECOND, actor="tester")[0].obstacle


def test_a_month_with_an_open_hold_stays(aged: Money, database_url: str) -> None:
    pending = hold(aged, FIRST)
    assert obstacle(database_url) == "open_holds"
    aged.settle(void(pending))
    assert obstacle(database_url) == "unsealed"
    seal(database_url)
    assert obstacle(database_url) is None


def test_a_month_that_waits_for_a_review_stays(aged: Money, database_url: str) -> None:
    aged.settle(void(hold(aged, FIRST), **REVIEW))
    seal(database_url)
    assert obstacle(database_url) == "open_reviews"


def test_a_month_of_a_ledger_that_is_not_clean_stays(aged: Money, database_url: str) -> None:
    vouch(aged, findings=1)
    assert obstacle(database_url) == "unaudited"


def test_no_month_goes_while_rows_are_misplaced(aged: Money, database_url: str) -> None:
    aged.settle(void(hold(aged, date(2020, 1, 1))))
    seal(database_url)
    assert obstacle(database_url) == "misplaced_rows"


def test_a_recent_month_stays(account: NewAccount, database_url: str) -> None:
    money = account(funds=100)
    seal(database_url)
    vouch(money)
    today = datetime.now(UTC).date()

    for month in months(database_url, today + timedelta(days=100)):
        assert month.obstacle in {"too_recent", "not_oldest"}
        outcome = money.one("SELECT detach_month(%s, %s, 'tester')", month.month, uuid7())
        assert outcome == (month.obstacle,)
    assert money.one("SELECT detach_month('2001-01-01', %s, 'tester')", uuid7()) == (
        "unknown_month",
    )


def test_who_waits_for_the_table_holds_up_nobody(aged: Money, database_url: str) -> None:
    with psycopg.connect(database_url) as report:
        report.execute("SELECT count(*) FROM tallygate.entries")
        assert obstacle(database_url) == "busy"
    assert aged.all("SELECT * FROM carried_totals") == []
    assert broken(audit(database_url)) == {}
    assert obstacle(database_url) is None


def test_a_price_that_changes_while_a_month_goes_keeps_it(aged: Money, database_url: str) -> None:
    (request_id, settled_at) = aged.one("SELECT request_id, settled_at FROM usage WHERE price = 60")
    aged.one(
        "SELECT outcome FROM resolve_review(%s, %s, 'reprice', %s, 50, 0, 'review', NULL, NULL,"
        " %s, 'me', 'why')",
        *(aged.account_id, request_id, settled_at, uuid4()),
    )
    seal(database_url)
    assert obstacle(database_url) == "busy"


def test_sealed_rows_of_a_detached_month_are_known_to_be_away(
    aged: Money, database_url: str
) -> None:
    whole = check_seals(database_url).entries
    detach(database_url, SECOND, actor="tester")

    looked_at = check_seals(database_url)

    assert broken(looked_at.findings) == {}
    assert looked_at.entries + looked_at.entries_away == whole
    tamper(aged, "DELETE FROM entries WHERE seq = 10")
    (row,) = broken(check_seals(database_url).findings)["sealed_entries_unchanged"]
    assert (row["account_id"], row["seq"], row["is"]) == (aged.account_id, 10, "deleted")


@pytest.mark.parametrize("suffix", [".sql", ".sql.gz"])
def test_a_dumped_month_is_checked_against_its_seals(
    suffix: str,
    aged: Money,
    database_url: str,
    tmp_path: Path,
) -> None:
    whole = check_seals(database_url).entries
    detach(database_url, AFTER, actor="tester")
    text = dump(database_url, "entries_2025_*", "usage_2025_*")
    for table in ("entries_2025_01", "usage_2025_01", "entries_2025_02", "usage_2025_02"):
        aged.connection.execute(f"DROP TABLE {table}".encode())
    file = tmp_path / f"dump{suffix}"
    file.write_bytes(gzip.compress(text.encode()) if suffix == ".sql.gz" else text.encode())

    looked_at = check_seals(database_url, archives=[file])

    assert broken(looked_at.findings) == {}
    assert (looked_at.entries, looked_at.entries_away) == (whole, 0)
    assert check_seals(database_url).entries < whole

    file = tmp_path / "edited.sql"
    assert "\tcapture\t3\t60\t" in text
    file.write_text(text.replace("\tcapture\t3\t60\t", "\tcapture\t3\t61\t"))
    (row,) = broken(check_seals(database_url, archives=[file]).findings)["sealed_entries_unchanged"]
    assert (row["account_id"], row["seq"], row["is"]) == (aged.account_id, 3, "changed")


def test_detached_tables_that_are_still_there_are_checked(aged: Money, database_url: str) -> None:
    whole = check_seals(database_url).entries
    detach(database_url, SECOND, actor="tester")
    # A column that came later is missing in them.
    aged.connection.execute("ALTER TABLE usage ADD COLUMN more text")

    assert check_seals(database_url, archives=[]).entries == whole

    tamper(aged, "DROP TRIGGER entries_2025_01_append_only ON entries_2025_01")
    aged.connection.execute("DELETE FROM entries_2025_01 WHERE amount = 60")
    (row,) = broken(check_seals(database_url, archives=[]).findings)["sealed_entries_unchanged"]
    assert (row["account_id"], row["seq"], row["is"]) == (aged.account_id, 3, "deleted")


def test_a_file_that_is_no_dump_is_refused(aged: Money, database_url: str, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text("COPY tallygate.accounts (name) FROM stdin;\n\\.\n")
    assert aged.balance()
    with pytest.raises(ConfigurationError, match="holds no month"):
        check_seals(database_url, archives=[file])
    with pytest.raises(ConfigurationError, match="can't be read"):
        check_seals(database_url, archives=[tmp_path / "nowhere"])
