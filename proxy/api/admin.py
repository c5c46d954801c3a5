"""The admin API, `/admin/v1`: accounts, grants and keys, and what an operator looks at.

Every act writes its row of the audit trail in the transaction that does it.
"""

import hmac
from collections.abc import Awaitable, Callable
from uuid import UUID

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from proxy.accounts import KeyLimits
from proxy.api.bodies import NewAccount, NewGrant, NewKeyBody, nanos_of, read_body
from proxy.api.services import Services
from proxy.api.shapes import (
    account_document,
    admin_usage_document,
    balance_document,
    entry_document,
    key_document,
    not_found,
    number_cursor,
    page,
    page_limit,
    path_id,
    time_text,
    uuid_cursor,
)
from proxy.errors import (
    AuthenticationError,
    ConflictError,
    InsufficientCreditsError,
    PermissionDeniedError,
)
from proxy.exchange import virtual_key
from proxy.ids import uuid7

ACTOR = "admin"
# Under this source a grant's reference counts once, whichever way the grant comes.
GRANT_SOURCE = "admin"

Handler = Callable[[Request], Awaitable[Response]]


class AdminApi:
    """Acts and reads with the admin key."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._per_credit = services.nanos_per_credit

    def routes(self) -> list[Route]:
        """The paths, each behind the admin key."""
        account = "/admin/v1/accounts/{account_id}"
        table: list[tuple[str, str, Handler]] = [
            ("POST", "/admin/v1/accounts", self.create_account),
            ("GET", "/admin/v1/accounts", self.accounts),
            ("GET", account, self.account),
            ("GET", f"{account}/balance", self.balance),
            ("POST", f"{account}/grants", self.grant),
            ("POST", f"{account}/keys", self.create_key),
            ("GET", f"{account}/keys", self.keys),
            ("DELETE", f"{account}/keys/{{key_id}}", self.revoke_key),
            ("GET", f"{account}/usage", self.usage),
            ("GET", f"{account}/ledger", self.ledger),
            ("GET", "/admin/v1/reviews", self.reviews),
            ("GET", "/admin/v1/price-books", self.price_books),
            ("GET", "/admin/v1/audit-trail", self.audit_trail),
        ]
        return [
            Route(path, self._guarded(handler), methods=[method]) for method, path, handler in table
        ]

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: Request) -> Response:
            self._check(virtual_key(request.headers.get))
            return await handler(request)

        return guarded

    def _check(self, key: str | None) -> None:
        if key is None:
            msg = "Send the admin key as 'Authorization: Bearer …'."
            raise AuthenticationError(msg)
        admin_key = self._services.admin_key
        if admin_key is None:
            msg = "The admin API is closed: set TALLYGATE_ADMIN_KEY to open it."
            raise PermissionDeniedError(msg, code="admin_only")
        if not hmac.compare_digest(key.encode(), admin_key.encode()):
            msg = "This needs the admin key."
            raise PermissionDeniedError(msg, code="admin_only")

    async def create_account(self, request: Request) -> JSONResponse:
        """Make an account."""
        body = await read_body(request, NewAccount)
        account_id = await self._services.accounts.create_account(
            name=body.name,
            tier=body.tier or self._services.default_tier,
            credit_limit_nanos=nanos_of(body.credit_limit, self._per_credit, param="credit_limit"),
            actor=ACTOR,
        )
        return JSONResponse(await self._account(account_id), status_code=201)

    async def accounts(self, request: Request) -> JSONResponse:
        """List accounts, newest first."""
        limit = page_limit(request)
        rows = await self._services.accounts.accounts(before=uuid_cursor(request), limit=limit)
        return JSONResponse(
            page(rows, limit, "account_id", lambda row: account_document(row, self._per_credit))
        )

    async def account(self, request: Request) -> JSONResponse:
        """Show one account."""
        return JSONResponse(await self._account(path_id(request, "account_id")))

    async def _account(self, account_id: UUID) -> dict[str, object]:
        row = await self._services.accounts.account(account_id)
        if row is None:
            raise not_found("account")
        return account_document(row, self._per_credit)

    async def balance(self, request: Request) -> JSONResponse:
        """Show what an account has."""
        balance = await self._services.ledger.balance(path_id(request, "account_id"))
        if balance is None:
            raise not_found("account")
        return JSONResponse(balance_document(balance, self._per_credit))

    async def grant(self, request: Request) -> JSONResponse:
        """Give credits, once for each reference."""
        account_id = path_id(request, "account_id")
        body = await read_body(request, NewGrant)
        funded = await self._services.ledger.fund(
            account_id,
            uuid7(),
            kind="grant",
            amount_nanos=nanos_of(body.credits, self._per_credit, param="credits", least=1),
            source=GRANT_SOURCE,
            external_id=body.reference,
            reason=body.reason,
            actor=ACTOR,
        )
        if funded.balance is None:
            raise not_found("account")
        if funded.outcome == "conflict":
            msg = f"The reference {body.reference!r} was used for another amount. Choose a new one."
            raise ConflictError(msg, param="reference")
        if funded.outcome == "insufficient_credits":
            raise InsufficientCreditsError("That is more than the account has.")
        return JSONResponse(
            {
                "entry_id": str(funded.entry_id),
                "balance": balance_document(funded.balance, self._per_credit),
            },
            status_code=201,
        )

    async def create_key(self, request: Request) -> JSONResponse:
        """Make a virtual key; its secret is shown here and never again."""
        account_id = path_id(request, "account_id")
        body = await read_body(request, NewKeyBody)
        budget = body.budget
        limits = KeyLimits(
            expires_at=body.expires_at,
            allowed_models=body.allowed_models,
            requests_per_minute=body.requests_per_minute,
            tokens_per_minute=body.tokens_per_minute,
            max_concurrency=body.max_concurrency,
            budget=None
            if budget is None
            else nanos_of(budget.credits, self._per_credit, param="budget.credits", least=1),
            budget_period="total" if budget is None else budget.period,
        )
        made = await self._services.accounts.create_key(
            account_id, name=body.name, limits=limits, actor=ACTOR
        )
        if made is None:
            raise not_found("account")
        return JSONResponse(
            {
                "id": str(made.key_id),
                "name": body.name,
                "prefix": made.prefix,
                "key": made.secret,
            },
            status_code=201,
        )

    async def keys(self, request: Request) -> JSONResponse:
        """List an account's keys, newest first, without their secrets."""
        account_id, limit = path_id(request, "account_id"), page_limit(request)
        await self._account(account_id)
        rows = await self._services.accounts.keys(
            account_id, before=uuid_cursor(request), limit=limit
        )
        return JSONResponse(
            page(rows, limit, "key_id", lambda row: key_document(row, self._per_credit))
        )

    async def revoke_key(self, request: Request) -> Response:
        """Revoke a key, at once and on every replica."""
        account_id, key_id = path_id(request, "account_id"), path_id(request, "key_id")
        if not await self._services.accounts.revoke_key(account_id, key_id, actor=ACTOR):
            raise not_found("key")
        return Response(status_code=204)

    async def usage(self, request: Request) -> JSONResponse:
        """List an account's requests with cost and price, newest first."""
        account_id, limit = path_id(request, "account_id"), page_limit(request)
        await self._account(account_id)
        rows = await self._services.reports.usage(
            account_id, before=uuid_cursor(request), limit=limit
        )
        return JSONResponse(
            page(rows, limit, "request_id", lambda row: admin_usage_document(row, self._per_credit))
        )

    async def ledger(self, request: Request) -> JSONResponse:
        """List an account's ledger entries, newest first."""
        account_id, limit = path_id(request, "account_id"), page_limit(request)
        await self._account(account_id)
        rows = await self._services.reports.entries(
            account_id, before=number_cursor(request), limit=limit
        )
        return JSONResponse(
            page(rows, limit, "seq", lambda row: entry_document(row, self._per_credit))
        )

    async def reviews(self, request: Request) -> JSONResponse:
        """List the requests of all accounts that wait for a decision, newest first."""
        limit = page_limit(request)
        rows = await self._services.reports.reviews(before=uuid_cursor(request), limit=limit)
        return JSONResponse(
            page(rows, limit, "request_id", lambda row: admin_usage_document(row, self._per_credit))
        )

    async def price_books(self, request: Request) -> JSONResponse:
        """List the versions of the price book, newest first."""
        limit = page_limit(request)
        rows = await self._services.reports.price_books(before=number_cursor(request), limit=limit)
        return JSONResponse(
            page(
                rows,
                limit,
                "version",
                lambda row: {
                    "version": row["version"],
                    "valid_from": time_text(row["valid_from"]),
                    "published_by": row["published_by"],
                    "document": row["document"],
                },
            )
        )

    async def audit_trail(self, request: Request) -> JSONResponse:
        """List what operators did, newest first."""
        limit = page_limit(request)
        rows = await self._services.reports.audit_trail(before=uuid_cursor(request), limit=limit)
        return JSONResponse(
            page(
                rows,
                limit,
                "event_id",
                lambda row: {
                    "id": str(row["event_id"]),
                    "account_id": str(row["account_id"]) if row["account_id"].int else None,
                    "at": time_text(row["at"]),
                    "actor": row["actor"],
                    "action": row["action"],
                    "detail": row["detail"],
                },
            )
        )
