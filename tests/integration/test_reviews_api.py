"""The review queue as an operator meets it: over the admin API and from a shell."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from proxy.cli import main
from proxy.ids import uuid7
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import Api
from tests.support.service import ADMIN_KEY

Run = Callable[..., Any]
CREDIT = 1_000_000


@pytest.fixture
def money(account: NewAccount) -> Money:
    """An account, and a price book that doubles costs."""
    made = account(funds=1000 * CREDIT)
    made.one(
        "SELECT publish_price_book(%s, %s, %s, 'test')",
        json.dumps({"default": {"kind": "markup", "factor": "2.0"}}),
        CREDIT,
        uuid7(),
    )
    return made


def uncharged(money: Money, **changes: object) -> str:
    request = money.hold(400 * CREDIT, **changes)
    money.settle(void(request, status="needs_review", review_reason="usage_missing"))
    return str(request["request_id"])


def doubted(money: Money) -> str:
    request = money.hold(400 * CREDIT)
    money.settle(capture(request, 90 * CREDIT, review_reason="cost_mismatch"))
    return str(request["request_id"])


def decision(money: Money, kind: str, **price: object) -> dict[str, object]:
    return {
        "account_id": str(money.account_id),
        "decision": kind,
        "reason": "the provider's invoice says so",
        **price,
    }


# --- over HTTP ---


@pytest.mark.anyio
async def test_a_decision_answers_with_the_request_and_again_the_same(
    api: Api, money: Money
) -> None:
    path, body = f"/reviews/{uncharged(money)}", decision(money, "charge", credits="12.5")
    row = await api.admin("POST", path, body)
    assert (row["status"], row["price"]["credits"]) == ("billed", "12.5")
    assert (row["resolution"], row["rule"], row["cost"]) == ("charge", "review", None)
    assert row["resolved_at"].endswith("Z")
    assert await api.admin("POST", path, body) == row
    assert (await api.admin("GET", "/reviews"))["data"] == []
    (event, *_) = (await api.admin("GET", "/audit-trail"))["data"]
    assert (event["actor"], event["action"]) == ("admin", "review.charge")
    assert event["detail"]["reason"] == body["reason"]
    assert event["account_id"] == str(money.account_id)


@pytest.mark.anyio
async def test_a_cost_is_priced_by_the_rule(api: Api, money: Money) -> None:
    request_id = doubted(money)
    row = await api.admin(
        "POST", f"/reviews/{request_id}", decision(money, "reprice", cost_usd="0.00001")
    )
    assert (row["price"]["usd"], row["cost"]["usd"]) == ("0.00002", "0.00001")
    assert (row["cost_source"], row["rule"], row["markup"]) == ("review", "default", "2")
    (entry, *_) = (await api.admin("GET", f"/accounts/{money.account_id}/ledger"))["data"]
    assert (entry["kind"], entry["request_id"]) == ("correction", request_id)
    assert (entry["amount"]["credits"], entry["posted_after"]["credits"]) == ("89.98", "999.98")


@pytest.mark.anyio
async def test_the_customer_sees_the_price_and_its_correction(api: Api, money: Money) -> None:
    request_id = doubted(money)
    await api.admin("POST", f"/reviews/{request_id}", decision(money, "reprice", credits="40"))
    key = (await api.new_key(str(money.account_id)))["key"]
    answer = await api.call("GET", f"/api/v1/usage/{request_id}", key=key)
    assert answer.status_code == 200, answer.text
    shown = answer.json()
    assert (shown["price"]["credits"], shown["captured"]["credits"]) == ("40", "40")
    assert (shown["lines"], shown["status"]) == (None, "billed")
    kinds = [(entry["kind"], entry["amount"]["credits"]) for entry in shown["entries"]]
    assert kinds == [("hold", "400"), ("capture", "90"), ("correction", "50")]
    assert "invoice" not in answer.text


@pytest.mark.anyio
async def test_what_does_not_fit_is_a_conflict(api: Api, money: Money) -> None:
    waiting, charged = uncharged(money), doubted(money)
    path = "/admin/v1/reviews/"

    async def refused(request_id: str, kind: str, **price: object) -> str:
        body = decision(money, kind, **price)
        error = await api.refused("POST", path + request_id, 409, json=body)
        return error["message"]

    assert "was not charged" in await refused(waiting, "reprice", credits="1")
    assert "charged already" in await refused(charged, "charge", credits="1")
    await api.admin("POST", f"/reviews/{waiting}", decision(money, "waive"))
    assert "decided on before (waive)" in await refused(waiting, "charge", credits="1")
    request = money.hold(1)
    money.settle(void(request))
    assert "waits for no decision" in await refused(str(request["request_id"]), "waive")


@pytest.mark.anyio
@pytest.mark.parametrize("request_id", ["x", "46d14596-0380-4c4e-8803-8153a1fbfd09", "%00"])
async def test_what_is_not_there_is_not_found(api: Api, money: Money, request_id: str) -> None:
    await api.refused("POST", f"/admin/v1/reviews/{request_id}", 404, json=decision(money, "waive"))


@pytest.mark.anyio
async def test_another_accounts_request_is_not_found(
    api: Api, money: Money, account: NewAccount
) -> None:
    body = decision(account(), "waive")
    await api.refused("POST", f"/admin/v1/reviews/{uncharged(money)}", 404, json=body)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "change, param",
    [
        ({"decision": "forgive"}, "decision"),
        ({"decision": "waive", "credits": "1"}, "credits"),
        ({"decision": "waive", "cost_usd": "1"}, "cost_usd"),
        ({"decision": "charge"}, "credits"),
        ({"credits": "1", "cost_usd": "1"}, "credits"),
        ({"credits": "0"}, "credits"),
        ({"credits": "-1"}, "credits"),
        ({"credits": 1.5}, "credits"),
        ({"credits": "1e30"}, "credits"),
        ({"cost_usd": "lots"}, "cost_usd"),
        ({"cost_usd": "1000001"}, "cost_usd"),
        ({"credits": "1", "reason": " "}, "reason"),
        ({"credits": "1", "account_id": "x"}, "account_id"),
        ({"credits": "1", "price": "1"}, "price"),
    ],
)
async def test_a_decision_that_makes_no_sense_is_refused(
    api: Api, money: Money, change: dict[str, object], param: str
) -> None:
    body = {**decision(money, "charge"), **change}
    path = f"/admin/v1/reviews/{uncharged(money)}"
    error = await api.refused("POST", path, 400, json=body)
    assert error["param"] == param
    assert money.balance() == (1000 * CREDIT, 0, 0)


@pytest.mark.anyio
async def test_a_cost_that_no_rule_prices_is_refused(api: Api, money: Money) -> None:
    book = {"default": {"kind": "per_token", "credits": {"input": "1", "output": "1"}}}
    money.one("SELECT publish_price_book(%s, 1, %s, 'test')", json.dumps(book), uuid4())
    path = f"/admin/v1/reviews/{uncharged(money, price_version=2)}"
    error = await api.refused("POST", path, 400, json=decision(money, "charge", cost_usd="1"))
    assert error["param"] == "cost_usd"
    assert "Name a price in credits" in error["message"]


@pytest.mark.anyio
async def test_the_queue_is_filtered_and_summed_up(
    api: Api, money: Money, account: NewAccount
) -> None:
    missing, doubt = uncharged(money, model="m1"), doubted(money)
    other = uncharged(account(funds=1000 * CREDIT))

    async def listed(**filters: object) -> list[str]:
        page = await api.admin("GET", "/reviews", params=filters)
        return [row["request_id"] for row in page["data"]]

    assert await listed() == [other, doubt, missing]
    assert await listed(reason="usage_missing") == [other, missing]
    assert await listed(account_id=str(money.account_id)) == [doubt, missing]
    assert await listed(model="m1") == [missing]
    assert await listed(older_than_s=3600) == []
    assert await listed(older_than_s=0, reason="cost_mismatch") == [doubt]
    by_reason = (await api.admin("GET", "/reviews/summary"))["data"]
    assert [(row["reason"], row["charged"], row["requests"]) for row in by_reason] == [
        ("usage_missing", False, 2),
        ("cost_mismatch", True, 1),
    ]
    assert by_reason[0]["held"]["credits"] == "800"
    assert by_reason[0]["oldest_at"].endswith("Z")
    scrape = (await api.call("GET", "/metrics")).text
    assert 'tallygate_reviews_waiting{reason="usage_missing"} 2.0' in scrape


@pytest.mark.anyio
@pytest.mark.parametrize(
    "name, value",
    [
        ("account_id", "x"),
        ("older_than_s", "-1"),
        ("older_than_s", "1d"),
        ("older_than_s", "9999999999"),
        ("model", "\x00"),
        ("reason", "\x00"),
    ],
)
async def test_a_filter_that_makes_no_sense_is_refused(api: Api, name: str, value: str) -> None:
    error = await api.refused("GET", "/admin/v1/reviews", 400, params={name: value})
    assert error["param"] == name


@pytest.mark.anyio
async def test_nobody_decides_without_the_admin_key(api: Api, money: Money) -> None:
    path = f"/admin/v1/reviews/{uncharged(money)}"
    for key, status in ((None, 401), ("wrong", 403)):
        await api.refused("POST", path, status, key=key, json=decision(money, "waive"))
        await api.refused("GET", "/admin/v1/reviews/summary", status, key=key)
    await api.refused("GET", path, 405, key=ADMIN_KEY)


# --- from a shell ---


@pytest.fixture
def run(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `tallygate review …`; returns its document, or its text where it fails."""
    monkeypatch.setenv("TALLYGATE_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYGATE_DATA_DIR", str(tmp_path))

    def call(*argv: str, code: int = 0, plain: bool = False) -> Any:
        with pytest.raises(SystemExit) as ended:
            main(["review", *argv] if plain else ["review", *argv, "--json"])
        output = capsys.readouterr()
        assert ended.value.code == code, output
        return output.out + output.err if plain or code else json.loads(output.out)

    return call


