"""`tallygate up`: PostgreSQL, LiteLLM and the service in one command, each a supervised child.

Killed with -9, it takes the service and LiteLLM along and leaves PostgreSQL running; the next start
on the same directory finds that, and the service replays its spool.
"""

import asyncio
import contextlib
import fcntl
import http.client
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from pricing.money import nanos_from_credits
from proxy.accounts import Accounts
from proxy.db import make_pool, migrate
from proxy.embedded.keeper import ChildFailedError, Keeper, rotate, tail
from proxy.embedded.litellm import LiteLLMChild
from proxy.embedded.litellm_config import WitnessAddress
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.errors import ConfigurationError
from proxy.ids import uuid7
from proxy.keys import Keys, KeySettings, NewKey
from proxy.ledger import Ledger
from proxy.lifeline import SUPERVISOR_VARIABLE
from proxy.log import JsonFormatter
from proxy.serving import POSTGRES_TIMEOUT_S, wait_for_port

# The service that a killed predecessor left dies with it, within this time.
PORT_TIMEOUT_S = 3.0
START_TIMEOUT_S = POSTGRES_TIMEOUT_S + 30
READY_TIMEOUT_S = 60
# On top of the time that the service gives its streams.
STOP_MARGIN_S = 15
DEMO_MODEL = "demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpOptions:
    """What `up` needs of the settings; None for what it shall make or start itself."""

    data_dir: Path
    host: str
    port: int
    workers: int
    database_url: str | None
    litellm_url: str | None
    litellm_key: str | None
    litellm: Mapping[str, Any]
    admin_key: str | None
    witness_token: str | None
    starter_credits: str
    nanos_per_credit: int
    tier: str
    shutdown_timeout_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """A service that is ready."""

    base_url: str
    key: str
    account_id: UUID
    model: str
    data_dir: Path
    # None where the operator set the key, and so knows it.
    admin_key_file: Path | None
    pid: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a running `up` leaves in its directory for the other commands; no secrets."""

    pid: int
    base_url: str
    litellm_url: str

    @staticmethod
    def path(data_dir: Path) -> Path:
        """Return where it stands."""
        return data_dir / "up.json"

    @classmethod
    def read(cls, data_dir: Path) -> "Trace | None":
        """Read the one of a directory; None where there is none."""
        try:
            return msgspec.json.decode(cls.path(data_dir).read_bytes(), type=cls)
        except (OSError, msgspec.DecodeError):
            return None


def up(options: UpOptions, announce: Callable[[Announcement], None]) -> None:
    """Start everything, `announce` it once it is ready, and keep it up until SIGTERM or SIGINT.

    Raises ConfigurationError where something can't be started; then nothing is left running.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options.data_dir.mkdir(parents=True, exist_ok=True)
    _log_to(options.data_dir / "logs" / "up.log")
    children = contextlib.ExitStack()
    try:
        announce(_bring_up(options, children))
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        # Whoever presses Ctrl-C again must not leave a database without its supervisor.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _ignore)
        children.close()


def kept_secret(path: Path) -> str:
    """Read a secret that was made before, or make it, for our eyes only."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text().strip()
    secret = "sk-" + secrets.token_urlsafe(32)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123 - of a descriptor
        file.write(secret + "\n")
    return secret


def admin_key_path(data_dir: Path) -> Path:
    """Return where the admin key is kept if the operator set none."""
    return data_dir / "admin.key"


def witness_token_path(data_dir: Path) -> Path:
    """Return where the token of the witness inside LiteLLM is kept if the operator set none."""
    return data_dir / "witness.token"


def litellm_key_path(data_dir: Path) -> Path:
    """Return where the master key of the LiteLLM child is kept."""
    return data_dir / "litellm.key"


def _ignore(_signal: int, _frame: object) -> None:
    pass


def _log_to(path: Path) -> None:
    """Keep our own log in a file, and say on the screen only what is wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path)
    file.setFormatter(JsonFormatter())
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.WARNING)
    screen.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[file, screen], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _bring_up(options: UpOptions, children: contextlib.ExitStack) -> Announcement:
    children.enter_context(_lock(options.data_dir))
    wait_for_port(options.host, options.port, timeout_s=PORT_TIMEOUT_S)
    litellm_key = _litellm_key(options)
    witness = WitnessAddress(
        _base_url(options),
        options.witness_token or kept_secret(witness_token_path(options.data_dir)),
    )
    with ThreadPoolExecutor(max_workers=1) as executor:
        # LiteLLM takes as long as all the rest together.
        litellm = executor.submit(_litellm(options, litellm_key, witness, children))
        try:
            database_url = options.database_url or _start_postgres(options.data_dir, children)
            migrate(database_url)
            litellm_url = litellm.result()
        except BaseException:
            children.close()  # else the executor would wait until LiteLLM is up
            raise
    admin_key = options.admin_key or kept_secret(admin_key_path(options.data_dir))
    service = _Service(
        options,
        {
            "TALLYGATE_DATABASE_URL": database_url,
            "TALLYGATE_LITELLM_URL": litellm_url,
            "TALLYGATE_LITELLM_KEY": litellm_key,
            "TALLYGATE_ADMIN_KEY": admin_key,
            "TALLYGATE_WITNESS_TOKEN": witness.token,
        },
    )
    # Pushed after the others, so that it is stopped before them.
    children.callback(service.stop)
    service.start()
    trace = Trace.path(options.data_dir)
    children.callback(trace.unlink, missing_ok=True)
    trace.write_bytes(msgspec.json.encode(Trace(os.getpid(), service.base_url, litellm_url)))
    account_id, key = asyncio.run(_starter_key(options, database_url))
    return Announcement(
        base_url=service.base_url,
        key=key.secret,
        account_id=account_id,
        model=service.pick_model(key.secret),
        data_dir=options.data_dir,
        admin_key_file=None if options.admin_key else admin_key_path(options.data_dir),
        pid=os.getpid(),
    )


