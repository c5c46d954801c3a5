"""Server-sent events: cutting a stream of bytes into events, and writing them.

An event ends with an empty line, whose line ends may be LF, CRLF or CR
(https://html.spec.whatwg.org/multipage/server-sent-events.html). Events stay the bytes that came:
all events and the rest, put together, are the stream again.
"""

import re
from collections.abc import Mapping

import msgspec

from proxy.errors import UpstreamProtocolError

DONE_EVENT = b"data: [DONE]\n\n"
DONE = b"[DONE]"

# Atomic, so that CRLF is never taken for two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
# The longest blank line, CRLF CRLF, less its last byte: it may stand across two chunks.
_OVERLAP = 3


class EventSplitter:
    """Cuts chunks of any size into events; keeps at most `max_event_bytes` of an unfinished one."""

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending = bytearray()
        self._searched = 0

    @property
    def is_between_events(self) -> bool:
        """Whether all that came so far was whole events."""
        return not self._pending

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the events that are complete now, each with its empty line.

        Raises UpstreamProtocolError where an unfinished event outgrows the limit.
        """
        self._pending += chunk
        return self._take(is_end=False)

    def end(self) -> list[bytes]:
        """Return an event whose closing CR could have been half of a CRLF until now."""
        return self._take(is_end=True)

    def _take(self, *, is_end: bool) -> list[bytes]:
        pending = self._pending
        events: list[bytes] = []
        start = 0
        for blank in _BLANK_LINE.finditer(pending, self._searched):
            if blank.end() == len(pending) and pending.endswith(b"\r") and not is_end:
                break
            events.append(bytes(pending[start : blank.end()]))
            start = blank.end()
        del pending[:start]
        self._searched = max(len(pending) - _OVERLAP, 0)
        if len(pending) > self._max_event_bytes:
            raise UpstreamProtocolError(
                "The provider sent an event that is larger than this service takes."
            )
        return events


def ends_an_event(chunk: bytes) -> bool:
    """Whether a chunk ends with an event, and it takes no splitter to see it.

    True for LF LF alone, as nearly all events end: one line end more may belong to the next event,
    and a CR to a CRLF.
    """
    return chunk.endswith(b"\n\n") and chunk[-3:-2] not in {b"\n", b"\r"}


def event_data(event: bytes) -> bytes | None:
    """Return what an event's `data` lines say; None for a comment or an event without data."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line[:5] == b"data:"]
    return b"\n".join(lines) if lines else None


def data_event(payload: object) -> bytes:
    """Write an event with a JSON payload."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def error_event(body: Mapping[str, object]) -> bytes:
    """Write the event that makes the SDKs raise: an error body in OpenAI's shape."""
    return data_event(dict(body))
