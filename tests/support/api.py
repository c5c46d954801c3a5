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

from proxy.api.routes import make_application
from proxy.api.services import Services
from proxy.app import assemble
from proxy.key_uses import KeyUses
from proxy.settings import load_settings
from tests.support.service import ADMIN_KEY

LITELLM_URL = "http://litellm.invalid"
OPS_TOKEN = "ops-token-of-the-tests"
NANOS_PER_CREDIT = 1_000_000


@dataclass
class Api:
    """The application with its services; calls it as a client on `host` would."""

    services: Services
    key_uses: KeyUses
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
        app = make_application(self.services, no_lifespan)
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
async def no_lifespan(_: Starlette) -> AsyncGenerator[None]:
    """Nothing runs in the background."""
    yield


@asynccontextmanager
async def open_api(url: str, directory: Path, **changes: Any) -> AsyncGenerator[Api]:
    """Put the services together on this database; nothing of them runs in the background.

    `changes` are settings that are not to be as the tests have them.
    """
    settings = load_settings(
        {},
        **{
            "database_url": url,
            "litellm_url": LITELLM_URL,
            "admin_key": ADMIN_KEY,
            "ops_token": OPS_TOKEN,
            "data_dir": directory,
            "admission": {"principal_cache_s": 60},
            # No test comes to an end of these by accident.
            "api_limits": dict.fromkeys(
                ("account_per_minute", "admin_per_minute", "failures_per_minute"), 100_000
            ),
            **changes,
        },
    )
    parts = assemble(settings)
    services = parts.services
    await services.pool.open(wait=False)
    try:
        yield Api(services, parts.key_uses)
    finally:
        services.spool.close()
        await services.ledger.close()
        await parts.upstream.close()
        await services.control.close()
        await services.pool.close()


@pytest.fixture
async def api(database_url: str, tmp_path: Path) -> AsyncIterator[Api]:
    """The three APIs on a fresh database, whose times are far from UTC."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        statement = f"ALTER DATABASE {name} SET timezone = 'Asia/Kolkata'"
        connection.execute(cast("Any", statement))
    async with open_api(database_url, tmp_path) as opened:
        yield opened
