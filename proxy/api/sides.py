"""The two sides that manage what belongs to an account: its customer, and operators.

Both do the same, so it is written once: a side says whose account a request is about, what it needs
for a change, and who is to be named for it in the audit trail.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar
from uuid import UUID

from starlette.requests import Request

from proxy.accounts import Accounts, Principal
from proxy.api.operations import Parameter
from proxy.api.paths import ADMIN_ACCOUNT, CUSTOMER, account_in
from proxy.errors import ConflictError, InvalidRequestError
from proxy.operators import Operator

Caller = TypeVar("Caller")

_SELF = Parameter(
    name="self",
    schema={"type": "boolean", "default": False},
    summary="Whether it is meant, should it take away from the key that the request is sent with.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side(Generic[Caller]):
    """One of the sides. `root` is the path under which an account's things are."""

    root: str
    change: str
    account_id: Callable[[Request, Caller], Awaitable[UUID]]
    actor: Callable[[Caller], str]
    # The key that the request is sent with, where it is one of the account's, and its project.
    own_key: Callable[[Caller], UUID | None]
    own_project: Callable[[Caller], UUID | None]
    # What is to be sent where a request turns against that key.
    confirmation: tuple[Parameter, ...]


def customer_side() -> Side[Principal]:
    """Customers, each on the own account, by a key with the role manage."""

    async def own(_request: Request, principal: Principal) -> UUID:
        return principal.account_id

    return Side(
        root=CUSTOMER,
        change="manage",
        account_id=own,
        actor=lambda principal: f"key:{principal.key_id}",
        own_key=lambda principal: principal.key_id,
        own_project=lambda principal: principal.project_id,
        confirmation=(_SELF,),
    )


def operator_side(accounts: Accounts) -> Side[Operator]:
    """Operators, on the account of the path; NotFoundError where there is none."""

    async def named(request: Request, _operator: Operator) -> UUID:
        return (await account_in(request, accounts))["account_id"]

    return Side(
        root=ADMIN_ACCOUNT,
        change="support",
        account_id=named,
        actor=lambda operator: operator.name,
        own_key=lambda _operator: None,
        own_project=lambda _operator: None,
        confirmation=(),
    )


def confirm(request: Request, what: str) -> None:
    """Hold that a request which turns against its own key means it; ConflictError.

    Else a slip would lock the customer out. `what` is what would become of the key.
    """
    text = request.query_params.get(_SELF.name, "false")
    if text not in {"true", "false"}:
        raise InvalidRequestError("self must be true or false.", param=_SELF.name)
    if text == "false":
        message = (
            f"The key that this request is sent with would be {what}, and could not undo it. "
            f"Use another key, or send ?{_SELF.name}=true if that is what you want."
        )
        raise ConflictError(message, code="own_key")
