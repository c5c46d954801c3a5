"""The account API: customers see their own account, exactly, and nothing of the provider's cost."""

import asyncio
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import Api, open_api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

PATHS = ["/api/v1/balance", "/api/v1/usage", "/api/v1/ledger", "/api/v1/keys"]
LISTS = ["/usage", "/ledger", "/keys"]
TOKEN_CLASSES = {
    "input_tokens",
    "cached_input_tokens",
    "cache_creation_tokens",
    "cache_creation_1h_tokens",
    "output_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
    "image_input_tokens",
    "image_output_tokens",
    "images",
    "input_characters",
    "audio_ms",
    "queries",
}


class Customer:
    """An account that the ledger knows, with a key that opens the API."""

    def __init__(self, api: Api, money: Money, key: str) -> None:
        self.api = api
        self.money = money
        self.key = key

    async def get(self, path: str, **params: object) -> Any:
        answer = await self.api.call("GET", f"/api/v1{path}", key=self.key, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, path: str, **params: object) -> dict[str, Any]:
        whole = f"/api/v1{path}"
        return await self.api.refused("GET", whole, 400, key=self.key, params=params)


@pytest.fixture
async def customer(api: Api, account: NewAccount) -> Customer:
    """A customer with 1000 credits."""
    money = account(funds=1_000_000_000)
    return Customer(api, money, (await api.new_key(str(money.account_id)))["key"])


async def test_no_path_opens_without_a_virtual_key(api: Api) -> None:
    for path in PATHS:
        for key in (None, "sk-unknown", "nonsense", ADMIN_KEY):
            error = await api.refused("GET", path, 401, key=key)
            assert error["code"] == "invalid_api_key", path


async def test_key_is_taken_from_x_api_key_too(customer: Customer) -> None:
    answer = await customer.api.call("GET", "/api/v1/balance", headers={"x-api-key": customer.key})
    assert answer.status_code == 200


