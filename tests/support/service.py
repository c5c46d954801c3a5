"""A real `tallygate serve` in a process of its own."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from tests.support.litellm import RunningLiteLLM

ADMIN_KEY = "admin-key-of-the-tests"
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
ROOT = Path(__file__).parents[2]
# No test speaks TLS, and each client that reads the authorities' certificates takes 30 ms.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TALLYGATE = Path(sys.executable).with_name("tallygate")


@dataclass
class Service:
    """A running service; `restart` and `start` keep port, data directory and environment."""

    port: int
    data_dir: Path
    environ: Mapping[str, str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def base_url(self) -> str:
        """The root of every path, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The process that was started: the parent, where there are several workers."""
        assert self.process is not None
        return self.process.pid

    def client(self, key: str, **headers: str) -> httpx.Client:
        """Return a client that sends a key as its bearer; close it."""
        return httpx.Client(
            base_url=self.base_url,
            headers={"authorization": f"Bearer {key}", **headers},
            timeout=60,
            verify=NO_TLS,
        )

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Do what must succeed with the admin key; returns the parsed answer, None for 204."""
        with self.client(ADMIN_KEY) as client:
            answer = client.request(method, path, json=body)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def new_key(self, *, credits: str = "1000", **key: object) -> "Customer":  # noqa: A002
        """Make an account with credits and a virtual key."""
        account = self.admin("POST", "/admin/v1/accounts", {"name": "customer"})["id"]
        if credits != "0":
            grant = {"credits": credits, "reason": "test", "reference": f"start-{account}"}
            self.admin("POST", f"/admin/v1/accounts/{account}/grants", grant)
        made = self.admin("POST", f"/admin/v1/accounts/{account}/keys", {"name": "key", **key})
        return Customer(account, made["id"], made["key"])

    def start(self, *, wait: bool = True) -> None:
        """Start the process and, unless told otherwise, wait until it is ready."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [TALLYGATE, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                cwd=ROOT,
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until /readyz says yes; fails with the log if the process ends."""
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(self.base_url + "/readyz", timeout=5, verify=NO_TLS).is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        pytest.fail(f"the service is not ready:\n{self.log()[-4000:]}")

    def log(self) -> str:
        """Return everything it has said."""
        return self.log_path.read_text()

    def kill(self) -> None:
        """Kill -9, workers included: nothing gets to say goodbye."""
        assert self.process is not None
        # The workers' parent is stopped first, so that it starts none again.
        os.kill(self.pid, signal.SIGSTOP)
        for child in _children(self.pid):
            os.kill(child, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it with SIGTERM, as an operator does; returns its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
                pytest.fail(f"the service did not stop:\n{self.log()[-4000:]}")
        return self.process.returncode

    def close(self) -> None:
        """Stop it if it was ever started."""
        if self.process is not None:
            self.stop()

    def restart(self) -> None:
        """Stop, and start on the same data."""
        self.stop()
        self.start()


@dataclass(frozen=True)
class Customer:
    """An account and its virtual key."""

    account_id: str
    key_id: str
    key: str


class ServiceFactory(Protocol):
    """`service(...)`: see the fixture."""

    def __call__(
        self,
        *,
        database_url: str | None = None,
        litellm_url: str | None = None,
        litellm_key: str | None = None,
        workers: int = 1,
        environ: Mapping[str, str] | None = None,
        config: str | None = None,
        start: bool = True,
    ) -> Service:
        """Start a service."""
        ...


@pytest.fixture
def service(
    request: pytest.FixtureRequest, tmp_path: Path, database_url: str
) -> Iterator[ServiceFactory]:
    """Start services on the test's database and the worker's LiteLLM, unless told otherwise.

    `environ` adds TALLYGATE_… variables or overrides them; `config` is the text of a config.yaml,
    in place of the repository's. LiteLLM is only started where it is needed. A fixture that the
    service lives on, such as `own_cluster`, stands before this one in a test's arguments, so that
    it ends later.
    """
    own_url = database_url
    made = 0
    stack = ExitStack()

    def make(
        *,
        database_url: str | None = None,
        litellm_url: str | None = None,
        litellm_key: str | None = None,
        workers: int = 1,
        environ: Mapping[str, str] | None = None,
        config: str | None = None,
        start: bool = True,
    ) -> Service:
        nonlocal made
        made += 1
        home = tmp_path / f"service-{made}"
        home.mkdir()
        if litellm_url is None:
            litellm: RunningLiteLLM = request.getfixturevalue("litellm")
            litellm_url, litellm_key = litellm.url, litellm.key
        running = prepare_service(
            home,
            database_url=own_url if database_url is None else database_url,
            litellm_url=litellm_url,
            litellm_key=litellm_key or "sk-unused",
            workers=workers,
            environ=environ,
            config=config,
        )
        stack.callback(running.close)
        if start:
            running.start()
        return running

    with stack:
        yield make


def prepare_service(
    home: Path,
    *,
    database_url: str,
    litellm_url: str,
    litellm_key: str,
    workers: int = 1,
    environ: Mapping[str, str] | None = None,
    config: str | None = None,
) -> Service:
    """Set a service up in an existing directory; start it, and stop it, yourself."""
    port = free_port()
    variables = {
        "TALLYGATE_DATABASE_URL": database_url,
        "TALLYGATE_LITELLM_URL": litellm_url,
        "TALLYGATE_LITELLM_KEY": litellm_key,
        "TALLYGATE_ADMIN_KEY": ADMIN_KEY,
        "TALLYGATE_FREE_MODELS": '["free", "*-free"]',
        # No test comes to an end of these by accident.
        "TALLYGATE_API_LIMITS__ACCOUNT_PER_MINUTE": "100000",
        "TALLYGATE_API_LIMITS__ADMIN_PER_MINUTE": "100000",
        "TALLYGATE_API_LIMITS__FAILURES_PER_MINUTE": "100000",
        "TALLYGATE_HOST": "127.0.0.1",
        "TALLYGATE_PORT": str(port),
        "TALLYGATE_WORKERS": str(workers),
        "TALLYGATE_DATA_DIR": str(home / "data"),
        **(environ or {}),
    }
    if config is not None:
        (home / "config.yaml").write_text(config)
        variables["TALLYGATE_CONFIG"] = str(home / "config.yaml")
    return Service(
        port=port,
        data_dir=home / "data",
        environ={**_own_environ(), **variables},
        log_path=home / "service.log",
    )


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _own_environ() -> dict[str, str]:
    """Return our environment without what would set the service up."""
    return {n: text for n, text in os.environ.items() if not n.startswith("TALLYGATE_")}


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
