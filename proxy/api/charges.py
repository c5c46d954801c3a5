"""Charges on the account plane: actions and their prices, and what the account pays for them."""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy import metrics
from proxy.accounts import Principal
from proxy.api import charge_shapes as shapes
from proxy.api.answers import Paged
from proxy.api.bodies import read_body
from proxy.api.charge_bodies import IDEMPOTENCY_KEY, Capture, NewCharge
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import CUSTOMER, uuid_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.charges import Ending, Order, payer_of
from proxy.errors import NotFoundError, PermissionDeniedError, TallygateError
from proxy.principals import may_use_endpoint

_CHARGES = CUSTOMER + "/charges"
_CHARGE = _CHARGES + "/{charge_id}"
_ENDPOINT = "charges"


class ObservedCharges:
    """Counts and logs what is charged, as the relay does with requests."""

    def __init__(self, services: Services) -> None:
        self._log = services.request_log
        self._price_books = services.price_books

    @asynccontextmanager
    async def charging(self, request: Request, action: str) -> AsyncGenerator[None]:
        """Observe the making of a charge."""
        started, status = time.monotonic(), 500
        metrics.OBSERVER.begin()
        try:
            yield
            status = 201
        except TallygateError as error:
            status = error.status
            raise
        finally:
            seconds = time.monotonic() - started
            is_known = (
                self._price_books.is_known
                and action in self._price_books.current.book.action_nanocredits
            )
            model = action if is_known else "unknown"
            metrics.OBSERVER.end(_ENDPOINT, model, status, seconds)
            self._log.write(
                request_id=str(exchange_of(request).request_id),
                endpoint=_ENDPOINT,
                model=model,
                status=status,
                ms=round(seconds * 1000, 1),
            )


class ChargeApi:
    """Endpoints for customers."""

    def __init__(self, services: Services) -> None:
        self._charges = services.charges
        self._store = services.charge_store
        self._observed = ObservedCharges(services)
        self._principals = services.principals
        self._price_books = services.price_books
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Principal]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=CUSTOMER + "/actions",
                handler=self._actions,
                needs="read",
                tag="charges",
                summary="List the actions that can be charged for, with the price of one",
                answers=Paged[shapes.Action],
            ),
            Operation(
                method="POST",
                path=_CHARGES,
                handler=self._make,
                needs="use",
                tag="charges",
                summary="Charge for an action, or hold its price; 200 for the same key again",
                body=NewCharge,
                headers=(IDEMPOTENCY_KEY,),
                answers=shapes.Charge,
                status=201,
                also={200: shapes.Charge},
                refuses=(402, 404),
            ),
            Operation(
                method="GET",
                path=_CHARGES,
                handler=self._list,
                needs="read",
                tag="charges",
                summary="List charges",
                answers=Paged[shapes.Charge],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="GET",
                path=_CHARGE,
                handler=self._show,
                needs="read",
                tag="charges",
                summary="Read a charge",
                answers=shapes.Charge,
            ),
            Operation(
                method="POST",
                path=_CHARGE + "/capture",
                handler=self._capture,
                needs="use",
                tag="charges",
                summary="Capture a charge that is held, all of it or less",
                body=Capture,
                answers=shapes.Charge,
            ),
            Operation(
                method="POST",
                path=_CHARGE + "/void",
                handler=self._void,
                needs="use",
                tag="charges",
                summary="Give back what is held for a charge",
                answers=shapes.Charge,
            ),
        ]

    async def _actions(self, _request: Request, _principal: Principal) -> Response:
        published = self._price_books.current
        actions = [
            shapes.action(name, nanocredits, published.nanos_per_credit)
            for name, nanocredits in sorted(published.book.action_nanocredits.items())
        ]
        return answer({"data": actions, "next_cursor": None})

    async def _make(self, request: Request, principal: Principal) -> Response:
        exchange = exchange_of(request)
        body = await read_body(exchange, NewCharge)
        if not may_use_endpoint(principal, _ENDPOINT):
            message = (
                "This API key may not be used for charges. Use another key, or add 'charges' to "
                "its allowed_endpoints."
            )
            raise PermissionDeniedError(message, code="endpoint_not_allowed")

        async def reread_payer():  # noqa: ANN202 - as payer_of
            return payer_of(await self._principals.authenticate(exchange, needs="use", fresh=True))

        async with self._observed.charging(request, body.action):
            row, is_new = await self._charges.make(
                order_of(body, key=exchange.header(b"idempotency-key")),
                payer_of(principal),
                reread_payer,
                request_id=exchange.request_id,
            )
        return answer(shapes.charge(self._shapes, row), 201 if is_new else 200)

    async def _list(self, request: Request, principal: Principal) -> Response:
        page = page_by_uuid(request)
        rows = await self._store.charges(principal.account_id, before=page.before, limit=page.limit)
        return answer(page.show(rows, "request_id", lambda row: shapes.charge(self._shapes, row)))

    async def _show(self, request: Request, principal: Principal) -> Response:
        row = await self._charges.charge(principal.account_id, charge_in(request))
        return answer(shapes.charge(self._shapes, row))

    async def _capture(self, request: Request, principal: Principal) -> Response:
        body = await read_body(exchange_of(request), Capture)
        return await self._end(request, principal, Ending("capture", body.quantity))

    async def _void(self, request: Request, principal: Principal) -> Response:
        return await self._end(request, principal, Ending("void"))

    async def _end(self, request: Request, principal: Principal, ending: Ending) -> Response:
        row = await self._charges.end(principal.account_id, charge_in(request), ending)
        return answer(shapes.charge(self._shapes, row))


def order_of(body: NewCharge, *, key: str | None, operator: str | None = None) -> Order:
    """What a body asks for."""
    return Order(
        action=body.action,
        quantity=body.quantity,
        hold_s=body.hold_s,
        description=body.description,
        metadata=body.metadata,
        key=key,
        operator=operator,
    )


def charge_in(request: Request) -> UUID:
    """The id of the charge that the path names; NotFoundError where it is malformed."""
    charge_id = uuid_in(request, "charge_id")
    if charge_id is None:
        raise NotFoundError("This account has no charge with that id.")
    return charge_id
