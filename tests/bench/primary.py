"""`python -m tests.bench.primary`: how far one PostgreSQL goes, and what stands before or behind it.

Each connection authorizes a batch and settles it, over and over, with no service in between. The
figures are ratios to one connection on one account: the rest is the machine. It and the clients
share the cores, so more connections than cores show what locks cost, and not what hardware gives.
"""

import argparse
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import msgspec
import psycopg

from proxy.db import migrate
from proxy.ids import uuid7
from proxy.ledger import HoldRequest, Settlement
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import make_server
from tests.support.service import ROOT
from tests.support.standby import Standby

CONNECTIONS = (1, 2, 4, 8)
ACCOUNTS = (1, 1000)
BATCH = 64
_LOGIN = "tallygate_service"
_DURABLE = {"fsync": "on", "full_page_writes": "on"}
Key = tuple[UUID, UUID]


def main() -> None:
    """Print a table for each way to the database."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.primary", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each, the best counts")
    arguments = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="tallygate-primary-"))
    server = make_server(home / "first", **_DURABLE)
    try:
        server.start()
        url = server.url()
        migrate(url)
        keys = _accounts(url)

        def measure(title: str, through: str) -> None:
            _report(title, through, keys, arguments.seconds, arguments.rounds)

        _report("warming up", url, keys, arguments.seconds, 1, tell=lambda _: None)
        measure("PostgreSQL alone", url)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute((ROOT / "deploy" / "service_login.sql").read_bytes())
            connection.execute(f"ALTER ROLE {_LOGIN} PASSWORD 'secret'".encode())
        bouncer = PgBouncer(home / "pgbouncer", url, passwords={_LOGIN: "secret"}, pool=16)
        measure("through PgBouncer", bouncer.url(_LOGIN))
        bouncer.stop()
        standby = Standby(server, home / "second", **_DURABLE)
        measure("with a synchronous standby", url)
        standby.stop()
    finally:
        server.stop()
        shutil.rmtree(home)


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


def _report(
    title: str,
    url: str,
    keys: Sequence[Key],
    seconds: float,
    rounds: int,
    tell: Callable[[str], None] = print,
) -> None:
    tell(f"\n{title}: requests/s, held and settled, in batches of {BATCH}")
    for accounts in ACCOUNTS:
        best = {
            connections: max(
                _run(url, keys[:accounts], connections, seconds) for _ in range(rounds)
            )
            for connections in CONNECTIONS
        }
        one = best[CONNECTIONS[0]]
        tell(
            f"{accounts:>5} accounts  "
            + "  ".join(f"{n}: {per_s:>7,.0f} ({per_s / one:.2f})" for n, per_s in best.items())
        )


def _run(url: str, keys: Sequence[Key], connections: int, seconds: float) -> float:
    """Return how many requests were held and settled each second."""
    settled = [0] * connections
    ends_at = time.monotonic() + seconds

    def work(number: int) -> None:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
            turn = number
            while time.monotonic() < ends_at:
                held: list[HoldRequest] = []
                for _ in range(BATCH):
                    turn += 619  # reaches every account, and not in the order of their making
                    held.append(_hold(*keys[turn % len(keys)]))
                for function, batch in (
                    ("authorize", held),
                    ("settle", [_settlement(hold) for hold in held]),
                ):
                    connection.execute(
                        f"SELECT outcome FROM tallygate.{function}_batch(%s)".encode(),
                        (msgspec.json.encode(batch).decode(),),
                    ).fetchall()
                settled[number] += BATCH

    threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(settled) / (time.monotonic() - started)


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
