"""Charges on the admin plane: what operators charge an account for, once or each period.

What they made, they alone may capture, void or cancel: the account's own keys can't evade it.
"""

from functools import partial
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.api import charge_shapes as shapes
from proxy.api.answers import Paged
from proxy.api.bodies import read_body
from proxy.api.charge_bodies import IDEMPOTENCY_KEY, Capture, NewCharge, NewRecurringCharge
from proxy.api.charges import ObservedCharges, charge_in, order_of
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN_ACCOUNT, account_in
from proxy.api.recurring import CHANGES, SUMMARIES, recurring_in, subscription_of
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.charges import Change, Ending
from proxy.operators import Operator

_CHARGES = ADMIN_ACCOUNT + "/charges"
_CHARGE = _CHARGES + "/{charge_id}"
_RECURRING = ADMIN_ACCOUNT + "/recurring-charges"


class AdminCharges:
    """Endpoints for operators."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._charges = services.charges
        self._store = services.charge_store
        self._recurring = services.recurring_charges
        self._recurring_store = services.recurring_store
        self._observed = ObservedCharges(services)
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [*self._single(), *self._repeated()]

    def _single(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="POST",
                path=_CHARGES,
                handler=self._make,
                needs="finance",
                tag="charges",
                summary="Charge an account for an action, or hold its price; 200 for a repetition",
                body=NewCharge,
                headers=(IDEMPOTENCY_KEY,),
                answers=shapes.AdminCharge,
                status=201,
                also={200: shapes.AdminCharge},
                refuses=(402,),
            ),
            Operation(
                method="GET",
                path=_CHARGES,
                handler=self._list,
                needs="read",
                tag="charges",
                summary="List an account's charges",
                answers=Paged[shapes.AdminCharge],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="GET",
                path=_CHARGE,
                handler=self._show,
                needs="read",
                tag="charges",
                summary="Read a charge",
                answers=shapes.AdminCharge,
            ),
            Operation(
                method="POST",
                path=_CHARGE + "/capture",
                handler=self._capture,
                needs="finance",
                tag="charges",
                summary="Capture a charge that is held, all of it or less",
                body=Capture,
                answers=shapes.AdminCharge,
            ),
            Operation(
                method="POST",
                path=_CHARGE + "/void",
                handler=self._void,
                needs="finance",
                tag="charges",
                summary="Give back what is held for a charge",
                answers=shapes.AdminCharge,
            ),
        ]

    def _repeated(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="POST",
                path=_RECURRING,
                handler=self._create_recurring,
                needs="finance",
                tag="charges",
                summary="Charge an account each period; 200 for the same key again",
                body=NewRecurringCharge,
                headers=(IDEMPOTENCY_KEY,),
                answers=shapes.AdminRecurringCharge,
                status=201,
                also={200: shapes.AdminRecurringCharge},
            ),
            Operation(
                method="GET",
                path=_RECURRING,
                handler=self._list_recurring,
                needs="read",
                tag="charges",
                summary="List an account's recurring charges",
                answers=Paged[shapes.AdminRecurringCharge],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="GET",
                path=_RECURRING + "/{recurring_id}",
                handler=self._show_recurring,
                needs="read",
                tag="charges",
                summary="Read a recurring charge",
                answers=shapes.AdminRecurringCharge,
            ),
            *(self._change(change) for change in CHANGES),
        ]

    async def _account_id(self, request: Request) -> UUID:
        account: dict[str, Any] = await account_in(request, self._accounts)
        return account["account_id"]

    async def _make(self, request: Request, operator: Operator) -> Response:
        exchange = exchange_of(request)
        account_id = await self._account_id(request)
        body = await read_body(exchange, NewCharge)
        read_payer = partial(self._charges.account_payer, account_id)
        key = exchange.header(b"idempotency-key")
        async with self._observed.charging(request, body.action):
            row, is_new = await self._charges.make(
                order_of(body, key=key, operator=operator.name),
                await read_payer(),
                read_payer,
                request_id=exchange.request_id,
            )
        return answer(shapes.admin_charge(self._shapes, row), 201 if is_new else 200)

    async def _list(self, request: Request, _operator: Operator) -> Response:
        account_id = await self._account_id(request)
        page = page_by_uuid(request)
        rows = await self._store.charges(account_id, before=page.before, limit=page.limit)
        shape = partial(shapes.admin_charge, self._shapes)
        return answer(page.show(rows, "request_id", shape))

    async def _show(self, request: Request, _operator: Operator) -> Response:
        account_id = await self._account_id(request)
        row = await self._charges.charge(account_id, charge_in(request))
        return answer(shapes.admin_charge(self._shapes, row))

    async def _capture(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), Capture)
        return await self._end(request, Ending("capture", body.quantity, operator.name))

    async def _void(self, request: Request, operator: Operator) -> Response:
        return await self._end(request, Ending("void", operator=operator.name))

    async def _end(self, request: Request, ending: Ending) -> Response:
        account_id = await self._account_id(request)
        row = await self._charges.end(account_id, charge_in(request), ending)
        return answer(shapes.admin_charge(self._shapes, row))

    async def _create_recurring(self, request: Request, operator: Operator) -> Response:
        exchange = exchange_of(request)
        account_id = await self._account_id(request)
        body = await read_body(exchange, NewRecurringCharge)
        key = exchange.header(b"idempotency-key")
        row, is_new = await self._recurring.create(
            account_id,
            subscription_of(body, key=key, operator=operator.name),
            actor=operator.name,
        )
        return answer(shapes.admin_recurring_charge(row), 201 if is_new else 200)

    async def _list_recurring(self, request: Request, _operator: Operator) -> Response:
        account_id = await self._account_id(request)
        page = page_by_uuid(request)
        rows = await self._recurring_store.page(account_id, before=page.before, limit=page.limit)
        return answer(page.show(rows, "recurring_id", shapes.admin_recurring_charge))

    async def _show_recurring(self, request: Request, _operator: Operator) -> Response:
        account_id = await self._account_id(request)
        row = await self._recurring.recurring(account_id, recurring_in(request))
        return answer(shapes.admin_recurring_charge(row))

    def _change(self, change: Change) -> Operation[Operator]:
        async def handler(request: Request, operator: Operator) -> Response:
            row = await self._recurring.change(
                await self._account_id(request),
                recurring_in(request),
                change,
                is_operator=True,
                actor=operator.name,
            )
            return answer(shapes.admin_recurring_charge(row))

        return Operation(
            method="POST",
            path=f"{_RECURRING}/{{recurring_id}}/{change}",
            handler=handler,
            needs="finance",
            tag="charges",
            summary=SUMMARIES[change],
            answers=shapes.AdminRecurringCharge,
        )
