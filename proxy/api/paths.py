"""What stands in a path: ids of accounts, keys and requests. A malformed id is an unknown one."""

from typing import Any
from uuid import UUID

from starlette.requests import Request

from proxy.accounts import Accounts
from proxy.errors import NotFoundError

ADMIN = "/admin/v1"
ADMIN_ACCOUNT = ADMIN + "/accounts/{account_id}"
CUSTOMER = "/api/v1"

_SHOWN_CHARACTERS = 64


def uuid_or_none(text: str) -> UUID | None:
    """Read an id; None where it is malformed."""
    try:
        return UUID(text)
    except ValueError:
        return None


def uuid_in(request: Request, name: str) -> UUID | None:
    """Read the id that the path has under this name; None where it is malformed."""
    return uuid_or_none(request.path_params[name])


async def account_in(request: Request, accounts: Accounts) -> dict[str, Any]:
    """Read the account of the path, as `Accounts.account` has it; NotFoundError."""
    account_id = uuid_in(request, "account_id")
    row = None if account_id is None else await accounts.account(account_id)
    if row is None:
        raise no_account(request.path_params["account_id"])
    return row


def no_account(text: str) -> NotFoundError:
    """What is said of an account that there is not."""
    shown = text[:_SHOWN_CHARACTERS]
    return NotFoundError(f"There is no account {shown!r}. GET {ADMIN}/accounts lists them.")
