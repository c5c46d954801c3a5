import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from proxy.embedded.keeper import ChildFailedError
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.errors import ConfigurationError

MakeServer = Callable[[Path], EmbeddedPostgres]


@pytest.fixture
def make() -> Iterator[MakeServer]:
    servers: list[EmbeddedPostgres] = []

    def server(directory: Path) -> EmbeddedPostgres:
        servers.append(EmbeddedPostgres(directory))
        return servers[-1]

    yield server
    for made in servers:
        made.stop()


def do(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def ask(url: str, query: str = "SELECT 1") -> object:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def wait_for_another(server: EmbeddedPostgres, pid: int | None) -> None:
    """Wait until the keeper has brought up a server that is not `pid`."""
    for _ in range(600):
        if server.pid() not in (None, pid):
            try:
                ask(server.url())
            except psycopg.OperationalError:
                pass
            else:
                return
        os.sched_yield()
        signal.sigtimedwait([], 0.05)
    pytest.fail("the server did not come back")


def test_it_is_postgresql_18_and_loses_nothing_that_it_confirmed(
    make: MakeServer, tmp_path: Path
) -> None:
    server = make(tmp_path)
    url = server.start()

    assert str(ask(url, "SHOW server_version")).startswith("18.")
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):
        assert ask(url, f"SHOW {setting}") == "on"
    assert ask(url, "SHOW max_connections") == "200"
    assert ask(url, "SHOW listen_addresses") == ""
    assert ask(url, "SELECT current_setting('is_superuser')") == "on"
    assert "ready to accept connections" in server.log_path.read_text()


def test_data_survives_stop_and_start(make: MakeServer, tmp_path: Path) -> None:
    first = make(tmp_path)
    do(first.start(), "CREATE TABLE t AS SELECT 42 AS n")
    first.stop()
    assert not first.is_running()

    assert ask(make(tmp_path).start(), "SELECT n FROM t") == 42


def test_a_killed_server_is_brought_back(make: MakeServer, tmp_path: Path) -> None:
    server = make(tmp_path)
    do(server.start(), "CREATE TABLE t AS SELECT 42 AS n")
    pid = server.pid()
    assert pid is not None

    os.kill(pid, signal.SIGKILL)
    wait_for_another(server, pid)

    assert ask(server.url(), "SELECT n FROM t") == 42


def test_the_server_of_a_killed_parent_is_found_running(make: MakeServer, tmp_path: Path) -> None:
    pid = start_and_die(tmp_path)
    server = make(tmp_path)
    url = server.start()

    assert server.pid() == pid
    assert ask(url) == 1


def test_the_dead_server_of_a_killed_parent_is_recovered(make: MakeServer, tmp_path: Path) -> None:
    os.kill(start_and_die(tmp_path), signal.SIGKILL)
    assert (tmp_path / "postgres" / "postmaster.pid").exists()

    assert ask(make(tmp_path).start()) == 1


def test_a_pid_file_that_names_a_living_stranger_is_no_server(
    make: MakeServer, tmp_path: Path
) -> None:
    first = make(tmp_path)
    first.start()
    pid_file = tmp_path / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    first.stop()
    pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]) + "\n")

    second = make(tmp_path)
    assert not second.is_running()
    assert ask(second.start()) == 1


def test_a_killed_initdb_leaves_nothing_that_stands_in_the_way(
    make: MakeServer, tmp_path: Path
) -> None:
    ruin = tmp_path / "postgres.new"
    ruin.mkdir()
    (ruin / "PG_VERSION").write_text("18\n")

    assert ask(make(tmp_path).start()) == 1
    assert not ruin.exists()


def test_a_path_too_long_for_a_socket_works(make: MakeServer, tmp_path: Path) -> None:
    server = make(tmp_path / ("long" * 15) / ("long" * 15))

    assert ask(server.start()) == 1


def test_a_path_with_blanks_and_quotes_works(make: MakeServer, tmp_path: Path) -> None:
    assert ask(make(tmp_path / "it's a path & more").start()) == 1


def test_two_services_run_side_by_side(make: MakeServer, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one").start(), make(tmp_path / "two").start()
    do(one, "CREATE DATABASE only_here")

    count = "SELECT count(*) FROM pg_database WHERE datname = 'only_here'"
    assert (ask(one, count), ask(two, count)) == (1, 0)


def test_a_second_service_on_the_same_directory_is_refused(
    make: MakeServer, tmp_path: Path
) -> None:
    make(tmp_path).start()

    with pytest.raises(ConfigurationError, match="in use by another service"):
        make(tmp_path).start()


def test_variables_of_the_environment_lead_nowhere_else(
    make: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGDATA", "/nowhere")
    server = make(tmp_path)
    server.start()
    monkeypatch.delenv("PGPORT")

    assert ask(server.url()) == 1


def test_another_major_version_is_refused_with_the_way_out(
    make: MakeServer, tmp_path: Path
) -> None:
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("17\n")

    with pytest.raises(ConfigurationError, match=r"made by PostgreSQL 17.*load the dump"):
        make(tmp_path).start()


def test_a_server_that_refuses_to_start_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.embedded.postgres.ATTEMPTS", 1)
    server = EmbeddedPostgres(tmp_path, settings={"max_connections": "none"})

    with pytest.raises(ChildFailedError, match='invalid value for parameter "max_connections"'):
        server.start()


def test_a_failing_initdb_is_reported(
    make: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make(tmp_path)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "initdb"
    program.write_text("#!/bin/sh\necho the disk is full >&2\nexit 1\n")
    program.chmod(0o755)
    (tmp_path / "bin" / "postgres").touch(mode=0o755)
    monkeypatch.setattr(server, "_bin", tmp_path / "bin")

    with pytest.raises(ChildFailedError, match="the disk is full"):
        server.start()


def test_without_the_wheel_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_name: str) -> None:
        return None

    monkeypatch.setattr("proxy.embedded.postgres.find_spec", none)

    with pytest.raises(ConfigurationError, match=r"tallygate\[embedded\]"):
        EmbeddedPostgres(tmp_path)


def start_and_die(directory: Path) -> int:
    """Start a server from a process that is killed; returns the server's pid."""
    script = (
        "import os, sys; from pathlib import Path;"
        "from proxy.embedded.postgres import EmbeddedPostgres;"
        "server = EmbeddedPostgres(Path(sys.argv[1])); server.start();"
        "print(server.pid(), flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return int(done.stdout)
