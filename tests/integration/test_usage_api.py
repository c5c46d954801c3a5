"""Filters, summaries, downloads, statements and forecasts: exact, bounded, and one's own alone."""

import csv
import io
import json
import tracemalloc
from collections.abc import AsyncIterator, MutableMapping
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from starlette.requests import Request

from proxy import history
from proxy.api.exports import PART, Download
from proxy.api.usage_views import UsageViews
from proxy.ids import uuid7
from tests.integration.money import Money, NewAccount, capture, void
from tests.integration.test_rollups import id_at
from tests.support.api import Api

pytestmark = pytest.mark.anyio

NOW = datetime.now(UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Customer:
    """An account that the ledger knows, with a key that may do everything."""

    def __init__(self, api: Api, money: Money, key: str) -> None:
        self.api = api
        self.money = money
        self.key = key

    async def call(self, path: str, method: str = "GET", **request: Any) -> Any:
        answer = await self.api.call(method, f"/api/v1{path}", key=self.key, **request)
        assert answer.is_success, answer.text
        return answer

    async def get(self, path: str, **params: object) -> Any:
        return (await self.call(path, params=params)).json()

    async def ids(self, **params: object) -> list[str]:
        """The requests that a filter finds, over all pages."""
        found: list[str] = []
        while True:
            page = await self.get("/usage", **params)
            found += [row["request_id"] for row in page["data"]]
            if page["next_cursor"] is None:
                return found
            params["cursor"] = page["next_cursor"]

    def used(self, before: timedelta, price: int = 100, **request: Any) -> str:
        """Have a request of that long ago be charged."""
        change = {name: request.pop(name) for name in ("error_code",) if name in request}
        held = self.money.hold(1000, request_id=id_at(NOW - before), **request)
        self.money.settle(capture(held, price, **change))
        return str(held["request_id"])


@pytest.fixture
async def customer(api: Api, account: NewAccount) -> Customer:
    money = account(funds=1_000_000_000)
    key = await api.new_key(str(money.account_id), role="manage")
    return Customer(api, money, key["key"])


async def test_requests_are_found_by_each_filter(customer: Customer) -> None:
    project = str(uuid7())
    old = customer.used(3 * HOUR, model="a")
    embedding = customer.used(2 * HOUR, model="b", endpoint="embeddings")
    customer.money.connection.execute(
        "UPDATE usage SET project_id = %s WHERE request_id = %s", (project, embedding)
    )
    pending = str(customer.money.hold(5, model="a")["request_id"])
    middle = (NOW - 2.5 * HOUR).isoformat()

    assert await customer.ids() == [pending, embedding, old]
    assert await customer.ids(model="a") == [pending, old]
    assert await customer.ids(endpoint="embeddings") == [embedding]
    assert await customer.ids(status="pending") == [pending]
    assert await customer.ids(project_id=project) == [embedding]
    assert await customer.ids(key_id=str(customer.money.key_id), status="billed") == [
        embedding,
        old,
    ]
    assert await customer.ids(key_id=str(uuid7())) == []
    assert await customer.ids(since=middle) == [pending, embedding]
    assert await customer.ids(until=middle) == [old]
    assert await customer.ids(since=middle, until=middle) == []
    assert await customer.ids(until="1970-01-01T00:00:00Z") == []
    admin = await customer.api.admin(
        "GET", f"/accounts/{customer.money.account_id}/usage", params={"model": "b"}
    )
    assert [row["request_id"] for row in admin["data"]] == [embedding]


@pytest.mark.parametrize(
    "params",
    [
        {"since": "yesterday"},
        {"since": "2026-01-01T00:00:00"},
        {"until": "0001-01-01T00:00:00+23:59"},
        {"status": "lost"},
        {"key_id": "7"},
        {"model": "a\x00"},
        {"model": ""},
        {"endpoint": "e" * 300},
    ],
)
async def test_a_filter_that_is_none_is_explained(
    params: dict[str, str], customer: Customer
) -> None:
    for path in ("/usage", "/usage/summary", "/usage/export"):
        where = f"/api/v1{path}"
        error = await customer.api.refused("GET", where, 400, key=customer.key, params=params)
        assert error["param"] in params


async def test_a_page_looks_at_so_many_rows_and_leads_on(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = customer.used(9 * HOUR, model="rare")
    for hours in range(8):
        customer.used(hours * HOUR)
    monkeypatch.setattr(history, "STRETCH", 3)
    page = await customer.get("/usage", model="rare")
    assert page["data"] == []
    assert page["next_cursor"] is not None
    assert await customer.ids(model="rare") == [rare]
    seqs: list[int] = []
    params: dict[str, object] = {"kind": "grant", "limit": 1}
    while True:
        page = await customer.get("/ledger", **params)
        seqs += [row["seq"] for row in page["data"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
    assert seqs == [1]
    for path, filter_ in (("/usage", {"model": "rare"}), ("/ledger", {"kind": "grant"})):
        lines = (await customer.call(f"{path}/export", params={**filter_, "format": "jsonl"})).text
        assert len(lines.splitlines()) == 1


async def test_ledger_entries_are_found_by_time_and_kind(customer: Customer) -> None:
    customer.used(HOUR)
    first, *_ = reversed((await customer.get("/ledger"))["data"])
    later = await customer.get("/ledger", since=(NOW + DAY).isoformat())
    assert later == {"data": [], "next_cursor": None}
    assert len((await customer.get("/ledger", until=(NOW + DAY).isoformat()))["data"]) == 3
    assert (await customer.get("/ledger", until=(NOW - DAY).isoformat()))["data"] == []
    assert (await customer.get("/ledger", kind="grant"))["data"] == [first]
    assert [row["kind"] for row in (await customer.get("/ledger", kind="capture"))["data"]] == [
        "capture"
    ]
    assert (await customer.get("/ledger", kind="nonsense"))["data"] == []


async def test_a_summary_adds_up_by_group(customer: Customer) -> None:
    customer.used(HOUR, price=300, model="a")
    customer.used(HOUR, price=200, model="b", error_code="cut")
    customer.used(DAY + HOUR, price=7, model="a")

    by_model = await customer.get("/usage/summary", group_by="model")

    assert [(row["model"], row["requests"], row["failed"]) for row in by_model["data"]] == [
        ("a", 2, 0),
        ("b", 1, 1),
    ]
    assert by_model["data"][0]["price"] == {"credits": "0.000307", "usd": "0.000000307"}
    assert by_model["total"]["price"]["usd"] == "0.000000507"
    assert by_model["total"]["usage"]["input_tokens"] == 9
    assert by_model["total"]["usage"]["images"] is None
    by_both = await customer.get("/usage/summary", group_by="day,key")
    assert {tuple(row)[:2] for row in by_both["data"]} == {("day", "key_id")}
    assert [row["requests"] for row in by_both["data"]] == [2, 1]
    recent = await customer.get("/usage/summary", since=(NOW - 2 * HOUR).isoformat(), model="a")
    assert recent["total"]["requests"] == 1
    nothing = await customer.get("/usage/summary", since="2020-01-01T00:00:00Z", model="none")
    assert nothing["data"] == []
    assert nothing["total"]["requests"] == 0
    admin = await customer.api.admin(
        "GET", f"/accounts/{customer.money.account_id}/usage/summary", params={"group_by": "tier"}
    )
    (row,) = admin["data"]
    assert (row["tier"], row["cost"]["picos"], row["margin"]["picos"]) == (
        "default",
        "253500",
        "253500",
    )


@pytest.mark.parametrize("by", ["", "price", "model,day,key", "day,day", "model,"])
async def test_an_unknown_group_is_explained(by: str, customer: Customer) -> None:
    path = "/api/v1/usage/summary"
    error = await customer.api.refused("GET", path, 400, key=customer.key, params={"group_by": by})
    assert error["param"] == "group_by"


async def test_too_many_groups_are_refused(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.api.usage_views.MAX_GROUPS", 1)
    customer.used(HOUR)
    await customer.get("/usage/summary", group_by="model")
    customer.used(HOUR, model="other")
    path = "/api/v1/usage/summary"
    await customer.api.refused("GET", path, 400, key=customer.key, params={"group_by": "model"})


async def test_statistics_tell_of_the_whole_house(customer: Customer, account: NewAccount) -> None:
    other = account(funds=1000)
    customer.used(HOUR, price=300, model="a")
    other.settle(void(other.hold(10, model="b"), error_code="upstream_error", cost_picos=99))
    byok = other.hold(0, model="b", byok=True)
    other.settle(capture(byok, 5, status="byok", cost_picos=1_000_000))
    account()

    stats = await customer.api.admin("GET", "/stats")

    assert stats["total"]["requests"] == 3
    assert stats["total"]["failed"] == 1
    assert stats["total"]["revenue"]["usd"] == "0.000000305"
    assert stats["total"]["cost"]["picos"] == str(300 * 500 + 99)
    assert stats["total"]["margin"]["picos"] == str(305_000 - 150_099)
    assert [row["model"] for row in stats["by_model"]] == ["a", "b"]
    assert stats["failed"] == [
        {"endpoint": "chat.completions", "error_code": "upstream_error", "requests": 1}
    ]
    assert stats["accounts"] == [{"tier": "default", "accounts": 3, "open": 3, "active": 2}]
    assert sum(row["requests"] for row in stats["by_day"]) == 3
    quiet = await customer.api.admin(
        "GET", "/stats", params={"first_day": "2020-01-01", "last_day": "2020-01-02"}
    )
    assert quiet["total"]["requests"] == 0
    assert quiet["accounts"][0]["active"] == 0
    for params in (
        {"first_day": "x"},
        {"last_day": "1969-12-31"},
        {"first_day": "2026-02-01", "last_day": "2026-01-01"},
        {"first_day": "2020-01-01", "last_day": "2026-01-01"},
    ):
        await customer.api.refused("GET", "/admin/v1/stats", 400, params=params)


async def test_an_export_has_every_row_once_and_oldest_first(customer: Customer) -> None:
    wanted = [customer.used((PART + 5 - n) * timedelta(minutes=1)) for n in range(PART + 3)]

    answer = await customer.call("/usage/export")

    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"] == (
        f'attachment; filename="usage-{datetime.now(UTC):%Y-%m-%d}.csv"'
    )
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert [row["request_id"] for row in rows] == wanted
    assert rows[0]["price_usd"] == "0.0000001"
    assert rows[0]["images"] == ""
    assert answer.text.count("\r\n") == len(wanted) + 1
    lines = (await customer.call("/usage/export", params={"format": "jsonl"})).text.splitlines()
    listed = (await customer.get("/usage", limit=1))["data"][0]
    assert json.loads(lines[-1]) == listed
    ledger = (await customer.call("/ledger/export")).text
    seqs = [int(row["seq"]) for row in csv.DictReader(io.StringIO(ledger, newline=""))]
    assert seqs == list(range(1, 2 * len(wanted) + 2))
    path = f"/admin/v1/accounts/{customer.money.account_id}/usage/export"
    admin = await customer.api.call("GET", path, key="admin-key-of-the-tests")
    assert "cost_usd" in admin.text.splitlines()[0]
    assert len(admin.text.splitlines()) == len(wanted) + 1
    error = await customer.api.refused(
        "GET", "/api/v1/usage/export", 400, key=customer.key, params={"format": "xls"}
    )
    assert error["param"] == "format"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", 'a,"b"\n'])
async def test_no_cell_is_a_formula(text: str, customer: Customer) -> None:
    customer.money.fund(100, external_id=text)
    answer = await customer.call("/ledger/export")
    *_, row = csv.DictReader(io.StringIO(answer.text, newline=""))
    assert row["reference"] == (text if text.startswith("a") else f"'{text}")
    customer.used(HOUR)
    *_, row = csv.DictReader(io.StringIO((await customer.call("/ledger/export")).text, newline=""))
    assert row["posted_change_credits"] == "-0.0001"


async def test_an_export_takes_the_memory_of_a_part(customer: Customer) -> None:
    money = customer.money
    money.connection.execute(
        "INSERT INTO usage (account_id, request_id, key_id, created_at, settled_at, endpoint,"
        " model, tier, streamed, byok, status, price_version, hold, price)"
        " SELECT %s, (lpad(to_hex(%s + n), 12, '0') || '70008000' || lpad(n::text, 12, '0'))::uuid,"
        " %s, now(), now(), 'chat.completions', 'm', 'default', false, false, 'billed', 1, 1, 1"
        " FROM generate_series(1, 12000) AS n",
        (money.account_id, int(NOW.timestamp() * 1000), money.key_id),
    )
    sizes: list[int] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sizes.append(len(message.get("body", b"")))
        if len(sizes) == 8:
            tracemalloc.reset_peak()

    async def receive() -> dict[str, str]:
        await anyio.sleep_forever()
        raise AssertionError

    views = UsageViews(customer.api.services, is_operators=False)
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "query_string": b"",
        "headers": [],
    }
    download = await views.export_usage(Request(scope), money.account_id)
    tracemalloc.start()
    await download(scope, receive, send)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(sizes) == 12_000 // PART + 3
    assert sum(sizes) > 1_000_000
    assert peak < 2_500_000
    assert now < 1_000_000


class Parts:
    """Parts without an end, and how many were asked for."""

    def __init__(self) -> None:
        self.made = 0
        self.is_closed = False

    async def run(self) -> AsyncIterator[bytes]:
        try:
            while True:
                self.made += 1
                yield b"x"
        finally:
            self.is_closed = True


async def _serve(parts: Parts, receive: Any, send: Any, stall_timeout_s: float) -> None:
    download = Download(
        parts.run(),  # pyright: ignore[reportArgumentType] - a generator, as every such is
        media_type="text/csv",
        filename="x.csv",
        stall_timeout_s=stall_timeout_s,
    )
    with anyio.fail_after(10):
        await download({"type": "http", "method": "GET"}, receive, send)


async def test_a_client_that_leaves_ends_the_work() -> None:
    parts, left = Parts(), anyio.Event()

    async def receive() -> dict[str, str]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None:
        if parts.made == 3:
            left.set()
        await anyio.lowlevel.checkpoint()

    await _serve(parts, receive, send, 60)
    assert parts.is_closed
    assert parts.made < 10


async def test_a_client_that_stalls_ends_the_work() -> None:
    parts = Parts()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await anyio.sleep_forever()

    async def receive() -> dict[str, str]:
        await anyio.sleep_forever()
        raise AssertionError

    await _serve(parts, receive, send, 0.01)
    assert parts.is_closed
    assert parts.made == 1


async def test_a_statement_adds_up(customer: Customer) -> None:
    money = customer.money
    customer.used(HOUR, price=300, model="a")
    customer.used(HOUR, price=200, model="=b")
    money.fund(50, external_id="more", kind="deposit")
    # The entries of the last month, and one of the month before that.
    month = NOW.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    money.connection.execute("ALTER TABLE entries DISABLE TRIGGER USER")
    money.connection.execute("UPDATE entries SET at = %s WHERE seq <= 3", (month - DAY,))
    money.connection.execute("UPDATE entries SET at = %s WHERE seq <= 1", (month - 40 * DAY,))

    months = [row["month"] for row in (await customer.get("/statements"))["data"]]

    assert months == [f"{at:%Y-%m}" for at in (month, month - DAY, month - 40 * DAY)]
    statements = [await customer.get(f"/statements/{name}") for name in months]
    now, last, first = statements
    assert first["opening"]["credits"] == "0"
    assert [(row["kind"], row["model"]) for row in now["movements"]] == [
        ("capture", "=b"),
        ("deposit", None),
    ]
    assert [row["kind"] for row in last["movements"]] == ["capture"]
    assert not now["final"]
    assert last["final"]
    assert first["closing"] == last["opening"]
    assert last["closing"] == now["opening"]
    assert now["closing"] == (await customer.get("/balance"))["posted"]
    for statement in statements:
        moved = sum(_picos(row["amount"]) for row in statement["movements"])
        assert _picos(statement["opening"]) + moved == _picos(statement["closing"])
    text = (await customer.call(f"/statements/{months[0]}", params={"format": "csv"})).text
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["month", "kind", "model", "entries", "amount_credits", "amount_usd"]
    assert [row[1] for row in rows[1:]] == ["opening", "capture", "deposit", "closing"]
    assert rows[2][2] == "'=b"
    path = f"/accounts/{money.account_id}/statements"
    assert (await customer.api.admin("GET", f"{path}/{months[1]}")) == last
    assert (await customer.api.admin("GET", path))["data"][0]["month"] == months[0]
    for name in ("2020-01", "2026-13", "x", "0000-01", "9999-12"):
        await customer.api.refused("GET", f"/api/v1/statements/{name}", 404, key=customer.key)


def _picos(money: dict[str, str]) -> int:
    whole, _, fraction = money["usd"].lstrip("-").partition(".")
    picos = int(whole) * 10**12 + int(fraction.ljust(12, "0"))
    return -picos if money["usd"].startswith("-") else picos


async def test_a_forecast_is_the_balance_over_the_pace(customer: Customer) -> None:
    nothing = await customer.get("/forecast")
    assert nothing["last_7_days"]["days_left"] is None
    assert nothing["last_7_days"]["days"] == 1
    customer.money.connection.execute("UPDATE accounts SET created_at = now() - interval '9 days'")
    customer.used(2 * DAY, price=700)
    customer.used(8 * DAY, price=200)

    forecast = await customer.get("/forecast")

    assert forecast["last_7_days"] == {
        "days": 7,
        "spent": {"credits": "0.0007", "usd": "0.0000007"},
        "per_day": {"credits": "0.0001", "usd": "0.0000001"},
        "days_left": (1_000_000_000 - 900) * 7 // 700,
    }
    assert forecast["last_30_days"]["days"] in {9, 10}
    assert forecast["last_30_days"]["spent"]["credits"] == "0.0009"


async def test_a_threshold_says_when_the_balance_is_low(customer: Customer) -> None:
    async def low() -> dict[str, Any]:
        return (await customer.get("/balance"))["low_balance"]

    assert await low() == {"threshold": None, "is_low": False}
    path = "/balance/threshold"
    await customer.call(path, "PUT", json={"credits": "50"})
    assert await low() == {"threshold": {"credits": "50", "usd": "0.05"}, "is_low": False}
    await customer.call(path, "PUT", json={"credits": "1000.1"})
    assert (await low())["is_low"]
    await customer.call(path, "DELETE")
    assert await low() == {"threshold": None, "is_low": False}
    for body in ({"credits": "0"}, {"credits": "-1"}, {"credits": 1.5}, {}):
        whole = f"/api/v1{path}"
        await customer.api.refused("PUT", whole, 400, key=customer.key, json=body)
    actions = customer.money.all(
        "SELECT actor LIKE 'key:%%', detail -> 'threshold' FROM audit_trail"
        " WHERE action = 'account.low_balance' ORDER BY event_id"
    )
    assert actions == [(True, 50_000_000), (True, 1_000_100_000), (True, None)]


async def test_a_key_that_may_only_read_sets_no_threshold(customer: Customer) -> None:
    key = await customer.api.new_key(str(customer.money.account_id), role="read-only")
    path = "/api/v1/balance/threshold"
    error = await customer.api.refused("PUT", path, 403, key=key["key"], json={"credits": "1"})
    assert error["code"] == "permission_denied"
    assert (await customer.api.call("GET", "/api/v1/statements", key=key["key"])).is_success
