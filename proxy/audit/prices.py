"""Every charge once more, from its usage and the version of the price book that it names.

By the code that made it, in integers; see `proxy.recompute`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import dict_row

from pricing.errors import PricingError
from pricing.markup import Charge
from pricing.money import PICOS_PER_NANO
from pricing.price_book import Markup, PriceBook, Rule, parse_price_book
from proxy.audit.findings import Finding
from proxy.recompute import BY_HAND, CHARGES, action_of, charge_of


@dataclass(frozen=True, slots=True)
class _Book:
    book: PriceBook
    nanos_per_credit: int


class PriceCheck:
    """Checks rows of usage that have a price, one at a time."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._books = _price_books(connection)
        self._recomputed = Finding(
            "charges_recompute",
            "price, rounding, rule and markup follow from usage, cost and the price book's"
            " version, unless an operator set the price",
        )
        self._covered = Finding(
            "prices_cover_costs", "no price is below the cost unless its rule allows a loss"
        )

    @property
    def findings(self) -> list[Finding]:
        """What was found so far."""
        return [self._recomputed, self._covered]

    def check(self, row: Mapping[str, Any]) -> None:
        """Check a row with the columns of `usage` that make a price."""
        found = self._books.get(row["price_version"])
        rule = None
        self._recomputed.checked += 1
        if row["rule"] == BY_HAND and row["resolution"] in {"charge", "reprice"}:
            return  # it stands in the trail, and whether it covers the cost was decided
        if isinstance(found, _Book) and row["endpoint"] == CHARGES:
            problem = _action_difference(row, found)
        elif isinstance(found, _Book):
            rule = found.book.select(str(row["account_id"]), row["tier"], row["model"])
            problem = _difference(row, rule, found.nanos_per_credit)
        else:
            problem = {"error": found or "there is no such version of the price book"}
        if problem:
            self._recomputed.report({**_identity(row), **problem})
        if row["status"] == "billed":
            self._covered.checked += 1
            may_lose = rule is not None and rule.allow_loss
            cost_picos: int | None = row["cost_picos"]
            # Without a cost nothing shows that the price covers it.
            is_covered = cost_picos is not None and row["price"] * PICOS_PER_NANO >= cost_picos
            if not (may_lose or is_covered):
                self._covered.report({**_identity(row), "cost_picos": cost_picos})


def _price_books(connection: psycopg.Connection[Any]) -> dict[int, _Book | str]:
    """Read every version; in place of one that can't be read stands the reason."""
    books: dict[int, _Book | str] = {}
    with connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute("SELECT version, document, nanos_per_credit FROM price_books")
        for row in cursor:
            try:
                books[row["version"]] = _Book(
                    parse_price_book(row["document"]), row["nanos_per_credit"]
                )
            except PricingError as error:
                books[row["version"]] = f"its price book can't be read: {error}"
    return books


def _difference(row: Mapping[str, Any], rule: Rule, nanos_per_credit: int) -> dict[str, Any]:
    """Return each value of the charge that is not what it should be; empty if all are."""
    try:
        expected = charge_of(row, rule, nanos_per_credit)
    except PricingError as error:
        return {"error": f"it can't be priced: {error}"}
    is_markup = isinstance(rule.terms, Markup) and not row["byok"]
    markup_ppm = rule.terms.factor_ppm if is_markup and isinstance(rule.terms, Markup) else None
    return _wrong(row, expected, markup_ppm)


def _action_difference(row: Mapping[str, Any], found: _Book) -> dict[str, Any]:
    """As `_difference`, of a metered action."""
    try:
        expected = action_of(row, found.book, found.nanos_per_credit)
    except PricingError as error:
        return {"error": f"it can't be priced: {error}"}
    return _wrong(row, expected, None)


def _wrong(row: Mapping[str, Any], expected: Charge, markup_ppm: int | None) -> dict[str, Any]:
    values = {
        "price": expected.price_nanos,
        "rounding_attos": expected.rounding_attos,
        "rule": expected.rule,
        "markup_ppm": markup_ppm,
    }
    wrong = {name: value for name, value in values.items() if row[name] != value}
    return {name: row[name] for name in wrong} | {
        f"{name}_expected": value for name, value in wrong.items()
    }


def _identity(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("account_id", "request_id", "price_version", "price")
    return {name: row[name] for name in names}
