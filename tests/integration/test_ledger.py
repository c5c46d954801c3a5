"""Authorization from Python: batches, lost answers, outages."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import LiteralString, cast
from uuid import UUID

import psycopg
import pytest

from proxy import ledger as ledger_module
from proxy.db import Session, make_pool
from proxy.errors import MeteringUnavailableError
from proxy.ids import uuid7
from proxy.ledger import HoldRequest, Ledger
from proxy.replays import IdempotencyStore
from proxy.sweeper import Heartbeat, Sweeper
from tests.integration.money import Money, NewAccount

pytestmark = pytest.mark.anyio


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[Ledger]:
    """A ledger on a fresh database."""
    pool = make_pool(database_url)
    await pool.open()
    ledger = Ledger(database_url, pool)
    yield ledger
    await ledger.close()
    await pool.close()


def hold_request(money: Money, amount: int, **changes: object) -> HoldRequest:
    """A request of this account."""
    values: dict[str, object] = {
        "account_id": money.account_id,
        "request_id": uuid7(),
        "key_id": money.key_id,
        "version": 2,
        "amount": amount,
        "tokens": 1,
        "ttl_s": 900,
        "endpoint": "chat.completions",
        "model": "m",
        "tier": "default",
        "streamed": False,
        "byok": False,
        "price_version": 1,
    }
    return HoldRequest(**(values | changes))  # pyright: ignore[reportArgumentType]


async def test_fifty_at_once_on_an_account_that_affords_five(
    account: NewAccount, ledger: Ledger
) -> None:
    money: Money = account(funds=500)
    answers = await asyncio.gather(*[ledger.authorize(hold_request(money, 100)) for _ in range(50)])
    assert (
        sorted(answer.outcome for answer in answers) == ["held"] * 5 + ["insufficient_credits"] * 45
    )
    assert money.balance() == (500, 500, 0)


async def test_request_that_the_database_can_not_take_does_not_refuse_its_neighbours(
    account: NewAccount, ledger: Ledger
) -> None:
    money: Money = account(funds=500)
    good, bad = hold_request(money, 100), hold_request(money, 100, model="\x00")
    answers = await asyncio.gather(
        ledger.authorize(good), ledger.authorize(bad), return_exceptions=True
    )
    assert getattr(answers[0], "outcome", None) == "held"
    assert isinstance(answers[1], psycopg.Error)


async def test_authorization_survives_a_cut_connection(account: NewAccount, ledger: Ledger) -> None:
    money: Money = account(funds=500)
    assert (await ledger.authorize(hold_request(money, 1))).is_held
    money.all(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert (await ledger.authorize(hold_request(money, 1))).is_held


async def test_lost_answer_is_asked_again_and_holds_once(
    account: NewAccount, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Session.fetch
    lost: list[bool] = []

    async def fetch(
        self: Session, query: LiteralString, parameters: Sequence[str]
    ) -> list[tuple[bytes | None, ...]]:
        rows = await real(self, query, parameters)
        if not lost:
            lost.append(True)
            raise psycopg.OperationalError("the connection was cut after COMMIT")
        return rows

    monkeypatch.setattr(ledger_module.Session, "fetch", fetch)
    money: Money = account(funds=500)
    answer = await ledger.authorize(hold_request(money, 100))
    assert (answer.outcome, answer.is_held) == ("exists", True)
    assert money.balance() == (500, 100, 0)


async def test_nothing_is_in_doubt_where_postgresql_was_never_reached(
    account: NewAccount, database_url: str
) -> None:
    del database_url
    nowhere = "postgresql://postgres@127.0.0.1:1/none"
    pool = make_pool(nowhere)
    ledger = Ledger(nowhere, pool)
    with pytest.raises(MeteringUnavailableError) as caught:
        await ledger.authorize(hold_request(account(), 1))
    assert (caught.value.is_in_doubt, caught.value.status) == (False, 503)
    await ledger.close()


async def test_sweeper_expires_what_is_overdue_and_counts_it(
    account: NewAccount, ledger: Ledger
) -> None:
    money: Money = account(funds=500)
    for _ in range(3):
        money.hold(10, ttl_s=0)
    live = money.hold(10)
    sweeper = Sweeper(ledger, cast("IdempotencyStore", None), interval_s=1, grace_s=0)
    assert await sweeper.sweep() == 3
    assert money.all("SELECT request_id FROM open_holds") == [(UUID(str(live["request_id"])),)]


async def test_heartbeat_extends_old_requests_until_they_are_removed(
    account: NewAccount, ledger: Ledger
) -> None:
    money: Money = account(funds=500)
    request = money.hold(10, ttl_s=0)
    request_id = UUID(str(request["request_id"]))
    heartbeat = Heartbeat(ledger, interval_s=0, ttl_s=600)
    heartbeat.add(money.account_id, request_id)
    assert await heartbeat.beat() == 1
    assert money.one("SELECT expires_at > now() + interval '9 minutes' FROM open_holds") == (True,)
    heartbeat.remove(request_id)
    assert await heartbeat.beat() == 0


async def test_heartbeat_leaves_young_requests_alone(ledger: Ledger) -> None:
    heartbeat = Heartbeat(ledger, interval_s=60, ttl_s=600)
    heartbeat.add(uuid7(), uuid7())
    assert await heartbeat.beat() == 0
