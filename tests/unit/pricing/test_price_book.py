from typing import Any

import pytest

from pricing.errors import InvalidPriceBookError
from pricing.price_book import Flat, Markup, PerToken, PriceBook, Rule, parse_price_book
from pricing.usage import TokenClass

ALICE = "0192f0c1-2345-7abc-8def-0123456789ab"
BOB = "0192f0c1-2345-7abc-8def-0123456789ac"

FULL: dict[str, Any] = {
    "default": {"kind": "markup", "factor": "2.0", "minimum": "0.001", "byok_fee_percent": "5"},
    "rules": [
        {"model": "*", "kind": "flat", "credits": "1"},
        {"model": "gpt-*", "kind": "flat", "credits": "2"},
        {"model": "gpt-5*", "kind": "flat", "credits": "3"},
        {"model": "gpt-5", "kind": "flat", "credits": "4"},
        {"tier": "pro", "kind": "markup", "factor": "0.5", "allow_loss": True},
        {"tier": "pro", "model": "claude-?", "kind": "markup", "factor": 1},
        {"account": ALICE.upper(), "kind": "flat", "credits": "7"},
        {
            "account": ALICE,
            "model": "o[13]",
            "kind": "per_token",
            "credits": {"input": "1", "output": "4.5", "reasoning": "0"},
            "multiplier": "3.0",
        },
    ],
    "actions": {"message": "1", "upload.file": "0.25"},
}


@pytest.mark.parametrize(
    "account, tier, model, name",
    [
        (BOB, "free", "llama", "rules[0]"),
        (BOB, "free", "gpt-4", "rules[1]"),
        (BOB, "free", "gpt-5-mini", "rules[2]"),
        (BOB, "free", "gpt-5", "rules[3]"),
        (BOB, "pro", "gpt-5", "rules[4]"),
        (BOB, "pro", "claude-4", "rules[5]"),
        (ALICE, "pro", "claude-4", "rules[6]"),
        (ALICE, "free", "o3", "rules[7]"),
        (ALICE, "free", "o2", "rules[6]"),
    ],
)
def test_the_most_specific_rule_wins(account: str, tier: str, model: str, name: str) -> None:
    assert parse_price_book(FULL).select(account, tier, model).name == name


def test_between_equally_specific_patterns_the_earlier_rule_wins() -> None:
    rule = {"kind": "flat", "credits": "1"}
    document = {"rules": [{"model": "a*c", **rule}, {"model": "ac*", **rule}]}
    assert parse_price_book(document).select(BOB, "t", "ac").name == "rules[0]"


def test_model_names_match_in_their_own_case_and_as_a_whole() -> None:
    book = parse_price_book({"rules": [{"model": "gpt-*", "kind": "flat", "credits": "1"}]})
    for model in ("GPT-4", "my-gpt-4", "gpt"):
        assert book.select(BOB, "t", model) is book.default


def test_an_empty_book_sells_at_twice_the_cost() -> None:
    book = parse_price_book({})
    assert book == PriceBook(Rule(name="default", terms=Markup(2_000_000)))
    assert book.select(BOB, "t", "m") is book.default
    assert parse_price_book({"default": None, "rules": None, "actions": None}) == book


def test_rules_are_found_by_the_name_that_a_charge_keeps() -> None:
    book = parse_price_book(FULL)
    assert book.rule("default") is book.default
    assert book.rule("rules[3]").terms == Flat(4 * 10**9)
    with pytest.raises(KeyError):
        book.rule("rules[99]")


def test_every_member_is_read() -> None:
    book = parse_price_book(FULL)
    assert book.default == Rule(
        name="default",
        terms=Markup(2_000_000),
        minimum_nanocredits=1_000_000,
        byok_fee_ppm=50_000,
    )
    assert book.rules[4].allow_loss
    assert book.rules[7].account == ALICE
    terms = book.rules[7].terms
    assert isinstance(terms, PerToken)
    assert terms.multiplier_ppm == 3_000_000
    assert terms.nanocredits_of(TokenClass.OUTPUT) == 4_500_000_000
    assert terms.nanocredits_of(TokenClass.REASONING) == 0
    assert terms.nanocredits_of(TokenClass.CACHE_CREATION_1H) == 10**9
    assert terms.nanocredits_of(TokenClass.IMAGE_OUTPUT) == 4_500_000_000
    assert [rule.kind for rule in book.rules[4:]] == ["markup", "markup", "flat", "per_token"]
    assert book.action_nanocredits == {"message": 10**9, "upload.file": 250_000_000}


