"""Tallygate without its ledger: every hold is granted and every settlement accepted, by nobody.

`python -m tests.bench.unledgered PORT UPSTREAM_URL KEY`. Keys, firewall, estimate, metering and
pricing are the service's own, so that the difference between the two is what PostgreSQL costs.
"""

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from pricing.price_book import parse_price_book
from proxy.accounts import Principal
from proxy.app import assemble
from proxy.endpoints import ENDPOINTS
from proxy.exchange import Exchange, Receive, Scope, Send
from proxy.ids import uuid7
from proxy.ledger import Authorization, HoldRequest, Settled, Settlement
from proxy.log import configure_logging
from proxy.price_books import PublishedBook
from proxy.relay import Relay
from proxy.settings import load_settings

_NANOS_PER_CREDIT = 1_000_000


class _NoLedger:
    """Stands in for everything that would ask PostgreSQL."""

    current = PublishedBook(1, parse_price_book({}), _NANOS_PER_CREDIT)

    async def principal(self, _: bytes) -> Principal:
        """Know every key."""
        return Principal(
            uuid7(), uuid7(), "default", 2, None, "active", "active", None,
            is_expired=False, replay_retries=True,
        )  # fmt: skip

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
        await self._relay.serve(Exchange(scope, receive, send), ENDPOINTS[scope["path"]])

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        configure_logging("INFO")
        # It holds the catalog's copy and an empty spool.
        with tempfile.TemporaryDirectory(prefix="tallygate-unledgered-") as directory:
            self._relay = await relay_without_ledger(self._upstream_url, Path(directory))
            await send({"type": "lifespan.startup.complete"})
            gc.collect()
            gc.freeze()
            gc.set_threshold(20_000, 20, 50)
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def relay_without_ledger(upstream_url: str, data_dir: Path, control: object = None) -> Relay:
    """Return the service's relay; `control` stands in for LiteLLM's control endpoints."""
    parts = assemble(
        load_settings(
            {},
            database_url="postgresql://nowhere",
            litellm_url=upstream_url,
            litellm_key="none",
            data_dir=data_dir,
        )
    )
    services = parts.services
    # Nothing but a benchmark takes it apart.
    catalog: Any = services.catalog
    if control is not None:
        catalog._control = control  # noqa: SLF001
    await services.catalog.refresh()
    relay: Any = services.relay
    admission: Any = relay._admission  # noqa: SLF001
    principals: Any = services.principals
    nobody = _NoLedger()
    relay._settler = relay._streams._settler = nobody  # noqa: SLF001
    admission._settler = admission._ledger = nobody  # noqa: SLF001
    admission._planner._price_books = principals._accounts = nobody  # noqa: SLF001
    return services.relay


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
