"""From a cost or a usage to the price: one charge a request, rounded once.

The sum is kept exactly, in attos (1e-18 USD), and rounded up to a nano-USD at the very end, so a
price is never below what the rule says and never more than a nano above it. `rounding_attos` is
what that last step added: `sum(line.attos) + rounding_attos == price_nanos x 1e9`, always.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from pricing.errors import CostUnknownError, InvalidAmountError, UsageUnknownError
from pricing.money import (
    ATTOS_PER_NANO,
    ATTOS_PER_PICO,
    MAX_AMOUNT,
    PPM,
    ceil_div,
    checked_nanos_per_credit,
    is_count,
)
from pricing.price_book import Flat, Markup, PerToken, PriceBook, Rule, RuleKind
from pricing.usage import TokenClass, Usage

ChargeKind = RuleKind | Literal["byok", "action"]

_PER_TOKEN_DIVISOR = 1000 * PPM


class ChargeLine(NamedTuple):
    """One addend of a price.

    `quantity` is what was multiplied: picos of cost ("cost", "byok_fee"), tokens (the name of
    their class), actions (the action's name), or 1. Lines tell the provider's cost: they are for
    the operator, not for the customer.
    """

    label: str
    quantity: int
    attos: int


class Charge(NamedTuple):
    """What a request is sold for, and by which rule."""

    price_nanos: int
    rounding_attos: int
    rule: str
    kind: ChargeKind
    lines: tuple[ChargeLine, ...]


def charge(
    rule: Rule, *, cost_picos: int | None, usage: Usage | None, nanos_per_credit: int
) -> Charge:
    """Price a request on our own provider keys.

    `cost_picos` is what the provider takes, None where nobody knows. The price is at least the
    cost, rounded up, unless the rule allows a loss. Therefore an unknown cost raises
    CostUnknownError for every rule that needs the cost or must not lose; an unknown usage raises
    UsageUnknownError for a rule that prices tokens, and so does a usage that has none but
    something else (pictures, sound) that cost something: the rule says nothing about it, and
    without a minimum or the cost below it the request would be free.
    """
    tokens = None if usage is None else usage.by_class()
    sold = price_tokens(rule, cost_picos, tokens, nanos_per_credit)
    only_units = usage is not None and usage.has_units and not tokens
    if only_units and isinstance(rule.terms, PerToken) and not sold.price_nanos and cost_picos != 0:
        raise UsageUnknownError(f"{rule.name} prices tokens, and none were used")
    return sold


def price_tokens(
    rule: Rule,
    cost_picos: int | None,
    tokens: Mapping[TokenClass, int] | None,
    nanos_per_credit: int,
) -> Charge:
    """Price tokens that are cut into classes already; else as `charge`, which bills by it."""
    checked_nanos_per_credit(nanos_per_credit)
    lines = _lines(rule, _checked_cost(cost_picos), tokens, nanos_per_credit)
    attos = _total(lines)
    minimum_attos = rule.minimum_nanocredits * nanos_per_credit
    if attos < minimum_attos:
        lines.append(ChargeLine("minimum", 1, minimum_attos - attos))
        attos = minimum_attos
    if not rule.allow_loss:
        if cost_picos is None:
            # The rule may well cover the cost, but nothing here can show that it does.
            raise CostUnknownError("no_cost_and_no_loss_allowed")
        cost_attos = cost_picos * ATTOS_PER_PICO
        if attos < cost_attos:
            lines.append(ChargeLine("cost_floor", 1, cost_attos - attos))
            attos = cost_attos
    return _rounded(rule.name, rule.kind, lines, attos)


def byok_charge(rule: Rule, *, cost_picos: int | None, nanos_per_credit: int) -> Charge:
    """Price a request on the customer's own provider key: nothing, or a fee in percent of cost.

    CostUnknownError where there is a fee and the cost is not known.
    """
    checked_nanos_per_credit(nanos_per_credit)
    cost = _checked_cost(cost_picos)
    if rule.byok_fee_ppm == 0:
        return _rounded(rule.name, "byok", (), 0)
    if cost is None:
        raise CostUnknownError("no_cost_for_byok_fee")
    fee = ChargeLine("byok_fee", cost, cost * rule.byok_fee_ppm)
    return _rounded(rule.name, "byok", (fee,), fee.attos)


def action_charge(
    book: PriceBook, action: str, *, quantity: int = 1, nanos_per_credit: int
) -> Charge:
    """Price an action that is no LLM call; KeyError where the book has no such action."""
    checked_nanos_per_credit(nanos_per_credit)
    if not is_count(quantity):
        raise InvalidAmountError("a quantity must be an integer of at least 0")
    attos = book.action_nanocredits[action] * nanos_per_credit * quantity
    return _rounded(f"actions.{action}", "action", (ChargeLine(action, quantity, attos),), attos)


def _lines(
    rule: Rule,
    cost_picos: int | None,
    tokens: Mapping[TokenClass, int] | None,
    nanos_per_credit: int,
) -> list[ChargeLine]:
    terms = rule.terms
    if isinstance(terms, Markup):
        if cost_picos is None:
            raise CostUnknownError("no_cost_to_mark_up")
        # Picos x parts per million are attos: 1e-12 x 1e-6.
        return [ChargeLine("cost", cost_picos, cost_picos * terms.factor_ppm)]
    if isinstance(terms, Flat):
        # Billionths of a credit x nanos per credit are attos as well.
        return [ChargeLine("flat", 1, terms.nanocredits * nanos_per_credit)]
    if tokens is None:
        raise UsageUnknownError(f"{rule.name} prices tokens, and the usage is unknown")
    return _token_lines(terms, tokens, nanos_per_credit)


def _token_lines(
    terms: PerToken, tokens: Mapping[TokenClass, int], nanos_per_credit: int
) -> list[ChargeLine]:
    """Return a line for each class.

    A class's amount need not be a whole number of attos. Each line is the difference of two
    rounded running sums, so the lines add up to the exact total rounded once, not class by class.
    """
    lines: list[ChargeLine] = []
    numerator, booked = 0, 0
    for token_class, count in tokens.items():
        rate = terms.nanocredits_of(token_class) * terms.multiplier_ppm * nanos_per_credit
        numerator += count * rate
        total = ceil_div(numerator, _PER_TOKEN_DIVISOR)
        lines.append(ChargeLine(token_class.value, count, total - booked))
        booked = total
    return lines


def _total(lines: Sequence[ChargeLine]) -> int:
    return lines[0].attos if len(lines) == 1 else sum([line.attos for line in lines])


def _rounded(rule: str, kind: ChargeKind, lines: Iterable[ChargeLine], attos: int) -> Charge:
    price_nanos = ceil_div(attos, ATTOS_PER_NANO)
    if price_nanos > MAX_AMOUNT:
        raise InvalidAmountError("the price is too large to be held")
    return Charge(price_nanos, price_nanos * ATTOS_PER_NANO - attos, rule, kind, tuple(lines))


def _checked_cost(cost_picos: int | None) -> int | None:
    if cost_picos is None or (type(cost_picos) is int and 0 <= cost_picos <= MAX_AMOUNT):
        return cost_picos
    raise InvalidAmountError("a cost must be an integer of picos, at least 0 and within BIGINT")
