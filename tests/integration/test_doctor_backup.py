"""What `tallygate doctor --backup` says where something is missing."""

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict

from proxy.backups import check_backup
from proxy.doctor import Check
from proxy.ids import uuid7
from proxy.seals import Seal
from proxy.spool import Spool
from tests.integration.money import Money, NewAccount
from tests.integration.test_cli import Run, run
from tests.support.postgres import Cluster

__all__ = ["run"]


def look(url: str, data_dir: Path, kept: list[Seal] | None = None) -> dict[str, Check]:
    return {check.name: check for check in check_backup(url, data_dir, kept)}


def statuses(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items() if check.status != "ok"}


def execute(url: str, statement: str, *parameters: Any) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode(), parameters or None)


def seal(money: Money, number: int = 1) -> None:
    money.all("SELECT * FROM seal_page(%s, %s, 1000)", number, UUID(int=0))
    money.one("SELECT number FROM close_seal(%s)", number)


@contextmanager
def receiver(postgres: Cluster, directory: Path, name: str) -> Generator[None]:
    """Take the log as it is written, as pg_receivewal and standbys do."""
    program = Path(f"/proc/{postgres.server.pid()}/exe").resolve().with_name("pg_receivewal")
    host = conninfo_to_dict(postgres.server.url())["host"]
    process = subprocess.Popen(
        [program, "-h", str(host), "-U", "postgres", "-D", directory, "--no-loop"],
        env={**os.environ, "PGAPPNAME": name},
    )
    try:
        with psycopg.connect(postgres.server.url(), autocommit=True) as connection:
            receivers: list[tuple[object, ...]] = []
            while process.poll() is None and receivers != [("streaming",)]:
                receivers = connection.execute(
                    "SELECT state FROM pg_stat_replication, pg_sleep(0.02)"
                ).fetchall()
        yield
    finally:
        process.terminate()
        process.wait()


def test_a_ledger_on_one_disk_fails_and_every_finding_says_what_to_do(
    database_url: str, tmp_path: Path
) -> None:
    checks = look(database_url, tmp_path)
    expected = {"wal_archive": "fail", "standby": "fail"} | dict.fromkeys(
        ("base_backup", "seal", "kept_seals", "audit"), "warn"
    )
    found = statuses(checks)
    # PostgreSQL makes new clusters with checksums since 18.
    found.pop("data_checksums", None)
    assert found == expected
    assert all(check.remedy for check in checks.values() if check.status != "ok")


def test_a_server_that_is_away_fails_and_the_spool_is_looked_at_all_the_same(
    tmp_path: Path,
) -> None:
    Spool(tmp_path / "spool").append([b"{}"])
    checks = look("postgresql://127.0.0.1:1/nothing", tmp_path)
    assert statuses(checks) == {"postgresql": "fail", "spool": "warn"}


