from typing import Any

import pytest

from pricing.errors import CostUnknownError, InvalidAmountError
from pricing.money import MAX_AMOUNT
from pricing.rating import (
    ModelPrices,
    PriceTier,
    is_free,
    merge_ceiling,
    parse_model_prices,
    rate,
)
from pricing.usage import TokenClass, Usage


def prices_of(**info: object) -> ModelPrices:
    prices = parse_model_prices(info)
    assert prices is not None
    return prices


def cost(prices: ModelPrices, **counts: int) -> int:
    return rate(prices, Usage(**counts))


def reason(prices: ModelPrices, **counts: int) -> str:
    with pytest.raises(CostUnknownError) as caught:
        cost(prices, **counts)
    return caught.value.reason


# Entries of LiteLLM's price map (1.106.2), cut down to their prices.
SONNET_4_5: dict[str, Any] = {
    "cache_creation_input_token_cost": 3.75e-06,
    "cache_creation_input_token_cost_above_1hr": 6e-06,
    "cache_creation_input_token_cost_above_200k_tokens": 7.5e-06,
    "cache_read_input_token_cost": 3e-07,
    "cache_read_input_token_cost_above_200k_tokens": 6e-07,
    "input_cost_per_token": 3e-06,
    "input_cost_per_token_above_200k_tokens": 6e-06,
    "output_cost_per_token": 1.5e-05,
    "output_cost_per_token_above_200k_tokens": 2.25e-05,
    "search_context_cost_per_query": {"search_context_size_high": 0.03, "low": 0.01},
}
GPT_5_4: dict[str, Any] = {
    "cache_read_input_token_cost": 2.5e-07,
    "cache_read_input_token_cost_above_272k_tokens": 5e-07,
    "cache_read_input_token_cost_priority": 5e-07,
    "input_cost_per_token": 2.5e-06,
    "input_cost_per_token_above_272k_tokens": 5e-06,
    "input_cost_per_token_above_272k_tokens_batches": 1e-06,
    "input_cost_per_token_above_272k_tokens_flex": 2.5e-06,
    "input_cost_per_token_flex": 1.25e-06,
    "input_cost_per_token_priority": 5e-06,
    "input_cost_per_token_balanced": None,
    "output_cost_per_reasoning_token": 1e-06,
    "output_cost_per_token": 1.5e-05,
    "output_cost_per_token_above_272k_tokens": 2.25e-05,
    "output_cost_per_token_flex": 7.5e-06,
    "output_cost_per_token_priority": 3e-05,
}


def test_classes_without_a_price_cost_what_they_are_a_kind_of() -> None:
    prices = prices_of(input_cost_per_token=1e-06, output_cost_per_token="2e-6")
    assert (
        cost(
            prices,
            input_tokens=10,
            cached_input_tokens=1,
            cache_creation_tokens=2,
            cache_creation_1h_tokens=1,
            audio_input_tokens=1,
            image_input_tokens=1,
            output_tokens=10,
            reasoning_tokens=1,
            audio_output_tokens=1,
            image_output_tokens=1,
        )
        == 10 * 10**6 + 10 * 2 * 10**6
    )


def test_each_class_has_its_own_price() -> None:
    prices = prices_of(
        input_cost_per_token=1e-12,
        cache_read_input_token_cost=2e-12,
        cache_creation_input_token_cost=3e-12,
        cache_creation_input_token_cost_above_1hr=4e-12,
        input_cost_per_audio_token=5e-12,
        input_cost_per_image_token=6e-12,
        output_cost_per_token=7e-12,
        output_cost_per_reasoning_token=8e-12,
        output_cost_per_audio_token=9e-12,
        output_cost_per_image_token=10e-12,
    )
    assert [prices.tokens[name] for name in TokenClass] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert (
        cost(
            prices,
            input_tokens=1000,
            cached_input_tokens=100,
            cache_creation_tokens=200,
            cache_creation_1h_tokens=50,
            output_tokens=100,
            reasoning_tokens=40,
        )
        == 700 + 100 * 2 + 150 * 3 + 50 * 4 + 60 * 7 + 40 * 8
    )


