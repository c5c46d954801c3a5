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
from proxy.admin_keys import AdminKeys
from proxy.admission import Admission, AdmissionLimits
from proxy.api.browsers import open_to_browsers
from proxy.api.data_plane import DataPlane, is_data_plane
from proxy.api.protection import Protection
from proxy.api.routes import make_application
from proxy.api.services import Services
from proxy.attempts import FailedAttempts
from proxy.catalog import Catalog
from proxy.charges import Charges, ChargeStore, RecurringCharges, RecurringStore
from proxy.control import LiteLLMControl
from proxy.db import CONNECTION_ERRORS, Session, make_pool
from proxy.directory import Directory
from proxy.errors import ConfigurationError
from proxy.estimates import Estimator
from proxy.expiring_credits import CreditSweeper, ExpiringCredits
from proxy.history import History
from proxy.intake import Intake
from proxy.keepalive import KeepAlive
from proxy.key_uses import KeyUses
from proxy.keys import Keys
from proxy.ledger import Ledger
from proxy.lifeline import die_with_supervisor
from proxy.log import RequestLog, configure_logging
from proxy.metering import MeteringPolicy
from proxy.networks import Addresses
from proxy.plan import Allowances, Planner
from proxy.price_books import PriceBooks
from proxy.principals import Principals
from proxy.privacy import Privacy
from proxy.projects import Projects
from proxy.rates import Rates
from proxy.relay import Relay
from proxy.repeats import Repeats
from proxy.replays import IdempotencyStore, RetryStore
from proxy.reports import Reports
from proxy.rollups import Rollups
from proxy.seals import Sealer
from proxy.settings import Settings, load_settings
from proxy.settlement import Settler
from proxy.spool import Spool
from proxy.statements import Statements
from proxy.streaming import StreamLimits, StreamRelay
from proxy.summaries import Summaries
from proxy.sweeper import Heartbeat, Sweeper
from proxy.switches import Switches
from proxy.trail import Trail
from proxy.unmetered import Unmetered
from proxy.upstream import Upstream
from proxy.webhooks import Delivery, Reach, RetryPolicy, Sender, Watch, WebhookStore
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
    key_uses: KeyUses
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
    key_uses = KeyUses(pool)
    protection = _protection(settings)
    principals = Principals(
        accounts,
        key_uses,
        cache_s=settings.admission.principal_cache_s,
        tiers=settings.terms,
        addresses=protection.addresses,
        attempts=protection.attempts,
    )
    switches = Switches(pool)
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
    planner = _planner(settings, catalog, switches, price_books)
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
        switches=switches,
        reports=reports,
        upstream=upstream,
        master_key=master_key,
        max_body_bytes=settings.max_body_bytes,
        byok_headers=settings.byok_headers,
    )
    privacy = Privacy(pool, stall_timeout_s=settings.client_stall_timeout_s)
    webhooks = WebhookStore(pool)
    reach = Reach(settings.webhooks.allow_http, settings.webhooks.allow_private)
    sender = Sender(reach, timeout_s=settings.webhooks.timeout_s)
    charge_store, recurring_store = ChargeStore(pool), RecurringStore(pool)
    charges = Charges(charge_store, ledger, settler, price_books)
    recurring_charges = RecurringCharges(recurring_store, charges, price_books)
    terms = settings.terms
    expiring_credits = ExpiringCredits(pool)
    credit_sweeper = CreditSweeper(
        expiring_credits, terms.monthly_nanos, interval_s=holds.sweep_interval_s
    )
    services = Services(
        pool=pool,
        accounts=accounts,
        directory=Directory(pool),
        admin_keys=AdminKeys(pool),
        keys=Keys(pool),
        projects=Projects(pool),
        ledger=ledger,
        expiring_credits=expiring_credits,
        reports=reports,
        trail=Trail(pool),
        history=History(pool),
        summaries=Summaries(pool),
        statements=Statements(pool),
        price_books=price_books,
        principals=principals,
        catalog=catalog,
        switches=switches,
        control=control,
        relay=relay,
        unmetered=unmetered,
        witness=witness,
        witness_token=_secret(settings.witness_token),
        estimator=Estimator(
            intake=intake, planner=planner, admission=admission, ledger=ledger, reports=reports
        ),
        spool=spool,
        webhooks=webhooks,
        webhook_reach=reach,
        charges=charges,
        charge_store=charge_store,
        recurring_charges=recurring_charges,
        recurring_store=recurring_store,
        request_log=request_log,
        protection=protection,
        privacy=privacy,
        admin_key=_secret(settings.admin_key),
        ops_token=_secret(settings.ops_token),
        tiers=terms,
        nanos_per_credit=settings.nanos_per_credit,
        client_stall_timeout_s=settings.client_stall_timeout_s,
    )
    return Parts(
        services=services,
        settler=settler,
        upstream=upstream,
        key_uses=key_uses,
        request_log=request_log,
        background=(
            settler.run,
            sweeper.run,
            credit_sweeper.run,
            Sealer(pool).run,
            Rollups(pool).run,
            heartbeat.run,
            key_uses.run,
            keep_alive.run,
            witness.run,
            recurring_charges.run,
            _watch(settings, webhooks).run,
            _delivery(settings, webhooks, sender).run,
            lambda: privacy.run(after_days=settings.erase_closed_after_days),
            lambda: catalog.run(interval_s=limits.catalog_refresh_s),
            lambda: price_books.run(interval_s=_PRICE_BOOK_REFRESH_S),
        ),
    )


def _watch(settings: Settings, store: WebhookStore) -> Watch:
    return Watch(
        store,
        interval_s=settings.webhooks.watch_interval_s,
        retention_s=settings.webhooks.retention_days * 86_400,
    )


def _delivery(settings: Settings, store: WebhookStore, sender: Sender) -> Delivery:
    return Delivery(
        store,
        sender,
        RetryPolicy(
            first_s=settings.webhooks.retry_s,
            longest_s=settings.webhooks.retry_max_s,
            give_up_s=settings.webhooks.give_up_s,
        ),
        nanos_per_credit=settings.nanos_per_credit,
        timeout_s=settings.webhooks.timeout_s,
    )


def _protection(settings: Settings) -> Protection:
    addresses, limits = Addresses(settings.trusted_proxies), settings.api_limits
    return Protection(
        addresses=addresses,
        attempts=FailedAttempts(limits.failures_per_minute, addresses),
        account_rates=Rates(limits.account_per_minute),
        admin_rates=Rates(limits.admin_per_minute),
        hsts_max_age_s=settings.hsts_max_age_s,
    )


def _planner(
    settings: Settings, catalog: Catalog, switches: Switches, price_books: PriceBooks
) -> Planner:
    admission = settings.admission
    return Planner(
        catalog,
        switches,
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
            await parts.key_uses.flush()
            await services.ledger.close()
            await parts.upstream.close()
            await services.control.close()
            await services.pool.close()
            parts.request_log.flush()

    front = _Front(DataPlane(services), make_application(services, lifespan))
    return open_to_browsers(front, settings.cors.allowed_origins)


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
