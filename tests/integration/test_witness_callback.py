"""What the witness tells from inside a real LiteLLM, call by call, to a real HTTP server."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest

from proxy.embedded.litellm import LiteLLMChild
from proxy.embedded.litellm_config import WitnessAddress
from tests.support.litellm import MASTER_KEY, PROVIDER_KEY, litellm_section
from tests.support.provider import FakeProvider, Gate, Reply

TOKEN = "token-of-the-witness"
ACCOUNT = str(uuid4())
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HI = [{"role": "user", "content": "a prompt that is nobody's"}]
Report = dict[str, Any]

# The operator's own callback, which ours must not replace.
OWN_CALLBACK = """
from litellm.integrations.custom_logger import CustomLogger
class Own(CustomLogger):
    async def async_log_success_event(self, kwargs, response_obj, start_time, end_time):
        open(__file__ + ".log", "a").write(kwargs["litellm_call_id"])
own = Own()
"""


class Receiver:
    """Stands where Tallygate is; keeps what comes, and refuses as often as it is told to."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.dropped = 0
        self.raw = b""
        self.refusals = 0
        self._came = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                where = (self.path, self.headers["authorization"])
                self.send_response(receiver.take(body, where))
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, body: bytes, where: tuple[str, str]) -> int:
        assert where == ("/internal/v1/witness", f"Bearer {TOKEN}")
        with self._came:
            if self.refusals:
                self.refusals -= 1
                return 503
            self.raw += body
            batch = json.loads(body)
            self.reports += batch["reports"]
            self.dropped += batch["dropped"]
            self._came.notify_all()
        return 202

    def of(self, call_id: str, *, count: int = 1, timeout_s: float = 30) -> list[Report]:
        """Wait for so many reports of a call."""

        def found() -> list[Report]:
            return [report for report in self.reports if report["call_id"] == call_id]

        with self._came:
            assert self._came.wait_for(lambda: len(found()) >= count, timeout_s), self.reports
            return found()


class Witnessed(NamedTuple):
    """A LiteLLM with the witness in it, and where it reports to."""

    child: LiteLLMChild
    receiver: Receiver
    directory: Path

    def call(
        self, path: str, *, method: str = "POST", **request: Any
    ) -> tuple[str, httpx.Response]:
        """Send what Tallygate would; returns the id of the call."""
        call_id = str(uuid4())
        url, headers = f"{self.child.url}{path}", headers_of(call_id)
        return call_id, httpx.request(method, url, headers=headers, timeout=60, **request)

    def report(self, path: str, **request: Any) -> Report:
        """Send a call and return the one report of it."""
        call_id, _ = self.call(path, **request)
        (report,) = self.receiver.of(call_id)
        return report


def headers_of(call_id: str) -> dict[str, str]:
    return {
        "authorization": f"Bearer {MASTER_KEY}",
        "x-litellm-call-id": call_id,
        "x-tallygate-account": ACCOUNT,
    }


@pytest.fixture(scope="module")
def witnessed(
    provider_server: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Witnessed]:
    directory = tmp_path_factory.mktemp("witnessed")
    (directory / "litellm").mkdir()
    (directory / "litellm" / "own.py").write_text(OWN_CALLBACK)
    receiver = Receiver()
    section = litellm_section(provider_server.url)
    section["litellm_settings"] = {"callbacks": "own.own"}
    section["router_settings"] = {"fallbacks": [{"dear": ["priced"]}], "retry_after": 0}
    child = LiteLLMChild(
        section,
        data_dir=directory,
        master_key=MASTER_KEY,
        environ={**os.environ, "PROVIDER_KEY": PROVIDER_KEY},
        witness=WitnessAddress(receiver.url, TOKEN),
    )
    child.start()
    yield Witnessed(child, receiver, directory)
    child.stop()
    receiver.server.shutdown()
    receiver.server.server_close()


FILES = {"file": ("a.wav", b"RIFF-of-nobody", "audio/wav")}
IMAGES = {"image": ("a.png", b"PNG", "image/png")}


