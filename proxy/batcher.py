"""Group commit: the next batch is whatever queued while the last one was under way.

There is no timer. A lane takes what waits (up to a limit), flushes it, and takes again; at low load
a batch is one item and nobody waits for company, at high load the batches grow by themselves.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from proxy.metrics import BATCH_SIZE

Item = TypeVar("Item")
Result = TypeVar("Result")
Flush = Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]]


class Batcher(Generic[Item, Result]):
    """Collects items from many requests and hands them to few flushes.

    Each element of `lanes` is an independent flush, normally a connection of its own: as many
    batches are under way at once. A flush answers a result or an exception for each item, in order;
    if it raises, every item of the batch gets that exception.
    """

    def __init__(
        self, name: str, lanes: Sequence[Flush[Item, Result]], *, limit: int = 256
    ) -> None:
        self._lanes = list(lanes)
        self._limit = limit
        self._queue: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._idle = list(range(len(lanes)))
        self._tasks: set[asyncio.Task[None]] = set()
        self._sizes = BATCH_SIZE.labels(name)

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue an item; the future has its result once the batch is flushed."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._queue.append((item, future))
        if self._idle:
            task = asyncio.get_running_loop().create_task(self._run(self._idle.pop()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return future

    async def _run(self, lane: int) -> None:
        flush = self._lanes[lane]
        try:
            while self._queue:
                count = min(len(self._queue), self._limit)
                batch = [self._queue.popleft() for _ in range(count)]
                self._sizes.observe(count)
                await self._flush(flush, batch)
        finally:
            self._idle.append(lane)

    async def _flush(
        self, flush: Flush[Item, Result], batch: list[tuple[Item, asyncio.Future[Result]]]
    ) -> None:
        try:
            results = await flush([item for item, _ in batch])
            if len(results) != len(batch):
                msg = f"a flush of {len(batch)} items answered {len(results)} results"
                raise RuntimeError(msg)  # noqa: TRY301 - a defect of the flush, told to its waiters
        except Exception as error:  # noqa: BLE001 - handed on to everyone who waits for this batch
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            # Whoever waited may have been cancelled; the item is flushed all the same.
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    async def drain(self) -> None:
        """Wait until everything that was submitted is flushed."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))
