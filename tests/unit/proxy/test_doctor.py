"""What the doctor says of LiteLLM, the spool and the admin key."""

from pathlib import Path
from typing import Any

import pytest
import respx

from proxy.doctor import Check, check_admin_key, check_litellm, check_spool
from proxy.spool import Spool

URL = "http://litellm.test"
PRICED = {"input_cost_per_token": 1e-6, "output_cost_per_token": 2e-6}


def litellm(
    mock: respx.MockRouter,
    *,
    models: dict[str, dict[str, Any]] | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    rows = [
        {"model_name": name, "model_info": info, "litellm_params": {}}
        for name, info in (models if models is not None else {"m": PRICED}).items()
    ]
    mock.get("/health/liveliness").respond(json="alive")
    mock.get("/model/info", headers={"authorization": "Bearer sk-m"}).respond(json={"data": rows})
    mock.get("/health/readiness/details").respond(
        json={"litellm_version": "1.106.2", "cache": None} if details is None else details
    )


async def look() -> dict[str, Check]:
    return {check.name: check for check in await check_litellm(URL, "sk-m")}


@pytest.mark.anyio
async def test_a_litellm_as_it_should_be_is_ok() -> None:
    with respx.mock(base_url=URL) as mock:
        litellm(mock)
        checks = await look()
    assert {check.status for check in checks.values()} == {"ok"}
    assert checks["litellm_version"].found == "1.106.2"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "version, status, remedy",
    [
        ("1.102.0", "fail", "leaks"),
        ("1.50.1", "fail", "leaks"),
        ("1.82.7", "fail", "backdoored"),
        ("1.82.8", "fail", "backdoored"),
        ("1.103.0", "warn", "1.106.2"),
        ("1.109.1", "warn", "1.106.2"),
        ("nightly", "warn", "1.106.2"),
    ],
)
async def test_versions_that_were_not_tested_are_named(
    version: str, status: str, remedy: str
) -> None:
    with respx.mock(base_url=URL) as mock:
        litellm(mock, details={"litellm_version": version, "cache": None})
        check = (await look())["litellm_version"]
    assert (check.status, check.found) == (status, version)
    assert remedy in check.remedy


@pytest.mark.anyio
async def test_a_litellm_that_tells_nothing_of_itself_is_worth_a_look() -> None:
    with respx.mock(base_url=URL, assert_all_called=False) as mock:
        mock.get("/health/readiness/details").respond(404)
        litellm(mock)
        mock.get("/health/readiness/details").respond(404)
        check = (await look())["litellm_version"]
    assert (check.status, check.found) == ("warn", "not told")


@pytest.mark.anyio
async def test_unpriced_models_and_a_cache_are_warned_of() -> None:
    models = {f"free-for-all-{number:02}": {} for number in range(22)} | {"m": PRICED}
    with respx.mock(base_url=URL) as mock:
        litellm(mock, models=models, details={"litellm_version": "1.106.2", "cache": "redis"})
        checks = await look()
    assert checks["litellm_cache"].status == "warn"
    assert checks["models"].status == "warn"
    assert checks["models"].found.startswith("1 priced, unpriced: free-for-all-00, ")
    assert checks["models"].found.endswith("and 2 more")


@pytest.mark.anyio
async def test_a_litellm_without_models_is_warned_of() -> None:
    with respx.mock(base_url=URL) as mock:
        litellm(mock, models={})
        check = (await look())["models"]
    assert (check.status, check.found) == ("warn", "0 priced")


@pytest.mark.anyio
async def test_a_litellm_that_is_away_or_refuses_the_key_fails() -> None:
    with respx.mock(base_url=URL) as mock:
        alive = mock.get("/health/liveliness").respond(503)
        away = (await look())["litellm"]
        alive.respond(200)
        mock.get("/model/info").respond(401)
        refused = (await look())["litellm"]
    assert (away.status, refused.status) == ("fail", "fail")
    assert URL in away.found
    assert refused.found == "answers 401 to GET /model/info"
    assert "TALLYGATE_LITELLM_KEY" in refused.remedy


@pytest.mark.anyio
async def test_something_that_is_no_litellm_fails() -> None:
    with respx.mock(base_url=URL) as mock:
        mock.get("/health/liveliness").respond(200)
        mock.get("/model/info").respond(text="<html>")
        check = (await look())["litellm"]
    assert check.status == "fail"
    assert "no list of models" in check.found


def test_what_waits_in_the_spool_is_reported(tmp_path: Path) -> None:
    assert [check.status for check in check_spool(tmp_path)] == ["ok", "ok"]
    assert not (tmp_path / "spool").exists()

    spool = Spool(tmp_path / "spool")
    spool.append([b"{}"])
    spool.set_aside(b"{}")
    spool.close()

    waiting, rejected = check_spool(tmp_path)
    assert (waiting.status, rejected.status) == ("warn", "fail")
    assert rejected.found.startswith("1 in ")


@pytest.mark.parametrize(
    "key, status", [(None, "warn"), ("", "warn"), ("short", "fail"), ("k" * 16, "ok")]
)
def test_the_admin_key_is_long_enough_and_not_shown(key: str | None, status: str) -> None:
    check = check_admin_key(key)
    assert check.status == status
    assert not key or key not in check.found + check.remedy
