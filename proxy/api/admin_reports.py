"""What operators look at: the audit trail."""

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.admin_lookup import ACT_FILTERS, act_filter
from proxy.api.answers import AuditEvent, Paged
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN
from proxy.api.services import Services
from proxy.api.shapes import audit_event
from proxy.api.web import answer
from proxy.operators import Operator


class AdminReports:
    """Endpoints that only read."""

    def __init__(self, services: Services) -> None:
        self._trail = services.trail

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN + "/audit-trail",
                handler=self._audit_trail,
                needs="read",
                tag="audit trail",
                summary=(
                    "List what operators did, and keys that may manage; a page of a search may be "
                    "short, even empty, and yet not the last"
                ),
                answers=Paged[AuditEvent],
                query=(*PAGED_BY_UUID, *ACT_FILTERS),
            ),
        ]

    async def _audit_trail(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        wanted = act_filter(request)
        acts = await self._trail.acts(wanted, before=page.before, limit=page.limit)
        shown = page.show(acts.rows, "event_id", audit_event)
        return answer(page.go_on(shown, acts.goes_on_before))
