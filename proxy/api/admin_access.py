"""Who may use the admin API: whoever sends an admin key whose role allows the operation."""

import hmac

from starlette.requests import Request

from proxy.api.operations import Operation
from proxy.api.services import Services
from proxy.api.web import bearer, exchange_of, take_turn
from proxy.errors import AuthenticationError, PermissionDeniedError
from proxy.exchange import Exchange
from proxy.operators import OWNER_NAME, ROLES, Operator

# Whoever holds the key of the settings runs the service.
_OWNER = Operator(OWNER_NAME, "owner")


class AdminAccess:
    """Authenticates operators. Their keys are looked up for each request: a revoked one is over."""

    def __init__(self, services: Services) -> None:
        self._key = services.admin_key.encode() if services.admin_key else None
        self._keys = services.admin_keys
        self._attempts = services.protection.attempts
        self._rates = services.protection.admin_rates

    async def authenticate(self, request: Request, operation: Operation[Operator]) -> Operator:
        """Return who sent the request.

        Raises AuthenticationError, PermissionDeniedError or RateLimitError.
        """
        operator = await self._operator(exchange_of(request))
        take_turn(request, self._rates, operator.name, caller=operator.name)
        if not operator.may(operation.needs):
            able = " or ".join(repr(role) for role in ROLES if operation.needs in ROLES[role])
            message = (
                f"An admin key with the role {operator.role!r} may not do this. Use one with the "
                f"role {able}."
            )
            raise PermissionDeniedError(message)
        return operator

    async def _operator(self, exchange: Exchange) -> Operator:
        if self._key is None:
            message = "The admin API is closed: set TALLYGATE_ADMIN_KEY and restart the service."
            raise PermissionDeniedError(message, code="admin_only")
        sent = bearer(exchange)
        if sent is None:
            message = "Send the admin key as 'Authorization: Bearer …'."
            raise AuthenticationError(message)
        if hmac.compare_digest(sent, self._key):
            return _OWNER
        self._attempts.check(exchange)
        key = await self._keys.use(sent)
        if key is None or key.is_revoked:
            self._attempts.note(exchange)
            message = (
                "This is not an admin key. Virtual keys are for /v1 and /api/v1."
                if key is None
                else "This admin key was revoked. Ask an owner for another one."
            )
            raise PermissionDeniedError(message, code="admin_only")
        if key.is_expired:
            message = "This admin key has expired. Ask an owner for another one."
            raise PermissionDeniedError(message, code="key_expired")
        return Operator(key.name, key.role, key.admin_key_id)
