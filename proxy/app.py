"""The composition root: settings in, one ASGI application out."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from pricing.money import nanos_from_credits
from proxy.accounts import Accounts
from proxy.admission import Admission, AdmissionLimits
from proxy.api.data_plane import DataPlane, is_data_plane
from proxy.api.routes import make_application
from proxy.api.services import Services
from proxy.catalog import Catalog
from proxy.control import LiteLLMControl
from proxy.db import CONNECTION_ERRORS, Session, make_pool
from proxy.errors import ConfigurationError
from proxy.estimates import Estimator
from proxy.intake import Intake
from proxy.keepalive import KeepAlive
from proxy.ledger import Ledger
from proxy.lifeline import die_with_supervisor
from proxy.log import RequestLog, configure_logging
from proxy.metering import MeteringPolicy
from proxy.plan import Allowances, Planner
from proxy.price_books import PriceBooks
from proxy.principals import Principals
from proxy.relay import Relay
from proxy.repeats import Repeats
from proxy.replays import IdempotencyStore, RetryStore
from proxy.reports import Reports
from proxy.seals import Sealer
from proxy.settings import Settings, load_settings
from proxy.settlement import Settler
from proxy.spool import Spool
from proxy.streaming import StreamLimits, StreamRelay
from proxy.sweeper import Heartbeat, Sweeper
from proxy.unmetered import Unmetered
from proxy.upstream import Upstream
from proxy.witness import WitnessReports

log = logging.getLogger(__name__)

_PRICE_BOOK_REFRESH_S = 2.0


def create() -> ASGIApp:
    """Make the application from config.yaml and the environment; uvicorn's factory."""
    settings = load_settings()
    configure_logging(settings.log_level)
    die_with_supervisor()
    app = make_app(settings)
    # What exists now lives as long as the process: the collector need not walk it again. A request
    # makes some hundred objects and no cycles, so the youngest generation may grow large before a
    # walk is worth its while.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    return app


@dataclass(frozen=True, slots=True)
class Parts:
    """One process's parts: what the endpoints work with, and what runs beside them."""

    services: Services
    settler: Settler
    upstream: Upstream
    request_log: RequestLog
    background: Sequence[Callable[[], Coroutine[Any, Any, None]]]


