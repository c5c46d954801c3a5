"""The relay: authenticate, admit, forward, meter, settle.

Whatever happens after the hold is placed, the request is settled exactly once before the last bytes
of its answer leave; if this process dies first, the hold is left to the sweeper.
"""

import asyncio
import time

from proxy import firewall, metering, metrics
from proxy.accounts import Principal
from proxy.admission import Admission
from proxy.byok import texts_with_key
from proxy.call import Call
from proxy.endpoints import Endpoint
from proxy.errors import (
    NotFoundError,
    TallygateError,
    UpstreamError,
    UpstreamProtocolError,
)
from proxy.exchange import Exchange
from proxy.intake import Asked, Intake
from proxy.keepalive import KeepAlive
from proxy.ledger import Settlement
from proxy.log import RequestLog
from proxy.metering import MeteringPolicy
from proxy.principals import Principals
from proxy.repeats import Repeats
from proxy.reports import Reports
from proxy.settlement import Settler
from proxy.streaming import StreamRelay
from proxy.sweeper import Heartbeat
from proxy.upstream import Upstream, UpstreamAnswer
from proxy.wire.answer import as_text, read_answer
from proxy.wire.form import FormBody
from proxy.wire.request import upstream_body

_OK = 200
_JSON = b"application/json"
_TEXT = b"text/plain; charset=utf-8"