def _start_postgres(data_dir: Path, children: contextlib.ExitStack) -> str:
    postgres = EmbeddedPostgres(data_dir)
    children.callback(postgres.stop)
    return postgres.start()


def _litellm_key(options: UpOptions) -> str:
    if options.litellm_key is None and options.litellm_url is None:
        return kept_secret(litellm_key_path(options.data_dir))
    return options.litellm_key or ""


def _litellm(
    options: UpOptions, key: str, witness: WitnessAddress, children: contextlib.ExitStack
) -> Callable[[], str]:
    """Return what starts LiteLLM and tells its URL; stopping it is seen to from now on."""
    url = options.litellm_url
    if url is not None:
        return lambda: url
    litellm = LiteLLMChild(
        options.litellm, data_dir=options.data_dir, master_key=key, witness=witness
    )
    children.callback(litellm.stop)
    return litellm.start


def _reachable(host: str) -> str:
    """Return where a service is reached: if it listens everywhere, on loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(  # noqa: S104 - compared
        host, host
    )


def _base_url(options: UpOptions) -> str:
    host = _reachable(options.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}"


@contextlib.contextmanager
def _lock(data_dir: Path) -> Generator[None]:
    """Hold the directory; the kernel lets go of it however we end."""
    with (data_dir / "up.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = f"another `tallygate up` works in {data_dir}: set TALLYGATE_DATA_DIR"
            raise ConfigurationError(msg) from None
        yield


async def _starter_key(options: UpOptions, url: str) -> tuple[UUID, NewKey]:
    """Make a key of the starter account; the account and its grant are made once a directory."""
    file = options.data_dir / "starter-account"
    async with make_pool(url, max_size=1) as pool:
        accounts, ledger = Accounts(pool), Ledger(url, pool)
        try:
            account_id = UUID(file.read_text().strip()) if file.exists() else None
            while True:
                if account_id is None:
                    account_id = await accounts.create_account(
                        name="starter", tier=options.tier, credit_limit_nanos=0, actor="up"
                    )
                    file.write_text(f"{account_id}\n")
                key = await Keys(pool).create(
                    account_id, name="starter", settings=KeySettings(role="manage"), actor="up"
                )
                if key is not None:
                    break
                account_id = None  # it was closed, or this is another database
            nanos = nanos_from_credits(options.starter_credits, options.nanos_per_credit)
            if nanos:
                await ledger.fund(
                    account_id,
                    uuid7(),
                    kind="grant",
                    amount_nanos=nanos,
                    source="admin",
                    external_id="starter",
                    reason="starter credits",
                    actor="up",
                )
        finally:
            await ledger.close()
    return account_id, key


class _Service:
    """`tallygate serve` as a child, with its log at `data_dir/logs/tallygate.log`."""

    def __init__(self, options: UpOptions, environ: Mapping[str, str]) -> None:
        self._address = _reachable(options.host), options.port
        self.base_url = _base_url(options)
        self.log_path = options.data_dir / "logs" / "tallygate.log"
        self._stop_timeout_s = options.shutdown_timeout_s + STOP_MARGIN_S
        self._environ = {
            **os.environ,  # noqa: TID251 - the settings of the child, handed on
            **environ,
            "TALLYGATE_HOST": options.host,
            "TALLYGATE_PORT": str(options.port),
            "TALLYGATE_WORKERS": str(options.workers),
            "TALLYGATE_DATA_DIR": str(options.data_dir),
            SUPERVISOR_VARIABLE: str(os.getpid()),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper = Keeper(
            "tallygate",
            bring_up=self._bring_up,
            is_alive=self._is_running,
            take_down=self._take_down,
        )

    def start(self) -> None:
        """Start it and wait until it is ready; ConfigurationError with the reason if it is not."""
        self._keeper.start()
        deadline = time.monotonic() + READY_TIMEOUT_S
        status, body = 0, b""
        while time.monotonic() < deadline:
            status, body = self._get("/readyz")
            if status == http.client.OK:
                return
            threading.Event().wait(0.1)
        msg = f"the service is not ready; /readyz says {status} {body.decode(errors='replace')}"
        raise ConfigurationError(msg)

    def stop(self) -> None:
        """Let its streams end and settle, then end it."""
        self._keeper.stop()

    def pick_model(self, key: str) -> str:
        """Return the demo model if it is served, else the first one that is."""
        status, body = self._get("/v1/models", {"authorization": f"Bearer {key}"})
        if status != http.client.OK:
            return DEMO_MODEL
        names = [str(model["id"]) for model in msgspec.json.decode(body)["data"]]
        return names[0] if names and DEMO_MODEL not in names else DEMO_MODEL

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _bring_up(self, stopping: threading.Event) -> None:
        self._take_down()
        rotate(self.log_path)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "proxy.cli", "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                # A Ctrl-C is for us: we end the children in their order.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not stopping.wait(0.1):
            if not self._is_running():
                msg = f"the service ended at its start; {self._log_tail()}"
                raise ChildFailedError(msg)
            if self._get("/livez")[0] == http.client.OK:
                return
            if time.monotonic() > deadline:
                msg = f"the service is not up after {START_TIMEOUT_S} s; {self._log_tail()}"
                raise ChildFailedError(msg)

    def _take_down(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Ask the service; status 0 where it does not answer."""
        connection = http.client.HTTPConnection(*self._address, timeout=5)
        try:
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""
        finally:
            connection.close()

    def _log_tail(self) -> str:
        return f"the end of {self.log_path}:\n{tail(self.log_path)}"
