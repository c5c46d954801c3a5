"""What an operator decides of a request that waits for a review, carried out once.

A price comes by hand, or of a cost that the operator knows: then it is made by the rule and the
version of the price book that the request was sold under, and the audit computes it again. What
each decision does stands at `resolve_review` in `schema.sql`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID

from pricing.errors import PricingError
from pricing.money import PICOS_PER_USD
from pricing.price_book import Markup, parse_price_book
from proxy.db import Pool
from proxy.ids import uuid7
from proxy.metrics import (
    MARGIN_USD,
    OVERDRAFT_USD,
    PROVIDER_COST_USD,
    REVIEWS_RESOLVED,
    SOLD_CREDITS,
    SOLD_USD,
)
from proxy.recompute import BY_HAND, CHARGES, charge_of
from proxy.reports import Reports, Row

# How often a row that is completed meanwhile is read again. It is completed once.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done; `charge` and `reprice` name either a price or a cost."""

    kind: Literal["charge", "waive", "reprice"]
    price_nanos: int | None = None
    cost_picos: int | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """`outcome` is as documented at resolve_review; `row` the request after it, None for unknown.

    `row` is as `Reports.usage_row` reads it.
    """

    outcome: str
    row: Row | None

    @property
    def is_done(self) -> bool:
        """Whether what was decided stands, now or since before."""
        return self.outcome in {"resolved", "exists"}


@dataclass(frozen=True, slots=True)
class _Terms:
    """A price and how it was made; the parameters of resolve_review."""

    price: int | None = None
    rounding_attos: int | None = None
    rule: str | None = None
    markup_ppm: int | None = None
    cost_picos: int | None = None


class Reviews:
    """Resolves, over the pool. Raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool, reports: Reports) -> None:
        self._pool = pool
        self._reports = reports

    async def resolve(
        self, account_id: UUID, request_id: UUID, decision: Decision, *, actor: str, reason: str
    ) -> Resolved:
        """Carry a decision out; safe to repeat.

        Raises PricingError where the request's rule makes no price of the decision's cost.
        """
        outcome, row = "unknown", None
        for _ in range(_ATTEMPTS):
            row = await self._reports.usage_row(account_id, request_id)
            if row is None or row["status"] == "pending":
                return Resolved("unknown", None)
            terms = _terms(row, decision)
            outcome, overdraft_nanos = await self._call(row, decision, terms, actor, reason)
            if outcome != "stale":
                if outcome == "resolved":
                    _observe(row, decision, terms, overdraft_nanos)
                break
        return Resolved(outcome, await self._reports.usage_row(account_id, request_id))

    async def _call(
        self, row: Row, decision: Decision, terms: _Terms, actor: str, reason: str
    ) -> tuple[str, int]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT outcome, overdraft"
                " FROM resolve_review(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
                (
                    row["account_id"],
                    row["request_id"],
                    decision.kind,
                    row["settled_at"],
                    terms.price,
                    terms.rounding_attos,
                    terms.rule,
                    terms.markup_ppm,
                    terms.cost_picos,
                    uuid7(),
                    actor,
                    reason,
                ),
            )
            answer = await cursor.fetchone()
        if answer is None:  # pragma: no cover - the function always answers a row
            msg = "resolve_review answered no row"
            raise RuntimeError(msg)
        return answer[0], answer[1]


def _terms(row: Mapping[str, Any], decision: Decision) -> _Terms:
    """Make the price of a decision; raises PricingError."""
    if decision.kind == "waive":
        return _Terms()
    if decision.cost_picos is None:
        # What it cost stays as it is known, which may be not at all.
        return _Terms(decision.price_nanos, 0, BY_HAND)
    if row["endpoint"] == CHARGES:
        raise PricingError("no provider takes anything for a metered action")
    if row["document"] is None:
        version = row["price_version"]
        raise PricingError(f"version {version} of the price book does not exist: name a price")
    rule = parse_price_book(row["document"]).select(
        str(row["account_id"]), row["tier"], row["model"]
    )
    charged = charge_of({**row, "cost_picos": decision.cost_picos}, rule, row["nanos_per_credit"])
    is_markup = isinstance(rule.terms, Markup) and not row["byok"]
    return _Terms(
        price=charged.price_nanos,
        rounding_attos=charged.rounding_attos,
        rule=charged.rule,
        markup_ppm=rule.terms.factor_ppm if is_markup and isinstance(rule.terms, Markup) else None,
        cost_picos=decision.cost_picos,
    )


def _observe(row: Row, decision: Decision, terms: _Terms, overdraft_nanos: int) -> None:
    """Count what was sold and what it cost; a counter never falls, the margin does."""
    REVIEWS_RESOLVED.labels(decision.kind).inc()
    sold_nanos = 0 if terms.price is None else terms.price - (row["price"] or 0)
    cost_picos = 0 if terms.cost_picos is None else terms.cost_picos - (row["cost_picos"] or 0)
    if row["byok"]:
        cost_picos = 0  # the customer's own bill
    SOLD_USD.inc(max(sold_nanos, 0) / 1e9)
    SOLD_CREDITS.inc(max(sold_nanos, 0) / (row["nanos_per_credit"] or 1))
    PROVIDER_COST_USD.inc(max(cost_picos, 0) / PICOS_PER_USD)
    MARGIN_USD.inc(sold_nanos / 1e9 - cost_picos / PICOS_PER_USD)
    OVERDRAFT_USD.inc(overdraft_nanos / 1e9)
