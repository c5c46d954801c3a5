"""Relaying a streamed answer: every event at once, the end of it only when it is settled.

The upstream is read to its end whatever the client does, because only its end tells the usage. A
client that hangs up leaves that reading bounded in time and bytes.
"""

import asyncio
from dataclasses import dataclass

from pricing.money import usd_text
from proxy import metering
from proxy.admission import Admitted
from proxy.call import Call
from proxy.errors import TallygateError, UpstreamError
from proxy.ledger import Settlement
from proxy.metrics import FIRST_BYTE_SECONDS, UPSTREAM_ERRORS
from proxy.settlement import Settler
from proxy.upstream import UpstreamAnswer, explain_stream_error
from proxy.wire.chat_stream import ChatStreamMeter
from proxy.wire.sse import error_event

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


_DRAINED = frozenset({"drain_bytes", "drain_timeout"})


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

    async def relay(self, call: Call, answer: UpstreamAnswer) -> None:
        """Pass the stream on and settle it.

        Raises UpstreamError, with nothing settled, where nothing of it had reached the client yet.
        """
        exchange = call.exchange
        meter = ChatStreamMeter(call.request.include_usage, self._limits.max_event_bytes)
        try:
            failure = await self._pass_on(call, answer, meter)
        except asyncio.CancelledError:
            # The shutdown's patience is over. What was delivered must not be forgotten.
            call.reading.usage, call.reading.delivered_bytes = None, meter.output_bytes
            raise
        exchange.stop_watching()
        meter.end()
        failure = failure or _reported_failure(meter)
        if failure is not None and not exchange.is_streaming and not meter.has_final_usage:
            raise failure
        settlement = self._settlement(call, meter, failure)
        await self._settler.settle(settlement)
        tail = _tail(meter, settlement, failure)
        if not exchange.is_streaming:
            await exchange.start(_headers(call.admitted), _nothing)
        await exchange.finish(tail)

    async def _pass_on(
        self, call: Call, answer: UpstreamAnswer, meter: ChatStreamMeter
    ) -> TallygateError | None:
        """Read the upstream to its end; returns what ended it early, if anything did."""
        exchange = call.exchange
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
                            return UpstreamError(
                                "the drain's bytes are used up", code="drain_bytes"
                            )
                    elif passed:
                        if not exchange.is_streaming:
                            await exchange.start(_headers(call.admitted), bound_the_drain)
                            _observe_first_byte(call)
                        await exchange.write(passed)
        except TimeoutError:
            return UpstreamError("the drain's time is up", code="drain_timeout")
        except TallygateError as error:
            return error
        return None

    def _settlement(
        self, call: Call, meter: ChatStreamMeter, failure: TallygateError | None
    ) -> Settlement:
        reading = call.reading
        reading.cost_source = "stream"
        is_complete = failure is None or meter.has_final_usage
        # A usage that more events should have followed counts a part of what was generated.
        reading.usage = meter.usage if is_complete else None
        reading.cost_text = meter.cost_text if is_complete else None
        reading.model_answered = meter.model
        reading.client_gone = call.exchange.is_gone
        reading.delivered_bytes = meter.output_bytes
        reading.duration_ms = call.milliseconds()
        if failure is not None:
            reading.error_code = failure.code
            if not is_complete:
                reading.incomplete = "client_gone" if failure.code in _DRAINED else "stream_cut"
            UPSTREAM_ERRORS.labels(failure.code).inc()
        return metering.settle(
            call.admitted, reading, charge_incomplete=self._limits.charge_cut_streams
        )


def _headers(admitted: Admitted) -> list[tuple[bytes, bytes]]:
    limits = [(name.encode(), value.encode()) for name, value in admitted.headers.items()]
    return _STREAM_HEADERS + limits


def _observe_first_byte(call: Call) -> None:
    call.reading.first_byte_ms = call.milliseconds()
    FIRST_BYTE_SECONDS.labels("chat.completions", call.admitted.model.name).observe(call.seconds())


def _nothing() -> None:
    """A client that hangs up when all is read has nothing more to bound."""


def _reported_failure(meter: ChatStreamMeter) -> TallygateError | None:
    """An error that came as an event of the stream, or the lack of its end."""
    if meter.error is not None:
        return explain_stream_error(meter.error)
    if not meter.saw_done and not meter.has_final_usage:
        msg = "The provider's answer ended before it was complete."
        return UpstreamError(msg, code="stream_cut")
    return None


def _tail(meter: ChatStreamMeter, settlement: Settlement, failure: TallygateError | None) -> bytes:
    """The last bytes for the client: the usage with its price, or the error that ended it."""
    if failure is not None and not meter.has_final_usage:
        return error_event(failure.body())
    price = None if settlement.price is None else usd_text(settlement.price)
    return meter.closing(price)
