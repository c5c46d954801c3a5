from typing import Any

import pytest

from pricing.book_edit import Selectors, with_markup, without_rule
from pricing.errors import InvalidPriceBookError
from pricing.price_book import PriceBook, parse_price_book

ALICE = "0192f0c1-2345-7abc-8def-0123456789ab"
DEFAULT = {"kind": "markup", "factor": "2", "minimum": "0.1", "byok_fee_percent": "5"}
BOOK: dict[str, Any] = {
    "default": DEFAULT,
    "rules": [
        {"tier": "pro", "kind": "markup", "factor": "1.5", "minimum": "0.3", "allow_loss": True},
        {
            "model": "gpt-*",
            "kind": "per_token",
            "credits": {"input": "1", "output": "2"},
            "byok_fee_percent": "7",
        },
    ],
    "actions": {"upload": "1"},
}
PRO, GPT, NEW = BOOK["rules"][0], BOOK["rules"][1], {"account": ALICE, "model": "o*"}


def canonical(**changes: Any) -> dict[str, object]:
    return parse_price_book({**BOOK, **changes}).canonical_document()


@pytest.fixture
def book() -> PriceBook:
    return parse_price_book(BOOK)


@pytest.mark.parametrize(
    "selectors, members, changes",
    [
        ({}, {"factor": "3"}, {"default": {**DEFAULT, "factor": "3"}}),
        ({}, {"factor": "3", "minimum": "0"}, {"default": {**DEFAULT, "factor": 3, "minimum": 0}}),
        # What it was before, but for the factor: below cost, as it may.
        ({"tier": "pro"}, {"factor": "0.9"}, {"rules": [{**PRO, "factor": "0.9"}, GPT]}),
        (
            {"model": "gpt-*"},
            {"factor": "2"},
            {
                "rules": [
                    PRO,
                    {"model": "gpt-*", "kind": "markup", "factor": "2", "byok_fee_percent": "7"},
                ]
            },
        ),
        # A new one goes without nothing that the default rule takes.
        (NEW, {"factor": "1"}, {"rules": [PRO, GPT, {**DEFAULT, **NEW, "factor": "1"}]}),
        (
            {"tier": "pro", "model": "gpt-*"},
            {"factor": "1", "byok_fee_percent": "0"},
            {
                "rules": [
                    PRO,
                    GPT,
                    {
                        **DEFAULT,
                        "tier": "pro",
                        "model": "gpt-*",
                        "factor": "1",
                        "byok_fee_percent": "0",
                    },
                ]
            },
        ),
    ],
)
def test_a_markup_changes_one_rule(
    book: PriceBook, selectors: Selectors, members: dict[str, object], changes: dict[str, Any]
) -> None:
    assert with_markup(book, selectors, members) == canonical(**changes)


def test_a_markup_below_cost_is_refused_unless_it_may_lose(book: PriceBook) -> None:
    with pytest.raises(InvalidPriceBookError, match="sells below cost"):
        with_markup(book, {"model": "new"}, {"factor": "0.9"})
    document = with_markup(book, {"model": "new"}, {"factor": "0.9", "allow_loss": True})
    assert parse_price_book(document).select("", "free", "new").allow_loss


def test_a_rule_is_removed_by_its_exact_selectors(book: PriceBook) -> None:
    assert without_rule(book, {"model": "gpt-*"}) == canonical(rules=[PRO])
    assert without_rule(book, {"tier": "pro"}) == canonical(rules=[GPT])
    assert without_rule(book, {"tier": "pro", "model": "gpt-*"}) is None
    assert without_rule(book, {}) is None
