"""The account API, `/api/v1`: what a customer sees of the own account, by any of its keys."""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.api.pages import page_by_integer, page_by_uuid
from proxy.api.receipts import estimate_shape, receipt
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of, resource
from proxy.endpoints import ENDPOINTS
from proxy.errors import InvalidRequestError, NotFoundError

_CHAT = "/v1/chat/completions"

_Handler = Callable[[Request, UUID], Awaitable[dict[str, Any]]]


class AccountApi:
    """Endpoints on the account whose key is sent."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._ledger = services.ledger
        self._principals = services.principals
        self._reports = services.reports
        self._estimator = services.estimator
        self._shapes = Shapes(services.nanos_per_credit)

    def routes(self) -> list[Route]:
        """Every path of the API, each behind the authentication."""
        return [
            resource("/api/v1/balance", GET=self._as_customer(self._balance)),
            resource("/api/v1/usage", GET=self._as_customer(self._usage)),
            resource("/api/v1/usage/{request_id}", GET=self._as_customer(self._receipt)),
            resource("/api/v1/estimate", POST=self._estimate),
            resource("/api/v1/ledger", GET=self._as_customer(self._entries)),
            resource("/api/v1/keys", GET=self._as_customer(self._keys)),
        ]

    def _as_customer(self, handler: _Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            # No hold is asked for here, so nothing else would notice a key that was revoked.
            principal = await self._principals.authenticate(
                exchange_of(request).virtual_key, fresh=True
            )
            return answer(await handler(request, principal.account_id))

        return endpoint

    async def _balance(self, _request: Request, account_id: UUID) -> dict[str, Any]:
        balance = await self._ledger.balance(account_id)
        if balance is None:  # pragma: no cover - accounts are never deleted
            raise NotFoundError("This account has no balance.")
        return self._shapes.balance(balance)

    async def _usage(self, request: Request, account_id: UUID) -> dict[str, Any]:
        page = page_by_uuid(request)
        rows = await self._reports.usage(account_id, before=page.before, limit=page.limit)
        return page.show(rows, "request_id", self._shapes.usage)

    async def _receipt(self, request: Request, account_id: UUID) -> dict[str, Any]:
        row = None
        with contextlib.suppress(ValueError):
            request_id = UUID(request.path_params["request_id"])
            row = await self._reports.usage_row(account_id, request_id)
        if row is None:
            raise NotFoundError("This account has no request with that id.")
        return receipt(self._shapes, row)

    async def _estimate(self, request: Request) -> Response:
        exchange = exchange_of(request)
        principal = await self._principals.authenticate(exchange.virtual_key, fresh=True)
        asked = request.query_params.get("endpoint", _CHAT)
        endpoint = ENDPOINTS.get(asked if asked.startswith("/v1/") else f"/v1/{asked.strip('/')}")
        if endpoint is None:
            known = ", ".join(ENDPOINTS)
            raise InvalidRequestError(f"endpoint must be one of {known}.", param="endpoint")
        estimate = await self._estimator.estimate(exchange, principal, endpoint)
        return answer(estimate_shape(self._shapes, estimate))

    async def _entries(self, request: Request, account_id: UUID) -> dict[str, Any]:
        page = page_by_integer(request)
        rows = await self._reports.entries(account_id, before=page.before, limit=page.limit)
        return page.show(rows, "seq", self._shapes.entry)

    async def _keys(self, request: Request, account_id: UUID) -> dict[str, Any]:
        page = page_by_uuid(request)
        rows = await self._accounts.keys(account_id, before=page.before, limit=page.limit)
        return page.show(rows, "key_id", self._shapes.key)
