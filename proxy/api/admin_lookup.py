"""What operators look accounts and acts of operators up by, read from the query."""

from starlette.requests import Request

from pricing.errors import InvalidAmountError
from pricing.money import nanos_from_credits
from proxy.api.filters import TIMES, moment_in, text_in, text_parameter
from proxy.api.operations import Parameter
from proxy.api.paths import uuid_or_none
from proxy.directory import AccountFilter
from proxy.errors import InvalidRequestError
from proxy.trail import ActFilter

_STATUSES = ("active", "suspended", "closed")
# What is shown of a key, everywhere. Nobody should put more of it into an address.
_KEY_PREFIX_CHARACTERS = 10
_MAX_BALANCE_NANOS = 10**18
_DECIMAL: dict[str, object] = {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?$"}

ACCOUNT_FILTERS = (
    text_parameter("name", "Whose name has this in it, in capitals or not."),
    text_parameter("tier", "Of this tier alone."),
    Parameter(
        name="status",
        schema={"type": "string", "enum": list(_STATUSES)},
        summary="Of this status alone.",
    ),
    Parameter(
        name="key_prefix",
        schema={
            "type": "string",
            "minLength": _KEY_PREFIX_CHARACTERS,
            "maxLength": _KEY_PREFIX_CHARACTERS,
        },
        summary="Whose keys begin like this: a prefix as lists of keys show it, and no more of it.",
    ),
    Parameter(name="min_balance", schema=_DECIMAL, summary="With so many credits posted, or more."),
    Parameter(name="max_balance", schema=_DECIMAL, summary="With so many credits posted, or less."),
)
ACT_FILTERS = (
    Parameter(
        name="account_id",
        schema={"type": "string", "format": "uuid"},
        summary="On this account alone.",
    ),
    text_parameter("actor", "By this operator, or by a key (`key:…`), alone."),
    text_parameter("action", "Of this kind alone, such as `account.suspend`."),
    *TIMES,
)


def account_filter(request: Request, nanos_per_credit: int) -> AccountFilter:
    """Read which accounts are meant; InvalidRequestError."""
    status = text_in(request, "status")
    if status is not None and status not in _STATUSES:
        message = f"status must be one of {', '.join(_STATUSES)}."
        raise InvalidRequestError(message, param="status")
    prefix = text_in(request, "key_prefix")
    if prefix is not None and len(prefix) != _KEY_PREFIX_CHARACTERS:
        message = (
            f"key_prefix must be the first {_KEY_PREFIX_CHARACTERS} characters of a key, and never "
            "a whole one: addresses are logged on their way."
        )
        raise InvalidRequestError(message, param="key_prefix")
    return AccountFilter(
        name=text_in(request, "name"),
        tier=text_in(request, "tier"),
        status=status,
        key_prefix=prefix,
        min_balance=_balance_in(request, "min_balance", nanos_per_credit),
        max_balance=_balance_in(request, "max_balance", nanos_per_credit),
    )


def act_filter(request: Request) -> ActFilter:
    """Read which acts are meant; InvalidRequestError."""
    text = request.query_params.get("account_id")
    account_id = None if text is None else uuid_or_none(text)
    if text is not None and account_id is None:
        message = "account_id must be an id as this API shows it."
        raise InvalidRequestError(message, param="account_id")
    return ActFilter(
        account_id=account_id,
        actor=text_in(request, "actor"),
        action=text_in(request, "action"),
        since=moment_in(request, "since"),
        until=moment_in(request, "until"),
    )


def _balance_in(request: Request, name: str, nanos_per_credit: int) -> int | None:
    text = text_in(request, name)
    if text is None:
        return None
    try:
        nanos = nanos_from_credits(text, nanos_per_credit)
    except InvalidAmountError as error:
        raise InvalidRequestError(f"{name}: {error}.", param=name) from None
    if abs(nanos) > _MAX_BALANCE_NANOS:
        message = f"{name} must be worth at most a billion US dollars."
        raise InvalidRequestError(message, param=name)
    return nanos
