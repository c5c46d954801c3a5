"""From LiteLLM's price map and a usage to the provider's cost.

This is the third source of a cost, after the header and the stream's `usage.cost`, and the one
that both are compared with. It follows LiteLLM 1.106 (`llm_cost_calc/utils.py`) with three
deliberate differences. Prices are integers of picos per token, a finer float rounded up. A class
that has tokens and no price makes the cost unknown, where LiteLLM takes 0. And `off_peak_pricing`
is left out, which is a question of the clock: the standard price stands, which is the dearer one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar, cast

from pricing.errors import CostUnknownError, InvalidAmountError
from pricing.money import MAX_AMOUNT, ceil_div, picos_from_usd, scale_exactly
from pricing.usage import FALLBACK_CLASS, TokenClass, Usage

_FIELDS: Mapping[TokenClass, str] = MappingProxyType(
    {
        TokenClass.INPUT: "input_cost_per_token",
        TokenClass.CACHED_INPUT: "cache_read_input_token_cost",
        TokenClass.CACHE_CREATION: "cache_creation_input_token_cost",
        TokenClass.CACHE_CREATION_1H: "cache_creation_input_token_cost_above_1hr",
        TokenClass.AUDIO_INPUT: "input_cost_per_audio_token",
        TokenClass.IMAGE_INPUT: "input_cost_per_image_token",
        TokenClass.OUTPUT: "output_cost_per_token",
        TokenClass.REASONING: "output_cost_per_reasoning_token",
        TokenClass.AUDIO_OUTPUT: "output_cost_per_audio_token",
        TokenClass.IMAGE_OUTPUT: "output_cost_per_image_token",
    }
)
# "input_cost_per_token_above_200k_tokens_priority": the field, the infix, its number, the suffix.
_THRESHOLD = re.compile(
    rf"(?:{'|'.join(_FIELDS.values())})(_above_([0-9]{{1,9}})(k?)_tokens)(_[a-z]+)?"
)

# What is bought otherwise than by the token, unit -> field. Only `image` can be rated from a
# usage; the others say that a token price of 0 beside them does not mean free.
_UNITS: Mapping[str, str] = MappingProxyType(
    {
        "image": "output_cost_per_image",
        "query": "input_cost_per_query",
        "second": "cost_per_second",
        "input_second": "input_cost_per_second",
        "output_second": "output_cost_per_second",
        "input_character": "input_cost_per_character",
        "output_character": "output_cost_per_character",
        "input_pixel": "input_cost_per_pixel",
        "output_pixel": "output_cost_per_pixel",
    }
)

# OpenAI's `service_tier` -> the suffix of LiteLLM's fields.
_SERVICE_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        "flex": "_flex",
        "balanced": "_balanced",
        "priority": "_priority",
        "fast": "_priority",
        "ultrafast": "_ultrafast",
    }
)

# What the ranges of `tiered_pricing` do not price themselves.
_OUTSIDE_RANGES = (
    TokenClass.OUTPUT,
    TokenClass.AUDIO_INPUT,
    TokenClass.IMAGE_INPUT,
    TokenClass.AUDIO_OUTPUT,
    TokenClass.IMAGE_OUTPUT,
)

# xAI bills the upper tier from the threshold on, everybody else above it.
_INCLUSIVE_PROVIDERS = frozenset({"xai"})

# Fireworks sells cache reads at half the input price wherever the map names no price for them.
_HALF_PRICE_CACHE_PROVIDER = "fireworks_ai"

ClassPrices = Mapping[TokenClass, int]
# What holds up to the first step, and what holds above so many input tokens.
_Table = tuple[ClassPrices, list[tuple[int, ClassPrices]]]
_Key = TypeVar("_Key", bound=str)


@dataclass(frozen=True, slots=True)
class PriceTier:
    """The prices of a whole request that has more than so many input tokens."""

    above_tokens: int
    prices: ClassPrices


@dataclass(frozen=True, slots=True)
class ModelPrices:
    """What a model's provider takes, in pico-USD.

    `tokens` are prices per token; a class that is not in it has no price. `tiers` stand in rising
    order. `units` are prices per image, second and so on; `search` is the dearest price of one
    web search. `service_tiers` are the prices of OpenAI's flex, priority and so on.
    """

    tokens: ClassPrices
    tiers: tuple[PriceTier, ...] = ()
    units: Mapping[str, int] = field(default_factory=dict[str, int])
    search: int = 0
    service_tiers: Mapping[str, "ModelPrices"] = field(default_factory=dict[str, "ModelPrices"])
    _dearest: dict[tuple[frozenset[TokenClass], int], int | None] = field(
        default_factory=dict[tuple[frozenset[TokenClass], int], int | None],
        init=False,
        repr=False,
        compare=False,
    )

    def dearest(self, classes: frozenset[TokenClass], input_tokens: int) -> int | None:
        """Return the highest price of these classes in any tier up to so many input tokens."""
        reached = sum(input_tokens > tier.above_tokens for tier in self.tiers)
        key = (classes, reached)
        if key not in self._dearest:  # asked before each request, with few different answers
            tables = [self.tokens, *(tier.prices for tier in self.tiers[:reached])]
            prices = [price for table in tables for n, price in table.items() if n in classes]
            self._dearest[key] = max(prices, default=None)
        return self._dearest[key]

    def at(self, input_tokens: int) -> ClassPrices:
        """Return the prices per token of a request with so many input tokens."""
        prices = self.tokens
        for tier in self.tiers:
            if input_tokens > tier.above_tokens:
                prices = tier.prices
        return prices

    def for_service_tier(self, service_tier: str | None) -> "ModelPrices":
        """Return the prices of a service tier; the standard ones where it has none."""
        return self.service_tiers.get((service_tier or "").lower(), self)


def parse_model_prices(info: Mapping[str, object]) -> ModelPrices | None:
    """Read LiteLLM's `model_info` of a model, or an entry of its price map.

    None means unpriced: no price is given. Explicit zeros are a price: the model is free.
    InvalidAmountError names the field where a price can't be read, and nothing of the model is
    used then: prices that are half understood would be worse than none.
    """
    standard = _parse_prices(info, "")
    service_tiers = {
        service_tier: _parse_prices(info, suffix)
        for service_tier, suffix in _SERVICE_SUFFIXES.items()
        if any(name.endswith(suffix) and info[name] is not None for name in info)
    }
    if not standard.tokens and not standard.units:
        return None
    return replace(standard, service_tiers=MappingProxyType(service_tiers))


def rate(prices: ModelPrices, usage: Usage) -> int:
    """Return what the provider takes for a usage, in picos.

    CostUnknownError where tokens or images were used that have no price, or where the sum is
    beyond what the ledger can hold.
    """
    tokens = usage.by_class()
    table = prices.at(usage.input_tokens)
    cost_picos = 0
    for token_class, count in tokens.items():
        if token_class not in table:
            raise CostUnknownError(f"no_price_for_{token_class.value}")
        cost_picos += count * table[token_class]
    # Pictures that came as tokens are paid as tokens.
    if usage.images and not usage.image_output_tokens:
        if "image" not in prices.units and not usage.output_tokens:
            raise CostUnknownError("no_price_for_image")
        cost_picos += usage.images * prices.units.get("image", 0)
    if cost_picos > MAX_AMOUNT:
        raise CostUnknownError("rated_cost_out_of_range")
    return cost_picos


def merge_ceiling(prices: Sequence[ModelPrices | None]) -> ModelPrices | None:
    """Return prices that are nowhere below those of any deployment behind one name.

    A class that one of them has no price for has none in the result, and where one deployment is
    unpriced altogether (or there is none) the result is None: nothing bounds it.
    """
    known = [deployment for deployment in prices if deployment is not None]
    if not known or len(known) < len(prices):
        return None
    names = sorted({name for deployment in known for name in deployment.service_tiers})
    service_tiers = {
        name: _merge([deployment.for_service_tier(name) for deployment in known]) for name in names
    }
    return replace(_merge(known), service_tiers=MappingProxyType(service_tiers))


def _merge(known: Sequence[ModelPrices]) -> ModelPrices:
    """Merge the prices of one service tier."""
    steps = sorted({tier.above_tokens for one in known for tier in one.tiers})
    units = sorted({unit for one in known for unit in one.units})
    return ModelPrices(
        _dearest(one.tokens for one in known),
        tuple(PriceTier(step, _dearest(one.at(step + 1) for one in known)) for step in steps),
        MappingProxyType({unit: max(one.units.get(unit, 0) for one in known) for unit in units}),
        max(one.search for one in known),
    )


def _dearest(tables: Iterable[ClassPrices]) -> ClassPrices:
    rows = list(tables)
    return MappingProxyType(
        {
            token_class: max(row[token_class] for row in rows)
            for token_class in TokenClass
            if all(token_class in row for row in rows)
        }
    )


def _parse_prices(info: Mapping[str, object], suffix: str) -> ModelPrices:
    """Read the prices of one service tier; the suffix is empty for the standard one."""
    units = _prices(info, _UNITS)
    searches = _object(info.get("search_context_cost_per_query"))
    search = max(_prices(searches, {size: size for size in searches}).values(), default=0)
    base, steps = _range_table(info) or _threshold_table(info, suffix)
    is_paid_otherwise = any(price for unit, price in units.items() if unit != "image")
    if is_paid_otherwise and not any(base.values()):
        # LiteLLM fills in zeros for the tokens of a model that is paid by the second, say.
        return ModelPrices(_resolved({}), (), units, search)
    tiers = tuple(PriceTier(above_tokens, _resolved(prices)) for above_tokens, prices in steps)
    return ModelPrices(_resolved(base), tiers, units, search)


def _threshold_table(info: Mapping[str, object], suffix: str) -> _Table:
    """Read `…_above_200k_tokens`: each threshold overlays what stands below it."""
    base = _overlaid(info, "", suffix)
    if suffix:
        own = _fields(info, suffix)
        if TokenClass.OUTPUT in own and TokenClass.REASONING not in own:
            # A service tier's output price goes before the standard price of reasoning.
            base.pop(TokenClass.REASONING, None)
    if not base.get(TokenClass.OUTPUT) and TokenClass.IMAGE_OUTPUT in base:
        # An image model whose map entry prices no text: all that it writes are image tokens.
        base[TokenClass.OUTPUT] = base[TokenClass.IMAGE_OUTPUT]
    provider = info.get("litellm_provider")
    if provider == _HALF_PRICE_CACHE_PROVIDER and TokenClass.INPUT in base:
        base.setdefault(TokenClass.CACHED_INPUT, ceil_div(base[TokenClass.INPUT], 2))
    inclusive = provider in _INCLUSIVE_PROVIDERS
    thresholds: set[tuple[int, str]] = set()
    for name, value in info.items():
        match = _THRESHOLD.fullmatch(name)
        if match and value is not None and (match[4] or "") in {"", suffix}:
            thresholds.add((int(match[2]) * (1000 if match[3] else 1), match[1]))
    steps: list[tuple[int, ClassPrices]] = []
    prices = base
    for tokens, infix in sorted(thresholds):
        prices = {**prices, **_overlaid(info, infix, suffix)}
        steps.append((tokens - inclusive, prices))
    return base, steps


def _range_table(info: Mapping[str, object]) -> _Table | None:
    """Read `tiered_pricing`: the range that holds the prompt prices the whole request.

    A prompt above the last range is priced by the last. What a range leaves out falls back within
    the range; only what ranges never price, and output where one prices input alone, is the
    model's own.
    """
    own = _fields(info, "")
    kept = {name: own[name] for name in _OUTSIDE_RANGES if name in own}
    ranges: list[tuple[int, ClassPrices]] = []
    for entry in _list(info.get("tiered_pricing")):
        bounds = _list(_object(entry).get("range"))
        prices = _fields(_object(entry), "")
        if bounds and TokenClass.INPUT in prices:
            ranges.append((_whole(bounds[0]), {**kept, **prices}))
    if not ranges:
        return None
    ranges.sort(key=lambda step: step[0])
    return ranges[0][1], ranges[1:]


def _overlaid(info: Mapping[str, object], infix: str, suffix: str) -> dict[TokenClass, int]:
    """Read the fields with an infix: the service tier's own where it has them."""
    standard = _fields(info, infix)
    return {**standard, **_fields(info, f"{infix}{suffix}")} if suffix else standard


