"""JSON Schema of what endpoints take and answer, of their types, as components of a document."""

from collections.abc import Iterable
from typing import Any, cast

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from proxy.api.answers import AnthropicError, Error

Node = dict[str, Any]

_ROOT = "#/components/schemas/"
_REFUSALS = {
    400: "The request is malformed; `param` names what is wrong, `message` says what to send.",
    401: "No key was sent, or one that is unknown or revoked.",
    402: "The balance or a budget does not cover it.",
    403: "The key is known and may not do this.",
    404: "There is no such thing, as far as this key can see.",
    409: "It contradicts what is there, such as the same reference for something else.",
    413: "The body is too large.",
    429: "Too many requests, or a limit is reached; `retry-after` says when to try again.",
    502: "The provider failed; nothing is charged.",
    503: "The ledger or the provider can't be reached; try again shortly.",
    504: "The provider did not answer in time; nothing is charged.",
}


class Schemas:
    """The schemas of some types; None among them is skipped."""

    def __init__(self, types: Iterable[object]) -> None:
        # A body has members that may be left out, an answer has all of its members.
        inputs: list[tuple[object, JsonSchemaMode, TypeAdapter[Any]]] = [
            (type_, "validation" if _is_body(type_) else "serialization", _adapter(type_))
            for type_ in dict.fromkeys(types)
            if type_ is not None
        ]
        schemas, definitions = TypeAdapter.json_schemas(inputs, ref_template=_ROOT + "{model}")
        self._schemas = {type_: _tidy(schema) for (type_, _), schema in schemas.items()}
        self.components = {
            name: _tidy(schema)
            for name, schema in sorted(
                (_name(name), schema) for name, schema in definitions.get("$defs", {}).items()
            )
        }

    def of(self, type_: object) -> Node:
        """The schema of one of the types: most often a reference to a component."""
        return self._schemas[type_]


def error_responses(schemas: Schemas) -> Node:
    """Describe every refusal, by its status, in OpenAI's shape and in Anthropic's."""
    return {
        f"{prefix}{status}": {
            "description": text,
            "content": {"application/json": {"schema": schemas.of(shape)}},
        }
        for prefix, shape in (("", Error), ("anthropic-", AnthropicError))
        for status, text in _REFUSALS.items()
    }


def _adapter(type_: Any) -> TypeAdapter[Any]:  # noqa: ANN401 - a type, or a form of one
    return TypeAdapter(type_)


def _is_body(type_: object) -> bool:
    return isinstance(type_, type) and issubclass(type_, BaseModel)


def _name(name: str) -> str:
    """Name a page after its rows: Paged[Account] is an AccountPage."""
    return f"{name[6:-1]}Page" if name.startswith("Paged_") else name


def _tidy(node: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Leave out titles that only repeat names, and say that nothing undeclared is answered."""
    if isinstance(node, list):
        return [_tidy(each) for each in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    tidied: Node = {}
    for key, value in cast("Node", node).items():
        if key == "properties":
            tidied[key] = {name: _tidy(schema) for name, schema in value.items()}
        elif key == "$ref":
            tidied[key] = _ROOT + _name(value.removeprefix(_ROOT))
        elif key in {"default", "enum", "const", "examples"}:
            tidied[key] = value
        elif key != "title":
            tidied[key] = _tidy(value)
    if "properties" in tidied:
        tidied.setdefault("additionalProperties", False)
    return tidied
