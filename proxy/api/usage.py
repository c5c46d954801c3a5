"""What a customer sees of the own usage and money: lists, sums, downloads, statements, forecast."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.accounts import Principal
from proxy.api.answers import Entry, Paged, Usage
from proxy.api.bodies import Body, Credits, nanos_of, read_body
from proxy.api.exports import FORMAT, MEDIA_TYPES
from proxy.api.filters import ENTRY_FILTERS, USAGE_FILTERS
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_INTEGER, PAGED_BY_UUID
from proxy.api.paths import CUSTOMER
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.usage_answers import (
    AccountStatement,
    Forecast,
    LowBalance,
    OwnBalance,
    Pace,
    StatementMonths,
    Summary,
)
from proxy.api.usage_views import GROUP_BY, UsageViews
from proxy.api.web import answer, exchange_of
from proxy.errors import NotFoundError
from proxy.history import UsageFilter

STATEMENT_FORMAT = Parameter(
    name="format",
    schema={"type": "string", "enum": ["json", "csv"], "default": "json"},
    summary="JSON, or CSV with a line of names.",
)
_DAY = timedelta(days=1)


class Threshold(Body):
    """PUT …/balance/threshold: below how many credits the balance is low."""

    credits: Credits


class UsageApi:
    """Endpoints on the account whose key is sent."""

    def __init__(self, services: Services) -> None:
        self._views = UsageViews(services, is_operators=False)
        self._accounts = services.accounts
        self._ledger = services.ledger
        self._credits = services.expiring_credits
        self._summaries = services.summaries
        self._nanos_per_credit = services.nanos_per_credit
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Principal]]:
        """Every endpoint; those of a name stand before those of an id."""
        return [
            *self._usage_operations(),
            *self._balance_operations(),
            *self._money_operations(),
        ]

    def _usage_operations(self) -> list[Operation[Principal]]:
        return [
            Operation(
                method="GET",
                path=CUSTOMER + "/usage",
                handler=self._usage,
                needs="read",
                tag="usage",
                summary="List requests",
                answers=Paged[Usage],
                query=(*PAGED_BY_UUID, *USAGE_FILTERS),
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/usage/summary",
                handler=self._summary,
                needs="read",
                tag="usage",
                summary="Add requests up by day, model, key and so on",
                answers=Summary,
                query=(GROUP_BY, *USAGE_FILTERS),
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/usage/export",
                handler=self._export_usage,
                needs="read",
                tag="usage",
                summary="Download requests, oldest first",
                media_types=MEDIA_TYPES,
                query=(FORMAT, *USAGE_FILTERS),
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/forecast",
                handler=self._forecast,
                needs="read",
                tag="usage",
                summary="Tell how long the balance lasts",
                answers=Forecast,
            ),
        ]

    def _balance_operations(self) -> list[Operation[Principal]]:
        return [
            Operation(
                method="GET",
                path=CUSTOMER + "/balance",
                handler=self._balance,
                needs="read",
                tag="balance",
                summary="Read the balance",
                answers=OwnBalance,
            ),
            Operation(
                method="PUT",
                path=CUSTOMER + "/balance/threshold",
                handler=self._set_threshold,
                needs="manage",
                tag="balance",
                summary="Say below what the balance is low",
                body=Threshold,
                answers=LowBalance,
            ),
            Operation(
                method="DELETE",
                path=CUSTOMER + "/balance/threshold",
                handler=self._remove_threshold,
                needs="manage",
                tag="balance",
                summary="Have no balance be low",
                status=204,
            ),
        ]

    def _money_operations(self) -> list[Operation[Principal]]:
        return [
            Operation(
                method="GET",
                path=CUSTOMER + "/ledger",
                handler=self._entries,
                needs="read",
                tag="balance",
                summary="List ledger entries",
                answers=Paged[Entry],
                query=(*PAGED_BY_INTEGER, *ENTRY_FILTERS),
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/ledger/export",
                handler=self._export_entries,
                needs="read",
                tag="balance",
                summary="Download ledger entries, oldest first",
                media_types=MEDIA_TYPES,
                query=(FORMAT, *ENTRY_FILTERS),
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/statements",
                handler=self._statements,
                needs="read",
                tag="balance",
                summary="List the months that have a statement",
                answers=StatementMonths,
            ),
            Operation(
                method="GET",
                path=CUSTOMER + "/statements/{month}",
                handler=self._statement,
                needs="read",
                tag="balance",
                summary="Read the statement of a month",
                answers=AccountStatement,
                media_types=("application/json", "text/csv"),
                query=(STATEMENT_FORMAT,),
            ),
        ]

    async def _usage(self, request: Request, principal: Principal) -> Response:
        return await self._views.usage(request, principal.account_id)

    async def _summary(self, request: Request, principal: Principal) -> Response:
        return await self._views.summary(request, principal.account_id)

    async def _export_usage(self, request: Request, principal: Principal) -> Response:
        return await self._views.export_usage(request, principal.account_id)

    async def _entries(self, request: Request, principal: Principal) -> Response:
        return await self._views.entries(request, principal.account_id)

    async def _export_entries(self, request: Request, principal: Principal) -> Response:
        return await self._views.export_entries(request, principal.account_id)

    async def _statements(self, _request: Request, principal: Principal) -> Response:
        return await self._views.statements(principal.account_id)

    async def _statement(self, request: Request, principal: Principal) -> Response:
        return await self._views.statement(request, principal.account_id)

    async def _balance(self, _request: Request, principal: Principal) -> Response:
        found = await self._credits.balance(principal.account_id)
        if found is None:  # pragma: no cover - accounts are never deleted
            raise NotFoundError("This account has no balance.")
        balance, expiring = found
        own: OwnBalance = {
            **self._shapes.balance(balance),
            "expiring": [self._shapes.expiring(part) for part in expiring],
            "low_balance": await self._low_balance(principal.account_id),
        }
        return answer(own)

    async def _set_threshold(self, request: Request, principal: Principal) -> Response:
        body = await read_body(exchange_of(request), Threshold)
        nanos = nanos_of(body.credits, self._nanos_per_credit, param="credits")
        await self._accounts.set_low_balance(
            principal.account_id, nanos, actor=f"key:{principal.key_id}"
        )
        return answer(await self._low_balance(principal.account_id))

    async def _remove_threshold(self, _request: Request, principal: Principal) -> Response:
        await self._accounts.set_low_balance(
            principal.account_id, None, actor=f"key:{principal.key_id}"
        )
        return Response(status_code=204)

    async def _low_balance(self, account_id: UUID) -> LowBalance:
        threshold = await self._accounts.low_balance(account_id)
        balance = await self._ledger.balance(account_id)
        if threshold is None or balance is None:
            return {"threshold": None, "is_low": False}
        # Holds don't count: they are ceilings, and most of each comes back.
        has = balance.posted + balance.credit_limit
        return {"threshold": self._shapes.money(threshold), "is_low": has < threshold}

    async def _forecast(self, _request: Request, principal: Principal) -> Response:
        account = await self._accounts.account(principal.account_id)
        balance = await self._ledger.balance(principal.account_id)
        if account is None or balance is None:  # pragma: no cover - accounts are never deleted
            raise NotFoundError("This account has no balance.")
        now = datetime.now(UTC)
        # The pace of an account that is younger is that of its days.
        age = max(1, -((account["created_at"] - now) // _DAY))
        forecast: Forecast = {
            "available": self._shapes.money(balance.available),
            "last_7_days": await self._pace(account, balance.available, now, min(7, age)),
            "last_30_days": await self._pace(account, balance.available, now, min(30, age)),
        }
        return answer(forecast)

    async def _pace(
        self, account: dict[str, Any], available: int, now: datetime, days: int
    ) -> Pace:
        wanted = UsageFilter(since=now - days * _DAY)
        sums = await self._summaries.summary(account["account_id"], wanted)
        spent: int = sums[0]["price"] if sums else 0
        return {
            "days": days,
            "spent": self._shapes.money(spent),
            "per_day": self._shapes.money(spent // days),
            "days_left": max(0, available) * days // spent if spent else None,
        }
