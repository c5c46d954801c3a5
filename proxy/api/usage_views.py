"""Lists, summaries, exports and statements of one account, as its customer and operators see it."""

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, cast
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import AdminEntry, AdminUsage, Counts, Entry, Paged, Usage
from proxy.api.exports import (
    PART,
    Download,
    Table,
    csv_lines,
    format_in,
    json_lines,
    text_cell,
)
from proxy.api.filters import entry_filter, usage_filter
from proxy.api.operations import Parameter
from proxy.api.pages import page_by_integer, page_by_uuid
from proxy.api.services import Services
from proxy.api.shapes import Shapes, cost, counts_of, utc
from proxy.api.usage_answers import (
    AccountStatement,
    AdminSummary,
    StatementMonths,
    Summary,
    Sums,
)
from proxy.api.web import answer
from proxy.errors import InvalidRequestError, NotFoundError
from proxy.history import Found
from proxy.statements import Statement
from proxy.summaries import GROUPS, MAX_GROUPS

Row = Mapping[str, Any]
Shape = Callable[[Row], Mapping[str, Any]]
# What a page begins after: a request's id or an entry's number, None for the first.
_Key = Any

GROUP_BY = Parameter(
    name="group_by",
    schema={
        "type": "string",
        "pattern": f"^({'|'.join(GROUPS)})(,({'|'.join(GROUPS)}))?$",
        "default": "day",
    },
    summary="One or two of these, with a comma between.",
)
_PERIOD = timedelta(days=30)
_PICOS_PER_NANO = 1000
_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")
# What a group is called in answers, where that is not what it is asked by.
_MEMBERS = {"key": "key_id", "project": "project_id"}


@dataclass(frozen=True, slots=True)
class _View:
    """How somebody sees rows."""

    usage: Shape
    usage_table: Table
    entry: Shape
    entry_table: Table


class UsageViews:
    """Answers about an account; whoever asks was let in before."""

    def __init__(self, services: Services, *, is_operators: bool) -> None:
        shapes = Shapes(services.nanos_per_credit)
        self._shapes = shapes
        self._has_cost = is_operators
        self._history = services.history
        self._summaries = services.summaries
        self._statements = services.statements
        self._stall_timeout_s = services.client_stall_timeout_s
        self._view = (
            _View(shapes.admin_usage, Table(AdminUsage), shapes.admin_entry, Table(AdminEntry))
            if is_operators
            else _View(shapes.usage, Table(Usage), shapes.entry, Table(Entry))
        )

    async def usage(self, request: Request, account_id: UUID) -> Response:
        """List requests."""
        page, wanted = page_by_uuid(request), usage_filter(request)
        found = await self._history.usage(account_id, wanted, before=page.before, limit=page.limit)
        shown = page.show(found.rows, "request_id", self._view.usage)
        return answer(_onwards(shown, found))

    async def entries(self, request: Request, account_id: UUID) -> Response:
        """List ledger entries."""
        page, wanted = page_by_integer(request), entry_filter(request)
        found = await self._history.entries(
            account_id, wanted, before=page.before, limit=page.limit
        )
        return answer(_onwards(page.show(found.rows, "seq", self._view.entry), found))

    async def export_usage(self, request: Request, account_id: UUID) -> Response:
        """Download requests, oldest first, until now."""
        wanted = usage_filter(request)

        async def read(after: _Key) -> Found:
            return await self._history.usage_onwards(account_id, wanted, after=after, limit=PART)

        return self._download(
            request, read, "request_id", self._view.usage, table=self._view.usage_table
        )

    async def export_entries(self, request: Request, account_id: UUID) -> Response:
        """Download ledger entries, oldest first, until now."""
        wanted = entry_filter(request)

        async def read(after: _Key) -> Found:
            return await self._history.entries_onwards(account_id, wanted, after=after, limit=PART)

        return self._download(request, read, "seq", self._view.entry, table=self._view.entry_table)

    def _download(
        self,
        request: Request,
        read: Callable[[_Key], Awaitable[Found]],
        key: str,
        shape: Shape,
        *,
        table: Table,
    ) -> Response:
        is_csv = (format_ := format_in(request)) == "csv"
        name = "ledger" if key == "seq" else "usage"

        async def parts() -> AsyncGenerator[bytes]:
            head, after, has_more = (table.header if is_csv else b""), None, True
            while has_more:
                found = await read(after)
                shown = [shape(row) for row in found.rows]
                yield head + (table.lines(shown) if is_csv else json_lines(shown))
                head = b""
                after = found.edge if found.edge is not None else _last(found.rows, key)
                has_more = found.edge is not None or len(found.rows) == PART

        return Download(
            parts(),
            media_type="text/csv; charset=utf-8; header=present" if is_csv else "application/jsonl",
            filename=f"{name}-{datetime.now(UTC):%Y-%m-%d}.{format_}",
            stall_timeout_s=self._stall_timeout_s,
        )

    async def summary(self, request: Request, account_id: UUID) -> Response:
        """Add requests up by what was asked for, over the last 30 days unless told otherwise."""
        by, wanted = _groups_in(request), usage_filter(request)
        # The end of this hour: whole hours are sums already.
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
        until = wanted.until or hour
        wanted = replace(wanted, since=wanted.since or min(until, hour) - _PERIOD, until=until)
        groups = await self._summaries.summary(account_id, wanted, by)
        if len(groups) > MAX_GROUPS:
            message = (
                f"That is more than {MAX_GROUPS} groups. Ask for a shorter time, or group by less."
            )
            raise InvalidRequestError(message, param="group_by")
        total = _total(groups)
        members = [_MEMBERS.get(name, name) for name in by]
        summary = {
            "since": wanted.begin,
            "until": wanted.end,
            "data": [
                {**{name: _shown(row[name]) for name in members}, **self._sums(row)}
                for row in groups
            ],
            "total": self._sums(total),
        }
        return answer(cast("Summary | AdminSummary", summary))

    def _sums(self, row: Row) -> Sums:
        sums: Sums = {
            "requests": row["requests"],
            "failed": row["failed"],
            "usage": counts_of(row),
            "price": self._shapes.money(row["price"]),
        }
        if not self._has_cost:
            return sums
        margin = row["price"] * _PICOS_PER_NANO - row["cost_picos"]
        both: dict[str, object] = {**sums, "cost": cost(row["cost_picos"]), "margin": cost(margin)}
        return cast("Sums", both)

    async def statements(self, account_id: UUID) -> Response:
        """List the months that have a statement."""
        months = await self._statements.months(account_id)
        listed: StatementMonths = {"data": [{"month": f"{month:%Y-%m}"} for month in months]}
        return answer(listed)

    async def statement(self, request: Request, account_id: UUID) -> Response:
        """Show a month, as JSON or CSV."""
        format_ = format_in(request, ("json", "csv"))
        match = _MONTH.fullmatch(request.path_params["month"])
        year = int(match[1]) if match else 0
        statement = (
            await self._statements.statement(account_id, date(year, int(match[2]), 1))
            if match and 1970 <= year < 9999
            else None
        )
        if statement is None:
            raise NotFoundError(
                "There is no statement of that month: nothing was posted in it, or its entries "
                "were archived, and whoever operates this service has them. "
                "GET the list of statements for those that there are."
            )
        shown = self._statement(statement)
        if format_ == "json":
            return answer(shown)
        return Response(
            _statement_lines(shown),
            headers={
                "cache-control": "no-store",
                "content-disposition": f'attachment; filename="statement-{shown["month"]}.csv"',
            },
            media_type="text/csv; charset=utf-8; header=present",
        )

    def _statement(self, statement: Statement) -> AccountStatement:
        money = self._shapes.money
        return {
            "month": f"{statement.month:%Y-%m}",
            "opening": money(statement.opening_nanos),
            "movements": [
                {
                    "kind": moved.kind,
                    "model": moved.model,
                    "entries": moved.entries,
                    "amount": money(moved.amount_nanos),
                }
                for moved in statement.movements
            ],
            "closing": money(statement.closing_nanos),
            "final": statement.is_final,
            "carried_over": statement.is_carried_over,
        }


