"""Properties of prices, checked against exact fractions."""

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

from hypothesis import assume, given
from hypothesis import strategies as st

from pricing.agreement import agrees
from pricing.errors import CostUnknownError, InvalidAmountError, PricingError
from pricing.estimate import affordable_output_tokens, ceiling_cost, ceiling_price
from pricing.markup import Charge, byok_charge, charge
from pricing.money import (
    MAX_AMOUNT,
    credits_text,
    nanos_from_credits,
    nanos_from_usd,
    picos_from_usd,
    usd_text,
)
from pricing.price_book import Flat, Markup, PerToken, PriceBook, Rule, parse_price_book
from pricing.rating import ModelPrices, is_free, merge_ceiling, parse_model_prices, rate
from pricing.usage import (
    FALLBACK_CLASS,
    INPUT_CLASSES,
    OUTPUT_CLASSES,
    UNIT_COUNTS,
    TokenClass,
    Usage,
)

NANOS = st.integers(0, MAX_AMOUNT)
COSTS = st.integers(0, 10**15)
WORTHS = st.sampled_from([1, 7, 1000, 1_000_000, 3_000_000, 10**9])

UNITS = st.dictionaries(st.sampled_from(UNIT_COUNTS), st.integers(0, 10**5))


@st.composite
def usages(
    draw: st.DrawFn, most_in: int = 2_000_000, most_out: int = 200_000, *, units: bool = False
) -> Usage:
    whole_in, whole_out = draw(st.integers(0, most_in)), draw(st.integers(0, most_out))
    inputs, outputs = st.integers(0, whole_in), st.integers(0, whole_out)
    created = draw(inputs)
    return Usage(
        input_tokens=whole_in,
        cached_input_tokens=draw(inputs),
        cache_creation_tokens=created,
        cache_creation_1h_tokens=draw(st.integers(0, created)),
        audio_input_tokens=draw(inputs),
        image_input_tokens=draw(inputs),
        output_tokens=whole_out,
        reasoning_tokens=draw(outputs),
        audio_output_tokens=draw(outputs),
        image_output_tokens=draw(outputs),
        **(draw(UNITS) if units else {}),
    )


@st.composite
def terms(draw: st.DrawFn, least_factor: int) -> Markup | Flat | PerToken:
    amounts = st.integers(0, 10**12)
    classes = draw(st.dictionaries(st.sampled_from(TokenClass), amounts))
    return draw(
        st.one_of(
            st.builds(Markup, st.integers(least_factor, 10**9)),
            st.builds(Flat, amounts),
            st.builds(
                PerToken,
                st.just(
                    {TokenClass.INPUT: draw(amounts), TokenClass.OUTPUT: draw(amounts)} | classes
                ),
                st.integers(0, 10**7),
            ),
        )
    )


def rules(name: str = "r", least_factor: int = 1_000_000) -> st.SearchStrategy[Rule]:
    return st.builds(
        Rule,
        name=st.just(name),
        terms=terms(least_factor),
        minimum_nanocredits=st.integers(0, 10**10),
        allow_loss=st.booleans(),
        byok_fee_ppm=st.integers(0, 10**6),
    )


RULES = rules()


@st.composite
def infos(draw: st.DrawFn, *, by_token: bool = True) -> dict[str, Any]:
    """What LiteLLM tells of a model: some of its price fields, with thresholds and suffixes."""
    bases = [
        "input_cost_per_token",
        "cache_read_input_token_cost",
        "cache_creation_input_token_cost",
        "cache_creation_input_token_cost_above_1hr",
        "output_cost_per_token",
    ]
    others = [
        "input_cost_per_audio_token",
        "input_cost_per_image_token",
        "output_cost_per_reasoning_token",
        "output_cost_per_audio_token",
        "output_cost_per_image_token",
    ]
    endings = ["", "_above_128k_tokens", "_above_200k_tokens", "_priority"]
    units = [
        "input_cost_per_character",
        "input_cost_per_query",
        "input_cost_per_second",
        "output_cost_per_second",
        "output_cost_per_image",
    ]
    names = [f"{base}{ending}" for base in bases for ending in endings] + others
    names += [] if by_token else units
    price = st.floats(0, 1e-3) | st.integers(0, 0) | st.none()
    chosen = draw(st.dictionaries(st.sampled_from(names), price))
    required = {name: draw(st.floats(0, 1e-3)) for name in (bases[0], bases[-1])}
    # Some models are paid by the unit alone.
    return chosen | (required if by_token or draw(st.booleans()) else {})


