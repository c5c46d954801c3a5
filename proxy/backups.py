"""`tallygate doctor --backup`: what would be left of the ledger if this machine burnt down now.

Looks at what PostgreSQL says of its archive, its standbys and its last base backup, at the spool,
which is no part of any of them, and at what shows after a restore whether the ledger is whole.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg.rows import DictRow, dict_row

from proxy.doctor import Check
from proxy.seals import Seal
from proxy.spool import Spool

# A segment that waits longer than this is not on its way.
ARCHIVE_LATE_S = 600
ARCHIVE_TIMEOUT_S = 300
BASE_BACKUP_OLD_S = 8 * 86_400
SPOOL_LATE_S = 600
# A day, and two hours for whoever does it by a timetable.
DAILY_S = 26 * 3600
_ARCHIVE_BY_STREAM = "pg_receivewal"

_SERVER: LiteralString = """
    SELECT
        pg_is_in_recovery() AS is_standby,
        current_setting('wal_level') AS wal_level,
        current_setting('archive_mode') AS archive_mode,
        nullif(current_setting('archive_command'), '') IS NOT NULL
        OR nullif(current_setting('archive_library', true), '') IS NOT NULL AS has_archiver,
        extract(EPOCH FROM current_setting('archive_timeout')::interval)::integer
        AS archive_timeout_s,
        current_setting('data_checksums') AS data_checksums,
        current_setting('synchronous_standby_names') AS synchronous_standby_names,
        pg_has_role(current_user, 'pg_monitor', 'MEMBER') AS sees_all
"""

_ARCHIVER: LiteralString = """
    SELECT
        a.last_archived_wal, a.last_failed_wal, a.failed_count,
        extract(EPOCH FROM now() - a.last_archived_time)::float8 AS archived_s,
        extract(EPOCH FROM now() - a.last_failed_time)::float8 AS failed_s,
        coalesce(a.last_failed_time > a.last_archived_time, a.failed_count > 0) AS is_failing,
        -- Whether the segment before the one that is being written is not there. Names sort as the
        -- log runs; the timeline stands first.
        coalesce(
            left(a.last_archived_wal, 24) < pg_walfile_name(
                pg_current_wal_insert_lsn()
                - (SELECT setting::numeric FROM pg_settings WHERE name = 'wal_segment_size')
            ),
            true
        ) AS is_behind
    FROM pg_stat_archiver AS a
"""

_RECEIVERS: LiteralString = """
    SELECT
        application_name, state, sync_state,
        extract(EPOCH FROM replay_lag)::float8 AS lag_s
    FROM pg_stat_replication ORDER BY application_name
"""

_SLOTS: LiteralString = """
    SELECT slot_name, wal_status FROM pg_replication_slots
    WHERE NOT active OR wal_status IN ('unreserved', 'lost') ORDER BY slot_name
"""

_BASE_BACKUP: LiteralString = """
    SELECT extract(EPOCH FROM now() - max(modification))::float8 AS age_s
    FROM pg_ls_waldir() WHERE name ~ '\\.backup$'
"""

_PROOF: LiteralString = """
    SELECT
        (SELECT max(number) FROM tallygate.seals) AS newest_seal,
        extract(EPOCH FROM now() - (SELECT max(sealed_at) FROM tallygate.seals))::float8
        AS sealed_s,
        extract(EPOCH FROM now() - (
            SELECT max(at) FROM tallygate.audit_runs WHERE findings = 0
        ))::float8 AS clean_s,
        (SELECT findings FROM tallygate.audit_runs ORDER BY run_id DESC LIMIT 1) AS findings
