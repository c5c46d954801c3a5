"""Recurring charges on the account plane: who pays each hour, day, week or month."""

from datetime import UTC
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.accounts import Principal
from proxy.api import charge_shapes as shapes
from proxy.api.answers import Paged
from proxy.api.bodies import read_body
from proxy.api.charge_bodies import IDEMPOTENCY_KEY, NewRecurringCharge
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import CUSTOMER, uuid_in
from proxy.api.services import Services
from proxy.api.web import answer, exchange_of
from proxy.charges import Change, Subscription
from proxy.errors import NotFoundError

_RECURRING = CUSTOMER + "/recurring-charges"
CHANGES: tuple[Change, ...] = ("pause", "resume", "cancel")
SUMMARIES = {
    "pause": "Stop charging until it is resumed",
    "resume": "Go on charging, from the running period on",
    "cancel": "Stop charging for good",
}


class RecurringApi:
    """Endpoints for customers; whoever may change the account may bind it."""

    def __init__(self, services: Services) -> None:
        self._recurring = services.recurring_charges
        self._store = services.recurring_store

    def operations(self) -> list[Operation[Principal]]:
        """Every endpoint."""
        return [
            Operation(
                method="POST",
                path=_RECURRING,
                handler=self._create,
                needs="manage",
                tag="charges",
                summary="Charge for an action each period; 200 for the same key again",
                body=NewRecurringCharge,
                headers=(IDEMPOTENCY_KEY,),
                answers=shapes.RecurringCharge,
                status=201,
                also={200: shapes.RecurringCharge},
                refuses=(404,),
            ),
            Operation(
                method="GET",
                path=_RECURRING,
                handler=self._list,
                needs="read",
                tag="charges",
                summary="List recurring charges",
                answers=Paged[shapes.RecurringCharge],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="GET",
                path=_RECURRING + "/{recurring_id}",
                handler=self._show,
                needs="read",
                tag="charges",
                summary="Read a recurring charge",
                answers=shapes.RecurringCharge,
            ),
            *(self._change(change) for change in CHANGES),
        ]

    def _change(self, change: Change) -> Operation[Principal]:
        async def handler(request: Request, principal: Principal) -> Response:
            row = await self._recurring.change(
                principal.account_id,
                recurring_in(request),
                change,
                is_operator=False,
                actor=f"key:{principal.key_id}",
            )
            return answer(shapes.recurring_charge(row))

        return Operation(
            method="POST",
            path=f"{_RECURRING}/{{recurring_id}}/{change}",
            handler=handler,
            needs="manage",
            tag="charges",
            summary=SUMMARIES[change],
            answers=shapes.RecurringCharge,
        )

    async def _create(self, request: Request, principal: Principal) -> Response:
        exchange = exchange_of(request)
        body = await read_body(exchange, NewRecurringCharge)
        row, is_new = await self._recurring.create(
            principal.account_id,
            subscription_of(body, key=exchange.header(b"idempotency-key")),
            actor=f"key:{principal.key_id}",
        )
        return answer(shapes.recurring_charge(row), 201 if is_new else 200)

    async def _list(self, request: Request, principal: Principal) -> Response:
        page = page_by_uuid(request)
        rows = await self._store.page(principal.account_id, before=page.before, limit=page.limit)
        return answer(page.show(rows, "recurring_id", shapes.recurring_charge))

    async def _show(self, request: Request, principal: Principal) -> Response:
        row = await self._recurring.recurring(principal.account_id, recurring_in(request))
        return answer(shapes.recurring_charge(row))


def subscription_of(
    body: NewRecurringCharge, *, key: str | None, operator: str | None = None
) -> Subscription:
    """What a body asks for."""
    return Subscription(
        action=body.action,
        quantity=body.quantity,
        every=body.every,
        starts_at=None if body.starts_at is None else body.starts_at.astimezone(UTC),
        ends_at=None if body.ends_at is None else body.ends_at.astimezone(UTC),
        description=body.description,
        metadata=body.metadata,
        key=key,
        operator=operator,
    )


def recurring_in(request: Request) -> UUID:
    """The id of the recurring charge that the path names; NotFoundError where it is malformed."""
    recurring_id = uuid_in(request, "recurring_id")
    if recurring_id is None:
        raise NotFoundError("This account has no recurring charge with that id.")
    return recurring_id
