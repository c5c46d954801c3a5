"""Summaries equal what the rows of usage add up to, whatever happens to those and whenever."""

import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from proxy.audit import audit
from proxy.db import make_pool
from proxy.history import UsageFilter
from proxy.ids import first_uuid7, uuid7
from proxy.retention import detach
from proxy.rollups import Rollups
from proxy.seals import Sealer
from proxy.summaries import GROUPS, Stats, Summaries
from tests.integration.money import Money, NewAccount, capture, void

pytestmark = pytest.mark.anyio

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
MODELS, ENDPOINTS = ("a", "b", "c"), ("chat.completions", "embeddings")
SUMS = ("requests", "failed", "price", "cost_picos", "input_tokens", "output_tokens", "images")
REVIEW = {"status": "needs_review", "review_reason": "usage_missing"}


def id_at(moment: datetime) -> str:
    """An id as a proxy made it then."""
    return str(UUID(int=first_uuid7(moment).int | (uuid7().int & (2**80 - 1))))


class House:
    """Accounts with requests of the last hours, the rollups, and what they should say."""

    def __init__(self, accounts: list[Money], rollups: Rollups, summaries: Summaries) -> None:
        self.accounts = accounts
        self.rollups = rollups
        self.summaries = summaries
        self.random = random.Random(7)
        self.now = datetime.now(UTC)
        self.begin = self.now.replace(minute=0, second=0, microsecond=0) - 40 * HOUR
        self.captured: list[tuple[Money, dict[str, object]]] = []
        self.waiting: list[tuple[Money, dict[str, object]]] = []

    def forget(self, until: datetime) -> None:
        """Have everything from then on not be rolled up yet, as if it had come later."""
        self.accounts[0].all(
            "WITH gone AS (DELETE FROM usage_rollups WHERE hour >= %s RETURNING 1),"
            " days AS (DELETE FROM usage_days RETURNING 1),"
            " state AS (UPDATE usage_rollup_state SET rolled_until = %s, fenced_until = NULL"
            " RETURNING 1) SELECT count(*) FROM gone",
            until,
            until,
        )

    def hold(self, hours: float | None = None) -> tuple[Money, dict[str, object]]:
        some = self.random
        money = some.choice(self.accounts)
        after = some.random() * (self.now - self.begin) if hours is None else hours * HOUR
        return money, money.hold(
            1000,
            request_id=id_at(self.begin + after),
            model=some.choice(MODELS),
            endpoint=some.choice(ENDPOINTS),
            byok=some.random() < 0.1,
        )

    def act(self) -> None:
        """Do one of the things that write or change usage."""
        some = self.random
        money, request = self.hold()
        what = some.choice(["capture", "capture", "error", "review", "late", "decide", "reprice"])
        if what == "capture":
            tokens = {"input_tokens": some.randrange(99), "images": some.choice([None, 2])}
            money.settle(capture(request, some.randrange(900), **tokens))
            self.captured.append((money, request))
        elif what == "error":
            error = {"error_code": some.choice(["upstream_error", "upstream_timeout"])}
            money.settle(void(request, cost_picos=5, **error))
        else:
            money.settle(void(request, **REVIEW))
            self.waiting.append((money, request))
        if what == "late":
            money, request = self.hold()
            money.connection.execute("UPDATE open_holds SET expires_at = now() - interval '1 hour'")
            money.all("SELECT expire_holds(10, 0)")
            # Its mark is gone before the truth comes.
            money.all("SELECT refresh_rollups(1000)")
            assert money.settle(capture(request, 77)) == ["captured_late"]
        elif what == "decide" and self.waiting:
            self.resolve(*self.waiting.pop(), some.choice(["charge", "waive"]))
        elif what == "reprice" and self.captured:
            self.resolve(*self.captured.pop(), "reprice")

    def resolve(self, money: Money, request: dict[str, object], decision: str) -> None:
        (outcome,) = money.one(
            "SELECT outcome FROM resolve_review(%s, %s, %s,"
            " (SELECT settled_at FROM usage WHERE request_id = %s), 55, 0, 'review', NULL, 44,"
            " %s, 'me', 'why')",
            *(money.account_id, request["request_id"], decision, request["request_id"], uuid4()),
        )
        assert outcome == "resolved"

    def rows(self) -> list[dict[str, Any]]:
        with self.accounts[0].connection.cursor(row_factory=dict_row) as cursor:
            cursor.execute("SELECT * FROM usage")
            return cursor.fetchall()

    async def check(self) -> None:
        """Compare summaries of some periods and groups, and the statistics, with the rows."""
        rows, some = self.rows(), self.random
        for money in self.accounts:
            moments = sorted(self.begin + some.random() * 44 * HOUR for _ in range(2))
            since, until = (m.replace(microsecond=m.microsecond // 1000 * 1000) for m in moments)
            by = some.sample(GROUPS, 2)
            for wanted, name in [
                (UsageFilter(), None),
                (UsageFilter(since=since, until=until), None),
                (UsageFilter(since=since, until=until, model="a", status="billed"), "a"),
            ]:
                low, high = first_uuid7(wanted.begin), first_uuid7(wanted.end)
                meant = [
                    row
                    for row in rows
                    if row["account_id"] == money.account_id
                    and low <= row["request_id"] < high
                    and (name is None or (row["model"], row["status"]) == (name, "billed"))
                ]
                found = await self.summaries.summary(money.account_id, wanted, by)
                assert {key(row, by): pick(row) for row in found} == added(meant, by)
        days = self.begin.date(), self.now.date()
        stats = await self.summaries.stats(*days)
        compare(stats, [row for row in rows if days[0] <= began(row).date() <= days[1]])


def began(row: dict[str, Any]) -> datetime:
    return datetime.fromtimestamp((row["request_id"].int >> 80) / 1000, UTC)


def members(row: dict[str, Any]) -> dict[str, object]:
    hour = began(row).replace(minute=0, second=0, microsecond=0)
    return {**row, "hour": hour, "day": hour.date()}


def key(row: dict[str, Any], by: Sequence[str]) -> tuple[object, ...]:
    names = {"key": "key_id", "project": "project_id"}
    return tuple(row[names.get(name, name)] for name in by)


def pick(row: dict[str, Any]) -> dict[str, int]:
    return {name: row[name] or 0 for name in SUMS}


def added(
    rows: list[dict[str, Any]], by: Sequence[str]
) -> dict[tuple[object, ...], dict[str, int]]:
    sums: dict[tuple[object, ...], Counter[str]] = {}
    for row in rows:
        group = sums.setdefault(key(members(row), by), Counter())
        group["requests"] += 1
        group["failed"] += row["error_code"] is not None
        group["cost_picos"] += 0 if row["byok"] else row["cost_picos"] or 0
        for name in ("price", "input_tokens", "output_tokens", "images"):
            group[name] += row[name] or 0
    return {group: {name: counts[name] for name in SUMS} for group, counts in sums.items()}


def compare(stats: Stats, rows: list[dict[str, Any]]) -> None:
    names = [name for name in SUMS if name != "images"]

    def told(found: list[dict[str, Any]], by: str) -> dict[object, object]:
        return {row[by]: [row[name] for name in names] for row in found}

    def wanted(by: str) -> dict[object, object]:
        return {k[0]: [v[name] for name in names] for k, v in added(rows, [by]).items()}

    assert told(stats.by_day, "day") == wanted("day")
    assert told(stats.by_model, "model") == wanted("model")
    assert told(stats.by_tier, "tier") == wanted("tier")
    assert sum(row["requests"] for row in stats.failed) == stats.total["failed"]
    assert stats.total["requests"] == len(rows)
    assert sum(row["active"] for row in stats.accounts) == len({row["account_id"] for row in rows})


@pytest.fixture
async def house(account: NewAccount, database_url: str) -> AsyncIterator[House]:
    """Three accounts, and nothing rolled up of the last 30 hours."""
    accounts = [account(funds=10**9) for _ in range(3)]
    async with make_pool(database_url, max_size=2) as pool:
        made = House(accounts, Rollups(pool), Summaries(pool))
        made.forget(made.begin + 10 * HOUR)
        yield made


def broken(url: str) -> dict[str, list[dict[str, Any]]]:
    return {found.name: found.rows for found in audit(url) if found.violations}


async def test_summaries_equal_the_rows_whatever_happens(house: House, database_url: str) -> None:
    for step in range(90):
        house.act()
        if step % 3 == 0:
            await house.rollups.step()
        if step % 10 == 4:
            await house.rollups.refresh()
        if step % 6 == 0:
            await house.check()
    await house.rollups.catch_up()
    assert await house.rollups.step() == "done"
    await house.rollups.refresh()
    await house.check()
    money = house.accounts[0]
    assert money.one("SELECT count(*) FROM usage_dirty") == (0,)
    assert money.one("SELECT count(*) > 50 FROM usage_rollups") == (True,)
    money.one("SELECT publish_price_book('{}', 1000000, %s, 'test')", uuid7())
    found = broken(database_url)
    assert {name for name in found if "rollups" in name or "days" in name} == set()


async def test_a_settlement_under_way_is_in_no_rollup_and_not_forgotten(
    house: House, database_url: str
) -> None:
    money, request = house.hold(hours=15.5)
    await house.rollups.catch_up()
    with psycopg.connect(database_url) as other:
        other.execute("SET search_path = tallygate")
        settling = void(request, error_code="slow")
        other.execute("SELECT settle_batch(%s)", (json.dumps([settling]),))
        assert await house.rollups.refresh() == 0
        await house.check()
        other.commit()
    await house.check()
    assert await house.rollups.refresh() == 1
    await house.check()
    assert money.one("SELECT sum(requests) FROM usage_rollups") == (1,)


async def test_what_began_before_the_fence_is_waited_for(house: House, database_url: str) -> None:
    assert await house.rollups.step() == "fenced"
    assert await house.rollups.step() == "rolled"
    house.forget(house.begin)
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_current_xact_id()")
        assert await house.rollups.step() == "fenced"
        assert await house.rollups.step() == "waiting"
        assert await house.rollups.catch_up() == 0
    assert await house.rollups.step() == "rolled"


async def test_one_replica_works_at_a_time(house: House, database_url: str) -> None:
    with psycopg.connect(database_url) as other:
        other.execute("SELECT tallygate.roll_up_usage()")
        assert await house.rollups.step() == "busy"
        assert await house.rollups.refresh() == 0
    assert await house.rollups.step() == "rolled"


async def test_a_fresh_request_leaves_no_mark(house: House) -> None:
    money = house.accounts[0]
    money.settle(capture(money.hold(10), 5))
    assert money.one("SELECT count(*) FROM usage_dirty") == (0,)
    money.settle(capture(money.hold(10, request_id=id_at(house.now - 61 * HOUR / 60)), 5))
    assert money.one("SELECT count(*) FROM usage_dirty") == (1,)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE usage_rollups SET price = price + 1",
        "DELETE FROM usage_rollups",
        "UPDATE usage SET cost_picos = cost_picos + 1",
        "UPDATE usage_days SET requests = requests + 1",
    ],
)
async def test_the_audit_names_a_sum_that_is_wrong(
    change: str, house: House, database_url: str
) -> None:
    money = house.accounts[0]
    money.settle(capture(money.hold(10, request_id=id_at(house.begin)), 5))
    await house.rollups.refresh()
    assert not {name for name in broken(database_url) if name.startswith("rollups")}
    money.connection.execute(change.encode())
    names = {name for name in broken(database_url) if name.startswith("rollups")}
    assert names == {"rollups_equal_usage" if "days" not in change else "rollups_equal_days"} | (
        {"rollups_equal_days"} if "usage_rollups" in change else set()
    )


