"""The receipt of one request, and the estimate before it: what a customer sees of a price.

A line of a price is an amount in US dollars with all its digits; the lines and the rounding add up
to the price. What the provider took is no customer's business: a markup's line has no quantity.
"""

from collections.abc import Mapping
from typing import Any

from pricing.errors import PricingError
from pricing.markup import ChargeLine
from pricing.money import decimal_text
from pricing.price_book import parse_price_book
from proxy.api import answers
from proxy.api.shapes import Shapes, utc
from proxy.estimates import Estimate
from proxy.recompute import CHARGES, action_of, charge_of

_ATTO_DIGITS = 18
# Lines whose quantity is the provider's cost, and whose names speak of it.
_LABELS = {"cost": "usage", "byok_fee": "provider_key_fee", "cost_floor": "least_price"}


def receipt(shapes: Shapes, row: Mapping[str, Any]) -> answers.Receipt:
    """Render a request with everything that made its price; `row` is `Reports.usage_row`'s."""
    entries: list[answers.ReceiptEntry] = [
        {
            "seq": entry["seq"],
            "kind": entry["kind"],
            "amount": shapes.money(entry["amount"]),
            "created_at": utc(entry["at"]),
        }
        for entry in row["entries"]
    ]
    price = row["price"]
    return {
        **shapes.usage(row),
        "model_answered": row["model_answered"],
        "streamed": row["streamed"],
        "service_tier": row["service_tier"],
        "settled_at": utc(row["settled_at"]),
        "first_byte_ms": row["first_byte_ms"],
        "duration_ms": row["duration_ms"],
        "error_code": row["error_code"],
        "review_reason": row["review_reason"] if row["status"] == "needs_review" else None,
        "rule": row["rule"],
        "price_version": row["price_version"],
        "lines": _lines(row),
        "hold": shapes.money(row["hold"]),
        "captured": None if price is None else shapes.money(price),
        "refunded": shapes.money(row["refunded"]),
        "entries": entries,
    }


def _lines(row: Mapping[str, Any]) -> list[answers.PriceLine] | None:
    """The lines of the price, made anew from usage and price book; None where there is no price."""
    if row["price"] is None or row["document"] is None:
        return None
    try:
        book = parse_price_book(row["document"])
        if row["endpoint"] == CHARGES:
            charged = action_of(row, book, row["nanos_per_credit"])
        else:
            charged = charge_of(row, book.rule(row["rule"]), row["nanos_per_credit"])
    except (PricingError, KeyError):
        return None
    if charged.price_nanos != row["price"]:
        # An operator has repriced it: what made that price stands in the audit trail.
        return None
    rounding: answers.PriceLine = {
        "label": "rounding",
        "quantity": None,
        "usd": _usd(charged.rounding_attos),
    }
    return [*(_line(line) for line in charged.lines), rounding]


def _line(line: ChargeLine) -> answers.PriceLine:
    is_private = line.label in _LABELS
    return {
        "label": _LABELS.get(line.label, line.label),
        "quantity": None if is_private else line.quantity,
        "usd": _usd(line.attos),
    }


def _usd(attos: int) -> str:
    return decimal_text(attos, _ATTO_DIGITS)


def estimate_shape(shapes: Shapes, estimate: Estimate) -> answers.Estimate:
    """Render an estimate."""
    plan = estimate.plan
    likely, budget = estimate.likely_nanos, estimate.budget_left_nanos
    limit = (plan.endpoint.output_limits or (None,))[-1]
    return {
        "endpoint": plan.endpoint.name,
        "model": plan.model.name,
        "byok": estimate.is_byok,
        "admitted": estimate.is_admitted,
        "ceiling": shapes.money(estimate.ceiling_nanos),
        "likely": None if likely is None else shapes.money(likely),
        "available": shapes.money(estimate.available_nanos),
        "budget_left": None if budget is None else shapes.money(budget),
        "tokens": {
            "input": {"ceiling": estimate.input_tokens, "likely": estimate.likely_input_tokens},
            "output": {
                "ceiling": estimate.output_limit * plan.request.n,
                "likely": estimate.likely_output_tokens,
            },
        },
        "affordable": None if limit is None else {limit: estimate.affordable_tokens},
        "clamped_to": estimate.clamped_to,
        "rule": plan.rule.name,
        "price_version": plan.published.version,
    }
