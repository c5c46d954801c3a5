"""What LiteLLM does for a customer without any charge: stored answers, and counting tokens.

Nothing of it costs the operator anything, so nothing is held or charged; but it is authenticated
against the database, since no authorization of the ledger stands behind it, and nobody gets at
what is another account's.
"""

import re

import msgspec

from proxy import firewall
from proxy.byok import choose_provider_key, members_with_key
from proxy.catalog import Catalog, Model
from proxy.dialect import Dialect
from proxy.endpoints import ENDPOINTS
from proxy.errors import NotFoundError
from proxy.exchange import Exchange
from proxy.firewall import MESSAGES
from proxy.plan import check_endpoint
from proxy.principals import Principals, check_model
from proxy.reports import Reports
from proxy.switches import Switches
from proxy.upstream import Upstream
from proxy.wire.answer import read_answer
from proxy.wire.fields import read_fields
from proxy.wire.request import upstream_body
from proxy.wire.typed_requests import parse_count_request

_RESPONSES = "/v1/responses"
_COUNT = "/v1/messages/count_tokens"
# LiteLLM's ids of responses are base64, with a prefix.
_ANSWER_ID = re.compile(r"[A-Za-z0-9_=-]{1,1024}")
_MAX_ANSWER_BYTES = 64 * 1024 * 1024


class Unmetered:
    """Serves what is free."""

    def __init__(
        self,
        *,
        principals: Principals,
        catalog: Catalog,
        switches: Switches,
        reports: Reports,
        upstream: Upstream,
        master_key: str,
        max_body_bytes: int,
        byok_headers: dict[str, str],
    ) -> None:
        self._principals = principals
        self._catalog = catalog
        self._switches = switches
        self._reports = reports
        self._upstream = upstream
        self._master_key = master_key
        self._max_body_bytes = max_body_bytes
        self._byok_headers = [
            (name, name.lower().encode(), provider) for name, provider in byok_headers.items()
        ]

    async def stored_answer(self, exchange: Exchange, method: str, answer_id: str) -> None:
        """Read (GET) or forget (DELETE) one of the account's own stored responses."""
        exchange.dialect = Dialect.RESPONSES
        principal = await self._principals.authenticate(exchange, fresh=True)
        check_endpoint(principal, ENDPOINTS[_RESPONSES])
        model = None
        if _ANSWER_ID.fullmatch(answer_id):
            model = await self._reports.model_of_answer(principal.account_id, answer_id)
        if model is None:
            raise _no_such_answer()
        served_by = self._catalog.get(model)
        await self._check_switches(model, served_by)
        provider = None if served_by is None else served_by.provider
        key = choose_provider_key(exchange.header, self._byok_headers, provider)
        # LiteLLM reads the key from the body even here.
        body = None if key is None else msgspec.json.encode(members_with_key(key))
        headers = self._headers(exchange, str(principal.account_id))
        answer = await self._upstream.send(method, f"{_RESPONSES}/{answer_id}", body, headers)
        try:
            if answer.status in {400, 404}:
                # It was not stored, or not under the key that the provider is shown now; or it was
                # made with a customer's key, whose answers LiteLLM 1.106.2 does not find again.
                raise _no_such_answer()
            if answer.status != 200:
                raise await self._upstream.failure(answer, is_byok=key is not None)
            stored = await answer.read(_MAX_ANSWER_BYTES)
        finally:
            answer.close()
        # LiteLLM writes a new id each time.
        shown = read_answer(stored, ENDPOINTS[_RESPONSES].answer, answer_id=answer_id).body
        await exchange.respond(200, shown, [(b"content-type", b"application/json")])

    async def count_tokens(self, exchange: Exchange) -> None:
        """Count the tokens of messages, in Anthropic's shape."""
        exchange.dialect = Dialect.ANTHROPIC
        principal = await self._principals.authenticate(exchange, fresh=True)
        check_endpoint(principal, ENDPOINTS["/v1/messages"])
        request = parse_count_request(await exchange.read_body(self._max_body_bytes))
        fields = firewall.check_body(request.fields, MESSAGES)
        model = self._catalog.get(request.model)
        check_model(principal, request.model, is_known=model is not None)
        if model is None:
            msg = f"The model {request.model!r} does not exist here."
            raise NotFoundError(msg, code="model_not_found", param="model")
        await self._check_switches(request.model, model)
        body = upstream_body(
            request,
            fields=fields,
            output_limit=None,
            api_key=None,
            output_limits=(),
            reports_usage=False,
        )
        headers = self._headers(exchange, str(principal.account_id))
        answer = await self._upstream.post(_COUNT, body, headers)
        try:
            if answer.status != 200:
                raise await self._upstream.failure(answer, is_byok=False)
            counted = await answer.read(_MAX_ANSWER_BYTES)
        finally:
            answer.close()
        fields = read_fields(counted)
        await exchange.respond_json(200, {"input_tokens": fields["input_tokens"]})

    async def _check_switches(self, name: str, model: Model | None) -> None:
        # No authorization stands behind these calls either, which would find an old copy out.
        switched = await self._switches.refresh()
        switched.check(name, frozenset() if model is None else model.providers)

    def _headers(self, exchange: Exchange, account_id: str) -> dict[str, str]:
        return firewall.upstream_headers(
            str(exchange.request_id),
            account_id,
            self._master_key,
            exchange.header(b"anthropic-beta"),
        )


def _no_such_answer() -> NotFoundError:
    msg = "This account has no response with that id."
    return NotFoundError(msg, code="response_not_found")
