"""Durable before done: through outages, poison and replays, each settlement counts once."""

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import LiteralString
from uuid import UUID

import psycopg
import pytest
from prometheus_client import REGISTRY
from psycopg.conninfo import conninfo_to_dict

from proxy import settlement as settlement_module
from proxy.db import CONNECTION_ERRORS, Session
from proxy.errors import MeteringUnavailableError
from proxy.ledger import Settlement
from proxy.settlement import Settler
from proxy.spool import Spool
from tests.integration.money import Money, NewAccount

pytestmark = pytest.mark.anyio

# Nobody listens there.
NOWHERE = "postgresql://postgres@127.0.0.1:1/none"

MakeSettler = Callable[..., Settler]


@pytest.fixture
async def make_settler(database_url: str, tmp_path: Path) -> AsyncIterator[MakeSettler]:
    """Make settlers on one spool directory, closed at the end."""
    sessions: list[Session] = []
    settlers: list[Settler] = []

    def make(url: str = database_url, spool: Spool | None = None) -> Settler:
        lane, replay = Session(url, timeout_s=5), Session(database_url, timeout_s=5)
        sessions.extend((lane, replay))
        settlers.append(
            Settler([lane], replay, spool or Spool(tmp_path), nanos_per_credit=1_000_000)
        )
        return settlers[-1]

    yield make
    for settler in settlers:
        await settler.drain()
    for session in sessions:
        await session.close()


def captured(request: dict[str, object], price: int = 150, **changes: object) -> Settlement:
    """A settlement of a hold made by `Money.hold`."""
    values: dict[str, object] = {
        "account_id": UUID(str(request["account_id"])),
        "request_id": UUID(str(request["request_id"])),
        "action": "capture",
        "status": "billed",
        "price": price,
        "cost_picos": 75_000,
        "rounding_attos": 0,
        "rule": "default",
        "input_tokens": 3,
        "output_tokens": 4,
    }
    return Settlement(**(values | changes))  # pyright: ignore[reportArgumentType]


async def test_settlements_of_one_moment_go_in_one_batch(
    account: NewAccount, make_settler: MakeSettler
) -> None:
    money: Money = account(funds=1000)
    requests = [money.hold(100) for _ in range(5)]
    settler = make_settler()
    results = await asyncio.gather(*[settler.settle(captured(item, 10)) for item in requests])
    assert {result.outcome for result in results} == {"captured"}
    assert money.balance() == (950, 0, 0)
    assert money.one("SELECT count(DISTINCT at) FROM entries WHERE kind = 'capture'") == (1,)


async def test_settlement_goes_to_the_spool_while_postgresql_is_away_and_is_replayed_once(
    account: NewAccount, make_settler: MakeSettler, tmp_path: Path
) -> None:
    money: Money = account(funds=1000)
    request = money.hold(400)
    spool = Spool(tmp_path)
    settler = make_settler(NOWHERE, spool)
    assert (await settler.settle(captured(request))).outcome == "spooled"
    assert money.balance() == (1000, 400, 0)
    assert spool.depth() > 0
    assert await settler.replay() == 1
    assert await settler.replay() == 0
    assert money.balance() == (850, 0, 0)


async def test_spool_of_a_dead_process_is_replayed_by_the_next(
    account: NewAccount, make_settler: MakeSettler, tmp_path: Path
) -> None:
    money: Money = account(funds=1000)
    dead = Spool(tmp_path)
    await make_settler(NOWHERE, dead).settle(captured(money.hold(400)))
    dead.close()
    assert await make_settler(spool=Spool(tmp_path)).replay() == 1
    assert money.balance() == (850, 0, 0)


async def test_spool_survives_a_replay_that_fails(
    account: NewAccount, make_settler: MakeSettler, tmp_path: Path
) -> None:
    money: Money = account(funds=1000)
    spool = Spool(tmp_path)
    away = Settler(
        [Session(NOWHERE, timeout_s=5)],
        Session(NOWHERE, timeout_s=5),
        spool,
        nanos_per_credit=1_000_000,
    )
    await away.settle(captured(money.hold(400)))
    with pytest.raises(CONNECTION_ERRORS):
        await away.replay()
    assert spool.depth() > 0
    assert await make_settler(spool=spool).replay() == 1
    assert money.balance() == (850, 0, 0)


