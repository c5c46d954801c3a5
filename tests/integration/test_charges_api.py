"""Charges: an action is paid for once, by the same ledger as requests, whoever asks how often."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest

from proxy.audit import audit
from proxy.charges import Order, Payer
from proxy.errors import MeteringUnavailableError
from proxy.ids import uuid7
from proxy.ledger import Authorization
from tests.integration.money import Money
from tests.support.api import Api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

BOOK = {
    "default": {"kind": "markup", "factor": "2.0"},
    "actions": {
        "message": "1",
        "upload.file": "0.25",
        "free": "0",
        "grain": "0.000000003",
        "mansion": "1000000",
    },
}


class Shop:
    """A customer with 100 credits, and the prices of actions."""

    def __init__(self, api: Api, account_id: str, key: dict[str, Any]) -> None:
        self.api = api
        self.account_id = account_id
        self.key_id = key["id"]
        self.key = key["key"]
        self.admin_path = f"/admin/v1/accounts/{account_id}"

    async def post(
        self, path: str, body: object = None, *, status: int = 201, key: str = "", **more: Any
    ) -> Any:
        whole = path if path.startswith("/") else f"/api/v1/{path}"
        sent: dict[str, Any] = {} if body is None else {"json": body}
        answer = await self.api.call("POST", whole, key=key or self.key, **sent, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def charge(self, action: str = "message", **body: Any) -> Any:
        return await self.post("charges", {"action": action, **body})

    async def operate(self, path: str, body: object = None, *, status: int = 201) -> Any:
        whole = f"{self.admin_path}/{path}"
        return await self.post(whole, body, status=status, key=ADMIN_KEY)

    async def get(self, path: str) -> Any:
        answer = await self.api.call("GET", f"/api/v1/{path}", key=self.key)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def available(self) -> str:
        return (await self.get("balance"))["available"]["credits"]

    async def held(self) -> str:
        return (await self.get("balance"))["held"]["credits"]


async def open_shop(api: Api, **key: object) -> Shop:
    services = api.services
    await services.price_books.publish(BOOK, nanos_per_credit=1_000_000, actor="test")
    await services.price_books.refresh()
    account_id = await api.new_account(credits="100")
    return Shop(api, account_id, await api.new_key(account_id, **key))


@pytest.fixture
async def shop(api: Api) -> Shop:
    return await open_shop(api)


def assert_clean(url: str) -> None:
    assert [found for found in audit(url) if found.violations] == []


async def test_actions_have_a_price_each(shop: Shop) -> None:
    assert await shop.get("actions") == {
        "data": [
            {"name": "free", "price": {"credits": "0", "usd": "0"}},
            {"name": "grain", "price": {"credits": "0.000000003", "usd": "0.000000000003"}},
            {"name": "mansion", "price": {"credits": "1000000", "usd": "1000"}},
            {"name": "message", "price": {"credits": "1", "usd": "0.001"}},
            {"name": "upload.file", "price": {"credits": "0.25", "usd": "0.00025"}},
        ],
        "next_cursor": None,
    }


async def test_a_charge_is_paid_by_the_balance_and_is_usage_like_any_other(
    shop: Shop, database_url: str
) -> None:
    made = await shop.charge("upload.file", quantity=3, metadata={"b": "2", "a": "1"})
    assert made == {
        "id": made["id"],
        "action": "upload.file",
        "quantity": 3,
        "price": {"credits": "0.75", "usd": "0.00075"},
        "refunded": {"credits": "0", "usd": "0"},
        "status": "captured",
        "description": None,
        "metadata": {"a": "1", "b": "2"},
        "recurring_charge_id": None,
        "created_at": made["created_at"],
        "expires_at": None,
        "settled_at": made["settled_at"],
    }
    assert await shop.available() == "99.25"
    (row,) = (await shop.get("usage"))["data"]
    assert (row["request_id"], row["endpoint"], row["model"]) == (
        made["id"],
        "charges",
        "upload.file",
    )
    assert (row["quantity"], row["price"], row["key_id"]) == (3, made["price"], shop.key_id)
    receipt = await shop.get(f"usage/{made['id']}")
    assert receipt["rule"] == "actions.upload.file"
    assert [(line["label"], line["quantity"]) for line in receipt["lines"]] == [
        ("upload.file", 3),
        ("rounding", None),
    ]
    assert await shop.get("charges") == {"data": [made], "next_cursor": None}
    assert await shop.get(f"charges/{made['id']}") == made
    assert_clean(database_url)


async def test_a_free_action_is_written_down_and_costs_nothing(shop: Shop) -> None:
    made = await shop.charge("free")
    assert (made["status"], made["price"]["credits"]) == ("captured", "0")
    assert await shop.available() == "100"


async def test_what_is_not_affordable_is_402_and_leaves_no_charge(shop: Shop) -> None:
    body = {"action": "message", "quantity": 101}
    error = (await shop.post("charges", body, status=402))["error"]
    assert error["code"] == "insufficient_credits"
    assert error["required"]["credits"] == "101"
    assert error["balance"]["credits"] == "100"
    assert (await shop.get("charges"))["data"] == []
    # The same key goes on where it was, once there are credits.
    headers = {"idempotency-key": "order-1"}
    await shop.post("charges", body, status=402, headers=headers)
    await shop.operate("adjustments", {"credits": "1", "reason": "r", "reference": "a"})
    await shop.post("charges", body, headers=headers)
    assert await shop.available() == "0"


@pytest.mark.parametrize(
    "body, param",
    [
        ({"action": "letter"}, "action"),
        ({"action": "mess\x00age"}, "action"),
        ({"action": "message", "quantity": 0}, "quantity"),
        ({"action": "message", "quantity": 10**12 + 1}, "quantity"),
        ({"action": "mansion", "quantity": 10**12}, "quantity"),
        ({"action": "message", "quantity": 1.0}, "quantity"),
        ({"action": "message", "ttl_s": 60}, None),
        ({"action": "message", "hold": True, "ttl_s": 604_801}, "ttl_s"),
        ({"action": "message", "metadata": {"a": 1}}, "metadata.a"),
        ({"action": "message", "metadata": {"a": {}}}, "metadata.a"),
        ({"action": "message", "metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"action": "message", "description": "x\x00"}, "description"),
    ],
)
async def test_what_can_not_be_charged_is_refused(
    shop: Shop, body: dict[str, object], param: str | None
) -> None:
    status = 404 if body["action"] == "letter" else 400
    error = await shop.api.refused("POST", "/api/v1/charges", status, key=shop.key, json=body)
    assert error["param"] == param


async def test_the_same_key_is_charged_once_and_answers_the_same(shop: Shop) -> None:
    headers = {"idempotency-key": "order-7"}
    body = {"action": "message", "metadata": {"order": "7"}}
    first = await shop.post("charges", body, headers=headers)
    assert await shop.post("charges", body, status=200, headers=headers) == first
    other = {**body, "quantity": 2}
    error = (await shop.post("charges", other, status=409, headers=headers))["error"]
    assert error["code"] == "idempotency_key_reused"
    assert await shop.available() == "99"
    await shop.post("charges", body, status=400, headers={"idempotency-key": "x" * 256})
    # An operator's keys are others than the customer's.
    path = f"{shop.admin_path}/charges"
    await shop.post(path, body, headers=headers, key=ADMIN_KEY)
    await shop.post(path, body, status=200, headers=headers, key=ADMIN_KEY)
    assert await shop.available() == "98"


async def test_a_key_that_comes_many_times_at_once_is_charged_once(shop: Shop) -> None:
    headers = {"idempotency-key": "at-once"}
    body = {"action": "message"}
    answers = await asyncio.gather(
        *(
            shop.api.call("POST", "/api/v1/charges", key=shop.key, json=body, headers=headers)
            for _ in range(8)
        )
    )
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert await shop.available() == "99"


async def test_a_charge_that_broke_off_after_its_hold_goes_on_under_the_same_id(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    headers = {"idempotency-key": "broken-off"}
    body = {"action": "message", "quantity": 2}
    store = shop.api.services.charge_store

    async def away(*_args: object, **_more: object) -> None:
        raise MeteringUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "end", away)
        await shop.post("charges", body, status=503, headers=headers)
    (held,) = (await shop.get("charges"))["data"]
    assert (held["status"], await shop.held()) == ("held", "2")
    # The prices of today are others: it is charged what was held.
    prices = {**BOOK, "actions": {"message": "5"}}
    books = shop.api.services.price_books
    await books.publish(prices, nanos_per_credit=1_000_000, actor="test")
    await books.refresh()
    made = await shop.post("charges", body, status=200, headers=headers)
    assert (made["id"], made["status"], made["price"]["credits"]) == (held["id"], "captured", "2")
    assert await shop.available() == "98"
    assert_clean(database_url)


async def test_a_charge_whose_hold_ended_uncharged_is_made_anew_by_its_key(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    headers = {"idempotency-key": "broken-off"}
    body = {"action": "message"}
    store = shop.api.services.charge_store

    async def away(*_args: object, **_more: object) -> None:
        raise MeteringUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(store, "end", away)
        await shop.post("charges", body, status=503, headers=headers)
    assert await overdue(shop, database_url) == 0
    (expired,) = (await shop.get("charges"))["data"]
    assert (expired["status"], expired["price"], await shop.held()) == ("expired", None, "0")
    made = await shop.post("charges", body, headers=headers)
    assert made["id"] != expired["id"]
    assert await shop.available() == "99"
    reviews = await shop.api.admin("GET", "/reviews")
    assert reviews["data"] == []


async def overdue(shop: Shop, url: str) -> int:
    """Let all holds be overdue, and sweep; returns how many requests expired."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE tallygate.open_holds SET expires_at = now()")
    return await shop.api.services.ledger.expire_holds(limit=10, grace_s=0)


