"""A load of holds alone, and of their settlements alone: where PostgreSQL's batches are full."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec
import psycopg

from proxy.ids import uuid7
from proxy.ledger import HoldRequest, Settlement
from tests.bench.contenders import Stage
from tests.bench.processes import cpu_seconds
from tests.bench.results import LedgerLoad
from tests.bench.services import another_database

ACCOUNTS = (1, 1000)
LANES = (1, 2, 4)
BATCHES = (1, 4, 16, 64, 256)
_FUNDS = 10**17
_AMOUNT = 20_000_000
_AUTHORIZE = "SELECT outcome FROM authorize_batch(%s)"
_SETTLE = "SELECT outcome FROM settle_batch(%s)"


@dataclass(frozen=True)
class _Calls:
    """What one lane sends: encoded batches of holds, and of their settlements."""

    holds: list[str]
    settlements: list[str]


def ledger_load(
    stage: Stage, *, requests: int, progress: Callable[[str], None]
) -> list[LedgerLoad]:
    """Measure every number of accounts, lanes and requests in a batch."""
    url = another_database(stage.postgres, "loading")
    keys = _accounts(url, max(ACCOUNTS))
    measured: list[LedgerLoad] = []
    for accounts in ACCOUNTS:
        for lanes in LANES:
            for batch in BATCHES:
                load = _measure(stage, url, keys[:accounts], lanes, batch, requests)
                measured.append(load)
                progress(
                    f"{accounts:>4} accounts  {lanes} lanes  batches of {batch:>3}"
                    f"  {load.holds_per_s:>8,.0f} holds/s  {load.settlements_per_s:>8,.0f} ended/s"
                )
    return measured


def _measure(
    stage: Stage,
    url: str,
    keys: Sequence[tuple[UUID, UUID]],
    lanes: int,
    batch: int,
    requests: int,
) -> LedgerLoad:
    # With small batches fewer, so that all of them take about as long.
    calls = max(8, min(requests, 120 * batch) // batch)
    prepared = [_prepare(keys, batch, calls) for _ in range(lanes)]
    before = cpu_seconds(stage.postgres_pid())
    holding_s = _timed(url, _AUTHORIZE, [lane.holds for lane in prepared])
    settling_s = _timed(url, _SETTLE, [lane.settlements for lane in prepared])
    used = cpu_seconds(stage.postgres_pid()) - before
    total = lanes * calls * batch
    return LedgerLoad(
        accounts=len(keys),
        lanes=lanes,
        batch=batch,
        holds_per_s=total / holding_s,
        hold_call_ms=holding_s / calls * 1000,
        settlements_per_s=total / settling_s,
        settlement_call_ms=settling_s / calls * 1000,
        postgres_us=used / total * 1e6,
    )


def _prepare(keys: Sequence[tuple[UUID, UUID]], batch: int, calls: int) -> _Calls:
    holds: list[str] = []
    settlements: list[str] = []
    turn = 0
    for _ in range(calls):
        asked: list[HoldRequest] = []
        for _ in range(batch):
            account_id, key_id = keys[turn % len(keys)]
            # A step that reaches every account, and not in the order in which they were made.
            turn += 619
            asked.append(_hold(account_id, key_id))
        holds.append(msgspec.json.encode(asked).decode())
        settlements.append(msgspec.json.encode([_settlement(hold) for hold in asked]).decode())
    return _Calls(holds, settlements)


def _hold(account_id: UUID, key_id: UUID) -> HoldRequest:
    return HoldRequest(
        account_id=account_id,
        request_id=uuid7(),
        key_id=key_id,
        version=2,
        amount=_AMOUNT,
        tokens=1000,
        ttl_s=300,
        endpoint="chat.completions",
        model="demo",
        tier="default",
        streamed=False,
        byok=False,
        price_version=1,
    )


def _settlement(hold: HoldRequest) -> Settlement:
    return Settlement(
        account_id=hold.account_id,
        request_id=hold.request_id,
        action="capture",
        status="billed",
        price=450_000,
        model_answered="demo",
        input_tokens=10,
        output_tokens=20,
        cost_picos=225_000_000,
        cost_source="header",
        rounding_attos=0,
        rule="default",
        markup_ppm=2_000_000,
        upstream_status=200,
        first_byte_ms=2,
        duration_ms=2,
        rated_picos=225_000_000,
    )


def _timed(url: str, query: str, lanes: Sequence[Sequence[str]]) -> float:
    """Send each lane's batches over a connection of its own; returns how long all took."""
    gate = threading.Barrier(len(lanes) + 1)
    wrong: list[str] = []

    def run(batches: Sequence[str]) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SET search_path = tallygate; SET ROLE tallygate_app")
            gate.wait()
            for batch in batches:
                rows = connection.execute(query.encode(), (batch,)).fetchall()
                wrong.extend(row[0] for row in rows if row[0] not in {"held", "captured"})

    threads = [threading.Thread(target=run, args=(batches,)) for batches in lanes]
    for thread in threads:
        thread.start()
    gate.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    return time.perf_counter() - started


def _accounts(url: str, count: int) -> list[tuple[UUID, UUID]]:
    """Make accounts with funds; returns each one's id and its key's."""
    made = [(uuid7(), uuid7()) for _ in range(count)]
    with psycopg.connect(url) as connection:
        connection.execute("SET search_path = tallygate")
        for account_id, key_id in made:
            key = {"key_id": str(key_id), "name": "key", "prefix": "sk-"}
            connection.execute(
                "SELECT create_account(%s, 'a', 'default', 0, 'bench')", (account_id,)
            )
            connection.execute(
                "SELECT create_key(%s, %s, %s, 'bench')",
                (account_id, hashlib.sha256(key_id.bytes).digest(), json.dumps(key)),
            )
            connection.execute(
                "SELECT outcome FROM fund(%s, %s, 'grant', %s, 'bench', 'first', 'why', 'bench')",
                (account_id, uuid7(), _FUNDS),
            )
    return made
