"""What stands on the stage: PostgreSQL, two replicas on wires of their own, LiteLLM, customers.

Everything is a process of its own that the run starts, and ends by its number; `close` ends all.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import msgspec
import psycopg
from psycopg.rows import dict_row

from proxy.embedded.litellm import LiteLLMChild
from proxy.lifeline import SUPERVISOR_VARIABLE
from tests.chaos.accounts import Account
from tests.chaos.customers import NANOS_PER_CREDIT, Order
from tests.chaos.pgwire import PostgresWire
from tests.chaos.script import MODEL, MODEL_INFO
from tests.support.postgres import Cluster
from tests.support.service import NO_TLS, ROOT, TALLYGATE, Service, free_port, prepare_service

TTL_S = 5
# Holds expire soon and without grace, so that the sweeper races whatever comes late.
SETTINGS = {
    "TALLYGATE_HOLDS__TTL_S": str(TTL_S),
    "TALLYGATE_HOLDS__HEARTBEAT_S": "1",
    "TALLYGATE_HOLDS__SWEEP_INTERVAL_S": "0.5",
    "TALLYGATE_HOLDS__SWEEP_GRACE_S": "0",
    "TALLYGATE_SHUTDOWN_TIMEOUT_S": "3",
    "TALLYGATE_UPSTREAM__DRAIN_TIMEOUT_S": "10",
    "TALLYGATE_LOG_LEVEL": "WARNING",
}
LITELLM_KEY = "sk-litellm"
CONFIG = 'credit_usd: "0.001"\nprice_book:\n  default: {kind: markup, factor: "2.0"}\n'
_WAIT_S = 120
_END_S = 30


class ChaosError(Exception):
    """The run can't go on; the text says why."""


def wait_for(condition: Callable[[], bool], what: str, *, timeout_s: float = _WAIT_S) -> None:
    """Wait for something that happens in another process; ChaosError if it does not."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ChaosError(f"waited in vain for {what}")
        time.sleep(0.02)


def clean_environ() -> dict[str, str]:
    """Our environment without what would set a service up, or measure its coverage."""
    return {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(("TALLYGATE_", "COVERAGE_"))
    }


class Process:
    """A child that is ended by its number, and does not outlive us in any case."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**clean_environ(), SUPERVISOR_VARIABLE: str(os.getpid())},
            )

    def is_running(self) -> bool:
        """Whether it lives."""
        return self._process.poll() is None

    def end(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for its end, a while; returns its exit code."""
        if self.is_running():
            self._process.send_signal(sent)
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


@contextmanager
def crowd(home: Path, order: Order) -> Generator[Path]:
    """Have customers call while the context lasts; yields their journal."""
    journal, log = home / f"customers-{order.name}.jsonl", home / "customers.log"
    command = [sys.executable, "-m", "tests.chaos.customers"]
    process = Process([*command, msgspec.json.encode(order).decode(), journal], log)
    try:
        yield journal
        if not process.is_running():
            raise ChaosError(f"the customers died: see {log}")
    finally:
        code = process.end()
    if code != 0:
        raise ChaosError(f"the customers failed: see {log}")


class StandIn:
    """The process that stands in for LiteLLM."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.journal = home / "provider.jsonl"
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = home / "provider.log"
        self._process: Process | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        module = [sys.executable, "-m", "tests.chaos.standin", str(self.port), self.journal]
        self._process = Process(module, self._log)

        def answers() -> bool:
            try:
                return httpx.get(
                    f"{self.url}/health/liveliness", timeout=2, verify=NO_TLS
                ).is_success
            except httpx.TransportError:
                return False

        wait_for(answers, "the provider to start")

    def kill(self) -> None:
        """Kill -9."""
        assert self._process is not None
        self._process.end(signal.SIGKILL)

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.end()


class RealLiteLLM:
    """The real LiteLLM, to which the stand-in is the provider."""

    def __init__(self, home: Path, provider: StandIn) -> None:
        data_dir = home / "litellm"
        data_dir.mkdir()
        params = {
            "model": f"openai/{MODEL}",
            "api_base": f"{provider.url}/v1",
            "api_key": "key-of-the-house",
        }
        section = {
            "model_list": [
                {"model_name": MODEL, "litellm_params": params, "model_info": MODEL_INFO}
            ],
            "router_settings": {"num_retries": 0},
        }
        self._child = LiteLLMChild(
            section, data_dir=data_dir, master_key=LITELLM_KEY, environ=clean_environ()
        )

    @property
    def url(self) -> str:
        """Where it listens, from the first start to the last."""
        return self._child.url

    def start(self) -> None:
        """Start it, and have it started anew whenever it dies."""
        self._child.start()

    def kill(self) -> None:
        """Kill -9, and wait until its keeper has noticed."""
        pid = self._child.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: self._child.pid not in {None, pid}, "LiteLLM's successor")

    def close(self) -> None:
        """End it."""
        self._child.stop()


