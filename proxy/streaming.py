"""Relaying a streamed answer: every event at once, the end of it only when it is settled.

The upstream is read to its end whatever the client does, because only its end tells the usage. A
client that hangs up leaves that reading bounded in time and bytes.
"""

import asyncio
from dataclasses import dataclass

from pricing.money import usd_text
from proxy import metering
from proxy.call import Call
from proxy.errors import TallygateError, UpstreamError
from proxy.keepalive import EVENT_STREAM, STREAM_HEADERS, KeepAlive
from proxy.ledger import Settlement
from proxy.livecost import LiveCost
from proxy.metering import MeteringPolicy
from proxy.metrics import FIRST_BYTE_SECONDS, UPSTREAM_ERRORS
from proxy.settlement import Settler
from proxy.upstream import UpstreamAnswer, explain_stream_error
from proxy.wire.meter import StreamMeter

_DRAINED = frozenset({"drain_bytes", "drain_timeout"})


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """The settings of streams; times in seconds."""

    max_event_bytes: int
    drain_timeout_s: float
    drain_bytes: int


class StreamRelay:
    """Relays streams and settles each before its last bytes leave."""

    def __init__(
        self,
        settler: Settler,
        keep_alive: KeepAlive,
        policy: MeteringPolicy,
        limits: StreamLimits,
    ) -> None:
        self._settler = settler
        self._keep_alive = keep_alive
        self._policy = policy
        self._limits = limits

    async def relay(self, call: Call, answer: UpstreamAnswer) -> None:
        """Pass the stream on and settle it.

        Raises UpstreamError, with nothing settled, where nothing of it had reached the client yet.
        Raises it with all settled where the answer is no stream of events, so that breaking it off
        is the only way to say that it is not whole.
        """
        exchange = call.exchange
        meter = call.endpoint.make_meter(call.request, self._limits.max_event_bytes)
        metering.read_cost_headers(call.reading, answer.headers)
        headers = _headers(call, answer)
        try:
            failure = await self._pass_on(call, answer, meter, headers)
        except asyncio.CancelledError:
            # The shutdown's patience is over. What was delivered must not be forgotten.
            call.reading.usage, call.reading.delivered_bytes = None, meter.output_bytes
            raise
        exchange.stop_watching()
        self._keep_alive.remove(call)
        if failure is None:
            meter.end()
            failure = _reported_failure(meter)
        is_whole = failure is None or meter.has_final_usage
        if failure is not None and not is_whole and _can_be_told(call, failure):
            raise failure
        settlement = self._settlement(call, meter, failure, is_whole=is_whole)
        tail = _tail(call, meter, settlement, None if is_whole else failure)
        if is_whole:
            call.settlement = settlement
            await call.repeat.keep(exchange, headers, tail)
        call.is_settled = True
        await self._settler.settle(settlement)
        if is_whole:
            call.repeat.charged()
        elif failure is not None and not call.endpoint.is_events:
            raise failure
        if not exchange.is_streaming:
            await exchange.start(headers)
        await exchange.finish(tail)

    async def _pass_on(
        self,
        call: Call,
        answer: UpstreamAnswer,
        meter: StreamMeter,
        headers: list[tuple[bytes, bytes]],
    ) -> TallygateError | None:
        """Read the upstream to its end; returns what ended it early, if anything did."""
        exchange = call.exchange
        live_cost = LiveCost(call, meter) if _tells_live_cost(call) else None
        drained = 0
        try:
            async with asyncio.timeout(None) as deadline:

                def bound_the_drain() -> None:
                    now = asyncio.get_running_loop().time()
                    deadline.reschedule(now + self._limits.drain_timeout_s)

                exchange.when_gone(bound_the_drain)
                async for chunk in answer.chunks():
                    passed = meter.feed(chunk)
                    if passed and call.has_delivered:
                        call.repeat.add(passed)
                        await exchange.write(passed)
                    elif passed:
                        await self._deliver_first(call, passed, headers)
                    if exchange.is_gone:
                        drained += len(chunk)
                        if drained > self._limits.drain_bytes:
                            return UpstreamError(
                                "the drain's bytes are used up", code="drain_bytes"
                            )
                    elif live_cost is not None and passed and (comment := live_cost.running()):
                        await exchange.write(comment)
        except TimeoutError:
            return UpstreamError("the drain's time is up", code="drain_timeout")
        except TallygateError as error:
            return error
        return None

    async def _deliver_first(
        self, call: Call, passed: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        """Begin the answer; a client that has gone counts as having got it."""
        exchange = call.exchange
        call.repeat.add(passed)
        if not exchange.is_streaming and not exchange.is_gone:
            await exchange.start(headers)
        call.has_delivered = True
        _observe_first_byte(call)
        await exchange.write(passed)

    def _settlement(
        self,
        call: Call,
        meter: StreamMeter,
        failure: TallygateError | None,
        *,
        is_whole: bool,
    ) -> Settlement:
        reading = call.reading
        # A sound is paid for by what was asked for, whether or not anybody hears it to its end.
        was_drained = failure is not None and failure.code in _DRAINED
        is_complete = is_whole or (was_drained and not call.endpoint.is_events)
        # A usage that more events should have followed counts a part of what was generated.
        reading.usage = meter.usage if is_complete else None
        if call.endpoint.is_events:
            # LiteLLM's headers hold a decoy here: it knew no cost when it wrote them.
            reading.cost_source, reading.margin_text = "stream", None
            reading.cost_text = meter.cost_text if is_complete else None
        reading.model_answered = meter.model
        reading.answer_id = meter.answer_id
        reading.service_tier = meter.service_tier
        reading.client_gone = call.exchange.is_gone
        reading.delivered_bytes = meter.output_bytes
        reading.duration_ms = call.milliseconds()
        if failure is not None:
            reading.error_code = failure.code
            if not is_complete:
                reading.incomplete = "client_gone" if was_drained else "stream_cut"
            UPSTREAM_ERRORS.labels(failure.code).inc()
        return metering.settle(call.admitted, reading, self._policy)


def _headers(call: Call, answer: UpstreamAnswer) -> list[tuple[bytes, bytes]]:
    if call.endpoint.is_events:
        return [*call.headers(EVENT_STREAM), *STREAM_HEADERS]
    return call.headers(answer.headers.get("content-type", "application/octet-stream").encode())


def _can_be_told(call: Call, failure: TallygateError) -> bool:
    """Whether nothing was delivered, so that the error is the answer and nobody is charged.

    Where the client left and the drain's bounds are reached it is not: what the provider goes on
    with is not known, and somebody has to look.
    """
    return not call.has_delivered and failure.code not in _DRAINED


def _tells_live_cost(call: Call) -> bool:
    # Only events have comments: in a file they would be a part of it.
    return call.request.live_cost and call.endpoint.is_events


def _observe_first_byte(call: Call) -> None:
    call.reading.first_byte_ms = call.milliseconds()
    FIRST_BYTE_SECONDS.labels(call.endpoint.name, call.admitted.model.name).observe(call.seconds())


def _reported_failure(meter: StreamMeter) -> TallygateError | None:
    """An error that came as an event of the stream, or the lack of its end."""
    if meter.error is not None:
        return explain_stream_error(meter.error)
    if not meter.saw_done and not meter.has_final_usage:
        msg = "The provider's answer ended before it was complete."
        return UpstreamError(msg, code="stream_cut")
    return None


def _tail(
    call: Call, meter: StreamMeter, settlement: Settlement, failure: TallygateError | None
) -> bytes:
    """The last bytes for the client: the usage with its price, or the error that ended it."""
    if failure is not None:
        return call.endpoint.dialect.error_event(failure, call.exchange.request_id)
    price = None if settlement.price is None else usd_text(settlement.price)
    comment = LiveCost.final(call, settlement.price) if _tells_live_cost(call) else b""
    return comment + meter.closing(price)
