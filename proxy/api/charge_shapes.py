"""How actions, charges and recurring charges look from outside."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from typing_extensions import TypedDict

from pricing.money import decimal_text
from proxy.api.answers import Money
from proxy.api.shapes import Shapes, utc
from proxy.charges import status_of

Row = Mapping[str, Any]
Every = Literal["hour", "day", "week", "month"]

# Nanocredits, and attos of US dollars.
_CREDIT_DIGITS = 9
_ATTO_DIGITS = 18


class Action(TypedDict):
    """What can be charged for, and the price of one."""

    name: str
    price: Money


class Charge(TypedDict):
    """A charge; `price` is what is held or taken for it, null of one that ended uncharged.

    Held until `expires_at`, unless it is captured or voided before.
    """

    id: UUID
    action: str
    quantity: int
    price: Money | None
    refunded: Money
    status: Literal["held", "captured", "voided", "expired", "refunded"]
    description: str | None
    metadata: dict[str, str]
    recurring_charge_id: UUID | None
    created_at: datetime
    expires_at: datetime | None
    settled_at: datetime | None


class AdminCharge(Charge):
    """A charge with who made it: an operator, or else a key of the account."""

    account_id: UUID
    key_id: UUID | None
    operator: str | None


class RecurringCharge(TypedDict):
    """A charge that comes again each period; the next begins at `next_at`.

    `past_due`: the period was refused for `problem`, and is tried again each hour. `skipped` are
    periods that were never charged.
    """

    id: UUID
    action: str
    quantity: int
    every: Every
    status: Literal["active", "past_due", "paused", "cancelled", "ended"]
    problem: str | None
    starts_at: datetime
    ends_at: datetime | None
    next_at: datetime | None
    last_charge_id: UUID | None
    skipped: int
    description: str | None
    metadata: dict[str, str]
    created_at: datetime


class AdminRecurringCharge(RecurringCharge):
    """A recurring charge with the operator who made it; null for a key of the account."""

    account_id: UUID
    operator: str | None


def action(name: str, nanocredits: int, nanos_per_credit: int) -> Action:
    """Render an action of the price book; one may cost less than a nano-USD."""
    return {
        "name": name,
        "price": {
            "credits": decimal_text(nanocredits, _CREDIT_DIGITS),
            "usd": decimal_text(nanocredits * nanos_per_credit, _ATTO_DIGITS),
        },
    }


def charge(shapes: Shapes, row: Row) -> Charge:
    """Render a charge; `row` is `ChargeStore.charge`'s."""
    status = status_of(row)
    is_taken = row["price"] is not None
    price = row["asked_price"] if status == "held" else row["price"]
    return {
        "id": row["request_id"],
        "action": row["action"],
        "quantity": row["quantity"] if is_taken else row["asked_quantity"],
        "price": None if price is None else shapes.money(price),
        "refunded": shapes.money(row["refunded"]),
        "status": status,
        "description": row["description"],
        "metadata": row["metadata"],
        "recurring_charge_id": row["recurring_id"],
        "created_at": utc(row["created_at"]),
        "expires_at": utc(row["expires_at"]),
        "settled_at": utc(row["settled_at"]),
    }


def admin_charge(shapes: Shapes, row: Row) -> AdminCharge:
    """Render a charge as operators see it."""
    is_keyless = row["key_id"] == row["account_id"]
    return {
        **charge(shapes, row),
        "account_id": row["account_id"],
        "key_id": None if is_keyless else row["key_id"],
        "operator": row["operator"],
    }


def recurring_charge(row: Row) -> RecurringCharge:
    """Render a recurring charge; `row` is `RecurringStore.recurring`'s."""
    is_over = row["status"] in {"cancelled", "ended"}
    return {
        "id": row["recurring_id"],
        "action": row["action"],
        "quantity": row["quantity"],
        "every": row["every"],
        "status": row["status"],
        "problem": row["problem"],
        "starts_at": utc(row["starts_at"]),
        "ends_at": utc(row["ends_at"]),
        "next_at": None if is_over else utc(row["next_at"]),
        "last_charge_id": row["last_charge_id"],
        "skipped": row["skipped"],
        "description": row["description"],
        "metadata": row["metadata"],
        "created_at": utc(row["created_at"]),
    }


def admin_recurring_charge(row: Row) -> AdminRecurringCharge:
    """Render a recurring charge as operators see it."""
    return {
        **recurring_charge(row),
        "account_id": row["account_id"],
        "operator": row["operator"],
    }
