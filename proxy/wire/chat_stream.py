"""Metering a streamed chat completion while it goes by.

`feed` gives back what may leave at once. The end of the stream, from the usage on, is held back
until it is settled; `closing` writes it then, with the customer's price where LiteLLM put the
provider's cost. However the stream is cut into chunks, the client gets the same bytes and the
meter reads the same usage.
"""

from typing import cast

import msgspec

from pricing.usage import Usage
from proxy.wire.fields import UNREADABLE, Fields, is_null, raw, read_fields, value_of
from proxy.wire.sse import DONE, DONE_EVENT, EVENT_ENDS, EventSplitter, data_event, event_data
from proxy.wire.usage import cost_text, usage_from_openai, without_cost

# The bytes of events that were passed on but not read. They are read only where somebody asks how
# much was delivered, or when this many have come together, so that memory stays bounded.
_MAX_UNREAD_BYTES = 65_536

# The members of a delta that a model's tokens become; LiteLLM repeats some under other names.
_TEXTS = ("content", "reasoning_content", "refusal")


class ChatStreamMeter:
    """Reads one stream; use it for one request only.

    Attributes:
        usage: the tokens, once the stream has told them.
        cost_text: LiteLLM's `usage.cost`, in the digits that it came in; USD.
        model: the model that answered, from the first event that names it.
        saw_done: whether `[DONE]` came.
        error: the JSON of the event with a top-level `error`, which ends the stream.
        truncated: whether the stream ended within an event, which was dropped.
    """

    def __init__(self, client_wants_usage: bool, max_event_bytes: int) -> None:  # noqa: FBT001 (the one question that a stream is metered by)
        self.usage: Usage | None = None
        self.cost_text: str | None = None
        self.model: str | None = None
        self.saw_done = False
        self.error: bytes | None = None
        self.truncated = False
        self._client_wants_usage = client_wants_usage
        self._splitter = EventSplitter(max_event_bytes)
        self._passed = _PassedEvents()
        # The last event with a usage, and whether its other members have yet to be passed on.
        self._usage_event: Fields | None = None
        self._is_held = False

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the upstream and return those that may leave now.

        Raises UpstreamProtocolError for an event that is larger than the limit.
        """
        if (
            self.model is not None
            and not self._is_held
            and self._splitter.is_between_events
            and chunk.endswith(EVENT_ENDS)
            and not self._has_ended
            and not _may_matter(chunk)
        ):
            self._passed.add(chunk)
            return chunk
        passed = b"".join([self._read(event) for event in self._splitter.feed(chunk)])
        self._passed.add(passed)
        return passed

    def end(self) -> bytes:
        """Note that the upstream ended; return what may leave now, which is nearly always nothing.

        An unfinished event at the end is dropped, as a client would do.
        """
        passed = b"".join([self._read(event) for event in self._splitter.end()])
        self._passed.add(passed)
        self.truncated = not self._splitter.is_between_events
        return passed

    def closing(self, price_usd_text: str | None) -> bytes:
        """Return the end of the stream for the client, with what it was charged (None: unknown)."""
        event = self._usage_event
        if event is None:
            return DONE_EVENT
        tail = b""
        if self._client_wants_usage:
            usage = without_cost(value_of(event["usage"]))
            if isinstance(usage, dict):
                usage["cost"] = msgspec.Raw((price_usd_text or "null").encode())
            # Where more events came after the usage, its own content has left already.
            content = {} if self._is_held else {"choices": raw([])}
            tail = data_event({**event, **content, "usage": raw(usage)})
        elif self._is_held:
            tail = _without_usage(event)
        return tail + DONE_EVENT

    @property
    def output_bytes(self) -> int:
        """UTF-8 bytes of what the model has said in the events that `feed` returned."""
        return self._passed.read().output_bytes

    @property
    def saw_output(self) -> bool:
        """Whether the model has said anything."""
        return self.output_bytes > 0

    @property
    def finish_seen(self) -> bool:
        """Whether a `finish_reason` came, in an event that was passed on or is held back."""
        held = self._usage_event if self._is_held else None
        return self._passed.read().finish_seen or (held is not None and _finishes(held))

    @property
    def _has_ended(self) -> bool:
        return self.saw_done or self.error is not None

    def _read(self, event: bytes) -> bytes:
        """Look at one event and return what may leave now."""
        if self._has_ended:
            return b""
        if self.model is not None and not self._is_held and not _may_matter(event):
            return event
        data = event_data(event)
        if data is None:
            return event
        if data.strip() == DONE:
            self.saw_done = True
            return b""
        try:
            fields = read_fields(data)
        except UNREADABLE:
            # No client could read it either, and nobody knows what it may give away.
            return b"" if _may_matter(data) else event
        if self.model is None:
            model = value_of(fields.get("model"))
            self.model = model if isinstance(model, str) and model else None
        if not is_null(fields.get("error")):
            self.error = data
            return b""
        released = self._release()
        if is_null(fields.get("usage")):
            return released + event
        self._hold(fields)
        return released

    def _hold(self, fields: Fields) -> None:
        usage = usage_from_openai(value_of(fields["usage"]))
        if usage is not None or self._usage_event is None:
            self.usage = usage
            self.cost_text = cost_text(fields["usage"])
        self._usage_event = fields
        self._is_held = True

    def _release(self) -> bytes:
        """Let go of an event whose usage turned out not to be the end of the stream."""
        if not self._is_held or self._usage_event is None:
            return b""
        self._is_held = False
        return _without_usage(self._usage_event)


def _may_matter(data: bytes) -> bool:
    """Whether there could be a usage, an error or the end in here.

    JSON within a model's text has its quotes escaped, so only names of members match.
    """
    return b'"usage"' in data or b'"error"' in data or DONE in data


def _without_usage(event: Fields) -> bytes:
    """Write an event without its usage; nothing if there is nothing else in it."""
    rest = {name: member for name, member in event.items() if name != "usage"}
    has_content = _finishes(event) or any(
        not is_empty(delta) for _, delta in _choices(event)
    )
    return data_event(rest) if has_content else b""
