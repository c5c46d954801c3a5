"""The account API, `/api/v1`: what a customer sees of the own account, by any of its keys."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.accounts import Principal
from proxy.api.answers import Balance, Entry, Estimate, Key, Paged, Receipt, Usage
from proxy.api.bodies import CallBody
from proxy.api.operations import Operation, Parameter, mount
from proxy.api.pages import PAGED_BY_INTEGER, PAGED_BY_UUID, page_by_integer, page_by_uuid
from proxy.api.paths import CUSTOMER, uuid_in
from proxy.api.receipts import estimate_shape, receipt
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.endpoints import ENDPOINTS
from proxy.errors import InvalidRequestError, NotFoundError

_CHAT = "/v1/chat/completions"
_ENDPOINT = Parameter(
    name="endpoint",
    schema={"type": "string", "enum": list(ENDPOINTS), "default": _CHAT},
    summary="Which endpoint the call is for.",
)


class AccountApi:
    """Endpoints on the account whose key is sent."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._ledger = services.ledger
        self._principals = services.principals
        self._reports = services.reports
        self._estimator = services.estimator
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Principal]]:
        """Everything that the API does."""
        return [
            Operation(
                method="GET",
                path=CUSTOMER + "/balance",
                handler=self._balance,
                needs="read",
                tag="balance",
                summary="Read the balance",
                answers=Balance,
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/usage",
                handler=self._usage,
                needs="read",
                tag="usage",
                summary="List requests",
                answers=Paged[Usage],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/usage/{request_id}",
                handler=self._receipt,
                needs="read",
                tag="usage",
                summary="Read the receipt of a request",
                answers=Receipt,
            ),
            Operation(
                method="POST",
                path=CUSTOMER + "/estimate",
                handler=self._estimate,
                needs="use",
                tag="usage",
                summary="Tell what a call would cost, from the body of the call",
                answers=Estimate,
                body=CallBody,
                query=(_ENDPOINT,),
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/ledger",
                handler=self._entries,
                needs="read",
                tag="balance",
                summary="List ledger entries",
                answers=Paged[Entry],
                query=PAGED_BY_INTEGER,
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/keys",
                handler=self._keys,
                needs="read",
                tag="keys",
                summary="List the keys of the account",
                answers=Paged[Key],
                query=PAGED_BY_UUID,
            ),
        ]

    def routes(self) -> list[Route]:
        """Every path of the API, each behind the authentication."""
        return mount(self.operations(), self._authenticate)

    async def _authenticate(self, request: Request, _operation: Operation[Principal]) -> Principal:
        # No hold is asked for here, so nothing else would notice a key that was revoked.
        return await self._principals.authenticate(exchange_of(request).virtual_key, fresh=True)

    async def _balance(self, _request: Request, principal: Principal) -> Response:
        balance = await self._ledger.balance(principal.account_id)
        if balance is None:  # pragma: no cover - accounts are never deleted
            raise NotFoundError("This account has no balance.")
        return answer(self._shapes.balance(balance))

    async def _usage(self, request: Request, principal: Principal) -> Response:
        page = page_by_uuid(request)
        rows = await self._reports.usage(principal.account_id, before=page.before, limit=page.limit)
        return answer(page.show(rows, "request_id", self._shapes.usage))

    async def _receipt(self, request: Request, principal: Principal) -> Response:
        request_id = uuid_in(request, "request_id")
        row = (
            None
            if request_id is None
            else await self._reports.usage_row(principal.account_id, request_id)
        )
        if row is None:
            raise NotFoundError("This account has no request with that id.")
        return answer(receipt(self._shapes, row))

    async def _estimate(self, request: Request, principal: Principal) -> Response:
        exchange = exchange_of(request)
        asked = request.query_params.get("endpoint", _CHAT)
        endpoint = ENDPOINTS.get(asked if asked.startswith("/v1/") else f"/v1/{asked.strip('/')}")
        if endpoint is None:
            known = ", ".join(ENDPOINTS)
            raise InvalidRequestError(f"endpoint must be one of {known}.", param="endpoint")
        estimate = await self._estimator.estimate(exchange, principal, endpoint)
        return answer(estimate_shape(self._shapes, estimate))

    async def _entries(self, request: Request, principal: Principal) -> Response:
        page = page_by_integer(request)
        rows = await self._reports.entries(
            principal.account_id, before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "seq", self._shapes.entry))

    async def _keys(self, request: Request, principal: Principal) -> Response:
        page = page_by_uuid(request)
        rows = await self._accounts.keys(principal.account_id, before=page.before, limit=page.limit)
        return answer(page.show(rows, "key_id", self._shapes.key))
