import msgspec
import pytest

from proxy.errors import UpstreamProtocolError
from proxy.wire.sse import EventSplitter, error_event, event_data


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_every_kind_of_empty_line_ends_an_event_wherever_the_chunks_are_cut(end: bytes) -> None:
    events = [b"data: a" + end, b": comment" + end, b"data: b\ndata: c" + end]
    stream = b"".join(events)
    for cut in range(len(stream) + 1):
        splitter = EventSplitter(100)
        got = [*splitter.feed(stream[:cut]), *splitter.feed(stream[cut:]), *splitter.end()]
        assert got == events
        assert splitter.is_between_events


def test_one_line_end_of_two_bytes_is_no_empty_line() -> None:
    splitter = EventSplitter(100)
    assert splitter.feed(b"event: x\r\ndata: a\r") == []
    assert splitter.feed(b"\ndata: b\r\n\r\n") == [b"event: x\r\ndata: a\r\ndata: b\r\n\r\n"]


def test_bytes_of_an_unfinished_event_are_kept_and_bounded() -> None:
    splitter = EventSplitter(10)
    assert splitter.feed(b"data: 1234") == []
    assert not splitter.is_between_events
    assert splitter.end() == []
    with pytest.raises(UpstreamProtocolError, match="larger"):
        splitter.feed(b"5")


def test_whole_events_may_be_larger_together_than_one_unfinished_may() -> None:
    assert len(EventSplitter(10).feed(b"data: 1\n\n" * 5)) == 5


@pytest.mark.parametrize(
    "event, data",
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"data:  two\r\r", b" two"),
        (b"event: x\ndata: a\nid: 1\ndata: b\n\n", b"a\nb"),
        (b": comment\n\n", None),
        (b"\n\n", None),
    ],
)
def test_data_lines_are_joined_and_lose_one_space(event: bytes, data: bytes | None) -> None:
    assert event_data(event) == data


def test_error_event_is_one_line_of_json() -> None:
    body = {"error": {"message": "line one\nline two", "code": "x"}}
    event = error_event(body)
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert msgspec.json.decode(event[6:]) == body
