"""What an account's people may ask for: all that is known of them, and that it is forgotten."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from proxy.accounts import Principal
from proxy.api.archive import download
from proxy.api.bodies import Body, Text, read_body
from proxy.api.operations import Operation
from proxy.api.paths import ADMIN_ACCOUNT, CUSTOMER, account_in
from proxy.api.services import Services
from proxy.api.shapes import utc
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, NotFoundError
from proxy.operators import Operator

_ZIP = ("application/zip",)
_REFUSALS = {
    "not_closed": "This account is in use. Close it first, then erase it.",
    "open_holds": "A request of this account has not ended. Erase it when that is over.",
}


class Erasure(Body):
    """POST …/erase. The reason stays in the audit trail: write no personal data in it."""

    reason: Annotated[Text, Field(min_length=1, max_length=1000)]


class Erased(TypedDict):
    """An account whose personal data is gone."""

    id: UUID
    erased_at: datetime


class AdminPrivacy:
    """Endpoints for operators."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._privacy = services.privacy
        self._services = services

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/export",
                handler=self._export,
                needs="support",
                tag="privacy",
                summary="Download everything about an account as one archive",
                media_types=_ZIP,
            ),
            Operation(
                method="POST",
                path=ADMIN_ACCOUNT + "/erase",
                handler=self._erase,
                needs="own",
                tag="privacy",
                summary="Erase the personal data of a closed account, for good",
                body=Erasure,
                answers=Erased,
            ),
        ]

    async def _export(self, request: Request, _operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        return download(self._services, account, is_operators=True)

    async def _erase(self, request: Request, operator: Operator) -> Response:
        account_id: UUID = (await account_in(request, self._accounts))["account_id"]
        body = await read_body(exchange_of(request), Erasure)
        outcome = await self._privacy.erase(account_id, reason=body.reason, actor=operator.name)
        if outcome in _REFUSALS:
            raise ConflictError(_REFUSALS[outcome])
        erased: Erased = {
            "id": account_id,
            "erased_at": utc(await self._privacy.erased_at(account_id)),
        }
        return answer(erased)


class CustomerPrivacy:
    """Endpoints for customers."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._services = services

    def operations(self) -> list[Operation[Principal]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=CUSTOMER + "/export",
                handler=self._export,
                needs="manage",
                tag="account",
                summary="Download everything about the account as one archive",
                media_types=_ZIP,
            )
        ]

    async def _export(self, _request: Request, principal: Principal) -> Response:
        account = await self._accounts.account(principal.account_id)
        if account is None:  # pragma: no cover - accounts are never deleted
            raise NotFoundError("This account is not there.")
        return download(self._services, account, is_operators=False)
