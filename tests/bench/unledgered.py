"""Tallygate without its ledger: every hold is granted and every settlement accepted, by nobody.

`python -m tests.bench.unledgered PORT UPSTREAM_URL KEY`. Keys, firewall, estimate, metering and
pricing are the service's own, so that the difference between the two is what PostgreSQL costs.
"""

import gc
import sys
from typing import Any, cast

import msgspec
import uvicorn

from pricing.price_book import parse_price_book
from proxy.accounts import Accounts, Principal
from proxy.admission import Admission, AdmissionLimits
from proxy.catalog import Catalog
from proxy.control import LiteLLMControl
from proxy.exchange import Exchange, Receive, Scope, Send
from proxy.ids import uuid7
from proxy.ledger import Authorization, HoldRequest, Ledger, Settled, Settlement
from proxy.log import RequestLog, configure_logging
from proxy.price_books import PriceBooks, PublishedBook
from proxy.principals import Principals
from proxy.relay import Relay, RelayLimits
from proxy.settings import Settings
from proxy.settlement import Settler
from proxy.streaming import StreamRelay
from proxy.sweeper import Heartbeat
from proxy.upstream import Upstream

_NANOS_PER_CREDIT = 1_000_000


class _NoLedger:
    """Stands in for everything that would ask PostgreSQL."""

    current = PublishedBook(1, parse_price_book({}), _NANOS_PER_CREDIT)

    async def principal(self, _: bytes) -> Principal:
        """Know every key."""
        return Principal(uuid7(), uuid7(), "default", 2, None, "active", "active", None, False)  # noqa: FBT003

    async def authorize(self, _: HoldRequest) -> Authorization:
        """Grant every hold."""
        return Authorization("held", 10**15, None, None, None, None, None)

    async def settle(self, settlement: Settlement) -> Settled:
        """Accept every settlement, in the form in which it would be sent."""
        msgspec.json.encode(settlement)
        return Settled("captured", 0)


class Unledgered:
    """The data plane alone."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream_url = upstream_url
        self._relay: Relay | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the start and the end of the server, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        assert self._relay is not None
        await self._relay.chat(Exchange(scope, receive, send))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        configure_logging("INFO")
        self._relay = await _relay(self._upstream_url)
        await send({"type": "lifespan.startup.complete"})
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _relay(upstream_url: str) -> Relay:
    nobody: Any = _NoLedger()
    ledger, settler = cast("Ledger", nobody), cast("Settler", nobody)
    principals = Principals(cast("Accounts", nobody), cache_s=5)
    control = LiteLLMControl(upstream_url, "none")
    catalog = Catalog(control, None)
    await catalog.refresh()
    return Relay(
        principals=principals,
        admission=Admission(
            ledger=ledger,
            settler=settler,
            principals=principals,
            catalog=catalog,
            control=control,
            price_books=cast("PriceBooks", nobody),
            limits=AdmissionLimits(10**8, 16, 4096, 16384, 65536, 900),
            byok_headers=Settings().byok_headers,
        ),
        upstream=Upstream(
            upstream_url, connect_timeout_s=5, read_timeout_s=600, max_connections=2000
        ),
        settler=settler,
        heartbeat=Heartbeat(ledger, interval_s=60, ttl_s=900),
        streams=cast("StreamRelay", None),
        master_key="none",
        limits=RelayLimits(1 << 24, 1 << 28, charge_cut_streams=False),
        log=RequestLog(),
    )


if __name__ == "__main__":
    uvicorn.run(
        Unledgered(sys.argv[2]),
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_level="error",
        backlog=2048,
        timeout_keep_alive=75,
    )
