import pytest

from pricing.estimate import (
    MAX_OUTPUT_TOKENS,
    affordable_output_tokens,
    ceiling_cost,
    ceiling_price,
    likely_price,
    possible_classes,
)
from pricing.money import MAX_AMOUNT
from pricing.price_book import Flat, Markup, PerToken, Rule
from pricing.rating import ModelPrices, PriceTier
from pricing.usage import TokenClass, Usage

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
# Sells the same thing by the token and by the unit.
MEDIA = ModelPrices(
    {TokenClass.INPUT: 1_000, TokenClass.OUTPUT: 5_000},
    units={"image": 70_000, "input_character": 300, "second": 7, "query": 9_000},
)
UNITS_ONLY = ModelPrices({}, units=MEDIA.units)
TOKENS_ONLY = ModelPrices(MEDIA.tokens)
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
    without = {TokenClass.CACHE_CREATION_1H}
    assert possible_classes(one_hour_cache=False) == set(TokenClass) - without
    assert set(TEXT) == {
        TokenClass.INPUT,
        TokenClass.CACHED_INPUT,
        TokenClass.CACHE_CREATION,
        TokenClass.OUTPUT,
        TokenClass.REASONING,
    }


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


@pytest.mark.parametrize(
    "units, picos",
    [
        ({}, 0),
        ({"images": 0, "queries": 0}, 0),
        ({"images": 2}, 140_000),
        ({"input_characters": 10}, 3_000),
        ({"audio_ms": 1}, 1),
        ({"audio_ms": 1_001}, 8),
        ({"queries": 3}, 27_000),
        ({"input_characters": 10, "audio_ms": 2_000}, 3_014),
    ],
)
def test_units_have_a_ceiling_beside_the_tokens(units: dict[str, int], picos: int) -> None:
    assert ceiling_cost(MEDIA, 10, 2, units=units) == 10_000 + 10_000 + picos
    assert ceiling_cost(UNITS_ONLY, 0, 0, units=units) == picos


def test_tokens_do_not_matter_where_units_pay_for_everything() -> None:
    assert ceiling_cost(UNITS_ONLY, 10, 2, units={"images": 2}) == 140_000
    assert ceiling_cost(UNITS_ONLY, 10, 2, units={"images": 0}) is None
    assert ceiling_cost(UNITS_ONLY, 10, 2) is None
    half = ModelPrices({TokenClass.INPUT: 1_000}, units=MEDIA.units)
    assert ceiling_cost(half, 10, 2, units={"images": 2}) is None


@pytest.mark.parametrize(
    "unit, bounded_by", [("images", 1), ("input_characters", 1), ("audio_ms", 0), ("queries", 0)]
)
def test_a_unit_without_a_price_is_bounded_by_the_tokens_that_pay_for_it(
    unit: str, bounded_by: int
) -> None:
    bounds = [0, 0]
    assert ceiling_cost(TOKENS_ONLY, *bounds, units={unit: 1}) is None
    bounds[1 - bounded_by] = 10
    assert ceiling_cost(TOKENS_ONLY, *bounds, units={unit: 1}) is None
    bounds[bounded_by] = 10
    assert ceiling_cost(TOKENS_ONLY, *bounds, units={unit: 1}) == 60_000
    # Tokens that cost nothing do not pay for anything else.
    assert ceiling_cost(FREE, *bounds, units={unit: 1}) is None
    assert ceiling_cost(None, *bounds, units={unit: 1}) is None


def test_speech_is_bounded_by_its_length_as_well() -> None:
    by_length = ModelPrices({}, units={"second": 7})
    assert ceiling_cost(by_length, 0, 0, units={"input_characters": 5, "audio_ms": 2_000}) == 14
    assert ceiling_cost(by_length, 0, 0, units={"input_characters": 5, "audio_ms": 0}) is None
    assert ceiling_cost(by_length, 0, 0, units={"input_characters": 5}) is None
    assert ceiling_cost(UNITS_ONLY, 0, 0, units={"input_characters": 5}) == 1_500


def test_a_disputed_unit_has_no_ceiling() -> None:
    disputed = ModelPrices(MEDIA.tokens, units=MEDIA.units, disputed=frozenset({"image"}))
    assert ceiling_cost(disputed, 10, 2, units={"images": 1}) is None
    assert ceiling_cost(disputed, 10, 2, units={"images": 0, "queries": 1}) == 29_000


