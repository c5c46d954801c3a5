"""Values that a JSON Schema of the OpenAPI document allows, the smallest of them."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

Json = dict[str, Any]

_TEXTS = {
    "uuid": str(UUID(int=1)),
    "date-time": (datetime.now(UTC) + timedelta(days=30)).isoformat(),
    "date": "2026-01-01",
    "uri": "https://example.com/hook",
}
# Members whose schema does not say what they hold.
_MEMBERS: Json = {
    "document": {"default": {"kind": "markup", "factor": "2"}},
    "model": "priced",
    "action": "example",
    "url": "https://receiver.invalid/hook",
}


def example_of(schema: Json, document: Json, ids: dict[str, str]) -> Any:
    """Make a value with the members that are required, and these ids where they belong.

    An example of the schema's own goes first.
    """
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return example_of(document["components"]["schemas"][name], document, ids)
    said = [schema[key] for key in ("const", "default") if key in schema]
    said += [*schema.get("examples", []), *schema.get("enum", [])]
    if said:
        return _with_ids(said[0], ids)
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices is not None:
        return example_of(choices[0], document, ids)
    return _of_type(schema, document, ids)


def _of_type(schema: Json, document: Json, ids: dict[str, str]) -> Any:
    match schema.get("type"):
        case "object":
            members: Json = schema.get("properties", {})
            required: list[str] = schema.get("required", [])
            made = {name: example_of(members[name], document, ids) for name in required}
            return _with_ids(made, ids)
        case "array":
            return [example_of(schema["items"], document, ids)] * schema.get("minItems", 0)
        case "string":
            return _TEXTS.get(schema.get("format", ""), "example")
        case "integer" | "number":
            return schema.get("minimum", 1)
        case kind:
            return {"boolean": True}.get(str(kind))


def _with_ids(value: Any, ids: dict[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    members: Json = value  # pyright: ignore[reportUnknownVariableType]
    known = {**_MEMBERS, **ids}
    return {name: known.get(name, member) for name, member in members.items()}