def test_the_canonical_document_gives_the_same_book_again() -> None:
    book = parse_price_book(FULL)
    document = book.canonical_document()
    assert parse_price_book(document) == book
    assert parse_price_book(document).canonical_document() == document
    assert document["default"] == {
        "kind": "markup",
        "factor": "2",
        "minimum": "0.001",
        "allow_loss": False,
        "byok_fee_percent": "5",
    }


MARKUP = {"kind": "markup", "factor": "2"}


@pytest.mark.parametrize(
    "document, path, remedy",
    [
        ([], "price book", "must be an object"),
        ({1: 2}, "price book", "in quotes"),
        ({"rule": []}, "price book", "unknown member 'rule'"),
        ({"default": "2.0"}, "default", "must be an object"),
        ({"default": {}}, "default.kind", '"flat"'),
        ({"default": {"kind": "free"}}, "default.kind", '"flat"'),
        ({"default": {"kind": ["flat"]}}, "default.kind", '"flat"'),
        ({"default": MARKUP | {"tier": "a"}}, "default", "selectors"),
        ({"default": MARKUP | {"credits": "1"}}, "default", "unknown member 'credits'"),
        ({"default": MARKUP | {"minimal": "1"}}, "default", "unknown member 'minimal'"),
        ({"default": {"kind": "markup"}}, "default.factor", "is missing"),
        ({"default": MARKUP | {"factor": 2.0}}, "default.factor", 'string: "2.0"'),
        ({"default": MARKUP | {"factor": "two"}}, "default.factor", "not a decimal"),
        ({"default": MARKUP | {"factor": True}}, "default.factor", "not bool"),
        ({"default": MARKUP | {"factor": "-2"}}, "default.factor", "negative"),
        ({"default": MARKUP | {"factor": "nan"}}, "default.factor", "not a decimal"),
        ({"default": MARKUP | {"factor": "1e999999999"}}, "default.factor", "not a decimal"),
        ({"default": MARKUP | {"factor": "2.0000001"}}, "default.factor", "decimal places"),
        ({"default": MARKUP | {"factor": "1000.1"}}, "default.factor", "limit of 1000"),
        ({"default": MARKUP | {"factor": "0.999999"}}, "default.factor", "allow_loss"),
        ({"default": MARKUP | {"allow_loss": "yes"}}, "default.allow_loss", "true or false"),
        ({"default": MARKUP | {"minimum": "-1"}}, "default.minimum", "negative"),
        ({"default": MARKUP | {"byok_fee_percent": "1001"}}, "default.byok_fee_percent", "limit"),
        ({"default": {"kind": "flat"}}, "default.credits", "is missing"),
        ({"default": {"kind": "flat", "credits": "2e9"}}, "default.credits", "limit"),
        ({"default": {"kind": "per_token"}}, "default.credits.input", "is missing"),
        (
            {"default": {"kind": "per_token", "credits": {"input": "1"}}},
            "default.credits.output",
            "is missing",
        ),
        (
            {"default": {"kind": "per_token", "credits": {"inputs": "1"}}},
            "default.credits",
            "unknown member 'inputs'",
        ),
        (
            {"default": {"kind": "per_token", "credits": "1"}},
            "default.credits",
            "must be an object",
        ),
        ({"rules": {}}, "rules", "must be a list"),
        ({"rules": "rules"}, "rules", "must be a list"),
        ({"rules": [MARKUP] * 10_001}, "rules", "at most 10000"),
        ({"rules": [1]}, "rules[0]", "must be an object"),
        ({"rules": [MARKUP]}, "rules[0]", "needs one of account, tier, model"),
        ({"rules": [MARKUP | {"account": "alice"}]}, "rules[0].account", "uuid"),
        ({"rules": [MARKUP | {"account": 7}]}, "rules[0].account", "text"),
        ({"rules": [MARKUP | {"tier": ""}]}, "rules[0].tier", "1 to 256"),
        ({"rules": [MARKUP | {"tier": "a\0"}]}, "rules[0].tier", "1 to 256"),
        ({"rules": [MARKUP | {"model": "m" * 257}]}, "rules[0].model", "1 to 256"),
        (
            {"rules": [MARKUP | {"tier": "a"}, MARKUP | {"tier": "b"}, MARKUP | {"tier": "a"}]},
            "rules[2]",
            "same requests as rules[0]",
        ),
        ({"actions": []}, "actions", "must be an object"),
        ({"actions": {"Send Mail": "1"}}, "actions", "lower-case"),
        ({"actions": {"message": 0.5}}, "actions.message", 'string: "0.5"'),
    ],
)
def test_errors_say_where_and_what_to_do(
    document: dict[str, object], path: str, remedy: str
) -> None:
    with pytest.raises(InvalidPriceBookError) as caught:
        parse_price_book(document)
    assert caught.value.path == path
    assert remedy in caught.value.problem
    assert str(caught.value) == f"{path}: {caught.value.problem}"
