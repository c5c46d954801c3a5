"""The relay on our own stack without what metering adds: no keys, no parsing, no ledger.

`python -m tests.bench.bare PORT UPSTREAM_URL`. Same server, same client, same collector settings
as the service, so that the difference between the two is what metering costs.
"""

import gc
import sys

import uvicorn

from proxy.exchange import Exchange, Receive, Scope, Send
from proxy.upstream import Upstream

_BODY_BYTES = 64 * 1024 * 1024
_HEADERS = {"content-type": "application/json", "authorization": "Bearer none"}


class BareRelay:
    """Reads a request, sends it on, answers what came back."""

    def __init__(self, upstream_url: str) -> None:
        self._upstream_url = upstream_url
        self._upstream: Upstream | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the start and the end of the server, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        assert self._upstream is not None
        exchange = Exchange(scope, receive, send)
        body = await exchange.read_body(_BODY_BYTES)
        answer = await self._upstream.post(scope["path"], body, _HEADERS)
        try:
            whole = await answer.read(_BODY_BYTES)
        finally:
            answer.close()
        await exchange.respond(answer.status, whole, [(b"content-type", b"application/json")])

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        self._upstream = Upstream(
            self._upstream_url, connect_timeout_s=5, read_timeout_s=600, max_connections=2000
        )
        await send({"type": "lifespan.startup.complete"})
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)
        await receive()
        await self._upstream.close()
        await send({"type": "lifespan.shutdown.complete"})


if __name__ == "__main__":
    uvicorn.run(
        BareRelay(sys.argv[2]),
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
