"""An account's virtual keys as operators see them: made, listed, revoked."""

from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.accounts import KeyLimits
from proxy.api.answers import Key, NewKey, Paged
from proxy.api.bodies import KeyBody, nanos_of, read_body
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN_ACCOUNT, account_in, uuid_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, NotFoundError
from proxy.operators import Operator

_KEYS = ADMIN_ACCOUNT + "/keys"


class AdminKeys:
    """Endpoints on the keys of an account."""

    def __init__(self, services: Services) -> None:
        self._accounts = services.accounts
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=_KEYS,
                handler=self._list,
                needs="read",
                tag="keys",
                summary="List an account's keys",
                answers=Paged[Key],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="POST",
                path=_KEYS,
                handler=self._create,
                needs="support",
                tag="keys",
                summary="Create a key; its secret is in the answer, and nowhere else",
                body=KeyBody,
                answers=NewKey,
                status=201,
            ),
            Operation(
                method="DELETE",
                path=_KEYS + "/{key_id}",
                handler=self._revoke,
                needs="support",
                tag="keys",
                summary="Revoke a key, at once",
                status=204,
            ),
        ]

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        account = await account_in(request, self._accounts)
        rows = await self._accounts.keys(
            account["account_id"], before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "key_id", self._shapes.key))

    async def _create(self, request: Request, operator: Operator) -> Response:
        account_id: UUID = (await account_in(request, self._accounts))["account_id"]
        body = await read_body(exchange_of(request), KeyBody)
        budget = body.budget
        limits = KeyLimits(
            expires_at=body.expires_at,
            allowed_models=body.allowed_models,
            requests_per_minute=body.requests_per_minute,
            tokens_per_minute=body.tokens_per_minute,
            max_concurrency=body.max_concurrency,
            budget=None
            if budget is None
            else nanos_of(budget.credits, self._nanos_per_credit, param="budget.credits"),
            budget_period="total" if budget is None else budget.period,
        )
        made = await self._accounts.create_key(
            account_id, name=body.name, limits=limits, actor=operator.name
        )
        if made is None:
            raise ConflictError("This account is closed, so it gets no more keys.")
        # The page of one row that begins with the new key: it is shown as every list shows it.
        after = UUID(int=made.key_id.int + 1)
        (row,) = await self._accounts.keys(account_id, before=after, limit=1)
        shape = self._shapes.key(row)
        return answer({**shape, "account_id": account_id, "key": made.secret}, 201)

    async def _revoke(self, request: Request, operator: Operator) -> Response:
        account = await account_in(request, self._accounts)
        key_id = uuid_in(request, "key_id")
        if key_id is None or not await self._accounts.revoke_key(
            account["account_id"], key_id, actor=operator.name
        ):
            text = request.path_params["key_id"]
            raise NotFoundError(f"This account has no key {text[:64]!r}.")
        return Response(status_code=204)