@given(st.floats(0, 9e6))
def test_a_float_goes_to_picos_rounded_up_exactly(number: float) -> None:
    exact = Fraction(repr(number)) * 10**12
    assert picos_from_usd(repr(number)) == math.ceil(exact)


@given(st.decimals(0, 9_000_000, allow_nan=False, allow_infinity=False))
def test_decimals_and_their_texts_are_read_alike(number: Decimal) -> None:
    assume(len(str(number)) <= 64)
    assert picos_from_usd(number) == math.ceil(Fraction(number) * 10**12)
    assert picos_from_usd(str(number)) == picos_from_usd(number)


@given(st.text(max_size=80) | st.from_regex(r"[-+]?[0-9.]{1,40}([eE][-+]?[0-9]{1,12})?"))
def test_any_text_is_an_amount_or_refused(text: str) -> None:
    try:
        picos = picos_from_usd(text)
    except InvalidAmountError:
        return
    assert picos == math.ceil(Fraction(text) * 10**12)


@given(NANOS)
def test_dollar_texts_come_back(nanos: int) -> None:
    assert nanos_from_usd(usd_text(nanos)) == nanos
    assert Fraction(usd_text(-nanos)) == Fraction(-nanos, 10**9)


@given(st.integers(-MAX_AMOUNT, MAX_AMOUNT), st.integers(1, 10**12))
def test_credit_texts_are_exact_or_barely_below(nanos: int, worth: int) -> None:
    difference = Fraction(nanos, worth) - Fraction(credits_text(nanos, worth))
    assert 0 <= difference < Fraction(1, 10**12)


@given(st.integers(0, 10**15), st.sampled_from([1, 1000, 1_000_000, 10**9, 2**10]))
def test_credit_texts_come_back(nanos: int, worth: int) -> None:
    assert nanos_from_credits(credits_text(nanos, worth), worth) == nanos


@given(usages(units=True))
def test_usage_survives_storage_and_its_classes_add_up(usage: Usage) -> None:
    assert Usage.from_dict(usage.as_dict()) == usage
    tokens = usage.by_class()
    assert sum(tokens.get(name, 0) for name in INPUT_CLASSES) == usage.input_tokens
    assert sum(tokens.get(name, 0) for name in OUTPUT_CLASSES) == usage.output_tokens
    assert all(count > 0 for count in tokens.values())


COUNTS = st.integers(0, 10**7)


@given(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_clamping_always_gives_a_usage(whole: int, a: int, b: int, c: int, d: int) -> None:
    usage = Usage.clamped(
        input_tokens=whole, cached_input_tokens=a, cache_creation_tokens=b,
        cache_creation_1h_tokens=c, reasoning_tokens=d,
    )  # fmt: skip
    assert usage.input_tokens == whole
    assert usage.reasoning_tokens == 0


def exact_nanos(rule: Rule, cost_picos: int, usage: Usage, worth: int) -> Fraction:
    """What the rule says, in fractions, written independently of the code under test."""
    match rule.terms:
        case Markup(factor_ppm):
            price = Fraction(cost_picos, 1000) * Fraction(factor_ppm, 10**6)
        case Flat(nanocredits):
            price = Fraction(nanocredits, 10**9) * worth
        case PerToken(rates, multiplier_ppm):
            price = Fraction(0)
            for token_class, count in usage.by_class().items():
                name = token_class
                while name not in rates:
                    name = FALLBACK_CLASS[name]
                price += Fraction(rates[name], 10**9) * count / 1000
            price *= Fraction(multiplier_ppm, 10**6) * worth
    price = max(price, Fraction(rule.minimum_nanocredits, 10**9) * worth)
    return price if rule.allow_loss else max(price, Fraction(cost_picos, 1000))


def check_sum(sold: Charge) -> None:
    attos = sum(line.attos for line in sold.lines)
    assert attos + sold.rounding_attos == sold.price_nanos * 10**9
    assert 0 <= sold.rounding_attos < 10**9
    assert all(line.attos >= 0 for line in sold.lines)


@given(RULES, COSTS, usages(), WORTHS)
def test_a_price_is_the_exact_price_rounded_up_once(
    rule: Rule, cost_picos: int, usage: Usage, worth: int
) -> None:
    sold = charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=worth)
    assert sold.price_nanos == math.ceil(exact_nanos(rule, cost_picos, usage, worth))
    check_sum(sold)
    assert sold == charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=worth)


