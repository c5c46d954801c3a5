"""A charge made anew from what the ledger keeps of it: for receipts, audits and late reports."""

from collections.abc import Mapping
from typing import Any

from pricing.errors import PricingError
from pricing.markup import Charge, action_charge, byok_charge, charge
from pricing.price_book import PriceBook, Rule
from pricing.usage import Usage

# The rule of a price that an operator set.
BY_HAND = "review"

# The endpoint of metered actions, whose model is the action.
CHARGES = "charges"

_COUNTS = tuple(Usage.__slots__)


def usage_of(row: Mapping[str, Any]) -> Usage | None:
    """Return a row's usage; None where it knows none. Raises UsageUnknownError for an impossible.

    `row` has the columns of `usage` that are named like the counts.
    """
    # Once over the columns: the audit asks this of every charge there is.
    counts = {name: count for name in _COUNTS if (count := row[name]) is not None}
    return Usage.checked(**counts) if counts else None


def charge_of(row: Mapping[str, Any], rule: Rule, nanos_per_credit: int) -> Charge:
    """Price a row's usage and cost by a rule; raises PricingError where that can't be done."""
    cost_picos: int | None = row["cost_picos"]
    if row["byok"]:
        return byok_charge(rule, cost_picos=cost_picos, nanos_per_credit=nanos_per_credit)
    return charge(
        rule, cost_picos=cost_picos, usage=usage_of(row), nanos_per_credit=nanos_per_credit
    )


def action_of(row: Mapping[str, Any], book: PriceBook, nanos_per_credit: int) -> Charge:
    """Price a metered action anew; raises PricingError where that can't be done."""
    action: str = row["model"]
    if row["quantity"] is None or action not in book.action_nanocredits:
        raise PricingError("its version of the price book has no such action, or it no quantity")
    return action_charge(book, action, quantity=row["quantity"], nanos_per_credit=nanos_per_credit)
