"""An OpenAPI document as a page to read: every operation, and the types that it speaks of."""

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

_HEAD = """\
# The HTTP interface

Made of the code by `make api-docs`; the same as OpenAPI 3.1 is at `GET /openapi.json` of every
service, for generators of clients. [Words](glossary.md) mean the same everywhere.

- **Keys.** A virtual key goes as `Authorization: Bearer sk-…` or as `x-api-key`; an admin key as
  `Authorization: Bearer …`. The roles that may call an operation stand beside it.
- **Money** is decimal text, exactly: `{"credits": "12.5", "usd": "0.0125"}`. Bodies take text or
  whole numbers, never a fraction as a JSON number.
- **Times** are RFC 3339 in UTC. **Ids** are uuids that sort by time.
- **Lists** are `{"data": […], "next_cursor": …}`, newest first: `?limit=` up to 500, and
  `?cursor=` with the `next_cursor` of the page before.
- **Errors** are `{"error": {"message", "type", "param", "code"}}`, and the message says what to do.
  `x-should-retry: false` stands where another try can't help. What belongs to another account is
  404.
- Every answer has an `x-request-id`.
"""
_PLANES = {
    "account": "The account API: what a customer sees and does of the own account",
    "admin": "The admin API: what operators sell, limit, see and correct",
    "data": "The data plane: calls to models, in OpenAI's and Anthropic's shapes",
    "ops": "Operations: open on loopback, elsewhere with `TALLYGATE_OPS_TOKEN`",
    "document": "The document: open to all",
}
_SIGNS = {"query": "?{}=", "header": "{}:"}


def render(document: Json) -> str:
    """Write the page."""
    parts = [_HEAD]
    for plane, title in _PLANES.items():
        parts.append(f"## {title}\n")
        parts += [
            _operation(path, method, described)
            for path, methods in document["paths"].items()
            for method, described in methods.items()
            if described["tags"][0].startswith(f"{plane}:")
        ]
    parts.append("## Types\n")
    parts.append("Members of bodies that may be left out are marked `?`.\n")
    for name, schema in document["components"]["schemas"].items():
        # A page of rows says nothing that its rows do not.
        if not name.endswith("Page"):
            parts.append(_type(name, schema))
    return "\n".join(parts).rstrip() + "\n"


def _operation(path: str, method: str, described: Json) -> str:
    said = [f"### `{method.upper()} {path}`\n", described["summary"] + "."]
    if "description" in described:
        said[-1] += " " + described["description"]
    given = [each for each in described.get("parameters", ()) if each["in"] != "path"]
    if given:
        said.append("")
        said += [
            f"- `{_SIGNS[each['in']].format(each['name'])}` {_kind(each['schema'])}:"
            f" {each['description']}"
            for each in given
        ]
    said += ["", *_exchange(described)]
    return "\n".join(said) + "\n"


def _exchange(described: Json) -> Iterator[str]:
    content = described.get("requestBody", {}).get("content", {})
    takes = "; ".join(_shown(*each) for each in content.items())
    answers: list[str] = []
    refusals: list[str] = []
    for status, response in described["responses"].items():
        if "$ref" not in response:
            body = " or ".join(_shown(*each) for each in response.get("content", {}).items())
            answers.append(f"{status} {body}".rstrip())
        else:
            refusals.append(status)
    if takes:
        yield f"Takes {takes}."
    yield (
        f"Answers {', '.join(answers)}; refuses with {', '.join(refusals)}."
        if refusals
        else (f"Answers {', '.join(answers)}.")
    )


def _shown(media_type: str, content: Json) -> str:
    schema = content.get("schema", {})
    if media_type != "application/json":
        return f"`{media_type}`"
    return _kind(schema) if "$ref" in schema else "`application/json`"


def _type(name: str, schema: Json) -> str:
    said = [f"### {name}\n"]
    if "description" in schema:
        said += [schema["description"], ""]
    required = set(schema.get("required", ()))
    for member, described in schema.get("properties", {}).items():
        mark = "" if member in required else "?"
        line = f"- `{member}`{mark} {_kind(described)}"
        said.append(line + (f": {described['description']}" if "description" in described else ""))
    return "\n".join(said) + "\n"


def _kind(schema: Json) -> str:
    """Name a schema in a few words."""
    if "$ref" in schema:
        return _link(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(each) for each in schema["anyOf"]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    words = schema.get("format") or schema.get("type") or "anything"
    bounds = [
        f"{word} {schema[key]}"
        for key, word in (("minimum", "from"), ("maximum", "to"))
        if key in schema and abs(schema[key]) < 2**31 - 1
    ]
    return " ".join([{"string": "text", "null": "null"}.get(words, words), *bounds])


def _link(name: str) -> str:
    if name.endswith("Page"):
        row = name.removesuffix("Page")
        return f"a page of [{row}](#{row.lower()})"
    return f"[{name}](#{name.lower()})"
