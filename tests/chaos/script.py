"""What a request of the run asks its provider for: it stands in the prompt, as JSON.

So the customer, who draws it from a seed, says how the provider behaves, whatever proxies lie in
between and whoever of them is started anew meanwhile.
"""

from typing import Literal

import msgspec

MODEL = "chaos"
OUTPUT_LIMIT = 64
PROMPT_TOKENS = 40
# LiteLLM's prices: US dollars a token, and the same in pico-dollars.
INPUT_USD, OUTPUT_USD = 2.5e-06, 1e-05
INPUT_PICOS, OUTPUT_PICOS = 2_500_000, 10_000_000
MODEL_INFO = {
    "mode": "chat",
    "input_cost_per_token": INPUT_USD,
    "output_cost_per_token": OUTPUT_USD,
    "max_input_tokens": 8192,
    "max_output_tokens": 1024,
}
# The price book of the run: a factor of 2 on cost, so a nano for every 500 picos, rounded up.
PICOS_PER_NANO_SOLD = 500


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How the provider answers one request."""

    nonce: str
    # Completion tokens, so that hardly two answers cost the same.
    tokens: int
    wait_ms: int = 0
    # Of a stream: its events and the time between two of them.
    events: int = 4
    gap_ms: int = 5
    # `error` answers 500; `cut` breaks off in the middle.
    failure: Literal["", "error", "cut"] = ""

    @property
    def cost_picos(self) -> int:
        """What the provider takes for it."""
        return PROMPT_TOKENS * INPUT_PICOS + self.tokens * OUTPUT_PICOS


def answer_id(nonce: str) -> str:
    """The id of the provider's answer, by which a charge is traced back to who asked for it."""
    return f"chatcmpl-{nonce}"


def price_nanos(cost_picos: int) -> int:
    """What the customer must be charged for it, worked out apart from the code under test."""
    return -(-cost_picos // PICOS_PER_NANO_SOLD)
