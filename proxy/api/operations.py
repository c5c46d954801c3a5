"""What each endpoint of the account and admin APIs takes and answers, said once.

Its route, its documentation and its tests are made of the same `Operation`, so none of them can
say what another does not.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.api.paths import uuid_or_none
from proxy.api.web import Handler, notes_of, resource
from proxy.errors import InvalidRequestError

Caller = TypeVar("Caller")
Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of the query, or a header; `schema` is JSON Schema: `{"type": "integer"}`."""

    name: str
    schema: dict[str, object]
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[Caller]):
    """One method of one path.

    `needs` is what its caller must be allowed to: see `proxy.principals` for the roles of virtual
    keys, `proxy.operators` for those of operators. `answers` is the type of the answer's body, a
    TypedDict or a list of them in pages (`Paged[…]`); None where there is none (204). An answer
    that is no JSON has `media_types` in its place, or beside it where the caller chooses. `also`
    are types of answers with another status that is no refusal; `refuses` are refusals that follow
    from nothing else here, such as 402.
    """

    method: Method
    path: str
    handler: Callable[[Request, Caller], Awaitable[Response]]
    needs: str
    tag: str
    summary: str
    answers: object = None
    status: int = 200
    body: type[BaseModel] | None = None
    query: tuple[Parameter, ...] = ()
    headers: tuple[Parameter, ...] = ()
    media_types: tuple[str, ...] = ("application/json",)
    also: Mapping[int, object] = field(default_factory=dict[int, object])
    refuses: tuple[int, ...] = ()


def mount(
    operations: Sequence[Operation[Caller]],
    authenticate: Callable[[Request, Operation[Caller]], Awaitable[Caller]],
) -> list[Route]:
    """Route the operations, each behind the authentication; one route for each path."""
    paths: dict[str, dict[str, Handler]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _guarded(operation, authenticate)
    return [resource(path, **handlers) for path, handlers in paths.items()]


def _guarded(
    operation: Operation[Caller],
    authenticate: Callable[[Request, Operation[Caller]], Awaitable[Caller]],
) -> Handler:
    async def endpoint(request: Request) -> Response:
        notes = notes_of(request)
        notes.operation = f"{operation.method} {operation.path}"
        notes.ids = {
            name: str(found)
            for name, text in request.path_params.items()
            if (found := uuid_or_none(str(text))) is not None
        }
        caller = await authenticate(request, operation)
        _check_query(request, operation)
        return await operation.handler(request, caller)

    return endpoint


def _check_query(request: Request, operation: Operation[Caller]) -> None:
    """Refuse what no parameter is: a filter that is misspelt would give everything."""
    known = [parameter.name for parameter in operation.query]
    for name in request.query_params:
        if name not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            message = f"{name[:64]!r} is no query parameter of {operation.path}. {takes}"
            raise InvalidRequestError(message, param=name[:64])
