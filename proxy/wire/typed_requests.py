"""What requests to OpenAI's Responses API and Anthropic's Messages API ask for."""

from typing import cast

import msgspec

from pricing.usage import MAX_TOKENS
from proxy.errors import InvalidRequestError
from proxy.wire.body import decoded, flag, model_of, read_body, whole_number
from proxy.wire.fields import Fields, is_null, value_of
from proxy.wire.media import Media, count_media, count_parts
from proxy.wire.request import Request, wants_live_cost

# The id of a stored answer, as providers and LiteLLM make it.
_MAX_ID_LENGTH = 1024


def parse_responses_request(body: bytes) -> Request:
    """Read a request to the Responses API; raises InvalidRequestError."""
    fields = read_body(body)
    given = value_of(fields.get("input"))
    if not given or not isinstance(given, str | list):
        raise InvalidRequestError("input must be a text or a list of items.", param="input")
    if isinstance(given, list):
        _check_items(cast("list[object]", given))
    if flag(fields, "background"):
        raise InvalidRequestError(
            "background is not supported here: an answer is charged when it ends.",
            code="unsupported_parameter",
            param="background",
        )
    previous = decoded(fields, "previous_response_id", str, "the id of a response")
    if previous is not None and not 0 < len(previous) <= _MAX_ID_LENGTH:
        raise InvalidRequestError(
            "previous_response_id is no id of a response.", param="previous_response_id"
        )
    return _with_media(
        body,
        fields,
        count_parts(fields["input"], param="input"),
        output_limit=whole_number(fields, "max_output_tokens", MAX_TOKENS),
        continues=previous,
        # What an instruction or a schema adds can't be counted as messages: nothing is exact.
        text=None,
    )


def _check_items(items: list[object]) -> None:
    """Refuse items that are nothing but an id: OpenAI reads them as references to stored ones."""
    for item in items:
        if not isinstance(item, dict):
            raise InvalidRequestError("input must be a text or a list of items.", param="input")
        members = cast("dict[str, object]", item)
        if not isinstance(members.get("type"), str) and not isinstance(members.get("role"), str):
            raise InvalidRequestError("Each item of input needs a type or a role.", param="input")


def parse_messages_request(body: bytes) -> Request:
    """Read a request to the Messages API; raises InvalidRequestError."""
    fields = read_body(body)
    limit = whole_number(fields, "max_tokens", MAX_TOKENS)
    if limit is None:
        raise InvalidRequestError("max_tokens is required.", param="max_tokens")
    return _messages(body, fields, output_limit=limit)


def parse_count_request(body: bytes) -> Request:
    """Read a request to count the tokens of messages."""
    return _messages(body, read_body(body), output_limit=None)


def _messages(body: bytes, fields: Fields, *, output_limit: int | None) -> Request:
    messages = fields.get("messages", msgspec.Raw(b"[]"))
    media = count_media(messages)
    if not is_null(system := fields.get("system")) and system is not None:
        in_system = count_parts(system, param="system")
        if in_system.images or in_system.audio_clips or in_system.files:
            raise InvalidRequestError("system holds text only.", param="system")
    return _with_media(
        body, fields, media, output_limit=output_limit, continues=None, text=messages
    )


def _with_media(
    body: bytes,
    fields: Fields,
    media: Media,
    *,
    output_limit: int | None,
    continues: str | None,
    text: msgspec.Raw | None,
) -> Request:
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=len(body) - media.tokenless_bytes,
        stream=flag(fields, "stream"),
        output_limit=output_limit,
        live_cost=wants_live_cost(fields),
        images=media.images,
        audio_clips=media.audio_clips,
        files=media.files,
        has_images=bool(media.images),
        has_audio=bool(media.audio_clips),
        service_tier=decoded(fields, "service_tier", str, "a string"),
        continues=continues,
        text=text,
    )
