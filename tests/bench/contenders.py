"""Who is compared: each in a process of its own, on a loopback port of its own."""

import os
import sys
import tempfile
from collections.abc import Collection, Generator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree

import httpx
import psycopg

from proxy.db import migrate
from proxy.embedded.litellm import LiteLLMChild
from proxy.embedded.postgres import EmbeddedPostgres
from tests.bench import canned, nginx, portkey
from tests.bench.names import (
    ACCOUNTS,
    BARE,
    BODIES,
    BODIES_TAKEN_BY,
    BYOK,
    DIRECT,
    FIRST_BYTE,
    FLOOD,
    LABELS,
    LITELLM,
    METERED,
    NGINX,
    PORTKEY,
    SPOOL,
    START,
    STARLETTE,
    STREAMS,
    UNLEDGERED,
    WHOLE,
    WORKERS,
)
from tests.bench.processes import BenchError, running
from tests.support.service import ADMIN_KEY, NO_TLS, Customer, Service, free_port, prepare_service

MASTER_KEY = "sk-master-of-the-benchmark"
PROVIDER_KEY = "key-of-the-customer"
# Enough for some million requests, none of which gives its hold back.
CREDITS = "1000000000"
MANY_ACCOUNTS = 1000

# The two that stand for a stream's ends: see `Stage.streamed`.
_STREAMING = (STREAMS, FIRST_BYTE, FLOOD)
_ALSO: Mapping[str, Collection[str]] = {
    WHOLE: LABELS,
    BODIES: BODIES_TAKEN_BY,
    START: (DIRECT, LITELLM),
}


@dataclass(frozen=True)
class Contender:
    """Somebody who answers chat completions."""

    name: str
    url: str
    pid: int
    headers: Mapping[str, str]
    uses_ledger: bool = False
    # A file with a key a line, which take turns.
    keys: Path | None = None


@dataclass
class Stage:
    """All of them, and what they share."""

    home: Path
    postgres: EmbeddedPostgres
    database_url: str
    # Whose settlements go to a spool: a database in which they may not be settled.
    spool_database_url: str
    contenders: dict[str, Contender] = field(default_factory=dict[str, Contender])
    # For streams: the source itself, and the service before it.
    streamed: tuple[Contender, ...] = ()
    # Contender -> why it does not take part.
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    # Requests that were answered whole by contenders with a ledger.
    answered: int = 0

    def postgres_pid(self) -> int:
        """Return the server's process, the parent of those that work."""
        pid = self.postgres.pid()
        assert pid is not None
        return pid


@contextmanager
def stage(groups: Collection[str]) -> Generator[Stage]:
    """Start whom these groups need; ends them all with the context, whatever happens in it."""
    wanted = {name for group in groups for name in _ALSO.get(group, ())}
    with ExitStack() as stack:
        home = stack.enter_context(_directory())
        postgres = stack.enter_context(_postgres())
        found = Stage(home, postgres, postgres.url(), _spool_database(postgres.url()))
        upstream = ""
        if wanted:
            port, pid = stack.enter_context(nginx.static_upstream(home))
            upstream = _local(port)
            found.contenders[DIRECT] = Contender(DIRECT, upstream, pid, {})
            stack.enter_context(_simple(found, wanted, port))
        stack.enter_context(_services(found, wanted, upstream))
        if set(groups) & set(_STREAMING):
            source = stack.enter_context(_source(home))
            service = stack.enter_context(
                _service(home / "streamed", found.database_url, source.url)
            )
            found.streamed = (source, _metered(METERED, service, _customer(service)))
        # In the order of the tables.
        found.contenders = {n: found.contenders[n] for n in LABELS if n in found.contenders}
        yield found


@contextmanager
def _simple(stage: Stage, wanted: Collection[str], upstream: int) -> Generator[None]:
    """Start those who know no accounts."""
    home = stage.home
    with ExitStack() as stack:
        if NGINX in wanted:
            port, pid = stack.enter_context(nginx.reverse_proxy(home, upstream))
            stage.contenders[NGINX] = Contender(NGINX, _local(port), pid, {})
        for name, module in (
            (STARLETTE, "framework"),
            (BARE, "bare"),
            (UNLEDGERED, "unledgered"),
        ):
            if name in wanted:
                stage.contenders[name] = stack.enter_context(_ours(name, module, home, upstream))
        if LITELLM in wanted:
            stage.contenders[LITELLM] = stack.enter_context(_litellm(home))
        if PORTKEY in wanted:
            try:
                port, pid = stack.enter_context(portkey.gateway(home))
            except portkey.NotInstalledError as error:
                stage.left_out[PORTKEY] = str(error)
                print(f"without {LABELS[PORTKEY]}: {error}", flush=True)
            else:
                headers = portkey.headers(_local(upstream))
                stage.contenders[PORTKEY] = Contender(PORTKEY, _local(port), pid, headers)
        yield


