"""Group commit: what queues during a flush is the next flush."""

import asyncio
from collections.abc import Sequence

import pytest

from proxy.batcher import Batcher

pytestmark = pytest.mark.anyio


class Lane:
    """A flush that waits until it is let go, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Semaphore(0)

    async def __call__(self, batch: Sequence[int]) -> list[int]:
        self.batches.append(list(batch))
        await self.gate.acquire()
        return [item * 10 for item in batch]


async def settle_loop() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_items_that_queue_during_a_flush_form_the_next_batch() -> None:
    lane = Lane()
    batcher = Batcher[int, int]("test", [lane])
    first = batcher.submit(1)
    await settle_loop()
    rest = [batcher.submit(number) for number in (2, 3, 4)]
    lane.gate.release()
    lane.gate.release()
    assert await first == 10
    assert await asyncio.gather(*rest) == [20, 30, 40]
    assert lane.batches == [[1], [2, 3, 4]]


async def test_batches_have_a_limit() -> None:
    lane = Lane()
    batcher = Batcher[int, int]("test", [lane], limit=2)
    futures = [batcher.submit(number) for number in range(5)]
    for _ in range(3):
        lane.gate.release()
    await asyncio.gather(*futures)
    assert lane.batches == [[0, 1], [2, 3], [4]]


async def test_lanes_flush_side_by_side() -> None:
    lanes = [Lane(), Lane()]
    batcher = Batcher[int, int]("test", lanes)
    futures = [batcher.submit(1)]
    await settle_loop()
    futures.append(batcher.submit(2))
    await settle_loop()
    assert [lane.batches for lane in lanes] == [[[2]], [[1]]]
    for lane in lanes:
        lane.gate.release()
    assert await asyncio.gather(*futures) == [10, 20]


async def test_failure_reaches_everyone_in_the_batch_and_nobody_else() -> None:
    answers: list[Exception | None] = [OSError("away"), None]

    async def flush(batch: Sequence[int]) -> list[int]:
        await asyncio.sleep(0)
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return list(batch)

    batcher = Batcher[int, int]("test", [flush])
    failing = [batcher.submit(1), batcher.submit(2)]
    for future in failing:
        with pytest.raises(OSError, match="away"):
            await future
    assert await batcher.submit(3) == 3


async def test_flush_that_loses_an_item_is_told_to_its_waiters() -> None:
    async def flush(batch: Sequence[int]) -> list[int]:
        return list(batch)[1:]

    with pytest.raises(RuntimeError, match="1 items answered 0 results"):
        await Batcher[int, int]("test", [flush]).submit(1)


async def test_item_is_flushed_although_its_waiter_was_cancelled() -> None:
    lane = Lane()
    batcher = Batcher[int, int]("test", [lane])
    cancelled, kept = batcher.submit(1), batcher.submit(2)
    cancelled.cancel()
    lane.gate.release()
    assert await kept == 20
    assert lane.batches == [[1, 2]]


async def test_failing_flush_does_not_trip_over_a_cancelled_waiter() -> None:
    async def flush(batch: Sequence[int]) -> list[int]:
        raise OSError(str(len(batch)))

    batcher = Batcher[int, int]("test", [flush])
    cancelled, kept = batcher.submit(1), batcher.submit(2)
    cancelled.cancel()
    with pytest.raises(OSError, match="2"):
        await kept


async def test_drain_waits_for_what_was_submitted() -> None:
    lane = Lane()
    batcher = Batcher[int, int]("test", [lane])
    future = batcher.submit(1)
    draining = asyncio.ensure_future(batcher.drain())
    await settle_loop()
    assert not draining.done()
    lane.gate.release()
    await draining
    assert future.result() == 10
