"""What operators see of usage and money: of one account, and of the whole house."""

from datetime import UTC, date, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import AdminEntry, AdminUsage, Paged
from proxy.api.exports import FORMAT, MEDIA_TYPES
from proxy.api.filters import ENTRY_FILTERS, USAGE_FILTERS
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_INTEGER, PAGED_BY_UUID
from proxy.api.paths import ADMIN, ADMIN_ACCOUNT, account_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes, cost
from proxy.api.usage import STATEMENT_FORMAT
from proxy.api.usage_answers import (
    AccountStatement,
    AdminSummary,
    Business,
    HouseStats,
    StatementMonths,
)
from proxy.api.usage_views import GROUP_BY, Row, UsageViews
from proxy.api.web import answer
from proxy.errors import InvalidRequestError
from proxy.operators import Operator

_PICOS_PER_NANO = 1000
_MAX_DAYS = 400
_DAYS = tuple(
    Parameter(name=name, schema={"type": "string", "format": "date"}, summary=summary)
    for name, summary in (
        ("first_day", "The first day of UTC; 30 days are shown if it is left out."),
        ("last_day", "The last day of UTC, today if it is left out."),
    )
)


class AdminUsageApi:
    """Endpoints that only read."""

    def __init__(self, services: Services) -> None:
        self._views = UsageViews(services, is_operators=True)
        self._accounts = services.accounts
        self._summaries = services.summaries
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            *self._usage_operations(),
            *self._money_operations(),
            Operation(
                method="GET",
                path=ADMIN + "/stats",
                handler=self._stats,
                needs="read",
                tag="stats",
                summary="Read what all accounts used, paid and cost, by day and model",
                answers=HouseStats,
                query=_DAYS,
            ),
        ]

    def _usage_operations(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/usage",
                handler=self._usage,
                needs="read",
                tag="accounts",
                summary="List an account's requests, with both sides of their money",
                answers=Paged[AdminUsage],
                query=(*PAGED_BY_UUID, *USAGE_FILTERS),
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/usage/summary",
                handler=self._summary,
                needs="read",
                tag="accounts",
                summary="Add an account's requests up, with both sides of their money",
                answers=AdminSummary,
                query=(GROUP_BY, *USAGE_FILTERS),
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/usage/export",
                handler=self._export_usage,
                needs="read",
                tag="accounts",
                summary="Download an account's requests, oldest first",
                media_types=MEDIA_TYPES,
                query=(FORMAT, *USAGE_FILTERS),
            ),
        ]

    def _money_operations(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/ledger",
                handler=self._entries,
                needs="read",
                tag="accounts",
                summary="List an account's ledger entries",
                answers=Paged[AdminEntry],
                query=(*PAGED_BY_INTEGER, *ENTRY_FILTERS),
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/ledger/export",
                handler=self._export_entries,
                needs="read",
                tag="accounts",
                summary="Download an account's ledger entries, oldest first",
                media_types=MEDIA_TYPES,
                query=(FORMAT, *ENTRY_FILTERS),
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/statements",
                handler=self._statements,
                needs="read",
                tag="accounts",
                summary="List the months that an account has a statement of",
                answers=StatementMonths,
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/statements/{month}",
                handler=self._statement,
                needs="read",
                tag="accounts",
                summary="Read an account's statement of a month",
                answers=AccountStatement,
                media_types=("application/json", "text/csv"),
                query=(STATEMENT_FORMAT,),
            ),
        ]

    async def _usage(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.usage(request, account["account_id"])

    async def _summary(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.summary(request, account["account_id"])

    async def _export_usage(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.export_usage(request, account["account_id"])

    async def _entries(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.entries(request, account["account_id"])

    async def _export_entries(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.export_entries(request, account["account_id"])

    async def _statements(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.statements(account["account_id"])

    async def _statement(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return await self._views.statement(request, account["account_id"])

    async def _stats(self, request: Request, _operator: Operator) -> Response:
        last_day = _day_in(request, "last_day") or datetime.now(UTC).date()
        first_day = _day_in(request, "first_day") or max(
            last_day - timedelta(days=29), date(1970, 1, 1)
        )
        if not 0 <= (last_day - first_day).days < _MAX_DAYS:
            message = f"last_day must not be before first_day, nor {_MAX_DAYS} days after it."
            raise InvalidRequestError(message, param="first_day")
        stats = await self._summaries.stats(first_day, last_day)
        shown: HouseStats = {
            "first_day": first_day,
            "last_day": last_day,
            "accounts": [
                {
                    "tier": row["tier"],
                    "accounts": row["accounts"],
                    "open": row["open"],
                    "active": row["active"],
                }
                for row in stats.accounts
            ],
            "total": self._business(stats.total),
            "by_day": [{"day": row["day"], **self._business(row)} for row in stats.by_day],
            "by_model": [{"model": row["model"], **self._business(row)} for row in stats.by_model],
            "by_tier": [{"tier": row["tier"], **self._business(row)} for row in stats.by_tier],
            "failed": [
                {
                    "endpoint": row["endpoint"],
                    "error_code": row["error_code"],
                    "requests": row["requests"],
                }
                for row in stats.failed
            ],
        }
        return answer(shown)

    def _business(self, row: Row) -> Business:
        return {
            "requests": row["requests"],
            "failed": row["failed"],
            "input_tokens": row["input_tokens"],
            "output_tokens": row["output_tokens"],
            "revenue": self._shapes.money(row["price"]),
            "cost": cost(row["cost_picos"]),
            "margin": cost(row["price"] * _PICOS_PER_NANO - row["cost_picos"]),
        }


def _day_in(request: Request, name: str) -> date | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        day = date.fromisoformat(text)
    except ValueError:
        day = date.min
    if not date(1970, 1, 1) <= day < date(9999, 1, 1):
        message = f"{name} must be a day such as 2026-11-01, from 1970 on."
        raise InvalidRequestError(message, param=name)
    return day
