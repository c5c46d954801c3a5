"""Buckets of calls: a minute's worth at once, then at that pace."""

import pytest

from proxy.attempts import FailedAttempts
from proxy.errors import RateLimitError
from proxy.exchange import Exchange, Message
from proxy.networks import Addresses
from proxy.rates import Rates


class Clock:
    """Time that goes on when it is told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_calls_are_allowed_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    rates = Rates(3, clock=clock)
    assert [rates.take("me").is_allowed for _ in range(4)] == [True, True, True, False]
    assert rates.take("me").retry_after_s == 20
    assert rates.take("you").is_allowed
    clock.now += 20
    assert [rates.take("me").is_allowed for _ in range(2)] == [True, False]
    clock.now += 3600
    assert [rates.take("me").left for _ in range(3)] == [2, 1, 0]


def test_looking_takes_nothing() -> None:
    rates = Rates(1, clock=Clock())
    assert [rates.look("me").is_allowed for _ in range(3)] == 3 * [True]
    rates.take("me")
    assert not rates.look("me").is_allowed


def test_whoever_was_seen_longest_ago_is_forgotten_first() -> None:
    rates = Rates(1, max_callers=2, clock=Clock())
    for caller in ("a", "b", "a", "c"):
        rates.take(caller)
    assert not rates.look("a").is_allowed
    assert rates.look("b").is_allowed


def test_refusal_says_when_to_come_again() -> None:
    rates = Rates(1, clock=Clock())
    rates.take("me")
    error = rates.take("me").refusal("No.")
    assert (error.status, error.retryable) == (429, True)
    assert error.response_headers() == {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60s",
        "retry-after": "60",
    }


async def _receive() -> Message:  # pragma: no cover - nothing is read
    return {"type": "http.disconnect"}


async def _send(_: Message) -> None:  # pragma: no cover - nothing is sent
    return


def _from(address: str | None, forwarded_for: str | None = None) -> Exchange:
    headers = [] if forwarded_for is None else [(b"x-forwarded-for", forwarded_for.encode())]
    client = None if address is None else (address, 1234)
    return Exchange({"headers": headers, "client": client}, _receive, _send)


def _is_refused(attempts: FailedAttempts, exchange: Exchange) -> bool:
    try:
        attempts.check(exchange)
    except RateLimitError:
        return True
    return False


@pytest.mark.parametrize(
    "failing, other, is_same",
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        # One customer of a provider has the lower half of an IPv6 address to himself.
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_failures_count_for_where_they_came_from(failing: str, other: str, is_same: bool) -> None:  # noqa: FBT001
    attempts = FailedAttempts(2, Addresses())
    assert not _is_refused(attempts, _from(other))
    for _ in range(2):
        attempts.note(_from(failing))
    assert _is_refused(attempts, _from(failing))
    assert _is_refused(attempts, _from(other)) is is_same


def test_failures_behind_a_proxy_of_ours_are_the_clients() -> None:
    attempts = FailedAttempts(1, Addresses(["10.0.0.0/8"]))
    attempts.note(_from("10.1.1.1", "192.0.2.1"))
    assert _is_refused(attempts, _from("10.1.1.1", "192.0.2.1"))
    assert not _is_refused(attempts, _from("10.1.1.1", "192.0.2.2"))
    # Whoever is no proxy of ours may write what he likes.
    attempts.note(_from("192.0.2.3", "192.0.2.4"))
    assert _is_refused(attempts, _from("192.0.2.3", "192.0.2.5"))
    assert not _is_refused(attempts, _from("192.0.2.4"))


def test_whose_address_is_not_known_is_not_counted() -> None:
    attempts = FailedAttempts(1, Addresses())
    attempts.note(_from(None))
    assert not _is_refused(attempts, _from(None))