def test_a_long_prompt_is_dear_from_its_first_token() -> None:
    prices = prices_of(**SONNET_4_5)
    assert cost(prices, input_tokens=200_000, output_tokens=1) == 200_000 * 3_000_000 + 15_000_000
    assert cost(prices, input_tokens=200_001, output_tokens=1) == 200_001 * 6_000_000 + 22_500_000
    assert prices.at(200_001)[TokenClass.CACHED_INPUT] == 600_000
    assert prices.at(200_001)[TokenClass.CACHE_CREATION] == 7_500_000
    # The map gives no one-hour price above the threshold: the one below it stands.
    assert prices.at(200_001)[TokenClass.CACHE_CREATION_1H] == 6_000_000


def test_thresholds_overlay_each_other_in_rising_order() -> None:
    prices = prices_of(
        input_cost_per_token=1e-12,
        output_cost_per_token=1e-12,
        input_cost_per_token_above_128k_tokens=2e-12,
        output_cost_per_token_above_1000000_tokens=3e-12,
        cache_creation_input_token_cost_above_1hr_above_128k_tokens=4e-12,
    )
    assert [tier.above_tokens for tier in prices.tiers] == [128_000, 1_000_000]
    assert prices.at(1_000_001)[TokenClass.INPUT] == 2
    assert prices.at(1_000_001)[TokenClass.OUTPUT] == 3
    assert prices.at(128_001)[TokenClass.CACHE_CREATION_1H] == 4


def test_xai_bills_the_upper_tier_from_the_threshold_on() -> None:
    info = {
        "litellm_provider": "xai",
        "input_cost_per_token": 1e-12,
        "input_cost_per_token_above_128k_tokens": 2e-12,
    }
    prices = prices_of(**info)
    assert prices.at(127_999)[TokenClass.INPUT] == 1
    assert prices.at(128_000)[TokenClass.INPUT] == 2


def test_fireworks_sells_cache_reads_at_half_price() -> None:
    info = {"litellm_provider": "fireworks_ai", "input_cost_per_token": 3e-12}
    assert prices_of(**info).tokens[TokenClass.CACHED_INPUT] == 2
    named = prices_of(**info, cache_read_input_token_cost=0)
    assert named.tokens[TokenClass.CACHED_INPUT] == 0
    unpriced = prices_of(litellm_provider="fireworks_ai", output_cost_per_token=1e-12)
    assert TokenClass.CACHED_INPUT not in unpriced.tokens


def test_service_tiers_have_prices_of_their_own() -> None:
    prices = prices_of(**GPT_5_4)
    assert sorted(prices.service_tiers) == ["fast", "flex", "priority"]
    flex, priority = prices.for_service_tier("Flex"), prices.for_service_tier("priority")
    assert prices.for_service_tier("fast") == priority
    assert prices.for_service_tier(None) is prices.for_service_tier("auto") is prices
    assert flex.at(1)[TokenClass.INPUT] == 1_250_000
    assert flex.at(1)[TokenClass.CACHED_INPUT] == 250_000
    assert flex.at(300_000)[TokenClass.INPUT] == 2_500_000
    # What the service tier has no price for is at the standard price.
    assert priority.at(300_000)[TokenClass.INPUT] == 5_000_000
    # Its own output price goes before the standard price of reasoning.
    assert prices.tokens[TokenClass.REASONING] == 1_000_000
    assert priority.tokens[TokenClass.REASONING] == 30_000_000
    own = prices_of(**GPT_5_4, output_cost_per_reasoning_token_priority=2e-06)
    assert own.for_service_tier("priority").tokens[TokenClass.REASONING] == 2_000_000


def test_ranges_price_the_whole_request() -> None:
    prices = prices_of(
        # LiteLLM fills these in where the map has ranges only.
        input_cost_per_token=0,
        output_cost_per_token=9e-12,
        input_cost_per_audio_token=8e-12,
        cache_read_input_token_cost=7e-12,
        tiered_pricing=[
            {"range": [256000.0, 1000000.0], "input_cost_per_token": 3e-12},
            {
                "range": [0, 256000.0],
                "input_cost_per_token": 1e-12,
                "output_cost_per_token": 2e-12,
            },
            {"range": [5, 6], "input_cost_per_query": 1},
            "garbage",
        ],
    )
    for input_tokens in (0, 1, 256_000):
        assert prices.at(input_tokens)[TokenClass.INPUT] == 1
        assert prices.at(input_tokens)[TokenClass.OUTPUT] == 2
    for input_tokens in (256_001, 2_000_000):
        assert prices.at(input_tokens)[TokenClass.INPUT] == 3
        assert prices.at(input_tokens)[TokenClass.CACHED_INPUT] == 3
        assert prices.at(input_tokens)[TokenClass.AUDIO_INPUT] == 8
        assert prices.at(input_tokens)[TokenClass.OUTPUT] == 9