def test_a_unit_of_another_name_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        ceiling_cost(MEDIA, 10, 2, units={"image": 1})


def test_a_service_tier_is_held_at_its_price_or_the_standard_one() -> None:
    tiers = {
        "flex": ModelPrices({TokenClass.INPUT: 500, TokenClass.OUTPUT: 2_500}),
        "priority": ModelPrices({TokenClass.INPUT: 2_000, TokenClass.OUTPUT: 9_000}),
    }
    prices = ModelPrices(MEDIA.tokens, service_tiers=tiers)
    wanted = {None: 20_000, "auto": 20_000, "flex": 20_000, "priority": 38_000}
    for service_tier, picos in wanted.items():
        assert ceiling_cost(prices, 10, 2, service_tier=service_tier) == picos
        held = ceiling_price(
            TWICE,
            prices,
            10,
            2,
            nanos_per_credit=CREDIT,
            default_hold_nanos=HOLD,
            service_tier=service_tier,
        )
        assert held == 2 * picos // 1_000
    limits = [
        affordable_output_tokens(TWICE, prices, 10, 1, 400, CREDIT, service_tier=service_tier)
        for service_tier in wanted
    ]
    assert limits == [38, 38, 38, 20]


def test_the_ceiling_of_units_is_sold_and_afforded() -> None:
    def held(rule: Rule, prices: ModelPrices, **units: int) -> int:
        return ceiling_price(
            rule, prices, 0, 0, nanos_per_credit=CREDIT, default_hold_nanos=HOLD, units=units
        )

    assert held(TWICE, UNITS_ONLY, images=2) == 280
    assert held(TWICE, TOKENS_ONLY, images=2) == HOLD
    # A rule by the token sells everything else at cost.
    assert held(PER_TOKEN, UNITS_ONLY, images=2) == 140
    assert held(PER_TOKEN, TOKENS_ONLY, images=2) == HOLD

    def afforded(nanos: int) -> int:
        return affordable_output_tokens(
            TWICE, MEDIA, 10, 1, nanos, CREDIT, units={"images": 2}, max_output_tokens=99
        )

    assert [afforded(nanos) for nanos in (299, 300, 310, 9_999)] == [0, 0, 1, 99]


@pytest.mark.parametrize(
    "rule, prices, usage, nanos",
    [
        (TWICE, MEDIA, Usage(input_tokens=10, output_tokens=2), 40),
        (TWICE, MEDIA, Usage(images=3), 420),
        (TWICE, TOKENS_ONLY, Usage(images=3), None),
        (TWICE, None, Usage(input_tokens=10), None),
        (FLAT, MEDIA, Usage(queries=1), CREDIT),
        (FLAT, TOKENS_ONLY, Usage(queries=1), None),
        (Rule(name="r", terms=FLAT.terms, allow_loss=True), TOKENS_ONLY, Usage(queries=1), CREDIT),
        (Rule(name="r", terms=FLAT.terms, allow_loss=True), None, Usage(queries=1), CREDIT),
        (PER_TOKEN, FREE, Usage(input_tokens=1000), CREDIT),
        (PER_TOKEN, MEDIA, Usage(input_characters=1000), 300),
        (Rule(name="r", terms=PER_TOKEN.terms, allow_loss=True), MEDIA, Usage(queries=1), None),
        (TWICE, ModelPrices({TokenClass.INPUT: MAX_AMOUNT}), Usage(input_tokens=2), None),
    ],
)
def test_the_likely_price_is_what_the_usage_would_be_sold_for(
    rule: Rule, prices: ModelPrices | None, usage: Usage, nanos: int | None
) -> None:
    assert likely_price(rule, prices, usage, nanos_per_credit=CREDIT) == nanos


def test_the_likely_price_is_that_of_the_service_tier() -> None:
    prices = ModelPrices(MEDIA.tokens, service_tiers={"flex": ModelPrices({TokenClass.INPUT: 500})})
    usage = Usage(input_tokens=10)
    for service_tier, nanos in ((None, 20), ("flex", 10), ("default", 20)):
        likely = likely_price(
            TWICE, prices, usage, nanos_per_credit=CREDIT, service_tier=service_tier
        )
        assert likely == nanos
