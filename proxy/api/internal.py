"""`/internal/v1`: what the witness inside LiteLLM reports to, and no customer ever sees."""

import hmac

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.api.services import Services
from proxy.api.web import answer, bearer, exchange_of, resource
from proxy.errors import AuthenticationError, InvalidRequestError
from proxy.witness import Report, WitnessReports

# A hundred reports are a tenth of it.
_MAX_BODY_BYTES = 1024 * 1024


class _Batch(msgspec.Struct):
    """What is posted: reports, and how many were lost before them."""

    reports: list[msgspec.Raw]
    dropped: int = 0


class InternalApi:
    """Takes reports where a token is set; without one there is no such path."""

    def __init__(self, services: Services) -> None:
        self._witness = services.witness
        self._token = services.witness_token

    def routes(self) -> list[Route]:
        """Every path."""
        witness, token = self._witness, self._token
        if not token:
            return []

        async def take(request: Request) -> Response:
            return await _take(request, witness, token.encode())

        return [resource("/internal/v1/witness", POST=take)]


async def _take(request: Request, witness: WitnessReports, token: bytes) -> Response:
    """Queue what can be read; a report that can't is counted and holds up none of the others."""
    exchange = exchange_of(request)
    sent = bearer(exchange)
    if sent is None or not hmac.compare_digest(sent, token):
        message = "Send TALLYGATE_WITNESS_TOKEN as 'Authorization: Bearer …'."
        raise AuthenticationError(message, code="invalid_token")
    body = await exchange.read_body(_MAX_BODY_BYTES)
    try:
        batch = msgspec.json.decode(body, type=_Batch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        message = f"The body is no batch of reports: {error}."
        raise InvalidRequestError(message) from None
    reports: list[Report] = []
    for raw in batch.reports:
        try:
            reports.append(msgspec.json.decode(raw, type=Report))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    malformed = len(batch.reports) - len(reports)
    witness.take(reports, malformed=malformed, dropped=max(batch.dropped, 0))
    return answer({"taken": len(reports)}, 202)
