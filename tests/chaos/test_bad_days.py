"""One request at a time through killed processes and lost databases, then the audit."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.rows import dict_row

from tests.support.litellm import RunningLiteLLM
from tests.support.postgres import Cluster
from tests.support.provider import FakeProvider, Gate, Reply
from tests.support.service import ROOT, Service, prepare_service

CHAT = "/v1/chat/completions"
# Holds expire soon and without grace, so that an orphan is seen within the test.
SHORT_HOLDS = {
    "TALLYGATE_HOLDS__TTL_S": "5",
    "TALLYGATE_HOLDS__HEARTBEAT_S": "1",
    "TALLYGATE_HOLDS__SWEEP_INTERVAL_S": "0.5",
    "TALLYGATE_HOLDS__SWEEP_GRACE_S": "0",
}


class World:
    """A service on a PostgreSQL of its own, which a test may kill."""

    def __init__(self, cluster: Cluster, service: Service, url: str) -> None:
        self.cluster = cluster
        self.service = service
        self.url = url

    def rows(self, query: str, *parameters: object) -> list[dict[str, Any]]:
        with (
            psycopg.connect(self.url) as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            cursor.execute("SET search_path = tallygate")
            return cursor.execute(query.encode(), parameters).fetchall()

    def audit(self) -> None:
        """The ledger must be clean by every invariant."""
        done = subprocess.run(
            [sys.executable, "-m", "proxy.cli", "audit", "--json"],
            env=self.service.environ,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        json.loads(done.stdout)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        waiting = threading.Event()
        for _ in range(1500):
            if condition():
                return
            waiting.wait(0.02)
        pytest.fail(f"waited in vain for {what}:\n{self.service.log()[-3000:]}")


@pytest.fixture
def world(own_cluster: Cluster, litellm: RunningLiteLLM, tmp_path: Path) -> Iterator[World]:
    """One worker, and PostgreSQL to be killed at will."""
    url = own_cluster.clone()
    service = prepare_service(
        tmp_path,
        database_url=url,
        litellm_url=litellm.url,
        litellm_key=litellm.key,
        environ=SHORT_HOLDS,
    )
    service.start()
    yield World(own_cluster, service, url)
    service.stop()


def test_kill_9_in_mid_stream_charges_nothing_and_asks_for_review(
    world: World, provider: FakeProvider
) -> None:
    customer = world.service.new_key()
    gate = Gate(after_chunks=1)
    provider.reply("priced", Reply(gate=gate))
    with world.service.client(customer.key) as client:
        body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with client.stream("POST", CHAT, json=body) as answer:
            next(answer.iter_bytes())
            world.service.kill()
    gate.open()
    world.service.start()
    world.wait(lambda: not world.rows("SELECT 1 FROM open_holds"), "the orphan to expire")
    (row,) = world.rows("SELECT * FROM usage WHERE account_id = %s", customer.account_id)
    assert (row["status"], row["review_reason"], row["price"]) == ("needs_review", "orphaned", None)
    world.audit()


def test_stream_that_outlives_its_hold_is_charged_as_any_other(
    world: World, provider: FakeProvider
) -> None:
    customer = world.service.new_key()
    gate = Gate(after_chunks=1)
    provider.reply("priced", Reply(gate=gate))
    body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with (
        world.service.client(customer.key) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        parts = answer.iter_text()
        text = next(parts)
        # Longer than the five seconds that it was given at first.
        world.wait(
            lambda: bool(
                world.rows(
                    "SELECT 1 FROM open_holds WHERE created_at < now() - interval '6 seconds'"
                )
            ),
            "the hold to be kept alive",
        )
        gate.open()
        text += "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    entries = world.rows(
        "SELECT kind FROM entries WHERE account_id = %s ORDER BY seq", customer.account_id
    )
    assert [row["kind"] for row in entries] == ["grant", "hold", "capture"]


def test_postgresql_away_at_admission_is_503_and_comes_back_by_itself(world: World) -> None:
    customer = world.service.new_key()
    body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    with world.service.client(customer.key) as client:
        assert client.post(CHAT, json=body).status_code == 200
        world.cluster.crash()
        refused = client.post(CHAT, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            503,
            "metering_unavailable",
        )
        assert refused.headers["retry-after"]
        ready = client.get("/readyz")
        assert (ready.status_code, "postgresql" in ready.text) == (503, True)
        world.cluster.start()
        world.wait(lambda: client.post(CHAT, json=body).status_code == 200, "admission to return")
    world.wait(lambda: not world.rows("SELECT 1 FROM open_holds"), "holds to end")
    world.audit()


@pytest.mark.parametrize("stream", [False, True])
def test_postgresql_away_at_settlement_spools_the_charge_and_posts_it_later(
    world: World,
    provider: FakeProvider,
    stream: bool,  # noqa: FBT001
) -> None:
    customer = world.service.new_key()
    gate = Gate(after_chunks=1 if stream else 0)
    provider.reply("priced", Reply(gate=gate))
    answers: list[httpx.Response] = []

    def call() -> None:
        body = {
            "model": "priced",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 9,
            "stream": stream,
        }
        with world.service.client(customer.key) as client:
            answers.append(client.post(CHAT, json=body))

    thread = threading.Thread(target=call)
    thread.start()
    gate.wait_reached()
    world.cluster.crash()
    gate.open()
    thread.join()
    assert answers[0].status_code == 200, answers[0].text
    assert list((world.service.data_dir / "spool").glob("*.spool"))
    world.service.kill()  # the charge survives the process as well
    world.cluster.start()
    world.service.start()
    world.wait(
        lambda: bool(world.rows("SELECT 1 FROM usage WHERE status = 'billed'")), "the replay"
    )
    (row,) = world.rows("SELECT * FROM usage WHERE account_id = %s", customer.account_id)
    assert (row["price"], str(row["request_id"])) == (120_000, answers[0].headers["x-request-id"])
    world.audit()


def test_sigterm_lets_a_stream_finish_and_settle(world: World, provider: FakeProvider) -> None:
    customer = world.service.new_key()
    gate = Gate(after_chunks=1)
    provider.reply("priced", Reply(gate=gate))
    body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with (
        world.service.client(customer.key) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        parts = answer.iter_text()
        text = next(parts)
        assert world.service.process is not None
        world.service.process.terminate()
        gate.open()
        text += "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    assert world.service.process.wait(30) == 0
    (row,) = world.rows("SELECT * FROM usage WHERE account_id = %s", customer.account_id)
    assert (row["status"], row["price"]) == ("billed", 120_000)


def test_stream_that_outlives_the_shutdown_is_put_up_for_review_at_once(
    world: World, provider: FakeProvider
) -> None:
    world.service.stop()
    world.service.environ = {**world.service.environ, "TALLYGATE_SHUTDOWN_TIMEOUT_S": "1"}
    world.service.start()
    customer = world.service.new_key()
    gate = Gate(after_chunks=1)
    provider.reply("priced", Reply(gate=gate))
    body = {"model": "priced", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with (
        world.service.client(customer.key) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        next(answer.iter_text())
        assert world.service.process is not None
        world.service.process.terminate()
        world.service.process.wait(30)
    gate.open()
    (row,) = world.rows("SELECT * FROM usage WHERE account_id = %s", customer.account_id)
    assert (row["status"], row["error_code"], row["price"]) == ("needs_review", "shutdown", None)
    assert not world.rows("SELECT 1 FROM open_holds")
    world.audit()
