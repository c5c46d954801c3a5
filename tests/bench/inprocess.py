"""The metered data plane in one process: no sockets, no PostgreSQL, nobody to wait for.

`python -m tests.bench.inprocess [calls|time|profile]`. `calls` counts how many calls of functions,
Python's and C's, a request takes: no clock is in that, so a machine under load counts what an idle
one does, and a test can hold it. `time` and `profile` are for whoever wants to see it fall.
"""

import asyncio
import cProfile
import gc
import json
import os
import pstats
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvloop
from multidict import CIMultiDict, CIMultiDictProxy

from tests.bench import canned

if TYPE_CHECKING:
    from proxy.exchange import Message, Scope
    from proxy.relay import Relay

_KEY = b"sk-" + b"x" * 43
_WARM_UP = 100
_REQUESTS = 100
_STREAMS = 5
_EVENTS = 200
# Longer than anything that requests leave to a timer, such as their lines in the log.
_LEFT_OVER_S = 0.3


class _Content:
    """What came of an answer: a chunk at a time, each on its own turn of the loop."""

    def __init__(self, chunks: list[bytes], needless: int) -> None:
        self._chunks = chunks
        self._needless = needless

    async def iter_any(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            for _ in range(self._needless):
                _nothing()
            await asyncio.sleep(0)
            yield chunk

    def at_eof(self) -> bool:
        return True


class _Response:
    """An answer as the client's library has it."""

    status = 200

    def __init__(self, chunks: list[bytes], needless: int) -> None:
        kind = "application/json" if len(chunks) == 1 else "text/event-stream"
        headers = {"content-type": kind, canned.COST_HEADER: canned.COST}
        self.headers = CIMultiDictProxy(CIMultiDict(headers))
        self.content = _Content(chunks, needless)

    def release(self) -> None:
        """Have nothing to give back."""

    close = release


class _Upstream:
    """Answers every request with the same chunks; `needless` calls are made for each of them."""

    def __init__(self) -> None:
        self.chunks = [canned.answer()]
        self.needless = 0

    async def post(self, *_: object) -> object:
        """Answer."""
        from proxy.upstream import UpstreamAnswer  # noqa: PLC0415 - see `main`

        return UpstreamAnswer(cast("Any", _Response(self.chunks, self.needless)))


def _nothing() -> None:
    """Be called."""


class DataPlane:
    """A relay whose ledger and upstream are stubs, and a client that takes what it is sent."""

    def __init__(self, relay: "Relay") -> None:
        self.upstream = _Upstream()
        self._relay = relay
        cast("Any", relay)._upstream = self.upstream  # noqa: SLF001 - as in `unledgered`

    def ask_whole(self) -> None:
        """From now on requests are answered whole."""
        self._body = canned.request_body()
        self.upstream.chunks = [canned.answer()]

    def ask_streams(self, events: int) -> None:
        """From now on requests are streamed: so many events, and those that end it."""
        self._body = canned.request_body(stream=True)
        self.upstream.chunks = [canned.content_event()] * events + [canned.closing_events()]

    async def serve(self, requests: int) -> None:
        """Serve requests one after another, and what they leave to timers."""
        from proxy.endpoints import ENDPOINTS  # noqa: PLC0415 - see `main`
        from proxy.exchange import Exchange  # noqa: PLC0415

        endpoint = ENDPOINTS["/v1/chat/completions"]
        scope: Scope = {
            "headers": [
                (b"host", b"127.0.0.1:4000"),
                (b"content-type", b"application/json"),
                (b"authorization", b"Bearer " + _KEY),
                (b"content-length", b"%d" % len(self._body)),
            ]
        }
        for _ in range(requests):
            exchange = Exchange(scope, _receiver(self._body), _send)
            await self._relay.serve(exchange, endpoint)
            assert exchange.status == 200, exchange.status
        await asyncio.sleep(_LEFT_OVER_S)


def _receiver(body: bytes) -> Callable[[], Awaitable["Message"]]:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> "Message":
        if not messages:
            await asyncio.get_running_loop().create_future()  # the client stays
        return messages.pop()

    return receive


async def _send(_: "Message") -> None:
    """Take it."""


async def make_data_plane(directory: Path) -> DataPlane:
    """Put one together, warm, with the collector as the service has it but off."""
    from tests.bench.unledgered import relay_without_ledger  # noqa: PLC0415 - see `main`

    data_plane = DataPlane(await relay_without_ledger("http://nowhere", directory, _Control()))
    data_plane.ask_streams(5)
    await data_plane.serve(_WARM_UP)
    data_plane.ask_whole()
    await data_plane.serve(_WARM_UP)
    gc.collect()
    gc.freeze()
    gc.disable()
    return data_plane


class _Control:
    """LiteLLM's control endpoints, as far as the catalog asks them."""

    async def models(self) -> list[dict[str, Any]]:
        """Return what /model/info lists."""
        return json.loads(canned.models())["data"]


async def count_calls(work: Callable[[], Awaitable[None]]) -> int:
    """Count the calls of functions while `work` is awaited, in this thread."""
    calls = 0

    def on_event(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        if event in {"call", "c_call"}:
            calls += 1

    sys.setprofile(on_event)
    try:
        await work()
    finally:
        sys.setprofile(None)
    return calls


async def calls_per_request(data_plane: DataPlane) -> dict[str, float]:
    """Count: of a request that is answered whole, of a stream, and of each event in it."""
    data_plane.ask_whole()
    whole = await count_calls(lambda: data_plane.serve(_REQUESTS))
    data_plane.ask_streams(0)
    bare = await count_calls(lambda: data_plane.serve(_REQUESTS))
    data_plane.ask_streams(_EVENTS)
    long = await count_calls(lambda: data_plane.serve(_STREAMS))
    return {
        "request": round(whole / _REQUESTS, 1),
        "stream": round(bare / _REQUESTS, 1),
        "event": round((long / _STREAMS - bare / _REQUESTS) / _EVENTS, 1),
    }


async def _calls(directory: Path) -> None:
    data_plane = await make_data_plane(directory)
    counted = await calls_per_request(data_plane)
    data_plane.upstream.needless = 10
    needless = await calls_per_request(data_plane)
    print(json.dumps({"counted": counted, "with_ten_more": needless}))


async def _time(directory: Path) -> None:
    data_plane = await make_data_plane(directory)
    for name, events in (("whole", None), ("stream of 100 events", 100)):
        if events is None:
            data_plane.ask_whole()
        else:
            data_plane.ask_streams(events)
        took: list[float] = []
        for _ in range(8):
            before = time.process_time()
            await data_plane.serve(_REQUESTS)
            took.append((time.process_time() - before) / _REQUESTS)
        print(f"{name}: {min(took) * 1e6:.1f} µs a request")


async def _profile(directory: Path) -> None:
    data_plane = await make_data_plane(directory)
    profile = cProfile.Profile()
    profile.enable()
    await data_plane.serve(10 * _REQUESTS)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(60)


def main() -> None:
    """Do what the first argument says.

    Metrics must be kept as a service keeps them, in files that its workers share, which
    prometheus_client decides at its import: so nothing of the proxy is imported before.
    """
    modes = {"calls": _calls, "time": _time, "profile": _profile}
    work = modes[sys.argv[1] if len(sys.argv) > 1 else "calls"]
    with tempfile.TemporaryDirectory(prefix="tallygate-inprocess-") as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
        uvloop.run(work(Path(directory)))


if __name__ == "__main__":
    main()