def _onwards(shown: Paged[Mapping[str, Any]], found: Found) -> Paged[Mapping[str, Any]]:
    """Have a page whose stretch of rows is through lead to the next one."""
    if shown["next_cursor"] is None and found.edge is not None:
        shown["next_cursor"] = str(found.edge)
    return shown


def _last(rows: Sequence[Row], key: str) -> _Key:
    return rows[-1][key] if rows else None


def _shown(value: object) -> object:
    return utc(value) if isinstance(value, datetime) else value


def _groups_in(request: Request) -> list[str]:
    names = request.query_params.get("group_by", "day").split(",")
    if not set(names) <= set(GROUPS) or len(names) > 2 or len(set(names)) < len(names):
        message = f"group_by must be one or two of {', '.join(GROUPS)}, with a comma between."
        raise InvalidRequestError(message, param="group_by")
    return names


def _total(groups: Sequence[Row]) -> Row:
    total: dict[str, Any] = {}
    for name in ("requests", "failed", "price", "cost_picos"):
        total[name] = sum(row[name] for row in groups)
    for name in Counts.__annotations__:
        told = [row[name] for row in groups if row[name] is not None]
        total[name] = sum(told) if told else None
    return total


def _statement_lines(statement: AccountStatement) -> bytes:
    opening, closing = statement["opening"], statement["closing"]
    return csv_lines(
        [
            ("month", "kind", "model", "entries", "amount_credits", "amount_usd"),
            (statement["month"], "opening", "", "", opening["credits"], opening["usd"]),
            *(
                (
                    statement["month"],
                    moved["kind"],
                    text_cell(moved["model"]),
                    moved["entries"],
                    moved["amount"]["credits"],
                    moved["amount"]["usd"],
                )
                for moved in statement["movements"]
            ),
            (statement["month"], "closing", "", "", closing["credits"], closing["usd"]),
        ]
    )
