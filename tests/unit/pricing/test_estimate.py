import pytest

from pricing.estimate import (
    MAX_OUTPUT_TOKENS,
    Ceiling,
    affordable_output_tokens,
    ceiling_cost,
    ceiling_price,
    ceiling_usage,
    possible_classes,
)
from pricing.money import MAX_AMOUNT
from pricing.price_book import Flat, Markup, PerToken, Rule
from pricing.rating import ModelPrices, PriceTier
from pricing.usage import TokenClass

CREDIT = 1_000_000
HOLD = 100 * CREDIT

# Picos a token. Audio is dear, and a short prompt's output is dearer than a long one's.
PRICES = ModelPrices(
    {
        TokenClass.INPUT: 1_000,
        TokenClass.CACHE_CREATION: 2_000,
        TokenClass.AUDIO_INPUT: 9_000,
        TokenClass.OUTPUT: 5_000,
        TokenClass.REASONING: 6_000,
    },
    tiers=(PriceTier(100, {TokenClass.INPUT: 3_000, TokenClass.OUTPUT: 4_000}),),
    search=7_000,
)
FREE = ModelPrices({TokenClass.INPUT: 0, TokenClass.OUTPUT: 0})
TEXT = possible_classes(audio=False, images=False, one_hour_cache=False)

TWICE = Rule(name="default", terms=Markup(2_000_000))
FLAT = Rule(name="r", terms=Flat(10**9))
PER_TOKEN = Rule(
    name="r",
    terms=PerToken(
        {TokenClass.INPUT: 10**9, TokenClass.CACHED_INPUT: 10**8, TokenClass.OUTPUT: 2 * 10**9}
    ),
)


def price(rule: Rule, prices: ModelPrices | None, input_tokens: int, output_tokens: int) -> int:
    return ceiling_price(
        rule,
        prices,
        input_tokens,
        output_tokens,
        nanos_per_credit=CREDIT,
        default_hold_nanos=HOLD,
        classes=TEXT,
    )


def test_every_token_is_taken_at_the_dearest_price_within_reach() -> None:
    assert ceiling_cost(PRICES, 100, 10, classes=TEXT) == 100 * 2_000 + 10 * 6_000
    assert ceiling_cost(PRICES, 101, 10, classes=TEXT) == 101 * 3_000 + 10 * 6_000
    assert ceiling_cost(PRICES, 100, 10) == 100 * 9_000 + 10 * 6_000
    assert ceiling_cost(PRICES, 100, 10, classes=TEXT, searches=2) == 260_000 + 14_000


def test_a_side_without_a_price_has_no_ceiling_unless_it_has_no_tokens() -> None:
    input_only = ModelPrices({TokenClass.INPUT: 1_000})
    assert ceiling_cost(input_only, 10, 1) is None
    assert ceiling_cost(input_only, 10, 0) == 10_000
    assert ceiling_cost(None, 10, 0) is None


def test_classes_that_a_request_cannot_have_are_left_out() -> None:
    assert possible_classes() == set(TokenClass)
    assert set(TEXT) == {
        TokenClass.INPUT,
        TokenClass.CACHED_INPUT,
        TokenClass.CACHE_CREATION,
        TokenClass.OUTPUT,
        TokenClass.REASONING,
    }


@pytest.mark.parametrize("context, input_tokens", [(None, 60), (0, 60), (59, 59), (61, 60)])
def test_a_token_is_at_least_a_byte_and_the_context_window_bounds_them(
    context: int | None, input_tokens: int
) -> None:
    ceiling = ceiling_usage(
        FREE,
        prompt_bytes=50,
        attachment_tokens=10,
        max_input_tokens=context,
        output_limit=7,
        n=3,
    )
    assert ceiling == Ceiling(input_tokens, 21, 0)


def test_the_ceiling_is_sold_by_the_rule() -> None:
    assert price(TWICE, PRICES, 100, 10) == 520
    assert price(FLAT, PRICES, 100, 10) == CREDIT
    assert price(PER_TOKEN, PRICES, 1000, 500) == 2 * CREDIT


def test_the_ceiling_covers_the_cost_that_a_flat_price_is_raised_to() -> None:
    assert price(FLAT, PRICES, 0, 10**6) == 6 * CREDIT


def test_an_unknown_price_holds_the_default() -> None:
    assert price(TWICE, None, 100, 10) == HOLD
    assert price(FLAT, None, 100, 10) == HOLD
    assert price(Rule(name="r", terms=Flat(200 * 10**9)), None, 100, 10) == 200 * CREDIT


def test_an_unknown_cost_does_not_matter_to_a_rule_that_may_lose() -> None:
    assert price(Rule(name="r", terms=FLAT.terms, allow_loss=True), None, 100, 10) == CREDIT
    assert price(Rule(name="r", terms=TWICE.terms, allow_loss=True), None, 100, 10) == HOLD


def test_a_ceiling_beyond_the_ledger_is_all_that_it_can_hold() -> None:
    assert price(TWICE, PRICES, 10**18, 10**18) == MAX_AMOUNT


def affordable(rule: Rule, prices: ModelPrices | None, available_nanos: int) -> int:
    return affordable_output_tokens(
        rule,
        prices,
        100,
        2,
        available_nanos=available_nanos,
        nanos_per_credit=CREDIT,
        classes=TEXT,
    )


def test_the_affordable_limit_is_the_last_whose_ceiling_fits() -> None:
    # 400 nanos of input, then 24 for each token of the two choices.
    assert [affordable(TWICE, PRICES, nanos) for nanos in (-1, 0, 400, 423, 424, 447, 448)] == [
        0, 0, 0, 0, 1, 1, 2,
    ]  # fmt: skip


def test_nothing_is_affordable_where_the_price_is_unbounded() -> None:
    assert affordable(TWICE, None, MAX_AMOUNT) == 0
    assert affordable(FLAT, None, MAX_AMOUNT) == 0


def test_free_output_is_affordable_up_to_the_limit() -> None:
    assert affordable(TWICE, FREE, 0) == MAX_OUTPUT_TOKENS
    assert (
        affordable_output_tokens(
            TWICE, FREE, 1, 1, available_nanos=0, nanos_per_credit=CREDIT, max_output_tokens=77
        )
        == 77
    )
