"""How an error looks to the SDK that asked: OpenAI's shape or Anthropic's, whole or in a stream."""

from enum import Enum
from uuid import UUID

import msgspec

from proxy.errors import TallygateError

# https://docs.anthropic.com/en/api/errors
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Dialect(Enum):
    """Whose shapes an endpoint speaks; the Responses API differs from OpenAI's only in streams."""

    OPENAI = "openai"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"

    def error_body(self, error: TallygateError, request_id: UUID) -> dict[str, object]:
        """Return an error's body."""
        if self is not Dialect.ANTHROPIC:
            return error.body()
        kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
        if 400 <= error.status < 500 and error.status not in _ANTHROPIC_TYPES:
            kind = "invalid_request_error"
        return {
            "type": "error",
            "error": {
                "type": kind,
                "message": error.message,
                "code": error.code,
                "param": error.param,
                **error.details,
            },
            "request_id": request_id,
        }

    def error_event(self, error: TallygateError, request_id: UUID) -> bytes:
        """Write the event that makes the SDKs raise in the middle of a stream."""
        body = self.error_body(error, request_id)
        if self is Dialect.RESPONSES:
            body = {"type": "error", "code": error.code, "message": error.message, **body}
        name = b"" if self is Dialect.OPENAI else b"event: error\n"
        return name + b"data: " + msgspec.json.encode(body) + b"\n\n"