class Replica:
    """One `tallygate serve` with two workers, and the wire between it and PostgreSQL."""

    def __init__(
        self, home: Path, name: str, *, database: str, litellm_url: str, code: Path | None
    ) -> None:
        socket_dir, database_name = _socket_of(database)
        self.name = name
        self.wire = PostgresWire(f"{socket_dir}/.s.PGSQL.5432").start()
        self.clock = home / "clock"
        self.clock.write_text("0")
        url = (
            f"postgresql://postgres@127.0.0.1:{self.wire.port}/{quote(database_name)}"
            "?sslmode=disable&gssencmode=disable"
        )
        path = [str(Path(__file__).parent / "clock"), *([str(code)] if code else [])]
        self.service: Service = prepare_service(
            home,
            database_url=url,
            litellm_url=litellm_url,
            litellm_key=LITELLM_KEY,
            workers=2,
            config=CONFIG,
        )
        self.service.environ = {
            **{n: t for n, t in self.service.environ.items() if not n.startswith("COVERAGE_")},
            **SETTINGS,
            "CHAOS_CLOCK": str(self.clock),
            SUPERVISOR_VARIABLE: str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(path),
        }

    @property
    def spool(self) -> Path:
        """Where its settlements wait for PostgreSQL."""
        return self.service.data_dir / "spool"

    def workers(self) -> list[int]:
        """Numbers of its worker processes."""
        found: list[int] = []
        for child in _children(self.service.pid):
            command = _command(child)
            if b"spawn_main" in command:
                found.append(child)
        return found

    def processes(self) -> list[int]:
        """Numbers of all its processes, parents first."""
        pids = [self.service.pid]
        for pid in pids:
            pids += _children(pid)
        return pids

    def is_ready(self) -> bool:
        """Whether it takes requests that it can meter."""
        try:
            url = f"{self.service.base_url}/readyz"
            return httpx.get(url, timeout=5, verify=NO_TLS).is_success
        except httpx.TransportError:
            return False

    def is_up(self) -> bool:
        """Whether it is ready with both its workers."""
        return len(self.workers()) == 2 and self.is_ready()

    def start(self) -> None:
        """Start it again on the same data."""
        self.service.start(wait=False)

    def start_through(self, command: Sequence[str]) -> None:
        """Start it by a command that ends in executing its first argument, `tallygate`."""
        with self.service.log_path.open("ab") as log:
            self.service.process = subprocess.Popen(
                [*command, TALLYGATE],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.service.environ,
                cwd=ROOT,
            )

    def step_clock(self, offset_s: float) -> None:
        """Set its wall clock that far off."""
        new = self.clock.with_suffix(".new")
        new.write_text(str(offset_s))
        new.replace(self.clock)

    def close(self) -> None:
        """End it and its wire."""
        if self.service.process is not None and self.service.process.poll() is None:
            for pid in self.processes():  # one that is stopped does not hear SIGTERM
                os.kill(pid, signal.SIGCONT)
            self.service.stop()
        self.wire.stop()