async def test_suspended_account_and_expired_key_are_403(
    customer: Customer, database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE tallygate.accounts SET status = 'suspended'")
        error = await customer.api.refused("GET", PATHS[0], 403, key=customer.key)
        assert error["code"] == "account_suspended"
        connection.execute("UPDATE tallygate.virtual_keys SET expires_at = now()")
        error = await customer.api.refused("GET", PATHS[0], 403, key=customer.key)
        assert error["code"] == "key_expired"


async def test_balance_says_what_is_posted_held_and_available(customer: Customer) -> None:
    customer.money.hold(1)
    assert await customer.get("/balance") == {
        "posted": {"credits": "1000", "usd": "1"},
        "held": {"credits": "0.000001", "usd": "0.000000001"},
        "available": {"credits": "999.999999", "usd": "0.999999999"},
        "low_balance": {"threshold": None, "is_low": False},
        "expiring": [],
    }


async def test_usage_row_has_these_members_and_no_others(customer: Customer) -> None:
    request = customer.money.hold(5_000)
    charge = {"cost_picos": 1_000_000, "model_answered": "m-2026", "reasoning_tokens": 2}
    customer.money.settle(capture(request, 2_000, **charge))
    page = await customer.get("/usage")
    assert page["next_cursor"] is None
    (row,) = page["data"]
    assert row == {
        "request_id": request["request_id"],
        "key_id": str(customer.money.key_id),
        "project_id": None,
        "created_at": row["created_at"],
        "endpoint": "chat.completions",
        "model": "m",
        "status": "billed",
        "usage": {
            **dict.fromkeys(TOKEN_CLASSES),
            "input_tokens": 3,
            "output_tokens": 4,
            "reasoning_tokens": 2,
        },
        "quantity": None,
        "price": {"credits": "0.002", "usd": "0.000002"},
    }
    assert row["created_at"].endswith("Z")


async def test_price_is_null_unless_the_request_was_sold(customer: Customer) -> None:
    money = customer.money
    money.hold(100)
    money.settle(void(money.hold(100), error_code="upstream_error"))
    money.settle(void(money.hold(100), status="needs_review", review_reason="cost_unknown"))
    money.settle(capture(money.hold(0, byok=True), 0, status="byok"))
    money.settle(capture(money.hold(100), 7))
    rows = (await customer.get("/usage"))["data"]
    prices = {row["status"]: row["price"] and row["price"]["usd"] for row in rows}
    assert prices == {
        "pending": None,
        "void": None,
        "needs_review": None,
        "byok": "0",
        "billed": "0.000000007",
    }


async def test_customer_sees_nothing_of_cost_markup_or_review(customer: Customer) -> None:
    request = customer.money.hold(900)
    charge = {"cost_picos": 31_337, "cost_source": "header", "markup_ppm": 1_234_567}
    customer.money.settle(capture(request, 800, review_reason="cost_differs", **charge))
    for path in PATHS:
        text = (await customer.api.call("GET", path, key=customer.key)).text
        for secret in ("31337", "header", "1234567", "1.234567", "cost", "markup", "review", "why"):
            assert secret not in text, (path, secret)


async def test_ledger_tells_each_step_with_the_balance_after_it(customer: Customer) -> None:
    request = customer.money.hold(5_000)
    customer.money.settle(capture(request, 2_000))
    taken, held, granted = (await customer.get("/ledger"))["data"]
    assert taken == {
        "seq": 3,
        "created_at": taken["created_at"],
        "kind": "capture",
        "request_id": request["request_id"],
        "entry_id": None,
        "amount": {"credits": "0.002", "usd": "0.000002"},
        "posted_change": {"credits": "-0.002", "usd": "-0.000002"},
        "held_change": {"credits": "-0.005", "usd": "-0.000005"},
        "posted_after": {"credits": "999.998", "usd": "0.999998"},
        "held_after": {"credits": "0", "usd": "0"},
        "reference": None,
    }
    assert taken["created_at"].endswith("Z")
    assert (held["kind"], held["held_after"]["usd"]) == ("hold", "0.000005")
    assert (granted["kind"], granted["request_id"], granted["reference"]) == (
        "grant",
        None,
        "first",
    )


async def test_keys_of_the_account_are_listed_without_their_secrets(customer: Customer) -> None:
    newest, oldest = (await customer.get("/keys"))["data"]
    assert customer.key.startswith(newest["prefix"])
    assert customer.key not in str(newest)
    assert oldest["id"] == str(customer.money.key_id)


async def test_accounts_see_nothing_of_each_other(
    customer: Customer, api: Api, account: NewAccount
) -> None:
    other = account(funds=5)
    other.settle(capture(other.hold(5), 5))
    key = (await api.new_key(str(other.account_id)))["key"]
    mine = await Customer(api, other, key).get("/usage")
    assert (await customer.get("/usage"))["data"] == []
    (foreign,) = mine["data"]
    page = await customer.get("/usage", cursor=foreign["request_id"])
    assert page == {"data": [], "next_cursor": None}
    assert len((await customer.get("/ledger"))["data"]) == 1


@pytest.mark.parametrize("path, key", [("/usage", "request_id"), ("/ledger", "seq")])
async def test_pages_meet_without_a_gap_while_requests_arrive(
    customer: Customer, path: str, key: str
) -> None:
    for _ in range(5):
        customer.money.settle(capture(customer.money.hold(2), 1))
    before = [row[key] for row in (await customer.get(path))["data"]]
    assert before == sorted(before, reverse=True)
    found: list[object] = []
    cursor: dict[str, object] = {}
    while True:
        page = await customer.get(path, limit=2, **cursor)
        found += [row[key] for row in page["data"]]
        customer.money.hold(1)
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == before


async def test_pending_requests_are_in_their_place_among_the_others(customer: Customer) -> None:
    first = customer.money.hold(2)
    second = customer.money.hold(2)
    third = customer.money.hold(2)
    customer.money.settle(capture(first, 1), capture(third, 1))
    rows = (await customer.get("/usage"))["data"]
    assert [(row["request_id"], row["status"]) for row in rows] == [
        (third["request_id"], "billed"),
        (second["request_id"], "pending"),
        (first["request_id"], "billed"),
    ]


async def test_limits_up_to_500_are_taken_and_others_400(customer: Customer) -> None:
    for limit in ("1", "500", "007"):
        assert (await customer.get("/ledger", limit=limit))["data"]
    wrong = ("0", "501", "-1", "1.5", "", "x", "1_0", "\N{ARABIC-INDIC DIGIT THREE}", "9" * 5000)
    for path in LISTS:
        for limit in wrong:
            error = await customer.refused(path, limit=limit)
            assert error["param"] == "limit", (path, limit)


async def test_cursors_of_no_page_are_400(customer: Customer) -> None:
    for path in LISTS:
        for cursor in ("", "x", "-1", "1.5", "\x00", "9" * 5000):
            error = await customer.refused(path, cursor=cursor)
            assert error["param"] == "cursor", (path, cursor)


async def test_cursor_beyond_every_row_is_the_first_page(customer: Customer) -> None:
    assert len((await customer.get("/ledger", cursor="9" * 19))["data"]) == 1


async def test_postgresql_away_is_503_with_a_time_to_come_back(tmp_path: Path) -> None:
    async with (
        open_api("postgresql://nobody@127.0.0.1:1/x", tmp_path) as api,
        asyncio.TaskGroup() as group,
    ):
        customers = group.create_task(api.call("GET", "/api/v1/balance", key="sk-somebodys"))
        admins = group.create_task(api.call("GET", "/admin/v1/accounts", key=ADMIN_KEY))
    for task in (customers, admins):
        answer = task.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "metering_unavailable")
        assert answer.headers["retry-after"]
        assert answer.headers["x-request-id"]


async def test_query_parameter_that_is_none_is_refused_and_not_ignored(customer: Customer) -> None:
    error = await customer.refused("/usage", vendor="demo")
    assert error["param"] == "vendor"
    assert "model" in error["message"]
    assert "takes none" in (await customer.refused("/balance", currency="EUR"))["message"]
