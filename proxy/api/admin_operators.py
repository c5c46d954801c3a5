"""Admin keys: who works with the admin API, by what name and in which role."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from proxy.api.answers import Paged
from proxy.api.bodies import Body, Text, TimeToCome, read_body
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN, uuid_in
from proxy.api.services import Services
from proxy.api.shapes import utc
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, NotFoundError, PermissionDeniedError
from proxy.operators import OWNER_NAME, Operator

_KEYS = ADMIN + "/admin-keys"
_Role = Literal["owner", "finance", "support", "read-only"]


def _operator_name(name: str) -> str:
    # The trail calls virtual keys `key:…`, and whoever holds the key of the settings `admin`.
    if name == OWNER_NAME or ":" in name:
        msg = f"must not be {OWNER_NAME!r}, and hold no colon: the audit trail uses these itself"
        raise ValueError(msg)
    return name


class AdminKeyBody(Body):
    """POST /admin/v1/admin-keys. The name is what the audit trail calls whoever holds the key."""

    name: Annotated[Text, Field(min_length=1, max_length=64), AfterValidator(_operator_name)]
    role: _Role
    expires_at: TimeToCome | None = None


class AdminKey(TypedDict):
    """An admin key, without its secret; `last_used_at` is accurate to a minute."""

    id: UUID
    name: str
    role: _Role
    prefix: str
    status: Literal["active", "revoked"]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewAdminKey(TypedDict):
    """An admin key that was just made; `key` is the secret, and is shown this once."""

    id: UUID
    name: str
    role: _Role
    expires_at: datetime | None
    key: str


class AdminOperators:
    """Endpoints on admin keys."""

    def __init__(self, services: Services) -> None:
        self._keys = services.admin_keys

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=_KEYS,
                handler=self._list,
                needs="own",
                tag="admin keys",
                summary="List admin keys; that of the settings is not among them",
                answers=Paged[AdminKey],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="POST",
                path=_KEYS,
                handler=self._create,
                needs="own",
                tag="admin keys",
                summary="Create an admin key; its secret is in the answer, and nowhere else",
                body=AdminKeyBody,
                answers=NewAdminKey,
                status=201,
            ),
            Operation(
                method="DELETE",
                path=_KEYS + "/{admin_key_id}",
                handler=self._revoke,
                needs="own",
                tag="admin keys",
                summary="Revoke an admin key, at once",
                status=204,
            ),
        ]

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        rows = await self._keys.list(before=page.before, limit=page.limit)
        return answer(page.show(rows, "admin_key_id", _shape))

    async def _create(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), AdminKeyBody)
        if not operator.may_give(body.role):
            message = f"A key of the role {operator.role!r} can't make one that may do more."
            raise PermissionDeniedError(message, param="role")
        made = await self._keys.create(
            name=body.name, role=body.role, expires_at=body.expires_at, actor=operator.name
        )
        if made is None:
            message = (
                f"An admin key has the name {body.name!r}. Revoke it first, or choose another name."
            )
            raise ConflictError(message, param="name")
        new: NewAdminKey = {
            "id": made[0],
            "name": body.name,
            "role": body.role,
            "expires_at": utc(body.expires_at),
            "key": made[1],
        }
        return answer(new, 201)

    async def _revoke(self, request: Request, operator: Operator) -> Response:
        admin_key_id = uuid_in(request, "admin_key_id")
        if admin_key_id is None or not await self._keys.revoke(admin_key_id, actor=operator.name):
            message = (
                f"There is no admin key with that id. GET {_KEYS} lists them; that of the settings "
                "is changed there."
            )
            raise NotFoundError(message)
        return Response(status_code=204)


def _shape(row: dict[str, Any]) -> AdminKey:
    return {
        "id": row["admin_key_id"],
        "name": row["name"],
        "role": row["role"],
        "prefix": row["prefix"],
        "status": "active" if row["revoked_at"] is None else "revoked",
        "created_at": utc(row["created_at"]),
        "created_by": row["created_by"],
        "expires_at": utc(row["expires_at"]),
        "revoked_at": utc(row["revoked_at"]),
        "last_used_at": utc(row["last_used_at"]),
    }
