"""The OpenAPI document, made of the declarations that the routes are made of.

It holds nothing of one installation: no name, no address, no secret, and so it is open to all.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy.api import answers, openapi_calls
from proxy.api.bodies import CallBody
from proxy.api.openapi_schemas import Schemas, error_responses
from proxy.api.operations import Operation, mount
from proxy.api.planes import Plane

Node = dict[str, Any]

_PATH = "/openapi.json"
_DESCRIPTION = """\
A metering reverse proxy before LiteLLM, with a prepaid credit ledger that adds up.

Every answer has an `x-request-id`; quote it to whoever runs the service. Amounts are decimal text \
in credits and in US dollars, times are RFC 3339 in UTC, lists come in pages, newest first. Errors \
are in OpenAI's shape (under `/v1/messages` in Anthropic's), and their `message` says what to do."""
_SECURITY_SCHEMES: Node = {
    "virtualKey": {
        "type": "http",
        "scheme": "bearer",
        "description": "A virtual key, `sk-…`.",
    },
    "virtualKeyHeader": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "A virtual key, as Anthropic's SDKs send it.",
    },
    "adminKey": {"type": "http", "scheme": "bearer", "description": "An admin key."},
    "opsToken": {
        "type": "http",
        "scheme": "bearer",
        "description": "`TALLYGATE_OPS_TOKEN`; not asked for on loopback.",
    },
}


class OpenApi:
    """Serves the document of these planes."""

    def __init__(self, planes: Sequence[Plane]) -> None:
        self._planes = planes
        self._encoded: bytes | None = None

    def routes(self) -> list[Route]:
        """Its one path, open to all."""
        return mount([self._operation()], _anybody)

    def document(self) -> Node:
        """Make the document."""
        own = Plane(
            name="document",
            summary="This document, open to all.",
            operations=[self._operation()],
            routes=(),
            schemes=(),
            roles={},
        )
        return make_document([*self._planes, own])

    def _operation(self) -> Operation[None]:
        return Operation(
            method="GET",
            path=_PATH,
            handler=self._show,
            needs="look",
            tag="document",
            summary="Read this document",
            answers=dict[str, object],
        )

    async def _show(self, _request: Request, _caller: None) -> Response:
        if self._encoded is None:
            self._encoded = msgspec.json.encode(self.document())
        return Response(self._encoded, media_type="application/json")


async def _anybody(_request: Request, _operation: Operation[None]) -> None:
    """Whoever asks may read it."""


def make_document(planes: Sequence[Plane]) -> Node:
    """Describe the operations of these planes, and the calls of the data plane."""
    schemas = Schemas(_types(planes))
    paths: dict[str, Node] = {}
    for plane in planes:
        for operation in plane.operations:
            described = _describe(plane, operation, schemas)
            paths.setdefault(operation.path, {})[operation.method.lower()] = described
    for path, method, described in openapi_calls.calls(schemas):
        paths.setdefault(path, {})[method] = described
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tallygate",
            "version": version("tallygate"),
            "description": _DESCRIPTION,
        },
        "paths": paths,
        "components": {
            "schemas": schemas.components,
            "responses": error_responses(schemas),
            "securitySchemes": _SECURITY_SCHEMES,
        },
    }


def _types(planes: Sequence[Plane]) -> Iterator[object]:
    yield from (answers.Error, answers.AnthropicError, CallBody)
    for plane in planes:
        for operation in plane.operations:
            yield from (operation.answers, operation.body, *operation.also.values())


def _describe(plane: Plane, operation: Operation[Any], schemas: Schemas) -> Node:
    may = [role for role, allowed in plane.roles.items() if operation.needs in allowed]
    described: Node = {
        "operationId": _operation_id(operation),
        "tags": [f"{plane.name}: {operation.tag}"],
        "summary": operation.summary,
    }
    if plane.roles:
        described["description"] = f"For the roles {', '.join(may)}."
        described["x-needs"] = operation.needs
    described["security"] = [{scheme: []} for scheme in plane.schemes]
    parameters = [_path_parameter(name) for name in path_names(operation.path)]
    parameters += [
        {
            "name": each.name,
            "in": place,
            "description": each.summary,
            "schema": each.schema,
        }
        for place, given in (("query", operation.query), ("header", operation.headers))
        for each in given
    ]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas.of(operation.body)}},
        }
    described["responses"] = _responses(plane, operation, schemas)
    return described


def _responses(plane: Plane, operation: Operation[Any], schemas: Schemas) -> Node:
    done: Node = {"description": "Done."}
    if operation.answers is not None:
        done["content"] = {
            **_texts(operation),
            "application/json": {"schema": schemas.of(operation.answers)},
        }
    elif operation.status != 204:
        done["content"] = _texts(operation)
    responses: Node = {str(operation.status): done}
    for status, type_ in operation.also.items():
        content = {"application/json": {"schema": schemas.of(type_)}}
        responses[str(status)] = {"description": "See the summary.", "content": content}
    for status in sorted(_refusals(plane, operation)):
        responses.setdefault(str(status), {"$ref": f"#/components/responses/{status}"})
    return responses


def _texts(operation: Operation[Any]) -> Node:
    return {name: {"schema": {"type": "string"}} for name in operation.media_types}


def _refusals(plane: Plane, operation: Operation[Any]) -> set[int]:
    """Which refusals follow from what an operation takes and does."""
    if not plane.roles:
        return {403} if plane.schemes else set()
    refusals = {401, 403, 429, 503, *operation.refuses}
    if operation.query or operation.headers or operation.body is not None:
        refusals.add(400)
    if path_names(operation.path):
        refusals.add(404)
    if operation.body is not None:
        refusals.add(413)
    if operation.method != "GET":
        refusals |= {400, 409}
    return refusals


def path_names(path: str) -> list[str]:
    """The names of a path's parameters, in order."""
    return re.findall(r"\{(\w+)", path)


def _path_parameter(name: str) -> Node:
    schema: Node = {"type": "string"}
    if name.endswith("_id"):
        schema["format"] = "uuid"
    elif name == "version":
        schema = {"type": "integer", "minimum": 1}
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _operation_id(operation: Operation[Any]) -> str:
    words = re.findall(r"\w+", operation.path)
    return "_".join([operation.method.lower(), *words])
