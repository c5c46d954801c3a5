"""Metering a stream of typed events: OpenAI's Responses API and Anthropic's Messages API.

Each event's data names its type. One of the last tells the usage; from that one on the stream is
held back until it is settled. What else comes after it, against the books, releases it again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import msgspec

from pricing.usage import Usage
from proxy.wire.delivered import DeliveredEvents, typed_output_bytes
from proxy.wire.fields import UNREADABLE
from proxy.wire.ids import public_id
from proxy.wire.sse import DONE, EventSplitter, ends_an_event, event_data
from proxy.wire.typed_usage import read_text, usage_from_messages, usage_from_responses
from proxy.wire.usage import cost_text, members_of, without_cost


@dataclass(frozen=True, slots=True)
class EventFormat:
    """How an API writes its stream.

    `opening` events name the model, `closing` ones the usage, with `last` the stream is over, and
    with `failed` it has failed. `body` is the member of those events that the model and the usage
    stand in; None where they stand at the top. `trusts_cost` is whether LiteLLM's cost in the
    usage is that of the whole answer. `end` is the event that follows the one with the usage.
    """

    opening: frozenset[str]
    closing: frozenset[str]
    last: frozenset[str]
    failed: frozenset[str]
    body: Mapping[str, str]
    read_usage: Callable[..., Usage | None]
    trusts_cost: bool
    end: bytes = b""


RESPONSES = EventFormat(
    opening=frozenset({"response.created"}),
    closing=frozenset({"response.completed", "response.incomplete"}),
    last=frozenset({"response.completed", "response.incomplete"}),
    failed=frozenset({"error", "response.failed"}),
    body={
        "response.created": "response",
        "response.completed": "response",
        "response.incomplete": "response",
    },
    read_usage=lambda *reports: usage_from_responses(reports[-1]),
    trusts_cost=True,
)
MESSAGES = EventFormat(
    opening=frozenset({"message_start"}),
    closing=frozenset({"message_delta"}),
    last=frozenset({"message_stop"}),
    failed=frozenset({"error"}),
    body={"message_start": "message"},
    read_usage=usage_from_messages,
    # It prices only the tokens of the event that it stands in.
    trusts_cost=False,
    end=b'event: message_stop\ndata: {"type": "message_stop"}\n\n',
)


class TypedStreamMeter:
    """A StreamMeter of typed events; `tells_price` adds the price to the usage."""

    def __init__(
        self,
        form: EventFormat,
        max_event_bytes: int,
        *,
        tells_price: bool,
    ) -> None:
        self.usage: Usage | None = None
        self.cost_text: str | None = None
        self.model: str | None = None
        self.answer_id: str | None = None
        self.service_tier: str | None = None
        self.saw_done = False
        self.error: bytes | None = None
        self._form = form
        self._tells_price = tells_price
        self._splitter = EventSplitter(max_event_bytes)
        self._delivered = DeliveredEvents(typed_output_bytes)
        self._reports: list[object] = []
        # From the event with the usage on: the bytes of each, and its data where that is read.
        self._held: list[tuple[bytes, dict[str, object] | None]] = []
        self._late = b""
        read = form.opening | form.closing | form.last | form.failed | {"error", "usage"}
        # JSON within a model's words has its quotes escaped, so only whole strings match.
        self._marks = [DONE, *(b'"%s"' % kind.encode() for kind in sorted(read))]

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes; UpstreamProtocolError for an event larger than the limit."""
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

    def closing(self, price_usd_text: str | None) -> bytes:
        """Return what was held back, with the price in the place of the provider's cost."""
        events = [_written(event, self._priced(data, price_usd_text)) for event, data in self._held]
        # It is all there and paid for, so a stream that broke off behind its usage gets its end.
        end = b"" if self.saw_done else self._form.end
        return self._late + b"".join(events) + end

    @property
    def output_bytes(self) -> int:
        """UTF-8 bytes of what the model has said in the events that were passed on."""
        return self._delivered.output_bytes

    @property
    def has_final_usage(self) -> bool:
        """Whether the usage came, and nothing of the answer after it."""
        return self.usage is not None and (self.saw_done or bool(self._held))

    def _passes_unread(self, data: bytes) -> bool:
        return not (
            self._held
            or self.saw_done
            or self.error is not None
            or any(mark in data for mark in self._marks)
        )

    def _read(self, event: bytes) -> bytes:
        if self.error is not None:
            return b""
        if self._passes_unread(event):
            return event
        data = event_data(event)
        if data is None:
            return self._hold(event, None) if self._held else event
        if data.strip() == DONE:
            # LiteLLM's addition: neither API ends its streams so.
            return b""
        try:
            fields = msgspec.json.decode(data, type=dict[str, object])
        except UNREADABLE:
            # No client could read it, and nobody knows what it would give away.
            return b""
        return self._take(event, data, fields)

    def _take(self, event: bytes, data: bytes, fields: dict[str, object]) -> bytes:
        if self.saw_done:
            return b""  # nothing belongs behind the end
        kind = fields.get("type")
        if kind in self._form.failed or fields.get("error") is not None:
            self.error = data
            return b""
        if kind in self._form.last:
            self.saw_done = True
        if kind in self._form.opening or kind in self._form.closing:
            self._note(str(kind), fields)
        if kind in self._form.closing or kind in self._form.last:
            return self._hold(event, fields)
        if kind not in self._form.opening:
            # Whatever was held was not the end.
            self._held.append((event, fields))
            released = self._held
            self._held = []
        else:
            released = [(event, fields)]
        return b"".join([_written(e, self._priced(d, None, hides=True)) for e, d in released])

    def _hold(self, event: bytes, fields: dict[str, object] | None) -> bytes:
        self._held.append((event, fields))
        return b""

    def _note(self, kind: str, fields: Mapping[str, object]) -> None:
        body = self._body(kind, fields)
        self.model = self.model or read_text(body.get("model"))
        self.answer_id = self.answer_id or public_id(read_text(body.get("id")))
        self.service_tier = read_text(body.get("service_tier")) or self.service_tier
        if body.get("usage") is None:
            return
        self._reports.append(body["usage"])
        if kind in self._form.closing:
            self.usage = self._form.read_usage(*self._reports)
            if self._form.trusts_cost:
                self.cost_text = cost_text(msgspec.Raw(msgspec.json.encode(body["usage"])))

    def _body(self, kind: str, fields: Mapping[str, object]) -> Mapping[str, object]:
        member = self._form.body.get(kind)
        return fields if member is None else members_of(fields.get(member))

    def _priced(
        self, fields: dict[str, object] | None, price_usd_text: str | None, *, hides: bool = False
    ) -> dict[str, object] | None:
        """Return an event's data without the provider's cost; None where it has none anyway."""
        if fields is None:
            return None
        priced = _public(fields)
        kind = str(fields.get("type"))
        body = self._body(kind, priced)
        if self._tells_price and kind in self._form.closing and not hides and body.get("usage"):
            price = msgspec.Raw((price_usd_text or "null").encode())
            told = {**body, "usage": {**members_of(body["usage"]), "cost": price}}
            member = self._form.body.get(kind)
            return told if member is None else {**priced, member: told}
        return None if priced == fields else priced


def _public(members: Mapping[str, object]) -> dict[str, object]:
    """Return an event's data without what only the operator may see: costs, and deployments."""
    public = dict(members)
    if "usage" in public:
        public["usage"] = without_cost(public["usage"])
    own_id = read_text(members.get("id"))
    if own_id != public_id(own_id):
        public["id"] = public_id(own_id)
    for name in ("response", "message"):
        if isinstance(inner := members.get(name), dict):
            public[name] = _public(cast("dict[str, object]", inner))
    return public


def _written(event: bytes, data: dict[str, object] | None) -> bytes:
    """Return an event as it came, or with other data: its other lines stay."""
    if data is None:
        return event
    lines = [line for line in event.splitlines() if line and not line.startswith(b"data:")]
    return b"".join([line + b"\n" for line in lines]) + b"data: %b\n\n" % msgspec.json.encode(data)
