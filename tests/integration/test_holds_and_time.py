"""Holds and time: sweepers of several replicas, heartbeats, what comes late, overdraft."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast
from uuid import UUID

import psycopg
import pytest
from prometheus_client import REGISTRY

from proxy.db import Session, make_pool
from proxy.ledger import Ledger, Settled, Settlement
from proxy.replays import IdempotencyStore
from proxy.settlement import Settler
from proxy.spool import Spool
from proxy.sweeper import Heartbeat, Sweeper
from tests.integration.money import Money, NewAccount, capture

pytestmark = pytest.mark.anyio

NewLedger = Callable[[], "Ledger"]
_ADVISORY_LOCK = "SELECT pg_advisory_lock(hashtext('tallygate.expire_holds'))"


@pytest.fixture
async def replica(database_url: str) -> AsyncIterator[NewLedger]:
    """Make ledgers with connections of their own, as replicas have them."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(make_pool(database_url))

        def make() -> Ledger:
            ledger = Ledger(database_url, pool)
            stack.push_async_callback(ledger.close)
            return ledger

        yield make


def sweeper_of(ledger: Ledger) -> Sweeper:
    return Sweeper(ledger, cast("IdempotencyStore", None), interval_s=1, grace_s=0)


def _expired() -> tuple[float, float]:
    """How many holds expired by the metrics, and how many reviews that made."""
    reason = {"reason": "orphaned"}
    return (
        REGISTRY.get_sample_value("tallygate_holds_expired_total") or 0,
        REGISTRY.get_sample_value("tallygate_reviews_total", reason) or 0,
    )


def overdue(accounts: list[Money], number: int) -> list[dict[str, object]]:
    """Place so many holds whose time is over on each account."""
    requests = [money.request(1, ttl_s=0) for money in accounts for _ in range(number)]
    for money in accounts:
        own = [each for each in requests if each["account_id"] == str(money.account_id)]
        assert set(money.authorize(*own)) == {"held"}
    return requests


async def test_sweepers_of_several_replicas_expire_each_hold_once(
    account: NewAccount, replica: NewLedger
) -> None:
    accounts = [account(funds=1000) for _ in range(3)]
    overdue(accounts, 150)  # more than two rounds of a sweep
    before = _expired()
    sweepers = [sweeper_of(replica()) for _ in range(4)]
    swept = 0
    while accounts[0].one("SELECT EXISTS (SELECT 1 FROM open_holds)")[0]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(sweeper.sweep()) for sweeper in sweepers]
        swept += sum(task.result() for task in tasks)
    assert swept == 450
    assert _expired() == (before[0] + 450, before[1] + 450)
    for money in accounts:
        assert money.kinds() == ["grant", *["hold"] * 150, *["expire"] * 150]
        assert money.balance() == (1000, 0, 0)


async def test_sweeper_does_not_queue_up_behind_another(
    account: NewAccount, replica: NewLedger
) -> None:
    money = account(funds=1000)
    overdue([money], 1)
    sweeper = sweeper_of(replica())
    money.one(_ADVISORY_LOCK)
    async with asyncio.timeout(5):
        assert await sweeper.sweep() == 0
    money.one("SELECT pg_advisory_unlock_all()")
    assert await sweeper.sweep() == 1


