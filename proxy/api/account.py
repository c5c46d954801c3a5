"""The account API, `/api/v1`: what a customer sees of the own account, by any of its keys."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.accounts import Principal
from proxy.api.answers import Estimate, Receipt
from proxy.api.bodies import CallBody
from proxy.api.charges import ChargeApi
from proxy.api.keys import KeyApi
from proxy.api.operations import Operation, Parameter, mount
from proxy.api.paths import CUSTOMER, uuid_in
from proxy.api.privacy import CustomerPrivacy
from proxy.api.projects import ProjectApi
from proxy.api.receipts import estimate_shape, receipt
from proxy.api.recurring import RecurringApi
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.sides import customer_side
from proxy.api.usage import UsageApi
from proxy.api.web import answer, exchange_of, take_turn
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
        self._principals = services.principals
        self._rates = services.protection.account_rates
        self._reports = services.reports
        self._estimator = services.estimator
        self._keys = KeyApi(services, customer_side())
        self._charges = ChargeApi(services)
        self._recurring = RecurringApi(services)
        self._privacy = CustomerPrivacy(services)
        self._projects = ProjectApi(services, customer_side())
        self._usage = UsageApi(services)
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Principal]]:
        """Everything that the API does."""
        return [
            *self._usage.operations(),
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
                refuses=(402, 404),
            ),
            *self._keys.operations(),
            *self._projects.operations(),
            *self._charges.operations(),
            *self._recurring.operations(),
            *self._privacy.operations(),
        ]

    def routes(self) -> list[Route]:
        """Every path of the API, each behind the authentication."""
        return mount(self.operations(), self._authenticate)

    async def _authenticate(self, request: Request, operation: Operation[Principal]) -> Principal:
        # No hold is asked for here, so nothing else would notice a key that was revoked.
        principal = await self._principals.authenticate(
            exchange_of(request), needs=operation.needs, fresh=True
        )
        take_turn(request, self._rates, principal.account_id, caller=f"key:{principal.key_id}")
        return principal

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
