"""A line of an export, and how its values are read: money as integers, days in UTC."""

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime

from pricing.errors import InvalidAmountError
from pricing.money import ceil_div, picos_from_float_text

_SHOWN = 60
_UNIX_SECONDS = re.compile(r"[0-9]{9,11}(?:\.[0-9]+)?")
_WHOLE = re.compile(r"([0-9]{1,18})(?:\.0+)?")


class ExportError(ValueError):
    """A file that can't be read as what it is said to be; the text says where and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What an export tells of one request, or of all of a model on a day; None where it does not.

    `cost_picos` is below zero where the provider gives something back.
    """

    day: date
    model: str | None = None
    request_id: str | None = None
    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_picos: int | None = None


def picos(value: object, *, per_usd: int = 1) -> int | None:
    """Read an amount of money in USD, or in cents where `per_usd` is 100; None for nothing."""
    text = _text(value).removeprefix("$")
    if not text:
        return None
    is_negative = text.startswith("-")
    try:
        amount = ceil_div(picos_from_float_text(text.removeprefix("-").removeprefix("$")), per_usd)
    except InvalidAmountError as error:
        raise ExportError(f"an amount is none: {error}") from None
    return -amount if is_negative else amount


def whole(value: object) -> int | None:
    """Read a count; None for nothing."""
    text = _text(value)
    if not text:
        return None
    match = _WHOLE.fullmatch(text)
    if match is None:
        raise ExportError(f"{text[:_SHOWN]!r} is no count")
    return int(match[1])


def total(*values: object) -> int | None:
    """Add counts up; None where there is none of them."""
    counts = [count for value in values if (count := whole(value)) is not None]
    return sum(counts) if counts else None


def moment(value: object) -> datetime:
    """Read Unix seconds or an ISO 8601 time, which is UTC where it does not say."""
    text = _text(value)
    try:
        if _UNIX_SECONDS.fullmatch(text):
            return datetime.fromtimestamp(int(text.partition(".")[0]), UTC)
        read = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ExportError(f"{text[:_SHOWN]!r} is neither a time nor a day") from None
    return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)


def name(value: object) -> str | None:
    """Read a text; None where it is missing or blank."""
    return _text(value) or None


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ExportError(f"a value is {type(value).__name__} where a number or text was expected")
    return str(value).strip()