def test_an_image_model_without_a_text_price_writes_image_tokens() -> None:
    prices = prices_of(output_cost_per_token=0, output_cost_per_image_token=3e-05)
    assert cost(prices, output_tokens=2) == 60_000_000


def test_pictures_are_paid_by_piece_unless_they_came_as_tokens() -> None:
    by_piece = prices_of(output_cost_per_image=0.04)
    assert cost(by_piece, images=2) == 80_000_000_000
    both = prices_of(output_cost_per_image=0.04, output_cost_per_image_token=1e-12)
    assert cost(both, images=1, output_tokens=5, image_output_tokens=5) == 5
    assert cost(both, images=1, output_tokens=5) == 5
    by_token = prices_of(output_cost_per_token=1e-12)
    assert cost(by_token, images=1, output_tokens=5) == 5
    assert reason(by_token, images=1) == "no_price_for_image"


def test_tokens_of_the_prompt_do_not_pay_for_a_picture() -> None:
    info = {"input_cost_per_token": 1e-12, "output_cost_per_image_token": 1e-12}
    assert reason(prices_of(**info), images=1, input_tokens=3) == "no_price_for_image"
    both = prices_of(**info, output_cost_per_image=0.04)
    assert cost(both, images=1, input_tokens=3) == 40_000_000_003


def test_the_price_of_a_picture_is_the_one_that_litellm_takes() -> None:
    # Its default calculator takes the input price first; calculators of a provider never do.
    entry = {"input_cost_per_image": 0.011, "output_cost_per_image": 0.04}
    assert prices_of(**entry).units == {"image": 11_000_000_000}
    assert prices_of(**entry, litellm_provider="openai").units == {"image": 11_000_000_000}
    for provider in ("bedrock", "vertex_ai-image-models"):
        assert prices_of(**entry, litellm_provider=provider).units == {"image": 40_000_000_000}
    assert parse_model_prices({"input_cost_per_image": 1, "litellm_provider": "gemini"}) is None


def test_a_price_by_the_pixel_needs_a_size_and_is_not_rated() -> None:
    assert parse_model_prices({"input_cost_per_pixel": 1e-9}) is None
    zeros = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    assert parse_model_prices({**zeros, "input_cost_per_pixel": 1e-9}) is None
    tokens = prices_of(input_cost_per_token=1e-9, input_cost_per_pixel=1e-9)
    assert reason(tokens, images=1, input_tokens=1) == "no_price_for_image"


def test_free_text_beside_a_price_by_the_picture_makes_no_picture_free() -> None:
    prices = prices_of(input_cost_per_token=0, output_cost_per_token=0, output_cost_per_image=0.04)
    assert cost(prices, input_tokens=5, output_tokens=5) == 0
    assert cost(prices, images=1, input_tokens=5, output_tokens=9) == 40_000_000_000
    media = {"output_tokens": 9, "image_output_tokens": 9}
    assert cost(prices, images=1, **media) == 40_000_000_000
    assert reason(prices, **media) == "no_price_for_image_output"
    assert reason(prices, output_tokens=9, audio_output_tokens=9) == "no_price_for_audio_output"


def test_sound_is_paid_by_the_second_and_rounded_up_once() -> None:
    prices = prices_of(input_cost_per_second=7e-12)
    assert [cost(prices, audio_ms=ms) for ms in (0, 1, 142, 143, 1000, 12_345)] == [
        0, 1, 1, 2, 7, 87,
    ]  # fmt: skip
    # In LiteLLM's floats these are 0.0001 x 12.345 and a little more.
    assert cost(prices_of(input_cost_per_second=0.0001), audio_ms=12_345) == 1_234_500_000


@pytest.mark.parametrize(
    "made, heard, picos",
    [
        (2e-12, None, 2),
        (2e-12, 1e-12, 2),
        (0.0, 1e-12, 1),
        (None, 1e-12, 1),
        (0, None, 0),
        (0, 0, 0),
    ],
)
def test_a_second_has_one_price(made: float | None, heard: float | None, picos: int) -> None:
    prices = prices_of(output_cost_per_second=made, input_cost_per_second=heard)
    assert prices.units == {"second": picos}
    assert cost(prices, audio_ms=1000) == picos


