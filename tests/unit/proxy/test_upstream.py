"""What a customer hears of LiteLLM's errors."""

import msgspec
import pytest

from proxy.errors import UpstreamError
from proxy.upstream import explain_failure, explain_stream_error, public_message


def body(message: str, **members: object) -> bytes:
    return msgspec.json.encode({"error": {"message": message, **members}})


@pytest.mark.parametrize(
    "status, is_byok, ours, code",
    [
        (400, False, 400, "provider_refused"),
        (401, False, 502, "upstream_error"),
        (401, True, 401, "invalid_provider_key"),
        (403, True, 401, "invalid_provider_key"),
        (404, False, 502, "upstream_error"),
        (408, False, 504, "upstream_timeout"),
        (413, False, 413, "request_too_large"),
        (422, False, 400, "provider_refused"),
        (429, False, 429, "upstream_rate_limited"),
        (500, False, 502, "upstream_error"),
        (503, False, 503, "upstream_unavailable"),
        (504, False, 504, "upstream_timeout"),
        (302, False, 502, "upstream_error"),
    ],
)
def test_status_is_translated(status: int, is_byok: bool, ours: int, code: str) -> None:  # noqa: FBT001
    error = explain_failure(status, {}, body("no"), is_byok=is_byok)
    assert (error.status, error.code) == (ours, code)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"llm_provider-retry-after": "7"}, 7),
        ({"retry-after": "9"}, 9),
        ({"retry-after": "999999"}, 3600),
        ({"retry-after": "Fri, 01 Jan"}, None),
        ({}, None),
    ],
)
def test_providers_retry_after_is_passed_on(headers: dict[str, str], seconds: int | None) -> None:
    assert explain_failure(429, headers, b"", is_byok=False).retry_after_s == seconds


def test_code_and_parameter_of_a_refusal_are_kept() -> None:
    refusal = body("too long", code="context_length_exceeded", param="messages")
    error = explain_failure(400, {}, refusal, is_byok=False)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"error": "text"}',
        b'{"error": null}',
        b'{"error": {"message": "\xff"}}',
        b'{"error":' * 100_000,
    ],
)
def test_body_that_is_no_error_is_replaced(raw: bytes) -> None:
    error = explain_failure(400, {}, raw, is_byok=False)
    assert error.message == "The provider refused the request."


def test_message_tells_nothing_of_the_inside() -> None:
    text = (
        "litellm.BadRequestError: OpenAIException - Bad key sk-abcdefgh12345 at "
        "http://10.0.0.7:4000/v1 . Received Model Group=gpt-secret\nAvailable Model Group Fallbacks"
    )
    assert public_message(text) == "Bad key [removed] at [removed]"


def test_error_event_is_translated_by_the_status_that_it_names() -> None:
    refused = explain_stream_error(body("context too long", code="400"))
    assert (refused.status, refused.message) == (400, "context too long")
    limited = explain_stream_error(body("slow down", code="429"))
    assert isinstance(limited, UpstreamError)
    assert limited.code == "upstream_rate_limited"
    assert "Nothing was charged" not in limited.message
    for garbage in (b"garbage", b'{"error": {"code": "\xff"}}', b'{"error":' * 100_000):
        assert explain_stream_error(garbage).code == "upstream_error"
