"""Refunds, adjustments, reversals and credit limits: once each, never more than there was."""

import asyncio
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from proxy.audit import audit
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import Api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio

CREDIT = 1_000_000
GRANTED = 1000 * CREDIT


class Desk:
    """An account with 1000 credits, and an operator at a desk."""

    def __init__(self, api: Api, money: Money) -> None:
        self.api = api
        self.money = money

    async def post(
        self, path: str, body: dict[str, Any], *, status: int = 201, method: str = "POST"
    ) -> Any:
        whole = f"/admin/v1/accounts/{self.money.account_id}/{path}"
        whole_body = {"reason": "why", "reference": "r", **body}
        if path == "credit-limit":
            del whole_body["reference"]
        answer = await self.api.call(method, whole, key=ADMIN_KEY, json=whole_body)
        assert answer.status_code == status, answer.text
        return answer.json()["error"] if status >= 400 else answer.json()

    async def limit(self, credits_: str, *, status: int = 200) -> Any:
        return await self.post("credit-limit", {"credits": credits_}, status=status, method="PUT")

    def charged(self, price: int = 90 * CREDIT, **changes: object) -> str:
        request = self.money.hold(100 * CREDIT, **changes)
        charge = {"cost_picos": price * 500, "markup_ppm": 2_000_000}
        self.money.settle(capture(request, price, **charge))
        return str(request["request_id"])

    def posted(self) -> int:
        return self.money.balance()[0]

    def audited(self, url: str) -> set[str]:
        """What the audit finds; the prices of these tests follow from no book."""
        found = {each.name for each in audit(url) if each.violations}
        return found - {"charges_recompute", "rollups_equal_usage", "rollups_equal_days"}


@pytest.fixture
def desk(api: Api, account: NewAccount) -> Desk:
    return Desk(api, account(funds=GRANTED))


# --- refunds ---


async def test_a_refund_gives_back_all_that_is_left_of_a_price(
    desk: Desk, database_url: str
) -> None:
    request_id = desk.charged()
    part = await desk.post("refunds", {"request_id": request_id, "credits": "30"})
    assert part["amount"] == {"credits": "30", "usd": "0.03"}
    assert part["balance"]["posted"]["credits"] == "940"
    rest = await desk.post("refunds", {"request_id": request_id, "reference": "rest"})
    assert (rest["amount"]["credits"], rest["refunded"]["credits"]) == ("60", "90")
    assert desk.posted() == GRANTED
    error = await desk.post("refunds", {"request_id": request_id, "reference": "more"}, status=409)
    assert error["code"] == "refund_exceeds_price"
    key = (await desk.api.new_key(str(desk.money.account_id)))["key"]
    receipt = (await desk.api.call("GET", f"/api/v1/usage/{request_id}", key=key)).json()
    assert receipt["refunded"]["credits"] == "90"
    assert desk.money.kinds() == ["grant", "hold", "capture", "refund", "refund"]
    assert desk.audited(database_url) == set()


async def test_a_reference_refunds_once(desk: Desk) -> None:
    request_id = desk.charged()
    body = {"request_id": request_id, "credits": "30"}
    first = await desk.post("refunds", body)
    assert await desk.post("refunds", body) == first
    for other in ({"credits": "31"}, {"request_id": desk.charged()}, {"request_id": None}):
        error = await desk.post("refunds", {**body, **other}, status=409)
        assert error["param"] == "reference"
    assert desk.money.kinds().count("refund") == 1


async def test_refunds_at_once_give_back_no_more_than_the_price(
    desk: Desk, database_url: str
) -> None:
    request_id = desk.charged()
    path = f"/admin/v1/accounts/{desk.money.account_id}/refunds"
    answers = await asyncio.gather(
        *(
            desk.api.call(
                "POST",
                path,
                key=ADMIN_KEY,
                json={
                    "request_id": request_id,
                    "credits": "40",
                    "reason": "why",
                    "reference": str(number),
                },
            )
            for number in range(6)
        )
    )
    assert sorted(answer.status_code for answer in answers) == [201, 201, 409, 409, 409, 409]
    assert desk.posted() == GRANTED - 10 * CREDIT
    assert desk.audited(database_url) == set()


