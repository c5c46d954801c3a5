"""Running costs in a stream, for a client that asks for them: comments that no SDK chokes on.

    : tallygate {"cost":{"credits":"0.12","usd":"0.00012"},"output_tokens":42,"is_final":false}

What is told on the way is an estimate from the bytes that went by; the last one is the charge.
"""

import asyncio

import msgspec

from pricing.errors import PricingError
from pricing.money import usd_text
from pricing.usage import Usage
from proxy import metering
from proxy.admission import BYTES_PER_TOKEN
from proxy.call import Call
from proxy.wire.meter import StreamMeter

_INTERVAL_S = 0.5


class LiveCost:
    """Tells the running cost of one stream, at most twice a second."""

    def __init__(self, call: Call, meter: StreamMeter) -> None:
        self._call = call
        self._meter = meter
        self._next_at = 0.0

    def running(self) -> bytes | None:
        """Return a comment where it is time for one and the cost can be told."""
        now = asyncio.get_running_loop().time()
        if now < self._next_at:
            return None
        self._next_at = now + _INTERVAL_S
        admitted = self._call.admitted
        usage = Usage(
            input_tokens=-(-admitted.request.prompt_bytes // BYTES_PER_TOKEN),
            output_tokens=-(-self._meter.output_bytes // BYTES_PER_TOKEN),
        )
        cost_picos = metering.rated_picos(admitted, None, usage)
        try:
            price_nanos = metering.charge_for(admitted, cost_picos, usage).price_nanos
        except PricingError:
            return None
        return _comment(self._call, price_nanos, output_tokens=usage.output_tokens, is_final=False)

    @staticmethod
    def final(call: Call, price_nanos: int | None) -> bytes:
        """Return the comment with the charge; null where it is not known yet."""
        usage = call.reading.usage
        output_tokens = None if usage is None else usage.output_tokens
        return _comment(call, price_nanos, output_tokens=output_tokens, is_final=True)


def _comment(
    call: Call, price_nanos: int | None, *, output_tokens: int | None, is_final: bool
) -> bytes:
    cost = None
    if price_nanos is not None:
        cost = {"credits": call.admitted.credits_text(price_nanos), "usd": usd_text(price_nanos)}
    told = {"cost": cost, "output_tokens": output_tokens, "is_final": is_final}
    return b": tallygate " + msgspec.json.encode(told) + b"\n\n"
