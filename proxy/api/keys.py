"""An account's virtual keys, as its customer and operators manage them."""

from typing import Generic, TypeVar
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import Key, NewKey, Paged
from proxy.api.bodies import read_body
from proxy.api.filters import id_in
from proxy.api.key_bodies import KeyBody, KeyChanges, KeyRotation
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import uuid_in
from proxy.api.projects import PROJECT_FILTER, no_project
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.sides import Side, confirm
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, NotFoundError
from proxy.keys import NewKey as MadeKey

Caller = TypeVar("Caller")

_CLOSED = "This account is closed, so it gets no more keys."
_REFUSALS = {
    "revoked": "This key is revoked, for good. Create a new one.",
    "expired": "This key has expired. Move its expires_at first, or create a new one.",
    "replaced": "Another key was put in this one's place already. Rotate that one.",
    "closed": _CLOSED,
    "archived_project": "This project is archived, so it gets no more keys.",
}


class KeyApi(Generic[Caller]):
    """Endpoints on the keys of an account, for one of the sides."""

    def __init__(self, services: Services, side: Side[Caller]) -> None:
        self._keys = services.keys
        self._projects = services.projects
        self._side = side
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Caller]]:
        """Every endpoint."""
        side, keys = self._side, self._side.root + "/keys"
        one = keys + "/{key_id}"
        return [
            Operation(
                method="GET",
                path=keys,
                handler=self._list,
                needs="read",
                tag="keys",
                summary="List the account's keys",
                answers=Paged[Key],
                query=(*PAGED_BY_UUID, PROJECT_FILTER),
            ),
            Operation(
                method="POST",
                path=keys,
                handler=self._create,
                needs=side.change,
                tag="keys",
                summary="Create a key; its secret is in the answer, and nowhere else",
                body=KeyBody,
                answers=NewKey,
                status=201,
                refuses=(404,),
            ),
            Operation(
                method="GET",
                path=one,
                handler=self._show,
                needs="read",
                tag="keys",
                summary="Read a key",
                answers=Key,
            ),
            Operation(
                method="PATCH",
                path=one,
                handler=self._change,
                needs=side.change,
                tag="keys",
                summary="Change a key, from its next request on",
                body=KeyChanges,
                answers=Key,
                query=side.confirmation,
            ),
            Operation(
                method="POST",
                path=one + "/rotate",
                handler=self._rotate,
                needs=side.change,
                tag="keys",
                summary="Put a new key in a key's place; its secret is in the answer alone",
                body=KeyRotation,
                answers=NewKey,
                status=201,
                query=side.confirmation,
            ),
            Operation(
                method="DELETE",
                path=one,
                handler=self._revoke,
                needs=side.change,
                tag="keys",
                summary="Revoke a key, at once",
                status=204,
                query=side.confirmation,
            ),
        ]

    async def _list(self, request: Request, caller: Caller) -> Response:
        page = page_by_uuid(request)
        project_id = id_in(request, PROJECT_FILTER.name)
        account_id = await self._side.account_id(request, caller)
        rows = await self._keys.keys(
            account_id, project_id=project_id, before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "key_id", self._shapes.key))

    async def _create(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        body = await read_body(exchange_of(request), KeyBody)
        made = await self._keys.create(
            account_id,
            name=body.name,
            settings=body.settings(self._nanos_per_credit),
            actor=self._side.actor(caller),
        )
        if made is None:
            raise await self._why_not(account_id, body.project_id)
        return await self._shown_once(account_id, made)

    async def _show(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        return answer(await self._shape(account_id, _key_id(request)))

    async def _change(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        key_id = _key_id(request)
        body = await read_body(exchange_of(request), KeyChanges)
        changes = body.columns(self._nanos_per_credit)
        if key_id == self._side.own_key(caller) and _locks_out(body):
            confirm(request, "limited")
        outcome = await self._keys.update(
            account_id, key_id, changes, actor=self._side.actor(caller)
        )
        if outcome == "unknown_project":
            raise no_project(str(body.project_id), param="project_id")
        if outcome != "changed":
            raise _refused(outcome, request)
        return answer(await self._shape(account_id, key_id))

    async def _rotate(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        key_id = _key_id(request)
        body = await read_body(exchange_of(request), KeyRotation)
        if key_id == self._side.own_key(caller) and body.overlap_s == 0:
            confirm(request, "revoked before the new one is in your hands")
        rotated = await self._keys.rotate(
            account_id, key_id, overlap_s=body.overlap_s, actor=self._side.actor(caller)
        )
        if rotated.key is None:
            raise _refused(rotated.outcome, request)
        return await self._shown_once(account_id, rotated.key)

    async def _revoke(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        key_id = _key_id(request)
        if key_id == self._side.own_key(caller):
            confirm(request, "revoked")
        if not await self._keys.revoke(account_id, key_id, actor=self._side.actor(caller)):
            raise _no_key(request)
        return Response(status_code=204)

    async def _shown_once(self, account_id: UUID, made: MadeKey) -> Response:
        shape = await self._shape(account_id, made.key_id)
        return answer({**shape, "account_id": account_id, "key": made.secret}, 201)

    async def _shape(self, account_id: UUID, key_id: UUID) -> Key:
        row = await self._keys.key(account_id, key_id)
        if row is None:
            raise NotFoundError(f"This account has no key '{key_id}'.")
        return self._shapes.key(row)

    async def _why_not(
        self, account_id: UUID, project_id: UUID | None
    ) -> ConflictError | NotFoundError:
        """Why there was no key to be made."""
        if project_id is not None:
            project = await self._projects.project(account_id, project_id)
            if project is None:
                return no_project(str(project_id), param="project_id")
            if project["status"] == "archived":
                return ConflictError(_REFUSALS["archived_project"], param="project_id")
        return ConflictError(_CLOSED)


def _key_id(request: Request) -> UUID:
    key_id = uuid_in(request, "key_id")
    if key_id is None:
        raise _no_key(request)
    return key_id


def _no_key(request: Request) -> NotFoundError:
    return NotFoundError(f"This account has no key {request.path_params['key_id'][:64]!r}.")


def _refused(outcome: str, request: Request) -> ConflictError | NotFoundError:
    if outcome == "unknown":
        return _no_key(request)
    return ConflictError(_REFUSALS[outcome])


def _locks_out(body: KeyChanges) -> bool:
    """Whether a change may keep a key from undoing it."""
    changed = body.model_fields_set
    return (
        ("role" in changed and body.role != "manage")
        or ("expires_at" in changed and body.expires_at is not None)
        or ("allowed_networks" in changed and body.allowed_networks is not None)
    )
