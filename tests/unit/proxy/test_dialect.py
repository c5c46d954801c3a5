"""Errors in the shape that each SDK knows."""

import msgspec
import pytest

from proxy import errors
from proxy.dialect import Dialect
from proxy.errors import TallygateError
from proxy.ids import uuid7

CLASSES = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, TallygateError)
]
# https://docs.anthropic.com/en/api/errors
ANTHROPICS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def decoded(value: object) -> dict[str, object]:
    return msgspec.json.decode(msgspec.json.encode(value), type=dict[str, object])


def test_every_status_of_ours_is_here() -> None:
    assert {each.status for each in CLASSES} == set(ANTHROPICS)


@pytest.mark.parametrize("kind", CLASSES)
def test_anthropics_error_has_its_type_and_keeps_our_code(kind: type[TallygateError]) -> None:
    request_id = uuid7()
    error = kind("No.", param="model", details={"balance": {"credits": "0"}})
    body = decoded(Dialect.ANTHROPIC.error_body(error, request_id))
    assert body == {
        "type": "error",
        "error": {
            "type": ANTHROPICS[kind.status],
            "message": "No.",
            "code": kind.code,
            "param": "model",
            "balance": {"credits": "0"},
        },
        "request_id": str(request_id),
    }


@pytest.mark.parametrize("dialect", [Dialect.OPENAI, Dialect.RESPONSES])
@pytest.mark.parametrize("kind", CLASSES)
def test_openais_error_stands_under_one_name(kind: type[TallygateError], dialect: Dialect) -> None:
    body = decoded(dialect.error_body(kind("No.", details={"required": 1}), uuid7()))
    assert body == {
        "error": {
            "message": "No.",
            "type": kind.type,
            "param": None,
            "code": kind.code,
            "required": 1,
        }
    }


@pytest.mark.parametrize(
    "dialect, begins, members",
    [
        (Dialect.OPENAI, b"data: {", {"error"}),
        (Dialect.RESPONSES, b"event: error\ndata: {", {"error", "type", "code", "message"}),
        (Dialect.ANTHROPIC, b"event: error\ndata: {", {"error", "type", "request_id"}),
    ],
)
def test_error_in_a_stream_is_one_event(dialect: Dialect, begins: bytes, members: set[str]) -> None:
    error = errors.UpstreamError("First line.\n\nevent: error\ndata: {}\n\n")
    event = dialect.error_event(error, uuid7())
    assert event.startswith(begins)
    # A message can't end its event, nor begin another.
    assert event.endswith(b"\n\n")
    assert event.count(b"\n\n") == 1
    assert len([line for line in event.splitlines() if line.startswith(b"data:")]) == 1
    data = decoded(msgspec.Raw(event.split(b"data: ", 1)[1].strip()))
    assert set(data) == members
    if dialect is not Dialect.OPENAI:
        assert data["type"] == "error"
