"""A month of millions of rows of usage: what summaries, statistics and an export of it take."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import httpx
import psycopg

from proxy.db import make_pool, migrate
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.history import UsageFilter
from proxy.rollups import Rollups
from proxy.summaries import Summaries
from tests.bench.machine import machine
from tests.growth import load
from tests.support.service import Service, prepare_service

_DAYS = 30
_TIMES = 20
_TARGET_MS = 300.0
_GROWTH_MIB = 8.0
_DRAWN_MIB = 16
# All in one account, beside what all accounts have.
_HOT = """
INSERT INTO usage (
    account_id, request_id, key_id, created_at, settled_at, endpoint, model, tier, streamed, byok,
    status, input_tokens, output_tokens, cost_picos, cost_source, price, price_version, hold
)
SELECT
    growth_id('account', 0), growth_request(n.at, n.number), growth_id('key', 0), n.at, n.at,
    'chat.completions', 'model-' || n.number %% 5, 'default', false, false, 'billed',
    200 + n.number %% 3000, 50 + n.number %% 900, 500000, 'header', 1000, 1, 1000
FROM (
    SELECT g AS number, %(start)s + g * %(step)s AS at FROM generate_series(1, %(rows)s) AS g
) AS n
"""


@dataclass
class _Measured:
    rows: int
    hot_rows: int
    roll_up_s: float = 0
    hours: int = 0
    longest_step_ms: float = 0
    raw_ms: float = 0
    # p50 and maximum, in milliseconds.
    reads: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    export_s: float = 0
    exported: int = 0
    resident: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])

    @property
    def is_met(self) -> bool:
        """Whether every read was fast enough, and the export's memory flat."""
        mib = [each for rows, each in self.resident if rows >= self.exported // 5]
        return (
            max(p50 for p50, _ in self.reads.values()) < _TARGET_MS
            and self.exported == self.hot_rows
            and mib[-1] - mib[0] <= _GROWTH_MIB
        )


def measure(rows: int, hot_rows: int) -> tuple[str, bool]:
    """Load so many rows over all accounts and into one; returns the text that tells of it."""
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="tallygate-growth-"))
        stack.callback(shutil.rmtree, home)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        postgres.start()
        stack.callback(postgres.stop)
        url = postgres.url()
        migrate(url)
        shape = load.Shape.of(2 * rows, days=_DAYS)
        measured = _Measured(shape.requests, hot_rows)
        _load(url, shape, hot_rows)
        asyncio.run(_roll_up(url, measured))
        asyncio.run(_read(url, measured))
        _prove(url)
        (home / "service").mkdir()
        service = stack.enter_context(
            closing(
                prepare_service(
                    home / "service",
                    database_url=url,
                    litellm_url="http://127.0.0.1:9",
                    litellm_key="none",
                )
            )
        )
        _export(service, _account(url), measured)
        return _told(measured, machine(home)), measured.is_met


def _load(url: str, shape: load.Shape, hot_rows: int) -> None:
    load.prepare(url, shape)
    load.load_usage(url, shape, progress=_say)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET search_path = tallygate")
        connection.execute("SET synchronous_commit = off")
        step = timedelta(days=_DAYS) / (hot_rows + 1)
        connection.execute(_HOT.encode(), {"start": shape.start, "step": step, "rows": hot_rows})
        connection.execute(
            "UPDATE usage_rollup_state SET rolled_until = date_trunc('hour', %s, 'UTC')",
            (shape.start,),
        )
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
    _say("loaded")


async def _roll_up(url: str, measured: _Measured) -> None:
    async with make_pool(url, max_size=1) as pool:
        rollups, began = Rollups(pool), time.monotonic()
        while True:
            step_began = time.monotonic()
            outcome = await rollups.step()
            if outcome == "done":
                break
            measured.hours += outcome == "rolled"
            took = 1000 * (time.monotonic() - step_began)
            measured.longest_step_ms = max(measured.longest_step_ms, took)
        measured.roll_up_s = time.monotonic() - began
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")
    _say(f"rolled up {measured.hours} hours in {measured.roll_up_s:.0f} s")


