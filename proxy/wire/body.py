"""Reading a request's JSON body: one level deep, bounded, and strict where money is decided."""

from typing import TypeVar

import msgspec

from proxy.errors import InvalidRequestError
from proxy.wire.fields import UNREADABLE, Fields, is_null, read_fields

# LiteLLM copies bodies recursively; far beyond this it answers 500.
MAX_DEPTH = 128
# Objects and lists; a million tokens of short messages are fewer.
MAX_NODES = 100_000

_T = TypeVar("_T")

_MAX_MODEL_LENGTH = 256
_NO_MARKS = bytes(set(range(256)) - set(b'[]{}"'))
# In JSON that was read, each bracket has its own kind to close it.
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def read_body(body: bytes) -> Fields:
    """Read a body's members; raises InvalidRequestError for what is no reasonable JSON object."""
    try:
        if not body.isascii():
            body.decode()  # values are skipped unread, so that broken UTF-8 would go unseen
        fields = read_fields(body)
    except RecursionError:
        raise _too_deep() from None
    except msgspec.ValidationError:
        raise InvalidRequestError("The request body must be a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The request body is not valid JSON: {error}") from None
    _check_nesting(body)
    return fields


def decoded(fields: Fields, name: str, kind: type[_T], expected: str) -> _T | None:
    """Decode a member; None where it is absent or null, InvalidRequestError for another kind."""
    member = fields.get(name)
    if member is None or is_null(member):
        return None
    try:
        return msgspec.json.decode(member, type=kind)
    except UNREADABLE:
        raise InvalidRequestError(f"{name} must be {expected}.", param=name) from None


def flag(fields: Fields, name: str) -> bool:
    """Read a boolean member, false where it is absent."""
    return decoded(fields, name, bool, "true or false") or False


def whole_number(fields: Fields, name: str, most: int) -> int | None:
    """Read a count of at least 1; None where it is absent."""
    number = decoded(fields, name, int, f"a whole number between 1 and {most}")
    if number is not None and not 1 <= number <= most:
        raise InvalidRequestError(
            f"{name} must be a whole number between 1 and {most}.", param=name
        )
    return number


def model_of(fields: Fields) -> str:
    """Read the model that is asked for."""
    return checked_model(decoded(fields, "model", str, "a string"))


def checked_model(model: str | None) -> str:
    """Return a model's name; InvalidRequestError for what can't be one."""
    if not model or len(model) > _MAX_MODEL_LENGTH:
        raise InvalidRequestError(
            f"model must be the name of a model, of at most {_MAX_MODEL_LENGTH} characters.",
            param="model",
        )
    if "," in model:
        # LiteLLM would call each and answer with a list.
        raise InvalidRequestError("model must name one model.", param="model")
    return model


def _check_nesting(body: bytes) -> None:
    """Refuse valid JSON that is small to send and dear to decode."""
    if body.count(b"{") + body.count(b"[") <= MAX_DEPTH:
        return
    # Brackets within strings don't count. Without escapes, every other quote ends a string.
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(_ONE_KIND, _NO_MARKS)
    brackets = b"".join(marks.split(b'"')[::2])
    if len(brackets) > 2 * MAX_NODES:
        raise InvalidRequestError(
            f"The request body has too many objects and lists: {MAX_NODES} are the most."
        )
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        # Each round takes away the innermost level.
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(
        f"The request body is nested too deep: {MAX_DEPTH} levels are the most."
    )
