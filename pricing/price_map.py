"""From LiteLLM's `model_info`, or an entry of its price map, to a model's prices.

It follows LiteLLM 1.106 (`llm_cost_calc/utils.py`) with two deliberate differences. Prices are
integers of picos, a finer float rounded up. And `off_peak_pricing` is left out, which is a
question of the clock: the standard price stands, which is the dearer one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar, cast

from pricing.errors import InvalidAmountError
from pricing.model_prices import ClassPrices, ModelPrices, PriceTier
from pricing.money import ceil_div, picos_from_usd, scale_exactly
from pricing.usage import FALLBACK_CLASS, TokenClass

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

# A price in one of these says that a token price of 0 beside it does not mean free. Some can't be
# rated from a usage: pixels need a size, and `cost_per_second` is for the time on the clock.
_PAID_OTHERWISE = (
    "input_cost_per_query",
    "cost_per_second",
    "input_cost_per_second",
    "output_cost_per_second",
    "input_cost_per_character",
    "output_cost_per_character",
    "input_cost_per_pixel",
    "output_cost_per_pixel",
)

_MADE_BY_PIECE = frozenset({TokenClass.AUDIO_OUTPUT, TokenClass.IMAGE_OUTPUT})

# Who has an image calculator of its own in LiteLLM, which reads the price of a made picture only.
# All others pay `input_cost_per_image` first, whatever it is called.
_IMAGE_CALCULATORS = frozenset(
    {
        "aiml",
        "azure_ai",
        "bedrock",
        "cometapi",
        "fal_ai",
        "gemini",
        "recraft",
        "runwayml",
        "vertex_ai",
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

# What holds up to the first step, and what holds above so many input tokens.
_Table = tuple[ClassPrices, list[tuple[int, ClassPrices]]]
_Key = TypeVar("_Key", bound=str)


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


def _parse_prices(info: Mapping[str, object], suffix: str) -> ModelPrices:
    """Read the prices of one service tier; the suffix is empty for the standard one."""
    units = _unit_prices(info)
    searches = _object(info.get("search_context_cost_per_query"))
    search = max(_prices(searches, {size: size for size in searches}).values(), default=0)
    base, steps = _range_table(info) or _threshold_table(info, suffix)
    tiers = tuple(PriceTier(above_tokens, _resolved(prices)) for above_tokens, prices in steps)
    costs = _costs_something(info)
    if not any(base.values()):
        if any(_prices(info, {name: name for name in _PAID_OTHERWISE}).values()):
            # LiteLLM fills in zeros for the tokens of a model that is paid by the second, say.
            return ModelPrices(_resolved({}), (), units, search, costs_something=costs)
        if units.get("image"):
            # Its text is free, and its pictures (or songs, sold as such) are not: their tokens
            # have no price.
            text = {n: price for n, price in _resolved(base).items() if n not in _MADE_BY_PIECE}
            return ModelPrices(MappingProxyType(text), tiers, units, search, costs_something=costs)
    return ModelPrices(_resolved(base), tiers, units, search, costs_something=costs)


def _unit_prices(info: Mapping[str, object]) -> Mapping[str, int]:
    """Read what LiteLLM takes for a picture, a character, a second of sound and a query."""
    units = _prices(
        info, {"input_character": "input_cost_per_character", "query": "input_cost_per_query"}
    )
    provider = str(info.get("litellm_provider")).split("-", 1)[0]
    fields = ["output_cost_per_image"]
    if provider not in _IMAGE_CALCULATORS:
        fields.insert(0, "input_cost_per_image")
    images = _prices(info, {name: name for name in fields})
    if images:
        units["image"] = next(iter(images.values()))
    # One of them and never both: many entries name the same price twice, or one of them as 0.
    made, heard = (
        _prices(info, {"second": name})
        for name in ("output_cost_per_second", "input_cost_per_second")
    )
    units |= made if any(made.values()) else made | heard
    return MappingProxyType(units)


def _costs_something(info: Mapping[str, object]) -> bool:
    """Whether any price is above 0, those of units that we know nothing of among them."""
    for name, value in info.items():
        if "cost" in name and isinstance(value, str | int | float):
            try:
                if _picos(info, name):
                    return True
            except InvalidAmountError:
                continue  # not a price at all
    return False


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
