"""What a chat completion request asks for, and the body that goes upstream instead of it.

Only what decides about money is decoded; the rest stays the bytes that came. The upstream body is
written anew from the parsed members, so that it has no name twice and nothing that another parser
could read in another way.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from pricing.usage import MAX_TOKENS
from proxy.errors import InvalidRequestError
from proxy.wire.fields import UNREADABLE, Fields, is_null, raw, read_fields
from proxy.wire.media import count_media

MAX_CHOICES = 128
# LiteLLM copies bodies recursively; far beyond this it answers 500.
MAX_DEPTH = 128
# Objects and lists; a million tokens of short messages are fewer.
MAX_NODES = 100_000

_T = TypeVar("_T")

_MAX_MODEL_LENGTH = 256
_OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")
_NO_MARKS = bytes(set(range(256)) - set(b'[]{}"'))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A request as far as metering it goes.

    `fields` are all its top-level members. `output_limit` is the client's own limit for each of
    `n` choices. `prompt_bytes` is at least as many as the tokens that the request's text can
    become; pictures, audio clips and files come on top. `prediction_bytes` bounds the predicted
    tokens that are charged as output without being part of the answer. `modalities` are the kinds
    of output asked for, none for the usual text.
    """

    fields: Fields
    model: str
    stream: bool
    output_limit: int | None
    n: int
    include_usage: bool
    prompt_bytes: int
    images: int
    audio_clips: int
    files: int
    prediction_bytes: int
    modalities: frozenset[str]


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read a body; raises InvalidRequestError, with the parameter that is wrong."""
    fields = _read_body(body)
    media = count_media(fields.get("messages", raw([])))
    limits = [_whole_number(fields, name, MAX_TOKENS) for name in _OUTPUT_LIMITS]
    prediction = fields.get("prediction")
    return ChatRequest(
        fields=fields,
        model=_model(fields),
        stream=_decoded(fields, "stream", bool, "true or false") or False,
        output_limit=min((limit for limit in limits if limit is not None), default=None),
        n=_whole_number(fields, "n", MAX_CHOICES) or 1,
        include_usage=_asks_for_usage(fields),
        prompt_bytes=len(body) - media.tokenless_bytes,
        images=media.images,
        audio_clips=media.audio_clips,
        files=media.files,
        prediction_bytes=0 if is_null(prediction) else len(bytes(prediction or b"")),
        modalities=frozenset(_decoded(fields, "modalities", list[str], "a list of strings") or ()),
    )


def upstream_body(
    request: ChatRequest,
    *,
    fields: Mapping[str, msgspec.Raw],
    output_limit: int | None,
    api_key: str | None,
) -> bytes:
    """Write the body for LiteLLM from the members that may pass.

    A stream always reports its usage, whatever the client asked. `output_limit` caps each choice:
    in the member that the client used, or in `max_tokens`. `api_key` is the customer's own.
    """
    members: dict[str, object] = dict(fields)
    if request.stream:
        options = _decoded(request.fields, "stream_options", Fields, "an object") or {}
        members["stream_options"] = {**options, "include_usage": raw(value=True)}
    if output_limit is not None:
        used = [name for name in _OUTPUT_LIMITS if not is_null(fields.get(name))]
        members |= dict.fromkeys(used or ["max_tokens"], output_limit)
    if api_key is not None:
        members["api_key"] = api_key
    return msgspec.json.encode(members)


def _read_body(body: bytes) -> Fields:
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


def _check_nesting(body: bytes) -> None:
    """Refuse valid JSON that is small to send and dear to decode."""
    if body.count(b"{") + body.count(b"[") <= MAX_DEPTH:
        return
    # Brackets within strings don't count. Without escapes, every other quote ends a string.
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NO_MARKS)
    brackets = b"".join(marks.split(b'"')[::2])
    if len(brackets) > 2 * MAX_NODES:
        raise InvalidRequestError(
            f"The request body has too many objects and lists: {MAX_NODES} are the most."
        )
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        # Each round takes away the innermost level.
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise _too_deep()


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(
        f"The request body is nested too deep: {MAX_DEPTH} levels are the most."
    )


def _model(fields: Fields) -> str:
    model = _decoded(fields, "model", str, "a string")
    if not model or len(model) > _MAX_MODEL_LENGTH:
        raise InvalidRequestError(
            f"model must be the name of a model, of at most {_MAX_MODEL_LENGTH} characters.",
            param="model",
        )
    if "," in model:
        # LiteLLM would call each and answer with a list.
        raise InvalidRequestError("model must name one model.", param="model")
    return model


def _whole_number(fields: Fields, name: str, most: int) -> int | None:
    number = _decoded(fields, name, int, f"a whole number between 1 and {most}")
    if number is not None and not 1 <= number <= most:
        raise InvalidRequestError(
            f"{name} must be a whole number between 1 and {most}.", param=name
        )
    return number


def _asks_for_usage(fields: Fields) -> bool:
    options = _decoded(fields, "stream_options", dict[str, object], "an object") or {}
    return options.get("include_usage") is True


def _decoded(fields: Fields, name: str, kind: type[_T], expected: str) -> _T | None:
    """Decode a member; None where it is absent or null."""
    member = fields.get(name)
    if member is None or is_null(member):
        return None
    try:
        return msgspec.json.decode(member, type=kind)
    except UNREADABLE:
        raise InvalidRequestError(f"{name} must be {expected}.", param=name) from None
