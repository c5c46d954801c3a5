"""The composition root: settings in, one ASGI application out."""

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from pricing.money import nanos_from_credits
from proxy.accounts import Accounts
from proxy.admission import Admission, AdmissionLimits
from proxy.api.data_plane import DataPlane
from proxy.api.routes import make_application
from proxy.api.services import Services
from proxy.catalog import Catalog
from proxy.control import LiteLLMControl
from proxy.db import CONNECTION_ERRORS, Session, make_pool
from proxy.errors import ConfigurationError
from proxy.ledger import Ledger
from proxy.lifeline import die_with_supervisor
from proxy.log import RequestLog, configure_logging
from proxy.price_books import PriceBooks
from proxy.principals import Principals
from proxy.relay import Relay, RelayLimits
from proxy.reports import Reports
from proxy.settings import Settings, load_settings
from proxy.settlement import Settler
from proxy.spool import Spool
from proxy.streaming import StreamLimits, StreamRelay
from proxy.sweeper import Heartbeat, Sweeper
from proxy.upstream import Upstream

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


def make_app(settings: Settings) -> ASGIApp:
    """Wire one process together. Raises ConfigurationError where a setting is missing."""
    if settings.database_url is None or settings.litellm_url is None:
        msg = "set TALLYGATE_DATABASE_URL and TALLYGATE_LITELLM_URL, or run `tallygate up`"
        raise ConfigurationError(msg)
    url = settings.database_url.get_secret_value()
    master_key = settings.litellm_key.get_secret_value() if settings.litellm_key else ""
    holds, limits = settings.holds, settings.upstream

    pool = make_pool(url)
    control = LiteLLMControl(settings.litellm_url, master_key)
    accounts = Accounts(pool)
    ledger = Ledger(url, pool)
    spool = Spool(settings.data_dir / "spool")
    settler = Settler(
        ledger.settle_sessions,
        Session(url, timeout_s=30),
        spool,
        nanos_per_credit=settings.nanos_per_credit,
    )
    principals = Principals(accounts, cache_s=settings.admission.principal_cache_s)
    catalog = Catalog(control, settings.data_dir / "catalog.json")
    price_books = PriceBooks(pool)
    heartbeat = Heartbeat(ledger, interval_s=holds.heartbeat_s, ttl_s=holds.ttl_s)
    sweeper = Sweeper(ledger, interval_s=holds.sweep_interval_s, grace_s=holds.sweep_grace_s)
    upstream = Upstream(
        settings.litellm_url,
        connect_timeout_s=limits.connect_timeout_s,
        read_timeout_s=limits.read_timeout_s,
        max_connections=limits.max_connections,
    )
    admission = Admission(
        ledger=ledger,
        settler=settler,
        principals=principals,
        catalog=catalog,
        control=control,
        price_books=price_books,
        limits=AdmissionLimits(
            default_hold_nanos=nanos_from_credits(
                settings.admission.default_hold_credits, settings.nanos_per_credit
            ),
            min_output_tokens=settings.admission.min_output_tokens,
            tokens_per_image=settings.admission.tokens_per_image,
            tokens_per_audio_clip=settings.admission.tokens_per_audio_clip,
            tokens_per_file=settings.admission.tokens_per_file,
            hold_ttl_s=holds.ttl_s,
        ),
        byok_headers=settings.byok_headers,
    )
    request_log = RequestLog()
    relay = Relay(
        principals=principals,
        admission=admission,
        upstream=upstream,
        settler=settler,
        heartbeat=heartbeat,
        streams=StreamRelay(
            settler,
            StreamLimits(
                max_event_bytes=limits.max_event_bytes,
                drain_timeout_s=limits.drain_timeout_s,
                drain_bytes=limits.drain_bytes,
                charge_cut_streams=settings.charge_cut_streams,
            ),
        ),
        master_key=master_key,
        limits=RelayLimits(
            max_body_bytes=settings.max_body_bytes,
            max_answer_bytes=limits.max_answer_bytes,
            charge_cut_streams=settings.charge_cut_streams,
        ),
        log=request_log,
    )
    services = Services(
        pool=pool,
        accounts=accounts,
        ledger=ledger,
        reports=Reports(pool),
        price_books=price_books,
        principals=principals,
        catalog=catalog,
        control=control,
        relay=relay,
        spool=spool,
        admin_key=_secret(settings.admin_key),
        ops_token=_secret(settings.ops_token),
        default_tier=settings.default_tier,
        nanos_per_credit=settings.nanos_per_credit,
        client_stall_timeout_s=settings.client_stall_timeout_s,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        await pool.open(wait=False)
        catalog.load_cache()
        await catalog.refresh()
        with contextlib.suppress(*CONNECTION_ERRORS):
            await price_books.refresh()  # else `run` goes on trying, and admission answers 503
        tasks = [
            asyncio.create_task(_for_ever(work))
            for work in (
                settler.run,
                sweeper.run,
                heartbeat.run,
                lambda: catalog.run(interval_s=limits.catalog_refresh_s),
                lambda: price_books.run(interval_s=_PRICE_BOOK_REFRESH_S),
            )
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            # uvicorn has waited for the requests; what they queued is made durable here.
            await settler.drain()
            await ledger.close()
            await upstream.close()
            await control.close()
            await pool.close()
            request_log.flush()

    return _Front(DataPlane(services), make_application(services, lifespan))


class _Front:
    """Sends the data plane to plain ASGI and everything else through Starlette."""

    def __init__(self, data_plane: ASGIApp, application: ASGIApp) -> None:
        self._data_plane = data_plane
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
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
