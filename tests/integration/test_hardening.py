"""What keeps the service up and its answers harmless: headers, limits, CORS, the request log."""

import json
import logging
from pathlib import Path

import httpx
import psycopg
import pytest

from proxy.api.browsers import open_to_browsers
from proxy.api.data_plane import DataPlane
from proxy.api.routes import make_application
from proxy.errors import ConfigurationError
from proxy.settings import load_settings
from tests.support.api import OPS_TOKEN, Api, no_lifespan, open_api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
LIMITS = {"account_per_minute": 3, "admin_per_minute": 4, "failures_per_minute": 3}


async def _v1(api: Api, key: str, path: str = "/v1/chat/completions") -> httpx.Response:
    """Call the data plane, from the host of `api`."""
    transport = httpx.ASGITransport(DataPlane(api.services), client=(api.host, 50_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://tallygate") as client:
        return await client.post(
            path, json={"model": "m"}, headers={"authorization": f"Bearer {key}"}
        )


# --- headers ---


async def test_every_answer_has_the_security_headers(api: Api) -> None:
    account_id = await api.new_account()
    key = (await api.new_key(account_id))["key"]
    for method, path, sent, status in [
        ("GET", "/admin/v1/accounts", ADMIN_KEY, 200),
        ("GET", "/admin/v1/accounts", None, 401),
        ("GET", "/admin/v1/accounts/x", ADMIN_KEY, 404),
        ("POST", "/admin/v1/accounts", ADMIN_KEY, 400),
        ("PUT", "/admin/v1/accounts", ADMIN_KEY, 405),
        ("GET", "/api/v1/balance", key, 200),
        ("GET", "/api/v1/balance", "sk-wrong", 401),
        ("GET", "/livez", OPS_TOKEN, 200),
        ("GET", "/metrics", OPS_TOKEN, 200),
        ("GET", "/openapi.json", None, 200),
        ("GET", "/nowhere", None, 404),
    ]:
        answer = await api.call(method, path, key=sent)
        assert answer.status_code == status, path
        assert answer.headers.items() >= SECURITY_HEADERS.items(), path
        assert "strict-transport-security" not in answer.headers
        assert len(answer.headers.get_list("x-request-id")) == 1


async def test_https_is_insisted_on_where_that_is_configured(
    database_url: str, tmp_path: Path
) -> None:
    async with open_api(database_url, tmp_path, hsts_max_age_s=31_536_000) as api:
        answer = await api.call("GET", "/admin/v1/accounts", key=ADMIN_KEY)
    assert answer.headers["strict-transport-security"] == "max-age=31536000"


async def test_failure_of_ours_shows_nothing_of_how_it_came_about(
    api: Api, database_url: str
) -> None:
    account_id = await api.new_account()
    with psycopg.connect(database_url) as connection:
        connection.execute("DROP FUNCTION tallygate.rename_account")
    path = f"/admin/v1/accounts/{account_id}"
    answer = await api.call("PATCH", path, key=ADMIN_KEY, json={"name": "Ada"})
    assert answer.status_code == 500
    assert answer.headers.items() >= SECURITY_HEADERS.items()
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for trace in ("rename_account", "psycopg", "Traceback", ".py", "SELECT"):
        assert trace not in answer.text
    assert answer.headers["x-request-id"] in error["message"]


# --- limits ---


async def test_accounts_and_operators_have_a_number_of_calls_a_minute(
    database_url: str, tmp_path: Path
) -> None:
    async with open_api(database_url, tmp_path, api_limits=LIMITS) as api:
        account_id = await api.new_account()
        keys = [(await api.new_key(account_id))["key"] for _ in range(2)]
        other = await api.admin("POST", "/admin-keys", {"name": "Ada", "role": "owner"})

        error = await api.refused("GET", "/admin/v1/accounts", 429)
        assert error["code"] == "rate_limit_exceeded"
        answer = await api.call("GET", "/admin/v1/accounts", key=other["key"])
        assert answer.headers["x-ratelimit-remaining-requests"] == "3"

        # The keys of an account share what it has.
        for key, left in zip([*keys, keys[0]], "210", strict=True):
            answer = await api.call("GET", "/api/v1/balance", key=key)
            assert answer.headers["x-ratelimit-limit-requests"] == "3"
            assert answer.headers["x-ratelimit-remaining-requests"] == left
        answer = await api.call("GET", "/api/v1/balance", key=keys[1])
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "20")
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"


async def test_wrong_keys_of_an_address_are_refused_unheard_after_some(
    database_url: str, tmp_path: Path
) -> None:
    async with open_api(database_url, tmp_path, api_limits=LIMITS) as api:
        account_id = await api.new_account()
        known, unused = [(await api.new_key(account_id))["key"] for _ in range(2)]
        guesser, neighbour = api.on("192.0.2.1"), api.on("192.0.2.2")
        assert (await guesser.call("GET", "/api/v1/balance", key=known)).status_code == 200

        answers = [
            await _v1(guesser, "sk-guess-1"),
            await guesser.call("GET", "/api/v1/balance", key="sk-guess-2"),
            await guesser.call("GET", "/admin/v1/accounts", key="tga-guess-3"),
        ]
        assert [answer.status_code for answer in answers] == [401, 401, 403]

        asked = api.services.pool.get_stats().get("requests_num", 0)
        for refused in (
            await _v1(guesser, "sk-guess-4"),
            await _v1(guesser, "sk-guess-5", "/v1/messages"),
            await guesser.call("GET", "/api/v1/balance", key="sk-guess-6"),
            await guesser.call("GET", "/admin/v1/accounts", key="tga-guess-7"),
            await guesser.call("GET", "/admin/v1/accounts", key="anything"),
            # It is right, and yet may be a lucky guess: it has not been seen here before.
            await guesser.call("GET", "/api/v1/balance", key=unused),
        ):
            assert (refused.status_code, int(refused.headers["retry-after"]) <= 20) == (429, True)
        assert api.services.pool.get_stats().get("requests_num", 0) == asked

        assert (await guesser.call("GET", "/api/v1/balance", key=known)).status_code == 200
        assert (await neighbour.call("GET", "/api/v1/balance", key=unused)).status_code == 200
        assert (await neighbour.call("GET", "/api/v1/balance", key="sk-x")).status_code == 401


# --- CORS ---


OURS = "https://console.example.com"


async def _from_page(
    api: Api, method: str, path: str, origin: str, *allowed: str
) -> httpx.Response:
    is_data = path.startswith("/v1/")
    app = DataPlane(api.services) if is_data else make_application(api.services, no_lifespan)
    headers = {"origin": origin}
    if method == "OPTIONS":
        headers["access-control-request-method"] = "POST"
        headers["access-control-request-headers"] = "authorization,x-stainless-lang"
    transport = httpx.ASGITransport(open_to_browsers(app, allowed))
    async with httpx.AsyncClient(transport=transport, base_url="http://tallygate") as client:
        return await client.request(method, path, headers=headers)


async def test_pages_of_configured_origins_may_call_and_others_not(api: Api) -> None:
    for path in ("/v1/models", "/api/v1/balance", "/admin/v1/accounts"):
        answer = await _from_page(api, "OPTIONS", path, OURS, OURS)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, OURS)
        assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
        # An error is as readable as an answer.
        answer = await _from_page(api, "GET", path, OURS, OURS)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, OURS)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        for refused in (
            await _from_page(api, "OPTIONS", path, "https://evil.example.com", OURS),
            await _from_page(api, "GET", path, "https://evil.example.com", OURS),
            await _from_page(api, "OPTIONS", path, OURS),
        ):
            assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("origin", ["console.example.com", "https://x/", "https://x/y", "null"])
