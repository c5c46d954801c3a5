"""What operators look at: usage and ledger of an account, price books, the audit trail."""

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import AdminEntry, AdminUsage, AuditEvent, Paged, PriceBook
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_INTEGER, PAGED_BY_UUID, page_by_integer, page_by_uuid
from proxy.api.paths import ADMIN, ADMIN_ACCOUNT, account_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes, audit_event
from proxy.api.web import answer
from proxy.operators import Operator


class AdminReports:
    """Endpoints that only read."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._reports = services.reports
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/usage",
                handler=self._usage,
                needs="read",
                tag="accounts",
                summary="List an account's requests, with both sides of their money",
                answers=Paged[AdminUsage],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/ledger",
                handler=self._entries,
                needs="read",
                tag="accounts",
                summary="List an account's ledger entries",
                answers=Paged[AdminEntry],
                query=PAGED_BY_INTEGER,
            ),
            Operation(
                method="GET",
                path=ADMIN + "/price-books",
                handler=self._price_books,
                needs="read",
                tag="price books",
                summary="List the versions of the price book",
                answers=Paged[PriceBook],
                query=PAGED_BY_INTEGER,
            ),
            Operation(
                method="GET",
                path=ADMIN + "/audit-trail",
                handler=self._audit_trail,
                needs="read",
                tag="audit trail",
                summary="List what operators did",
                answers=Paged[AuditEvent],
                query=PAGED_BY_UUID,
            ),
        ]

    async def _usage(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        account = await account_in(request, self._accounts)
        rows = await self._reports.usage(
            account["account_id"], before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "request_id", self._shapes.admin_usage))

    async def _entries(self, request: Request, _operator: Operator) -> Response:
        page = page_by_integer(request)
        account = await account_in(request, self._accounts)
        rows = await self._reports.entries(
            account["account_id"], before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "seq", self._shapes.admin_entry))

    async def _price_books(self, request: Request, _operator: Operator) -> Response:
        page = page_by_integer(request)
        rows = await self._reports.price_books(before=page.before, limit=page.limit)
        return answer(page.show(rows, "version", self._shapes.price_book))

    async def _audit_trail(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        rows = await self._reports.audit_trail(before=page.before, limit=page.limit)
        return answer(page.show(rows, "event_id", audit_event))
