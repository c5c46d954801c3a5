"""`tallygate serve`: what must be true before the first request, then uvicorn.

Nothing here may import prometheus_client, not even through another module, before `serve` has said
where its values are kept: it decides at its import whether they are shared between processes.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from pricing.errors import PricingError
from pricing.money import usd_text
from proxy.connections import BoundedConnection
from proxy.db import CONNECTION_ERRORS, make_pool, require_schema
from proxy.errors import ConfigurationError
from proxy.lifeline import SUPERVISOR_VARIABLE, die_with_supervisor
from proxy.price_books import PriceBooks

POSTGRES_TIMEOUT_S = 30.0
log = logging.getLogger(__name__)

# A killed predecessor lets go of the port when the kernel has ended its last worker.
PORT_TIMEOUT_S = 10.0
_POLL_S = 0.2


def serve(
    *,
    database_url: str,
    nanos_per_credit: int,
    price_book: Mapping[str, object],
    is_price_book_packaged: bool,
    data_dir: Path,
    host: str,
    port: int,
    workers: int,
    shutdown_timeout_s: int,
) -> None:
    """Serve until SIGTERM or SIGINT, then let what is in flight end and settle.

    Raises ConfigurationError where the database, the price book or the port is not to be had.
    """
    die_with_supervisor()
    # Before uvicorn listens to signals, and again when it hands them back at its end.
    signal.signal(signal.SIGTERM, _leave)
    wait_for_schema(database_url, timeout_s=POSTGRES_TIMEOUT_S)
    wait_for_port(host, port, timeout_s=PORT_TIMEOUT_S)
    _share_metrics(data_dir / f"metrics-{port}")
    try:
        asyncio.run(
            prepare(database_url, nanos_per_credit, price_book, is_packaged=is_price_book_packaged)
        )
    except PricingError as error:
        msg = f"price_book in the configuration is wrong: {error}"
        raise ConfigurationError(msg) from None
    if workers > 1:
        os.environ[SUPERVISOR_VARIABLE] = str(os.getpid())  # noqa: TID251 - handed to the workers
    uvicorn.run(
        "proxy.app:create",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http=BoundedConnection,
        # Nobody here speaks WebSocket.
        ws="none",
        access_log=False,
        server_header=False,
        # Nothing is decided by a forwarded address; see api/ops for the one that looks at it.
        proxy_headers=False,
        log_config=None,
        backlog=2048,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=shutdown_timeout_s,
        # A worker that is busy for some seconds has customers, and must not be killed for it.
        timeout_worker_healthcheck=60,
    )


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(0)


def wait_for_schema(url: str, *, timeout_s: float) -> None:
    """Wait for PostgreSQL; ConfigurationError if it is not there in time or has another schema."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            require_schema(url)
        except ConfigurationError as error:
            is_away = isinstance(error.__context__, CONNECTION_ERRORS)
            if not is_away or time.monotonic() > deadline:
                raise
        else:
            return
        threading.Event().wait(_POLL_S)


def wait_for_port(host: str, port: int, *, timeout_s: float) -> None:
    """Wait until nobody listens there; ConfigurationError if somebody still does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            _probe(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                msg = f"can't listen on {host}, port {port}: {error}; set TALLYGATE_HOST"
                raise ConfigurationError(msg) from None
            if time.monotonic() > deadline:
                msg = (
                    f"port {port} on {host} is taken by another program: stop it, or choose "
                    "another with TALLYGATE_PORT"
                )
                raise ConfigurationError(msg) from None
        else:
            return
        threading.Event().wait(_POLL_S)


def _probe(host: str, port: int) -> None:
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)


def _share_metrics(directory: Path) -> None:
    """Give the workers an empty directory for their metrics: a counter begins at its start."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)  # noqa: TID251 - its own variable


async def freeze_credit(books: PriceBooks, nanos_per_credit: int) -> None:
    """Fix what a credit is worth, at first use; ConfigurationError if it is fixed at another."""
    frozen = await books.freeze_nanos_per_credit(nanos_per_credit)
    if frozen != nanos_per_credit:
        msg = (
            f"credit_usd is {usd_text(nanos_per_credit)} in the configuration, and the database "
            f"has it fixed at {usd_text(frozen)}: set it back. To change it all the same, which "
            "changes how many credits every balance shows and not what it is worth, stop every "
            f"service and, as the database's owner, put {nanos_per_credit} into the row "
            "nanos_per_credit of the table tallygate.meta"
        )
        raise ConfigurationError(msg)


async def prepare(
    url: str, nanos_per_credit: int, price_book: Mapping[str, object], *, is_packaged: bool
) -> None:
    """Have the database ready for the workers: the worth of a credit, prices, partitions."""
    from proxy.ledger import Ledger  # noqa: PLC0415 - see the module's docstring

    async with make_pool(url, max_size=1) as pool:
        books = PriceBooks(pool)
        await freeze_credit(books, nanos_per_credit)
        found = await books.in_force()
        before = None if found is None else found.version
        if before is None or not is_packaged:
            done = await books.publish_configured(price_book, nanos_per_credit=nanos_per_credit)
            if before is not None and done.outcome == "published":
                # Whatever an operator had published since the last change is not in force any more.
                log.warning(
                    "price book published",
                    extra={"version": done.version, "before": before, "overtaken": done.overtaken},
                )
        else:
            # No file of the operator's own was found, as after a start from another directory:
            # the example that comes with the package must not re-price anybody.
            log.warning("price book kept: no config.yaml here", extra={"version": before})
        if await books.revalue(nanos_per_credit):
            log.warning("price book published again for what a credit is worth now")
        ledger = Ledger(url, pool)
        try:
            # They are made months ahead: behind a dump that holds the tables, the service comes
            # back for them later.
            with contextlib.suppress(*CONNECTION_ERRORS):
                await ledger.ensure_partitions()
        finally:
            await ledger.close()
