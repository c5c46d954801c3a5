"""Running costs: how often they are told, and what they say."""

import asyncio
from typing import Any

import msgspec
import pytest

from pricing.usage import Usage
from proxy.livecost import LiveCost
from proxy.wire.chat_stream import ChatStreamMeter
from tests.support.admitted import Client, make_call

pytestmark = pytest.mark.anyio

MARK = b": tallygate "


def said(comment: bytes | None) -> Any:
    """What a comment tells."""
    assert comment is not None
    assert comment.startswith(MARK)
    assert comment.endswith(b"\n\n")
    assert comment.count(b"\n") == 2
    return msgspec.json.decode(comment.removeprefix(MARK))


def meter_of(words: str = "") -> ChatStreamMeter:
    """A meter that words have gone by."""
    meter = ChatStreamMeter(client_wants_usage=False, max_event_bytes=10_000)
    event = {"model": "priced", "choices": [{"delta": {"content": words}}]}
    meter.feed(b"data: " + msgspec.json.encode(event) + b"\n\n")
    return meter


async def test_running_cost_is_an_estimate_of_what_went_by() -> None:
    # 40 bytes of a prompt are 10 tokens, 9 of an answer are 3: 10 x 1 + 3 x 10 dollars a million,
    # sold double.
    assert said(LiveCost(make_call(Client()), meter_of("x" * 9)).running()) == {
        "cost": {"credits": "0.08", "usd": "0.00008"},
        "output_tokens": 3,
        "is_final": False,
    }


async def test_running_cost_is_told_twice_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveCost(make_call(Client()), meter_of())
    loop = asyncio.get_running_loop()
    told: list[bool] = []
    for now in (1000.0, 1000.1, 1000.49, 1000.5, 1000.9, 1001.0):
        monkeypatch.setattr(asyncio, "get_running_loop", lambda now=now: _Clock(now))
        told.append(live.running() is not None)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    assert told == [True, False, False, True, False, True]


class _Clock:
    def __init__(self, now: float) -> None:
        self._now = now

    def time(self) -> float:
        return self._now


async def test_cost_that_can_not_be_told_yet_is_not_told() -> None:
    unpriced = make_call(Client(), prices={})
    assert LiveCost(unpriced, meter_of()).running() is None


async def test_flat_price_is_the_same_from_the_start() -> None:
    call = make_call(Client(), prices={}, rule={"kind": "flat", "credits": "3", "allow_loss": True})
    assert said(LiveCost(call, meter_of()).running())["cost"]["credits"] == "3"


async def test_last_word_is_the_charge() -> None:
    call = make_call(Client())
    call.reading.usage = Usage(input_tokens=10, output_tokens=5)
    assert said(LiveCost.final(call, 120_000)) == {
        "cost": {"credits": "0.12", "usd": "0.00012"},
        "output_tokens": 5,
        "is_final": True,
    }
    assert said(LiveCost.final(call, 0))["cost"] == {"credits": "0", "usd": "0"}


async def test_unknown_charge_is_null_and_not_zero() -> None:
    told = said(LiveCost.final(make_call(Client()), None))
    assert told == {"cost": None, "output_tokens": None, "is_final": True}
