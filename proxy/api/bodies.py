"""The bodies that the admin API takes, checked before anything is done.

Amounts are decimal text, because a JSON number with a fraction is a float on its way: integers are
taken as well, which are exact.
"""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, TypeVar
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic.config import JsonDict
from pydantic_core import ErrorDetails

from pricing.errors import InvalidAmountError
from pricing.money import nanos_from_credits, picos_from_usd
from proxy.errors import InvalidRequestError
from proxy.exchange import Exchange

MAX_BODY_BYTES = 64 * 1024
# A billion dollars: far above any account, and far enough below what a balance can hold.
_MAX_AMOUNT_NANOS = 10**18
# A million dollars for one request.
_MAX_COST_PICOS = 10**18
_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
_MAX_LIFETIME = timedelta(days=36500)


def _checked_text(text: str) -> str:
    if "\x00" in text:
        msg = "must not hold NUL characters"
        raise ValueError(msg)
    if not text.strip():
        msg = "must not be blank"
        raise ValueError(msg)
    return text


def _decimal_text(value: object) -> object:
    # Before the check for text, so that an integer passes and True and 10.5 do not.
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        msg = 'must be a decimal number as text, such as "12.5"'
        raise ValueError(msg)  # noqa: TRY004 - pydantic passes a TypeError on
    return value


def _to_come(moment: datetime) -> datetime:
    now = datetime.now(UTC)
    if not now < moment < now + _MAX_LIFETIME:
        msg = "must be a time to come, within a hundred years"
        raise ValueError(msg)
    return moment


Text = Annotated[str, AfterValidator(_checked_text)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
_DECIMAL: JsonDict = {
    "anyOf": [{"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"}, {"type": "integer"}],
    "examples": ["12.5"],
}
Credits = Annotated[str, BeforeValidator(_decimal_text), WithJsonSchema(_DECIMAL)]
Count = Annotated[int, Field(ge=1, le=_MAX_INT32)]
TimeToCome = Annotated[AwareDatetime, AfterValidator(_to_come)]


class Body(BaseModel):
    """What every body keeps to: no member that it does not know, no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CallBody(BaseModel):
    """The body of a call to a model: whatever the endpoint of that call takes."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "model": "demo",
                    "messages": [{"role": "user", "content": "hi"}],
                    "max_tokens": 100,
                }
            ]
        },
    )

    model: str


class NewAccount(Body):
    """POST /admin/v1/accounts. `credit_limit` is how far in credits it may go below zero."""

    name: Name
    tier: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    credit_limit: Credits = "0"


class AccountOptions(Body):
    """PATCH /admin/v1/accounts/{id}: name, and how it is served; what is left out stays."""

    name: Name | None = None
    replay_retries: bool | None = None


class Grant(Body):
    """POST …/grants. The reference makes it safe to send again; null is credits for ever."""

    credits: Credits
    reason: Annotated[Text, Field(min_length=1, max_length=1000)]
    reference: Name
    expires_at: TimeToCome | None = None


class Budget(Body):
    """What a key or a project may spend in a period; days and months are those of UTC."""

    credits: Credits
    period: Literal["day", "month", "total"] = "total"


class ReviewDecision(Body):
    """POST /admin/v1/reviews/{request_id}: a price in credits, or a cost that is priced."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "account_id": "01900000-0000-7000-8000-000000000001",
                    "decision": "charge",
                    "credits": "12.5",
                    "reason": "the provider's invoice says so",
                }
            ]
        }
    )

    account_id: UUID
    decision: Literal["charge", "waive", "reprice"]
    credits: Credits | None = None
    cost_usd: Credits | None = None
    reason: Annotated[Text, Field(min_length=1, max_length=1000)]


Model = TypeVar("Model", bound=Body)


async def read_body(
    exchange: Exchange, model: type[Model], *, max_bytes: int = MAX_BODY_BYTES
) -> Model:
    """Read a body of this model.

    Raises RequestTooLargeError, or InvalidRequestError that names the field and what is wrong.
    """
    body = await exchange.read_body(max_bytes)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise _explain(found, model, is_empty=not body.strip()) from None


def _explain(
    found: ErrorDetails, model: type[Body], *, is_empty: bool = False
) -> InvalidRequestError:
    param = ".".join(str(part) for part in found["loc"]) or None
    message = found["msg"].removeprefix("Value error, ")
    match found["type"]:
        case "json_invalid" if is_empty:
            names = ", ".join(model.model_fields)
            return InvalidRequestError(f"The body is empty. It must be a JSON object with {names}.")
        case "json_invalid":
            return InvalidRequestError(f"The body is not valid JSON. {message}.")
        case "model_type" if param is None:
            names = ", ".join(model.model_fields)
            return InvalidRequestError(f"The body must be a JSON object with {names}.")
        case "extra_forbidden":
            message = f"{param!r} is no field of this body. Leave it out or correct its name."
            return InvalidRequestError(message, param=param)
        case "missing":
            return InvalidRequestError(f"{param} is missing: send it.", param=param)
        case _:
            # What is wrong with several members together has no name: the message names them.
            where = param or "In this body"
            return InvalidRequestError(f"{where}: {message}.", param=param)


def nanos_of(credits_: str, nanos_per_credit: int, *, param: str, minimum: int = 1) -> int:
    """Turn credits of a body into nano-USD; InvalidRequestError unless exact and in bounds."""
    try:
        nanos = nanos_from_credits(credits_, nanos_per_credit)
    except InvalidAmountError as error:
        raise InvalidRequestError(f"{param}: {error}.", param=param) from None
    if not minimum <= nanos <= _MAX_AMOUNT_NANOS:
        bound = "more than 0" if minimum else "at least 0"
        message = f"{param} must be {bound} and worth at most a billion US dollars."
        raise InvalidRequestError(message, param=param)
    return nanos


def picos_of(usd: str, *, param: str) -> int:
    """Turn a cost in US dollars into picos; InvalidRequestError unless it is one and in bounds."""
    try:
        picos = picos_from_usd(usd)
    except InvalidAmountError as error:
        raise InvalidRequestError(f"{param}: {error}.", param=param) from None
    if picos > _MAX_COST_PICOS:
        raise InvalidRequestError(f"{param} must be at most a million US dollars.", param=param)
    return picos