"""


def check_backup(url: str, data_dir: Path, kept: Sequence[Seal] | None) -> list[Check]:
    """Look at everything that a restore depends on; changes nothing.

    `kept` is what the operator keeps of the seals, None where the command was not told.
    """
    spooled = list(_spool(data_dir))
    try:
        connection = psycopg.Connection[DictRow].connect(
            url,
            autocommit=True,
            connect_timeout=5,
            application_name="tallygate doctor",
            row_factory=dict_row,
        )
    except psycopg.Error as error:
        remedy = "start it, or put its address into TALLYGATE_DATABASE_URL"
        return [Check("postgresql", "fail", str(error).strip(), remedy), *spooled]
    with connection:
        try:
            return [*_database(connection, kept), *spooled]
        except psycopg.Error as error:
            remedy = "give the login of TALLYGATE_DATABASE_URL the role tallygate_app"
            return [Check("postgresql", "fail", str(error).strip(), remedy), *spooled]


def _database(
    connection: psycopg.Connection[DictRow], kept: Sequence[Seal] | None
) -> Iterator[Check]:
    (server,) = connection.execute(_SERVER).fetchall()
    if server["is_standby"]:
        remedy = "ask the primary: what it archives and who follows it is known there"
        yield Check("postgresql", "warn", "this is a standby", remedy)
        return
    yield from _copies(connection, server)
    yield from _slots(connection)
    yield _base_backup(connection, server)
    yield _checksums(server)
    yield from _proofs(connection, kept)


# -------------------------------------------------------------------------------------------------
# Copies
# -------------------------------------------------------------------------------------------------


def _copies(connection: psycopg.Connection[DictRow], server: DictRow) -> Iterator[Check]:
    receivers = connection.execute(_RECEIVERS).fetchall()
    streamed = [row for row in receivers if row["application_name"] == _ARCHIVE_BY_STREAM]
    standbys = [row for row in receivers if row["application_name"] != _ARCHIVE_BY_STREAM]
    archives = server["archive_mode"] != "off" and server["has_archiver"]
    yield Check.of(
        "wal_level",
        server["wal_level"],
        remedy="ALTER SYSTEM SET wal_level = replica, and restart: neither a standby nor a base"
        " backup can be made without",
        bad="fail" if server["wal_level"] == "minimal" else None,
    )
    if archives:
        yield Check.of("wal_archive", "on")
        yield from _archiver(connection, server)
    elif streamed:
        yield Check.of("wal_archive", "pg_receivewal takes it as it is written")
    else:
        has_none = server["archive_mode"] != "off"
        yield Check.of(
            "wal_archive",
            "on, and archive_command is empty" if has_none else "off",
            remedy="set archive_mode and archive_command, or run pg_receivewal elsewhere"
            + (": a standby repeats every mistake at once" if standbys else "")
            + " (docs/backups.md)",
            bad="warn" if standbys else "fail",
        )
    yield _standbys(standbys, server, is_archived=archives or bool(streamed))


def _archiver(connection: psycopg.Connection[DictRow], server: DictRow) -> Iterator[Check]:
    (row,) = connection.execute(_ARCHIVER).fetchall()
    yield last_archived(row)
    timeout_s = server["archive_timeout_s"]
    yield Check.of(
        "archive_timeout",
        f"{timeout_s} s" if timeout_s else "none",
        remedy="ALTER SYSTEM SET archive_timeout = '60s'; SELECT pg_reload_conf(): a segment is"
        " archived when it is full, and so much is lost with this machine",
        bad=None if 0 < timeout_s <= ARCHIVE_TIMEOUT_S else "warn",
    )


def last_archived(row: Mapping[str, Any]) -> Check:
    """Judge what PostgreSQL says of its archiver; ages in seconds, None where there was nothing."""
    age_s: float | None = row["archived_s"]
    found = "nothing yet" if age_s is None else f"{row['last_archived_wal']}, {_ago(age_s)}"
    if row["failed_count"]:
        found += f"; failed {row['failed_count']} times, last {_ago(row['failed_s'])}"
    if row["is_failing"]:
        remedy = (
            f"archive_command fails for {row['last_failed_wal']}: PostgreSQL's log says why. Until"
            " it is mended pg_wal grows, and what is written is on this machine alone"
        )
        return Check("last_archived", "fail", found, remedy)
    is_late = row["is_behind"] and (age_s is None or age_s > ARCHIVE_LATE_S)
    remedy = "SELECT pg_switch_wal(), and look again; if nothing came, at archive_command's target"
    return Check.of("last_archived", found, remedy=remedy, bad="warn" if is_late else None)


def _standbys(standbys: Sequence[DictRow], server: DictRow, *, is_archived: bool) -> Check:
    wanted = bool(server["synchronous_standby_names"])
    told = [
        f"{row['application_name']} ({row['state'] or 'state hidden'},"
        f" {row['sync_state'] or 'unknown'}"
        + (f", {row['lag_s']:.1f} s behind)" if row["lag_s"] is not None else ")")
        for row in standbys
    ]
    is_synchronous = any(row["sync_state"] in {"sync", "quorum"} for row in standbys)
    if wanted and server["sees_all"] and not is_synchronous:
        return Check.of(
            "standby",
            ", ".join(told) or "none is connected",
            remedy="synchronous_standby_names wants one and none is: every commit waits. Bring it"
            " back, or take it out of the setting",
            bad="fail",
        )
    if not standbys:
        remedy = "with this disk everything would be gone: set one up, or archive the log"
        return Check.of("standby", "none", remedy=remedy, bad=None if is_archived else "fail")
    return Check.of("standby", ", ".join(told))


def _slots(connection: psycopg.Connection[DictRow]) -> Iterator[Check]:
    idle = connection.execute(_SLOTS).fetchall()
    yield Check.of(
        "replication_slots",
        ", ".join(f"{row['slot_name']} ({row['wal_status'] or 'unused'})" for row in idle)
        or "none is idle",
        remedy="nobody reads them, and pg_wal grows until the disk is full: bring their readers"
        " back, or SELECT pg_drop_replication_slot('…')",
        bad="warn" if idle else None,
    )


def _base_backup(connection: psycopg.Connection[DictRow], server: DictRow) -> Check:
    if not server["sees_all"]:
        remedy = "GRANT pg_monitor to this login; meanwhile, see that there is one"
        return Check("base_backup", "warn", "this login may not look", remedy)
    (row,) = connection.execute(_BASE_BACKUP).fetchall()
    age_s = row["age_s"]
    return Check.of(
        "base_backup",
        "no pg_basebackup was made of this server" if age_s is None else f"made {_ago(age_s)}",
        remedy="pg_basebackup: a restore begins with one, and takes the longer the older it is."
        " Where the disk is copied otherwise, see that the copies are there",
        bad="warn" if age_s is None or age_s > BASE_BACKUP_OLD_S else None,
    )


def _checksums(server: DictRow) -> Check:
    return Check.of(
        "data_checksums",
        server["data_checksums"],
        remedy="stop the server and pg_checksums --enable: a disk that errs would go into every"
        " backup unnoticed",
        bad="warn" if server["data_checksums"] == "off" else None,
    )


# -------------------------------------------------------------------------------------------------
# What is in no copy of the database, and what proves one
# -------------------------------------------------------------------------------------------------


def _spool(data_dir: Path) -> Iterator[Check]:
    directory = data_dir / "spool"
    waiting = rejected = 0
    oldest_s = 0.0
    if directory.is_dir():
        spool = Spool(directory)
        waiting, rejected = spool.depth(), spool.rejected()
        oldest_s = time.time() - (spool.oldest_at() or time.time())
    yield Check.of(
        "spool",
        f"{waiting} bytes wait in {directory}, the oldest came {_ago(oldest_s)}"
        if waiting
        else "empty",
        remedy="these charges are on this disk and nowhere else: start the service, which posts"
        " them, or keep a copy of the directory",
        bad=None if not waiting else "fail" if oldest_s > SPOOL_LATE_S else "warn",
    )
    yield Check.of(
        "rejected_settlements",
        f"{rejected} in {directory / 'rejected.jsonl'}" if rejected else "none",
        remedy="they are on this disk and nowhere else: `tallygate rejected list`, then `post`",
        bad="fail" if rejected else None,
    )


def _proofs(
    connection: psycopg.Connection[DictRow], kept: Sequence[Seal] | None
) -> Iterator[Check]:
    has_schema = connection.execute("SELECT to_regclass('tallygate.seals') AS seals").fetchall()
    if has_schema[0]["seals"] is None:
        yield Check("seal", "fail", "there is no schema, or an old one", "`tallygate migrate`")
        return
    (row,) = connection.execute(_PROOF).fetchall()
    age_s = row["sealed_s"]
    yield Check.of(
        "seal",
        "none" if age_s is None else f"number {row['newest_seal']}, {_ago(age_s)}",
        remedy="the service makes one a day: start it, or `tallygate audit --seal`",
        bad="warn" if age_s is None or age_s > DAILY_S else None,
    )
    yield _kept(connection, kept, row["newest_seal"] or 0)
    clean_s, findings = row["clean_s"], row["findings"] or 0
    yield Check.of(
        "audit",
        (f"the newest found {findings}; " if findings else "")
        + ("none was clean yet" if clean_s is None else f"clean {_ago(clean_s)}"),
        remedy="`tallygate audit`: a copy of what does not add up does not add up"
        if findings
        else "`tallygate audit --incremental`, every day",
        bad="fail" if findings else "warn" if clean_s is None or clean_s > DAILY_S else None,
    )


def _kept(
    connection: psycopg.Connection[DictRow], kept: Sequence[Seal] | None, newest: int
) -> Check:
    keep = "`tallygate audit --seals > FILE`, and FILE where nobody who writes here can"
    if kept is None:
        remedy = f"{keep}; then doctor --backup --kept FILE"
        return Check("kept_seals", "warn", "not told", remedy)
    roots = {
        row["number"]: bytes(row["root"]).hex()
        for row in connection.execute("SELECT number, root FROM tallygate.seals")
    }
    wrong = [seal.number for seal in kept if roots.get(seal.number) != seal.root]
    if wrong:
        return Check(
            "kept_seals",
            "fail",
            f"seal {wrong[0]} is not the one that was kept",
            "`tallygate audit --since-seal FILE` says what is different; after a restore see"
            " docs/backups.md",
        )
    last = max((seal.number for seal in kept), default=0)
    # The one of today may be made after today's copy.
    return Check.of(
        "kept_seals",
        f"{len(kept)}, the newest is {newest - last} behind" if newest > last else f"{len(kept)}",
        remedy=keep,
        bad="warn" if newest - last > 1 or not kept else None,
    )


def _ago(seconds: float) -> str:
    """Tell an age in the largest unit that says something."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
