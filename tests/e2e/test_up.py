"""`tallygate up`: everything in one command, through kill -9 and back."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import msgspec
import psycopg
import pytest
from psycopg.rows import dict_row

from proxy.embedded.postgres import EmbeddedPostgres
from proxy.ledger import Settlement
from proxy.spool import Spool
from proxy.up import Trace
from tests.integration.money import Money
from tests.support.litellm import RunningLiteLLM
from tests.support.postgres import copy_cluster
from tests.support.service import NO_TLS, free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120
pytestmark = pytest.mark.timeout(300)


class Up:
    """A `tallygate up` on a data directory; `start` may be called again after its end."""

    def __init__(self, data_dir: Path, **environ: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        own = {name: v for name, v in os.environ.items() if not name.startswith("TALLYGATE_")}
        self._environ: Mapping[str, str] = {
            **own,
            "TALLYGATE_DATA_DIR": str(data_dir),
            "TALLYGATE_PORT": str(self.port),
            **environ,
        }
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Start it and wait until it is ready; returns what it announced."""
        self.process = self.launch("up", "--json")
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            pytest.fail(f"up failed: {self.process.communicate()[1]}")
        return json.loads(line)

    def launch(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "proxy.cli", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environ,
            cwd=ROOT,
        )

    def run(self, *argv: str) -> tuple[int, str, str]:
        """Run another command beside it."""
        process = self.launch(*argv)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGTERM)
        left = EmbeddedPostgres(self.data_dir)
        if left.is_running():
            left.start()
            left.stop()


NewUp = Callable[..., Up]


@pytest.fixture
def up(tmp_path: Path, cluster_pattern: Path) -> Iterator[NewUp]:
    """Set services up; unless they shall begin with nothing, initdb has been done for them."""
    made: list[Up] = []

    def make(name: str = "data", *, with_nothing: bool = False, **environ: str) -> Up:
        made.append(Up(tmp_path / name, **environ))
        if not with_nothing:
            made[-1].data_dir.mkdir()
            copy_cluster(cluster_pattern, made[-1].data_dir / "postgres")
        return made[-1]

    yield make
    for each in made:
        each.clean_up()


def query(data_dir: Path, statement: str) -> list[dict[str, Any]]:
    with (
        psycopg.connect(EmbeddedPostgres(data_dir).url()) as connection,
        connection.cursor(row_factory=dict_row) as cursor,
    ):
        cursor.execute("SET search_path = tallygate")
        return cursor.execute(statement.encode()).fetchall()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen")
        time.sleep(0.1)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2, verify=NO_TLS).is_success
    except httpx.TransportError:
        return False


def chat(ready: Mapping[str, Any], model: str) -> httpx.Response:
    return httpx.post(
        f"{ready['base_url']}/v1/chat/completions",
        headers={"authorization": f"Bearer {ready['key']}"},
        json={"model": model, "messages": [{"role": "user", "content": "hi"}]},
        timeout=30,
    )


