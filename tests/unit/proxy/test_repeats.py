"""Requests that come again: what makes two the same, and what is kept of an answer on its way."""

from dataclasses import replace
from typing import Any, cast

import pytest

from proxy.accounts import Principal
from proxy.errors import ConflictError
from proxy.exchange import Exchange
from proxy.repeats import REPLAY_OF, Repeat, Repeats
from proxy.replays import RetryStore
from tests.support.admitted import Client, make_call

pytestmark = pytest.mark.anyio

HEADERS = ((b"content-type", b"text/event-stream"),)


class Shop:
    """A customer of `Repeats` with a small store; keys of the client's are not asked for here."""

    def __init__(self, *, max_bytes: int = 100_000, max_answer_bytes: int = 1000) -> None:
        self.retries = RetryStore(max_bytes=max_bytes, max_answer_bytes=max_answer_bytes)
        self._repeats = Repeats(cast("Any", None), self.retries, ["X-OpenAI-Key"])
        self.principal: Principal = make_call(Client()).admitted.principal
        self.exchange: Exchange = Client().exchange()

    async def ask(self, number: str | None = "0", body: bytes = b"body", **headers: str) -> Repeat:
        """Ask for the same, or with another body or other headers."""
        named = {"authorization": "Bearer sk-1", **headers}
        if number is not None:
            named["x-stainless-retry-count"] = number
        pairs = [(k.replace("_", "-").encode(), text.encode()) for k, text in named.items()]
        self.exchange = Client(*pairs).exchange()
        return await self._repeats.begin(self.exchange, self.principal, "chat", body)

    async def charge(self, repeat: Repeat, *parts: bytes) -> None:
        """Carry a request out, with an answer in these parts."""
        *first, last = parts
        for part in first:
            repeat.add(part)
        await repeat.keep(self.exchange, HEADERS, last)
        repeat.charged()
        await repeat.forget()


async def test_retry_gets_the_answer_with_the_name_of_the_request_that_paid_for_it() -> None:
    shop = Shop()
    first = await shop.ask("0")
    assert first.answer is None
    await shop.charge(first, b"one ", b"two ", b"three")
    paid_for = str(shop.exchange.request_id).encode()
    answer = (await shop.ask("1")).answer
    assert answer is not None
    assert (answer.status, answer.body) == (200, b"one two three")
    assert answer.headers == (*HEADERS, (REPLAY_OF, paid_for))


@pytest.mark.parametrize(
    "other",
    [
        {"authorization": "Bearer sk-2"},
        {"x_openai_key": "sk-own"},
        {"anthropic_beta": "context-1m-2025-08-07"},
        {"x_tallygate_live_cost": "true"},
        {"body": b"other"},
        {"number": "0"},
        {"number": None},
        {"number": "first"},
        {"number": "1\u00b2"},
        {"number": "9999"},
        {"number": ""},
    ],
)
async def test_what_differs_is_another_request(other: dict[str, Any]) -> None:
    shop = Shop()
    await shop.charge(await shop.ask("0"), b"answer")
    assert (await shop.ask(**cast("Any", {"number": "1", **other}))).answer is None


async def test_retry_repeats_no_other_retry_of_the_same_number() -> None:
    shop = Shop()
    await shop.charge(await shop.ask("1"), b"answer of the first")
    assert (await shop.ask("1")).answer is None
    assert (await shop.ask("2")).answer is not None


async def test_account_that_does_not_want_it_is_not_looked_up() -> None:
    shop = Shop()
    await shop.charge(await shop.ask("0"), b"answer")
    shop.principal = replace(shop.principal, replay_retries=False)
    assert (await shop.ask("1")).answer is None


async def test_what_failed_is_not_given_again() -> None:
    shop = Shop()
    first = await shop.ask("0")
    first.add(b"half an ")
    await first.forget()
    await first.forget()
    assert (await shop.ask("1")).answer is None


@pytest.mark.parametrize(
    "parts",
    [[b"x" * 1001], [b"x" * 600, b"x" * 401], [b"x" * 1001, b""], [b"x" * 600, b"", b"x" * 500]],
)
async def test_answer_that_is_too_large_is_refused_to_retries(parts: list[bytes]) -> None:
    shop = Shop()
    await shop.charge(await shop.ask("0"), *parts)
    with pytest.raises(ConflictError) as caught:
        await shop.ask("1")
    assert (caught.value.code, caught.value.retryable) == ("retry_answer_not_kept", False)


async def test_answers_on_their_way_share_the_bytes_of_the_store() -> None:
    shop = Shop(max_bytes=5000)
    repeats = [await shop.ask("0", body=b"%d" % number) for number in range(10)]
    for repeat in repeats:
        repeat.add(b"x" * 900)
    # The sixth has found no room, and a part of an answer is none.
    repeats[0].add(b"x" * 50)
    await repeats[0].forget()
    repeats[5].add(b"x")
    for repeat in repeats[1:]:
        await shop.charge(repeat, b"y")
    with pytest.raises(ConflictError):
        await shop.ask("1", body=b"9")


async def test_room_is_given_back_however_an_answer_ends() -> None:
    shop = Shop(max_bytes=2000)
    for number in range(20):
        repeat = await shop.ask("0", body=b"%d" % number)
        repeat.add(b"x" * 900)
        if number % 3 == 0:
            await repeat.forget()
        elif number % 3 == 1:
            await shop.charge(repeat, b"y")
        else:
            await shop.charge(repeat, b"x" * 900)  # too large in the end
    last = await shop.ask("0", body=b"last")
    await shop.charge(last, b"x" * 900, b"y")
    assert (await shop.ask("1", body=b"last")).answer is not None


async def test_nothing_is_collected_for_whom_nothing_comes_again() -> None:
    shop = Shop(max_bytes=0)
    repeat = await shop.ask(None)
    repeat.add(b"x" * 10_000_000)
    await shop.charge(repeat, b"y")
    assert (await shop.ask("1")).answer is None
