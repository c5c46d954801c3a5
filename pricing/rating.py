"""From a model's prices and a usage to the provider's cost.

This is the third source of a cost, after the header and the stream's `usage.cost`, and the one
that both are compared with. It bills what LiteLLM 1.106 bills, with two deliberate differences.
What was used and has no price makes the cost unknown, where LiteLLM takes 0. And what was made is
paid for: not by tokens of the prompt alone, nor by tokens that cost nothing because the model is
paid by the unit, with which LiteLLM is content.
"""

from pricing.errors import CostUnknownError
from pricing.model_prices import (
    UNIT_OF,
    ModelPrices,
    PriceTier,
    is_free,
    merge_ceiling,
    unit_picos,
)
from pricing.money import MAX_AMOUNT
from pricing.price_map import parse_model_prices
from pricing.usage import TokenClass, Usage

# Prices are asked for here, wherever they are read.
__all__ = ["ModelPrices", "PriceTier", "is_free", "merge_ceiling", "parse_model_prices", "rate"]


def rate(prices: ModelPrices, usage: Usage) -> int:
    """Return what the provider takes for a usage, in picos.

    CostUnknownError where something was used that has no price, or where the sum is beyond what
    the ledger can hold.
    """
    tokens = usage.by_class()
    cost_picos = _take_units(prices, usage, tokens) if usage.has_units else 0
    table = prices.at(usage.input_tokens)
    for token_class, count in tokens.items():
        if token_class not in table:
            raise CostUnknownError(f"no_price_for_{token_class.value}")
        cost_picos += count * table[token_class]
    if cost_picos > MAX_AMOUNT:
        raise CostUnknownError("rated_cost_out_of_range")
    return cost_picos


def _take_units(prices: ModelPrices, usage: Usage, tokens: dict[TokenClass, int]) -> int:
    """Price the units that tokens do not pay for, and take out the tokens that units pay for."""
    billed = _billed_units(prices, usage)
    if billed and not prices.tokens:
        tokens.clear()
    if "image" in billed and TokenClass.IMAGE_OUTPUT not in prices.tokens:
        tokens.pop(TokenClass.IMAGE_OUTPUT, None)  # the same picture
    if "input_character" in billed:
        tokens.pop(TokenClass.INPUT, None)  # the same text, counted otherwise
    cost_picos = 0
    for unit, count in billed.items():
        picos = unit_picos(prices, unit, count)
        if picos is None:
            raise CostUnknownError(f"no_price_for_{unit}")
        cost_picos += picos
    return cost_picos


def _billed_units(prices: ModelPrices, usage: Usage) -> dict[str, int]:
    """Return the units that are paid for themselves, whether they have a price or not.

    Where a model is bought by tokens and they were counted, they pay for a picture, for sound and
    for a query without a price of its own. Tokens of the prompt alone do not pay for what was
    made of it: for LiteLLM they do, and a speech costs next to nothing.
    """
    used = {unit: getattr(usage, name) for name, unit in UNIT_OF.items()}
    for unit in prices.disputed:
        if used[unit]:
            raise CostUnknownError(f"no_price_for_{unit}")
    by_token = prices.buys_tokens and usage.total_tokens > 0
    makes_by_token = by_token and usage.output_tokens > 0
    billed: set[str] = set()
    if "query" in prices.units or not by_token:
        billed.add("query")
    if not makes_by_token:
        billed.add("image")
    if not used["input_character"]:
        billed |= set() if by_token else {"second"}
    # LiteLLM goes by the token where a character costs 0.
    elif prices.units.get("input_character", 0) > 0:
        billed.add("input_character")
    elif not makes_by_token:
        is_by_length = used["second"] and "second" in prices.units
        billed.add("second" if is_by_length else "input_character")
    return {unit: used[unit] for unit in UNIT_OF.values() if unit in billed and used[unit]}