async def test_settlement_survives_a_cut_connection(
    account: NewAccount, make_settler: MakeSettler
) -> None:
    money: Money = account(funds=1000)
    first, second = money.hold(100), money.hold(100)
    settler = make_settler()
    await settler.settle(captured(first, 10))
    money.all(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    assert (await settler.settle(captured(second, 10))).outcome == "captured"
    assert money.balance() == (980, 0, 0)


async def test_poisonous_settlement_is_set_aside_and_its_neighbours_are_posted(
    account: NewAccount, make_settler: MakeSettler, tmp_path: Path
) -> None:
    money: Money = account(funds=1000)
    good, bad = money.hold(100), money.hold(100)
    spool = Spool(tmp_path)
    settler = make_settler(spool=spool)
    results = await asyncio.gather(
        settler.settle(captured(good, 10)), settler.settle(captured(bad, -5))
    )
    assert [result.outcome for result in results] == ["captured", "rejected"]
    assert spool.rejected() == 1
    assert money.balance() == (990, 100, 0)


async def test_settlement_that_nothing_takes_is_refused_and_not_called_done(
    account: NewAccount,
    make_settler: MakeSettler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullDisk(Spool):
        def append(self, payloads: object) -> None:
            del payloads
            raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(settlement_module, "_LAST_RESORT_S", 0.0)
    money: Money = account(funds=1000)
    with pytest.raises(MeteringUnavailableError):
        await make_settler(NOWHERE, FullDisk(tmp_path)).settle(captured(money.hold(400)))
    assert money.balance() == (1000, 400, 0)


async def test_settlement_waits_for_a_full_disk_to_be_cleared(
    account: NewAccount, make_settler: MakeSettler, tmp_path: Path
) -> None:
    class OnceFullDisk(Spool):
        failures = 1

        def append(self, payloads: object) -> None:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.ENOSPC, "no space left on device")
            super().append(payloads)  # pyright: ignore[reportArgumentType]

    money: Money = account(funds=1000)
    settler = make_settler(NOWHERE, OnceFullDisk(tmp_path))
    assert (await settler.settle(captured(money.hold(400)))).outcome == "spooled"


async def test_commit_whose_answer_was_lost_is_not_charged_again(
    account: NewAccount, database_url: str, tmp_path: Path
) -> None:
    class LosesTheAnswer(Session):
        lost = False

        async def fetch(
            self, query: LiteralString, parameters: Sequence[str]
        ) -> list[tuple[bytes | None, ...]]:
            rows = await super().fetch(query, parameters)
            if not self.lost:
                self.lost = True
                raise psycopg.OperationalError("the connection was cut after COMMIT")
            return rows

    money: Money = account(funds=1000)
    session = LosesTheAnswer(database_url, timeout_s=5)
    settler = Settler([session], session, Spool(tmp_path), nanos_per_credit=1_000_000)
    assert (await settler.settle(captured(money.hold(400)))).outcome == "already_captured"
    assert money.balance() == (850, 0, 0)
    await settler.drain()
    await session.close()


async def test_capture_of_a_hold_that_never_was_is_kept_for_a_human(
    account: NewAccount,
    make_settler: MakeSettler,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    money: Money = account(funds=1000)
    spool = Spool(tmp_path)
    settled = await make_settler(spool=spool).settle(captured(money.request(400)))
    assert (settled.outcome, spool.rejected()) == ("unknown", 1)
    assert "knows no such hold" in str(caplog.records[-1].__dict__)


async def test_settlement_that_can_not_even_be_set_aside_is_not_called_done(
    account: NewAccount,
    make_settler: MakeSettler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class FullDisk(Spool):
        def append(self, payloads: object) -> None:
            del payloads
            raise OSError(errno.ENOSPC, "no space left on device")

        def set_aside(self, payload: bytes) -> None:
            self.append([payload])

    monkeypatch.setattr(settlement_module, "_LAST_RESORT_S", 0.0)
    money: Money = account(funds=1000)
    with pytest.raises(MeteringUnavailableError):
        await make_settler(spool=FullDisk(tmp_path)).settle(captured(money.hold(400), -5))


async def test_read_only_server_sends_settlements_to_the_spool(
    account: NewAccount, make_settler: MakeSettler, database_url: str, tmp_path: Path
) -> None:
    money: Money = account(funds=1000)
    request = money.hold(400)
    name = conninfo_to_dict(database_url)["dbname"]
    money.connection.execute(
        f"ALTER DATABASE {name} SET default_transaction_read_only = on".encode()
    )
    spool = Spool(tmp_path)
    settler = make_settler(spool=spool)
    assert (await settler.settle(captured(request))).outcome == "spooled"
    assert spool.rejected() == 0
    money.connection.execute("SET transaction_read_only = off")
    money.connection.execute("SET default_transaction_read_only = off")
    money.connection.execute(
        f"ALTER DATABASE {name} SET default_transaction_read_only = off".encode()
    )
    assert await settler.replay() == 1
    assert money.balance() == (850, 0, 0)


async def test_charge_beyond_everything_is_reported_as_overdraft(
    account: NewAccount, make_settler: MakeSettler
) -> None:
    money: Money = account(funds=1000)
    before = overdraft_usd()
    settled = await make_settler().settle(captured(money.hold(100), 1500))
    assert settled.overdraft_nanos == 500
    assert overdraft_usd() - before == pytest.approx(500e-9)


def overdraft_usd() -> float:
    return REGISTRY.get_sample_value("tallygate_overdraft_usd_total") or 0.0


async def test_spool_is_replayed_in_the_background_as_soon_as_postgresql_is_back(
    account: NewAccount, database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class AwayAtFirst(Session):
        failures = 2

        async def fetch(
            self, query: LiteralString, parameters: Sequence[str]
        ) -> list[tuple[bytes | None, ...]]:
            if self.failures:
                self.failures -= 1
                raise psycopg.OperationalError("away")
            return await super().fetch(query, parameters)

    money: Money = account(funds=1000)
    nowhere = Session(NOWHERE, timeout_s=5)
    back = AwayAtFirst(database_url, timeout_s=5)
    settler = Settler([nowhere], back, Spool(tmp_path), nanos_per_credit=1_000_000)
    await settler.settle(captured(money.hold(400)))
    running = asyncio.create_task(settler.run(interval_s=0.01))
    async with asyncio.timeout(10):
        while money.balance() != (850, 0, 0):  # noqa: ASYNC110 - another process's row
            await asyncio.sleep(0.01)
    running.cancel()
    await settler.drain()
    assert "spool waits for PostgreSQL" in caplog.text
