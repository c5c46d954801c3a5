"""For whoever runs the service: is it alive, is it ready, and its figures."""

import hmac
import ipaddress
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import REGISTRY, Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from proxy.api.services import Services
from proxy.db import CONNECTION_ERRORS
from proxy.errors import AuthenticationError, MeteringUnavailableError, PermissionDeniedError
from proxy.exchange import virtual_key
from proxy.metrics import shared_registry
from proxy.reports import Operations


class OpsApi:
    """Open to this machine; from elsewhere with the ops token."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/livez", self.livez),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
        ]

    def _check(self, request: Request) -> None:
        if request.client is not None and _is_loopback(request.client.host):
            return
        token, sent = self._services.ops_token, virtual_key(request.headers.get)
        if token is None:
            msg = "From another machine this needs TALLYGATE_OPS_TOKEN to be set and sent."
            raise PermissionDeniedError(msg)
        if sent is None:
            raise AuthenticationError("Send the ops token as 'Authorization: Bearer …'.")
        if not hmac.compare_digest(sent.encode(), token.encode()):
            raise PermissionDeniedError("This needs the ops token.")

    async def livez(self, request: Request) -> JSONResponse:
        """The process answers."""
        self._check(request)
        return JSONResponse({"status": "ok"})

    async def readyz(self, request: Request) -> JSONResponse:
        """Whether requests would be served, and if not, what is down."""
        self._check(request)
        services = self._services
        is_database_up = await self._database_answers()
        checks = {
            "postgresql": is_database_up,
            "price_book": services.price_books.is_known,
            "litellm": await services.control.is_alive(),
            "catalog": services.catalog.is_known,
        }
        is_ready = all(checks.values())
        return JSONResponse(
            {
                "status": "ok" if is_ready else "unavailable",
                "down": [name for name, is_up in checks.items() if not is_up],
                "spool_bytes": services.spool.depth(),
            },
            status_code=200 if is_ready else 503,
        )

    async def _database_answers(self) -> bool:
        try:
            async with self._services.pool.connection(timeout=2) as connection:
                await connection.execute("SELECT 1")
        except CONNECTION_ERRORS:
            return False
        return True

    async def metrics(self, request: Request) -> Response:
        """Every worker's figures, and those of the database at this moment."""
        self._check(request)
        operations: Operations | None
        try:
            operations = await self._services.reports.operations()
        except (*CONNECTION_ERRORS, MeteringUnavailableError):
            operations = None
        registry = shared_registry() or REGISTRY
        body = generate_latest(registry)
        moment = CollectorRegistry()
        moment.register(_Moment(self._services, operations))
        return Response(body + generate_latest(moment), media_type=CONTENT_TYPE_LATEST)


class _Moment(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, services: Services, operations: Operations | None) -> None:
        self._services = services
        self._operations = operations

    def collect(self) -> Iterator[GaugeMetricFamily]:
        spool = self._services.spool
        operations = self._operations
        yield _gauge("postgresql_up", "Whether PostgreSQL answers", operations is not None)
        yield _gauge("spool_bytes", "Settlements that wait for PostgreSQL", spool.depth())
        yield _gauge("settlements_set_aside", "Settlements that wait for a human", spool.rejected())
        yield _gauge("scrape_timestamp_seconds", "When this was read", time.time())
        if operations is None:
            return
        yield _gauge("holds_open", "Holds that have not ended", operations.holds_open)
        yield _gauge("reserved_usd", "What they hold", operations.reserved_nanos / 1e9)
        yield _gauge("review_queue", "Requests that wait for review", operations.reviews_open)
        yield _gauge(
            "review_oldest_seconds", "Age of the oldest of them", operations.review_oldest_s
        )
        yield _gauge(
            "rows_without_partition",
            "Rows of a month that has no partition",
            operations.rows_without_partition,
        )


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tallygate_{name}", text, value=float(value))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a Unix socket, or a test's client
        return False
