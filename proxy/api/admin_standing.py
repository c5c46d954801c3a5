"""The standing of accounts: suspended, served again, closed; at once, on every replica."""

from typing import Annotated
from uuid import UUID

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import Account
from proxy.api.bodies import Body, Text, read_body
from proxy.api.operations import Operation
from proxy.api.paths import ADMIN_ACCOUNT, account_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError
from proxy.operators import Operator


class StandingReason(Body):
    """POST …/suspend and …/close: why, for the audit trail; customers don't see it."""

    reason: Annotated[Text, Field(min_length=1, max_length=1000)]


class AdminStanding:
    """Endpoints that change whether an account is served."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._directory = services.directory
        self._shapes = Shapes(services.nanos_per_credit)

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/suspend",
                handler=self._suspend,
                needs="support",
                tag="accounts",
                summary="Refuse an account's requests, from the next one on",
                body=StandingReason,
                answers=Account,
            ),
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/resume",
                handler=self._resume,
                needs="support",
                tag="accounts",
                summary="Serve a suspended account again",
                answers=Account,
            ),
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/close",
                handler=self._close,
                needs="support",
                tag="accounts",
                summary="Close an account for good: its keys are revoked, its balance stays",
                body=StandingReason,
                answers=Account,
            ),
        ]

    async def _suspend(self, request: Request, operator: Operator) -> Response:
        return await self._stand(request, operator, "suspended", takes_reason=True)

    async def _resume(self, request: Request, operator: Operator) -> Response:
        return await self._stand(request, operator, "active", takes_reason=False)

    async def _close(self, request: Request, operator: Operator) -> Response:
        return await self._stand(request, operator, "closed", takes_reason=True)

    async def _stand(
        self, request: Request, operator: Operator, status: str, *, takes_reason: bool
    ) -> Response:
        account_id: UUID = (await account_in(request, self._accounts))["account_id"]
        reason = None
        if takes_reason:
            reason = (await read_body(exchange_of(request), StandingReason)).reason
        outcome = await self._directory.set_status(
            account_id, status, reason=reason, actor=operator.name
        )
        if outcome == "closed":
            message = "This account was closed, which is for good. Create another one."
            raise ConflictError(message, code="account_closed")
        return answer(self._shapes.account(await account_in(request, self._accounts)))
