"""What a list, a summary or an export is narrowed to: `?since=`, `?until=`, `?model=` and so on."""

from datetime import UTC, datetime
from uuid import UUID

from starlette.requests import Request

from proxy.api.operations import Parameter
from proxy.api.paths import uuid_or_none
from proxy.errors import InvalidRequestError
from proxy.history import EntryFilter, UsageFilter

_STATUSES = ("billed", "needs_review", "void", "byok", "pending")
_MAX_CHARACTERS = 256

TIMES = (
    Parameter(
        name="since",
        schema={"type": "string", "format": "date-time"},
        summary="The earliest time, RFC 3339.",
    ),
    Parameter(
        name="until",
        schema={"type": "string", "format": "date-time"},
        summary="The time before which they end, RFC 3339.",
    ),
)


def text_parameter(name: str, summary: str) -> Parameter:
    """Declare a text that `text_in` reads."""
    schema: dict[str, object] = {"type": "string", "minLength": 1, "maxLength": _MAX_CHARACTERS}
    return Parameter(name=name, schema=schema, summary=summary)


def _id(name: str, summary: str) -> Parameter:
    return Parameter(name=name, schema={"type": "string", "format": "uuid"}, summary=summary)


USAGE_FILTERS = (
    *TIMES,
    text_parameter("model", "Of this model alone."),
    _id("key_id", "Of this key alone."),
    _id("project_id", "Of this project alone."),
    Parameter(
        name="status",
        schema={"type": "string", "enum": list(_STATUSES)},
        summary="Of this status alone.",
    ),
    text_parameter("endpoint", "Of this endpoint alone, such as `chat.completions`."),
)
ENTRY_FILTERS = (*TIMES, text_parameter("kind", "Of this kind alone, such as `capture`."))


def usage_filter(request: Request) -> UsageFilter:
    """Read which requests are meant; InvalidRequestError."""
    status = text_in(request, "status")
    if status is not None and status not in _STATUSES:
        message = f"status must be one of {', '.join(_STATUSES)}."
        raise InvalidRequestError(message, param="status")
    return UsageFilter(
        since=moment_in(request, "since"),
        until=moment_in(request, "until"),
        model=text_in(request, "model"),
        key_id=id_in(request, "key_id"),
        project_id=id_in(request, "project_id"),
        status=status,
        endpoint=text_in(request, "endpoint"),
    )


def entry_filter(request: Request) -> EntryFilter:
    """Read which ledger entries are meant; InvalidRequestError."""
    return EntryFilter(
        since=moment_in(request, "since"),
        until=moment_in(request, "until"),
        kind=text_in(request, "kind"),
    )


def moment_in(request: Request, name: str) -> datetime | None:
    """Read a time, to the millisecond and in UTC; InvalidRequestError."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        # A plus sign that was not escaped has become a space.
        moment = datetime.fromisoformat(text.replace(" ", "+"))
        in_utc = moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        in_utc = None
    if in_utc is None:
        message = f"{name} must be a time with its zone, such as 2026-11-01T00:00:00Z."
        raise InvalidRequestError(message, param=name)
    # Ids know no less.
    return in_utc.replace(microsecond=in_utc.microsecond // 1000 * 1000)


def text_in(request: Request, name: str) -> str | None:
    """Read a text; InvalidRequestError unless it is short and printable."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if not 1 <= len(text) <= _MAX_CHARACTERS or not text.isprintable():
        message = f"{name} must be a text of 1 to {_MAX_CHARACTERS} printable characters."
        raise InvalidRequestError(message, param=name)
    return text


def id_in(request: Request, name: str) -> UUID | None:
    """Read an id; None where it is left out. InvalidRequestError."""
    text = request.query_params.get(name)
    if text is None:
        return None
    found = uuid_or_none(text)
    if found is None:
        raise InvalidRequestError(f"{name} must be an id as this API shows it.", param=name)
    return found