def test_the_time_on_the_clock_does_not_pay_for_sound() -> None:
    info = {"input_cost_per_token": 0, "output_cost_per_token": 0, "cost_per_second": 0.1}
    assert parse_model_prices(info) is None


def test_a_transcription_is_paid_by_tokens_where_they_were_counted() -> None:
    prices = prices_of(
        input_cost_per_token=1e-12,
        input_cost_per_audio_token=2e-12,
        output_cost_per_token=3e-12,
        input_cost_per_second=1e-9,
    )
    counted = {"input_tokens": 10, "audio_input_tokens": 4, "output_tokens": 1}
    assert cost(prices, audio_ms=5000, **counted) == 6 + 4 * 2 + 3
    assert cost(prices, audio_ms=5000, input_tokens=10) == 10
    assert cost(prices, audio_ms=5000) == 5000
    by_token = prices_of(input_cost_per_token=1e-12, output_cost_per_token=3e-12)
    assert reason(by_token, audio_ms=5000) == "no_price_for_second"


def test_a_model_that_is_paid_by_the_second_is_not_free_because_tokens_were_counted() -> None:
    prices = prices_of(input_cost_per_token=0, output_cost_per_token=0, input_cost_per_second=1e-9)
    assert cost(prices, audio_ms=5000, input_tokens=10, output_tokens=3) == 5000
    assert reason(prices, input_tokens=10) == "no_price_for_input"


def test_speech_is_paid_by_the_character() -> None:
    prices = prices_of(input_cost_per_character=1.5e-05)
    assert cost(prices, input_characters=777) == 777 * 15_000_000
    # Counted otherwise it is the same text and the same sound.
    counted = {"input_tokens": 200, "output_tokens": 900, "audio_ms": 4000}
    assert cost(prices, input_characters=777, **counted) == 777 * 15_000_000


def test_characters_take_the_place_of_the_text_tokens_only() -> None:
    prices = prices_of(
        input_cost_per_token=5e-12, output_cost_per_token=7e-12, input_cost_per_character=2e-12
    )
    counted = {"input_tokens": 10, "cached_input_tokens": 4, "output_tokens": 3}
    assert cost(prices, input_characters=100, **counted) == 200 + 4 * 5 + 3 * 7
    assert cost(prices, **counted) == 10 * 5 + 3 * 7


def test_speech_without_a_price_by_the_character_is_paid_by_what_was_made() -> None:
    tokens = {"input_cost_per_token": 1e-12, "output_cost_per_audio_token": 4e-12}
    prices = prices_of(**tokens, output_cost_per_token=2e-12)
    made = {"output_tokens": 9, "audio_output_tokens": 9}
    assert cost(prices, input_characters=50, input_tokens=10, **made) == 10 + 9 * 4
    # LiteLLM takes the tokens of the text for all there is: a thousandth of the true cost.
    assert reason(prices, input_characters=50, input_tokens=10) == "no_price_for_input_character"
    assert reason(prices, input_characters=50, audio_ms=1000) == "no_price_for_input_character"
    by_length = prices_of(**tokens, output_cost_per_second=1e-9)
    assert cost(by_length, input_characters=50, audio_ms=2000) == 2000
    assert cost(by_length, input_characters=50, audio_ms=2000, input_tokens=10) == 2010
    assert reason(by_length, input_characters=50) == "no_price_for_input_character"


def test_characters_that_cost_nothing_are_free_unless_tokens_cost_something() -> None:
    free = prices_of(input_cost_per_character=0)
    assert cost(free, input_characters=50) == 0
    tokens = {"input_cost_per_token": 1e-12, "output_cost_per_token": 2e-12}
    prices = prices_of(**tokens, input_cost_per_character=0)
    assert cost(prices, input_characters=50, input_tokens=10, output_tokens=3) == 16


def test_a_reranking_is_paid_by_the_query() -> None:
    cohere = prices_of(
        input_cost_per_query=0.002, input_cost_per_token=0.0, output_cost_per_token=0.0
    )
    assert cost(cohere, queries=3) == 6_000_000_000
    assert cost(cohere, queries=1, input_tokens=500) == 2_000_000_000
    jina = prices_of(input_cost_per_token=5e-08, output_cost_per_token=0.0)
    assert cost(jina, queries=1, input_tokens=500) == 25_000_000
    assert reason(jina, queries=1) == "no_price_for_query"
    both = prices_of(input_cost_per_query=1e-9, input_cost_per_token=1e-12)
    assert cost(both, queries=2, input_tokens=5) == 2005


