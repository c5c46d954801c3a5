"""How rows look outside: money in credits and dollars, pages with a cursor, times as RFC 3339."""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from starlette.requests import Request

from pricing.money import credits_text, decimal_text, usd_text, usd_text_from_picos
from pricing.usage import Usage
from proxy.errors import InvalidRequestError, NotFoundError
from proxy.ledger import Balance

Row = Mapping[str, Any]
Document = dict[str, Any]

MAX_PAGE = 500
DEFAULT_PAGE = 50


def money(nanos: int, nanos_per_credit: int) -> dict[str, str]:
    """An amount as decimal strings, in credits and in US dollars."""
    return {"credits": credits_text(nanos, nanos_per_credit), "usd": usd_text(nanos)}


def time_text(at: datetime | None) -> str | None:
    """RFC 3339 in UTC with microseconds; None stays None."""
    return None if at is None else at.astimezone(UTC).isoformat().replace("+00:00", "Z")


def balance_document(balance: Balance, nanos_per_credit: int) -> Document:
    """What an account has: posted, held by requests under way, and available."""
    return {
        "posted": money(balance.posted, nanos_per_credit),
        "held": money(balance.held, nanos_per_credit),
        "available": money(balance.available, nanos_per_credit),
    }


def account_document(row: Row, nanos_per_credit: int) -> Document:
    """An account with its balance."""
    balance = Balance(row["posted"], row["reserved"], row["credit_limit"])
    return {
        "id": str(row["account_id"]),
        "name": row["name"],
        "tier": row["tier"],
        "status": row["status"],
        "created_at": time_text(row["created_at"]),
        "credit_limit": money(row["credit_limit"], nanos_per_credit),
        "balance": balance_document(balance, nanos_per_credit),
    }


def key_document(row: Row, nanos_per_credit: int) -> Document:
    """A virtual key without its secret."""
    budget = row["budget"]
    return {
        "id": str(row["key_id"]),
        "name": row["name"],
        "prefix": row["prefix"],
        "status": row["status"],
        "created_at": time_text(row["created_at"]),
        "expires_at": time_text(row["expires_at"]),
        "revoked_at": time_text(row["revoked_at"]),
        "allowed_models": row["allowed_models"],
        "requests_per_minute": row["requests_per_minute"],
        "tokens_per_minute": row["tokens_per_minute"],
        "max_concurrency": row["max_concurrency"],
        "budget": None
        if budget is None
        else money(budget, nanos_per_credit) | {"period": row["budget_period"]},
    }


def usage_document(row: Row, nanos_per_credit: int) -> Document:
    """A request as its customer sees it: what it used and what it was charged, not what it cost."""
    price = row["price"]
    return {
        "request_id": str(row["request_id"]),
        "created_at": time_text(row["created_at"]),
        "endpoint": row["endpoint"],
        "model": row["model"],
        "status": row["status"],
        "streamed": row["streamed"],
        "key_id": str(row["key_id"]),
        "usage": None if row["input_tokens"] is None else {n: row[n] for n in Usage.__slots__},
        "price": None if price is None else money(price, nanos_per_credit),
    }


def admin_usage_document(row: Row, nanos_per_credit: int) -> Document:
    """The same with what only the operator may know."""
    cost, markup = row["cost_picos"], row["markup_ppm"]
    return usage_document(row, nanos_per_credit) | {
        "account_id": str(row["account_id"]),
        "settled_at": time_text(row["settled_at"]),
        "model_answered": row["model_answered"],
        "tier": row["tier"],
        "byok": row["byok"],
        "cost": None if cost is None else {"usd": usd_text_from_picos(cost)},
        "cost_source": row["cost_source"],
        "markup": None if markup is None else decimal_text(markup, 6),
        "rule": row["rule"],
        "price_version": row["price_version"],
        "hold": money(row["hold"], nanos_per_credit),
        "overdraft": money(row["overdraft"], nanos_per_credit),
        "review_reason": row["review_reason"],
        "error_code": row["error_code"],
        "upstream_status": row["upstream_status"],
        "client_gone": row["client_gone"],
        "first_byte_ms": row["first_byte_ms"],
        "duration_ms": row["duration_ms"],
    }


def entry_document(row: Row, nanos_per_credit: int) -> Document:
    """A ledger entry."""
    return {
        "seq": row["seq"],
        "at": time_text(row["at"]),
        "kind": row["kind"],
        "request_id": str(row["request_id"]),
        "amount": money(row["amount"], nanos_per_credit),
        "posted_delta": money(row["posted_delta"], nanos_per_credit),
        "held_delta": money(row["reserved_delta"], nanos_per_credit),
        "posted_after": money(row["posted_after"], nanos_per_credit),
        "held_after": money(row["reserved_after"], nanos_per_credit),
        "reason": row["reason"],
        "reference": row["reference"],
    }


def page(
    rows: Sequence[Row], limit: int, cursor: str, document: Callable[[Row], Document]
) -> Document:
    """A list; `cursor` names the column that the next page begins below."""
    return {
        "data": [document(row) for row in rows],
        "next_cursor": str(rows[-1][cursor]) if len(rows) == limit else None,
    }


def page_limit(request: Request) -> int:
    """Read `?limit=`, from 1 to 500."""
    text = request.query_params.get("limit")
    if text is None:
        return DEFAULT_PAGE
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= MAX_PAGE):
        msg = f"limit must be an integer from 1 to {MAX_PAGE}."
        raise InvalidRequestError(msg, param="limit", code="invalid_value")
    return int(text)


def uuid_cursor(request: Request) -> UUID | None:
    """Read `?cursor=` of a list that is ordered by ids."""
    text = request.query_params.get("cursor")
    try:
        return None if text is None else UUID(text)
    except ValueError:
        raise _bad_cursor() from None


def number_cursor(request: Request) -> int | None:
    """Read `?cursor=` of a list that is ordered by a number."""
    text = request.query_params.get("cursor")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise _bad_cursor()
    return int(text)


def _bad_cursor() -> InvalidRequestError:
    msg = "cursor must be the next_cursor of the page before."
    return InvalidRequestError(msg, param="cursor", code="invalid_value")


def path_id(request: Request, name: str) -> UUID:
    """Read an id of the path; what is no id is not found."""
    try:
        return UUID(request.path_params[name])
    except ValueError:
        raise not_found(name.removesuffix("_id")) from None


def not_found(what: str) -> NotFoundError:
    """What is said of an id that does not exist, or not for who asks."""
    return NotFoundError(f"There is no such {what}.")
