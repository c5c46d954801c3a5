"""Reading JSON that anybody may have written."""

import pytest

from proxy.errors import InvalidRequestError
from proxy.wire.body import MAX_DEPTH, MAX_NODES, checked_model, flag, read_body, whole_number
from proxy.wire.fields import raw


def test_members_stay_the_bytes_that_came_and_the_last_of_a_name_counts() -> None:
    fields = read_body(b'{"a": 1.50, "b":{"c":[ ]}, "a":2, "\\u0061": 3e0}')
    assert {name: bytes(value) for name, value in fields.items()} == {
        "a": b"3e0",
        "b": b'{"c":[ ]}',
    }


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"{",
        b"{}{}",
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":01}',
        b'{"a":"\x01"}',
        b'{"a":"\xff"}',
        b'{"\xff":1}',
        b'{"a":1}//',
        b"\xef\xbb\xbf{}",
        b"\x00",
        '{"a":1}'.encode("utf-16"),
        b"model=priced",
    ],
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        read_body(body)


@pytest.mark.parametrize("opening, closing", [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth_is_bounded(opening: bytes, closing: bytes) -> None:
    def nested(depth: int) -> bytes:
        return b'{"x":' + opening * (depth - 1) + b"1" + closing * (depth - 1) + b"}"

    assert read_body(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 100_000):
        with pytest.raises(InvalidRequestError, match="too deep"):
            read_body(nested(depth))


def test_count_of_objects_is_bounded_but_not_that_of_brackets_in_texts() -> None:
    assert read_body(b'{"x":"' + b"[{" * MAX_NODES + b'"}')
    assert read_body(b'{"x":"\\\\\\"' + b"[" * 3 * MAX_NODES + b'"}')
    assert read_body(b'{"x":[' + b'[],{"y":[]},' * 1000 + b"1]}")
    with pytest.raises(InvalidRequestError, match="too many"):
        read_body(b'{"x":[' + b"[]," * MAX_NODES + b"1]}")


@pytest.mark.parametrize("model", ["", None, "a,b", "a" * 257, ","])
def test_name_that_can_be_no_models_is_refused(model: str | None) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        checked_model(model)
    assert refused.value.param == "model"


def test_name_of_a_model_is_kept_as_it_is() -> None:
    assert checked_model("openai/gpt 4: x\u00e9") == "openai/gpt 4: x\u00e9"
    assert checked_model("a" * 256) == "a" * 256


@pytest.mark.parametrize("value", [0, 6, -1, 1.0, "1", True, [1], 10**30])
def test_number_out_of_bounds_or_of_another_kind_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        whole_number({"n": raw(value)}, "n", 5)
    assert refused.value.param == "n"


def test_number_within_bounds_and_none_are_read() -> None:
    assert whole_number({"n": raw(5)}, "n", 5) == 5
    assert whole_number({"n": raw(None)}, "n", 5) is None
    assert whole_number({}, "n", 5) is None


@pytest.mark.parametrize("value", [0, 1, "true", [], {}])
def test_flag_of_another_kind_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError):
        flag({"stream": raw(value)}, "stream")
