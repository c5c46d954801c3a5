"""Accounts, keys, the audit and the doctor from the command line, on a real database."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from proxy.accounts import hash_key
from proxy.cli import main
from proxy.db import SCHEMA_VERSION
from tests.support.service import TALLYGATE

Run = Callable[..., Any]


@pytest.fixture
def run(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run a command with --json; returns its document, after checking its exit code."""
    monkeypatch.setenv("TALLYGATE_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYGATE_DATA_DIR", str(tmp_path))

    def call(*argv: str, code: int = 0, plain: bool = False) -> Any:
        with pytest.raises(SystemExit) as ended:
            main(argv if plain else [*argv, "--json"])
        output = capsys.readouterr()
        assert ended.value.code == code, output
        if plain or not output.out:
            return output.out or output.err
        return json.loads(output.out)

    return call


def test_an_account_is_made_with_credits_and_listed(run: Run) -> None:
    made = run("account", "create", "Ada", "--tier", "gold", "--credits", "12.5")

    assert made["balance"]["available"] == {"credits": "12.5", "usd": "0.0125"}
    (listed,) = run("account", "list")["data"]
    assert listed == made
    assert (listed["name"], listed["tier"], listed["status"]) == ("Ada", "gold", "active")


def test_an_account_gets_what_its_tier_gives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = {"free": {"starter_credits": "5", "monthly_credits": "7"}}
    monkeypatch.setenv("TALLYGATE_TIERS", json.dumps(tiers))

    made = run("account", "create", "Ada", "--tier", "free", "--credits", "10")

    assert made["balance"]["posted"]["credits"] == "22"
    assert "Use one of free" in run("account", "create", "Bea", "--tier", "fre", code=1)


def test_a_wrong_amount_makes_no_account(run: Run) -> None:
    assert "not a decimal number" in run("account", "create", "Ada", "--credits", "lots", code=2)
    assert run("account", "list") == {"data": []}


def test_a_grant_counts_once_for_its_reference(run: Run) -> None:
    account = run("account", "create", "Ada")["id"]

    first = run("account", "grant", account, "5", "--reason", "hello", "--reference", "r1")
    again = run("account", "grant", account, "5", "--reason", "hello", "--reference", "r1")
    other = run("account", "grant", account, "5")

    assert (first["outcome"], again["outcome"], other["outcome"]) == ("posted", "exists", "posted")
    assert first["entry_id"] == again["entry_id"]
    assert other["balance"]["posted"]["credits"] == "10"
    refused = run("account", "grant", account, "6", "--reference", "r1", code=1)
    assert "another amount" in refused


@pytest.mark.parametrize("credits_", ["0", "0.0"])
def test_a_grant_of_nothing_is_refused(credits_: str, run: Run) -> None:
    account = run("account", "create", "Ada")["id"]
    assert "more than 0" in run("account", "grant", account, credits_, code=1)


def test_what_does_not_exist_is_said(run: Run) -> None:
    account, nothing = run("account", "create", "Ada")["id"], str(uuid4())

    assert "no account" in run("account", "grant", nothing, "1", code=1)
    assert "no account" in run("key", "create", nothing, "k", code=1)
    assert "no account" in run("key", "list", nothing, code=1)
    assert "no key" in run("key", "revoke", account, nothing, code=1)
    assert "no key" in run("key", "rotate", account, nothing, code=1)


def test_a_key_is_shown_once_and_keeps_its_limits(run: Run, database_url: str) -> None:
    account = run("account", "create", "Ada")["id"]
    made = run(
        *("key", "create", account, "laptop", "--budget-credits", "3", "--budget-period", "day"),
        *("--rpm", "60", "--tpm", "1000", "--max-concurrency", "4", "--models", "a, b"),
        *("--expires-in", "30d"),
    )

    assert made["key"].startswith("sk-")
    (listed,) = run("key", "list", account)["data"]
    assert made["key"] not in json.dumps(listed)
    assert (listed["requests_per_minute"], listed["tokens_per_minute"]) == (60, 1000)
    assert (listed["max_concurrency"], listed["allowed_models"]) == (4, ["a", "b"])
    assert (listed["budget_credits"], listed["budget_period"]) == ("3", "day")
    with psycopg.connect(database_url) as connection:
        ((days, key_hash),) = connection.execute(
            "SELECT round(extract(EPOCH FROM expires_at - created_at) / 86400), key_hash"
            " FROM tallygate.virtual_keys"
        ).fetchall()
    assert (days, key_hash) == (30, hash_key(made["key"]))


def test_rotating_a_key_makes_its_like_and_revokes_it(run: Run) -> None:
    account = run("account", "create", "Ada")["id"]
    old = run("key", "create", account, "laptop", "--rpm", "60", "--models", "a")

    new = run("key", "rotate", account, old["id"])

    assert new["replaces"] == old["id"]
    assert new["key"] != old["key"]
    newest, revoked = run("key", "list", account)["data"]
    assert (newest["id"], newest["status"]) == (new["id"], "active")
    assert (revoked["id"], revoked["status"]) == (old["id"], "revoked")
    for same in ("name", "requests_per_minute", "allowed_models", "expires_at"):
        assert newest[same] == revoked[same]
    assert "is revoked" in run("key", "rotate", account, old["id"], code=1)


