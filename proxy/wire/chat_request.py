"""What a chat completion request asks for."""

from typing import Annotated

import msgspec

from pricing.usage import MAX_TOKENS
from proxy.wire.body import checked_model, decoded, flag, model_of, read_body, whole_number
from proxy.wire.fields import UNREADABLE, Fields, is_null, raw
from proxy.wire.media import count_media
from proxy.wire.request import Request, wants_live_cost

MAX_CHOICES = 128
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")

_NO_MESSAGES = raw([])
# A short body is read once more in a fraction of the time that its members take one by one.
_MOST_READ_TWICE = 8192
_Limit = Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None


class _Plain(msgspec.Struct):
    """The members that decide about money, where each of them is in order."""

    model: str
    messages: msgspec.Raw = _NO_MESSAGES
    stream: bool | None = None
    max_completion_tokens: _Limit = None
    max_tokens: _Limit = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    stream_options: msgspec.Raw | None = None
    prediction: msgspec.Raw | None = None


_decode_plain = msgspec.json.Decoder(_Plain).decode


def parse_chat_request(body: bytes) -> Request:
    """Read a body; raises InvalidRequestError, with the parameter that is wrong."""
    fields = read_body(body)
    asked = _asked(body, fields)
    model = checked_model(asked.model)
    media = count_media(asked.messages)
    limits = (asked.max_completion_tokens, asked.max_tokens)
    limit = None if limits == (None, None) else min(one for one in limits if one is not None)
    modalities = asked.modalities or ()
    prediction = asked.prediction
    has_options = asked.stream_options is not None
    return Request(
        fields=fields,
        model=model,
        stream=asked.stream or False,
        output_limit=limit,
        n=asked.n or 1,
        include_usage=has_options and asks_for_usage(fields),
        live_cost=has_options and wants_live_cost(fields),
        prompt_bytes=len(body) - media.tokenless_bytes,
        images=media.images,
        audio_clips=media.audio_clips,
        files=media.files,
        prediction_bytes=0 if is_null(prediction) else len(bytes(prediction or b"")),
        has_audio=bool(media.audio_clips) or "audio" in modalities,
        has_images=bool(media.images) or "image" in modalities,
        service_tier=asked.service_tier,
        text=asked.messages,
    )


def _asked(body: bytes, fields: Fields) -> _Plain:
    if len(body) > _MOST_READ_TWICE:
        return _checked(fields)
    try:
        return _decode_plain(body)
    except UNREADABLE:
        return _checked(fields)


def _checked(fields: Fields) -> _Plain:
    """Read the members one by one, to say which of them is wrong."""
    return _Plain(
        messages=fields.get("messages", _NO_MESSAGES),
        max_completion_tokens=whole_number(fields, "max_completion_tokens", MAX_TOKENS),
        max_tokens=whole_number(fields, "max_tokens", MAX_TOKENS),
        modalities=decoded(fields, "modalities", list[str], "a list of strings"),
        model=model_of(fields),
        stream=flag(fields, "stream"),
        n=whole_number(fields, "n", MAX_CHOICES),
        stream_options=fields.get("stream_options"),
        prediction=fields.get("prediction"),
        service_tier=decoded(fields, "service_tier", str, "a string"),
    )


def asks_for_usage(fields: Fields) -> bool:
    """Whether a client wants the usage of its stream."""
    options = decoded(fields, "stream_options", dict[str, object], "an object") or {}
    return options.get("include_usage") is True
