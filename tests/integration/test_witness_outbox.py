"""How reports leave LiteLLM: in batches, again after failures, bounded, in nobody's way."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from proxy.embedded.litellm_config import QUIET

if TYPE_CHECKING:
    from proxy.embedded.tallygate_witness import Outbox

URL_VARIABLE = "TALLYGATE_WITNESS_URL"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    """The module under test. It imports LiteLLM, which takes seconds: not while tests are found."""
    with pytest.MonkeyPatch.context() as quietly:
        for variable, text in QUIET.items():  # else LiteLLM looks for its prices in the internet
            quietly.setenv(variable, text)
        yield import_module("proxy.embedded.tallygate_witness")


class Poster:
    """Takes what an outbox posts, each time with the next of its answers, then with 202."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.posted = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, body: bytes) -> int:
        self.bodies.append(json.loads(body))
        self.posted.release()
        self.gate.wait(30)
        answer = self.answers.pop(0) if self.answers else 202
        if isinstance(answer, Exception):
            raise answer
        return answer

    def wait(self, posts: int) -> None:
        for _ in range(posts):
            assert self.posted.acquire(timeout=30)

    @property
    def taken(self) -> list[object]:
        return [report["n"] for body in self.bodies for report in body["reports"]]


@pytest.fixture
def outbox(module: Any) -> Iterator[Callable[..., "Outbox"]]:
    made: list[Outbox] = []

    def make(poster: Poster, **options: int) -> "Outbox":
        made.append(module.Outbox(poster, **options))
        return made[-1]

    yield make
    for box in made:
        box.close()


def test_reports_that_come_together_travel_together(outbox: Callable[..., "Outbox"]) -> None:
    poster = Poster()
    box = outbox(poster)
    for number in range(3):
        box.add({"n": number})
    poster.wait(1)
    assert poster.bodies == [{"reports": [{"n": 0}, {"n": 1}, {"n": 2}], "dropped": 0}]


def test_a_full_batch_waits_for_nobody(
    module: Any, outbox: Callable[..., "Outbox"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINGER_S", 600)
    poster = Poster()
    box = outbox(poster)
    for number in range(module.BATCH):
        box.add({"n": number})
    poster.wait(1)
    assert len(poster.taken) == module.BATCH


def test_what_could_not_be_sent_is_sent_again(outbox: Callable[..., "Outbox"]) -> None:
    poster = Poster(ConnectionRefusedError(), 503, http.client.RemoteDisconnected("gone"), 401)
    box = outbox(poster)
    box.add({"n": 1})
    poster.wait(5)
    assert poster.taken == [1] * 5


def test_the_oldest_are_lost_and_counted_where_there_are_too_many(
    outbox: Callable[..., "Outbox"],
) -> None:
    poster = Poster()
    poster.gate.clear()
    box = outbox(poster, capacity=2)
    box.add({"n": 0})
    poster.wait(1)  # it is on its way, and what comes now has to wait
    for number in range(1, 6):
        box.add({"n": number})
    poster.gate.set()
    poster.wait(1)
    assert poster.bodies[1] == {"reports": [{"n": 4}, {"n": 5}], "dropped": 3}


def test_adding_does_not_wait_for_a_tallygate_that_hangs(outbox: Callable[..., "Outbox"]) -> None:
    poster = Poster()
    poster.gate.clear()
    box = outbox(poster)
    box.add({"n": 0})
    poster.wait(1)
    started = time.monotonic()
    for number in range(1000):
        box.add({"n": number})
    assert time.monotonic() - started < 1
    poster.gate.set()


@pytest.mark.parametrize("status", [400, 413])
def test_what_is_refused_for_good_is_given_up_and_counted(
    outbox: Callable[..., "Outbox"], status: int
) -> None:
    poster = Poster(status)
    box = outbox(poster)
    box.add({"n": 1})
    poster.wait(1)
    box.miss()
    poster.wait(1)
    assert poster.bodies[1] == {"reports": [], "dropped": 2}


def test_patience_has_an_end(
    module: Any, outbox: Callable[..., "Outbox"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0)
    poster = Poster(503)
    box = outbox(poster)
    box.add({"n": 1})
    poster.wait(1)
    box.add({"n": 2})
    poster.wait(1)
    assert poster.bodies[1] == {"reports": [{"n": 2}], "dropped": 1}


def test_closing_sends_what_is_left(module: Any) -> None:
    poster = Poster()
    box = module.Outbox(poster)
    for number in range(250):
        box.add({"n": number})
    box.close()
    assert poster.taken == list(range(250))


def test_closing_does_not_wait_for_a_tallygate_that_is_gone(module: Any) -> None:
    poster = Poster(*[OSError("gone")] * 5)
    box = module.Outbox(poster)
    box.add({"n": 1})
    started = time.monotonic()
    box.close()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("url", ["", "tallygate:4000", "ftp://tallygate"])
def test_url_that_is_none_is_named(module: Any, url: str) -> None:
    with pytest.raises(ValueError, match=module.URL_VARIABLE):
        module.poster(url, "token")


@pytest.mark.parametrize("environ", [{}, {URL_VARIABLE: "http://x"}])
def test_without_its_settings_it_is_silent(
    module: Any, environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    module.make_witness(environ)
    assert "nothing is reported" in caplog.text
