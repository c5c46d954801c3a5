"""Answers that are not streamed: what they say, and the body that the client may have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import msgspec

from pricing.usage import Usage
from proxy.wire.fields import UNREADABLE, Fields, is_null, raw, read_fields, value_of
from proxy.wire.ids import public_id
from proxy.wire.typed_usage import (
    read_text,
    usage_from_messages,
    usage_from_pictures,
    usage_from_ranking,
    usage_from_responses,
    usage_from_sound,
)
from proxy.wire.usage import read_usage, without_cost

UsageReader = Callable[[Fields], Usage | None]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer says, and the body that the client may have.

    `is_valid` is whether it is an answer of its endpoint at all, with no error in its place.
    `error` is the body, where it has a top-level `error`.
    """

    body: bytes
    is_valid: bool
    model: str | None = None
    usage: Usage | None = None
    answer_id: str | None = None
    service_tier: str | None = None
    error: bytes | None = None


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What makes an endpoint's answers: a member that each of them has, and its usage.

    `tells_failures` is whether an answer may say in its `error` that the model failed, and is an
    answer that was paid for all the same.
    """

    member: str
    begins: bytes
    usage: UsageReader
    tells_failures: bool = False


def read_answer(body: bytes, shape: AnswerShape, *, answer_id: str | None = None) -> Answer:
    """Read an answer of LiteLLM's; any bytes will do, garbage is an answer that is not valid.

    `answer_id` is what the client is to see in the place of the answer's own id.
    """
    try:
        fields = read_fields(body)
    except UNREADABLE:
        return Answer(body=body, is_valid=False)
    is_valid = bytes(memoryview(fields.get(shape.member, b""))[:1]) == shape.begins
    if (
        "error" in fields
        and not is_null(fields.get("error"))
        and not (is_valid and shape.tells_failures)
    ):
        return Answer(body=body, is_valid=False, error=body)
    for name in ("usage", "meta"):
        if name not in fields:
            continue
        reported = fields[name]
        if b"cost" in bytes(reported).lower():
            fields = {**fields, name: raw(without_cost(value_of(reported)))}
            body = msgspec.json.encode(fields)
    own_id = _text_of(fields, "id")
    answer_id = answer_id or public_id(own_id)
    if answer_id != own_id:
        body = msgspec.json.encode({**fields, "id": answer_id})
    return Answer(
        body=body,
        is_valid=is_valid,
        model=_text_of(fields, "model"),
        usage=shape.usage(fields),
        answer_id=answer_id,
        service_tier=_text_of(fields, "service_tier"),
    )


def _text_of(fields: Fields, name: str) -> str | None:
    return read_text(value_of(fields[name])) if name in fields else None


def as_text(body: bytes) -> bytes:
    """Return the text of a transcription alone, with the line's end that providers write."""
    text = str(value_of(read_fields(body).get("text")) or "")
    return (text if text.endswith("\n") else text + "\n").encode()


def _chat(fields: Fields) -> Usage | None:
    usage = fields.get("usage")
    return None if usage is None or is_null(usage) else read_usage(bytes(usage))


def _responses(fields: Fields) -> Usage | None:
    return usage_from_responses(value_of(fields.get("usage")))


def _messages(fields: Fields) -> Usage | None:
    return usage_from_messages(value_of(fields.get("usage")))


def _pictures(fields: Fields) -> Usage | None:
    made = value_of(fields.get("data"))
    count = len(cast("list[object]", made)) if isinstance(made, list) else 0
    usage = usage_from_pictures(value_of(fields.get("usage")))
    if usage is None:
        return Usage(images=count) if count else None
    return Usage.clamped(**{**usage.as_dict(), "images": count})


def _sound(fields: Fields) -> Usage | None:
    return usage_from_sound(value_of(fields.get("usage")), value_of(fields.get("duration")))


def _ranking(fields: Fields) -> Usage | None:
    return usage_from_ranking(value_of(fields.get("meta")))


def _nothing(_: Fields) -> Usage | None:
    return None


CHAT = AnswerShape("choices", b"[", _chat)
EMBEDDINGS = AnswerShape("data", b"[", _chat)
RESPONSES = AnswerShape("output", b"[", _responses, tells_failures=True)
MESSAGES = AnswerShape("content", b"[", _messages)
PICTURES = AnswerShape("data", b"[", _pictures)
SOUND = AnswerShape("text", b'"', _sound)
MODERATIONS = AnswerShape("results", b"[", _nothing)
RANKING = AnswerShape("results", b"[", _ranking)
