import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from proxy.embedded import litellm as module
from proxy.embedded.keeper import ChildFailedError
from proxy.embedded.litellm import LiteLLMChild
from proxy.errors import ConfigurationError
from tests.support.litellm import AMBIENT_KEY, PROVIDER_KEY, RunningLiteLLM
from tests.support.provider import FakeProvider, Gate, Reply

# One LiteLLM is enough for all of these.

MESSAGES = [{"role": "user", "content": "hi"}]
DEMO = {
    "model_list": [
        {
            "model_name": "demo",
            "litellm_params": {"model": "openai/demo", "api_key": "none", "mock_response": "yes"},
        }
    ]
}


@pytest.fixture
def client(litellm: RunningLiteLLM) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {litellm.key}"}
    with httpx.Client(base_url=litellm.url, headers=headers, timeout=60) as client:
        yield client


def chat(client: httpx.Client, model: str, **fields: object) -> httpx.Response:
    body = {"model": model, "messages": MESSAGES, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_it_wants_the_master_key(litellm: RunningLiteLLM) -> None:
    url, body = f"{litellm.url}/v1/chat/completions", {"model": "mock", "messages": MESSAGES}
    missing = httpx.post(url, json=body)
    wrong = httpx.post(url, json=body, headers={"authorization": "Bearer sk-wrong"})

    # Without prisma the first would be a 500. The second says that it has no database to look in.
    assert (missing.status_code, wrong.status_code) == (401, 400)


def test_its_files_are_private(litellm: RunningLiteLLM) -> None:
    directory = litellm.child.log_path.parents[1]
    for path in (litellm.child.log_path, directory / "litellm" / "config.yaml"):
        assert path.stat().st_mode & 0o077 == 0
    config: dict[str, Any] = yaml.safe_load((directory / "litellm" / "config.yaml").read_text())
    assert PROVIDER_KEY not in str(config)


def test_it_listens_on_loopback_alone(litellm: RunningLiteLLM) -> None:
    listening = [
        connection.laddr
        for connection in psutil.Process(litellm.child.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", litellm.child.port)]


def test_the_provider_gets_the_key_of_the_house(
    client: httpx.Client, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply())

    answer = chat(client, "priced")

    assert answer.status_code == 200
    assert answer.headers["x-litellm-response-cost"] == "6e-05"
    assert provider.last().headers["authorization"] == f"Bearer {PROVIDER_KEY}"


@pytest.mark.parametrize("api_key", ["", None])
def test_a_blank_key_reaches_no_other_key_of_the_operator(
    api_key: str | None, client: httpx.Client, provider: FakeProvider
) -> None:
    chat(client, "priced", api_key=api_key)

    assert not any(AMBIENT_KEY in str(request.headers) for request in provider.requests)


def test_a_stream_carries_its_cost(client: httpx.Client, provider: FakeProvider) -> None:
    provider.reply("priced", Reply())

    answer = chat(client, "priced", stream=True, stream_options={"include_usage": True})

    assert '"cost":0.00006' in answer.text.replace(" ", "")
    assert answer.text.endswith("data: [DONE]\n\n")


def test_the_provider_tells_what_it_is_told_to_tell(
    client: httpx.Client, provider: FakeProvider
) -> None:
    provider.reply_once("priced", Reply(status=429, headers={"retry-after": "7"}))
    refused = chat(client, "priced")
    broken = chat(client, "priced", stream=True)
    provider.reply_once("priced", Reply(error_after=1))
    interrupted = chat(client, "priced", stream=True)

    assert refused.status_code == 429
    assert refused.headers["llm_provider-retry-after"] == "7"
    assert "[DONE]" in broken.text
    assert '"error"' in interrupted.text


def test_the_provider_sees_that_the_caller_hung_up(
    client: httpx.Client, provider: FakeProvider
) -> None:
    gate = Gate(after_chunks=1)
    provider.reply("priced", Reply(gate=gate))
    body = {"model": "priced", "messages": MESSAGES, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_bytes())
        gate.wait_reached()

    assert provider.last().wait_ended().closed_early


def test_a_killed_litellm_is_brought_back_on_its_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    serve_alive(monkeypatch, first=f"open({str(started)!r}, 'a').write('x')")
    child = LiteLLMChild(DEMO, data_dir=tmp_path, master_key="sk-m")
    url = child.start()
    pid = child.pid
    assert pid is not None

    os.kill(pid, signal.SIGKILL)
    while started.read_text() != "xx" or not answers(url):
        signal.sigtimedwait([], 0.05)

    assert child.pid != pid
    child.stop()
    assert not answers(url)
    assert not child.is_running()
    assert child.pid is None


def test_it_dies_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path;"
        "from proxy.embedded import litellm;"
        "litellm.LAUNCHER = sys.argv[2];"
        "child = litellm.LiteLLMChild({}, data_dir=Path(sys.argv[1]), master_key='sk-m');"
        "print(child.start(), child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), launcher(ALIVE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    url, pid = done.stdout.split()

    psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=5)
    assert not answers(url)


def test_one_that_ends_at_once_shows_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAUNCHER", "raise SystemExit('no such model')")

    with pytest.raises(ChildFailedError, match=r"ended at its start(.|\n)*no such model"):
        LiteLLMChild({}, data_dir=tmp_path, master_key="sk-m").start()


def test_one_that_never_answers_is_given_up_and_killed_if_it_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = "import signal, time; signal.signal(15, lambda *_: None); time.sleep(600)"
    monkeypatch.setattr(module, "LAUNCHER", stubborn)
    monkeypatch.setattr(module, "START_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.1)
    child = LiteLLMChild({}, data_dir=tmp_path, master_key="sk-m")

    with pytest.raises(ChildFailedError, match="not up after"):
        child.start()
    assert not child.is_running()


def test_stopping_does_not_wait_for_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_alive(monkeypatch)
    child = LiteLLMChild({}, data_dir=tmp_path, master_key="sk-m")
    child.start()
    monkeypatch.setattr(module, "LAUNCHER", "import time; time.sleep(600)")
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 5)
    pid = child.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while child.pid in {None, pid}:
        signal.sigtimedwait([], 0.02)

    child.stop()

    assert not child.is_running()


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=f"port {port} is taken"):
            LiteLLMChild({}, data_dir=tmp_path, master_key="sk-m", port=port)


def test_its_port_is_nobody_elses_before_it_listens(tmp_path: Path) -> None:
    child = LiteLLMChild({}, data_dir=tmp_path, master_key="sk-m")

    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", child.port))
    child.stop()


def test_without_the_wheel_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(_name: str) -> None:
        return None

    monkeypatch.setattr(module, "find_spec", none)
    child = LiteLLMChild({}, data_dir=tmp_path, master_key="sk-m")

    with pytest.raises(ConfigurationError, match=r"tallygate\[embedded\]"):
        child.start()
    child.stop()


# In LiteLLM's place where it does not matter, since it needs 10 s to start: says that it is alive.
ALIVE = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def launcher(program: str) -> str:
    """Return the real launcher with another program in LiteLLM's place."""
    return module.LAUNCHER.partition("from litellm")[0] + program


def serve_alive(monkeypatch: pytest.MonkeyPatch, *, first: str = "") -> None:
    monkeypatch.setattr(module, "LAUNCHER", launcher(f"{first}\n{ALIVE}"))


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/liveliness").status_code == 200
    except httpx.TransportError:
        return False
