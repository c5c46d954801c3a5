"""`python -m tests.bench.primary`: how far one PostgreSQL goes, what pooler and standby cost.

Each connection authorizes a batch and settles it, over and over, with no service in between. Runs
that are compared follow each other, and what counts is the median of their ratios, for the machine
may have other things to do. Clients and both servers share it: more connections than cores show
what locks cost, and not what hardware gives.
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import msgspec
import psycopg

from proxy.db import migrate
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.ids import uuid7
from proxy.ledger import HoldRequest, Settlement
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import make_server
from tests.support.service import ROOT
from tests.support.standby import Standby

CONNECTIONS = (1, 2, 4, 8)
ACCOUNTS = (1, 1000)
BATCH = 64
ALONE = "alone"
_LOGIN = "tallygate_service"
_DURABLE = {"fsync": "on", "full_page_writes": "on"}
Key = tuple[UUID, UUID]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.primary", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="tallygate-primary-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home)
        server = make_server(home / "first", **_DURABLE)
        stack.callback(server.stop)
        server.start()
        ways = _ways(server, home, stack)
        keys = _accounts(server.url())
        for accounts in ACCOUNTS:
            for way in ways.values():  # a warm-up
                _run(way, keys[:accounts], 2, arguments.seconds)
            rounds = [
                {
                    (name, connections): _run(way, keys[:accounts], connections, arguments.seconds)
                    for connections in CONNECTIONS
                    for name, way in ways.items()
                }
                for _ in range(arguments.rounds)
            ]
            _tell(accounts, rounds)


def _ways(server: EmbeddedPostgres, home: Path, stack: ExitStack) -> dict[str, str]:
    """Set up everything, and return a URL for each way to the primary."""
    url = server.url()
    migrate(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute((ROOT / "deploy" / "service_login.sql").read_bytes())
        connection.execute(f"ALTER ROLE {_LOGIN} PASSWORD 'secret'".encode())
        connection.execute(f"ALTER ROLE {_LOGIN} SET synchronous_commit = local".encode())
    standby = Standby(server, home / "second", **_DURABLE)
    stack.callback(standby.stop)
    bouncer = PgBouncer(home / "pgbouncer", url, passwords={_LOGIN: "secret"}, pool=16)
    stack.callback(bouncer.stop)
    return {
        # It streams to the standby all the same, and does not wait for it.
        ALONE: url + "&options=-csynchronous_commit%3Dlocal",
        "through PgBouncer": bouncer.url(_LOGIN),
        "waiting for a standby": url,
    }


def _tell(accounts: int, rounds: Sequence[dict[tuple[str, int], float]]) -> None:
    first = CONNECTIONS[0]
    print(f"\n{accounts} accounts, batches of {BATCH}: requests held and settled")
    for connections in CONNECTIONS:
        gained = median(each[ALONE, connections] / each[ALONE, first] for each in rounds)
        per_s = median(each[ALONE, connections] for each in rounds)
        others = {name for name, _ in rounds[0]} - {ALONE}
        costs = "  ".join(
            f"{name} "
            f"{median(each[name, connections] / each[ALONE, connections] for each in rounds):.2f}"
            for name in sorted(others)
        )
        print(f"  {connections} connections: {per_s:>6,.0f}/s, {gained:.2f} of one;  {costs}")


def _accounts(url: str) -> list[Key]:
    keys: list[Key] = []
    with psycopg.connect(url) as connection:
        connection.execute("SET search_path = tallygate")
        for _ in range(max(ACCOUNTS)):
            account_id, key_id = uuid7(), uuid7()
            key = msgspec.json.encode({"key_id": str(key_id), "name": "k", "prefix": "sk-"})
            connection.execute(
                "SELECT create_account(%s, 'a', 'default', %s, 'bench'),"
                " create_key(%s, %s, %s, 'bench')",
                (account_id, 10**17, account_id, sha256(key_id.bytes).digest(), key.decode()),
            )
            keys.append((account_id, key_id))
    return keys


def _run(url: str, keys: Sequence[Key], connections: int, seconds: float) -> float:
    """Return how many requests were held and settled each second."""
    settled = [0] * connections
    ready = threading.Barrier(connections)

    def work(number: int) -> None:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
            # A backend plans the functions at its first call, which takes longer than many others.
            turn = _call(connection, keys, number)
            ready.wait()
            ends_at = time.monotonic() + seconds
            while time.monotonic() < ends_at:
                turn = _call(connection, keys, turn)
                settled[number] += BATCH

    threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(settled) / seconds


def _call(connection: psycopg.Connection[Any], keys: Sequence[Key], turn: int) -> int:
    """Hold a batch and settle it; returns where the next one begins."""
    held: list[HoldRequest] = []
    for _ in range(BATCH):
        turn += 619  # reaches every account, and not in the order of their making
        held.append(_hold(*keys[turn % len(keys)]))
    for function, batch in (("authorize", held), ("settle", [_settlement(hold) for hold in held])):
        connection.execute(
            f"SELECT outcome FROM tallygate.{function}_batch(%s)".encode(),
            (msgspec.json.encode(batch).decode(),),
        ).fetchall()
    return turn


def _hold(account_id: UUID, key_id: UUID) -> HoldRequest:
    return HoldRequest(
        account_id=account_id,
        request_id=uuid7(),
        key_id=key_id,
        version=2,
        amount=20_000_000,
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
        price=10_000_000,
        cost_picos=5_000_000_000,
        cost_source="header",
        input_tokens=500,
        output_tokens=500,
    )


if __name__ == "__main__":
    main()
