"""One admitted request on its way: what relaying it takes, in one hand."""

import time
from dataclasses import dataclass, field

from proxy.admission import Admitted
from proxy.exchange import Exchange
from proxy.metering import Reading
from proxy.wire.chat_request import ChatRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request with its hold; `started` is the monotonic time of its first byte."""

    exchange: Exchange
    request: ChatRequest
    admitted: Admitted
    started: float
    reading: Reading = field(default_factory=Reading)

    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.started

    def milliseconds(self) -> int:
        """The same as the usage row keeps it."""
        return round(self.seconds() * 1000)
