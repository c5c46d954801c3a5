"""The admin API, `/admin/v1`: accounts, grants, keys, and the operator's view of everything.

Each act is written to the audit trail by the function of `schema.sql` that carries it out.
"""

import hmac
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pricing.money import MAX_AMOUNT
from proxy.accounts import KeyLimits
from proxy.api.admin_reviews import ReviewApi
from proxy.api.bodies import AccountOptions, Grant, KeyBody, NewAccount, nanos_of, read_body
from proxy.api.pages import page_by_integer, page_by_uuid
from proxy.api.services import Services
from proxy.api.shapes import Shapes, audit_event
from proxy.api.web import Handler, answer, bearer, exchange_of, resource
from proxy.errors import (
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
)
from proxy.ids import uuid7

_ACTOR = "admin"
# The same as the command line's, so that a reference counts once, whichever way it comes.
_GRANT_SOURCE = "admin"
_ROOT = "/admin/v1"
_ACCOUNT = _ROOT + "/accounts/{account_id}"


class AdminApi:
    """Endpoints for whoever holds the admin key."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._ledger = services.ledger
        self._reports = services.reports
        self._reviews = ReviewApi(services)
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit
        self._default_tier = services.default_tier
        self._key = services.admin_key.encode() if services.admin_key else None

    def routes(self) -> list[Route]:
        """Every path of the API, each behind the admin key."""
        lists = {
            "/accounts/{account_id}/usage": self._usage,
            "/accounts/{account_id}/ledger": self._entries,
            "/price-books": self._price_books,
            "/audit-trail": self._audit_trail,
        }
        return [
            self._resource(_ROOT + "/accounts", GET=self._list_accounts, POST=self._new_account),
            self._resource(_ACCOUNT, GET=self._one_account, PATCH=self._change_account),
            self._resource(_ACCOUNT + "/balance", GET=self._balance),
            self._resource(_ACCOUNT + "/grants", POST=self._grant),
            self._resource(_ACCOUNT + "/keys", GET=self._list_keys, POST=self._new_key),
            self._resource(_ACCOUNT + "/keys/{key_id}", DELETE=self._revoke_key),
            *[self._resource(_ROOT + path, GET=handler) for path, handler in lists.items()],
            *self._reviews.routes(_ROOT + "/reviews", self._resource),
        ]

    def _resource(self, path: str, **handlers: Handler) -> Route:
        return resource(path, **{name: self._guarded(each) for name, each in handlers.items()})

    def _guarded(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self._authenticate(request)
            return await handler(request)

        return endpoint

    def _authenticate(self, request: Request) -> None:
        if self._key is None:
            message = "The admin API is closed: set TALLYGATE_ADMIN_KEY and restart the service."
            raise PermissionDeniedError(message, code="admin_only")
        sent = bearer(exchange_of(request))
        if sent is None:
            message = "Send the admin key as 'Authorization: Bearer …'."
            raise AuthenticationError(message)
        if not hmac.compare_digest(sent, self._key):
            message = "This is not the admin key. Virtual keys are for /v1 and /api/v1."
            raise PermissionDeniedError(message, code="admin_only")

    # --- accounts ---

    async def _list_accounts(self, request: Request) -> Response:
        page = page_by_uuid(request)
        rows = await self._accounts.accounts(before=page.before, limit=page.limit)
        return answer(page.show(rows, "account_id", self._shapes.account))

    async def _new_account(self, request: Request) -> Response:
        body = await read_body(exchange_of(request), NewAccount)
        account_id = await self._accounts.create_account(
            name=body.name,
            tier=self._default_tier if body.tier is None else body.tier,
            credit_limit_nanos=nanos_of(
                body.credit_limit, self._nanos_per_credit, param="credit_limit", minimum=0
            ),
            actor=_ACTOR,
        )
        return answer(self._shapes.account(await self._row(account_id)), 201)

    async def _one_account(self, request: Request) -> Response:
        return answer(self._shapes.account(await self._account(request)))

    async def _change_account(self, request: Request) -> Response:
        account_id: UUID = (await self._account(request))["account_id"]
        body = await read_body(exchange_of(request), AccountOptions)
        await self._accounts.set_options(
            account_id, replay_retries=body.replay_retries, actor=_ACTOR
        )
        return answer(self._shapes.account(await self._row(account_id)))

    async def _balance(self, request: Request) -> Response:
        account = self._shapes.account(await self._account(request))
        balance: Any = account["balance"]
        return answer({**balance, "credit_limit": account["credit_limit"]})

    async def _grant(self, request: Request) -> Response:
        account = await self._account(request)
        body = await read_body(exchange_of(request), Grant)
        amount = nanos_of(body.credits, self._nanos_per_credit, param="credits")
        if account["posted"] + account["credit_limit"] + amount > MAX_AMOUNT:
            message = "The account can't hold that much. Grant less."
            raise InvalidRequestError(message, param="credits")
        done = await self._ledger.fund(
            account["account_id"],
            uuid7(),
            kind="grant",
            amount_nanos=amount,
            source=_GRANT_SOURCE,
            external_id=body.reference,
            reason=body.reason,
            actor=_ACTOR,
        )
        if done.balance is None:  # pragma: no cover - accounts are never deleted
            raise _no_account(str(account["account_id"]))
        if done.outcome == "conflict":
            message = (
                f"The reference {body.reference!r} was used for another amount on this account. "
                "Use a new reference for a new grant."
            )
            raise ConflictError(message, param="reference")
        return answer(
            {"entry_id": done.entry_id, "balance": self._shapes.balance(done.balance)}, 201
        )

    # --- keys ---

    async def _list_keys(self, request: Request) -> Response:
        page = page_by_uuid(request)
        account = await self._account(request)
        rows = await self._accounts.keys(
            account["account_id"], before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "key_id", self._shapes.key))

    async def _new_key(self, request: Request) -> Response:
        account_id: UUID = (await self._account(request))["account_id"]
        body = await read_body(exchange_of(request), KeyBody)
        budget = body.budget
        limits = KeyLimits(
            expires_at=body.expires_at,
            allowed_models=body.allowed_models,
            requests_per_minute=body.requests_per_minute,
            tokens_per_minute=body.tokens_per_minute,
            max_concurrency=body.max_concurrency,
            budget=None
            if budget is None
            else nanos_of(budget.credits, self._nanos_per_credit, param="budget.credits"),
            budget_period="total" if budget is None else budget.period,
        )
        made = await self._accounts.create_key(
            account_id, name=body.name, limits=limits, actor=_ACTOR
        )
        if made is None:
            raise ConflictError("This account is closed, so it gets no more keys.")
        # The page of one row that begins with the new key: it is shown as every list shows it.
        after = UUID(int=made.key_id.int + 1)
        (row,) = await self._accounts.keys(account_id, before=after, limit=1)
        shape = self._shapes.key(row)
        return answer({**shape, "account_id": account_id, "key": made.secret}, 201)

    async def _revoke_key(self, request: Request) -> Response:
        account = await self._account(request)
        text = request.path_params["key_id"]
        key_id = _uuid(text)
        if key_id is None or not await self._accounts.revoke_key(
            account["account_id"], key_id, actor=_ACTOR
        ):
            raise NotFoundError(f"This account has no key {text[:64]!r}.")
        return Response(status_code=204)

    # --- reports ---

    async def _usage(self, request: Request) -> Response:
        page = page_by_uuid(request)
        account = await self._account(request)
        rows = await self._reports.usage(
            account["account_id"], before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "request_id", self._shapes.admin_usage))

    async def _entries(self, request: Request) -> Response:
        page = page_by_integer(request)
        account = await self._account(request)
        rows = await self._reports.entries(
            account["account_id"], before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "seq", self._shapes.admin_entry))

    async def _price_books(self, request: Request) -> Response:
        page = page_by_integer(request)
        rows = await self._reports.price_books(before=page.before, limit=page.limit)
        return answer(page.show(rows, "version", self._shapes.price_book))

    async def _audit_trail(self, request: Request) -> Response:
        page = page_by_uuid(request)
        rows = await self._reports.audit_trail(before=page.before, limit=page.limit)
        return answer(page.show(rows, "event_id", audit_event))

    async def _account(self, request: Request) -> dict[str, Any]:
        """Read the account of the path; NotFoundError, for malformed ids too."""
        text = request.path_params["account_id"]
        account_id = _uuid(text)
        if account_id is None:
            raise _no_account(text)
        return await self._row(account_id)

    async def _row(self, account_id: UUID) -> dict[str, Any]:
        row = await self._accounts.account(account_id)
        if row is None:
            raise _no_account(str(account_id))
        return row


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _no_account(text: str) -> NotFoundError:
    return NotFoundError(f"There is no account {text[:64]!r}. GET {_ROOT}/accounts lists them.")
