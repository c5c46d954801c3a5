"""What a model's provider takes, in integers: by the token, by the unit, by the service tier."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from pricing.money import ceil_div
from pricing.usage import TokenClass

# What is bought otherwise than by the token: a count of `Usage` -> the unit that it is priced by.
UNIT_OF: Mapping[str, str] = MappingProxyType(
    {
        "images": "image",
        "input_characters": "input_character",
        "audio_ms": "second",
        "queries": "query",
    }
)
_MS_PER_SECOND = 1000
_UNASKED = -1

ClassPrices = Mapping[TokenClass, int]


@dataclass(frozen=True, slots=True)
class PriceTier:
    """The prices of a whole request that has more than so many input tokens."""

    above_tokens: int
    prices: ClassPrices


@dataclass(frozen=True, slots=True)
class ModelPrices:
    """What a model's provider takes, in pico-USD.

    `tokens` are prices per token; a class that is not in it has no price. `tiers` stand in rising
    order. `units` are prices per image, input_character, second and query; those in `disputed`
    can't be rated, because the deployments behind the name sell them in different ways. `search`
    is the dearest price of one web search. `service_tiers` are the prices of OpenAI's flex,
    priority and so on. `costs_something` tells of any price above 0, and of those too that nothing
    here rates by.
    """

    tokens: ClassPrices
    tiers: tuple[PriceTier, ...] = ()
    units: Mapping[str, int] = field(default_factory=dict[str, int])
    search: int = 0
    service_tiers: Mapping[str, "ModelPrices"] = field(default_factory=dict[str, "ModelPrices"])
    disputed: frozenset[str] = frozenset()
    costs_something: bool = False
    _dearest: dict[tuple[frozenset[TokenClass], int], int | None] = field(
        default_factory=dict[tuple[frozenset[TokenClass], int], int | None],
        init=False,
        repr=False,
        compare=False,
    )

    @property
    def buys_tokens(self) -> bool:
        """Whether any token costs anything."""
        return any(any(table.values()) for table in self._tables())

    def dearest(self, classes: frozenset[TokenClass], input_tokens: int) -> int | None:
        """Return the highest price of these classes in any tier up to so many input tokens."""
        tiers = self.tiers
        reached = sum([input_tokens > tier.above_tokens for tier in tiers]) if tiers else 0
        key = (classes, reached)
        known = self._dearest.get(key, _UNASKED)  # few different answers, one for each request
        if known != _UNASKED:
            return known
        tables = self._tables()[: reached + 1]
        prices = [price for table in tables for n, price in table.items() if n in classes]
        dearest = self._dearest[key] = max(prices, default=None)
        return dearest

    def at(self, input_tokens: int) -> ClassPrices:
        """Return the prices per token of a request with so many input tokens."""
        prices = self.tokens
        for tier in self.tiers:
            if input_tokens > tier.above_tokens:
                prices = tier.prices
        return prices

    def for_service_tier(self, service_tier: str | None) -> "ModelPrices":
        """Return the prices of a service tier; the standard ones where it has none."""
        if not service_tier or not self.service_tiers:
            return self
        return self.service_tiers.get(service_tier.lower(), self)

    def _tables(self) -> list[ClassPrices]:
        return [self.tokens, *(tier.prices for tier in self.tiers)]


def is_free(prices: ModelPrices) -> bool:
    """Whether every price that is there is 0, so that whatever was used cost nothing.

    For what has no usage to be rated by, moderations above all. False where nothing is priced.
    """
    return (
        bool(prices.tokens or prices.units)
        and not prices.buys_tokens
        and not any(prices.units.values())
        and not prices.search
        and not prices.costs_something
        and all(is_free(other) for other in prices.service_tiers.values())
    )


def unit_picos(prices: ModelPrices, unit: str, count: int) -> int | None:
    """Return what so many of a unit cost; None without a price. Seconds come as milliseconds."""
    if unit not in prices.units:
        return None
    # Rounded up once, for the whole length.
    return ceil_div(count * prices.units[unit], _MS_PER_SECOND if unit == "second" else 1)


def merge_ceiling(prices: Sequence[ModelPrices | None]) -> ModelPrices | None:
    """Return prices that are nowhere below those of any deployment behind one name.

    A class that one of them has no price for has none in the result. A unit that they do not all
    sell alike is disputed: of two ways to be billed nobody knows which was taken. Where one
    deployment is unpriced altogether (or there is none) the result is None: nothing bounds it.
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
    merged = ModelPrices(
        _dearest(one.tokens for one in known),
        tuple(PriceTier(step, _dearest(one.at(step + 1) for one in known)) for step in steps),
        MappingProxyType({unit: max(one.units.get(unit, 0) for one in known) for unit in units}),
        max(one.search for one in known),
        costs_something=any(one.costs_something for one in known),
    )
    # Whether a unit has a price, and whether that is 0, decides if tokens pay instead.
    buys_alike = len({(bool(one.tokens), one.buys_tokens) for one in (merged, *known)}) == 1
    disputed = {
        unit
        for unit in UNIT_OF.values()
        if not buys_alike
        or len({one.units[unit] > 0 if unit in one.units else None for one in known}) > 1
    }
    return replace(merged, disputed=frozenset(disputed))


def _dearest(tables: Iterable[ClassPrices]) -> ClassPrices:
    rows = list(tables)
    return MappingProxyType(
        {
            token_class: max(row[token_class] for row in rows)
            for token_class in TokenClass
            if all(token_class in row for row in rows)
        }
    )