async def test_a_detached_month_keeps_its_sums(account: NewAccount, database_url: str) -> None:
    money = account(funds=10**9)
    january, february = date(2025, 1, 1), date(2025, 2, 1)
    money.one("SELECT ensure_partitions(%s, 1)", january)
    money.one("SELECT publish_price_book('{}', 1000000, %s, 'test')", uuid4())
    moments = [datetime(2025, 1, 3, 10, 30, tzinfo=UTC), datetime(2025, 2, 3, tzinfo=UTC)]
    for moment in moments:
        money.settle(capture(money.hold(100, request_id=id_at(moment)), 60))
    money.settle(void(money.hold(100, request_id=id_at(moments[0])), error_code="x"))
    money.one("SELECT record_audit(%s, 'full', 9, 0, 0, 0)", uuid7())
    async with make_pool(database_url, max_size=2) as pool:
        await Sealer(pool).seal()
        rollups, summaries = Rollups(pool), Summaries(pool)
        whole = UsageFilter(until=datetime(2026, 1, 1, tzinfo=UTC))
        before = await summaries.summary(money.account_id, whole, ["day", "model"])
        stats = await summaries.stats(january, date(2025, 12, 31))
        (month,) = detach(database_url, february, actor="tester")
        assert month.is_detached

        # A settlement of the month that comes again changes nothing, and its mark wipes nothing.
        money.settle(void({"account_id": str(money.account_id), "request_id": id_at(moments[0])}))
        assert await summaries.summary(money.account_id, whole, ["day", "model"]) == before
        await rollups.refresh()

        assert await summaries.summary(money.account_id, whole, ["day", "model"]) == before
        assert await summaries.stats(january, date(2025, 12, 31)) == stats
        assert [row["requests"] for row in before] == [1, 2]
        # Of its hours nothing is left but their sums.
        part = UsageFilter(since=moments[0], until=moments[0] + timedelta(seconds=1))
        (row,) = await summaries.summary(money.account_id, part)
        assert row["requests"] == 2
    assert not {name for name in broken(database_url) if name.startswith("rollups")}


def test_a_month_that_is_not_rolled_up_stays(account: NewAccount, database_url: str) -> None:
    money = account()
    money.one("SELECT ensure_partitions('2025-01-01', 0)")
    money.one("SELECT record_audit(%s, 'full', 9, 0, 0, 0)", uuid7())
    money.all("UPDATE usage_rollup_state SET rolled_until = '2025-01-31Z' RETURNING 1")
    (month,) = detach(database_url, date(2025, 2, 1), actor="tester")
    assert month.obstacle == "not_rolled_up"
