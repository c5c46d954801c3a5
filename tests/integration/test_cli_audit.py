"""`tallygate audit` and `tallygate retention` from the command line, on a real database."""

import json
from pathlib import Path

import psycopg
import pytest

from tests.integration.money import Money
from tests.integration.test_cli import Run, run
from tests.integration.test_retention import aged
from tests.integration.test_seals import dump, tamper

__all__ = ["aged", "run"]


def kept(url: str) -> list[tuple[str, int, int]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT scope, through_seal, findings FROM tallygate.audit_runs ORDER BY run_id"
        ).fetchall()


def test_audits_are_kept_and_the_next_one_begins_where_a_clean_one_ended(
    run: Run, database_url: str
) -> None:
    account = run("account", "create", "Ada", "--credits", "5")["id"]

    assert run("audit")["clean"]
    first = json.loads(run("audit", "--seal", plain=True))
    assert (first["number"], first["entries"], first["previous"]) == (1, 1, "")
    assert run("audit", "--incremental")["entries"] == 1
    run("account", "grant", account, "5")
    run("account", "grant", account, "5")
    document = run("audit", "--incremental")
    assert (document["since_seal"], document["entries"], document["clean"]) == (1, 2, True)
    assert "since_seal=1 entries=2" in run("audit", "--incremental", plain=True)

    assert kept(database_url) == [
        ("full", 0, 0),
        ("incremental", 0, 0),
        ("incremental", 1, 0),
        ("incremental", 1, 0),
        ("incremental", 1, 0),
    ]


def test_what_is_broken_is_not_sealed(run: Run, database_url: str) -> None:
    run("account", "create", "Ada", "--credits", "5")
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tallygate.balances SET posted = posted + 1")

    document = run("audit", "--seal", code=1)

    assert not document["clean"]
    assert run("audit", "--seals") == {"data": []}
    assert kept(database_url) == [("incremental", 0, 1)]


def test_kept_seals_betray_what_was_rewritten(run: Run, database_url: str, tmp_path: Path) -> None:
    run("account", "create", "Ada", "--credits", "5")
    run("audit", "--seal")
    file = tmp_path / "seals.jsonl"
    file.write_text(run("audit", "--seals", plain=True))
    document = run("audit", "--since-seal", str(file))
    assert (document["clean"], document["seals"], document["sealed_entries"]) == (True, 1, 1)
    assert run("audit", "--since-seal")["clean"]
    assert "no seal" in run("audit", "--since-seal", str(Path(__file__)), code=2)

    file.write_text(file.read_text().replace('"root":"', '"root":"0'))

    assert "seals_as_kept" in run("audit", "--since-seal", str(file), code=1, plain=True)
    assert run("audit", "--since-seal")["clean"]
    assert kept(database_url)[-2:] == [("sealed", 1, 1), ("sealed", 1, 0)]


def test_an_archive_goes_with_seals(run: Run, database_url: str) -> None:
    assert database_url
    assert "--since-seal" in run("audit", "--archive", code=2)


def test_months_are_shown_and_then_detached(
    aged: Money, run: Run, database_url: str, tmp_path: Path
) -> None:
    shown = run("retention", "--before", "2025-03")["data"]
    assert [(month["month"], month["obstacle"]) for month in shown] == [
        ("2025-01", None),
        ("2025-02", "not_oldest"),
    ]
    assert "Nothing was changed" in run("retention", "--before", "2025-02", plain=True)

    done = run("retention", "--before", "2025-02", "--detach")["data"]
    assert [month["is_detached"] for month in done] == [True]
    text = run("retention", "--before", "2025-03", "--detach", plain=True)
    assert "tallygate.usage_2025_02" in text
    assert "no month" in run("retention", "--before", "2025-03", plain=True)
    assert run("audit")["clean"]

    file = tmp_path / "dump.sql"
    file.write_text(dump(database_url, "entries_2025_*", "usage_2025_*"))
    for table in ("entries_2025_01", "usage_2025_01", "entries_2025_02", "usage_2025_02"):
        aged.connection.execute(f"DROP TABLE {table}".encode())
    assert run("audit", "--since-seal")["sealed_entries_away"] > 0
    assert run("audit", "--since-seal", "--archive", str(file))["sealed_entries_away"] == 0


def test_a_month_that_can_not_go_is_explained(aged: Money, run: Run) -> None:
    tamper(aged, "UPDATE audit_runs SET findings = 1")

    text = run("retention", "--before", "2025-02", "--detach", code=1, plain=True)

    assert "unaudited: the newest audit found something" in text


@pytest.mark.parametrize("month", ["2025", "2025-13", "January"])
def test_a_month_is_a_month(month: str, run: Run) -> None:
    assert "is no month" in run("retention", "--before", month, code=2)