# --- held ones ---


async def test_a_hold_is_captured_whole_or_in_part_and_the_rest_is_given_back(
    shop: Shop, database_url: str
) -> None:
    held = await shop.charge(quantity=10, hold=True, ttl_s=86_400)
    assert (held["status"], held["price"]["credits"]) == ("held", "10")
    assert (await shop.available(), await shop.held()) == ("90", "10")
    assert held["expires_at"] > held["created_at"]
    path = f"charges/{held['id']}/capture"
    error = (await shop.post(path, {"quantity": 11}, status=400))["error"]
    assert error["param"] == "quantity"
    # By the prices that it was held under.
    prices = {**BOOK, "actions": {"message": "50"}}
    books = shop.api.services.price_books
    await books.publish(prices, nanos_per_credit=1_000_000, actor="test")
    await books.refresh()
    captured = await shop.post(path, {"quantity": 4}, status=200)
    assert (captured["status"], captured["quantity"]) == ("captured", 4)
    assert (captured["price"]["credits"], captured["expires_at"]) == ("4", None)
    assert (await shop.available(), await shop.held()) == ("96", "0")
    assert await shop.post(path, {"quantity": 4}, status=200) == captured
    error = (await shop.post(path, {"quantity": 5}, status=409))["error"]
    assert error["code"] == "charge_captured"
    error = (await shop.post(f"charges/{held['id']}/void", status=409))["error"]
    assert error["code"] == "charge_captured"
    assert_clean(database_url)


