"""The most that a request can cost before it is sent: what its hold has to cover.

A ceiling is an upper bound, not a guess: no price that `charge` can give a request within the
limits is above it, as long as the provider keeps to its price list. Input tokens are bounded by
the bytes of the prompt (a token is at least one byte), output tokens by the limit that is sent,
units by what was asked for. `units` are counts by their name in `Usage`: "images",
"input_characters", "audio_ms", "queries". With a `service_tier` the dearer of its prices and the
standard ones counts, because the provider may serve another tier than was asked for.
"""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from pricing.errors import CostUnknownError, InvalidAmountError, PricingError
from pricing.markup import charge, price_tokens
from pricing.money import MAX_AMOUNT
from pricing.price_book import Markup, PerToken, Rule
from pricing.rating import UNIT_OF, ModelPrices, rate, unit_picos
from pricing.usage import INPUT_CLASSES, OUTPUT_CLASSES, TokenClass, Usage

ALL_CLASSES = frozenset(TokenClass)
NO_UNITS: Mapping[str, int] = MappingProxyType({})

# What is made of a prompt is paid by output tokens where it is not paid by the unit.
_MADE = frozenset({"images", "input_characters"})

# What `affordable_output_tokens` answers where output costs nothing and no limit is given.
MAX_OUTPUT_TOKENS = 10**9


@lru_cache
def possible_classes(
    *, audio: bool = True, images: bool = True, one_hour_cache: bool = True
) -> frozenset[TokenClass]:
    """Return the classes that a request's tokens can fall into.

    Audio and image tokens are dear, and a request without audio and images has none of them.
    """
    impossible: set[TokenClass] = set()
    if not audio:
        impossible |= {TokenClass.AUDIO_INPUT, TokenClass.AUDIO_OUTPUT}
    if not images:
        impossible |= {TokenClass.IMAGE_INPUT, TokenClass.IMAGE_OUTPUT}
    if not one_hour_cache:
        impossible.add(TokenClass.CACHE_CREATION_1H)
    return ALL_CLASSES - impossible


def ceiling_cost(
    prices: ModelPrices | None,
    input_tokens: int,
    output_tokens: int,
    *,
    classes: frozenset[TokenClass] = ALL_CLASSES,
    searches: int = 0,
    units: Mapping[str, int] = NO_UNITS,
    service_tier: str | None = None,
) -> int | None:
    """Return the most that so much can cost, in picos; None where a price is missing.

    Every token is taken at the dearest price of its side, in the dearest tier that a prompt of
    up to so many tokens can reach: a lower tier is not always the cheaper one. Where a model
    sells the same thing by the token and by the unit, both count: nobody knows yet which it is.
    """
    if prices is None:
        return None
    cost_picos = _ceiling_of_tier(
        prices, input_tokens, output_tokens, classes, searches=searches, units=units
    )
    served = prices.for_service_tier(service_tier)
    if served is prices or cost_picos is None:
        return cost_picos
    other = _ceiling_of_tier(
        served, input_tokens, output_tokens, classes, searches=searches, units=units
    )
    return None if other is None else max(cost_picos, other)


def ceiling_price(
    rule: Rule,
    prices: ModelPrices | None,
    input_tokens: int,
    output_tokens: int,
    *,
    nanos_per_credit: int,
    default_hold_nanos: int,
    classes: frozenset[TokenClass] = ALL_CLASSES,
    searches: int = 0,
    units: Mapping[str, int] = NO_UNITS,
    service_tier: str | None = None,
) -> int:
    """Return the most that so many tokens can be sold for, in nanos, and at most MAX_AMOUNT.

    Where the price depends on a cost that nothing bounds it is `default_hold_nanos`, or what the
    rule takes in any case if that is more.
    """
    cost_picos = ceiling_cost(
        prices,
        input_tokens,
        output_tokens,
        classes=classes,
        searches=searches,
        units=units,
        service_tier=service_tier,
    )
    tokens = _dearest_tokens(rule, input_tokens, output_tokens, classes)
    try:
        price_nanos = price_tokens(rule, cost_picos or 0, tokens, nanos_per_credit).price_nanos
    except InvalidAmountError:
        # Beyond what the ledger can hold: `charge` refuses it as well.
        return MAX_AMOUNT
    depends_on_cost = isinstance(rule.terms, Markup) or not rule.allow_loss
    if cost_picos is None and depends_on_cost:
        return max(price_nanos, default_hold_nanos)
    return price_nanos


