"""How much of a stream's events is the model's own words, for a stream that was cut."""

from collections.abc import Callable
from typing import cast

import msgspec

from proxy.wire.fields import UNREADABLE, Fields, is_null, value_of

# Events that were passed on but not read. They are read only where somebody asks, or when this
# much has come together: relaying stays cheap, and memory bounded.
_MAX_UNREAD_BYTES = 65_536

# What every chunk has; any other member is something that a client may wait for.
_ENVELOPE = frozenset(
    {"id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"}
)


class _Call(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    function: _Call | None = None


class _Audio(msgspec.Struct):
    transcript: str | None = None


class _Delta(msgspec.Struct):
    """The members that are a model's tokens; LiteLLM repeats some of them under other names."""

    content: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    audio: _Audio | None = None
    function_call: _Call | None = None
    tool_calls: list[_ToolCall] | None = None

    def output_bytes(self) -> int:
        texts = [self.content, self.reasoning_content, self.refusal]
        if self.audio is not None:
            texts.append(self.audio.transcript)
        for call in (self.function_call, *(tool.function for tool in self.tool_calls or ())):
            if call is not None:
                texts += (call.name, call.arguments)
        return sum(len(text.encode()) for text in texts if text)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    # Of a text completion.
    text: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None


class _Words(msgspec.Struct):
    """What a typed event adds; Anthropic's signatures of thinking are no words."""

    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None


class _TypedEvent(msgspec.Struct):
    delta: _Words | str | None = None


_EVENT = msgspec.json.Decoder(_Event)
_TYPED_EVENT = msgspec.json.Decoder(_TypedEvent)


def chat_output_bytes(data: bytes) -> int:
    """UTF-8 bytes of the model's words in the data of an event with `choices`."""
    said = 0
    for choice in _EVENT.decode(data).choices or ():
        said += len((choice.text or "").encode())
        if choice.delta is not None:
            said += choice.delta.output_bytes()
    return said


def typed_output_bytes(data: bytes) -> int:
    """UTF-8 bytes of the model's words in the data of a typed event."""
    delta = _TYPED_EVENT.decode(data).delta
    if isinstance(delta, _Words):
        texts = (delta.text, delta.thinking, delta.partial_json)
        return sum(len(text.encode()) for text in texts if text)
    return len((delta or "").encode())


class DeliveredEvents:
    """Collects whole events and counts the words in them, as late as possible.

    `words` counts those of one event's data; it raises one of UNREADABLE for what has none.
    """

    def __init__(self, words: Callable[[bytes], int] = chat_output_bytes) -> None:
        self._words = words
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._output_bytes = 0

    def add(self, events: bytes) -> None:
        """Take whole events."""
        self._unread.append(events)
        self._unread_bytes += len(events)
        if self._unread_bytes > _MAX_UNREAD_BYTES:
            self._read()

    @property
    def output_bytes(self) -> int:
        """UTF-8 bytes of text, reasoning and tool calls; nothing for what has another shape."""
        self._read()
        return self._output_bytes

    def _read(self) -> None:
        events = b"".join(self._unread)
        self._unread.clear()
        self._unread_bytes = 0
        for line in events.splitlines():
            if line.startswith(b"data:"):
                try:
                    self._output_bytes += self._words(line[5:])
                except UNREADABLE:
                    continue


def has_content(event: Fields) -> bool:
    """Whether an event tells a client anything besides its usage."""
    if any(not is_null(member) for name, member in event.items() if name not in _ENVELOPE):
        return True
    choices = value_of(event.get("choices"))
    for choice in cast("list[object]", choices) if isinstance(choices, list) else ():
        members = cast("dict[str, object]", choice) if isinstance(choice, dict) else {}
        said = [value for name, value in members.items() if name not in ("index", "delta")]
        delta = members.get("delta")
        if isinstance(delta, dict):
            said += cast("dict[str, object]", delta).values()
        if any(value not in (None, "") for value in said):
            return True
    return False
