"""Who may use the admin API: whoever sends an admin key whose role allows the operation."""

import hmac

from starlette.requests import Request

from proxy.api.operations import Operation
from proxy.api.services import Services
from proxy.api.web import bearer, exchange_of
from proxy.errors import AuthenticationError, PermissionDeniedError
from proxy.operators import Operator

# Whoever holds the key of the settings runs the service.
_OWNER = Operator("admin", "owner")


class AdminAccess:
    """Authenticates operators."""

    def __init__(self, services: Services) -> None:
        self._key = services.admin_key.encode() if services.admin_key else None

    async def authenticate(self, request: Request, operation: Operation[Operator]) -> Operator:
        """Return who sent the request; AuthenticationError or PermissionDeniedError."""
        operator = self._operator(request)
        if not operator.may(operation.needs):
            message = (
                f"An admin key with the role {operator.role!r} may not do this: "
                f"it needs a role that allows {operation.needs!r}."
            )
            raise PermissionDeniedError(message)
        return operator

    def _operator(self, request: Request) -> Operator:
        if self._key is None:
            message = "The admin API is closed: set TALLYGATE_ADMIN_KEY and restart the service."
            raise PermissionDeniedError(message, code="admin_only")
        sent = bearer(exchange_of(request))
        if sent is None:
            message = "Send the admin key as 'Authorization: Bearer …'."
            raise AuthenticationError(message)
        if not hmac.compare_digest(sent, self._key):
            message = "This is not the admin key. Virtual keys are for /v1 and /api/v1."
            raise PermissionDeniedError(message, code="admin_only")
        return _OWNER
