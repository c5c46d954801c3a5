"""Lists in pages: `?limit=` and `?cursor=` in, `{"data": [...], "next_cursor": …}` out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from starlette.requests import Request

from proxy.api.answers import Paged
from proxy.api.operations import Parameter
from proxy.errors import InvalidRequestError

MAX_LIMIT = 500
_DEFAULT_LIMIT = 100
_MAX_INTEGER = 2**63 - 1

Key = TypeVar("Key")
Item = TypeVar("Item")


_LIMIT = Parameter(
    name="limit",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": _DEFAULT_LIMIT},
    summary="How many rows a page has at most.",
)
_CURSOR = "The `next_cursor` of the page before; left out, the list begins with the newest."
# The parameters of a list that is read by `page_by_uuid`, and by `page_by_integer`.
PAGED_BY_UUID = (
    _LIMIT,
    Parameter(name="cursor", schema={"type": "string", "format": "uuid"}, summary=_CURSOR),
)
PAGED_BY_INTEGER = (
    _LIMIT,
    Parameter(name="cursor", schema={"type": "integer", "minimum": 0}, summary=_CURSOR),
)


@dataclass(frozen=True, slots=True)
class Page(Generic[Key]):
    """Which part of a list was asked for: the rows that come after `before`."""

    before: Key | None
    size: int

    @property
    def limit(self) -> int:
        """How many rows to read: one more than shown tells whether there is another page."""
        return self.size + 1

    def show(
        self,
        rows: Sequence[Mapping[str, Any]],
        key: str,
        shape: Callable[[Any], Item],
    ) -> Paged[Item]:
        """Render rows that were read with `limit`; `key` is the column that the cursor holds."""
        shown = rows[: self.size]
        has_more = len(rows) > len(shown)
        return {
            "data": [shape(row) for row in shown],
            "next_cursor": str(shown[-1][key]) if has_more else None,
        }

    @staticmethod
    def go_on(shown: Paged[Item], before: UUID | None) -> Paged[Item]:
        """Have a page that a bounded search found go on behind where the search came to."""
        if shown["next_cursor"] is None and before is not None:
            shown["next_cursor"] = str(before)
        return shown


def page_by_uuid(request: Request) -> Page[UUID]:
    """Read the page of a list whose cursor is a uuid; InvalidRequestError."""
    return Page(_cursor(request, UUID), _limit(request))


def page_by_integer(request: Request) -> Page[int]:
    """Read the page of a list whose cursor is an integer; InvalidRequestError."""
    return Page(_cursor(request, _integer), _limit(request))


def _limit(request: Request) -> int:
    text = request.query_params.get("limit")
    if text is None:
        return _DEFAULT_LIMIT
    try:
        limit = _integer(text)
    except ValueError:
        limit = 0
    if not 1 <= limit <= MAX_LIMIT:
        message = f"limit must be a whole number from 1 to {MAX_LIMIT}."
        raise InvalidRequestError(message, param="limit")
    return limit


def _cursor(request: Request, parse: Callable[[str], Key]) -> Key | None:
    text = request.query_params.get("cursor")
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError:
        message = "cursor must be the next_cursor of a page of this list, or be left out."
        raise InvalidRequestError(message, param="cursor") from None


def _integer(text: str) -> int:
    # int() also takes signs, spaces, underscores and the digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_INTEGER))):
        raise ValueError(text)
    return min(int(text), _MAX_INTEGER)