@given(RULES, COSTS, usages(), WORTHS)
def test_a_price_is_never_below_the_cost(
    rule: Rule, cost_picos: int, usage: Usage, worth: int
) -> None:
    assume(not rule.allow_loss)
    sold = charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=worth)
    assert sold.price_nanos * 1000 >= cost_picos


@given(RULES, st.none() | COSTS, st.none() | usages(), WORTHS)
def test_what_is_unknown_raises_and_is_never_sold_for_nothing(
    rule: Rule, cost_picos: int | None, usage: Usage | None, worth: int
) -> None:
    needs_cost = isinstance(rule.terms, Markup) or not rule.allow_loss
    unknown = (cost_picos is None and needs_cost) or (
        usage is None and isinstance(rule.terms, PerToken)
    )
    try:
        charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=worth)
    except PricingError:
        assert unknown
    else:
        assert not unknown


@given(RULES, COSTS, WORTHS)
def test_a_byok_fee_is_its_share_of_the_cost_rounded_up(
    rule: Rule, cost_picos: int, worth: int
) -> None:
    fee = byok_charge(rule, cost_picos=cost_picos, nanos_per_credit=worth)
    assert fee.price_nanos == math.ceil(Fraction(cost_picos * rule.byok_fee_ppm, 10**9))
    check_sum(fee)


def prices_of(info: dict[str, Any]) -> ModelPrices:
    prices = parse_model_prices(info)
    assert prices is not None
    return prices


@given(infos(), usages())
def test_a_rated_cost_lies_between_all_tokens_at_the_cheapest_and_the_dearest(
    info: dict[str, Any], usage: Usage
) -> None:
    prices = prices_of(info)
    table = prices.at(usage.input_tokens)
    assert table.keys() == set(TokenClass)
    cost_picos = rate(prices, usage)
    bounds = [
        usage.input_tokens * pick(table[name] for name in INPUT_CLASSES)
        + usage.output_tokens * pick(table[name] for name in OUTPUT_CLASSES)
        for pick in (min, max)
    ]
    assert bounds[0] <= cost_picos <= bounds[1]


@given(infos(), RULES, usages(), st.data(), WORTHS)
def test_no_price_within_the_limits_is_above_the_ceiling(
    info: dict[str, Any], rule: Rule, usage: Usage, data: st.DataObject, worth: int
) -> None:
    prices = prices_of(info)
    input_limit = data.draw(st.integers(usage.input_tokens, 3_000_000))
    output_limit = data.draw(st.integers(usage.output_tokens, 300_000))
    cost_picos = rate(prices, usage)
    most_picos = ceiling_cost(prices, input_limit, output_limit)
    assert most_picos is not None
    assert cost_picos <= most_picos
    sold = charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=worth)
    most_nanos = ceiling_price(
        rule, prices, input_limit, output_limit, nanos_per_credit=worth, default_hold_nanos=0
    )
    assert sold.price_nanos <= most_nanos


def rated(prices: ModelPrices, usage: Usage) -> int | None:
    try:
        return rate(prices, usage)
    except CostUnknownError:
        return None


def parsed(info: dict[str, Any]) -> ModelPrices:
    """Read the prices; a model without any is of no interest here."""
    prices = parse_model_prices(info)
    assume(prices is not None)
    assert prices is not None
    return prices