class Stage:
    """All of them, on a database of their own."""

    def __init__(
        self, home: Path, *, seed: int, code: Path | None = None, has_litellm: bool = False
    ) -> None:
        self.home = home
        self.seed = seed
        self._has_litellm = has_litellm
        self._stack = ExitStack()
        try:
            self._build(code)
        except BaseException:
            self.close()
            raise

    def _build(self, code: Path | None) -> None:
        # Not below a directory that is root's alone: PostgreSQL runs as somebody else.
        self.cluster = Cluster(self.home / "cluster")
        self._stack.callback(self._stop_cluster)
        self.database = self._make_database(code)
        self.provider = StandIn(self.home)
        self._stack.callback(self.provider.close)
        self.provider.start()
        self.litellm: StandIn | RealLiteLLM = self.provider
        if self._has_litellm:
            self.litellm = RealLiteLLM(self.home, self.provider)
            self._stack.callback(self.litellm.close)
            self.litellm.start()
        self.replicas = [self._replica(name, code) for name in ("a", "b")]
        for replica in self.replicas:
            replica.start()
        self.accounts = [
            *(Account(self.database, f"rich-{number}") for number in range(3)),
            # These two run out of money again and again.
            Account(self.database, "poor"),
            Account(self.database, "trusted", credit_limit=5 * NANOS_PER_CREDIT),
        ]
        self.poor = self.accounts[3:]
        for rich in self.accounts[:3]:
            rich.fund(10**6 * NANOS_PER_CREDIT)
        self.wait_up()

    def _make_database(self, code: Path | None) -> str:
        if code is None:
            return self.cluster.clone()
        url = self.cluster.clone(empty=True)
        with psycopg.connect(url) as connection:
            connection.execute((code / "schema.sql").read_bytes())
        return url

    def _stop_cluster(self) -> None:
        self.cluster.stop()  # whichever server it has by then

    def _replica(self, name: str, code: Path | None) -> Replica:
        home = self.home / name
        home.mkdir()
        replica = Replica(
            home, name, database=self.database, litellm_url=self.litellm.url, code=code
        )
        self._stack.callback(replica.close)
        return replica

    def wait_up(self) -> None:
        """Wait until both replicas are whole and ready."""
        for replica in self.replicas:
            wait_for(replica.is_up, f"replica {replica.name} to be ready")

    @contextmanager
    def customers(
        self, name: str, *, customers: int, pause_ms: float, urls: Sequence[str] = ()
    ) -> Generator[Path]:
        """Have customers call while the context lasts; yields their journal."""
        order = Order(
            urls=list(urls) or [replica.service.base_url for replica in self.replicas],
            # Most of the time by those who can pay.
            keys=[account.key for account in (*self.accounts[:3] * 2, *self.poor)],
            seed=self.seed,
            customers=customers,
            pause_ms=pause_ms,
            name=name,
            failures=["error"] if self._has_litellm else ["error", "cut"],
        )
        with crowd(self.home, order) as journal:
            yield journal

    def connect(self) -> psycopg.Connection[Any]:
        """A superuser's connection past the wires, in autocommit mode."""
        connection = psycopg.connect(self.database, autocommit=True)
        connection.execute("SET search_path = tallygate")
        return connection

    def rows(self, query: str, *parameters: object) -> list[dict[str, Any]]:
        """Read the database."""
        with self.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), parameters).fetchall()

    def wait_settled(self) -> None:
        """Wait until no hold is open and nothing is left in a spool."""

        def is_settled() -> bool:
            if any(path.stat().st_size for path in self.spooled()):
                return False
            return not self.rows("SELECT 1 FROM open_holds LIMIT 1")

        wait_for(is_settled, "holds to end and spools to be replayed")

    def spooled(self) -> list[Path]:
        """Spool files that wait."""
        return [path for replica in self.replicas for path in replica.spool.glob("*.spool")]

    def close(self) -> None:
        """End everything that was started, in the other order."""
        self._stack.close()


def _socket_of(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parse_qs(parts.query)["host"][0], parts.path.lstrip("/")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, task.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