@pytest.mark.parametrize(
    "path, request_, cost",
    [
        (CHAT, {"json": {"model": "priced", "messages": HI}}, "6e-05"),
        (CHAT, {"json": {"model": "priced", "messages": HI, "stream": True}}, "6e-05"),
        (
            "/v1/completions",
            {"json": {"model": "instruct", "prompt": "hi"}},
            "2.4999999999999998e-05",
        ),
        (
            "/v1/completions",
            {"json": {"model": "instruct", "prompt": "hi", "stream": True}},
            "2.4999999999999998e-05",
        ),
        ("/v1/responses", {"json": {"model": "priced", "input": "hi"}}, "6e-05"),
        ("/v1/responses", {"json": {"model": "priced", "input": "hi", "stream": True}}, "6e-05"),
        (MESSAGES, {"json": {"model": "claude", "messages": HI, "max_tokens": 9}}, "6e-05"),
        ("/v1/images/generations", {"json": {"model": "image", "prompt": "x", "n": 2}}, "0.08"),
        ("/v1/rerank", {"json": {"model": "rerank", "query": "q", "documents": ["d"]}}, "0.002"),
        # LiteLLM tells a cost of 0 of what it has no price for, and none of what it can't rate.
        ("/v1/moderations", {"json": {"model": "moderate", "input": "x"}}, "0.0"),
        (CHAT, {"json": {"model": "unpriced", "messages": HI}}, "0.0"),
        ("/v1/audio/speech", {"json": {"model": "speech", "input": "x", "voice": "a"}}, None),
    ],
)
def test_it_tells_what_each_call_cost(
    witnessed: Witnessed,
    provider: FakeProvider,
    path: str,
    request_: dict[str, Any],
    cost: str | None,
) -> None:
    del provider
    report = witnessed.report(path, **request_)
    assert report["cost"] == cost
    assert report["account_id"] == ACCOUNT
    assert (report["outcome"], report["attempts"]) == ("success", 1)
    assert report["deployment"]
    assert abs(time.time() - report["started_at"]) < 60


