"""An account's projects, as its customer and operators manage them."""

from typing import Generic, TypeVar
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from proxy.api.answers import Paged, Project
from proxy.api.bodies import read_body
from proxy.api.key_bodies import ProjectBody, ProjectChanges, budget_columns
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import uuid_in
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.sides import Side, confirm
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, NotFoundError

Caller = TypeVar("Caller")

PROJECT_FILTER = Parameter(
    name="project_id",
    schema={"type": "string", "format": "uuid"},
    summary="Only those of this project.",
)


class ProjectApi(Generic[Caller]):
    """Endpoints on the projects of an account, for one of the sides."""

    def __init__(self, services: Services, side: Side[Caller]) -> None:
        self._projects = services.projects
        self._side = side
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Caller]]:
        """Every endpoint."""
        side, projects = self._side, self._side.root + "/projects"
        one = projects + "/{project_id}"
        return [
            Operation(
                method="GET",
                path=projects,
                handler=self._list,
                needs="read",
                tag="projects",
                summary="List the account's projects",
                answers=Paged[Project],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="POST",
                path=projects,
                handler=self._create,
                needs=side.change,
                tag="projects",
                summary="Create a project",
                body=ProjectBody,
                answers=Project,
                status=201,
            ),
            Operation(
                method="GET",
                path=one,
                handler=self._show,
                needs="read",
                tag="projects",
                summary="Read a project",
                answers=Project,
            ),
            Operation(
                method="PATCH",
                path=one,
                handler=self._change,
                needs=side.change,
                tag="projects",
                summary="Rename a project, or change its budget",
                body=ProjectChanges,
                answers=Project,
            ),
            Operation(
                method="POST",
                path=one + "/archive",
                handler=self._archive,
                needs=side.change,
                tag="projects",
                summary="Archive a project and revoke its keys, at once",
                answers=Project,
                query=side.confirmation,
            ),
        ]

    async def _list(self, request: Request, caller: Caller) -> Response:
        page = page_by_uuid(request)
        account_id = await self._side.account_id(request, caller)
        rows = await self._projects.projects(account_id, before=page.before, limit=page.limit)
        return answer(page.show(rows, "project_id", self._shapes.project))

    async def _create(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        body = await read_body(exchange_of(request), ProjectBody)
        columns = budget_columns(body, self._nanos_per_credit)
        project_id = await self._projects.create(
            account_id,
            name=body.name,
            budget_nanos=columns["budget"],
            budget_period=columns["budget_period"],
            actor=self._side.actor(caller),
        )
        if project_id is None:
            raise ConflictError("This account is closed, so it gets no more projects.")
        return answer(await self._shape(account_id, project_id), 201)

    async def _show(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        return answer(await self._shape(account_id, _project_id(request)))

    async def _change(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        project_id = _project_id(request)
        body = await read_body(exchange_of(request), ProjectChanges)
        outcome = await self._projects.update(
            account_id,
            project_id,
            body.columns(self._nanos_per_credit),
            actor=self._side.actor(caller),
        )
        if outcome == "unknown":
            raise no_project(str(project_id))
        if outcome == "archived":
            raise ConflictError("This project is archived and stays as it is. Create a new one.")
        return answer(await self._shape(account_id, project_id))

    async def _archive(self, request: Request, caller: Caller) -> Response:
        account_id = await self._side.account_id(request, caller)
        project_id = _project_id(request)
        if project_id == self._side.own_project(caller):
            confirm(request, "revoked with its project")
        if not await self._projects.archive(account_id, project_id, actor=self._side.actor(caller)):
            raise no_project(str(project_id))
        return answer(await self._shape(account_id, project_id))

    async def _shape(self, account_id: UUID, project_id: UUID) -> Project:
        row = await self._projects.project(account_id, project_id)
        if row is None:
            raise no_project(str(project_id))
        return self._shapes.project(row)


def _project_id(request: Request) -> UUID:
    project_id = uuid_in(request, "project_id")
    if project_id is None:
        raise no_project(request.path_params["project_id"][:64])
    return project_id


def no_project(shown: str, *, param: str | None = None) -> NotFoundError:
    """What is said of a project that the account has not."""
    return NotFoundError(f"This account has no project {shown!r}.", param=param)
