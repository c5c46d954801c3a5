"""A chat completion request: the members that we read, everything else as the bytes it came in.

The top level is read once and written anew, so that what LiteLLM parses is what we have checked:
no duplicate names, no differences between parsers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from proxy.errors import InvalidRequestError

_decode_top = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_MAX_MODEL_CHARACTERS = 256
_MAX_CHOICES = 128
_MAX_TOKENS = 10**9
# Only a body that has one of these can hold anything but text.
_ATTACHMENT_MARKS = (b"image", b"audio", b"file", b"video", b"data:")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One request, checked as far as metering needs it.

    `prompt_bytes` bounds the prompt's tokens: the body without the payload of data URLs.
    `output_limit` is the client's own, for each of `n` choices; None if it set none.
    """

    fields: Mapping[str, msgspec.Raw]
    model: str
    stream: bool
    output_limit: int | None
    n: int
    include_usage: bool
    prompt_bytes: int
    images: int = 0
    audio_clips: int = 0
    files: int = 0


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read and check a body; InvalidRequestError says what is wrong with it."""
    fields = _object(body)
    stream = _flag(fields, "stream")
    options = _value(fields, "stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "an object")
    _check_messages(fields)
    payload_bytes, attachments = _attachments(body, fields)
    limits = [
        limit
        for name in ("max_completion_tokens", "max_tokens")
        if (limit := _count(fields, name, _MAX_TOKENS)) is not None
    ]
    return ChatRequest(
        fields=fields,
        model=_model(fields),
        stream=stream,
        output_limit=min(limits) if limits else None,
        n=_count(fields, "n", _MAX_CHOICES) or 1,
        include_usage=bool(cast("dict[str, Any]", options or {}).get("include_usage")),
        prompt_bytes=len(body) - payload_bytes,
        **attachments,
    )


def upstream_body(
    request: ChatRequest,
    *,
    fields: Mapping[str, msgspec.Raw],
    output_limit: int | None,
    api_key: str | None,
) -> bytes:
    """Write the body for LiteLLM.

    `fields` are those that may pass, `output_limit` is the clamp where the client set no limit, and
    `api_key` the customer's own. A stream always brings its usage, whether the client wants to see
    it or not: nothing else tells what it cost.
    """
    body: dict[str, object] = dict(fields)
    if request.stream:
        options = _value(fields, "stream_options") or {}
        body["stream_options"] = cast("dict[str, Any]", options) | {"include_usage": True}
    else:
        body.pop("stream_options", None)  # providers refuse it without `stream`
    if output_limit is not None:
        body["max_tokens"] = output_limit
    if api_key is not None:
        body["api_key"] = api_key
    return msgspec.json.encode(body)


def _object(body: bytes) -> dict[str, msgspec.Raw]:
    try:
        # Raw members are not looked into, and must be whole JSON all the same.
        fields = _decode_top(body)
        msgspec.json.decode(body, type=object)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"The request body is not a JSON object: {error}."
        raise InvalidRequestError(msg, code="invalid_json") from None
    return fields


def _value(fields: Mapping[str, msgspec.Raw], name: str) -> object:
    raw = fields.get(name)
    return None if raw is None else msgspec.json.decode(raw)


def _model(fields: Mapping[str, msgspec.Raw]) -> str:
    model = _value(fields, "model")
    if not isinstance(model, str) or not 0 < len(model) <= _MAX_MODEL_CHARACTERS:
        raise _wrong("model", f"the name of a model, of 1 to {_MAX_MODEL_CHARACTERS} characters")
    return model


def _flag(fields: Mapping[str, msgspec.Raw], name: str) -> bool:
    value = _value(fields, name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false")
    return bool(value)


def _count(fields: Mapping[str, msgspec.Raw], name: str, most: int) -> int | None:
    value = _value(fields, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise _wrong(name, f"an integer from 1 to {most}")
    return value


def _check_messages(fields: Mapping[str, msgspec.Raw]) -> None:
    messages = bytes(fields.get("messages", b"")).strip()
    if not messages.startswith(b"[") or messages[1:-1].strip() == b"":
        raise _wrong("messages", "an array of at least one message")


def _wrong(name: str, what: str) -> InvalidRequestError:
    msg = f"{name!r} must be {what}."
    return InvalidRequestError(msg, param=name, code="invalid_value")


def _attachments(
    body: bytes, fields: Mapping[str, msgspec.Raw]
) -> tuple[int, dict[str, int]]:
    """Bytes of data URLs and encoded sound, which are no text, and how many things there are."""
    if not any(mark in body for mark in _ATTACHMENT_MARKS):
        return 0, {}
    payload_bytes = 0
    counts = {"images": 0, "audio_clips": 0, "files": 0}
    for part in _parts(msgspec.json.decode(fields["messages"])):
        kind = _KINDS.get(str(part.get("type")))
        if kind is not None:
            counts[kind] += 1
            if kind != "files":  # a file's bytes may all be text: they count as such
                payload_bytes += sum(map(len, _payloads(part)))
    return payload_bytes, counts


_KINDS = {
    "image_url": "images",
    "input_image": "images",
    "image": "images",
    "input_audio": "audio_clips",
    "audio": "audio_clips",
    "audio_url": "audio_clips",
    "video_url": "files",
    "file": "files",
    "input_file": "files",
    "document": "files",
}


def _parts(messages: object) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for message in cast("list[object]", messages):
        content = cast("dict[str, Any]", message).get("content") if isinstance(message, dict) else 0
        if isinstance(content, list):
            parts += [part for part in cast("list[Any]", content) if isinstance(part, dict)]
    return parts


def _payloads(part: dict[str, Any]) -> list[str]:
    """Base64 in a part: of a data URL, or of sound."""
    found: list[str] = []
    for value in part.values():
        inner = cast("dict[str, Any]", value).values() if isinstance(value, dict) else [value]
        found += [
            text
            for text in inner
            if isinstance(text, str) and (text.startswith("data:") or part["type"] == "input_audio")
        ]
    return found
