"""Metering a streamed chat completion, or text completion, while it goes by.

`feed` gives back what may leave at once. The end of the stream, from the usage on, is held back
until it is settled; `closing` writes it then, with the customer's price where LiteLLM put the
provider's cost. However the stream is cut into chunks, the client gets the same bytes and the
meter reads the same usage.
"""

from typing import cast

import msgspec

from pricing.usage import Usage
from proxy.wire.delivered import DeliveredEvents, has_content
from proxy.wire.fields import UNREADABLE, Fields, is_null, raw, read_fields, value_of
from proxy.wire.sse import DONE, DONE_EVENT, EventSplitter, data_event, ends_an_event, event_data
from proxy.wire.typed_usage import read_text
from proxy.wire.usage import cost_text, read_usage, without_cost


class ChatStreamMeter:
    """Reads one stream; made anew for each.

    Attributes:
        usage: the tokens, once the stream has told them.
        cost_text: LiteLLM's `usage.cost` in USD, in the digits that it came in.
        model: the model that answered, from the first event that names it.
        saw_done: whether `[DONE]` came.
        error: the JSON of an event with a top-level `error`; nothing after it is passed on.
        truncated: whether the stream ended within an event, which was dropped then.
    """

    def __init__(self, client_wants_usage: bool, max_event_bytes: int) -> None:  # noqa: FBT001
        self.usage: Usage | None = None
        self.cost_text: str | None = None
        self.model: str | None = None
        self.answer_id: str | None = None
        self.service_tier: str | None = None
        self.saw_done = False
        self.error: bytes | None = None
        self.truncated = False
        self._client_wants_usage = client_wants_usage
        self._splitter = EventSplitter(max_event_bytes)
        self._delivered = DeliveredEvents()
        # The event with the usage that counts, and the latest one with any usage. Some providers
        # put a usage on every event, so which is the last shows only when the next has come.
        self._usage_event: Fields | None = None
        self._held: Fields | None = None
        self._late = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the upstream and return those that may leave now.

        Raises UpstreamProtocolError for an event that is larger than the limit.
        """
        if ends_an_event(chunk) and self._splitter.is_between_events and self._passes_unread(chunk):
            passed = chunk
        else:
            passed = b"".join([self._read(event) for event in self._splitter.feed(chunk)])
        self._delivered.add(passed)
        return passed

    def end(self) -> None:
        """Note that the upstream ended. An event that it did not finish is dropped, as SSE says."""
        self._late = b"".join([self._read(event) for event in self._splitter.end()])
        self._delivered.add(self._late)
        self.truncated = not self._splitter.is_between_events

    def closing(self, price_usd_text: str | None) -> bytes:
        """Return the end of the stream for the client, with what it was charged (None: unknown)."""
        held, event = self._held, self._usage_event
        tail = b""
        if held is not None and (held is not event or not self._client_wants_usage):
            tail = _without_usage(held)
        if event is not None and self._client_wants_usage:
            # What else stood in that event has left already, unless it is the one held back.
            others = event if event is held else {**event, "choices": raw([])}
            usage = _priced(event["usage"], price_usd_text)
            tail += data_event({**others, "usage": usage})
        return self._late + tail + DONE_EVENT

    @property
    def output_bytes(self) -> int:
        """UTF-8 bytes of what the model has said in the events that were passed on."""
        return self._delivered.output_bytes

    @property
    def has_final_usage(self) -> bool:
        """Whether the usage is that of the whole answer: it came last, in an event of its own.

        Some providers put the tokens so far on every event; if such a stream is cut, the last of
        them is not the whole.
        """
        event = self._usage_event
        if event is None or self.usage is None:
            return False
        return self.saw_done or (self._held is event and not has_content(event))

    def _passes_unread(self, data: bytes) -> bool:
        """Whether there can't be a usage, an error or the end in these whole events.

        JSON within a model's words has its quotes escaped, so only names of members match.
        """
        return (
            self.model is not None
            and self._held is None
            and b'"usage"' not in data
            and b'"error"' not in data
            and DONE not in data
            and not self._has_ended
        )

    @property
    def _has_ended(self) -> bool:
        return self.saw_done or self.error is not None

    def _read(self, event: bytes) -> bytes:
        """Look at one event and return what may leave now, which may be an earlier one."""
        if self._has_ended:
            return b""
        if self._passes_unread(event):
            return event
        data = event_data(event)
        if data is None:
            return event
        if data.strip() == DONE:
            self.saw_done = True
            return b""
        return self._read_data(event, data)

    def _read_data(self, event: bytes, data: bytes) -> bytes:
        try:
            fields = read_fields(data)
        except UNREADABLE:
            # No client could read it, and nobody knows what it would give away.
            return b""
        if not is_null(fields.get("error")):
            self.error = data
            return b""
        if self.model is None:
            self.model = read_text(value_of(fields.get("model")))
            self.answer_id = read_text(value_of(fields.get("id")))
        released = b"" if self._held is None else _without_usage(self._held)
        self._held = None
        if is_null(fields.get("usage")):
            return released + event
        self._hold(fields)
        return released

    def _hold(self, fields: Fields) -> None:
        self._held = fields
        usage = read_usage(bytes(fields["usage"]))
        if usage is not None or self._usage_event is None:
            self._usage_event = fields
            self.usage = usage
            self.cost_text = cost_text(fields["usage"])
            self.service_tier = read_text(value_of(fields.get("service_tier")))


def _without_usage(event: Fields) -> bytes:
    """Write an event without its usage; nothing where there is nothing else in it."""
    if not has_content(event):
        return b""
    return data_event({name: member for name, member in event.items() if name != "usage"})


def _priced(usage: msgspec.Raw, price_usd_text: str | None) -> object:
    """Return a usage with the customer's price in the place of every cost of the provider's."""
    members = without_cost(value_of(usage))
    if not isinstance(members, dict):
        return members
    price = msgspec.Raw((price_usd_text or "null").encode())
    return {**cast("dict[str, object]", members), "cost": price}