def test_it_knows_the_cost_of_a_stream_of_messages_where_the_stream_is_wrong(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    reply = Reply(cached_tokens=1000, cache_write_tokens=300, cache_write_1h_tokens=100)
    provider.reply("claude", reply)
    body = {"model": "claude", "messages": HI, "max_tokens": 9, "stream": True}
    call_id, answer = witnessed.call(MESSAGES, json=body)
    (report,) = witnessed.receiver.of(call_id)
    assert '"cost": 5e-05' in answer.text
    assert report["cost"] == "0.00061"
    usage = report["usage"]
    details = usage["prompt_tokens_details"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (1310, 5)
    assert (details["cached_tokens"], details["cache_creation_tokens"]) == (1000, 300)
    assert details["cache_creation_token_details"]["ephemeral_1h_input_tokens"] == 100


def test_it_tells_forms_as_well(witnessed: Witnessed, provider: FakeProvider) -> None:
    provider.reply("transcribe", Reply(seconds=7.5))
    heard = witnessed.report("/v1/audio/transcriptions", data={"model": "transcribe"}, files=FILES)
    drawn = witnessed.report(
        "/v1/images/edits", data={"model": "image", "prompt": "x"}, files=IMAGES
    )
    assert float(heard["cost"]) > 0
    assert drawn["cost"] == "0.04"


@pytest.mark.parametrize("stream", [False, True])
def test_attempts_of_the_router_are_told_apart(
    witnessed: Witnessed, provider: FakeProvider, *, stream: bool
) -> None:
    provider.reply_once("priced", Reply(status=500), Reply(status=500))
    body = {"model": "priced", "messages": HI, "stream": stream, "num_retries": 2}
    call_id, answer = witnessed.call(CHAT, json=body)
    assert answer.status_code == 200
    failed, succeeded = witnessed.receiver.of(call_id, count=2)
    assert (failed["outcome"], failed["attempts"], failed["cost"]) == ("failure", 1, "0")
    assert (succeeded["outcome"], succeeded["attempts"]) == ("success", 3)
    assert succeeded["cost"] == "6e-05"
    assert failed["attempt"] != succeeded["attempt"]


def test_attempts_are_counted_where_all_of_them_failed(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    provider.reply_once("priced", *[Reply(status=500)] * 3)
    body = {"model": "priced", "messages": HI, "num_retries": 2}
    call_id, answer = witnessed.call(CHAT, json=body)
    assert answer.status_code == 500
    reports = witnessed.receiver.of(call_id, count=2)
    assert [(report["outcome"], report["attempts"]) for report in reports] == [
        ("failure", 1),
        ("failure", 3),
    ]


def test_attempts_before_a_fallback_count(witnessed: Witnessed, provider: FakeProvider) -> None:
    provider.reply_once("dear", *[Reply(status=500)] * 2)
    body = {"model": "dear", "messages": HI, "num_retries": 1}
    call_id, answer = witnessed.call(CHAT, json=body)
    assert answer.status_code == 200
    *_, succeeded = witnessed.receiver.of(call_id, count=2)
    assert (succeeded["attempts"], succeeded["cost"]) == (3, "6e-05")


def test_failure_in_mid_stream_tells_what_was_generated(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    provider.reply_once("priced", Reply(error_after=2))
    body = {"model": "priced", "messages": HI, "stream": True, "num_retries": 0}
    report = witnessed.report(CHAT, json=body)
    assert report["outcome"] == "failure"
    assert float(report["cost"]) > 0


def test_it_tells_what_was_generated_for_one_who_hung_up(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    gate = Gate(after_chunks=3)
    provider.reply("priced", Reply(gate=gate, chunks=9, content="one two three " * 3))
    call_id, body = str(uuid4()), {"model": "priced", "messages": HI, "stream": True}
    url, headers = witnessed.child.url + CHAT, headers_of(call_id)
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_bytes())
        gate.wait_reached()
    (report,) = witnessed.receiver.of(call_id)
    gate.open()
    assert report["outcome"] == "success"
    assert float(report["cost"]) > 0


def test_a_call_that_nobody_waits_for_is_told_whole(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    gate = Gate()
    provider.reply("priced", Reply(gate=gate))
    call_id, body = str(uuid4()), {"model": "priced", "messages": HI}
    url = witnessed.child.url + CHAT
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, headers=headers_of(call_id), timeout=1)
    gate.open()
    (report,) = witnessed.receiver.of(call_id)
    assert (report["outcome"], report["cost"]) == ("success", "6e-05")


def test_what_is_not_ours_or_costs_nothing_is_not_told(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    body = {"model": "priced", "messages": HI}
    foreign = str(uuid4())
    headers = headers_of(foreign)
    del headers["x-tallygate-account"]
    httpx.post(witnessed.child.url + CHAT, json=body, headers=headers, timeout=60)
    _, made = witnessed.call("/v1/responses", json={"model": "priced", "input": "hi"})
    read, answer = witnessed.call(f"/v1/responses/{made.json()['id']}", method="GET")
    assert answer.status_code == 200
    refused, answer = witnessed.call(CHAT, json={"model": "no-such", "messages": HI})
    assert answer.status_code == 400
    # The next report is younger than any of theirs would be.
    witnessed.report(CHAT, json=body)
    assert not {foreign, read, refused} & {r["call_id"] for r in witnessed.receiver.reports}
    del provider


def test_reports_wait_for_a_tallygate_that_is_away(
    witnessed: Witnessed, provider: FakeProvider
) -> None:
    del provider
    witnessed.receiver.refusals = 3
    started = time.monotonic()
    call_id, answer = witnessed.call(CHAT, json={"model": "priced", "messages": HI})
    assert answer.status_code == 200
    witnessed.receiver.of(call_id)
    assert witnessed.receiver.refusals == 0
    assert time.monotonic() - started < 20


def test_the_operators_own_callback_goes_on(witnessed: Witnessed, provider: FakeProvider) -> None:
    del provider
    call_id, _ = witnessed.call(CHAT, json={"model": "priced", "messages": HI})
    witnessed.receiver.of(call_id)
    assert call_id in (witnessed.directory / "litellm" / "own.py.log").read_text()


def test_no_word_of_prompts_and_answers_was_in_any_report(witnessed: Witnessed) -> None:
    # The last test of this module: it looks at what all of them sent.
    for word in (b"nobody", b"provider", b"says no", b"one two"):
        assert word not in witnessed.receiver.raw
    assert witnessed.receiver.dropped == 0
    assert len(witnessed.receiver.raw) > 1000
