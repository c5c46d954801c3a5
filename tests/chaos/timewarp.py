"""A PostgreSQL whose clock can be stepped, by libfaketime (Debian: `apt install libfaketime`)."""

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from proxy.embedded.postgres import EmbeddedPostgres
from tests.support.postgres import QUICK, Cluster


def library() -> Path | None:
    """Find libfaketime; None where it is not installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return found[0] if found else None


class WarpedPostgres(EmbeddedPostgres):
    """The server of a cluster's directory, on a clock of its own."""

    def __init__(self, directory: Path, offset: Path) -> None:
        super().__init__(directory, settings=QUICK)
        self._wrapper = directory / "postgres-out-of-time"
        self._wrapper.write_text(
            "#!/bin/sh\n"
            f"export LD_PRELOAD={library()} FAKETIME_TIMESTAMP_FILE={offset}\n"
            "export FAKETIME_CACHE_DURATION=1 FAKETIME_DONT_FAKE_MONOTONIC=1\n"
            "export FAKETIME_DISABLE_SHM=1\n"
            f'exec "{self._bin / "postgres"}" "$@"\n'
        )
        self._wrapper.chmod(0o755)

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        if program == "pg_ctl" and arguments[0] == "start":
            arguments += ("-p", str(self._wrapper))
        return super()._run(program, *arguments)


class WarpClock:
    """Steps the clock of a running WarpedPostgres; it looks once a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step(0)
        self.path.chmod(0o644)

    def step(self, offset_s: float) -> None:
        """Set the clock that far off."""
        self.path.write_text(f"{offset_s:+.3f}")


@contextmanager
def warped(cluster: Cluster) -> Generator[WarpClock]:
    """Have a cluster's server run on a clock that can be stepped, for as long as it is needed."""
    clock = WarpClock(cluster.directory / "clock-offset")
    cluster.stop()
    cluster.server = WarpedPostgres(cluster.directory, clock.path)
    cluster.server.start()
    try:
        yield clock
    finally:
        cluster.stop()
        cluster.start()
