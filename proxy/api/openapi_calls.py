"""The data plane in the OpenAPI document: bodies and answers are OpenAI's and Anthropic's own."""

from collections.abc import Iterator
from typing import Any

from proxy.api.bodies import CallBody
from proxy.api.openapi_schemas import Schemas
from proxy.dialect import Dialect
from proxy.endpoints import ENDPOINTS, Endpoint

Node = dict[str, Any]

_ANYTHING: Node = {"schema": {"type": "object"}}
_JSON: Node = {"application/json": _ANYTHING}
_EVENTS: Node = {"text/event-stream": {"schema": {"type": "string"}}}
_FILE: Node = {"*/*": {}}
_REFUSED = (400, 401, 402, 403, 404, 409, 413, 429, 502, 503, 504)
_FORM: Node = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
        "image": {"type": "string", "contentMediaType": "application/octet-stream"},
    },
    "required": ["model"],
    "additionalProperties": True,
}


def calls(schemas: Schemas) -> Iterator[tuple[str, str, Node]]:
    """Yield path, method and description of each."""
    for endpoint in ENDPOINTS.values():
        yield endpoint.path, "post", _call(endpoint, schemas)
    body = {"application/json": {"schema": schemas.of(CallBody)}}
    counted = _described("count the tokens of messages", Dialect.ANTHROPIC, _JSON)
    yield "/v1/messages/count_tokens", "post", {**counted, "requestBody": _required(body)}
    listed = _described("list the models that the key may use", Dialect.OPENAI, _JSON)
    yield "/v1/models", "get", listed
    shown = _described("read a model", Dialect.OPENAI, _JSON)
    yield "/v1/models/{model}", "get", {**shown, "parameters": [_segment("model")]}
    for method, what in (("get", "read a stored response"), ("delete", "forget one")):
        stored = _described(what, Dialect.OPENAI, _JSON)
        yield (
            "/v1/responses/{response_id}",
            method,
            {**stored, "parameters": [_segment("response_id")]},
        )


def _call(endpoint: Endpoint, schemas: Schemas) -> Node:
    content = {**_JSON, **_EVENTS} if endpoint.is_events else {**_JSON, **_FILE}
    if endpoint.parse_form is not None:
        content |= _FILE
        body: Node = {"multipart/form-data": {"schema": _FORM}}
    else:
        body = {"application/json": {"schema": schemas.of(CallBody)}}
    described = _described(endpoint.name, endpoint.dialect, content)
    return {**described, "requestBody": _required(body)}


def _described(what: str, dialect: Dialect, content: Node) -> Node:
    shape = "anthropic-" if dialect is Dialect.ANTHROPIC else ""
    refused: Node = {
        str(status): {"$ref": f"#/components/responses/{shape}{status}"} for status in _REFUSED
    }
    return {
        "tags": ["data: calls"],
        "summary": what[0].upper() + what[1:],
        "security": [{"virtualKey": []}, {"virtualKeyHeader": []}],
        "responses": {"200": {"description": "Done.", "content": content}, **refused},
    }


def _required(content: Node) -> Node:
    return {"required": True, "content": content}


def _segment(name: str) -> Node:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
