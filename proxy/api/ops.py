"""What operations look at: `/livez`, `/readyz` and `/metrics`.

Open to clients on loopback, for everybody else behind a token. Each answers whatever is down.
"""

import asyncio
import hmac
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import (
    MultiProcessCollector,
    mark_process_dead,  # pyright: ignore[reportUnknownVariableType]
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pricing.money import NANOS_PER_USD
from proxy.api.answers import Liveness, Readiness
from proxy.api.operations import Operation, mount
from proxy.api.services import Services
from proxy.api.web import answer, bearer, exchange_of
from proxy.errors import MeteringUnavailableError, PermissionDeniedError
from proxy.metrics import OBSERVER, SCRAPED_GAUGES
from proxy.reports import Operations
from proxy.webhooks import Backlog

# Whoever is asked by a proxy on the same machine is not asked by the machine.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")

_REMEDIES = {
    "postgresql": "PostgreSQL does not answer: see TALLYGATE_DATABASE_URL and its server.",
    "litellm": "LiteLLM does not answer: see TALLYGATE_LITELLM_URL and its log.",
    "catalog": "LiteLLM has never told its models: see TALLYGATE_LITELLM_KEY and its log.",
    "price_book": "No price book was read yet: it comes with PostgreSQL.",
}


class Ops:
    """Endpoints for orchestrators and Prometheus."""

    def __init__(self, services: Services) -> None:
        self._reports = services.reports
        self._control = services.control
        self._catalog = services.catalog
        self._price_books = services.price_books
        self._spool = services.spool
        self._webhooks = services.webhooks
        self._token = services.ops_token.encode() if services.ops_token else None

    def operations(self) -> list[Operation[None]]:
        """Everything that operations look at."""
        return [
            Operation(
                method="GET",
                path="/livez",
                handler=self._livez,
                needs="look",
                tag="health",
                summary="Whether the process answers",
                answers=Liveness,
            ),
            Operation(
                method="GET",
                path="/readyz",
                handler=self._readyz,
                needs="look",
                tag="health",
                summary="Whether everything that the service needs is up; 503 where it is not",
                answers=Readiness,
                also={503: Readiness},
            ),
            Operation(
                method="GET",
                path="/metrics",
                handler=self._metrics,
                needs="look",
                tag="health",
                summary="Metrics for Prometheus",
                media_types=("text/plain",),
            ),
        ]

    def routes(self) -> list[Route]:
        """Every path, each behind the token where the client is not on loopback."""
        return mount(self.operations(), self._authenticate)

    async def _authenticate(self, request: Request, _operation: Operation[None]) -> None:
        if _is_local(request):
            return
        if self._token is None:
            message = "This is open on loopback only: set TALLYGATE_OPS_TOKEN to ask from here."
            raise PermissionDeniedError(message, code="ops_only")
        sent = bearer(exchange_of(request))
        if sent is None or not hmac.compare_digest(sent, self._token):
            message = "Send TALLYGATE_OPS_TOKEN as 'Authorization: Bearer …'."
            raise PermissionDeniedError(message, code="ops_only")

    async def _livez(self, _request: Request, _caller: None) -> Response:
        return answer({"status": "alive"})

    async def _readyz(self, _request: Request, _caller: None) -> Response:
        async with asyncio.TaskGroup() as group:
            postgresql = group.create_task(self._reports.is_alive())
            litellm = group.create_task(self._control.is_alive())
            spool = group.create_task(asyncio.to_thread(self._spool_state))
        checks = {
            "postgresql": postgresql.result(),
            "litellm": litellm.result(),
            "catalog": self._catalog.is_known,
            "price_book": self._has_price_book(),
        }
        waiting, rejected = spool.result()
        is_ready = all(checks.values())
        return answer(
            {
                "status": "ready" if is_ready else "not_ready",
                "down": {name: _REMEDIES[name] for name, is_up in checks.items() if not is_up},
                "checks": {name: "ok" if is_up else "down" for name, is_up in checks.items()},
                # Neither makes a service less ready: they are settled later, or by a human.
                "spool": {"bytes": waiting, "rejected": rejected},
            },
            200 if is_ready else 503,
        )

    def _has_price_book(self) -> bool:
        try:
            return self._price_books.current.version > 0
        except MeteringUnavailableError:
            return False

    async def _metrics(self, _request: Request, _caller: None) -> Response:
        async with asyncio.TaskGroup() as group:
            operations = group.create_task(self._reports.operations())
            backlog = group.create_task(self._webhooks.backlog())
            spool = group.create_task(asyncio.to_thread(self._spool_state))
        scraped = CollectorRegistry(auto_describe=False)
        scraped.register(
            _Scraped(
                operations.result(),
                backlog.result(),
                *spool.result(),
                catalog_age_s=self._catalog.age_s(),
            )
        )
        OBSERVER.flush()
        # Files are read, several for each worker.
        counted = await asyncio.to_thread(_counted)
        return Response(
            counted + generate_latest(scraped), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    def _spool_state(self) -> tuple[int, int]:
        return self._spool.depth(), self._spool.rejected()


def _is_local(request: Request) -> bool:
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    try:
        address = ipaddress.ip_address(request.client.host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def _counted() -> bytes:
    """Render what the processes counted: all workers' where they share a directory."""
    # The client library decides by the same variable where a process keeps its values.
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # noqa: TID251 - no setting of ours
    if directory is None:
        return generate_latest(REGISTRY)
    _forget_the_dead(Path(directory))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)


def _forget_the_dead(directory: Path) -> None:
    """Drop what killed workers said of the present, such as the requests that they had."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            mark_process_dead(int(pid), str(directory))


class _Scraped(Collector):
    """Gauges whose values are read at the scrape, and the same from whichever worker answers."""

    def __init__(
        self,
        operations: Operations | None,
        backlog: Backlog | None,
        spool_bytes: int,
        rejected: int,
        *,
        catalog_age_s: float,
    ) -> None:
        self._labelled: list[GaugeMetricFamily] = []
        self._values: dict[str, float] = {
            "tallygate_catalog_age_seconds": catalog_age_s,
            "tallygate_postgresql_up": 0 if operations is None else 1,
            "tallygate_spool_bytes": spool_bytes,
            "tallygate_settlements_rejected_waiting": rejected,
        }
        if backlog is not None:
            self._values |= {
                "tallygate_webhooks_pending": backlog.pending,
                "tallygate_webhooks_oldest_seconds": backlog.oldest_s,
                "tallygate_webhooks_failed": backlog.failed,
            }
        if operations is not None:
            self._values |= {
                "tallygate_holds_open": operations.open_holds,
                "tallygate_reserved_usd": operations.reserved_nanos / NANOS_PER_USD,
                "tallygate_review_queue": operations.reviews,
                "tallygate_review_oldest_seconds": operations.oldest_review_s,
                "tallygate_misplaced_rows": operations.misplaced_rows,
                "tallygate_audit_last_clean_timestamp_seconds": operations.audit_clean_at,
                "tallygate_audit_findings": operations.audit_findings,
            }
            self._labelled = _labelled(operations)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Yield the gauges whose values are known."""
        for name, value in self._values.items():
            yield GaugeMetricFamily(name, SCRAPED_GAUGES[name], value=value)
        yield from self._labelled


def _labelled(operations: Operations) -> list[GaugeMetricFamily]:
    waiting = _gauge("tallygate_reviews_waiting", "reason")
    for reason, number in operations.reviews_by_reason.items():
        waiting.add_metric([reason], number)
    reconciled = {
        "drift_usd": _gauge("tallygate_reconciliation_drift_usd", "source"),
        "age_s": _gauge("tallygate_reconciliation_age_seconds", "source"),
        "within": _gauge("tallygate_reconciliation_within", "source"),
    }
    for source, found in operations.reconciliations.items():
        for name, gauge in reconciled.items():
            value = found[name]
            if value is not None:
                gauge.add_metric([source], value)
    return [waiting, *reconciled.values()]


def _gauge(name: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, SCRAPED_GAUGES[name], labels=[label])
