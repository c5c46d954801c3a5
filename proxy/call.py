"""One admitted request on its way: what relaying it takes, in one hand."""

import time
from dataclasses import dataclass, field

from proxy.admission import Admitted
from proxy.endpoints import Endpoint
from proxy.exchange import Exchange
from proxy.ledger import Settlement
from proxy.metering import Reading
from proxy.repeats import Repeat
from proxy.wire.request import Request


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """A request with its hold; `started` is the monotonic time of its first byte."""

    exchange: Exchange
    admitted: Admitted
    repeat: Repeat
    started: float
    reading: Reading = field(default_factory=Reading)
    # Whether anything of the provider's answer has left for the client, or would have.
    has_delivered: bool = False
    # What a stream that is whole comes to, from the moment that this is known.
    settlement: Settlement | None = None
    # Whether its settlement was handed to the settler, which makes it durable whatever follows.
    is_settled: bool = False

    @property
    def endpoint(self) -> Endpoint:
        """Where the request came to."""
        return self.admitted.endpoint

    @property
    def request(self) -> Request:
        """What it asks for."""
        return self.admitted.request

    def seconds(self) -> float:
        """How long it has been under way."""
        return time.monotonic() - self.started

    def milliseconds(self) -> int:
        """The same as the usage row keeps it."""
        return round(self.seconds() * 1000)

    def headers(self, content_type: bytes) -> list[tuple[bytes, bytes]]:
        """Headers of its answer; none of LiteLLM's own, which tell of the inside."""
        limits = [(n.encode(), text.encode()) for n, text in self.admitted.headers.items()]
        return [(b"content-type", content_type), *limits]