def test_a_key_is_made_for_what_it_is_good_for_and_rotated_with_an_overlap(run: Run) -> None:
    account = run("account", "create", "Ada")["id"]
    old = run(
        *("key", "create", account, "website", "--role", "read-only"),
        *("--endpoints", "chat.completions,audio.*", "--networks", "192.0.2.0/24,2001:db8::/32"),
    )
    new = run("key", "rotate", account, old["id"], "--overlap", "1d")
    made, replaced = run("key", "list", account)["data"]
    for key in (made, replaced):
        assert (key["role"], key["status"]) == ("read-only", "active")
        assert key["allowed_endpoints"] == ["chat.completions", "audio.*"]
        assert key["allowed_networks"] == ["192.0.2.0/24", "2001:db8::/32"]
    assert (made["id"], made["expires_at"]) == (new["id"], None)
    assert replaced["replaced_by"] == new["id"]
    assert replaced["expires_at"] is not None
    assert "rotate that one" in run("key", "rotate", account, old["id"], code=1)
    for wrong in (("--overlap", "8d"), ("--overlap", "soon")):
        run("key", "rotate", account, new["id"], *wrong, code=2)
    run("key", "create", account, "k", "--networks", "192.0.2.1/24", code=2)
    nothing = str(uuid4())
    assert nothing in run("key", "create", account, "k", "--project", nothing, code=1)


def test_revoking_twice_is_no_error(run: Run) -> None:
    account = run("account", "create", "Ada")["id"]
    key = run("key", "create", account, "laptop")["id"]
    assert run("key", "revoke", account, key) == run("key", "revoke", account, key)


def test_every_act_is_in_the_audit_trail(run: Run, database_url: str) -> None:
    account = run("account", "create", "Ada", "--credits", "1")["id"]
    key = run("key", "create", account, "laptop")["id"]
    run("key", "revoke", account, key)
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT actor, action FROM tallygate.audit_trail ORDER BY at"
        ).fetchall()
    assert rows == [
        ("cli", "account.create"), ("cli", "grant"), ("cli", "key.create"), ("cli", "key.revoke"),
    ]  # fmt: skip


def test_tables_are_for_people(run: Run) -> None:
    assert run("account", "list", plain=True) == "none\n"
    account = run("account", "create", "Ada", "--credits", "2")["id"]
    text = run("account", "grant", account, "1", plain=True)
    assert "\nposted     3\nheld       0\navailable  3\n" in text
    run("key", "create", account, "laptop", "--models", "a,b")
    head, row = run("key", "list", account, plain=True).splitlines()
    assert head.split()[:3] == ["id", "name", "prefix"]
    assert " a,b " in row


def test_another_worth_of_a_credit_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("account", "list")
    monkeypatch.setenv("TALLYGATE_CREDIT_USD", "0.01")
    assert "fixed at 0.001: set it back" in run("account", "list", code=2)


def test_the_audit_exits_with_what_it_found(run: Run, database_url: str) -> None:
    account = run("account", "create", "Ada", "--credits", "2")["id"]
    assert run("audit")["clean"] is True
    assert run("audit", plain=True).endswith("\nclean\n")

    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tallygate.balances SET seq = 7")

    document = run("audit", code=1)
    assert document["clean"] is False
    (broken,) = (found for found in document["invariants"] if found["violations"])
    assert broken["name"] == "sequence_ends_at_balance"
    assert broken["rows"] == [{"account_id": account, "balance_seq": 7, "last_seq": 1}]
    text = run("audit", code=1, plain=True)
    assert f"account_id={account} balance_seq=7 last_seq=1" in text
    assert f"1 of {len(document['invariants'])} invariants are broken" in text


def test_the_audit_says_how_many_rows_it_does_not_show(run: Run, database_url: str) -> None:
    for number in range(22):
        run("account", "create", f"account {number}")
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tallygate.balances SET seq = 7")
    assert "… and 2 more" in run("audit", code=1, plain=True)


def test_the_audit_needs_the_schema(
    run: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYGATE_DATABASE_URL", empty_database_url)
    assert "tallygate migrate" in run("audit", code=2)
    assert run("migrate") == {"before": None, "after": SCHEMA_VERSION}
    assert run("migrate", plain=True) == f"version {SCHEMA_VERSION} -> version {SCHEMA_VERSION}\n"
    assert run("audit")["clean"] is True


def test_the_doctor_exits_with_what_it_found(run: Run) -> None:
    document = run("doctor", code=1)
    assert document["ok"] is False
    checks = {check["name"]: check for check in document["checks"]}
    assert checks["schema"]["status"] == "ok"
    assert checks["litellm"]["status"] == "fail"
    assert "tallygate up" in checks["litellm"]["remedy"]
    assert "FAIL  litellm " in run("doctor", code=1, plain=True)


def test_the_doctor_goes_on_without_a_database(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLYGATE_DATABASE_URL")
    monkeypatch.setenv("TALLYGATE_LITELLM_URL", "http://127.0.0.1:1")
    checks = {check["name"]: check for check in run("doctor", code=1)["checks"]}
    assert checks["postgresql"]["found"] == "not running"
    assert checks["litellm"]["found"] == "no answer from http://127.0.0.1:1"
    assert checks["spool"]["status"] == "ok"


def test_a_database_that_is_away_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TALLYGATE_DATABASE_URL", "postgresql://127.0.0.1:1/nothing")
    assert "can't be reached" in run("account", "list", code=2)
    assert "can't be reached" in run("migrate", code=2)


def test_output_that_nobody_reads_to_its_end_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does when it has seen enough
    try:
        done = subprocess.run(
            [TALLYGATE, "doctor"],
            env={"TALLYGATE_DATA_DIR": str(tmp_path)},
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
