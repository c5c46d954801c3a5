"""The store of answers for SDKs' own retries: who gets which answer, and what bounds it."""

import asyncio

import pytest

from proxy.metrics import REPLAY_STORE_BYTES, REPLAYS
from proxy.replays import Attempt, KeptAnswer, RetryStore, identity_of

pytestmark = pytest.mark.anyio

ANSWER = KeptAnswer(200, ((b"content-type", b"application/json"),), b"{}")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def store(
    *, max_bytes: int = 1_000_000, max_answers: int = 100, clock: Clock | None = None
) -> RetryStore:
    return RetryStore(
        max_bytes=max_bytes,
        max_answer_bytes=1000,
        max_answers=max_answers,
        clock=clock or Clock(),
    )


def found_in(answers: RetryStore, identity: bytes) -> Attempt:
    found = answers.find(identity)
    assert found is not None
    return found


def stored_bytes() -> float:
    (metric,) = REPLAY_STORE_BYTES.collect()
    return metric.samples[0].value


def replays(kind: str) -> float:
    (metric,) = REPLAYS.collect()
    return next(
        (
            sample.value
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels == {"store": kind}
        ),
        0.0,
    )


async def test_retry_of_a_charged_attempt_gets_its_answer_as_often_as_it_comes() -> None:
    answers = store()
    answers.begin(b"a").charged(ANSWER)
    before = replays("retry")
    for _ in range(2):
        assert await found_in(answers, b"a").answer() is ANSWER
    assert replays("retry") - before == 2
    assert answers.find(b"b") is None


async def test_retry_waits_for_an_attempt_in_flight() -> None:
    answers = store()
    attempt = answers.begin(b"a")
    assert answers.find(b"a") is attempt
    waiting = [asyncio.create_task(attempt.answer()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False, False]
    attempt.charged(ANSWER)
    assert [await task for task in waiting[1:]] == [ANSWER, ANSWER]


async def test_retries_of_what_was_not_charged_go_their_own_way() -> None:
    answers = store()
    attempt = answers.begin(b"a")
    waiting = asyncio.create_task(attempt.answer())
    await asyncio.sleep(0)
    attempt.forget()
    assert await waiting is None
    assert not attempt.was_charged
    assert answers.find(b"a") is None


async def test_answer_that_is_too_large_is_known_to_be_charged() -> None:
    answers = store()
    for identity, answer in ((b"a", None), (b"b", KeptAnswer(200, (), b"x" * 1001))):
        answers.begin(identity).charged(answer)
        found = found_in(answers, identity)
        assert (found.was_charged, await found.answer()) == (True, None)


async def test_the_first_ending_counts() -> None:
    answers = store()
    attempt = answers.begin(b"a")
    attempt.charged(ANSWER)
    attempt.forget()
    attempt.charged(None)
    assert answers.find(b"a") is attempt
    assert await attempt.answer() is ANSWER


async def test_each_of_several_equal_requests_finds_another_answer() -> None:
    answers = store()
    attempts = [answers.begin(b"a") for _ in range(3)]
    assert [answers.find(b"a") for _ in range(4)] == [*attempts, attempts[0]]
    attempts[1].forget()
    attempts[0].charged(ANSWER)
    assert answers.find(b"a") is attempts[2]


async def test_answers_are_dropped_when_their_time_is_over_and_attempts_in_flight_stay() -> None:
    clock = Clock()
    answers = store(clock=clock)
    before = stored_bytes()
    answers.begin(b"a").charged(ANSWER)
    in_flight = answers.begin(b"b")
    clock.now = 119.9
    assert answers.find(b"a") is not None
    assert stored_bytes() > before
    clock.now = 120.0
    assert answers.find(b"a") is None
    assert answers.find(b"b") is in_flight
    assert stored_bytes() == before


async def test_the_oldest_answers_are_dropped_for_room() -> None:
    body = KeptAnswer(200, (), b"x" * 1000)
    by_bytes, by_number = store(max_bytes=4000), store(max_answers=2)
    for answers in (by_bytes, by_number):
        for identity in (b"a", b"b", b"c"):
            answers.begin(identity).charged(body)
        assert [answers.find(i) is not None for i in (b"a", b"b", b"c")] == [False, True, True]


async def test_whoever_waits_gets_an_answer_that_there_is_no_room_to_keep() -> None:
    answers = store(max_bytes=0)
    attempt = answers.begin(b"a")
    waiting = asyncio.create_task(attempt.answer())
    await asyncio.sleep(0)
    attempt.charged(ANSWER)
    assert await waiting is ANSWER
    assert answers.find(b"a") is None


def test_identity_tells_keys_endpoints_bodies_and_headers_apart() -> None:
    same = identity_of("sk-1", "chat", b"tail")
    assert identity_of("sk-1", "chat", b"tail") == same
    others = {
        identity_of("sk-2", "chat", b"tail"),
        identity_of("sk-1", "embeddings", b"tail"),
        identity_of("sk-1", "chat", b"tale"),
        identity_of("sk-1", "chat", b"tail", b""),
        identity_of("sk-1", "chat", b"ail", b"b"),
        identity_of("sk-1", "chatt", b"ail"),
        identity_of("sk-1c", "hat", b"tail"),
    }
    assert len(others | {same}) == 8
