"""The account API, the admin API and the ops endpoints in this process, on a real database."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import httpx
import psycopg
import pytest
from starlette.applications import Starlette

from proxy.accounts import Accounts
from proxy.admission import Admission, AdmissionLimits
from proxy.api.routes import make_application
from proxy.api.services import Services
from proxy.catalog import Catalog
from proxy.control import LiteLLMControl
from proxy.db import Session, make_pool
from proxy.ledger import Ledger
from proxy.log import RequestLog
from proxy.price_books import PriceBooks
from proxy.principals import Principals
from proxy.relay import Relay, RelayLimits
from proxy.reports import Reports
from proxy.settlement import Settler
from proxy.spool import Spool
from proxy.streaming import StreamLimits, StreamRelay
from proxy.sweeper import Heartbeat
from proxy.upstream import Upstream
from tests.support.service import ADMIN_KEY

LITELLM_URL = "http://litellm.invalid"
OPS_TOKEN = "ops-token-of-the-tests"
NANOS_PER_CREDIT = 1_000_000


@dataclass
class Api:
    """The application with its services; calls it as a client on `host` would."""

    services: Services
    host: str = "127.0.0.1"

    def on(self, host: str) -> "Api":
        """Return the same, called from another host."""
        return replace(self, host=host)

    def with_(self, **services: Any) -> "Api":
        """Return the same with other services or secrets."""
        return replace(self, services=replace(self.services, **services))

    async def call(
        self, method: str, path: str, *, key: str | None = None, **request: Any
    ) -> httpx.Response:
        """Send one request, with a key as its bearer if there is one."""
        headers: dict[str, str] = request.pop("headers", {})
        if key is not None:
            headers = {"authorization": f"Bearer {key}", **headers}
        app = make_application(self.services, _no_lifespan)
        transport = httpx.ASGITransport(app, client=(self.host, 50_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://tallygate") as client:
            return await client.request(method, path, headers=headers, **request)

    async def admin(self, method: str, path: str, body: object = None, **request: Any) -> Any:
        """Do what must succeed with the admin key; returns the parsed answer, None for 204."""
        if body is not None:
            request["json"] = body
        answer = await self.call(method, "/admin/v1" + path, key=ADMIN_KEY, **request)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def refused(
        self, method: str, path: str, status: int, *, key: str | None = ADMIN_KEY, **request: Any
    ) -> dict[str, Any]:
        """Do what must be refused; returns the error, after a look at its shape."""
        answer = await self.call(method, path, key=key, **request)
        assert answer.status_code == status, f"{answer.status_code} {answer.text}"
        assert answer.headers["x-request-id"]
        error: dict[str, Any] = answer.json()["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        return error

    async def new_account(self, *, credits: str | None = None, **body: object) -> str:  # noqa: A002
        """Make an account, with credits if there are any."""
        account_id: str = (await self.admin("POST", "/accounts", {"name": "Ada", **body}))["id"]
        if credits is not None:
            grant = {"credits": credits, "reason": "test", "reference": "first"}
            await self.admin("POST", f"/accounts/{account_id}/grants", grant)
        return account_id

    async def new_key(self, account_id: str, **body: object) -> dict[str, Any]:
        """Make a key."""
        return await self.admin("POST", f"/accounts/{account_id}/keys", {"name": "key", **body})


@asynccontextmanager
async def _no_lifespan(_: Starlette) -> AsyncGenerator[None]:
    yield


@asynccontextmanager
async def open_api(url: str, directory: Path) -> AsyncGenerator[Api]:
    """Put the services together on this database; nothing of them runs in the background."""
    pool = make_pool(url)
    await pool.open(wait=False)
    control = LiteLLMControl(LITELLM_URL, "sk-unused")
    accounts, ledger, spool = Accounts(pool), Ledger(url, pool), Spool(directory / "spool")
    principals, price_books = Principals(accounts, cache_s=60), PriceBooks(pool)
    catalog = Catalog(control, directory / "catalog.json")
    settler = Settler(
        ledger.settle_sessions,
        Session(url, timeout_s=5),
        spool,
        nanos_per_credit=NANOS_PER_CREDIT,
    )
    upstream = Upstream(LITELLM_URL, connect_timeout_s=1, read_timeout_s=1, max_connections=1)
    relay = Relay(
        principals=principals,
        admission=Admission(
            ledger=ledger,
            settler=settler,
            principals=principals,
            catalog=catalog,
            control=control,
            price_books=price_books,
            limits=AdmissionLimits(1, 1, 1, 1, 1, 60),
            byok_headers={},
        ),
        upstream=upstream,
        settler=settler,
        heartbeat=Heartbeat(ledger, interval_s=60, ttl_s=60),
        streams=StreamRelay(settler, StreamLimits(1024, 1, 1024, charge_cut_streams=False)),
        master_key="sk-unused",
        log=RequestLog(),
        limits=RelayLimits(1024, 1024, charge_cut_streams=False),
    )
    try:
        yield Api(
            Services(
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
                admin_key=ADMIN_KEY,
                ops_token=OPS_TOKEN,
                default_tier="default",
                nanos_per_credit=NANOS_PER_CREDIT,
                client_stall_timeout_s=60,
            )
        )
    finally:
        spool.close()
        await ledger.close()
        await upstream.close()
        await control.close()
        await pool.close()


@pytest.fixture
async def api(database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """The three APIs on a fresh database, whose times are far from UTC."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        statement = f"ALTER DATABASE {name} SET timezone = 'Asia/Kolkata'"
        connection.execute(cast("Any", statement))
    async with open_api(database_url, tmp_path) as opened:
        yield opened
