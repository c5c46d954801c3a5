"""What changes from one price book to another, rule by rule.

Rules of both books are the same rule if they are for the same requests: a book has no two such.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pricing.price_book import PriceBook, Rule, is_pattern, rule_document

Selectors = tuple[str | None, str | None, str | None]


@dataclass(frozen=True, slots=True)
class RuleChange:
    """A rule before and after, None where there is none, and whom it is for."""

    selectors: Selectors
    before: Rule | None
    after: Rule | None

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        """What happened to the rule."""
        if self.before is None:
            return "added"
        return "removed" if self.after is None else "changed"


@dataclass(frozen=True, slots=True)
class ActionChange:
    """The price of an action before and after, in nanocredits; None where it has none."""

    name: str
    before: int | None
    after: int | None


@dataclass(frozen=True, slots=True)
class BookDiff:
    """Everything that differs; rules in the order of the later book, then those it has not."""

    # Before and after.
    default: tuple[Rule, Rule] | None
    rules: tuple[RuleChange, ...]
    actions: tuple[ActionChange, ...]
    # Whether patterns that may be for the same request are tried in another order than before.
    is_reordered: bool

    @property
    def is_empty(self) -> bool:
        """Whether every request is sold as before, by the same rule."""
        return not (self.default or self.rules or self.actions or self.is_reordered)


def diff_books(before: PriceBook, after: PriceBook) -> BookDiff:
    """Compare two books."""
    old = {_selectors(rule): rule for rule in before.rules}
    new = {_selectors(rule): rule for rule in after.rules}
    changes = [
        RuleChange(selectors, old.get(selectors), rule)
        for selectors, rule in new.items()
        if selectors not in old or _differ(old[selectors], rule)
    ]
    changes += [
        RuleChange(selectors, rule, None) for selectors, rule in old.items() if selectors not in new
    ]
    is_changed = _differ(before.default, after.default)
    return BookDiff(
        default=(before.default, after.default) if is_changed else None,
        rules=tuple(changes),
        actions=_actions(before.action_nanocredits, after.action_nanocredits),
        is_reordered=_contested(before, new) != _contested(after, old),
    )


def _selectors(rule: Rule) -> Selectors:
    return rule.account, rule.tier, rule.model


def _differ(before: Rule, after: Rule) -> bool:
    # Not the rules themselves: their names are places in the document.
    return rule_document(before) != rule_document(after)


def _actions(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[ActionChange, ...]:
    return tuple(
        ActionChange(name, before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    )


def _contested(book: PriceBook, other: Mapping[Selectors, Rule]) -> list[Selectors]:
    """Return the patterns that both books have, as they are tried, by whom they are for.

    Exact names, and rules for different accounts or tiers, never meet in a request.
    """
    both = [
        selectors
        for selectors in map(_selectors, book.ranked)
        if selectors in other and selectors[2] is not None and is_pattern(selectors[2])
    ]
    return sorted(both, key=lambda selectors: (selectors[0] or "", selectors[1] or ""))
