"""The processors' time that a piece of work takes: what neighbours on the machine don't change."""

import time
from pathlib import Path

import psycopg


class Cpu:
    """Counts for this process, and for the connections that a database has now."""

    def __init__(self, url: str) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            rows = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ).fetchall()
        self._pids = [pid for (pid,) in rows]
        self._began = self._now()

    def taken_s(self) -> tuple[float, float]:
        """Return seconds since it was made: PostgreSQL's, and ours."""
        server, own = self._now()
        return server - self._began[0], own - self._began[1]

    def _now(self) -> tuple[float, float]:
        # The first number is nanoseconds on a processor (Linux, scheduler/sched-stats).
        server = sum(
            int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in self._pids
        )
        return server / 1e9, time.process_time()
