"""What grows is never read whole: each statement finds its rows by key, in the months it needs.

PostgreSQL's own counters say how many rows of which table were read. Plans are made by a session
while its tables are empty, as those of a service are that was installed today, and looked at after
twenty thousand rows have come over four months, with statistics and without.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from proxy.audit.page import BASES, PAGE
from proxy.db import Pool, make_pool
from proxy.history import ANY_USAGE, EntryFilter, History, UsageFilter
from proxy.ledger import Ledger
from proxy.reports import Reports
from proxy.summaries import Summaries
from tests.growth import load
from tests.integration.money import Money, capture, void
from tests.support.postgres import Cluster

ENTRIES, DAYS = 20_000, 120
# More than any statement here needs of a table, and far less than the table has.
FEW = 60
NOW = f"{datetime.now(UTC):%Y_%m}"
REVIEW = {"status": "needs_review", "review_reason": "usage_missing"}

# Rows read, by table; nothing where a table was not looked at.
Reads = dict[str, int]

_COUNTED = "relname, seq_scan + coalesce(idx_scan, 0), seq_tup_read + coalesce(idx_tup_fetch, 0)"


@pytest.fixture(scope="module", params=["empty", "small", "grown"])
def grown(request: pytest.FixtureRequest, postgres: Cluster) -> Iterator[Money]:
    """A session that made its plans when the ledger was as the parameter says, and has grown."""
    url = postgres.clone()
    money = Money(url, funds=1_000_000)
    # Statistics would be renewed behind our back, and plans with them.
    money.connection.execute("ALTER SYSTEM SET autovacuum = off")
    money.all("SELECT pg_reload_conf()")
    try:
        for _ in range(7):  # from the sixth time on PostgreSQL may keep a plan for all parameters
            _everything(money)
        if request.param == "small":
            money.connection.execute("VACUUM (ANALYZE)")
            _everything(money)
        shape = load.Shape.of(ENTRIES, days=DAYS)
        load.prepare(url, shape)
        is_analyzed = request.param == "grown"
        load.load(url, shape, 0, shape.requests, is_analyzed=is_analyzed, progress=_silent)
        yield money
    finally:
        money.connection.execute("ALTER SYSTEM RESET autovacuum")
        money.all("SELECT pg_reload_conf()")
        money.connection.close()
        postgres.drop(url)


def _silent(_: str) -> None:
    pass


def _everything(money: Money) -> None:
    captured, voided = money.hold(5), money.hold(5)
    for _ in range(2):
        money.settle(capture(captured, 3, answer_id="resp_1"), void(voided, **REVIEW))
    _note(money, captured)
    _waive(money, voided)
    money.hold(5, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    money.fund(1, str(uuid4()))
    for name in ("make a key", "change an account"):
        SWEEPS[name](money, {})
        money.one("SELECT set_account_options(%s, true, %s, 'me')", money.account_id, uuid4())
    money.version = (
        2 + money.one("SELECT version FROM accounts WHERE account_id = %s", money.account_id)[0] - 1
    )


def _note(money: Money, request: dict[str, object]) -> None:
    note = {"account_id": str(money.account_id), "request_id": request["request_id"]}
    assert money.all("SELECT outcome FROM note_witness(%s)", json.dumps([note])) == [("noted",)]


def _waive(money: Money, request: dict[str, object]) -> None:
    (settled_at,) = money.one(
        "SELECT settled_at FROM usage WHERE account_id = %s AND request_id = %s",
        *(money.account_id, request["request_id"]),
    )
    assert money.one(
        "SELECT outcome FROM resolve_review(%s, %s, 'waive', %s, NULL, NULL, NULL, NULL, NULL, %s,"
        " 'me', 'why')",
        *(money.account_id, request["request_id"], settled_at, uuid4()),
    ) == ("resolved",)


def reads(connection: psycopg.Connection[Any], work: Callable[[], object]) -> Reads:
    """How many rows a piece of work reads, in a transaction that is rolled back."""
    # What the session counted before and has not told yet is no part of it.
    connection.execute("SELECT pg_stat_force_next_flush()")
    with connection.transaction(force_rollback=True):
        work()
        rows = connection.execute(
            f"SELECT {_COUNTED} FROM pg_stat_xact_user_tables"
            " WHERE schemaname = 'tallygate'".encode()
        ).fetchall()
    return {table: read for table, scans, read in rows if scans}


def months(found: Reads, parent: str) -> set[str]:
    """The months whose rows were looked for."""
    return {name.removeprefix(f"{parent}_") for name in found if name.startswith(f"{parent}_")}


ACTS: dict[str, Callable[[Money, dict[str, dict[str, object]]], object]] = {
    "authorize": lambda money, _: money.authorize(*(money.request(1) for _ in range(10))),
    "authorize again": lambda money, made: money.authorize(made["held"]),
    "capture": lambda money, made: money.settle(capture(made["held"], 3)),
    "capture again": lambda money, made: money.settle(capture(made["captured"], 3)),
    "void again": lambda money, made: money.settle(void(made["voided"])),
    "a late capture": lambda money, made: money.settle(
        capture(made["voided"], 3, cost_source="witness")
    ),
    "the witness's note": lambda money, made: _note(money, made["captured"]),
    "an operator's decision": lambda money, made: _waive(money, made["voided"]),
}


SWEEPS: dict[str, Callable[[Money, dict[str, dict[str, object]]], object]] = {
    "expire": lambda money, _: money.one("SELECT expire_holds(10, 0)"),
    "extend": lambda money, made: money.one(
        "SELECT extend_holds(%s, %s, 60)",
        [money.account_id],
        [UUID(str(made["held"]["request_id"]))],
    ),
    "deposit": lambda money, _: money.fund(1, "again"),
    "make a key": lambda money, _: money.one(
        "SELECT create_key(%s, sha256('new'), %s, 'me')",
        money.account_id,
        json.dumps({"key_id": str(uuid4()), "name": "k", "prefix": "sk-"}),
    ),
    "revoke a key": lambda money, _: money.one(
        "SELECT revoke_key(%s, %s, %s, 'me')", money.account_id, money.key_id, uuid4()
    ),
    "change an account": lambda money, _: money.one(
        "SELECT set_account_options(%s, false, %s, 'me')", money.account_id, uuid4()
    ),
}


def test_a_function_reads_few_rows_of_the_month_of_its_batch(grown: Money) -> None:
    made = {"held": grown.hold(5), "captured": grown.hold(5), "voided": grown.hold(5)}
    grown.settle(capture(made["captured"], 3), void(made["voided"], **REVIEW))
    grown.hold(5, ttl_s=0)
    for name, act in {**ACTS, **SWEEPS}.items():
        found = reads(grown.connection, partial(act, grown, made))

        assert {table: read for table, read in found.items() if read > FEW} == {}, name
        assert months(found, "entries") <= {NOW}, name
        assert months(found, "usage") <= {NOW}, name


def test_a_seal_and_an_incremental_audit_read_what_is_new(grown: Money) -> None:
    # Everything but one account is sealed.
    after, is_last = UUID(int=0), False
    while not is_last:
        ((after, is_last),) = grown.all(
            "SELECT next_after, is_last FROM seal_page(1, %s, 5000)", after
        )
    grown.one("SELECT number FROM close_seal(1)")
    grown.settle(capture(grown.hold(5), 3))

    page = {"through": 1, "after": UUID(int=grown.account_id.int - 1), "last": grown.account_id}
    for statement, parameters in ((BASES, {**page, "accounts": 1}), (PAGE, page)):

        def act(statement: Any = statement, parameters: Any = parameters) -> object:
            # As the audit sets it for its connection.
            grown.connection.execute("SET LOCAL enable_seqscan = off")
            return grown.connection.execute(statement, parameters).fetchall()

        found = reads(grown.connection, act)
        assert {table: read for table, read in found.items() if read > FEW} == {}

    found = reads(grown.connection, lambda: grown.all("SELECT * FROM seal_page(2, %s, 9)", after))
    assert {table: read for table, read in found.items() if read > FEW} == {}


def pooled(grown: Money, work: Callable[[Reports, Ledger], Awaitable[object]]) -> Reads:
    """How many rows a read of the API takes, over the pool that it is made with."""
    url = grown.connection.info.dsn

    async def run() -> None:
        async with make_pool(url, max_size=1) as pool:
            ledger = Ledger(url, pool)
            await work(Reports(pool), ledger)
            async with pool.connection() as connection:
                await connection.execute("SELECT pg_stat_force_next_flush()")
            await ledger.close()

    return taken(url, run)


def taken(url: str, run: Callable[[], Coroutine[Any, Any, None]]) -> Reads:
    """How many rows something takes."""
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        before = _counters(connection)
        asyncio.run(run())
        after = _counters(connection)
    return {
        name: after[name][1] - before[name][1] for name in after if after[name][0] > before[name][0]
    }


def _counters(connection: psycopg.Connection[Any]) -> dict[str, tuple[int, int]]:
    rows = connection.execute(
        f"SELECT {_COUNTED} FROM pg_stat_user_tables WHERE schemaname = 'tallygate'".encode()
    ).fetchall()
    return {name: (scans, read) for name, scans, read in rows}


READS: dict[str, Callable[[Reports, Ledger, UUID], Awaitable[object]]] = {
    "balance": lambda _, ledger, account: ledger.balance(account),
    "recent output": lambda reports, _, account: reports.recent_output_tokens(account, "model-1"),
    "a stored response": lambda reports, _, account: reports.model_of_answer(account, "resp_20"),
    "a scrape": lambda reports, _ledger, _account: reports.operations(),
    "the review queue": lambda reports, _ledger, _account: reports.reviews(before=None, limit=3),
}


def test_a_read_takes_few_rows(grown: Money) -> None:
    (account,) = grown.one("SELECT account_id FROM accounts WHERE name = 'grown 7'")
    for name, read in READS.items():
        found = pooled(grown, partial(_call, read, account))

        assert {table: rows for table, rows in found.items() if rows > FEW} == {}, name


def test_a_page_of_history_takes_few_rows(grown: Money) -> None:
    (account,) = grown.one("SELECT account_id FROM accounts WHERE name = 'grown 7'")
    url = grown.connection.info.dsn

    async def run(read: Callable[[Pool], Awaitable[object]]) -> None:
        async with make_pool(url, max_size=1) as pool:
            await read(pool)
            async with pool.connection() as connection:
                await connection.execute("SELECT pg_stat_force_next_flush()")

    an_hour = UsageFilter(since=datetime.now(UTC) - timedelta(hours=1), model="model-1")
    pages: dict[str, Callable[[Pool], Awaitable[object]]] = {
        "usage": lambda pool: History(pool).usage(account, ANY_USAGE, before=None, limit=3),
        "an hour": lambda pool: History(pool).usage(account, an_hour, before=None, limit=3),
        "an export": lambda pool: History(pool).usage_onwards(
            account, ANY_USAGE, after=None, limit=3
        ),
        "ledger": lambda pool: History(pool).entries(account, EntryFilter(), before=None, limit=3),
        "an hour's ledger": lambda pool: History(pool).entries(
            account, EntryFilter(since=an_hour.since), before=None, limit=3
        ),
        "a summary": lambda pool: Summaries(pool).summary(account, an_hour, ["model"]),
    }
    for name, read in pages.items():
        found = taken(url, partial(run, read))

        assert {table: rows for table, rows in found.items() if rows > FEW} == {}, name


def test_a_receipt_takes_one_month(grown: Money) -> None:
    account, request_id = grown.one(
        "SELECT account_id, request_id FROM usage ORDER BY request_id LIMIT 1"
    )

    found = pooled(grown, lambda reports, _: reports.usage_row(account, request_id))

    assert {table: read for table, read in found.items() if read > FEW} == {}
    assert len(months(found, "usage")) == 1
    assert months(found, "usage") == months(found, "entries")


def _call(
    read: Callable[[Reports, Ledger, UUID], Awaitable[object]],
    account: UUID,
    reports: Reports,
    ledger: Ledger,
) -> Awaitable[object]:
    return read(reports, ledger, account)