def assemble(settings: Settings) -> Parts:
    """Put one process together; nothing runs yet, and nothing is connected.

    Raises ConfigurationError where a setting is missing.
    """
    if settings.database_url is None or settings.litellm_url is None:
        msg = "set TALLYGATE_DATABASE_URL and TALLYGATE_LITELLM_URL, or run `tallygate up`"
        raise ConfigurationError(msg)
    url = settings.database_url.get_secret_value()
    master_key = settings.litellm_key.get_secret_value() if settings.litellm_key else ""
    holds, limits, repeats = settings.holds, settings.upstream, settings.repeats

    pool = make_pool(url)
    control = LiteLLMControl(settings.litellm_url, master_key)
    accounts, reports, ledger = Accounts(pool), Reports(pool), Ledger(url, pool)
    spool = Spool(settings.data_dir / "spool")
    settler = Settler(
        ledger.settle_sessions,
        Session(url, timeout_s=30),
        spool,
        nanos_per_credit=settings.nanos_per_credit,
    )
    principals = Principals(accounts, cache_s=settings.admission.principal_cache_s)
    catalog = Catalog(control, settings.data_dir / "catalog.json", free_models=settings.free_models)
    price_books = PriceBooks(pool)
    idempotency = IdempotencyStore(
        pool,
        ttl_s=repeats.idempotency_ttl_s,
        max_answer_bytes=repeats.idempotency_answer_bytes,
        max_account_bytes=repeats.idempotency_account_bytes,
    )
    heartbeat = Heartbeat(ledger, interval_s=holds.heartbeat_s, ttl_s=holds.ttl_s)
    sweeper = Sweeper(
        ledger, idempotency, interval_s=holds.sweep_interval_s, grace_s=holds.sweep_grace_s
    )
    keep_alive = KeepAlive(settings.keep_alive_s)
    upstream = Upstream(
        settings.litellm_url,
        connect_timeout_s=limits.connect_timeout_s,
        read_timeout_s=limits.read_timeout_s,
        max_connections=limits.max_connections,
    )
    planner = _planner(settings, catalog, price_books)
    admission = Admission(
        ledger=ledger,
        settler=settler,
        principals=principals,
        control=control,
        planner=planner,
        limits=AdmissionLimits(
            min_output_tokens=settings.admission.min_output_tokens, hold_ttl_s=holds.ttl_s
        ),
    )
    policy = MeteringPolicy(
        charge_incomplete=settings.charge_cut_streams,
        cost_tolerance_ppm=settings.cost_tolerance_ppm,
    )
    intake = Intake(
        max_body_bytes=settings.max_body_bytes, max_upload_bytes=settings.max_upload_bytes
    )
    request_log = RequestLog()
    relay = Relay(
        principals=principals,
        admission=admission,
        repeats=Repeats(
            idempotency,
            RetryStore(
                max_bytes=repeats.retry_bytes,
                max_answer_bytes=repeats.retry_answer_bytes,
                ttl_s=repeats.retry_ttl_s,
            ),
            list(settings.byok_headers),
        ),
        reports=reports,
        upstream=upstream,
        settler=settler,
        heartbeat=heartbeat,
        keep_alive=keep_alive,
        streams=StreamRelay(
            settler,
            keep_alive,
            policy,
            StreamLimits(
                max_event_bytes=limits.max_event_bytes,
                drain_timeout_s=limits.drain_timeout_s,
                drain_bytes=limits.drain_bytes,
            ),
        ),
        policy=policy,
        master_key=master_key,
        intake=intake,
        max_answer_bytes=limits.max_answer_bytes,
        log=request_log,
    )
    witness = WitnessReports(
        reports=reports,
        ledger=ledger,
        settler=settler,
        price_books=price_books,
        catalog=catalog,
        policy=policy,
    )
    unmetered = Unmetered(
        principals=principals,
        catalog=catalog,
        reports=reports,
        upstream=upstream,
        master_key=master_key,
        max_body_bytes=settings.max_body_bytes,
        byok_headers=settings.byok_headers,
    )
    services = Services(
        pool=pool,
        accounts=accounts,
        ledger=ledger,
        reports=reports,
        price_books=price_books,
        principals=principals,
        catalog=catalog,
        control=control,
        relay=relay,
        unmetered=unmetered,
        witness=witness,
        witness_token=_secret(settings.witness_token),
        estimator=Estimator(
            intake=intake, planner=planner, admission=admission, ledger=ledger, reports=reports
        ),
        spool=spool,
        admin_key=_secret(settings.admin_key),
        ops_token=_secret(settings.ops_token),
        default_tier=settings.default_tier,
        nanos_per_credit=settings.nanos_per_credit,
        client_stall_timeout_s=settings.client_stall_timeout_s,
    )
    return Parts(
        services=services,
        settler=settler,
        upstream=upstream,
        request_log=request_log,
        background=(
            settler.run,
            sweeper.run,
            Sealer(pool).run,
            heartbeat.run,
            keep_alive.run,
            witness.run,
            lambda: catalog.run(interval_s=limits.catalog_refresh_s),
            lambda: price_books.run(interval_s=_PRICE_BOOK_REFRESH_S),
        ),
    )


def _planner(settings: Settings, catalog: Catalog, price_books: PriceBooks) -> Planner:
    admission = settings.admission
    return Planner(
        catalog,
        price_books,
        Allowances(
            default_hold_nanos=nanos_from_credits(
                admission.default_hold_credits, settings.nanos_per_credit
            ),
            tokens_per_image=admission.tokens_per_image,
            tokens_per_audio_clip=admission.tokens_per_audio_clip,
            tokens_per_file=admission.tokens_per_file,
        ),
        settings.byok_headers,
    )


def make_app(settings: Settings) -> ASGIApp:
    """Make the application of one process. Raises ConfigurationError where a setting is missing."""
    parts = assemble(settings)
    services = parts.services

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        await services.pool.open(wait=False)
        services.catalog.load_cache()
        await services.catalog.refresh()
        with contextlib.suppress(*CONNECTION_ERRORS):
            # Else `run` goes on trying, and admission answers 503.
            await services.price_books.refresh()
        tasks = [asyncio.create_task(_for_ever(work)) for work in parts.background]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await services.witness.drain()
            # uvicorn has waited for the requests; what they queued is made durable here.
            await parts.settler.drain()
            await services.ledger.close()
            await parts.upstream.close()
            await services.control.close()
            await services.pool.close()
            parts.request_log.flush()

    return _Front(DataPlane(services), make_application(services, lifespan))


class _Front:
    """Sends the data plane to plain ASGI and everything else through Starlette."""

    def __init__(self, data_plane: ASGIApp, application: ASGIApp) -> None:
        self._data_plane = data_plane
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_data_plane(scope["path"]):
            await self._data_plane(scope, receive, send)
        else:
            await self._application(scope, receive, send)


async def _for_ever(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a background task for as long as the process lives; a defect in it must not end it."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("background task failed")
            await asyncio.sleep(1)


def _secret(value: Any) -> str | None:  # noqa: ANN401 - SecretStr or None
    return None if value is None else value.get_secret_value()