async def test_settlements_that_race_the_sweepers_are_each_charged_once(
    account: NewAccount, replica: NewLedger, database_url: str, tmp_path: Path
) -> None:
    accounts = [account(funds=1000) for _ in range(2)]
    requests = overdue(accounts, 60)
    ledger = replica()
    settler = Settler(
        ledger.settle_sessions,
        Session(database_url, timeout_s=5),
        Spool(tmp_path),
        nanos_per_credit=1_000_000,
    )
    sweepers = [sweeper_of(replica()) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for sweeper in sweepers:
            group.create_task(sweeper.sweep())
        tasks = [group.create_task(_settle(settler, request)) for request in requests]
        for sweeper in sweepers:
            group.create_task(sweeper.sweep())
    await settler.drain()
    assert {task.result().outcome for task in tasks} <= {"captured", "captured_late"}
    for money in accounts:
        assert money.balance() == (940, 0, 0)
        charged = money.all(
            "SELECT count(*) FROM entries WHERE account_id = %s AND posted_delta < 0"
            " GROUP BY request_id",
            money.account_id,
        )
        assert charged == [(1,)] * 60


async def _settle(settler: Settler, request: dict[str, object]) -> Settled:
    return await settler.settle(_captured(request))


def _captured(request: dict[str, object]) -> Settlement:
    return Settlement(
        account_id=UUID(str(request["account_id"])),
        request_id=UUID(str(request["request_id"])),
        action="capture",
        status="billed",
        price=1,
        cost_picos=500,
        cost_source="header",
    )


async def test_charge_that_waited_in_a_spool_comes_after_another_replicas_sweep(
    account: NewAccount, replica: NewLedger, database_url: str, tmp_path: Path
) -> None:
    money = account(funds=1000)
    (request,) = overdue([money], 1)
    away = Session("host=/nowhere", timeout_s=1)
    settler = Settler(
        [away], Session(database_url, timeout_s=5), Spool(tmp_path), nanos_per_credit=1_000_000
    )
    assert (await settler.settle(_captured(request))).outcome == "spooled"
    assert await sweeper_of(replica()).sweep() == 1
    assert money.usage(request)["review_reason"] == "orphaned"
    assert await settler.replay() == 1
    await settler.drain()
    assert money.kinds() == ["grant", "hold", "expire", "late_capture"]
    row = money.usage(request)
    assert (row["status"], row["price"], row["review_reason"]) == ("billed", 1, None)


async def test_heartbeat_goes_on_after_an_outage(account: NewAccount, replica: NewLedger) -> None:
    money = account(funds=1000)
    request = money.hold(10)
    ledger, request_id = replica(), UUID(str(request["request_id"]))
    await ledger.extend_holds([(money.account_id, request_id)], 900)
    # Its connection is lost, and its hold nearly so.
    money.all(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    money.all("UPDATE open_holds SET expires_at = now() RETURNING 1")
    heartbeat = Heartbeat(ledger, interval_s=0.05, ttl_s=900)
    heartbeat.add(money.account_id, request_id)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await heartbeat.run()
    assert money.one("SELECT expires_at > now() FROM open_holds") == (True,)


async def test_heartbeat_waits_for_nobody_and_makes_up_for_it_the_next_time(
    account: NewAccount, replica: NewLedger, database_url: str
) -> None:
    money = account(funds=1000)
    requests = [money.hold(10, ttl_s=0) for _ in range(2)]
    heartbeat = Heartbeat(replica(), interval_s=0, ttl_s=900)
    for request in requests:
        heartbeat.add(money.account_id, UUID(str(request["request_id"])))
    is_live = "SELECT expires_at > now() FROM open_holds ORDER BY request_id"
    with psycopg.connect(database_url) as settling:
        # In the middle of a transaction that then fails.
        ends = "DELETE FROM tallygate.open_holds WHERE request_id = %s"
        settling.execute(ends, (requests[0]["request_id"],))
        async with asyncio.timeout(5):
            await heartbeat.beat()
        assert money.all(is_live) == [(False,), (True,)]
        settling.rollback()
    await heartbeat.beat()
    assert money.all(is_live) == [(True,), (True,)]


def test_overdraft_is_worked_off_by_several_deposits(account: NewAccount) -> None:
    money = account(funds=100)
    money.settle(capture(money.hold(100), 400))
    assert money.balance() == (-300, 0, 300)
    money.fund(200, "second", "deposit")
    assert money.balance() == (-100, 0, 100)
    assert money.authorize(money.request(1)) == ["insufficient_credits"]
    money.fund(100, "third", "deposit")
    assert money.balance() == (0, 0, 0)
    assert money.authorize(money.request(1)) == ["insufficient_credits"]
    money.fund(1, "fourth", "deposit")
    assert money.authorize(money.request(1)) == ["held"]


def test_capture_beyond_its_hold_takes_nothing_that_is_held_for_others(account: NewAccount) -> None:
    money = account(funds=1000)
    large, other = money.hold(100), money.hold(800)
    money.settle(capture(large, 300))
    # 100 were available: what goes beyond is overdraft, and the other's hold stands.
    assert money.balance() == (700, 800, 100)
    assert money.settle(capture(other, 800)) == ["captured"]
    assert money.balance() == (-100, 0, 100)
    assert money.usage(other)["overdraft"] == 0


def test_hold_that_was_given_up_may_be_spent_meanwhile(account: NewAccount) -> None:
    money = account(funds=100)
    given_up = money.hold(100, ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    money.settle(capture(money.hold(100), 100))
    assert money.settle(capture(given_up, 40)) == ["captured_late"]
    assert money.balance() == (-40, 0, 40)
    row = money.usage(given_up)
    assert (row["status"], row["overdraft"], row["review_reason"]) == ("billed", 40, "overdraft")
