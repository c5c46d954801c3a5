"""The witness inside a real LiteLLM and the service it reports to: what nobody else could tell."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from proxy.embedded.litellm import LiteLLMChild
from proxy.embedded.litellm_config import WitnessAddress
from tests.e2e.conftest import CHAT, Guest, House, wait_for
from tests.support.litellm import PROVIDER_KEY, litellm_section
from tests.support.provider import FakeProvider, Gate, Reply
from tests.support.service import ROOT, free_port

TOKEN = "token-of-the-witness"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def house(
    make_house: Callable[..., House],
    provider_server: FakeProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[House]:
    """A service and a LiteLLM that know each other's address, and the latter tries thrice."""
    port = free_port()
    made = make_house(
        litellm_url=f"http://127.0.0.1:{port}",
        wait=False,
        environ={
            "TALLYGATE_WITNESS_TOKEN": TOKEN,
            "TALLYGATE_HOLDS__TTL_S": "5",
            "TALLYGATE_HOLDS__HEARTBEAT_S": "1",
            "TALLYGATE_HOLDS__SWEEP_GRACE_S": "0",
            "TALLYGATE_HOLDS__SWEEP_INTERVAL_S": "0.2",
            # A client that hangs up ends the reading at once.
            "TALLYGATE_UPSTREAM__DRAIN_BYTES": "0",
        },
    )
    section = litellm_section(provider_server.url)
    section["router_settings"] = {"num_retries": 2, "retry_after": 0}
    child = LiteLLMChild(
        section,
        data_dir=tmp_path_factory.mktemp("witnessed"),
        master_key="sk-unused",
        port=port,
        environ={**os.environ, "PROVIDER_KEY": PROVIDER_KEY},
        witness=WitnessAddress(made.service.base_url, TOKEN),
    )
    child.start()
    made.service.wait_ready()
    yield made
    child.stop()


def witnessed(guest: Guest, *, attempts: int = 1) -> dict[str, Any]:
    """Return the one request of the guest as soon as the witness knows of so many attempts."""
    query = "SELECT 1 FROM usage WHERE account_id = %s AND attempts = %s"
    of = guest.customer.account_id, attempts
    wait_for(lambda: bool(guest.house.rows(query, *of)), "the witness", timeout_s=60)
    return guest.usage()


def post(guest: Guest, path: str, **body: Any) -> httpx.Response:
    with guest.house.service.client(guest.customer.key) as client:
        return client.post(path, json=body)


@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, {"model": "priced", "messages": HI}),
        (CHAT, {"model": "priced", "messages": HI, "stream": True}),
        ("/v1/messages", {"model": "claude", "messages": HI, "max_tokens": 9}),
        ("/v1/messages", {"model": "claude", "messages": HI, "max_tokens": 9, "stream": True}),
        ("/v1/responses", {"model": "priced", "input": "hi", "stream": True}),
        ("/v1/embeddings", {"model": "embed", "input": "hi"}),
        ("/v1/rerank", {"model": "rerank", "query": "q", "documents": ["d"]}),
    ],
)
def test_witness_agrees_with_what_was_charged(
    guest: Guest, provider: FakeProvider, path: str, body: dict[str, Any]
) -> None:
    caches = Reply(cached_tokens=1000, cache_write_tokens=300, cache_write_1h_tokens=100)
    provider.reply("claude", caches)
    assert post(guest, path, **body).status_code == 200
    row = witnessed(guest)
    assert row["status"] == "billed"
    assert row["cost_picos"] > 0
    assert (row["witness_picos"], row["attempts"]) == (row["cost_picos"], 1)
    assert row["review_reason"] is None


def test_client_that_hung_up_is_charged_what_the_witness_knows(
    guest: Guest, provider: FakeProvider
) -> None:
    gate = Gate(after_chunks=3)
    provider.reply("priced", Reply(gate=gate, chunks=9, content="one two three " * 3))
    body = {"model": "priced", "messages": HI, "stream": True}
    client = guest.house.service.client(guest.customer.key)
    with client, client.stream("POST", CHAT, json=body) as answer:
        next(answer.iter_bytes())
        gate.wait_reached()
    # The drain ends with the next byte: from here on nobody but LiteLLM knows what it cost.
    gate.open()
    row = witnessed(guest)
    assert (row["status"], row["cost_source"], row["client_gone"]) == ("billed", "witness", True)
    assert row["cost_picos"] == row["witness_picos"] > 0
    assert row["price"] > 0
    assert guest.balance() == (10**9 - row["price"], 0)


def test_attempts_that_the_customer_never_saw_are_counted(
    guest: Guest, provider: FakeProvider
) -> None:
    provider.reply_once("priced", Reply(status=500), Reply(status=500))
    assert guest.chat().status_code == 200
    row = witnessed(guest, attempts=3)
    assert (row["status"], row["witness_picos"], row["review_reason"]) == (
        "billed",
        60_000_000,
        None,
    )


def test_request_that_failed_tells_its_attempts(guest: Guest, provider: FakeProvider) -> None:
    provider.reply_once("priced", *[Reply(status=500)] * 3)
    assert guest.chat().status_code >= 500
    row = witnessed(guest, attempts=3)
    assert (row["status"], row["witness_picos"]) == ("void", None)
    assert guest.uncharged()


def test_cut_stream_shows_the_operator_what_it_cost(guest: Guest, provider: FakeProvider) -> None:
    provider.reply_once("priced", Reply(error_after=2))
    guest.chat(stream=True)
    row = witnessed(guest)
    assert (row["status"], row["review_reason"]) == ("needs_review", "stream_cut")
    assert row["witness_picos"] > 0
    assert guest.uncharged()


def test_request_of_a_killed_proxy_shows_what_it_cost_and_is_not_charged(
    guest: Guest, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))

    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            guest.chat()

    with ThreadPoolExecutor(1) as thread:
        asking = thread.submit(ask)
        gate.wait_reached()
        guest.house.service.kill()
        asking.result()
    # LiteLLM lets the provider finish, and tells as soon as there is somebody to tell.
    gate.open()
    guest.house.service.start()
    row = witnessed(guest)
    assert (row["status"], row["review_reason"]) == ("needs_review", "orphaned")
    assert row["witness_picos"] == 60_000_000
    assert guest.uncharged()


def test_metrics_tell_what_became_of_reports(house: House, provider: FakeProvider) -> None:
    del provider
    with house.service.client("none") as client:
        lines = client.get("/metrics").text.splitlines()
    assert any(line.startswith("tallygate_witness_reports_total{outcome=") for line in lines)


def test_audit_holds_with_late_charges(house: House) -> None:
    (late,) = house.rows("SELECT count(*) AS entries FROM entries WHERE kind = 'late_capture'")
    assert late["entries"] >= 1
    done = subprocess.run(
        [sys.executable, "-m", "proxy.cli", "audit", "--json"],
        env=house.service.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