def test_origin_that_is_none_is_named(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="is no origin"):
        load_settings({}, cors={"allowed_origins": [origin]})


# --- the request log ---


async def test_each_call_of_both_apis_is_a_line_of_the_log_without_any_key(
    database_url: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO, "tallygate.request")
    async with open_api(database_url, tmp_path) as api:
        account_id = await api.new_account()
        made = await api.new_key(account_id)
        await api.on("192.0.2.1").call("GET", "/api/v1/balance", key=made["key"])
        await api.call("GET", "/api/v1/balance?key=sk-secret-in-an-address", key="sk-wrong-secret")
        await api.call("GET", "/livez")
        await api.call("GET", "/admin/v1/sk-secret-in-an-address", key=ADMIN_KEY)
        api.services.request_log.flush()
    text = capfd.readouterr().err
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    told = [
        {name: line[name] for name in ("plane", "operation", "caller", "status", "address")}
        | ({"account_id": line["account_id"]} if "account_id" in line else {})
        for line in lines
        if "plane" in line
    ]
    here = {"address": "127.0.0.1"}
    accounts, key = "POST /admin/v1/accounts", f"key:{made['id']}"
    balance = "GET /api/v1/balance"
    assert told == [
        {"plane": "admin", "operation": accounts, "caller": "admin", "status": 201, **here},
        {
            "plane": "admin",
            "operation": f"{accounts}/{{account_id}}/keys",
            "caller": "admin",
            "status": 201,
            "account_id": account_id,
            **here,
        },
        {
            "plane": "account",
            "operation": balance,
            "caller": key,
            "status": 200,
            "address": "192.0.2.1",
        },
        {"plane": "account", "operation": balance, "caller": None, "status": 401, **here},
        {"plane": "admin", "operation": None, "caller": None, "status": 404, **here},
    ]
    assert all(line["ms"] >= 0 and line["request_id"] for line in lines)
    for secret in (made["key"], ADMIN_KEY, "secret-in-an-address", "wrong-secret"):
        assert secret not in text
