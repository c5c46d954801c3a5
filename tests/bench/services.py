"""What Tallygate takes part with: services, their customers, and PostgreSQL beneath them."""

import tempfile
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import rmtree

import httpx
import psycopg

from proxy.db import migrate
from proxy.embedded.postgres import EmbeddedPostgres
from tests.bench.processes import BenchError
from tests.support.service import ADMIN_KEY, NO_TLS, Customer, Service, prepare_service

MASTER_KEY = "sk-master-of-the-benchmark"
# Enough for some million requests, none of which gives its hold back.
CREDITS = "1000000000"
_REPLAY_TIMEOUT_S = 60


@contextmanager
def directory() -> Generator[Path]:
    """Yield an empty directory."""
    path = Path(tempfile.mkdtemp(prefix="tallygate-bench-"))
    try:
        yield path
    finally:
        rmtree(path)


@contextmanager
def postgres() -> Generator[EmbeddedPostgres]:
    """Run PostgreSQL as `tallygate up` does: every commit is on disk."""
    with directory() as home:
        # Where we are root, PostgreSQL runs as somebody else, who must get there.
        home.chmod(0o711)
        server = EmbeddedPostgres(home)
        try:
            server.start()
            migrate(server.url())
            yield server
        finally:
            server.stop()


def another_database(server: EmbeddedPostgres, name: str) -> str:
    """Make one more database, with the schema; returns its address."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    own = server.url(name)
    migrate(own)
    return own


@contextmanager
def refusing_settlements(url: str) -> Generator[None]:
    """Have PostgreSQL refuse every settlement in a database, as if it were away.

    At the end waits until all that went to a spool meanwhile has been replayed.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        settle = "EXECUTE ON FUNCTION tallygate.settle_batch"
        connection.execute(f"REVOKE {settle} FROM tallygate_app".encode())
        try:
            yield
        finally:
            connection.execute(f"GRANT {settle} TO tallygate_app".encode())
        deadline = time.monotonic() + _REPLAY_TIMEOUT_S
        while connection.execute("SELECT FROM tallygate.open_holds LIMIT 1").fetchone():
            if time.monotonic() > deadline:
                raise BenchError("the spool was not replayed")
            time.sleep(0.1)


@contextmanager
def service(
    home: Path, database_url: str, litellm_url: str, workers: int = 1
) -> Generator[Service]:
    """Run `tallygate serve` in a directory that is not there yet."""
    home.mkdir()
    with closing(
        prepare_service(
            home,
            database_url=database_url,
            litellm_url=litellm_url,
            litellm_key=MASTER_KEY,
            workers=workers,
        )
    ) as service:
        service.start()
        try:
            yield service
        except BenchError as error:
            error.add_note(f"{service.log_path}, its end:\n{service.log()[-3000:]}")
            raise


def customer(service: Service) -> dict[str, str]:
    """Make an account that can afford everything; returns its key's header."""
    return bearer(service.new_key(credits=CREDITS).key)


def many_customers(service: Service, count: int) -> list[Customer]:
    """Make accounts with a key each, over one connection."""
    made: list[Customer] = []
    with httpx.Client(
        base_url=f"{service.base_url}/admin/v1",
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
        verify=NO_TLS,
        timeout=30,
    ) as client:
        for number in range(count):
            account = client.post("/accounts", json={"name": f"customer {number}"}).json()["id"]
            grant = {"credits": "1000000", "reason": "bench", "reference": f"start-{account}"}
            client.post(f"/accounts/{account}/grants", json=grant).raise_for_status()
            key = client.post(f"/accounts/{account}/keys", json={"name": "key"}).json()
            made.append(Customer(account, key["id"], key["key"]))
    return made


def bearer(key: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {key}"}
