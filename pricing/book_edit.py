"""One rule of a price book changed, and the rest left as it is: a book in, a document out."""

from collections.abc import Mapping
from typing import Literal

from pricing.price_book import PriceBook, parse_price_book, rule_document

Document = dict[str, object]
Selectors = Mapping[Literal["account", "tier", "model"], str]

# What a new rule has of the default rule where nothing is said of it.
_INHERITED = ("minimum", "allow_loss", "byok_fee_percent")


def with_markup(book: PriceBook, selectors: Selectors, members: Mapping[str, object]) -> Document:
    """Return the book's document with a markup for exactly these selectors; none: the default.

    `members` are those of a markup rule ("factor", and whatever else is said). A rule that is
    there already keeps its minimum, `allow_loss` and BYOK fee where they are not named; a new one
    has the default rule's, and stands last. Raises InvalidPriceBookError.
    """
    document = book.canonical_document()
    rules = [rule_document(rule) for rule in book.rules]
    base = rule_document(book.default)
    place = _place(book, selectors)
    if selectors and place is not None:
        base = rules[place]
    rule: Document = {
        **selectors,
        "kind": "markup",
        **{name: base[name] for name in _INHERITED},
        **members,
    }
    if not selectors:
        document["default"] = rule
    else:
        end = len(rules) if place is None else place
        document["rules"] = [*rules[:end], rule, *rules[end + 1 :]]
    return parse_price_book(document).canonical_document()


def without_rule(book: PriceBook, selectors: Selectors) -> Document | None:
    """Return the book's document without the rule for exactly these; None if it has none such."""
    place = _place(book, selectors)
    if place is None:
        return None
    rules = [rule_document(rule) for rule in book.rules]
    return {**book.canonical_document(), "rules": [*rules[:place], *rules[place + 1 :]]}


def _place(book: PriceBook, selectors: Selectors) -> int | None:
    wanted = (selectors.get("account"), selectors.get("tier"), selectors.get("model"))
    for place, rule in enumerate(book.rules):
        if (rule.account, rule.tier, rule.model) == wanted:
            return place
    return None
