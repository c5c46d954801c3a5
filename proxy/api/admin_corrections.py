"""Corrections of an account's money: refunds, adjustments, reversals, and its credit limit."""

from typing import Annotated, Any
from uuid import UUID

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from pricing.money import MAX_AMOUNT
from proxy.api.answers import Balance, Money
from proxy.api.bodies import Body, Credits, Name, Text, nanos_of, read_body
from proxy.api.operations import Operation
from proxy.api.paths import ADMIN_ACCOUNT, account_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.corrections import Corrected, Corrections
from proxy.errors import ConflictError, InvalidRequestError, NotFoundError, TallygateError
from proxy.ids import uuid7
from proxy.operators import Operator

Reason = Annotated[Text, Field(min_length=1, max_length=1000)]

_ADJUSTMENT = "adjustment"


class RefundBody(Body):
    """POST …/refunds: of a request or charge, all that is left of its price unless `credits` says.

    Without a `request_id` it is a refund of nothing in particular, and `credits` must be there.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"credits": "12.5", "reason": "an outage", "reference": "ticket-4711"}]
        }
    )

    request_id: Annotated[UUID, Field(strict=False)] | None = None
    credits: Credits | None = None
    reason: Reason
    reference: Name


class AdjustmentBody(Body):
    """POST …/adjustments: credits to give, or with a minus to take."""

    credits: Credits
    reason: Reason
    reference: Name


class ReversalBody(Body):
    """POST …/reversals: the deposit, grant, refund or adjustment to take back."""

    entry_id: Annotated[UUID, Field(strict=False)]
    reason: Reason
    reference: Name


class CreditLimitBody(Body):
    """PUT …/credit-limit: how far in credits the account may go below zero."""

    credits: Credits
    reason: Reason


class LimitedBalance(Balance):
    """A balance with how far it may go below zero."""

    credit_limit: Money


class Correction(TypedDict):
    """A correction's ledger entry and amount, and the balance after it."""

    entry_id: UUID
    amount: Money
    balance: Balance


class Refunded(Correction):
    """A refund; `refunded` is all that was given back of the request, null where it is of none."""

    request_id: UUID | None
    refunded: Money | None


