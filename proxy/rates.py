"""How often callers come, in the memory of this process: a bucket of tokens for each of them.

Several workers and replicas each count for themselves. What is spent through the ledger has limits
that are exact over all of them; these here keep single callers from using the service up.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import ceil

from proxy.errors import RateLimitError

_MINUTE_S = 60.0
# A cap on memory: beyond it, whoever was seen longest ago is forgotten.
_MAX_CALLERS = 50_000


@dataclass(frozen=True, slots=True)
class Rate:
    """What a caller has left of its minute, and in how many seconds there is one call more."""

    limit: int
    left: int
    is_allowed: bool
    retry_after_s: int

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-…`, as OpenAI names them."""
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.left),
            "x-ratelimit-reset-requests": f"{self.retry_after_s}s",
        }

    def refusal(self, message: str) -> RateLimitError:
        """What the caller hears that may not go on."""
        error = RateLimitError(message, retry_after_s=self.retry_after_s)
        error.headers = self.headers()
        return error


class Rates:
    """Buckets that hold a minute's calls, and fill again at that pace."""

    def __init__(
        self,
        per_minute: int,
        *,
        max_callers: int = _MAX_CALLERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._per_minute = per_minute
        self._max_callers = max_callers
        self._clock = clock
        # What was in a bucket, and when; in the order in which they were last touched.
        self._buckets: dict[Hashable, tuple[float, float]] = {}

    def take(self, caller: Hashable) -> Rate:
        """Count a call, unless the caller has none left."""
        now = self._clock()
        left = self._left(caller, now)
        is_allowed = left >= 1
        if is_allowed:
            left -= 1
        self._buckets.pop(caller, None)
        self._buckets[caller] = (left, now)
        if len(self._buckets) > self._max_callers:
            del self._buckets[next(iter(self._buckets))]
        return self._rate(left, is_allowed=is_allowed)

    def look(self, caller: Hashable) -> Rate:
        """Tell what `take` would, and count nothing."""
        left = self._left(caller, self._clock())
        return self._rate(left, is_allowed=left >= 1)

    def _left(self, caller: Hashable, now: float) -> float:
        left, at = self._buckets.get(caller, (float(self._per_minute), now))
        return min(float(self._per_minute), left + (now - at) * self._per_minute / _MINUTE_S)

    def _rate(self, left: float, *, is_allowed: bool) -> Rate:
        wait_s = max(1.0 - left, 0.0) * _MINUTE_S / self._per_minute
        return Rate(self._per_minute, int(left), is_allowed, max(ceil(wait_s), 1))