async def test_a_void_gives_everything_back(shop: Shop) -> None:
    held = await shop.charge(quantity=10, hold=True)
    path = f"charges/{held['id']}"
    voided = await shop.post(f"{path}/void", status=200)
    assert (voided["status"], voided["price"]) == ("voided", None)
    assert await shop.post(f"{path}/void", status=200) == voided
    error = (await shop.post(f"{path}/capture", {}, status=409))["error"]
    assert error["code"] == "charge_voided"
    assert await shop.available() == "100"


async def test_a_hold_that_nobody_captures_in_time_is_void_and_needs_no_review(
    shop: Shop, database_url: str
) -> None:
    held = await shop.charge(hold=True, ttl_s=60)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("UPDATE tallygate.open_holds SET expires_at = now()")
    # Its time is over, and the sweeper has not come yet.
    path = f"charges/{held['id']}/capture"
    for _ in range(2):
        error = (await shop.post(path, {}, status=409))["error"]
        assert error["code"] == "charge_expired"
        assert await overdue(shop, database_url) == 0
    charge = await shop.get(f"charges/{held['id']}")
    assert (charge["status"], await shop.available()) == ("expired", "100")
    assert (await shop.api.admin("GET", "/reviews"))["data"] == []
    assert_clean(database_url)


async def test_what_an_operator_holds_the_customer_can_not_end(shop: Shop) -> None:
    body = {"action": "message", "quantity": 5, "hold": True}
    held = await shop.operate("charges", body)
    assert (held["operator"], held["key_id"]) == ("admin", None)
    path = f"charges/{held['id']}"
    for ending in ("capture", "void"):
        await shop.post(f"{path}/{ending}", {}, status=403)
    assert (await shop.get(path))["status"] == "held"
    captured = await shop.operate(f"{path}/capture", {"quantity": 2}, status=200)
    assert (captured["status"], await shop.available()) == ("captured", "98")
    voided = await shop.operate("charges", body)
    await shop.operate(f"charges/{voided['id']}/void", status=200)
    trail = (await shop.api.admin("GET", "/audit-trail"))["data"]
    acts = [act for act in trail if act["action"].startswith("charge.")]
    assert [(act["action"], act["actor"]) for act in acts] == [
        ("charge.void", "admin"),
        ("charge.create", "admin"),
        ("charge.capture", "admin"),
        ("charge.create", "admin"),
    ]
    page = await shop.api.admin("GET", f"/accounts/{shop.account_id}/charges")
    assert [row["id"] for row in page["data"]] == [voided["id"], held["id"]]
    row = await shop.api.admin("GET", f"/accounts/{shop.account_id}/charges/{held['id']}")
    assert row == captured