@given(infos(by_token=False), usages(units=True), st.data(), st.sampled_from([None, "priority"]))
def test_no_cost_within_the_limits_is_above_the_ceiling_with_units(
    info: dict[str, Any], usage: Usage, data: st.DataObject, service_tier: str | None
) -> None:
    prices = parsed(info)
    input_limit = data.draw(st.integers(usage.input_tokens, 3_000_000))
    output_limit = data.draw(st.integers(usage.output_tokens, 300_000))
    units = {
        name: used + data.draw(st.integers(0, 10))
        for name in UNIT_COUNTS
        if (used := getattr(usage, name)) or data.draw(st.booleans())
    }
    most_picos = ceiling_cost(
        prices, input_limit, output_limit, units=units, service_tier=service_tier
    )
    # Asked for another service tier, it may be served as the standard one all the same.
    for served in (prices, prices.for_service_tier(service_tier)):
        cost_picos = rated(served, usage)
        assume(cost_picos is not None)
        assert most_picos is None or cost_picos is None or cost_picos <= most_picos


@given(infos(by_token=False), usages(units=True))
def test_nothing_is_free_where_every_price_is_above_zero(
    info: dict[str, Any], usage: Usage
) -> None:
    prices = parsed({name: price for name, price in info.items() if price})
    assert not is_free(prices)
    is_used = usage.total_tokens or usage.has_units
    assert rated(prices, usage) != 0 or not is_used


@given(infos(by_token=False), usages(units=True))
def test_what_is_free_never_costs_anything(info: dict[str, Any], usage: Usage) -> None:
    prices = parsed({name: price and 0 for name, price in info.items()})
    assert is_free(prices)
    assert rated(prices, usage) in {0, None}


@given(
    RULES,
    st.none() | st.integers(1, 10**15),
    st.dictionaries(st.sampled_from(UNIT_COUNTS), st.integers(1, 10**5), min_size=1),
    WORTHS,
)
def test_no_rule_gives_units_away(
    rule: Rule, cost_picos: int | None, units: dict[str, int], worth: int
) -> None:
    usage = Usage(**units)
    try:
        sold = charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=worth)
    except PricingError:
        return
    is_flat_zero = isinstance(rule.terms, Flat) and rule.allow_loss
    assert sold.price_nanos > 0 or is_flat_zero
    assert rule.allow_loss or (cost_picos is not None and sold.price_nanos * 1000 >= cost_picos)


@given(infos(), RULES, st.integers(0, 10**6), st.integers(1, 8), st.integers(-1, 10**13))
def test_the_affordable_limit_fits_and_one_more_does_not(
    info: dict[str, Any], rule: Rule, input_tokens: int, n: int, available: int
) -> None:
    prices = prices_of(info)
    worth, most = 1_000_000, 200_000
    limit = affordable_output_tokens(
        rule,
        prices,
        input_tokens,
        n,
        available_nanos=available,
        nanos_per_credit=worth,
        max_output_tokens=most,
    )

    def fits(tokens: int) -> bool:
        ceiling = ceiling_price(
            rule, prices, input_tokens, n * tokens, nanos_per_credit=worth, default_hold_nanos=0
        )
        return ceiling <= available

    assert limit == 0 or fits(limit)
    assert limit == most or not fits(limit + 1)


@given(st.lists(infos(), min_size=1, max_size=3), usages(), st.sampled_from([None, "priority"]))
def test_merged_prices_are_nowhere_below_a_deployment(
    deployments: list[dict[str, Any]], usage: Usage, service_tier: str | None
) -> None:
    all_prices = [prices_of(info) for info in deployments]
    merged = merge_ceiling(all_prices)
    assert merged is not None
    dearest = rate(merged.for_service_tier(service_tier), usage)
    assert all(rate(one.for_service_tier(service_tier), usage) <= dearest for one in all_prices)


@given(
    st.lists(infos(by_token=False), min_size=1, max_size=3),
    usages(units=True),
    st.sampled_from([None, "priority"]),
)
def test_merged_prices_are_unknown_or_nowhere_below_a_deployment_with_units(
    deployments: list[dict[str, Any]], usage: Usage, service_tier: str | None
) -> None:
    all_prices = [parsed(info) for info in deployments]
    merged = merge_ceiling(all_prices)
    assert merged is not None
    dearest = rated(merged.for_service_tier(service_tier), usage)
    assume(dearest is not None)
    assert dearest is not None
    for one in all_prices:
        cost_picos = rated(one.for_service_tier(service_tier), usage)
        assert cost_picos is not None
        assert cost_picos <= dearest