class Relay:
    """Serves every endpoint that is metered."""

    def __init__(
        self,
        *,
        principals: Principals,
        admission: Admission,
        repeats: Repeats,
        reports: Reports,
        upstream: Upstream,
        settler: Settler,
        heartbeat: Heartbeat,
        keep_alive: KeepAlive,
        streams: StreamRelay,
        intake: Intake,
        policy: MeteringPolicy,
        master_key: str,
        max_answer_bytes: int,
        log: RequestLog,
    ) -> None:
        self._principals = principals
        self._admission = admission
        self._repeats = repeats
        self._reports = reports
        self._upstream = upstream
        self._settler = settler
        self._heartbeat = heartbeat
        self._keep_alive = keep_alive
        self._streams = streams
        self._policy = policy
        self._master_key = master_key
        self._intake = intake
        self._max_answer_bytes = max_answer_bytes
        self._log = log

    async def serve(self, exchange: Exchange, endpoint: Endpoint) -> None:
        """Answer one request, or with the error that it ends in."""
        started = time.monotonic()
        exchange.dialect = endpoint.dialect
        model = "unknown"
        asked: Asked | None = None
        metrics.OBSERVER.begin()
        try:
            principal = await self._principals.authenticate(exchange)
            asked = await self._intake.read(exchange, endpoint)
            if asked.request.continues is not None:
                await self._check_ownership(principal, asked.request.continues)
            repeat = await self._repeats.begin(exchange, principal, endpoint.name, asked.identity)
            if repeat.answer is not None:
                # No hold is asked for, so nothing else would notice a key that was revoked.
                await self._principals.authenticate(exchange, fresh=True)
                await exchange.respond(
                    repeat.answer.status, repeat.answer.body, repeat.answer.headers
                )
                return
            try:
                admitted = await self._admission.admit(
                    exchange, principal=principal, endpoint=endpoint, request=asked.request
                )
                model = admitted.model.name
                call = Call(exchange=exchange, admitted=admitted, repeat=repeat, started=started)
                await self._carry_out(call, asked)
            finally:
                await repeat.forget()
        except TallygateError as error:
            if isinstance(error, UpstreamError):
                metrics.UPSTREAM_ERRORS.labels(error.code).inc()
            await _tell(exchange, endpoint, error)
        finally:
            if asked is not None:
                asked.close()
            self._account_for(exchange, endpoint.name, model, started)

    async def _check_ownership(self, principal: Principal, answer_id: str) -> None:
        """Refuse a prompt that goes on from what is not this account's own stored answer."""
        if await self._reports.model_of_answer(principal.account_id, answer_id) is None:
            msg = "This account has no response with that id."
            raise NotFoundError(msg, code="response_not_found", param="previous_response_id")

    async def _carry_out(self, call: Call, asked: Asked) -> None:
        """Forward an admitted request and settle it, whatever comes of it."""
        exchange = call.exchange
        self._heartbeat.add(call.admitted.principal.account_id, exchange.request_id)
        if call.request.stream and call.endpoint.is_events:
            self._keep_alive.add(call)
        try:
            await self._forward(call, asked)
        except TallygateError as error:
            if not call.is_settled:
                await self._settler.submit(self._unfinished(call, error.code))
            raise
        except asyncio.CancelledError:
            if not call.is_settled:
                # Nothing can be waited for any more; what is submitted is drained at the end.
                self._settler.submit(self._unfinished(call, "shutdown"))
            raise
        except Exception:
            # A defect of ours. The hold must not wait for the sweeper because of it.
            if not call.is_settled:
                await self._settler.submit(self._unfinished(call, "internal_error"))
            raise
        finally:
            self._keep_alive.remove(call)
            self._heartbeat.remove(exchange.request_id)

    async def _forward(self, call: Call, asked: Asked) -> None:
        answer = await self._send(call, asked)
        try:
            call.reading.upstream_status = answer.status
            if answer.status != _OK:
                raise await self._upstream.failure(answer, is_byok=call.admitted.is_byok)
            if call.request.stream:
                await self._streams.relay(call, answer)
            else:
                await self._whole(call, answer)
        finally:
            answer.close()

    async def _send(self, call: Call, asked: Asked) -> UpstreamAnswer:
        admitted, endpoint = call.admitted, call.endpoint
        headers = firewall.upstream_headers(
            call.exchange.request_text,
            admitted.principal.account_text,
            self._master_key,
            call.exchange.header(b"anthropic-beta"),
        )
        if call.request.form is not None:
            key = admitted.provider_key
            extra = {} if key is None else texts_with_key(key)
            form = FormBody(asked.texts, call.request.form.files, extra)
            return await self._upstream.post(
                endpoint.path, form.chunks(), {**headers, **form.headers}
            )
        body = upstream_body(
            call.request,
            fields=asked.fields,
            output_limit=admitted.output_limit,
            api_key=admitted.provider_key,
            output_limits=endpoint.output_limits,
            reports_usage=endpoint.reports_usage,
        )
        return await self._upstream.post(endpoint.path, body, headers)

    def _unfinished(self, call: Call, code: str) -> Settlement:
        """Settle a request that failed: for review if a part was delivered, else as void.

        A stream that was delivered but for its last event is charged as the whole that it is.
        """
        if call.settlement is not None and call.has_delivered:
            return call.settlement
        reading = call.reading
        reading.error_code = code
        reading.duration_ms = call.milliseconds()
        if not call.has_delivered:
            return metering.void(call.admitted, reading)
        reading.incomplete = "stream_cut"
        return metering.settle(call.admitted, reading, self._policy)

    async def _whole(self, call: Call, upstream_answer: UpstreamAnswer) -> None:
        reading = call.reading
        answer = read_answer(
            await upstream_answer.read(self._max_answer_bytes), call.endpoint.answer
        )
        if not answer.is_valid:
            msg = "The provider's answer could not be understood. Nothing was charged."
            raise UpstreamProtocolError(msg)
        metering.read_cost_headers(reading, upstream_answer.headers)
        reading.usage = answer.usage
        reading.model_answered = answer.model
        reading.answer_id = answer.answer_id
        reading.service_tier = answer.service_tier
        reading.first_byte_ms = reading.duration_ms = call.milliseconds()
        settlement = metering.settle(call.admitted, reading, self._policy)
        body = as_text(answer.body) if call.request.is_text else answer.body
        headers = call.headers(_TEXT if call.request.is_text else _JSON)
        if settlement.price is not None:
            charged = call.admitted.credits_text(settlement.price)
            headers.append((b"x-tallygate-charge-credits", charged.encode()))
        await call.repeat.keep(call.exchange, headers, body)
        call.is_settled = True
        await self._settler.settle(settlement)
        call.repeat.charged()
        await call.exchange.respond(_OK, body, headers)

    def _account_for(self, exchange: Exchange, endpoint: str, model: str, started: float) -> None:
        """Count and log the request; what the log says names no key and quotes no prompt."""
        seconds = time.monotonic() - started
        metrics.OBSERVER.end(endpoint, model, exchange.status or 499, seconds)
        self._log.write(
            request_id=exchange.request_text,
            endpoint=endpoint,
            model=model,
            status=exchange.status,
            streamed=exchange.is_streaming,
            client_gone=exchange.is_gone,
            ms=round(seconds * 1000, 1),
        )


async def _tell(exchange: Exchange, endpoint: Endpoint, error: TallygateError) -> None:
    """Answer with an error, in whatever way is still open."""
    if exchange.status is None:
        await exchange.respond_error(error)
    elif exchange.is_streaming and endpoint.is_events:
        await exchange.finish(endpoint.dialect.error_event(error, exchange.request_id))
    else:
        raise error  # the answer has begun: all that is left is to break it off