async def test_an_operators_charge_that_is_refused_stands_in_the_trail(shop: Shop) -> None:
    await shop.operate("charges", {"action": "message", "quantity": 101}, status=402)
    refused, asked = (await shop.api.admin("GET", "/audit-trail"))["data"][:2]
    assert (refused["action"], asked["action"]) == ("charge.refused", "charge.create")
    assert refused["detail"]["refusal"] == "insufficient_credits"


# --- whose, and who may ---


async def test_charges_of_another_account_are_404(shop: Shop) -> None:
    held = await shop.charge(hold=True)
    other = await shop.api.new_account(credits="5")
    key = (await shop.api.new_key(other))["key"]
    path = f"/api/v1/charges/{held['id']}"
    await shop.api.refused("GET", path, 404, key=key)
    for ending in ("capture", "void"):
        await shop.api.refused("POST", f"{path}/{ending}", 404, key=key, json={})
        foreign = f"/admin/v1/accounts/{other}/charges/{held['id']}/{ending}"
        await shop.api.refused("POST", foreign, 404, json={})
    await shop.api.refused("GET", "/api/v1/charges/nonsense", 404, key=shop.key)
    assert (await shop.get(f"charges/{held['id']}"))["status"] == "held"


async def test_keys_charge_within_their_limits(api: Api) -> None:
    shop = await open_shop(api, budget={"credits": "2"}, requests_per_minute=3)
    await shop.charge(quantity=2)
    error = (await shop.post("charges", {"action": "message"}, status=402))["error"]
    assert error["code"] == "budget_exceeded"
    await shop.charge("free")
    await shop.charge("free")
    error = (await shop.post("charges", {"action": "free"}, status=429))["error"]
    assert error["limit"] == "requests_per_minute"


@pytest.mark.parametrize(
    "key, code",
    [
        ({"role": "read-only"}, "permission_denied"),
        ({"allowed_endpoints": ["chat.*"]}, "endpoint_not_allowed"),
    ],
)
async def test_keys_that_may_not_charge_are_403(
    api: Api, key: dict[str, object], code: str
) -> None:
    shop = await open_shop(api, **key)
    error = (await shop.post("charges", {"action": "message"}, status=403))["error"]
    assert error["code"] == code
    assert (await shop.get("charges"))["data"] == []


async def test_a_charge_waits_for_no_review_but_may_be_repriced_by_hand(
    shop: Shop, database_url: str
) -> None:
    made = await shop.charge(quantity=4)
    path = f"/admin/v1/reviews/{made['id']}"
    decision = {"account_id": shop.account_id, "decision": "reprice", "reason": "r"}
    body = {**decision, "cost_usd": "1"}
    error = (await shop.post(path, body, status=400, key=ADMIN_KEY))["error"]
    assert "metered action" in error["message"]
    await shop.post(path, {**decision, "credits": "1"}, status=200, key=ADMIN_KEY)
    assert (await shop.get(f"charges/{made['id']}"))["price"]["credits"] == "1"
    assert_clean(database_url)


# --- under load ---


