"""What the doctor says of PostgreSQL and of what is in it."""

import json
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from proxy.db import migrate
from proxy.doctor import Check, LedgerExpectations, check_database
from tests.integration.money import NewAccount
from tests.support.postgres import VERSION

BOOK = {"default": {"kind": "markup", "factor": "2.0"}}
EXPECTED = LedgerExpectations(nanos_per_credit=1_000_000, price_book=BOOK, sweep_grace_s=60)


def look(url: str, expected: LedgerExpectations = EXPECTED) -> dict[str, Check]:
    return {check.name: check for check in check_database(url, expected)}


def execute(url: str, statement: str, *parameters: Any) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute(statement.encode(), parameters or None)


def set_up(url: str) -> None:
    execute(url, "SELECT freeze_nanos_per_credit(1000000)")
    document = {"default": {"kind": "markup", "factor": "2"}}
    execute(url, "SELECT publish_price_book(%s, 1000000, %s, 't')", json.dumps(document), uuid4())


def test_a_database_as_it_should_be_is_ok(database_url: str) -> None:
    set_up(database_url)
    checks = look(database_url)
    # The tests' server is the one thing that is not as it should be.
    assert {name for name, check in checks.items() if check.status != "ok"} == {"durability"}
    assert checks["postgresql_version"].found.startswith(f"{VERSION}.")


def test_a_server_that_may_forget_fails(database_url: str) -> None:
    check = look(database_url)["durability"]
    assert check.status == "fail"
    assert "turn on fsync, full_page_writes" in check.remedy


def test_a_server_that_is_away_fails() -> None:
    checks = look("postgresql://127.0.0.1:1/nothing")
    assert [check.status for check in checks.values()] == ["fail"]
    assert "TALLYGATE_DATABASE_URL" in checks["postgresql"].remedy


def test_a_database_without_schema_fails_until_it_is_migrated(empty_database_url: str) -> None:
    check = look(empty_database_url)["schema"]
    assert (check.status, check.found) == ("fail", "none")
    assert "tallygate migrate" in check.remedy

    migrate(empty_database_url)
    assert look(empty_database_url)["schema"].status == "ok"


def test_a_fresh_database_says_what_the_first_start_will_do(database_url: str) -> None:
    checks = look(database_url)
    assert (checks["price_book"].status, checks["price_book"].found) == ("fail", "none")
    assert checks["credit_usd"].status == "warn"


def test_another_worth_of_a_credit_fails(database_url: str) -> None:
    execute(database_url, "SELECT freeze_nanos_per_credit(5)")
    check = look(database_url)["credit_usd"]
    assert (check.status, check.found) == ("fail", "fixed at 5 nano-USD")


@pytest.mark.parametrize(
    "book, status",
    [({"default": {"kind": "flat", "credits": "1"}}, "warn"), ({"rules": 1}, "fail")],
)
def test_another_price_book_is_named(
    book: dict[str, object], status: str, database_url: str
) -> None:
    set_up(database_url)
    expected = LedgerExpectations(nanos_per_credit=1_000_000, price_book=book, sweep_grace_s=60)
    assert look(database_url, expected)["price_book"].status == status


def test_a_role_that_may_write_fails(database_url: str) -> None:
    execute(database_url, "GRANT DELETE ON open_holds TO tallygate_app")
    check = look(database_url)["roles"]
    assert (check.status, check.found) == ("fail", "tallygate_app can write to tables")


def test_a_login_without_rights_fails_with_the_way_out(database_url: str) -> None:
    execute(database_url, "CREATE ROLE stranger LOGIN")
    try:
        checks = look(database_url.replace("postgres@", "stranger@"))
    finally:
        execute(database_url, "DROP ROLE stranger")
    assert checks["postgresql"].status == "fail"
    assert "tallygate_app" in checks["postgresql"].remedy


def test_rows_of_no_month_are_warned_of(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    money.hold(1, request_id="00000000-0000-7000-8000-000000000000")
    checks = look(database_url)
    assert (checks["default_partitions"].status, checks["default_partitions"].found) == (
        "warn",
        "1 rows",
    )


def test_a_month_without_partition_is_warned_of(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        ((name,),) = connection.execute(
            "SELECT to_char(now() + interval '1 month', '\"usage_\"YYYY_MM')"
        ).fetchall()
    execute(database_url, f"DROP TABLE {name}")
    check = look(database_url)["partitions"]
    assert (check.status, check.found) == ("warn", f"missing: {name}")


def test_holds_that_nobody_sweeps_are_warned_of(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    money.hold(1, ttl_s=-1000)
    check = look(database_url)["holds"]
    assert (check.status, check.found) == ("warn", "1 overdue")
