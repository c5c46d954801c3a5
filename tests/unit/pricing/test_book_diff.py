from typing import Any

import pytest

from pricing.book_diff import BookDiff, diff_books
from pricing.price_book import parse_price_book

ALICE = "0192f0c1-2345-7abc-8def-0123456789ab"
FLAT = {"kind": "flat", "credits": "1"}
DEAR = {"kind": "flat", "credits": "2"}


def diff(before: dict[str, Any], after: dict[str, Any]) -> BookDiff:
    return diff_books(parse_price_book(before), parse_price_book(after))


def test_books_that_say_the_same_have_no_difference() -> None:
    before = {
        "default": {"kind": "markup", "factor": "2.0"},
        "rules": [{"tier": "pro", **FLAT}, {"model": "gpt", **FLAT}],
        "actions": {"upload": "1"},
    }
    after = {"rules": [{"model": "gpt", **FLAT}, {"tier": "pro", **FLAT}]}
    found = diff(before, {**after, "actions": {"upload": "1.0"}})
    assert found == BookDiff(None, (), (), is_reordered=False)
    assert found.is_empty


def test_rules_are_told_from_one_another_by_whom_they_are_for() -> None:
    before = [{"tier": "pro", **FLAT}, {"model": "gpt", **FLAT}, {"account": ALICE, **FLAT}]
    after = [{"tier": "pro", "model": "gpt", **FLAT}, {"account": ALICE, **DEAR}]
    found = diff({"rules": [*before]}, {"rules": [*after, {"tier": "pro", **FLAT}]})
    assert [(change.kind, change.selectors) for change in found.rules] == [
        ("added", (None, "pro", "gpt")),
        ("changed", (ALICE, None, None)),
        ("removed", (None, None, "gpt")),
    ]
    added, changed, removed = found.rules
    assert (added.before, removed.after) == (None, None)
    assert changed.before is not None
    assert (changed.before.name, changed.after and changed.after.name) == ("rules[2]", "rules[1]")
    assert not found.is_empty


def test_default_and_actions_are_compared() -> None:
    found = diff(
        {"actions": {"gone": "1", "kept": "2", "raised": "3"}},
        {"default": {"kind": "markup", "factor": "3"}, "actions": {"kept": "2", "raised": "4"}},
    )
    assert found.default is not None
    assert [rule.terms for rule in found.default] == [
        parse_price_book({"default": {"kind": "markup", "factor": factor}}).default.terms
        for factor in ("2", "3")
    ]
    assert [(each.name, each.before, each.after) for each in found.actions] == [
        ("gone", 10**9, None),
        ("raised", 3 * 10**9, 4 * 10**9),
    ]
    added = diff({}, {"actions": {"new": "1"}})
    assert [(each.name, each.before) for each in added.actions] == [("new", None)]
    assert not added.is_empty


@pytest.mark.parametrize(
    "first, second, is_reordered",
    [
        # Equally specific, and both may be for "ac".
        ({"model": "a*c"}, {"model": "ac*"}, True),
        ({"model": "a*c", "tier": "pro"}, {"model": "ac*", "tier": "pro"}, True),
        # No request is for both.
        ({"model": "ab"}, {"model": "ac"}, False),
        ({"model": "a*c", "tier": "pro"}, {"model": "ac*", "tier": "free"}, False),
        # The longer one is tried first wherever it stands.
        ({"model": "a*"}, {"model": "ab*"}, False),
    ],
)
def test_an_order_is_a_difference_where_it_decides(
    first: dict[str, str], second: dict[str, str], *, is_reordered: bool
) -> None:
    one, other = {**first, **FLAT}, {**second, **FLAT}
    found = diff({"rules": [one, other]}, {"rules": [other, one]})
    assert (found.is_reordered, found.rules) == (is_reordered, ())
    assert found.is_empty is not is_reordered


def test_rules_that_come_and_go_put_nothing_in_another_order() -> None:
    one, other, new = ({"model": model, **FLAT} for model in ("a*c", "ac*", "*ac"))
    found = diff({"rules": [one, other]}, {"rules": [new, other]})
    assert [change.kind for change in found.rules] == ["added", "removed"]
    assert not found.is_reordered