@contextmanager
def _services(stage: Stage, wanted: Collection[str], upstream: str) -> Generator[None]:
    """Start Tallygate as often as it takes part, so that each one's processor time is its own."""
    home, url = stage.home, stage.database_url
    with ExitStack() as stack:

        def start(name: str, database_url: str, workers: int = 1) -> Service:
            return stack.enter_context(_service(home / name, database_url, upstream, workers))

        if METERED in wanted:
            service = start(METERED, url)
            stage.contenders[METERED] = _metered(METERED, service, _customer(service))
        if BYOK in wanted:
            service = start(BYOK, url)
            own_key = {**_customer(service), "X-Provider-Key": PROVIDER_KEY}
            stage.contenders[BYOK] = _metered(BYOK, service, own_key)
        if WORKERS in wanted:
            service = start(WORKERS, url, workers=2)
            stage.contenders[WORKERS] = _metered(WORKERS, service, _customer(service))
        if ACCOUNTS in wanted:
            service = start(ACCOUNTS, url)
            keys = [one.key for one in _many_customers(service, MANY_ACCOUNTS)]
            path = home / "keys"
            path.write_text("".join(f"{key}\n" for key in keys))
            stage.contenders[ACCOUNTS] = _metered(ACCOUNTS, service, _bearer(keys[0]), path)
        if SPOOL in wanted:
            service = start(SPOOL, stage.spool_database_url)
            stage.contenders[SPOOL] = _metered(SPOOL, service, _customer(service))
        yield


def _metered(
    name: str, service: Service, headers: Mapping[str, str], keys: Path | None = None
) -> Contender:
    return Contender(name, service.base_url, service.pid, headers, uses_ledger=True, keys=keys)


@contextmanager
def _directory() -> Generator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tallygate-bench-"))
    try:
        yield path
    finally:
        rmtree(path)


@contextmanager
def _postgres() -> Generator[EmbeddedPostgres]:
    """Run PostgreSQL as `tallygate up` does: every commit is on disk."""
    with _directory() as home:
        # Where we are root, PostgreSQL runs as somebody else, who must get there.
        home.chmod(0o711)
        server = EmbeddedPostgres(home)
        try:
            server.start()
            migrate(server.url())
            yield server
        finally:
            server.stop()


def another_database(url: str, name: str) -> str:
    """Make a database beside the one at `url`, with the schema; returns its address."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    own = psycopg.conninfo.make_conninfo(url, dbname=name)
    migrate(own)
    return own


def _spool_database(url: str) -> str:
    own = another_database(url, "spooling")
    allow_settling(own, is_allowed=False)
    return own


def allow_settling(url: str, *, is_allowed: bool) -> None:
    """Let the service settle in this database, or have PostgreSQL refuse it as if it were away."""
    verb, to = ("GRANT", "TO") if is_allowed else ("REVOKE", "FROM")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"{verb} EXECUTE ON FUNCTION tallygate.settle_batch {to} tallygate_app".encode()
        )


@contextmanager
def _ours(name: str, module: str, home: Path, upstream: int) -> Generator[Contender]:
    """Run a part of our stack, `tests.bench.<module>`."""
    port = free_port()
    command = [sys.executable, "-m", f"tests.bench.{module}", str(port), _local(upstream)]
    ready = f"{_local(port)}/health/liveliness"
    with running(command, log=home / f"{name}.log", ready_url=ready) as pid:
        # Any key is good, as long as it looks like one.
        yield Contender(name, _local(port), pid, _bearer("sk-" + "x" * 43))


@contextmanager
def _source(home: Path) -> Generator[Contender]:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.source", str(port)]
    ready = f"{_local(port)}/model/info"
    with running(command, log=home / "source.log", ready_url=ready) as pid:
        yield Contender(DIRECT, _local(port), pid, {})


@contextmanager
def _litellm(home: Path) -> Generator[Contender]:
    model = {"model": f"openai/{canned.MODEL}", "api_key": "none", "mock_response": canned.TEXT}
    row = {
        "model_name": canned.MODEL,
        "litellm_params": model,
        "model_info": canned.MODEL_INFO,
    }
    child = LiteLLMChild(
        {"model_list": [row]}, data_dir=home, master_key=MASTER_KEY, environ=os.environ
    )
    try:
        child.start()
        assert child.pid is not None
        yield Contender(LITELLM, child.url, child.pid, _bearer(MASTER_KEY))
    finally:
        child.stop()


@contextmanager
def _service(
    home: Path, database_url: str, litellm_url: str, workers: int = 1
) -> Generator[Service]:
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


def _customer(service: Service) -> dict[str, str]:
    return _bearer(service.new_key(credits=CREDITS).key)


def _many_customers(service: Service, count: int) -> list[Customer]:
    """Make accounts with a key each, over one connection."""
    made: list[Customer] = []
    with httpx.Client(
        base_url=f"{service.base_url}/admin/v1/accounts",
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
        verify=NO_TLS,
        timeout=30,
    ) as client:
        for number in range(count):
            account = client.post("", json={"name": f"customer {number}"}).json()["id"]
            grant = {"credits": "1000000", "reason": "bench", "reference": f"start-{account}"}
            client.post(f"/{account}/grants", json=grant).raise_for_status()
            key = client.post(f"/{account}/keys", json={"name": "key"}).json()
            made.append(Customer(account, key["id"], key["key"]))
    return made


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _local(port: int) -> str:
    return f"http://127.0.0.1:{port}"
