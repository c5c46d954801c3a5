"""`make growth`: the ledger after months, beside an empty one in the same run.

Loads ROWS entries (20 million) over 2,000 accounts, audits, seals, and measures what a request and
a reader notice of them. `--memory` is another run: one worker, 200,000 requests, and what it takes
of memory meanwhile; `--summary` one of a month of 5 million rows of usage, and what sums and an
export of it take. Exits with 1 where a target is missed.
"""

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import psycopg

from proxy.audit import Finding, Run, audit, audit_increment, check_seals
from proxy.db import make_pool, migrate
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.retention import detach
from proxy.seals import Seal, Sealer
from tests.bench.machine import Quietness, machine
from tests.growth import load, memory, summary
from tests.growth.figures import Figures, Grown, Side, Timing, page
from tests.growth.queries import read_all
from tests.growth.traffic import Traffic
from tests.support.sections import write_section

_BYTES_PER_ENTRY = 700
_Result = TypeVar("_Result")


class GrowthError(Exception):
    """It can't be measured; the text is for whoever started it."""


def main() -> int:
    """Run it."""
    arguments = _arguments()
    # So that whatever ends us lets the children be ended too.
    signal.signal(signal.SIGTERM, _leave)
    try:
        if arguments.memory:
            text, is_met = memory.measure(arguments.requests)
            name = "memory"
        elif arguments.summary:
            text, is_met = summary.measure(arguments.usage_rows, arguments.hot_rows)
            name = "summary"
        else:
            figures = _grow(arguments)
            name = "traffic" if arguments.traffic else "growth"
            text, is_met = page(figures), figures.is_met
    except GrowthError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{text}")
    if arguments.report is not None:
        write_section(arguments.report, name, text)
    return 0 if is_met else 1


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(143)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.growth", description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000, help="entries")
    parser.add_argument("--days", type=int, default=60, help="over which they came")
    parser.add_argument("--rounds", type=int, default=6, help="of traffic, on each side")
    parser.add_argument("--seconds", type=float, default=6, help="of a round")
    parser.add_argument("--in-flight", type=int, default=32, help="requests at once")
    parser.add_argument(
        "--traffic", action="store_true", help="leave the audits out, which take most of the time"
    )
    parser.add_argument("--reads", type=int, default=200, help="of each query")
    parser.add_argument("--memory", action="store_true", help="measure a worker's memory instead")
    parser.add_argument("--requests", type=int, default=200_000, help="with --memory")
    parser.add_argument("--summary", action="store_true", help="measure sums of usage instead")
    parser.add_argument("--usage-rows", type=int, default=5_000_000, help="with --summary")
    parser.add_argument("--hot-rows", type=int, default=1_000_000, help="with --summary")
    parser.add_argument("--report", type=Path, help="a page to write the table into")
    return parser.parse_args()


@contextmanager
def _server() -> Generator[tuple[EmbeddedPostgres, Path]]:
    """Run PostgreSQL as `tallygate up` does: every commit is on disk."""
    home = Path(tempfile.mkdtemp(prefix="tallygate-growth-"))
    # Where we are root, PostgreSQL runs as somebody else, who must get there.
    home.chmod(0o711)
    server = EmbeddedPostgres(home)
    try:
        server.start()
        yield server, home
    finally:
        server.stop()
        shutil.rmtree(home)


