"""Bodies of the admin API: what they may hold, and how a wrong one is refused."""

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from starlette.requests import Request

from pricing.errors import PricingError
from pricing.money import nanos_from_credits
from proxy.errors import InvalidRequestError, RequestTooLargeError

MAX_BODY_BYTES = 64 * 1024
_INT32 = 2**31 - 1
_INT64 = 2**63 - 1


def _no_nul(text: str) -> str:
    if "\x00" in text:
        msg = "must not contain NUL characters"
        raise ValueError(msg)
    return text


def _decimal_text(value: object) -> object:
    """Credits come as a string, or as an integer; a float has lost digits already."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


Text = Annotated[str, AfterValidator(_no_nul)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
Credits = Annotated[str, BeforeValidator(_decimal_text), Field(max_length=40)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewAccount(_Body):
    """`POST /admin/v1/accounts`."""

    name: Name
    tier: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    credit_limit: Credits = "0"


class NewGrant(_Body):
    """`POST /admin/v1/accounts/{id}/grants`."""

    credits: Credits
    reason: Annotated[Text, Field(min_length=1, max_length=500)]
    reference: Annotated[Text, Field(min_length=1, max_length=200)]


class Budget(_Body):
    """What a key may spend in a period."""

    credits: Credits
    period: Literal["day", "month", "total"] = "total"


class NewKeyBody(_Body):
    """`POST /admin/v1/accounts/{id}/keys`."""

    name: Name
    expires_at: Annotated[
        AwareDatetime | None, BeforeValidator(lambda value: _time(value))  # noqa: PLW0108
    ] = None
    allowed_models: (
        Annotated[list[Annotated[Text, Field(min_length=1, max_length=256)]], Field(max_length=500)]
        | None
    ) = None
    requests_per_minute: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    max_concurrency: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    budget: Budget | None = None


def _time(value: object) -> object:
    """JSON has no times: RFC 3339 text is read here, because strict models take none."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


Body = TypeVar("Body", bound=_Body)


async def read_body(request: Request, model: type[Body]) -> Body:
    """Read and check a JSON body; InvalidRequestError names the member that is wrong."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            msg = f"The request body is larger than {MAX_BODY_BYTES} bytes."
            raise RequestTooLargeError(msg)
        parts.append(part)
    try:
        content: Any = msgspec.json.decode(b"".join(parts))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"The request body is not JSON: {error}."
        raise InvalidRequestError(msg, code="invalid_json") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        msg = f"{where}: {first['msg']}."
        raise InvalidRequestError(msg, param=where, code="invalid_value") from None


def nanos_of(credits_: str, nanos_per_credit: int, *, param: str, least: int = 0) -> int:
    """Read an amount of credits as nano-USD, at least `least`; it must be exact."""
    try:
        nanos = nanos_from_credits(credits_, nanos_per_credit)
    except PricingError as error:
        raise InvalidRequestError(f"{param}: {error}.", param=param, code="invalid_value") from None
    if nanos < least:
        msg = f"{param}: must be more than 0."
        raise InvalidRequestError(msg, param=param, code="invalid_value")
    return nanos
