"""A body with nothing to read in it: all of it passes, its end when it is paid for."""

from proxy.wire.meter import PlainMeter, StreamMeter


def test_each_chunk_leaves_when_the_next_has_come() -> None:
    meter: StreamMeter = PlainMeter()
    assert [meter.feed(chunk) for chunk in (b"a", b"b", b"c")] == [b"", b"a", b"b"]
    assert not meter.saw_done
    meter.end()
    assert meter.saw_done
    assert meter.closing("0.1") == b"c"


def test_empty_body_has_an_empty_end() -> None:
    meter = PlainMeter()
    meter.end()
    assert meter.closing(None) == b""


def test_it_is_paid_for_by_what_was_asked_for() -> None:
    meter = PlainMeter()
    meter.feed(b'data: {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "cost": 1}}\n\n')
    meter.end()
    assert (meter.usage, meter.cost_text, meter.error) == (None, None, None)
    assert (meter.output_bytes, meter.has_final_usage) == (0, False)
