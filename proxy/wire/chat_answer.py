"""The answer of a chat completion that was not streamed."""

from dataclasses import dataclass

import msgspec

from pricing.usage import Usage
from proxy.wire.fields import UNREADABLE, is_null, raw, read_fields, value_of
from proxy.wire.usage import read_usage, without_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """What an answer says, and the body that the client may have.

    `is_valid` is whether it is a chat completion at all: an object with a list of `choices`, and
    no error in their place. `error` is the body, where it has a top-level `error`.
    """

    body: bytes
    is_valid: bool
    model: str | None = None
    usage: Usage | None = None
    error: bytes | None = None


def read_chat_answer(body: bytes) -> ChatAnswer:
    """Read an answer of LiteLLM's; any bytes will do, garbage is an answer that is not valid."""
    try:
        fields = read_fields(body)
    except UNREADABLE:
        return ChatAnswer(body=body, is_valid=False)
    if not is_null(fields.get("error")):
        return ChatAnswer(body=body, is_valid=False, error=body)
    usage = fields.get("usage")
    if usage is not None and b"cost" in bytes(usage).lower():
        body = msgspec.json.encode({**fields, "usage": raw(without_cost(value_of(usage)))})
    model = value_of(fields.get("model"))
    return ChatAnswer(
        body=body,
        is_valid=bytes(fields.get("choices", b"")).startswith(b"["),
        model=model if isinstance(model, str) and model else None,
        usage=None if is_null(usage) else read_usage(bytes(usage or b"")),
    )
