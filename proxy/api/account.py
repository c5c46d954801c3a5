"""The account API, `/api/v1`: a customer's own balance, usage, ledger and keys, by virtual key."""

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from proxy.accounts import Principal
from proxy.api.services import Services
from proxy.api.shapes import (
    balance_document,
    entry_document,
    key_document,
    not_found,
    number_cursor,
    page,
    page_limit,
    usage_document,
    uuid_cursor,
)
from proxy.exchange import virtual_key


class AccountApi:
    """Reads on behalf of whoever the key belongs to."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._per_credit = services.nanos_per_credit

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/api/v1/balance", self.balance),
            Route("/api/v1/usage", self.usage),
            Route("/api/v1/ledger", self.ledger),
            Route("/api/v1/keys", self.keys),
        ]

    async def _principal(self, request: Request) -> Principal:
        key = virtual_key(request.headers.get)
        return await self._services.principals.authenticate(key, fresh=True)

    async def balance(self, request: Request) -> JSONResponse:
        """What the account has."""
        principal = await self._principal(request)
        balance = await self._services.ledger.balance(principal.account_id)
        if balance is None:
            raise not_found("account")
        return JSONResponse(balance_document(balance, self._per_credit))

    async def usage(self, request: Request) -> JSONResponse:
        """Its requests, newest first."""
        limit, before = page_limit(request), uuid_cursor(request)
        principal = await self._principal(request)
        rows = await self._services.reports.usage(principal.account_id, before=before, limit=limit)
        return JSONResponse(
            page(rows, limit, "request_id", lambda row: usage_document(row, self._per_credit))
        )

    async def ledger(self, request: Request) -> JSONResponse:
        """Its ledger entries, newest first."""
        limit, before = page_limit(request), number_cursor(request)
        principal = await self._principal(request)
        rows = await self._services.reports.entries(
            principal.account_id, before=before, limit=limit
        )
        return JSONResponse(
            page(rows, limit, "seq", lambda row: entry_document(row, self._per_credit))
        )

    async def keys(self, request: Request) -> JSONResponse:
        """Its keys, newest first, without their secrets."""
        limit, before = page_limit(request), uuid_cursor(request)
        principal = await self._principal(request)
        rows = await self._services.accounts.keys(principal.account_id, before=before, limit=limit)
        return JSONResponse(
            page(rows, limit, "key_id", lambda row: key_document(row, self._per_credit))
        )