async def test_charges_and_requests_at_once_spend_no_more_than_there_is(
    shop: Shop, database_url: str
) -> None:
    """Each takes a credit or two of 100; what is refused is refused for nothing else."""
    money = Money(database_url)
    money.account_id, money.key_id = shop_ids(shop)
    requests = [money.request(2_000_000, request_id=str(uuid7())) for _ in range(60)]

    async def request(batch: Sequence[dict[str, object]]) -> list[str]:
        return await asyncio.to_thread(money.authorize, *batch)

    async def charge() -> int:
        body = {"action": "message"}
        answer = await shop.api.call("POST", "/api/v1/charges", key=shop.key, json=body)
        return answer.status_code

    charges = [charge() for _ in range(60)]
    batches = [request(requests[start : start + 4]) for start in range(0, 60, 4)]
    ended = await asyncio.gather(*charges, *batches)
    statuses = [each for each in ended if isinstance(each, int)]
    outcomes = [each for batch in ended if isinstance(batch, list) for each in batch]
    assert set(statuses) <= {201, 402}
    assert set(outcomes) <= {"held", "insufficient_credits"}
    spent = statuses.count(201) + 2 * outcomes.count("held")
    assert 99 <= spent <= 100
    assert await shop.available() == str(100 - spent)
    assert_clean(database_url)
    money.connection.close()


def shop_ids(shop: Shop) -> tuple[Any, Any]:
    return UUID(shop.account_id), UUID(shop.key_id)


async def test_a_charge_in_doubt_without_a_key_is_voided(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = shop.api.services.ledger
    authorize = ledger.authorize

    async def lost(hold: Any) -> None:
        await authorize(hold)
        error = MeteringUnavailableError("away")
        error.is_in_doubt = True
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "authorize", lost)
        await shop.post("charges", {"action": "message", "hold": True}, status=503)
        assert await shop.held() == "0"
        headers = {"idempotency-key": str(uuid4())}
        body = {"action": "message"}
        await shop.post("charges", body, status=503, headers=headers)
        assert await shop.held() == "1"
    await shop.post("charges", body, status=200, headers=headers)
    assert await shop.available() == "99"


# --- what may come between ---


async def test_an_account_that_changes_meanwhile_is_read_again(shop: Shop) -> None:
    charges = shop.api.services.charges
    account_id = UUID(shop.account_id)
    payer = await charges.account_payer(account_id)
    outdated = replace(payer, version=payer.version - 1)

    async def read() -> Payer:
        return payer

    async def read_outdated() -> Payer:
        return outdated

    order = Order(action="message", quantity=1)
    row, is_new = await charges.make(order, outdated, read)
    assert (is_new, row["key_id"], row["price"]) == (True, account_id, 1_000_000)
    with pytest.raises(MeteringUnavailableError):
        await charges.make(order, outdated, read_outdated)


async def test_a_key_that_changes_meanwhile_is_read_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = shop.api.services.ledger
    authorize, asked = ledger.authorize, list[int]()

    async def outdated(hold: Any) -> Any:
        asked.append(hold.version)
        return await authorize(
            msgspec.structs.replace(hold, version=hold.version - (len(asked) == 1))
        )

    monkeypatch.setattr(ledger, "authorize", outdated)
    await shop.charge()
    assert len(asked) == 2
    assert await shop.available() == "99"


async def test_a_key_that_stood_twice_in_a_batch_goes_on_like_the_first(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = shop.api.services.ledger
    authorize = ledger.authorize
    twice = Authorization("duplicate", *[None] * 6)

    async def in_one_batch(hold: Any) -> Any:
        authorization = await authorize(hold)
        return twice if authorization.outcome == "held" else authorization

    monkeypatch.setattr(ledger, "authorize", in_one_batch)
    assert (await shop.charge())["status"] == "captured"


async def test_a_charge_that_nobody_knows_any_more_is_void(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """It was refused to another with the same key, between its note and its hold."""
    ledger = shop.api.services.ledger
    authorize = ledger.authorize

    async def forgotten(hold: Any) -> Any:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("DELETE FROM tallygate.charges")
        return await authorize(hold)

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "authorize", forgotten)
        await shop.post("charges", {"action": "message"}, status=503)
    assert (await shop.available(), await shop.held()) == ("100", "0")


async def test_a_lost_connection_is_not_heard_of(shop: Shop, database_url: str) -> None:
    store = shop.api.services.charge_store
    made = await shop.charge()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    row = await store.charge(UUID(shop.account_id), UUID(made["id"]))
    assert row is not None
    await shop.api.services.pool.close()
    with pytest.raises(MeteringUnavailableError):
        await store.charge(UUID(shop.account_id), UUID(made["id"]))
    with pytest.raises(MeteringUnavailableError):
        await shop.api.services.recurring_store.recurring(row["account_id"], row["request_id"])
