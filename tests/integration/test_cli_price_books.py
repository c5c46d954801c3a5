"""Price books from the command line, on a real database."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy.cli import main
from proxy.ids import uuid7

Run = Callable[..., Any]

DOUBLE = {"default": {"kind": "markup", "factor": "2"}}
NEXT = """
price_book:
  default: {kind: markup, factor: "3"}
  rules:
    - {tier: pro, kind: flat, credits: "5"}
  actions: {upload: "0.5"}
"""


@pytest.fixture
def run(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run a command, in words or with --json, on a database with version 1 in force."""
    monkeypatch.setenv("TALLYGATE_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYGATE_DATA_DIR", str(tmp_path))
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "SELECT tallygate.publish_price_book(%s, 1000000, %s, 'config')",
            (json.dumps(DOUBLE), uuid7()),
        )

    def call(*argv: object, code: int = 0, plain: bool = False) -> Any:
        arguments = ["price-book", *map(str, argv)]
        with pytest.raises(SystemExit) as ended:
            main(arguments if plain else [*arguments, "--json"])
        output = capsys.readouterr()
        assert ended.value.code == code, output
        if plain or not output.out:
            return output.out or output.err
        return json.loads(output.out)

    return call


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A config.yaml with other prices."""
    path = tmp_path / "next.yaml"
    path.write_text(NEXT)
    return path


def test_a_file_is_compared_and_published(run: Run, book: Path) -> None:
    found = run("diff", book)
    assert (found["live_version"], found["unchanged"]) == (1, False)
    assert run("diff", book, plain=True).splitlines() == [
        "default:",
        "  - kind markup, factor 2, minimum 0, allow_loss False, byok_fee_percent 0",
        "  + kind markup, factor 3, minimum 0, allow_loss False, byok_fee_percent 0",
        "added:",
        "  + tier pro, kind flat, credits 5, minimum 0, allow_loss False, byok_fee_percent 0",
        "action upload: none -> 0.5",
    ]
    done = run("publish", book, "--based-on", 1)
    assert (done["version"], done["state"], done["outcome"]) == (2, "in_force", "published")
    assert run("diff", book, plain=True) == "nothing: it is what version 2 says\n"
    first, default, rule, action = run("show", plain=True).splitlines()
    assert (first.split()[:2], first.split()[3]) == (["2", "in_force"], "cli")
    assert default.startswith("default: kind markup, factor 3, ")
    assert rule.startswith("tier pro, kind flat, ")
    assert action == "action upload: 0.5"
    assert run("show", 1)["document"]["rules"] == []


def test_a_version_is_scheduled_cancelled_and_rolled_back_to(run: Run, book: Path) -> None:
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert run("publish", book, "--at", later)["state"] == "scheduled"
    assert run("cancel", 2)["state"] == "cancelled"
    assert "has come" in run("cancel", 1, code=1)
    run("publish", book, "--at", later)
    told = run("publish", "--version", 1, plain=True).splitlines()
    assert (told[0].split()[0], told[1]) == ("4", "version 3 is overtaken")
    assert [(row["version"], row["state"]) for row in run("list")["data"]] == [
        (4, "in_force"), (3, "overtaken"), (2, "cancelled"), (1, "past"),
    ]  # fmt: skip
    assert len(run("list", plain=True).splitlines()) == 4
    assert "version 4 would be in force" in run("publish", book, "--based-on", 1, code=1)


def test_what_makes_no_sense_is_refused(run: Run, book: Path, tmp_path: Path) -> None:
    for text, reason in (
        ("default: {kind: markup, factor: 1.5}", "write it as a string"),
        ("[]", "must be an object"),
        ("{", "can't be read"),
        ("price_book: {}\ntiers: {pro: {markup: '2'}}", "has tiers"),
    ):
        book.write_text(text)
        assert reason in run("publish", book, code=2)
    assert "can't be read" in run("diff", tmp_path / "none.yaml", code=2)
    for version in ("x", "99999999999", "0"):
        assert "not the number of a version" in run("show", version, code=2)
    for moment in ("soon", "2020-01-01T00:00Z", "2099-01-01T00:00"):
        assert "not a time" in run("publish", book, "--at", moment, code=2)
    assert "no such version" in run("show", 9, code=1)
    assert [row["version"] for row in run("list")["data"]] == [1]


def test_before_the_first_publication_there_is_nothing(
    run: Run, book: Path, database_url: str
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("DELETE FROM tallygate.price_books")
    assert run("list", plain=True) == "none\n"
    assert "no such version" in run("show", code=1)
    assert "start the service once" in run("diff", book, code=1)