def test_free_tokens_make_no_unit_free() -> None:
    prices = prices_of(input_cost_per_token=0, output_cost_per_token=0)
    assert reason(prices, audio_ms=1, input_tokens=5) == "no_price_for_second"
    assert reason(prices, input_characters=1) == "no_price_for_input_character"
    assert reason(prices, queries=1) == "no_price_for_query"
    assert reason(prices, images=1, output_tokens=1) == "no_price_for_image"


@pytest.mark.parametrize(
    "info, free",
    [
        ({"input_cost_per_token": 0, "output_cost_per_token": 0.0}, True),
        ({"input_cost_per_token": "0", "input_cost_per_query": "0.0"}, True),
        ({"input_cost_per_second": 0}, True),
        ({"input_cost_per_token": 0, "max_tokens": 32_768, "cost_center": "x"}, True),
        ({"input_cost_per_token": 0, "ocr_cost_per_page": 0, "x_cost": None}, True),
        ({"input_cost_per_token": 0, "output_cost_per_token": 1e-12}, False),
        ({"input_cost_per_token": 0, "input_cost_per_token_above_200k_tokens": 1e-9}, False),
        ({"input_cost_per_token": 0, "output_cost_per_image": 0.01}, False),
        ({"input_cost_per_token": 0, "input_cost_per_token_priority": 1e-9}, False),
        ({"input_cost_per_token": 0, "ocr_cost_per_page": 0.001}, False),
        ({"input_cost_per_token": 0, "output_cost_per_video_per_second": "0.1"}, False),
        ({"input_cost_per_token": 0, "search_context_cost_per_query": {"low": 0.01}}, False),
    ],
)
def test_free_is_where_every_price_is_zero(info: dict[str, Any], *, free: bool) -> None:
    assert is_free(prices_of(**info)) is free


def test_nothing_priced_is_not_free() -> None:
    assert not is_free(ModelPrices({}))


def test_free_is_seen_in_the_prices_themselves() -> None:
    zero, one = {TokenClass.INPUT: 0}, {TokenClass.INPUT: 1}
    assert is_free(ModelPrices(zero, (PriceTier(5, zero),), units={"image": 0}))
    assert not is_free(ModelPrices(zero, (PriceTier(5, one),)))
    assert not is_free(ModelPrices(zero, units={"image": 1}))
    assert not is_free(ModelPrices(zero, search=1))
    assert not is_free(ModelPrices(zero, service_tiers={"priority": ModelPrices(one)}))
    assert not is_free(ModelPrices(zero, costs_something=True))


def test_tokens_pay_where_any_tier_has_a_price_for_them() -> None:
    prices = ModelPrices(
        {TokenClass.INPUT: 0},
        (PriceTier(5, {TokenClass.INPUT: 1}),),
        units={"second": 1_000},
    )
    assert cost(prices, audio_ms=1, input_tokens=6) == 6
    assert cost(prices, audio_ms=1) == 1


def test_explicit_zeros_are_free() -> None:
    assert cost(prices_of(input_cost_per_token=0.0, output_cost_per_token=0), input_tokens=9) == 0


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"mode": "chat", "max_tokens": 4096},
        {"input_cost_per_token": None, "output_cost_per_token": None},
        {"input_cost_per_token_flex": None, "tiered_pricing": [], "off_peak_pricing": {}},
    ],
)
def test_no_price_is_unpriced_and_not_free(info: dict[str, object]) -> None:
    assert parse_model_prices(info) is None


def test_zeros_beside_a_price_by_the_second_are_not_free() -> None:
    prices = prices_of(
        input_cost_per_token=0, output_cost_per_token=0, input_cost_per_second=0.0001
    )
    assert prices.units == {"second": 100_000_000}
    with pytest.raises(CostUnknownError) as caught:
        cost(prices, input_tokens=1)
    assert caught.value.reason == "no_price_for_input"


