"""Every error that a request can end in, and how a client sees it.

    TallygateError
      InvalidRequestError          400  invalid_request_error
        RequestTooDearError        400  max_request_credits
      AuthenticationError          401  invalid_api_key
      InvalidProviderKeyError      401  invalid_provider_key       (BYOK only)
      InsufficientCreditsError     402  insufficient_credits
      PermissionDeniedError        403  model_not_allowed, key_expired, account_suspended, …
      NotFoundError                404  model_not_found, unsupported_endpoint, not_found
      MethodNotAllowedError        405  method_not_allowed
      ConflictError                409  conflict
      RequestTooLargeError         413  request_too_large
      RateLimitError               429  rate_limit_exceeded
      UpstreamError                502  upstream_error
        UpstreamProtocolError      502  upstream_invalid_response
        UpstreamRateLimitError     429  upstream_rate_limited
        UpstreamUnavailableError   503  upstream_unavailable
        UpstreamTimeoutError       504  upstream_timeout
      MeteringUnavailableError     503  metering_unavailable
    ConfigurationError                  the service can't start: the text says what to change

`x-should-retry: false` stands on every answer that a retry can't mend, because the official
SDKs would otherwise send 409, 429 and 5xx again on their own.
"""

from collections.abc import Mapping


class ConfigurationError(Exception):
    """The service can't run as it is set up; the message names the setting and the remedy."""


class TallygateError(Exception):
    """A request that ends in an error answer.

    `message` is for the customer and says what to do; it never holds a secret, a prompt or a
    provider's cost. `details` are extra members of the error body.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        details: Mapping[str, object] | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.details = dict(details or {})
        self.retry_after_s = retry_after_s
        # Rate-limit headers that only the admission knows; added by whoever raises.
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, object]:
        """The error in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.details,
            }
        }

    def response_headers(self) -> dict[str, str]:
        """Headers that tell an SDK whether and when to try again."""
        headers = dict(self.headers)
        if not self.retryable:
            headers["x-should-retry"] = "false"
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        return headers


class InvalidRequestError(TallygateError):
    """The request is malformed, or asks for something that is refused."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    retryable = False


class RequestTooDearError(InvalidRequestError):
    """The request can cost more than a single one of the account may."""

    code = "max_request_credits"


class AuthenticationError(TallygateError):
    """No virtual key, or one that is unknown or revoked."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"
    retryable = False


class InvalidProviderKeyError(AuthenticationError):
    """The provider refused the key that the customer brought."""

    code = "invalid_provider_key"


class InsufficientCreditsError(TallygateError):
    """The available balance, or the key's budget, does not cover the request's ceiling."""

    status = 402
    type = "insufficient_quota"
    code = "insufficient_credits"
    retryable = False


class PermissionDeniedError(TallygateError):
    """The key is known, and may not do this."""

    status = 403
    type = "permission_error"
    code = "permission_denied"
    retryable = False


class NotFoundError(TallygateError):
    """No such model, endpoint or object, as far as this key can see."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"
    retryable = False


class MethodNotAllowedError(TallygateError):
    """The path exists, and takes other methods."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    retryable = False


class ConflictError(TallygateError):
    """The same reference was used for something else."""

    status = 409
    type = "invalid_request_error"
    code = "conflict"
    retryable = False


class RequestTooLargeError(TallygateError):
    """The body is over the limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"
    retryable = False


class RateLimitError(TallygateError):
    """A limit of requests, tokens or concurrency of the key is reached."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class UpstreamError(TallygateError):
    """LiteLLM or the provider behind it failed; nothing is charged."""

    status = 502
    type = "upstream_error"
    code = "upstream_error"


class UpstreamProtocolError(UpstreamError):
    """The answer could not be understood."""

    code = "upstream_invalid_response"


class UpstreamRateLimitError(UpstreamError):
    """The provider asks to slow down."""

    status = 429
    type = "rate_limit_error"
    code = "upstream_rate_limited"


class UpstreamUnavailableError(UpstreamError):
    """LiteLLM can't be reached."""

    status = 503
    code = "upstream_unavailable"


class UpstreamTimeoutError(UpstreamError):
    """LiteLLM did not answer in time."""

    status = 504
    code = "upstream_timeout"


class MeteringUnavailableError(TallygateError):
    """The ledger can't be reached: without it nothing is admitted (fail closed)."""

    status = 503
    code = "metering_unavailable"
    # Whether the call that failed may have been carried out all the same.
    is_in_doubt = False