async def test_what_was_not_charged_is_not_refunded(desk: Desk) -> None:
    request = desk.money.hold(CREDIT)
    body = {"request_id": request["request_id"]}
    await desk.post("refunds", body, status=404)
    desk.money.settle(void(request))
    assert (await desk.post("refunds", body, status=409))["code"] == "not_charged"
    await desk.post("refunds", {"request_id": str(uuid4())}, status=404)
    assert (await desk.post("refunds", {}, status=400))["param"] == "request_id"
    other = await desk.api.new_account()
    path = f"/admin/v1/accounts/{other}/refunds"
    body = {"request_id": desk.charged(), "reason": "why", "reference": "r"}
    await desk.api.refused("POST", path, 404, json=body)


async def test_a_refund_of_nothing_in_particular_names_its_credits(desk: Desk) -> None:
    done = await desk.post("refunds", {"credits": "5"})
    assert (done["request_id"], done["refunded"]) == (None, None)
    assert done["balance"]["posted"]["credits"] == "1005"


async def test_a_refund_counts_in_the_budget_that_its_charge_counted_in(
    api: Api, account: NewAccount
) -> None:
    money = account(funds=GRANTED, budget=90 * CREDIT)
    desk = Desk(api, money)
    request = money.hold(90 * CREDIT)
    money.settle(capture(request, 90 * CREDIT))
    refused = money.request(CREDIT)
    assert money.authorize(refused) == ["budget_exceeded"]
    await desk.post("refunds", {"request_id": request["request_id"], "credits": "1"})
    assert money.authorize(refused) == ["held"]


async def test_a_price_does_not_fall_below_what_was_refunded(desk: Desk) -> None:
    request_id = desk.charged()
    refund = await desk.post("refunds", {"request_id": request_id, "credits": "30"})
    path = f"/admin/v1/reviews/{request_id}"
    decision = {
        "account_id": str(desk.money.account_id),
        "decision": "reprice",
        "credits": "29",
        "reason": "r",
    }
    error = await desk.api.refused("POST", path, 409, json=decision)
    assert "refunded" in error["message"]
    await desk.post("reversals", {"entry_id": refund["entry_id"]})
    await desk.api.admin("POST", f"/reviews/{request_id}", decision)
    assert desk.posted() == GRANTED - 29 * CREDIT


# --- adjustments ---


async def test_adjustments_give_and_take_once_for_each_reference(desk: Desk) -> None:
    body = {"credits": "-5"}
    first = await desk.post("adjustments", body)
    assert first["amount"] == {"credits": "-5", "usd": "-0.005"}
    assert await desk.post("adjustments", body) == first
    assert (await desk.post("adjustments", {"credits": "-6"}, status=409))["param"] == "reference"
    await desk.post("adjustments", {"credits": 7, "reference": "more"})
    assert desk.posted() == GRANTED + 2 * CREDIT
    (newest, *_) = (await desk.api.admin("GET", "/audit-trail"))["data"]
    assert (newest["action"], newest["detail"]["reason"]) == ("adjustment", "why")


@pytest.mark.parametrize("text", ["0", "-0", "--5", "1e400", "", "-", "9" * 30, "\x00"])
async def test_amounts_that_are_none_are_400(desk: Desk, text: str) -> None:
    for path in ("adjustments", "refunds"):
        error = await desk.post(path, {"credits": text}, status=400)
        assert error["param"] == "credits", path


async def test_an_adjustment_takes_no_more_than_is_available(desk: Desk) -> None:
    desk.money.hold(100 * CREDIT)
    error = await desk.post("adjustments", {"credits": "-901"}, status=409)
    assert error["code"] == "insufficient_credits"
    assert "900 credits" in error["message"]
    await desk.post("adjustments", {"credits": "-900"})
    most = await desk.limit("1000000000000")
    assert most["credit_limit"]["usd"] == "1000000000"
    for number in range(9):
        gift = {"credits": "1000000000000", "reference": f"gift-{number}"}
        error = await desk.post("adjustments", gift, status=201 if number < 8 else 400)
    assert error["param"] == "credits"


# --- reversals ---