class AdminCorrections:
    """Endpoints for operators who answer for money."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._ledger = services.ledger
        self._corrections = Corrections(services.pool)
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/refunds",
                handler=self._refund,
                needs="finance",
                tag="corrections",
                summary="Refund a request or a charge, or a part of it, once for each reference",
                body=RefundBody,
                answers=Refunded,
                status=201,
            ),
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/adjustments",
                handler=self._adjust,
                needs="finance",
                tag="corrections",
                summary="Give or take credits, once for each reference",
                body=AdjustmentBody,
                answers=Correction,
                status=201,
            ),
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/reversals",
                handler=self._reverse,
                needs="finance",
                tag="corrections",
                summary="Take back a deposit, grant, refund or adjustment, once for each reference",
                body=ReversalBody,
                answers=Correction,
                status=201,
            ),
            Operation(
                method="PUT",
                path=ADMIN_ACCOUNT + "/credit-limit",
                handler=self._limit,
                needs="finance",
                tag="corrections",
                summary="Set how far an account may go below zero",
                body=CreditLimitBody,
                answers=LimitedBalance,
            ),
        ]

    async def _refund(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        body = await read_body(exchange_of(request), RefundBody)
        if body.credits is None and body.request_id is None:
            message = "Name the request to refund, or the credits."
            raise InvalidRequestError(message, param="request_id")
        amount = None if body.credits is None else self._nanos(body.credits)
        if amount is not None:
            _check_room(account, amount)
        done = await self._corrections.refund(
            account["account_id"],
            request_id=body.request_id,
            amount_nanos=amount,
            reference=body.reference,
            reason=body.reason,
            actor=operator.name,
        )
        shown = self._shown(done, body.reference)
        return answer(
            {
                **shown,
                "request_id": body.request_id,
                "refunded": None if done.refunded is None else self._shapes.money(done.refunded),
            },
            201,
        )

    async def _adjust(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        body = await read_body(exchange_of(request), AdjustmentBody)
        is_taken = body.credits.startswith("-")
        amount = self._nanos(body.credits.removeprefix("-"))
        amount = -amount if is_taken else amount
        _check_room(account, amount)
        done = await self._ledger.fund(
            account["account_id"],
            uuid7(),
            kind=_ADJUSTMENT,
            amount_nanos=amount,
            source=_ADJUSTMENT,
            external_id=body.reference,
            reason=body.reason,
            actor=operator.name,
        )
        if done.balance is None:  # pragma: no cover - accounts are never deleted
            raise NotFoundError("There is no such account.")
        corrected = Corrected(done.outcome, done.balance, done.entry_id, amount)
        return answer(self._shown(corrected, body.reference), 201)

    async def _reverse(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        body = await read_body(exchange_of(request), ReversalBody)
        done = await self._corrections.reverse(
            account["account_id"],
            body.entry_id,
            reference=body.reference,
            reason=body.reason,
            actor=operator.name,
        )
        return answer(self._shown(done, body.reference), 201)

    async def _limit(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        body = await read_body(exchange_of(request), CreditLimitBody)
        limit = nanos_of(body.credits, self._nanos_per_credit, param="credits", minimum=0)
        done = await self._corrections.set_credit_limit(
            account["account_id"], limit, reason=body.reason, actor=operator.name
        )
        if not done.is_done:
            used = done.balance.held - done.balance.posted
            message = (
                f"The account uses {self._shapes.money(used)['credits']} credits of its limit. "
                "Set it to no less, or add credits first."
            )
            raise ConflictError(message, param="credits", code="credit_limit_in_use")
        return answer(
            {
                **self._shapes.balance(done.balance),
                "credit_limit": self._shapes.money(done.balance.credit_limit),
            }
        )

    def _nanos(self, credits_: str) -> int:
        return nanos_of(credits_, self._nanos_per_credit, param="credits")

    def _shown(self, done: Corrected, reference: str) -> Correction:
        if not done.is_done or done.entry_id is None or done.amount is None:
            raise self._refusal(done, reference)
        return {
            "entry_id": done.entry_id,
            "amount": self._shapes.money(done.amount),
            "balance": self._shapes.balance(done.balance),
        }

    def _refusal(self, done: Corrected, reference: str) -> TallygateError:
        match done.outcome:
            case "unknown":
                return NotFoundError(
                    "This account has no such entry, or no such request that has ended. Its "
                    "ledger and its usage list them."
                )
            case "conflict":
                message = (
                    f"The reference {reference!r} was used for something else on this account. "
                    "Use a new one."
                )
                return ConflictError(message, param="reference")
            case "insufficient_credits":
                available = self._shapes.money(done.balance.available)["credits"]
                message = (
                    f"That takes more than the {available} credits that are available. Take less, "
                    "or raise the credit limit first."
                )
                return ConflictError(message, code="insufficient_credits")
            case "exceeds":
                gone = self._shapes.money(done.refunded or 0)["credits"]
                message = (
                    f"Less is left of its price: {gone} credits were refunded already. "
                    "Leave credits out to refund what is left."
                )
                return ConflictError(message, param="credits", code="refund_exceeds_price")
            case outcome:
                return ConflictError(_REFUSALS[outcome], code=outcome)


_REFUSALS = {
    "not_charged": "This request was not charged: there is nothing to refund.",
    "not_reversible": "A reversal or an expiry is not reversed. Post an adjustment instead.",
    "expiring": "These credits expire by themselves. Post an adjustment for what is left of them.",
    "already_reversed": "This entry was reversed before, under another reference.",
}


def _check_room(account: dict[str, Any], amount: int) -> None:
    if account["posted"] + account["credit_limit"] + amount > MAX_AMOUNT:
        message = "The account can't hold that much. Post less."
        raise InvalidRequestError(message, param="credits")