def test_the_queue_is_worked_off_from_a_shell(run: Run, money: Money, database_url: str) -> None:
    first, second = uncharged(money, model="m1"), doubted(money)
    account_id = str(money.account_id)

    assert [row["request_id"] for row in run("list")["data"]] == [second, first]
    (row,) = run("list", "--reason", "usage_missing", "--model", "m1", "--account", account_id)[
        "data"
    ]
    assert (row["request_id"], row["price_credits"], row["cost_usd"]) == (first, None, None)
    assert len(run("list", "--limit", "1")["data"]) == 1
    assert run("list", "--older-than", "1h") == {"data": []}
    summed = run("summary")["data"]
    assert {(row["reason"], row["requests"], row["held_credits"]) for row in summed} == {
        ("usage_missing", 1, "400"),
        ("cost_mismatch", 1, "400"),
    }

    charge = ("resolve", account_id, first, "charge", "--cost-usd", "0.001", "--reason", "invoice")
    done = run(*charge)
    assert (done["outcome"], done["price_credits"], done["status"]) == ("resolved", "2", "billed")
    assert run(*charge)["outcome"] == "exists"
    waived = run("resolve", account_id, second, "waive", "--reason", "good enough")
    assert (waived["status"], waived["resolution"]) == ("billed", "waive")

    assert run("list", plain=True) == "none\n"
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT actor, action FROM tallygate.audit_trail WHERE action LIKE 'review.%'"
            " ORDER BY event_id"
        ).fetchall()
    assert rows == [("cli", "review.charge"), ("cli", "review.waive")]


def test_a_shell_is_told_what_can_not_be_done(run: Run, money: Money) -> None:
    account_id, request_id = str(money.account_id), uncharged(money)

    def refused(*argv: str, code: int = 1) -> str:
        return run("resolve", account_id, *argv, "--reason", "r", code=code)

    assert "has no request" in refused(str(uuid4()), "waive")
    assert "Name either" in refused(request_id, "charge")
    assert "was not charged" in refused(request_id, "reprice", "--credits", "1")
    assert "not allowed with" in refused(
        request_id, "charge", "--credits", "1", "--cost-usd", "1", code=2
    )
    run("resolve", account_id, request_id, "waive", "--reason", "r")
    assert "decided on before (waive)" in refused(request_id, "charge", "--credits", "1")
    text = run("resolve", account_id, request_id, "waive", "--reason", "r", plain=True)
    assert "outcome" in text
