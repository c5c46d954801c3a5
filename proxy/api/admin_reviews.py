"""The review queue, `/admin/v1/reviews`: what waits for an operator, and what is decided of it."""

from datetime import timedelta
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response

from pricing.errors import PricingError
from proxy.api.answers import AdminUsage, Paged, ReviewCount, ReviewCounts
from proxy.api.bodies import ReviewDecision, nanos_of, picos_of, read_body
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN, uuid_in, uuid_or_none
from proxy.api.services import Services
from proxy.api.shapes import Shapes, utc
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, InvalidRequestError, NotFoundError
from proxy.operators import Operator
from proxy.reports import ReviewFilter, Row
from proxy.reviews import Decision, Resolved, Reviews

_REVIEWS = ADMIN + "/reviews"
_MAX_AGE_S = 10 * 366 * 86_400
_FILTERS = (
    Parameter(name="reason", schema={"type": "string"}, summary="Why they wait."),
    Parameter(
        name="account_id",
        schema={"type": "string", "format": "uuid"},
        summary="Those of one account.",
    ),
    Parameter(name="model", schema={"type": "string"}, summary="Those of one model."),
    Parameter(
        name="older_than_s",
        schema={"type": "integer", "minimum": 0, "maximum": _MAX_AGE_S},
        summary="Those that began at least so many seconds ago.",
    ),
)
_REFUSALS = {
    "not_waiting": "This request waits for no decision: it was settled meanwhile.",
    "not_charged": "This request was not charged, so it has no price to change: charge it.",
    "already_charged": "This request is charged already: reprice it, or waive the review.",
    "refunded": "More was refunded of this request than that. Reverse a refund first.",
    "stale": "This request changed while it was decided on. Look at it again.",
}


class ReviewApi:
    """Endpoints for whoever looks at the queue."""

    def __init__(self, services: Services) -> None:
        self._reports = services.reports
        self._reviews = Reviews(services.pool, services.reports)
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=_REVIEWS,
                handler=self._list,
                needs="read",
                tag="reviews",
                summary="List the requests that wait for a decision",
                answers=Paged[AdminUsage],
                query=(*PAGED_BY_UUID, *_FILTERS),
            ),
            Operation(
                method="GET",
                path=_REVIEWS + "/summary",
                handler=self._summary,
                needs="read",
                tag="reviews",
                summary="Count what waits, by reason",
                answers=ReviewCounts,
            ),
            Operation(
                method="POST",
                path=_REVIEWS + "/{request_id}",
                handler=self._resolve,
                needs="finance",
                tag="reviews",
                summary="Charge, waive or reprice a request",
                body=ReviewDecision,
                answers=AdminUsage,
            ),
        ]

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        rows = await self._reports.reviews(_filter(request), before=page.before, limit=page.limit)
        return answer(page.show(rows, "request_id", self._shapes.admin_usage))

    async def _summary(self, _request: Request, _operator: Operator) -> Response:
        rows = await self._reports.review_counts()
        return answer({"data": [self._count(row) for row in rows]})

    def _count(self, row: Row) -> ReviewCount:
        return {
            "reason": row["review_reason"],
            "charged": row["is_charged"],
            "requests": row["requests"],
            "oldest_at": utc(row["oldest_at"]),
            "held": self._shapes.money(row["held"]),
        }

    async def _resolve(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), ReviewDecision)
        request_id = uuid_in(request, "request_id")
        if request_id is None:
            raise _no_request()
        try:
            resolved = await self._reviews.resolve(
                body.account_id,
                request_id,
                decision_of(body.decision, body.credits, body.cost_usd, self._nanos_per_credit),
                actor=operator.name,
                reason=body.reason,
            )
        except PricingError as error:
            message = f"No price can be made of this cost: {error}. Name a price in credits."
            raise InvalidRequestError(message, param="cost_usd") from None
        if resolved.row is None:
            raise _no_request()
        if not resolved.is_done:
            raise ConflictError(refusal(resolved), param="decision")
        return answer(self._shapes.admin_usage(resolved.row))


def decision_of(
    kind: Literal["charge", "waive", "reprice"],
    credits_: str | None,
    cost_usd: str | None,
    nanos_per_credit: int,
) -> Decision:
    """Read a decision; InvalidRequestError where it does not say one price, or an impossible."""
    if kind == "waive":
        if (credits_, cost_usd) != (None, None):
            message = "To waive is to leave the price as it is: name none."
            raise InvalidRequestError(message, param="credits" if credits_ else "cost_usd")
        return Decision(kind)
    if (credits_ is None) == (cost_usd is None):
        message = "Name either a price in credits or what it cost in US dollars."
        raise InvalidRequestError(message, param="credits")
    if credits_ is not None:
        # A charge of nothing is a waiver; a price may well be lowered to nothing.
        least = 1 if kind == "charge" else 0
        nanos = nanos_of(credits_, nanos_per_credit, param="credits", minimum=least)
        return Decision(kind, price_nanos=nanos)
    return Decision(kind, cost_picos=picos_of(cost_usd or "", param="cost_usd"))


def refusal(resolved: Resolved) -> str:
    """Say why a decision was not carried out."""
    if resolved.outcome == "conflict" and resolved.row is not None:
        decided = resolved.row["resolution"]
        return f"This request was decided on before ({decided}), otherwise than now."
    return _REFUSALS[resolved.outcome]


def _filter(request: Request) -> ReviewFilter:
    asked = request.query_params
    account = asked.get("account_id")
    account_id = None if account is None else uuid_or_none(account)
    if account is not None and account_id is None:
        raise InvalidRequestError("account_id must be the id of an account.", param="account_id")
    age = asked.get("older_than_s")
    if age is not None and not (
        age.isascii() and age.isdigit() and len(age) < 12 and int(age) <= _MAX_AGE_S
    ):
        message = f"older_than_s must be a whole number of seconds, at most {_MAX_AGE_S}."
        raise InvalidRequestError(message, param="older_than_s")
    for name in ("reason", "model"):
        if "\x00" in asked.get(name, ""):
            raise InvalidRequestError(f"{name} must not hold NUL characters.", param=name)
    return ReviewFilter(
        reason=asked.get("reason"),
        account_id=account_id,
        model=asked.get("model"),
        older_than=None if age is None else timedelta(seconds=int(age)),
    )


def _no_request() -> NotFoundError:
    message = "No such request of this account has ended. GET /admin/v1/reviews lists what waits."
    return NotFoundError(message)
