"""The admin API, `/admin/v1`: what operators sell, limit, see and correct, put together.

Each act is written to the audit trail by the function of `schema.sql` that carries it out.
"""

from starlette.routing import Route

from proxy.api.admin_access import AdminAccess
from proxy.api.admin_accounts import AdminAccounts
from proxy.api.admin_charges import AdminCharges
from proxy.api.admin_corrections import AdminCorrections
from proxy.api.admin_models import AdminModels
from proxy.api.admin_operators import AdminOperators
from proxy.api.admin_price_drafts import AdminPriceDrafts
from proxy.api.admin_prices import AdminPrices
from proxy.api.admin_reports import AdminReports
from proxy.api.admin_reviews import ReviewApi
from proxy.api.admin_standing import AdminStanding
from proxy.api.admin_tiers import AdminTiers
from proxy.api.admin_usage import AdminUsageApi
from proxy.api.admin_webhooks import AdminWebhooks
from proxy.api.key_oversight import KeyOversight
from proxy.api.keys import KeyApi
from proxy.api.operations import Operation, mount
from proxy.api.privacy import AdminPrivacy
from proxy.api.projects import ProjectApi
from proxy.api.services import Services
from proxy.api.sides import operator_side
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
            *AdminStanding(services).operations(),
            *AdminOperators(services).operations(),
            *AdminModels(services).operations(),
            *AdminCharges(services).operations(),
            *AdminCorrections(services).operations(),
            *KeyOversight(services).operations(),
            *KeyApi(services, operator_side(services.accounts)).operations(),
            *ProjectApi(services, operator_side(services.accounts)).operations(),
            *AdminPriceDrafts(services).operations(),
            *AdminPrices(services).operations(),
            *AdminReports(services).operations(),
            *AdminTiers(services).operations(),
            *AdminUsageApi(services).operations(),
            *ReviewApi(services).operations(),
            *AdminWebhooks(services).operations(),
            *AdminPrivacy(services).operations(),
        ]

    def routes(self) -> list[Route]:
        """Every path of the API, each behind an admin key."""
        return mount(self.operations(), self._access.authenticate)