ACCOUNTS = [str(UUID(int=1)), str(UUID(int=2))]
PATTERN = st.text("ab*?[]!-", min_size=1, max_size=6)


AMOUNTS = st.integers(0, 10**13)


@given(AMOUNTS, AMOUNTS | st.integers(-2_000, 2_000), st.integers(0, 10**6))
def test_agreement_is_symmetric_exact_and_grows_with_the_tolerance(
    one: int, other: int, tolerance_ppm: int
) -> None:
    other = abs(other)
    agreed = agrees(one, other, tolerance_ppm)
    assert agreed == agrees(other, one, tolerance_ppm)
    apart = Fraction(abs(one - other), max(one, other, 1))
    assert agreed == (abs(one - other) <= 1000 or apart <= Fraction(tolerance_ppm, 10**6))
    assert not agreed or agrees(one, other, tolerance_ppm + 1)


@st.composite
def books(draw: st.DrawFn) -> PriceBook:
    selectors = st.fixed_dictionaries(
        {},
        optional={
            "account": st.sampled_from(ACCOUNTS),
            "tier": st.sampled_from(["free", "pro"]),
            "model": PATTERN,
        },
    ).filter(bool)
    unique = st.lists(selectors, max_size=8, unique_by=lambda s: tuple(sorted(s.items())))
    rules = [{**entry, "kind": "flat", "credits": "1"} for entry in draw(unique)]
    return parse_price_book({"rules": rules})


@given(
    books(), st.sampled_from(ACCOUNTS), st.sampled_from(["free", "pro"]), st.text("ab", max_size=4)
)
def test_selection_is_deterministic_and_most_specific(
    book: PriceBook, account: str, tier: str, model: str
) -> None:
    chosen = book.select(account, tier, model)
    assert book.rule(chosen.name) is chosen
    again = parse_price_book(book.canonical_document())
    assert again.select(account, tier, model) == chosen
    # A rule for this account is never passed over for one that is for any account.
    fitting = [
        rule
        for rule in book.rules
        if rule.account in {None, account} and rule.tier in {None, tier}
        and rule.model in {None, model}
    ]  # fmt: skip
    rank = (chosen.account is not None, chosen.tier is not None)
    for rule in fitting:
        assert (rule.account is not None, rule.tier is not None) <= rank
    exact = [rule for rule in fitting if rule.model == model]
    if any((rule.account, rule.tier) == (chosen.account, chosen.tier) for rule in exact):
        assert chosen.model == model


@given(rules(name="default", least_factor=0))
def test_price_books_come_back_from_their_documents(
    default: Rule,
) -> None:
    book = PriceBook(default)
    sells_below_cost = isinstance(default.terms, Markup) and default.terms.factor_ppm < 10**6
    try:
        again = parse_price_book(book.canonical_document())
    except PricingError:
        assert sells_below_cost
        assert not default.allow_loss
    else:
        assert again == book
        assert again.canonical_document() == book.canonical_document()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
RULE_LIKE = st.dictionaries(
    st.sampled_from(
        ["kind", "factor", "credits", "model", "tier", "account", "minimum", "allow_loss"]
    ),
    st.sampled_from(["markup", "flat", "per_token", "2", "*"]) | JSON,
)


@given(st.fixed_dictionaries({"default": RULE_LIKE, "rules": st.lists(RULE_LIKE), "actions": JSON}))
def test_any_document_is_a_book_or_refused(document: dict[str, Any]) -> None:
    try:
        book = parse_price_book(document)
    except PricingError:
        return
    assert parse_price_book(book.canonical_document()) == book


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "input_cost_per_token",
                "tiered_pricing",
                "output_cost_per_image",
                "search_context_cost_per_query",
                "input_cost_per_token_above_128k_tokens",
            ]
        ),
        JSON,
    )
)
def test_any_model_info_is_read_or_refused(info: dict[str, Any]) -> None:
    try:
        prices = parse_model_prices(info)
        cost_picos = 0 if prices is None else rate(prices, Usage(input_tokens=1, output_tokens=1))
        assert prices is None or is_free(prices) in {True, False}
    except (InvalidAmountError, CostUnknownError):
        return
    assert cost_picos >= 0