async def test_a_reversal_takes_an_entry_back_once(desk: Desk, database_url: str) -> None:
    given = await desk.post("adjustments", {"credits": "50"})
    body = {"entry_id": given["entry_id"]}
    done = await desk.post("reversals", body)
    assert (done["amount"]["credits"], desk.posted()) == ("-50", GRANTED)
    assert await desk.post("reversals", body) == done
    error = await desk.post("reversals", {**body, "reference": "again"}, status=409)
    assert error["code"] == "already_reversed"
    error = await desk.post(
        "reversals", {"entry_id": done["entry_id"], "reference": "it"}, status=409
    )
    assert error["code"] == "not_reversible"
    await desk.post("reversals", {"entry_id": str(uuid4()), "reference": "no"}, status=404)
    (newest, *_) = (await desk.api.admin("GET", "/audit-trail"))["data"]
    assert newest["detail"] == {
        "amount": -50 * CREDIT,
        "entry_id": given["entry_id"],
        "kind": "adjustment",
        "reference": "r",
        "reason": "why",
    }
    assert desk.audited(database_url) == set()


async def test_what_was_taken_is_given_back_and_a_request_is_no_entry_of_money(
    desk: Desk,
) -> None:
    taken = await desk.post("adjustments", {"credits": "-50"})
    await desk.post("reversals", {"entry_id": taken["entry_id"]})
    assert desk.posted() == GRANTED
    await desk.post("reversals", {"entry_id": desk.charged(), "reference": "x"}, status=404)


async def test_a_refund_that_is_reversed_may_be_given_again(desk: Desk, database_url: str) -> None:
    request_id = desk.charged()
    refund = await desk.post("refunds", {"request_id": request_id})
    await desk.post("reversals", {"entry_id": refund["entry_id"]})
    again = await desk.post("refunds", {"request_id": request_id, "reference": "again"})
    assert again["refunded"]["credits"] == "90"
    assert desk.audited(database_url) == set()


async def test_a_reversal_takes_no_more_than_is_available(desk: Desk) -> None:
    desk.charged()
    (entry,) = desk.money.one("SELECT entry_id FROM funding")
    body = {"entry_id": str(entry)}
    error = await desk.post("reversals", body, status=409)
    assert error["code"] == "insufficient_credits"
    await desk.limit("90")
    await desk.post("reversals", body)
    assert desk.posted() == -90 * CREDIT


async def test_credits_that_expire_are_not_reversed(desk: Desk) -> None:
    money = desk.money
    entry = str(uuid4())
    money.one(
        "SELECT outcome FROM fund_expiring(%s, %s, 5, 'admin', 'x', 'why', 'me',"
        " now() + interval '1 day')",
        *(money.account_id, entry),
    )
    error = await desk.post("reversals", {"entry_id": entry}, status=409)
    assert error["code"] == "expiring"


# --- credit limits ---


async def test_a_credit_limit_counts_from_the_next_hold_on(desk: Desk, database_url: str) -> None:
    beyond = desk.money.request(1100 * CREDIT)
    assert desk.money.authorize(beyond) == ["insufficient_credits"]
    done = await desk.limit("100")
    assert done["credit_limit"]["credits"] == "100"
    assert done["available"]["credits"] == "1100"
    assert desk.money.authorize(beyond) == ["held"]
    error = await desk.limit("99.5", status=409)
    assert error["code"] == "credit_limit_in_use"
    assert "uses 100 credits" in error["message"]
    desk.money.settle(void(beyond))
    await desk.limit("0")
    # The hold of before was within the limit of then.
    assert desk.audited(database_url) == set()
    acts = [each["detail"] for each in (await desk.api.admin("GET", "/audit-trail"))["data"]]
    assert [act["credit_limit"] for act in acts[:2]] == [0, 100 * CREDIT]


async def test_a_higher_limit_clears_an_overdraft(desk: Desk, database_url: str) -> None:
    request = desk.money.hold(1000 * CREDIT)
    desk.money.settle(capture(request, 1200 * CREDIT))
    assert desk.money.balance() == (-200 * CREDIT, 0, 200 * CREDIT)
    await desk.limit("50")
    assert desk.money.balance()[2] == 150 * CREDIT
    await desk.limit("300")
    assert desk.money.balance()[2] == 0
    assert (await desk.limit("300"))["credit_limit"]["credits"] == "300"
    await desk.limit("-1", status=400)
    assert desk.audited(database_url) == set()


async def test_every_correction_is_written_by_name(desk: Desk, database_url: str) -> None:
    await desk.post("adjustments", {"credits": "5"})
    with psycopg.connect(database_url) as connection:
        (actor,) = connection.execute(
            "SELECT actor FROM tallygate.audit_trail ORDER BY event_id DESC LIMIT 1"
        ).fetchone() or ("",)
    assert actor == "admin"