def _grow(arguments: argparse.Namespace) -> Figures:
    with _server() as (server, home):
        free = shutil.disk_usage(home).free
        if free < arguments.rows * _BYTES_PER_ENTRY:
            msg = f"{arguments.rows:,} entries need more than the {free / 2**30:.0f} GiB left here"
            raise GrowthError(msg)
        quietness = Quietness()
        urls: dict[str, str] = {}
        for name in ("empty", "grown"):
            with psycopg.connect(server.url(), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
            urls[name] = server.url(name)
            migrate(urls[name])
        shape = load.Shape.of(arguments.rows, days=arguments.days)
        nothing = load.Shape(0, shape.start, shape.step)
        load.prepare(urls["empty"], nothing)
        load.prepare(urls["grown"], shape)
        if arguments.traffic:
            grown = _fill_at_once(urls["grown"], shape)
            sides = _compare(urls, home, arguments)
        else:
            grown = _fill(urls["grown"], shape)
            sides = _compare(urls, home, arguments)
            _end(urls["grown"], shape, grown)
        facts = {
            **machine(home),
            "load average": f"{quietness.load:.1f} before it began, {os.getloadavg()[0]:.1f} at"
            " its end",
            "time stolen by other machines": f"{quietness.stolen_percent():.1f}%",
            "PostgreSQL": _version(server.url()),
        }
        return Figures(grown=grown, sides=sides, machine=facts, in_flight=arguments.in_flight)


def _fill_at_once(url: str, shape: load.Shape) -> Grown:
    """Load everything, and neither audit nor seal it."""
    load.load(url, shape, 0, shape.requests, progress=_say)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
        ((size,),) = connection.execute("SELECT pg_database_size(current_database())").fetchall()
    return Grown(entries=2 * shape.requests + load.ACCOUNTS, accounts=load.ACCOUNTS, bytes=size)


def _fill(url: str, shape: load.Shape) -> Grown:
    """Load all but the last day, audit and seal that; then the last day, and audit that alone."""
    grown = Grown(entries=2 * shape.requests + load.ACCOUNTS, accounts=load.ACCOUNTS)
    yesterday = shape.until(datetime.now(UTC) - timedelta(days=1))
    load.load(url, shape, 0, yesterday, progress=_say)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
    _time(grown, "seal", 2 * yesterday, lambda: _seal(url))
    run = Run.begin(url)
    findings = _time(grown, "full", 2 * yesterday, lambda: audit(url))
    _clean(findings)
    assert run.end(url, "full", findings, entries=2 * yesterday)
    load.load(url, shape, yesterday, shape.requests, progress=_say)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
    day = 2 * (shape.requests - yesterday)
    increment = _time(grown, "increment", day, lambda: audit_increment(url))
    _clean(increment.findings)
    assert increment.entries == day
    grown.longest_snapshot_s = increment.longest_snapshot_s
    _time(grown, "seal_of_a_day", day, lambda: _seal(url))
    with psycopg.connect(url) as connection:
        ((grown.bytes, grown.seal_bytes),) = connection.execute(
            "SELECT pg_database_size(current_database()),"
            " pg_total_relation_size('tallygate.seal_points')"
        ).fetchall()
    return grown


def _compare(urls: dict[str, str], home: Path, arguments: argparse.Namespace) -> dict[str, Side]:
    """Take turns: traffic on each side, then what is read."""
    sides = {name: Side() for name in urls}
    keys = {name: _keys(url) for name, url in urls.items()}
    for number in range(arguments.rounds):
        # Alternating, so that neither always comes after the same neighbour.
        for name in list(urls)[:: 1 if number % 2 == 0 else -1]:
            with psycopg.connect(urls[name], autocommit=True) as connection:
                connection.execute("CHECKPOINT")
            traffic = Traffic(urls[name], home / "spool", keys[name], in_flight=arguments.in_flight)
            done = asyncio.run(traffic.run(arguments.seconds))
            sides[name].rounds.append(done)
            _say(f"round {number + 1}: {name}, {done.per_second:,.0f} requests/s")
    for name, url in urls.items():
        sides[name].reads = asyncio.run(read_all(url, keys[name], times=arguments.reads))
    return sides


def _end(url: str, shape: load.Shape, grown: Grown) -> None:
    """Check all seals, detach the oldest month if it is old enough, and see that all adds up."""
    run = Run.begin(url)
    increment = audit_increment(url)
    _clean(increment.findings)
    assert run.end(url, "incremental", increment.findings, entries=increment.entries)
    _seal(url)
    sealed = _time(grown, "check_seals", grown.entries, lambda: check_seals(url))
    _clean(sealed.findings)
    month = (shape.start + timedelta(days=32)).replace(day=1).date()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute(
            "UPDATE usage SET resolved_at = now(), resolution = NULL"
            " WHERE review_reason IS NOT NULL AND request_id < uuid_floor(%s)",
            (month,),
        )
    listed = _time(grown, "detach", 0, lambda: detach(url, month, actor="growth"))
    grown.detached = [f"{one.month:%Y-%m}" for one in listed if one.is_detached]
    _clean(audit_increment(url).findings)


def _clean(findings: list[Finding]) -> None:
    broken = [found for found in findings if found.violations]
    if broken:
        raise GrowthError(f"the books don't add up: {broken}")


def _time(grown: Grown, name: str, entries: int, work: Callable[[], _Result]) -> _Result:
    began = time.monotonic()
    result = work()
    grown.timings[name] = Timing(time.monotonic() - began, entries)
    _say(f"{name}: {grown.timings[name].seconds:.1f} s")
    return result


def _seal(url: str) -> Seal | None:
    async def seal() -> Seal | None:
        async with make_pool(url, max_size=1) as pool:
            return await Sealer(pool).seal()

    return asyncio.run(seal())


def _keys(url: str) -> list[tuple[UUID, UUID]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT account_id, key_id FROM tallygate.virtual_keys ORDER BY account_id"
        ).fetchall()


def _version(url: str) -> str:
    with psycopg.connect(url) as connection:
        return str(connection.execute("SHOW server_version").fetchall()[0][0])


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