def test_tokens_of_an_unpriced_class_make_the_cost_unknown() -> None:
    prices = prices_of(input_cost_per_token=1e-06)
    assert cost(prices, input_tokens=1) == 1_000_000
    with pytest.raises(CostUnknownError) as caught:
        cost(prices, input_tokens=1, output_tokens=1)
    assert caught.value.reason == "no_price_for_output"


def test_a_sum_beyond_the_ledger_is_unknown() -> None:
    prices = ModelPrices({TokenClass.INPUT: MAX_AMOUNT})
    assert cost(prices, input_tokens=1) == MAX_AMOUNT
    with pytest.raises(CostUnknownError) as caught:
        cost(prices, input_tokens=2)
    assert caught.value.reason == "rated_cost_out_of_range"


@pytest.mark.parametrize(
    "price", [-1e-06, float("nan"), float("inf"), "free", True, [], {}, 1e300, "1e-999999999"]
)
def test_a_price_that_cannot_be_read_is_named(price: object) -> None:
    with pytest.raises(InvalidAmountError, match="output_cost_per_token"):
        parse_model_prices({"input_cost_per_token": 1e-06, "output_cost_per_token": price})


def test_finer_prices_are_rounded_up_to_a_pico() -> None:
    assert (
        prices_of(input_cost_per_token=2.4997000000000006e-07).tokens[TokenClass.INPUT] == 249_971
    )


def test_a_search_costs_what_the_dearest_does() -> None:
    assert prices_of(**SONNET_4_5).search == 30_000_000_000
    assert prices_of(**GPT_5_4).search == 0


def test_merging_takes_the_dearest_of_each_class_at_any_length() -> None:
    merged = merge_ceiling([prices_of(**SONNET_4_5), prices_of(**GPT_5_4)])
    assert merged is not None
    assert [tier.above_tokens for tier in merged.tiers] == [200_000, 272_000]
    for input_tokens, price in ((1, 3_000_000), (200_001, 6_000_000), (272_001, 6_000_000)):
        assert merged.at(input_tokens)[TokenClass.INPUT] == price
    assert merged.at(200_001)[TokenClass.OUTPUT] == 22_500_000
    assert merged.search == 30_000_000_000
    # Sonnet knows no priority: its standard price counts there too.
    priority = merged.for_service_tier("priority")
    assert priority.tokens[TokenClass.OUTPUT] == 30_000_000
    assert priority.tokens[TokenClass.CACHE_CREATION] == 5_000_000


def test_merging_with_an_unpriced_deployment_bounds_nothing() -> None:
    known = prices_of(input_cost_per_token=1e-06)
    assert merge_ceiling([]) is None
    assert merge_ceiling([known, None]) is None
    assert merge_ceiling([known]) == known
    other = prices_of(output_cost_per_token=1e-06, output_cost_per_image=0.04)
    merged = merge_ceiling([known, other])
    assert merged is not None
    assert merged.tokens == {}
    assert merged.units == {"image": 40_000_000_000}


def test_a_unit_that_deployments_sell_differently_is_disputed() -> None:
    by_character = {"input_cost_per_character": 3e-12}
    by_token = {"input_cost_per_token": 1e-12, "output_cost_per_token": 1e-12}
    speech = {"input_characters": 10, "input_tokens": 5, "output_tokens": 5}
    same = merge_ceiling([prices_of(**by_character), prices_of(input_cost_per_character=5e-12)])
    assert same is not None
    assert not same.disputed
    assert cost(same, **speech) == 50
    deployments: list[list[dict[str, Any]]] = [
        [by_character, by_token],
        [by_token | by_character, by_token],
        [by_token | by_character, by_character],
        [by_token | by_character, by_token | {"input_cost_per_character": 0}],
        [
            by_character | {"input_cost_per_token": 1e-12},
            by_character | {"output_cost_per_image_token": 1e-12},
        ],
    ]
    for infos in deployments:
        merged = merge_ceiling([prices_of(**info) for info in infos])
        assert merged is not None
        assert "input_character" in merged.disputed
        assert reason(merged, **speech) == "no_price_for_input_character"


def test_merging_keeps_what_makes_a_model_cost_something() -> None:
    free = prices_of(input_cost_per_token=0, output_cost_per_token=0)
    merged = merge_ceiling([free, free])
    assert merged is not None
    assert is_free(merged)
    merged = merge_ceiling([free, prices_of(input_cost_per_token=0, ocr_cost_per_page=1)])
    assert merged is not None
    assert not is_free(merged)
