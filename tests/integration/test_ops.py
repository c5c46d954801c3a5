"""Ops endpoints: who may ask, what is down, what a scrape shows."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import respx
from prometheus_client.parser import text_string_to_metric_families

from proxy.ids import uuid7
from proxy.spool import Spool
from tests.integration.money import NewAccount, void
from tests.support.api import LITELLM_URL, OPS_TOKEN, Api, open_api

pytestmark = pytest.mark.anyio

PATHS = ["/livez", "/readyz", "/metrics"]
MODEL = {"model_name": "demo", "model_info": {}, "litellm_params": {"model": "openai/demo"}}


@pytest.fixture
def litellm() -> Iterator[respx.MockRouter]:
    """A LiteLLM that is well."""
    with respx.mock(base_url=LITELLM_URL, assert_all_called=False) as router:
        router.get("/health/liveliness").respond(200, json="I'm alive!")
        router.get("/model/info").respond(200, json={"data": [MODEL]})
        yield router


async def _make_ready(api: Api) -> None:
    rule = {"default": {"kind": "markup", "factor": "2.0"}}
    await api.services.price_books.publish(rule, nanos_per_credit=1_000_000, actor="config")
    await api.services.price_books.refresh()
    assert await api.services.catalog.refresh()


async def _scrape(api: Api) -> dict[str, float]:
    answer = await api.call("GET", "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if not sample.labels
    }


# --- who may ask ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_loopback_needs_no_token(api: Api, host: str) -> None:
    assert (await api.on(host).call("GET", "/livez")).json() == {"status": "alive"}


@pytest.mark.parametrize("host", ["10.0.0.7", "::ffff:10.0.0.7", "2001:db8::1", "localhost", ""])
async def test_everybody_else_needs_the_token(api: Api, host: str) -> None:
    remote = api.on(host)
    for path in PATHS:
        for key in (None, "wrong"):
            error = await remote.refused("GET", path, 403, key=key)
            assert (error["code"], "TALLYGATE_OPS_TOKEN" in error["message"]) == ("ops_only", True)
    assert (await remote.call("GET", "/livez", key=OPS_TOKEN)).status_code == 200


async def test_without_a_token_only_loopback_may_ask(api: Api) -> None:
    remote = api.with_(ops_token=None).on("10.0.0.7")
    for key in (None, OPS_TOKEN):
        error = await remote.refused("GET", "/metrics", 403, key=key)
        assert "TALLYGATE_OPS_TOKEN" in error["message"]


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
async def test_whoever_comes_through_a_proxy_on_loopback_is_not_on_loopback(
    api: Api, header: str
) -> None:
    await api.refused("GET", "/metrics", 403, key=None, headers={header: "127.0.0.1"})
    answer = await api.call("GET", "/livez", key=OPS_TOKEN, headers={header: "1.2.3.4"})
    assert answer.status_code == 200


# --- readiness ---


async def test_ready_when_everything_is_there(api: Api, litellm: respx.MockRouter) -> None:
    assert litellm
    await _make_ready(api)
    answer = await api.call("GET", "/readyz")
    assert (answer.status_code, answer.json()) == (
        200,
        {
            "status": "ready",
            "down": {},
            "checks": dict.fromkeys(("postgresql", "litellm", "catalog", "price_book"), "ok"),
            "spool": {"bytes": 0, "rejected": 0},
        },
    )


async def test_not_ready_before_catalog_and_price_book_were_read(
    api: Api, litellm: respx.MockRouter
) -> None:
    assert litellm
    answer = await api.call("GET", "/readyz")
    assert answer.status_code == 503
    assert set(answer.json()["down"]) == {"catalog", "price_book"}


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.Response(500)]
)
async def test_not_ready_while_litellm_is_away(
    api: Api, litellm: respx.MockRouter, failure: Any
) -> None:
    await _make_ready(api)
    if isinstance(failure, httpx.Response):
        litellm.get("/health/liveliness").mock(return_value=failure)
    else:
        litellm.get("/health/liveliness").mock(side_effect=failure)
    answer = await api.call("GET", "/readyz")
    assert answer.status_code == 503
    assert list(answer.json()["down"]) == ["litellm"]
    assert "TALLYGATE_LITELLM_URL" in answer.json()["down"]["litellm"]


async def test_postgresql_away_is_told_and_the_scrape_still_answers(
    tmp_path: Path, litellm: respx.MockRouter
) -> None:
    assert litellm
    async with open_api("postgresql://nobody@127.0.0.1:1/x", tmp_path) as api:
        ready = await api.call("GET", "/readyz")
        values = await _scrape(api)
        assert (await api.call("GET", "/livez")).status_code == 200
    assert ready.status_code == 503
    assert ready.json()["checks"]["postgresql"] == "down"
    assert values["tallygate_postgresql_up"] == 0
    assert values["tallygate_spool_bytes"] == 0
    assert "tallygate_holds_open" not in values


# --- metrics ---


async def test_scrape_of_an_idle_ledger(api: Api) -> None:
    values = await _scrape(api)
    shown = {name: value for name, value in values.items() if name in {
        "tallygate_postgresql_up",
        "tallygate_holds_open",
        "tallygate_reserved_usd",
        "tallygate_review_queue",
        "tallygate_review_oldest_seconds",
        "tallygate_misplaced_rows",
        "tallygate_audit_last_clean_timestamp_seconds",
        "tallygate_audit_findings",
        "tallygate_spool_bytes",
        "tallygate_settlements_rejected_waiting",
    }}  # fmt: skip
    assert len(shown) == 10
    assert shown.pop("tallygate_postgresql_up") == 1
    assert set(shown.values()) == {0}


async def test_scrape_shows_holds_and_what_waits_for_review(
    api: Api, account: NewAccount, database_url: str
) -> None:
    money = account(funds=1_000_000_000)
    money.hold(250_000_000)
    money.settle(void(money.hold(5), status="needs_review", review_reason="cost_unknown"))
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE tallygate.usage SET created_at = created_at - interval '1 hour'")
    values = await _scrape(api)
    assert (values["tallygate_holds_open"], values["tallygate_reserved_usd"]) == (1, 0.25)
    assert values["tallygate_review_queue"] == 1
    assert 3600 <= values["tallygate_review_oldest_seconds"] < 3700


async def test_scrape_shows_rows_that_fit_no_month(api: Api, account: NewAccount) -> None:
    money = account(funds=1_000_000_000)
    # An id by a clock that is thousands of years fast: two entries and a usage row.
    request = money.hold(5, request_id="ffffffff-0000-7000-8000-000000000000")
    money.settle(void(request))
    assert (await _scrape(api))["tallygate_misplaced_rows"] == 3


async def test_scrape_shows_what_audits_found(api: Api, account: NewAccount) -> None:
    money = account()
    for findings in (0, 3):
        money.one("SELECT record_audit(%s, 'full', 0, %s, 0, 0)", uuid7(), findings)
    values = await _scrape(api)
    assert values["tallygate_audit_findings"] == 3
    assert abs(values["tallygate_audit_last_clean_timestamp_seconds"] - time.time()) < 60


async def test_spool_is_told_in_scrape_and_readiness(
    api: Api, tmp_path: Path, litellm: respx.MockRouter
) -> None:
    assert litellm
    neighbour = Spool(tmp_path / "spool")
    neighbour.append([b"{}"])
    neighbour.set_aside(b"{}")
    values = await _scrape(api)
    spool = (await api.call("GET", "/readyz")).json()["spool"]
    neighbour.close()
    assert values["tallygate_spool_bytes"] == spool["bytes"] > 0
    assert values["tallygate_settlements_rejected_waiting"] == spool["rejected"] == 1


async def test_scrape_has_the_counters_and_no_account_or_key(api: Api, account: NewAccount) -> None:
    money = account(funds=5)
    made = await api.new_key(str(money.account_id))
    text = (await api.call("GET", "/metrics")).text
    assert "# TYPE tallygate_requests_total counter" in text
    assert "tallygate_sold_usd_total" in text
    for secret in (str(money.account_id), str(money.key_id), made["id"], made["key"]):
        assert secret not in text


async def test_scrape_of_one_worker_sums_up_all(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "metrics"
    directory.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    count = "from proxy.metrics import HOLDS_EXPIRED; HOLDS_EXPIRED.inc(2)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", count], check=True)  # noqa: ASYNC221 - a worker
    values = await _scrape(api)
    assert values["tallygate_holds_expired_total"] == 4
    assert values["tallygate_postgresql_up"] == 1
