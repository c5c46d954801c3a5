"""Relaying a streamed answer: every event at once, the end of it only when it is settled.

The upstream is read to its end whatever the client does, because only its end tells the usage. A
client that hangs up leaves that reading bounded in time and bytes.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from pricing.money import usd_text
from proxy import metering
from proxy.admission import Admitted
from proxy.errors import TallygateError, UpstreamError
from proxy.exchange import Exchange
from proxy.ledger import Settlement
from proxy.metering import Reading
from proxy.metrics import FIRST_BYTE_SECONDS, UPSTREAM_ERRORS
from proxy.settlement import Settler
from proxy.upstream import UpstreamAnswer, explain_stream_error
from proxy.wire.chat_request import ChatRequest
from proxy.wire.chat_stream import ChatStreamMeter
from proxy.wire.sse import error_event

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """The settings of streams; times in seconds."""

    max_event_bytes: int
    drain_timeout_s: float
    drain_bytes: int
    charge_cut_streams: bool


class StreamRelay:
    """Relays streams and settles each before its last bytes leave."""

    def __init__(self, settler: Settler, limits: StreamLimits) -> None:
        self._settler = settler
        self._limits = limits

    async def relay(
        self,
        exchange: Exchange,
        request: ChatRequest,
        admitted: Admitted,
        answer: UpstreamAnswer,
        reading: Reading,
        started: float,
    ) -> None:
        """Pass the stream on and settle it.

        Raises UpstreamError, with nothing settled, where nothing of it had reached the client yet.
        """
        meter = ChatStreamMeter(request.include_usage, self._limits.max_event_bytes)
        failure = await self._pass_on(exchange, admitted, answer, meter, reading, started)
        meter.end()
        failure = failure or _reported_failure(meter)
        if failure is not None and not exchange.is_streaming and meter.usage is None:
            raise failure
        settlement = self._settlement(exchange, admitted, meter, reading, failure, started)
        await self._settler.settle(settlement)
        tail = _tail(meter, settlement, failure)
        if not exchange.is_streaming:
            await self._start(exchange, admitted, _nothing)
        await exchange.finish(tail)

    async def _pass_on(
        self,
        exchange: Exchange,
        admitted: Admitted,
        answer: UpstreamAnswer,
        meter: ChatStreamMeter,
        reading: Reading,
        started: float,
    ) -> TallygateError | None:
        """Read the upstream to its end; returns what ended it early, if anything did."""
        drained = 0
        try:
            async with asyncio.timeout(None) as deadline:

                def bound_the_drain() -> None:
                    now = asyncio.get_running_loop().time()
                    deadline.reschedule(now + self._limits.drain_timeout_s)

                async for chunk in answer.chunks():
                    passed = meter.feed(chunk)
                    if exchange.is_gone:
                        drained += len(chunk)
                        if drained > self._limits.drain_bytes:
                            return UpstreamError("drained enough", code="drain_bytes")
                    elif passed:
                        if not exchange.is_streaming:
                            await self._start(exchange, admitted, bound_the_drain)
                            reading.first_byte_ms = round((time.monotonic() - started) * 1000)
                            FIRST_BYTE_SECONDS.labels(
                                "chat.completions", admitted.model.name
                            ).observe(time.monotonic() - started)
                        await exchange.write(passed)
        except TimeoutError:
            return UpstreamError("drained long enough", code="drain_timeout")
        except TallygateError as error:
            return error
        return None

    async def _start(
        self, exchange: Exchange, admitted: Admitted, on_gone: Callable[[], None]
    ) -> None:
        headers = [
            *_STREAM_HEADERS,
            *((name.encode(), value.encode()) for name, value in admitted.headers.items()),
        ]
        await exchange.start(headers, on_gone)

    def _settlement(
        self,
        exchange: Exchange,
        admitted: Admitted,
        meter: ChatStreamMeter,
        reading: Reading,
        failure: TallygateError | None,
        started: float,
    ) -> Settlement:
        reading.cost_text = meter.cost_text
        reading.cost_source = "stream"
        reading.usage = meter.usage
        reading.model_answered = meter.model
        reading.client_gone = exchange.is_gone
        reading.delivered_bytes = meter.output_bytes
        reading.duration_ms = round((time.monotonic() - started) * 1000)
        if failure is not None:
            reading.error_code = failure.code
            UPSTREAM_ERRORS.labels(failure.code).inc()
            if meter.usage is None:
                reading.incomplete = "stream_cut"
        elif not meter.saw_done and meter.usage is None:
            reading.incomplete = "stream_cut"
        return metering.settle(
            admitted, reading, charge_incomplete=self._limits.charge_cut_streams
        )


def _nothing() -> None:
    """A client that hangs up when all is read has nothing more to bound."""


def _reported_failure(meter: ChatStreamMeter) -> TallygateError | None:
    """An error that came as an event of the stream, or the lack of its end."""
    if meter.error is not None:
        return explain_stream_error(meter.error)
    if not meter.saw_done and meter.usage is None:
        msg = "The provider's answer ended before it was complete."
        return UpstreamError(msg, code="stream_cut")
    return None


def _tail(
    meter: ChatStreamMeter, settlement: Settlement, failure: TallygateError | None
) -> bytes:
    """The last bytes for the client: the usage with its price, or the error that ended it."""
    if failure is not None and meter.usage is None:
        return error_event(failure.body())
    price = None if settlement.price is None else usd_text(settlement.price)
    return meter.closing(price)