def test_a_spool_that_waits_for_long_fails(database_url: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append([b"{}"])
    spool.set_aside(b"{}")
    (file,) = (tmp_path / "spool").glob("*.spool")
    hours_ago = f"{int(file.name[:13].replace('-', ''), 16) - 3 * 3_600_000:012x}"
    file.rename(file.with_name(f"{hours_ago[:8]}-{hours_ago[8:]}{file.name[13:]}"))
    checks = look(database_url, tmp_path)
    assert checks["spool"].found.endswith("the oldest came 3 hours ago")
    assert (checks["spool"].status, checks["rejected_settlements"].status) == ("fail", "fail")


def test_who_takes_the_log_is_told_apart(
    postgres: Cluster, database_url: str, tmp_path: Path
) -> None:
    with receiver(postgres, tmp_path, "pg_receivewal"):
        checks = look(database_url, tmp_path)
        assert (checks["wal_archive"].status, checks["standby"].status) == ("ok", "ok")
    with receiver(postgres, tmp_path, "replica1"):
        checks = look(database_url, tmp_path)
        assert (checks["wal_archive"].status, checks["standby"].status) == ("warn", "ok")
        assert "a standby repeats every mistake" in checks["wal_archive"].remedy
        assert checks["standby"].found.startswith("replica1 (streaming, async")


def test_a_synchronous_standby_that_is_away_fails(database_url: str, tmp_path: Path) -> None:
    execute(database_url, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    execute(database_url, "SELECT pg_reload_conf()")
    try:
        with psycopg.connect(database_url, autocommit=True) as connection:
            while connection.execute("SHOW synchronous_standby_names").fetchall() != [("nobody",)]:
                connection.execute("SELECT pg_sleep(0.02)")
        check = look(database_url, tmp_path)["standby"]
    finally:
        execute(database_url, "ALTER SYSTEM RESET synchronous_standby_names")
        execute(database_url, "SELECT pg_reload_conf()")
    assert (check.status, check.found) == ("fail", "none is connected")


def test_a_slot_that_nobody_reads_is_warned_of(database_url: str, tmp_path: Path) -> None:
    execute(database_url, "SELECT pg_create_physical_replication_slot('left_behind', true)")
    try:
        check = look(database_url, tmp_path)["replication_slots"]
    finally:
        execute(database_url, "SELECT pg_drop_replication_slot('left_behind')")
    assert (check.status, check.found) == ("warn", "left_behind (reserved)")


def test_a_plain_login_sees_what_it_may_and_says_what_it_may_not(
    database_url: str, tmp_path: Path
) -> None:
    execute(database_url, "CREATE ROLE looker LOGIN IN ROLE tallygate_app")
    try:
        checks = look(database_url.replace("postgres@", "looker@"), tmp_path)
    finally:
        execute(database_url, "DROP ROLE looker")
    assert checks["wal_archive"].found == "off"
    assert "GRANT pg_monitor" in checks["base_backup"].remedy


def test_a_login_without_rights_is_told_the_way_out(database_url: str, tmp_path: Path) -> None:
    execute(database_url, "CREATE ROLE outsider LOGIN")
    try:
        checks = look(database_url.replace("postgres@", "outsider@"), tmp_path)
    finally:
        execute(database_url, "DROP ROLE outsider")
    assert statuses(checks) == {"postgresql": "fail"}
    assert "tallygate_app" in checks["postgresql"].remedy


def test_a_database_without_seals_asks_for_the_schema(
    empty_database_url: str, tmp_path: Path
) -> None:
    assert look(empty_database_url, tmp_path)["seal"].remedy == "`tallygate migrate`"


def test_seals_and_audits_that_are_fresh_and_kept_are_ok(
    account: NewAccount, run: Run, tmp_path: Path
) -> None:
    money = account(funds=1000)
    seal(money)
    money.one("SELECT record_audit(%s, 'full', 1, 0, 1, 1)", uuid7())
    file = tmp_path / "seals.jsonl"
    file.write_text(run("audit", "--seals", plain=True))

    document = run("doctor", "--backup", "--kept", str(file), code=1)
    found = {check["name"]: check["status"] for check in document["checks"]}
    assert (found["seal"], found["kept_seals"], found["audit"]) == ("ok", "ok", "ok")
    assert not document["ok"]

    # One of today may be made after today's copy; two are too many.
    for number, status in ((2, "ok"), (3, "warn")):
        seal(money, number)
        document = run("doctor", "--backup", "--kept", str(file), code=1)
        found = {check["name"]: check["status"] for check in document["checks"]}
        assert found["kept_seals"] == status

    file.write_text(file.read_text().replace('"root":"', '"root":"0'))
    money.one("SELECT record_audit(%s, 'full', 1, 7, 1, 1)", uuid7())
    text = run("doctor", "--backup", "--kept", str(file), code=1, plain=True)
    assert "FAIL  kept_seals" in text
    assert "the newest found 7" in text
