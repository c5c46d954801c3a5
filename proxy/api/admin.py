"""The admin API, `/admin/v1`: what operators sell, limit, see and correct, put together.

Each act is written to the audit trail by the function of `schema.sql` that carries it out.
"""

from starlette.routing import Route

from proxy.api.admin_access import AdminAccess
from proxy.api.admin_accounts import AdminAccounts
from proxy.api.admin_keys import AdminKeys
from proxy.api.admin_reports import AdminReports
from proxy.api.admin_reviews import ReviewApi
from proxy.api.operations import Operation, mount
from proxy.api.services import Services
from proxy.operators import Operator


class AdminApi:
    """Endpoints for whoever holds an admin key."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._access = AdminAccess(services)

    def operations(self) -> list[Operation[Operator]]:
        """Everything that the API does."""
        services = self._services
        return [
            *AdminAccounts(services).operations(),
            *AdminKeys(services).operations(),
            *AdminReports(services).operations(),
            *ReviewApi(services).operations(),
        ]

    def routes(self) -> list[Route]:
        """Every path of the API, each behind an admin key."""
        return mount(self.operations(), self._access.authenticate)