def _fields(info: Mapping[str, object], ending: str) -> dict[TokenClass, int]:
    names = {token_class: f"{name}{ending}" for token_class, name in _FIELDS.items()}
    return _prices(info, names)


def _resolved(prices: ClassPrices) -> ClassPrices:
    """Give each class the price that it falls back to; one without any stays out."""
    resolved = dict(prices)
    # In this order a class's fallback is settled before the class itself.
    for token_class, fallback in FALLBACK_CLASS.items():
        if token_class not in resolved and fallback in resolved:
            resolved[token_class] = resolved[fallback]
    return MappingProxyType(resolved)


def _prices(info: Mapping[str, object], names: Mapping[_Key, str]) -> dict[_Key, int]:
    """Read the prices that are there; null is as good as left out."""
    return {key: _picos(info, name) for key, name in names.items() if info.get(name) is not None}


def _picos(info: Mapping[str, object], name: str) -> int:
    """Read a price, rounded up to a pico; floats are read by their shortest decimal text."""
    value = info[name]
    text = repr(value) if isinstance(value, float) else value
    if not isinstance(text, str | int):
        raise InvalidAmountError(f"{name}: a price can't be a {type(value).__name__}")
    try:
        return picos_from_usd(text)
    except InvalidAmountError as error:
        raise InvalidAmountError(f"{name}: {error}") from error


def _whole(value: object) -> int:
    """Read a number of tokens, which the map writes as 256000.0 too."""
    return scale_exactly(repr(value) if isinstance(value, float) else value, 1)


def _object(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value) if isinstance(value, Mapping) else {}


def _list(value: object) -> Sequence[object]:
    return cast("Sequence[object]", value) if isinstance(value, list | tuple) else ()
