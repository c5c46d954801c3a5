"""What the endpoints of drafts answer: a draft, what it changes, what it would have brought."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from typing_extensions import TypedDict

from pricing.book_diff import BookDiff, RuleChange
from pricing.money import decimal_text
from pricing.price_book import Rule, rule_document
from proxy.api.answers import Money
from proxy.api.shapes import Shapes, utc
from proxy.price_replay import Replay, Sold

_NANOCREDIT_DIGITS = 9


class PriceDraft(TypedDict):
    """A price book that nobody is charged by; `published_version` once it was published."""

    id: UUID
    name: str
    based_on: int | None
    created_at: datetime
    created_by: str
    updated_at: datetime
    published_version: int | None
    document: dict[str, Any]


class DefaultDiff(TypedDict):
    """The default rule before and after."""

    before: dict[str, Any]
    after: dict[str, Any]


class RuleDiff(TypedDict):
    """A rule, known by whom it is for, before and after."""

    change: Literal["added", "removed", "changed"]
    account: str | None
    tier: str | None
    model: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ActionDiff(TypedDict):
    """The price of an action in credits, before and after."""

    action: str
    before: str | None
    after: str | None


class Difference(TypedDict):
    """What a price book changes of the version in force.

    `reordered`: patterns that may be for the same model are tried in another order than before.
    """

    live_version: int
    unchanged: bool
    default: DefaultDiff | None
    rules: list[RuleDiff]
    actions: list[ActionDiff]
    reordered: bool


class DraftDiff(Difference):
    """What a draft changes of the version in force."""

    draft_id: UUID


class Revenue(TypedDict):
    """What requests brought, what they would have brought under the draft, and the difference."""

    now: Money
    draft: Money
    change: Money


class ModelReplay(TypedDict):
    """The requests of a model; null has those of all beyond the first thousand models."""

    model: str | None
    requests: int
    revenue: Revenue


class TierReplay(TypedDict):
    """The requests of a tier."""

    tier: str | None
    requests: int
    revenue: Revenue


class Unpriced(TypedDict):
    """Requests that would wait for a review, why, and what they brought now."""

    reason: str
    requests: int
    revenue: Money


class Waiting(TypedDict):
    """Requests with no price now; `priced` of them have one under the draft, which is `revenue`."""

    requests: int
    priced: int
    revenue: Money


_Between = TypedDict("_Between", {"from": datetime, "until": datetime})


class DraftReplay(_Between):
    """A period's charged requests, sold once more under the draft."""

    draft_id: UUID
    requests: int
    revenue: Revenue
    models: list[ModelReplay]
    tiers: list[TierReplay]
    unpriced: list[Unpriced]
    set_by_hand: int
    waiting: Waiting


def draft_shape(row: Mapping[str, Any]) -> PriceDraft:
    """Render a draft."""
    return {
        "id": row["draft_id"],
        "name": row["name"],
        "based_on": row["based_on"],
        "created_at": utc(row["created_at"]),
        "created_by": row["created_by"],
        "updated_at": utc(row["updated_at"]),
        "published_version": row["published_version"],
        "document": row["document"],
    }


def difference(live_version: int, found: BookDiff) -> Difference:
    """Render what changes of a version."""
    return {
        "live_version": live_version,
        "unchanged": found.is_empty,
        "default": None
        if found.default is None
        else {"before": rule_document(found.default[0]), "after": rule_document(found.default[1])},
        "rules": [_rule_diff(change) for change in found.rules],
        "actions": [
            {
                "action": change.name,
                "before": _credits(change.before),
                "after": _credits(change.after),
            }
            for change in found.actions
        ],
        "reordered": found.is_reordered,
    }


def _rule_diff(change: RuleChange) -> RuleDiff:
    account, tier, model = change.selectors
    return {
        "change": change.kind,
        "account": account,
        "tier": tier,
        "model": model,
        "before": _document(change.before),
        "after": _document(change.after),
    }


def _document(rule: Rule | None) -> dict[str, object] | None:
    return None if rule is None else rule_document(rule)


def _credits(nanocredits: int | None) -> str | None:
    return None if nanocredits is None else decimal_text(nanocredits, _NANOCREDIT_DIGITS)


def replayed(shapes: Shapes, found: Replay) -> dict[str, object]:
    """Render a replay, without its draft and period; the largest changes first."""
    unpriced = sorted(found.unpriced.items())
    return {
        "requests": found.total.requests,
        "revenue": _revenue(shapes, found.total),
        "models": _named(shapes, "model", found.models),
        "tiers": _named(shapes, "tier", found.tiers),
        "unpriced": [
            {
                "reason": reason,
                "requests": sold.requests,
                "revenue": shapes.money(sold.now_nanos),
            }
            for reason, sold in unpriced
        ],
        "set_by_hand": found.set_by_hand,
        "waiting": {
            "requests": found.waiting,
            "priced": found.waiting_priced.requests,
            "revenue": shapes.money(found.waiting_priced.draft_nanos),
        },
    }


def _named(shapes: Shapes, member: str, sold: dict[str | None, Sold]) -> list[dict[str, object]]:
    ordered = sorted(sold.items(), key=lambda item: (-abs(item[1].change_nanos), item[0] or ""))
    return [
        {member: name, "requests": each.requests, "revenue": _revenue(shapes, each)}
        for name, each in ordered
    ]


def _revenue(shapes: Shapes, sold: Sold) -> Revenue:
    return {
        "now": shapes.money(sold.now_nanos),
        "draft": shapes.money(sold.draft_nanos),
        "change": shapes.money(sold.change_nanos),
    }
