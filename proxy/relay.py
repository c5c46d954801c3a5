"""The relay: authenticate, admit, forward, meter, settle.

Whatever happens after the hold is placed, the request is settled exactly once before the last bytes
of its answer leave; if this process dies first, the hold is left to the sweeper.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import msgspec
from prometheus_client import Counter, Histogram

from proxy import firewall, metering, metrics
from proxy.admission import Admission, Admitted
from proxy.call import Call
from proxy.errors import TallygateError, UpstreamError, UpstreamProtocolError
from proxy.exchange import Exchange
from proxy.ledger import Settlement
from proxy.log import RequestLog
from proxy.principals import Principals
from proxy.settlement import Settler
from proxy.streaming import StreamRelay
from proxy.sweeper import Heartbeat
from proxy.upstream import Upstream, UpstreamAnswer
from proxy.wire.chat_answer import read_chat_answer
from proxy.wire.chat_request import parse_chat_request, upstream_body

_PATH = "/v1/chat/completions"
_ENDPOINT = "chat.completions"
_OK = 200


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """The relay's settings: bytes, and what to do with an answer that was cut."""

    max_body_bytes: int
    max_answer_bytes: int
    charge_cut_streams: bool


class Relay:
    """Serves chat completions."""

    def __init__(
        self,
        *,
        principals: Principals,
        admission: Admission,
        upstream: Upstream,
        settler: Settler,
        heartbeat: Heartbeat,
        streams: StreamRelay,
        master_key: str,
        limits: RelayLimits,
        log: RequestLog,
    ) -> None:
        self._principals = principals
        self._admission = admission
        self._upstream = upstream
        self._settler = settler
        self._heartbeat = heartbeat
        self._streams = streams
        self._master_key = master_key
        self._limits = limits
        self._log = log

    async def chat(self, exchange: Exchange) -> None:
        """Answer one chat completion, or the error that it ends in."""
        started = time.monotonic()
        model = "unknown"
        metrics.STREAMS_OPEN.inc()
        try:
            key = exchange.virtual_key
            principal = await self._principals.authenticate(key)
            request = parse_chat_request(await exchange.read_body(self._limits.max_body_bytes))
            fields = firewall.check_body(request.fields)
            admitted = await self._admission.admit(
                exchange.request_id, key, principal, request, exchange.header
            )
            model = admitted.model.name
            account_id = admitted.principal.account_id
            self._heartbeat.add(account_id, exchange.request_id)
            call = Call(exchange=exchange, request=request, admitted=admitted, started=started)
            try:
                await self._forward(call, fields)
            finally:
                self._heartbeat.remove(exchange.request_id)
        except TallygateError as error:
            if isinstance(error, UpstreamError):
                metrics.UPSTREAM_ERRORS.labels(error.code).inc()
            if exchange.status is not None:
                raise  # the answer has begun: all that is left is to break it off
            await exchange.respond_error(error)
        finally:
            metrics.STREAMS_OPEN.dec()
            self._account_for(exchange, model, started)

    async def _forward(self, call: Call, fields: Mapping[str, msgspec.Raw]) -> None:
        admitted, reading = call.admitted, call.reading
        body = upstream_body(
            call.request,
            fields=dict(fields),
            output_limit=admitted.clamped_output,
            api_key=admitted.provider_key,
        )
        headers = firewall.upstream_headers(str(call.exchange.request_id), self._master_key)
        try:
            answer = await self._upstream.post(_PATH, body, headers)
            try:
                reading.upstream_status = answer.status
                if answer.status != _OK:
                    raise await self._upstream.failure(answer, is_byok=admitted.is_byok)
                if call.request.stream:
                    await self._streams.relay(call, answer)
                else:
                    await self._whole(call, answer)
            finally:
                answer.close()
        except TallygateError as error:
            if reading.duration_ms is None:  # not settled yet
                await self._settler.submit(self._unfinished(call, error.code))
            raise
        except asyncio.CancelledError:
            if reading.duration_ms is None:
                # Nothing can be waited for any more; what is submitted is drained at the end.
                self._settler.submit(self._unfinished(call, "shutdown"))
            raise
        except Exception:
            # A defect of ours. The hold must not wait for the sweeper because of it.
            if reading.duration_ms is None:
                await self._settler.submit(self._unfinished(call, "internal_error"))
            raise

    def _unfinished(self, call: Call, code: str) -> Settlement:
        """Settle a request that failed: for review if a part was delivered, else as void."""
        reading = call.reading
        reading.error_code = code
        reading.duration_ms = call.milliseconds()
        if not call.exchange.is_streaming:
            return metering.void(call.admitted, reading)
        reading.incomplete = "stream_cut"
        return metering.settle(
            call.admitted, reading, charge_incomplete=self._limits.charge_cut_streams
        )

    async def _whole(self, call: Call, answer: UpstreamAnswer) -> None:
        admitted, reading = call.admitted, call.reading
        body = await answer.read(self._limits.max_answer_bytes)
        chat = read_chat_answer(body)
        if not chat.is_valid:
            msg = "The provider's answer could not be understood. Nothing was charged."
            raise UpstreamProtocolError(msg)
        reading.cost_text = answer.headers.get("x-litellm-response-cost")
        reading.cost_source = "header"
        reading.usage = chat.usage
        reading.model_answered = chat.model
        reading.first_byte_ms = reading.duration_ms = call.milliseconds()
        settlement = metering.settle(
            admitted, reading, charge_incomplete=self._limits.charge_cut_streams
        )
        await self._settler.settle(settlement)
        await call.exchange.respond(_OK, chat.body, _answer_headers(admitted, settlement.price))

    def _account_for(self, exchange: Exchange, model: str, started: float) -> None:
        """Count and log the request; what the log says names no key and quotes no prompt."""
        seconds = time.monotonic() - started
        requests, latency = _observers(model, str(exchange.status or 499))
        requests.inc()
        latency.observe(seconds)
        self._log.write(
            {
                "request_id": exchange.request_id,
                "endpoint": _ENDPOINT,
                "model": model,
                "status": exchange.status,
                "streamed": exchange.is_streaming,
                "client_gone": exchange.is_gone,
                "ms": round(seconds * 1000, 1),
            }
        )


@lru_cache(maxsize=4096)
def _observers(model: str, status: str) -> tuple[Counter, Histogram]:
    """Looking a metric's child up takes longer than counting on it."""
    return (
        metrics.REQUESTS.labels(_ENDPOINT, model, status),
        metrics.REQUEST_SECONDS.labels(_ENDPOINT, model, status),
    )


def _answer_headers(admitted: Admitted, price_nanos: int | None) -> list[tuple[bytes, bytes]]:
    """Headers of a whole answer; none of LiteLLM's own, which tell of the inside."""
    headers = [(b"content-type", b"application/json")]
    headers += [(name.encode(), value.encode()) for name, value in admitted.headers.items()]
    if price_nanos is not None:
        charged = admitted.credits_text(price_nanos)
        headers.append((b"x-tallygate-charge-credits", charged.encode()))
    return headers
