"""What a chat completion request asks for."""

from pricing.usage import MAX_TOKENS
from proxy.wire.body import decoded, flag, model_of, read_body, whole_number
from proxy.wire.fields import Fields, is_null, raw
from proxy.wire.media import count_media
from proxy.wire.request import Request, wants_live_cost

MAX_CHOICES = 128
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens")


def parse_chat_request(body: bytes) -> Request:
    """Read a body; raises InvalidRequestError, with the parameter that is wrong."""
    fields = read_body(body)
    messages = fields.get("messages", raw([]))
    media = count_media(messages)
    limits = [whole_number(fields, name, MAX_TOKENS) for name in OUTPUT_LIMITS]
    prediction = fields.get("prediction")
    modalities = frozenset(decoded(fields, "modalities", list[str], "a list of strings") or ())
    return Request(
        fields=fields,
        model=model_of(fields),
        stream=flag(fields, "stream"),
        output_limit=min((limit for limit in limits if limit is not None), default=None),
        n=whole_number(fields, "n", MAX_CHOICES) or 1,
        include_usage=asks_for_usage(fields),
        live_cost=wants_live_cost(fields),
        prompt_bytes=len(body) - media.tokenless_bytes,
        images=media.images,
        audio_clips=media.audio_clips,
        files=media.files,
        prediction_bytes=0 if is_null(prediction) else len(bytes(prediction or b"")),
        has_audio=bool(media.audio_clips) or "audio" in modalities,
        has_images=bool(media.images) or "image" in modalities,
        service_tier=decoded(fields, "service_tier", str, "a string"),
        text=messages,
    )


def asks_for_usage(fields: Fields) -> bool:
    """Whether a client wants the usage of its stream."""
    options = decoded(fields, "stream_options", dict[str, object], "an object") or {}
    return options.get("include_usage") is True