def test_one_command_serves_meters_and_leaves_nothing_behind(up: NewUp) -> None:
    service = up(with_nothing=True)
    ready = service.start()

    pasted = subprocess.run(
        [*shlex.split(ready["curl"]), "--silent", "--fail"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(pasted.stdout)["choices"][0]["message"]["content"]
    (row,) = query(service.data_dir, "SELECT status, price, cost_picos FROM usage")
    assert row["status"] == "billed"
    assert row["price"] == -(-row["cost_picos"] * 2 // 1000)
    assert service.run("audit")[0] == 0
    code, output, _ = service.run("doctor", "--json")
    assert (code, {check["status"] for check in json.loads(output)["checks"]}) == (0, {"ok"})
    for name in ("admin.key", "litellm.key"):
        assert (service.data_dir / name).stat().st_mode & 0o077 == 0
    trace = Trace.read(service.data_dir)
    assert trace is not None

    assert service.end(signal.SIGTERM) == 0

    assert not EmbeddedPostgres(service.data_dir).is_running()
    for url in (trace.base_url, trace.litellm_url):
        with pytest.raises(httpx.TransportError):
            httpx.get(url, timeout=2)
    assert Trace.read(service.data_dir) is None
    code, _, errors = service.run("audit")
    assert code == 2
    assert "start `tallygate up`" in errors


def test_killed_it_is_found_again_with_its_money_and_its_spool(
    up: NewUp, litellm: RunningLiteLLM
) -> None:
    service = up(TALLYGATE_LITELLM_URL=litellm.url, TALLYGATE_LITELLM_KEY=litellm.key)
    first = service.start()
    assert chat(first, "mock").status_code == 200
    postgres_pid = EmbeddedPostgres(service.data_dir).pid()

    assert service.end(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not is_up(first["base_url"]), "the end of the service")
    assert service.run("audit")[0] == 0
    request_id = hold_and_spool(service.data_dir)
    second = service.start()

    assert EmbeddedPostgres(service.data_dir).pid() == postgres_pid
    assert second["account_id"] == first["account_id"]
    assert second["key"] != first["key"]
    for ready in (first, second):
        assert chat(ready, "mock").status_code == 200
    wait_for(
        lambda: (
            query(service.data_dir, f"SELECT 1 FROM usage WHERE request_id = '{request_id}'") != []
        ),
        "the replay of the spool",
    )
    # Granted once, however often it starts.
    assert len(query(service.data_dir, "SELECT 1 FROM funding WHERE external_id = 'starter'")) == 1
    code, output, _ = service.run("audit")
    assert code == 0, output


def hold_and_spool(data_dir: Path) -> UUID:
    """Leave what a proxy leaves that settled while PostgreSQL was away: a hold, and a line."""
    money = Money(EmbeddedPostgres(data_dir).url(), funds=1000)
    request_id = UUID(str(money.hold(100, price_version=1)["request_id"]))
    spool = Spool(data_dir / "spool")
    settlement = Settlement(
        account_id=money.account_id,
        request_id=request_id,
        action="capture",
        status="billed",
        price=60,
        cost_picos=30_000,
        cost_source="header",
        rounding_attos=0,
        rule="default",
        markup_ppm=2_000_000,
        input_tokens=1,
        output_tokens=1,
    )
    spool.append([msgspec.json.encode(settlement)])
    spool.close()
    money.connection.close()
    return request_id


def test_a_service_that_dies_is_started_again(up: NewUp, litellm: RunningLiteLLM) -> None:
    service = up(TALLYGATE_LITELLM_URL=litellm.url, TALLYGATE_LITELLM_KEY=litellm.key)
    ready = service.start()
    (pid,) = serve_pids(ready["pid"])

    os.kill(pid, signal.SIGKILL)

    wait_for(lambda: serve_pids(ready["pid"]) not in ([], [pid]), "another process")
    wait_for(lambda: is_up(ready["base_url"]), "the return of the service")
    assert chat(ready, "mock").status_code == 200


def serve_pids(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    return [pid for pid in children if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_two_services_run_side_by_side(up: NewUp, litellm: RunningLiteLLM) -> None:
    environ = {"TALLYGATE_LITELLM_URL": litellm.url, "TALLYGATE_LITELLM_KEY": litellm.key}
    one, two = up("one", **environ), up("two", TALLYGATE_ADMIN_KEY="k" * 32, **environ)
    first, second = one.start(), two.start()

    assert first["base_url"] != second["base_url"]
    assert (first["admin_key_file"], second["admin_key_file"]) == (
        str(one.data_dir / "admin.key"),
        None,
    )
    assert chat(first, "mock").status_code == chat(second, "mock").status_code == 200
    assert chat({**first, "key": second["key"]}, "mock").status_code == 401


def test_a_directory_in_use_is_refused(up: NewUp, litellm: RunningLiteLLM) -> None:
    environ = {"TALLYGATE_LITELLM_URL": litellm.url, "TALLYGATE_LITELLM_KEY": litellm.key}
    service = up(**environ)
    ready = service.start()

    code, output, errors = service.run("up", "--json", "--port", str(free_port()))

    assert (code, output) == (2, "")
    assert "another `tallygate up` works in" in errors
    assert is_up(ready["base_url"])


def test_a_port_in_use_is_refused(up: NewUp, litellm: RunningLiteLLM) -> None:
    taken = litellm.url.rpartition(":")[2]
    service = up(with_nothing=True, TALLYGATE_LITELLM_URL=litellm.url, TALLYGATE_PORT=taken)
    code, output, errors = service.run("up", "--json")
    assert (code, output) == (2, "")
    assert "TALLYGATE_PORT" in errors
    assert not (service.data_dir / "postgres").exists()


def test_it_speaks_to_people(up: NewUp, litellm: RunningLiteLLM) -> None:
    service = up(TALLYGATE_LITELLM_URL=litellm.url, TALLYGATE_LITELLM_KEY=litellm.key)
    service.process = service.launch("up")
    assert service.process.stdout is not None
    lines = [service.process.stdout.readline() for _ in range(11)]
    text = "".join(lines)
    assert f"http://127.0.0.1:{service.port}/v1" in text
    assert "curl http" in text
    assert "admin.key" in text
    assert f"kill {service.process.pid}" in text
    assert service.end(signal.SIGINT) == 0
