"""A real PostgreSQL 18 a worker, and a fresh database a test, cloned from a template."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import LiteralString, cast

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from proxy.db import migrate
from proxy.embedded.postgres import MAJOR_VERSION, EmbeddedPostgres
from tests.support.once import once

# The tests kill processes and never the machine: what the kernel has is not lost.
QUICK = {"fsync": "off", "full_page_writes": "off"}
# Another major version than the embedded one to test on: its programs are Debian's.
VERSION = os.environ.get("TEST_POSTGRES_VERSION", MAJOR_VERSION)


def make_server(directory: Path, **settings: str) -> EmbeddedPostgres:
    """Make a server of the version that is tested on, with settings besides the usual ones."""
    merged = {**QUICK, **settings}
    if VERSION == MAJOR_VERSION:
        return EmbeddedPostgres(directory, settings=merged)
    binaries = Path(f"/usr/lib/postgresql/{VERSION}/bin")
    return EmbeddedPostgres(directory, settings=merged, binaries=binaries, version=VERSION)


class Cluster:
    """A running server whose template database holds the schema.

    With a `pattern`, the data directory of a stopped one, it begins as that one ended.
    """

    def __init__(self, directory: Path, pattern: Path | None = None) -> None:
        self.directory = directory
        self.server = make_server(directory)
        if pattern is not None:
            copy_cluster(pattern, self.server.pgdata)
        self.server.start()
        self._numbers = count(1)
        if pattern is None:
            self._execute("CREATE DATABASE template_tallygate")
            migrate(self.server.url("template_tallygate"))

    def clone(self, *, empty: bool = False) -> str:
        """Make a database with the schema, or without; returns a superuser's URL."""
        name = f"test_{next(self._numbers)}"
        template = "template0" if empty else "template_tallygate"
        # Both names are made here, and neither can be a parameter of CREATE DATABASE. Files copied
        # are half the work of pages written to the log, as long as no fsync is waited for.
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return self.server.url(name)

    def drop(self, url: str) -> None:
        """Drop a clone, whoever is still connected to it."""
        name = conninfo_to_dict(url)["dbname"]
        self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def stop(self) -> None:
        """Stop the server; URLs are good again after start()."""
        self.server.stop()

    def start(self) -> None:
        """Start the server after stop()."""
        self.server = make_server(self.directory)
        self.server.start()

    def kill(self) -> None:
        """Kill -9 the server; its keeper brings it back within a few seconds."""
        pid = self.server.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def crash(self) -> None:
        """Kill -9 the server with every backend and leave it dead until start()."""
        pid = self.server.pid()
        assert pid is not None
        backends = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.kill()
        for backend in backends:  # they would outlive their parent for a moment, and answer
            with suppress(ProcessLookupError):
                os.kill(int(backend), signal.SIGKILL)
        self.server.stop()

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self.server.url(), autocommit=True) as connection:
            connection.execute(cast("LiteralString", statement))


def copy_cluster(pgdata: Path, to: Path) -> None:
    """Copy the data of a stopped server; its files keep their owner, who may not be us."""
    subprocess.run(["/bin/cp", "-a", pgdata, to], check=True)


@contextmanager
def _cluster(prefix: str, pattern: Path | None = None) -> Generator[Cluster]:
    # Not pytest's own directory: that is private to root, and PostgreSQL runs as somebody else.
    directory = Path(tempfile.mkdtemp(prefix=prefix))
    cluster: Cluster | None = None
    try:
        cluster = Cluster(directory, pattern)
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="session")
def cluster_pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a stopped cluster, made once a run: initdb and the schema take 2 s."""
    return once(tmp_path_factory, f"cluster-{VERSION}", _make_pattern)


def _make_pattern(path: Path) -> None:
    with _cluster("tallygate-pattern-") as cluster:
        cluster.stop()
        copy_cluster(cluster.server.pgdata, path)


@pytest.fixture(scope="session")
def postgres(cluster_pattern: Path) -> Iterator[Cluster]:
    """The worker's cluster, shared by its tests: don't stop it."""
    with _cluster("tallygate-test-", cluster_pattern) as cluster:
        yield cluster


@pytest.fixture
def own_cluster(cluster_pattern: Path) -> Iterator[Cluster]:
    """A cluster of the test's own, to be killed, stopped and started at will."""
    with _cluster("tallygate-own-", cluster_pattern) as cluster:
        yield cluster


@pytest.fixture
def database_url(postgres: Cluster) -> Iterator[str]:
    """A superuser's URL of a fresh database with the schema."""
    url = postgres.clone()
    yield url
    postgres.drop(url)


@pytest.fixture
def empty_database_url(postgres: Cluster) -> Iterator[str]:
    """A superuser's URL of a fresh database without the schema."""
    url = postgres.clone(empty=True)
    yield url
    postgres.drop(url)
