"""A second real server that follows another, until it is promoted."""

import os
import subprocess
import time
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import psycopg
import pytest

from proxy.embedded.postgres import EmbeddedPostgres
from tests.support.postgres import make_server

_NAME = "standby"
_TIMEOUT_S = 30


class Standby:
    """Streams from the primary; with it, each commit there waits until it is written down here."""

    def __init__(self, primary: EmbeddedPostgres, directory: Path, **settings: str) -> None:
        self.server = make_server(directory, **settings)
        _copy(primary, self.server.pgdata)
        self.server.start()
        with psycopg.connect(primary.url(), autocommit=True) as connection:
            # Behind the copy, so that the standby waits for nobody when it is the primary.
            connection.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{_NAME}'".encode())
            connection.execute("SELECT pg_reload_conf()")
            _wait(connection, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'")

    def promote(self) -> None:
        """Make it the primary; the old one must be dead."""
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            ((is_done,),) = connection.execute("SELECT pg_promote()").fetchall()
        assert is_done

    def stop(self) -> None:
        """Stop it."""
        self.server.stop()


def whichever_is_primary(*urls: str) -> str:
    """Join URLs of one database into that of whichever server takes writes."""
    hosts = [parse_qs(urlsplit(url).query)["host"][0] for url in urls]
    parts = urlsplit(urls[0])
    return (
        f"postgresql://{parts.netloc}{parts.path}?host={quote(','.join(hosts))}"
        "&target_session_attrs=read-write&connect_timeout=2"
    )


def _copy(primary: EmbeddedPostgres, pgdata: Path) -> None:
    """Copy the running server, with what makes the copy follow it."""
    pgdata.parent.mkdir()
    (socket_dir,) = parse_qs(urlsplit(primary.url()).query)["host"]
    binaries = Path(f"/proc/{primary.pid()}/exe").resolve().parent
    done = subprocess.run(
        [
            *(binaries / "pg_basebackup", "--pgdata", pgdata, "--checkpoint", "fast"),
            *("--dbname", f"host={socket_dir} user=postgres application_name={_NAME}"),
            "--write-recovery-conf",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The primary's socket is beside its data; its lock came along.
    (pgdata / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
    owner = primary.pgdata.stat()
    for path in (pgdata, *pgdata.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid)


def _wait(connection: psycopg.Connection[tuple[object]], query: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not connection.execute(query.encode()).fetchall():
        if time.monotonic() > deadline:
            pytest.fail(f"waited in vain for {query}")
        time.sleep(0.02)