async def _read(url: str, measured: _Measured) -> None:
    hot, usual = _account(url), _account(url, 7)
    month = UsageFilter(since=datetime.now(UTC) - timedelta(days=_DAYS))
    today = datetime.now(UTC).date()
    async with make_pool(url, max_size=1) as pool:
        summaries = Summaries(pool)

        def summary(account: UUID, *by: str) -> Callable[[], Awaitable[object]]:
            return lambda: summaries.summary(account, month, by)

        reads: dict[str, Callable[[], Awaitable[object]]] = {
            "an account's month by day": summary(usual, "day"),
            f"a month of {measured.hot_rows:,} requests of one account, by day": summary(
                hot, "day"
            ),
            "the same by hour and model": summary(hot, "hour", "model"),
            "statistics of the house over the month": lambda: summaries.stats(
                today - timedelta(days=_DAYS), today
            ),
        }
        for name, read in reads.items():
            took: list[float] = []
            for _ in range(_TIMES):
                began = time.perf_counter()
                await read()
                took.append(1000 * (time.perf_counter() - began))
            took.sort()
            measured.reads[name] = took[len(took) // 2], took[-1]
            _say(f"{name}: {took[len(took) // 2]:.1f} ms")
        async with pool.connection() as connection:
            began = time.perf_counter()
            await connection.execute("SELECT model, sum(price) FROM usage GROUP BY model")
            measured.raw_ms = 1000 * (time.perf_counter() - began)


def _prove(url: str) -> None:
    """See that the sums of all rollups are those of all rows below."""
    with psycopg.connect(url) as connection:
        connection.execute("SET search_path = tallygate")
        ((are_equal,),) = connection.execute(
            "SELECT ROW(d.*) = ROW(u.*) FROM"
            " (SELECT sum(requests), sum(price), sum(cost_picos), sum(input_tokens),"
            " sum(output_tokens) FROM usage_days) AS d,"
            " (SELECT count(*)::numeric, sum(price), sum(cost_picos), sum(input_tokens),"
            " sum(output_tokens) FROM usage WHERE request_id <"
            " (SELECT uuid_floor(rolled_until) FROM usage_rollup_state)) AS u"
        ).fetchall()
    assert are_equal


def _export(service: Service, account: UUID, measured: _Measured) -> None:
    service.start(wait=False)
    with httpx.Client(transport=httpx.HTTPTransport(retries=30)) as patient:
        while not patient.get(service.base_url + "/livez").is_success:
            pass
    key = service.admin("POST", f"/admin/v1/accounts/{account}/keys", {"name": "export"})["key"]
    month = (datetime.now(UTC) - timedelta(days=_DAYS + 1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    rows = -1  # the line of names
    params = {"since": month, "format": "csv"}
    drawn = 0
    began = time.monotonic()
    with (
        service.client(key) as client,
        client.stream("GET", "/api/v1/usage/export", params=params, timeout=600) as answer,
    ):
        assert answer.status_code == 200
        for part in answer.iter_bytes():
            rows += part.count(b"\r\n")
            drawn += len(part)
            if drawn >= _DRAWN_MIB * 2**20:
                drawn = 0
                measured.resident.append((rows, _resident_mib(service.pid)))
    measured.export_s = time.monotonic() - began
    measured.resident.append((rows, _resident_mib(service.pid)))
    measured.exported = rows
    # With the rows that this account has like all the others.
    measured.hot_rows = max(measured.hot_rows, rows)
    _say(f"{rows:,} rows exported in {measured.export_s:.0f} s")


def _account(url: str, number: int = 0) -> UUID:
    with psycopg.connect(url) as connection:
        ((found,),) = connection.execute(
            "SELECT tallygate.growth_id('account', %s)", (number,)
        ).fetchall()
    return found


def _resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _told(measured: _Measured, facts: dict[str, str]) -> str:
    reads = "\n".join(
        f"| {name} | {p50:.1f} ms | {longest:.1f} ms |"
        for name, (p50, longest) in measured.reads.items()
    )
    warm = [each for each in measured.resident if each[0] >= measured.exported // 5]
    shown = warm[:: max(1, len(warm) // 6)]
    resident = ", ".join(f"{mib:.1f} MiB after {rows:,}" for rows, mib in shown)
    where = "; ".join(f"{name}: {what}" for name, what in facts.items())
    return (
        f"{measured.rows:,} rows of usage over {load.ACCOUNTS:,} accounts in {_DAYS} days, and"
        f" {measured.hot_rows:,} in one of them. Rolling up all {measured.hours} hours of it took"
        f" {measured.roll_up_s:.0f} s, the longest {measured.longest_step_ms:.0f} ms; their sums"
        " equal those of the rows.\n\n"
        f"| read | p50 | longest of {_TIMES} |\n| --- | --- | --- |\n{reads}\n"
        f"| for comparison: one sum over the rows themselves | {measured.raw_ms:,.0f} ms | |\n\n"
        f"An export of {measured.exported:,} rows as CSV, by one worker of a real service, took"
        f" {measured.export_s:.0f} s, {measured.exported / measured.export_s:,.0f} rows a second."
        f" The worker had {resident}: it changed by {warm[-1][1] - warm[0][1]:+.1f} MiB."
        f"\n\n{where}."
    )


def _say(text: str) -> None:
    print(text, flush=True)