def affordable_output_tokens(  # noqa: PLR0917 - they stand in the order of `ceiling_price`
    rule: Rule,
    prices: ModelPrices | None,
    input_tokens: int,
    n: int,
    available_nanos: int,
    nanos_per_credit: int,
    *,
    max_output_tokens: int = MAX_OUTPUT_TOKENS,
    classes: frozenset[TokenClass] = ALL_CLASSES,
    searches: int = 0,
    units: Mapping[str, int] = NO_UNITS,
    service_tier: str | None = None,
) -> int:
    """Return the largest output limit for each of `n` choices whose ceiling price is available.

    0 where not one token is affordable, or where nothing bounds the cost; at most
    `max_output_tokens`, which is the answer where output is free.
    """

    def is_affordable(limit: int) -> bool:
        price_nanos = ceiling_price(
            rule,
            prices,
            input_tokens,
            n * limit,
            nanos_per_credit=nanos_per_credit,
            # Never affordable: no limit on the output bounds an unknown price.
            default_hold_nanos=MAX_AMOUNT,
            classes=classes,
            searches=searches,
            units=units,
            service_tier=service_tier,
        )
        return price_nanos <= min(available_nanos, MAX_AMOUNT - 1)

    # The ceiling never falls as the output grows: the last affordable limit is found by halves.
    affordable, beyond = 0, max_output_tokens + 1
    while beyond - affordable > 1:
        middle = (affordable + beyond) // 2
        if is_affordable(middle):
            affordable = middle
        else:
            beyond = middle
    return affordable


def likely_price(
    rule: Rule,
    prices: ModelPrices | None,
    usage: Usage,
    *,
    nanos_per_credit: int,
    service_tier: str | None = None,
) -> int | None:
    """Return what a usage would be sold for, in nanos: an estimate, which nothing is held for.

    None where that is not known: no price for what is used, and a rule that needs the cost.
    """
    cost_picos: int | None = None
    try:
        if prices is not None:
            cost_picos = rate(prices.for_service_tier(service_tier), usage)
    except CostUnknownError:
        pass  # a rule that may lose has a price all the same
    try:
        sold = charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=nanos_per_credit)
    except PricingError:
        return None
    return sold.price_nanos


@lru_cache
def _sides(classes: frozenset[TokenClass]) -> tuple[frozenset[TokenClass], frozenset[TokenClass]]:
    return classes & INPUT_CLASSES, classes & OUTPUT_CLASSES


def _ceiling_of_tier(
    prices: ModelPrices,
    input_tokens: int,
    output_tokens: int,
    classes: frozenset[TokenClass],
    *,
    searches: int,
    units: Mapping[str, int],
) -> int | None:
    """Bound what so much costs by one service tier's prices; None where a price is missing."""
    cost_picos = _ceiling_of_units(prices, input_tokens, output_tokens, units) if units else 0
    if cost_picos is None:
        return None
    cost_picos += searches * prices.search
    inputs, outputs = _sides(classes)
    for tokens, side in ((input_tokens, inputs), (output_tokens, outputs)):
        dearest = prices.dearest(side, input_tokens)
        if dearest is not None:
            cost_picos += tokens * dearest
        elif tokens and not _is_bought_by_unit(prices, units):
            return None
    return cost_picos


def _ceiling_of_units(
    prices: ModelPrices, input_tokens: int, output_tokens: int, units: Mapping[str, int]
) -> int | None:
    """Bound what is bought by the unit; None where neither a unit's price nor tokens bound it."""
    cost_picos = 0
    for name, count in units.items():
        unit = UNIT_OF[name]
        if not count:
            continue
        if unit in prices.disputed:
            return None
        picos = unit_picos(prices, unit, count)
        # Without a price of its own it is paid by tokens, if those are bounded, or by the length
        # of the speech.
        tokens = output_tokens if name in _MADE else input_tokens
        is_paid = (tokens and prices.buys_tokens) or (
            name == "input_characters" and units.get("audio_ms") and "second" in prices.units
        )
        if picos is None and not is_paid:
            return None
        cost_picos += picos or 0
    return cost_picos


def _is_bought_by_unit(prices: ModelPrices, units: Mapping[str, int]) -> bool:
    """Whether units pay for everything, so that tokens without a price do not matter."""
    return not prices.tokens and any(
        count and UNIT_OF[name] in prices.units for name, count in units.items()
    )


def _dearest_tokens(
    rule: Rule, input_tokens: int, output_tokens: int, classes: frozenset[TokenClass]
) -> Mapping[TokenClass, int]:
    """Put all tokens of each side into the class that the rule sells dearest."""
    terms = rule.terms
    if not isinstance(terms, PerToken):
        return {}
    return {
        max(sorted(INPUT_CLASSES & classes), key=terms.nanocredits_of): input_tokens,
        max(sorted(OUTPUT_CLASSES & classes), key=terms.nanocredits_of): output_tokens,
    }
