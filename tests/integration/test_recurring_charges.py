"""Recurring charges: each period is paid once, whoever comes to it and however often."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from proxy.audit import audit
from proxy.errors import MeteringUnavailableError
from proxy.ids import derived_uuid7
from tests.integration.test_charges_api import Shop, open_shop
from tests.support.api import Api
from tests.support.service import ADMIN_KEY

pytestmark = pytest.mark.anyio


class Landlord:
    """A shop whose time can be moved, and what works in its background."""

    def __init__(self, shop: Shop, url: str) -> None:
        self.shop = shop
        self.recurring = shop.api.services.recurring_charges
        self.connection = psycopg.connect(url, autocommit=True)
        self.connection.execute("SET search_path = tallygate")

    async def start(self, **body: object) -> Any:
        wanted = {"action": "message", "quantity": 2, "every": "day", **body}
        return await self.shop.post("recurring-charges", wanted)

    async def change(self, row: Any, change: str, *, status: int = 200) -> Any:
        return await self.shop.post(f"recurring-charges/{row['id']}/{change}", status=status)

    async def work(self) -> int:
        """Charge until nothing is due; returns how many periods were looked at."""
        total = 0
        while looked_at := await self.recurring.charge_due():
            total += looked_at
        return total

    def pass_time(self, **delta: float) -> None:
        """Let it be later, as far as recurring charges know."""
        self.connection.execute(
            "UPDATE recurring_charges SET starts_at = starts_at - %(by)s,"
            " ends_at = ends_at - %(by)s, due_at = due_at - %(by)s",
            {"by": timedelta(**delta)},
        )

    async def row(self) -> Any:
        (row,) = (await self.shop.get("recurring-charges"))["data"]
        return row

    async def charges(self) -> list[Any]:
        return (await self.shop.get("charges"))["data"]

    def assert_clean(self, url: str) -> None:
        found = {each.name for each in audit(url) if each.violations}
        assert found - {"rollups_equal_usage", "rollups_equal_days"} == set()


@pytest.fixture
async def landlord(api: Api, database_url: str) -> Any:
    opened = Landlord(await open_shop(api, role="manage"), database_url)
    yield opened
    opened.connection.close()


async def test_each_period_is_charged_when_it_begins(landlord: Landlord, database_url: str) -> None:
    made = await landlord.start(description="hosting", metadata={"host": "a"})
    assert (made["status"], made["every"], made["next_at"]) == ("active", "day", made["starts_at"])
    assert await landlord.work() == 1
    (charge,) = await landlord.charges()
    assert (charge["status"], charge["price"]["credits"]) == ("captured", "2")
    assert (charge["description"], charge["metadata"]) == ("hosting", {"host": "a"})
    assert charge["recurring_charge_id"] == made["id"]
    row = await landlord.row()
    assert row["last_charge_id"] == charge["id"]
    day = timedelta(days=1)
    assert _time(row["next_at"]) - _time(row["starts_at"]) == day
    assert await landlord.work() == 0
    landlord.pass_time(days=1)
    assert await landlord.work() == 1
    assert await landlord.shop.available() == "96"
    assert await landlord.shop.get(f"recurring-charges/{made['id']}") == await landlord.row()
    landlord.assert_clean(database_url)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def test_a_period_has_one_charge_whoever_comes_to_it(
    landlord: Landlord, api: Api, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """Two replicas, of which one died before it could say that the period is charged."""
    await landlord.start()
    services = api.services
    store = services.recurring_store
    (due,) = await store.claim(limit=10, lease_s=0, catch_up_s=86_400)
    charge_id = derived_uuid7(due.period_at, f"{due.recurring_id}:0:0")
    assert charge_id.version == 7

    async def die(*_args: object, **_more: object) -> None:
        raise psycopg.OperationalError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(services.recurring_store, "finish", die)
        assert await landlord.recurring.charge_due() == 1
    landlord.connection.execute("UPDATE recurring_charges SET due_at = now()")
    await landlord.work()
    (charge,) = await landlord.charges()
    assert charge["id"] == str(charge_id)
    assert await landlord.shop.available() == "98"
    # Whoever says so late changes nothing.
    await store.finish(due, "charged", charge_id=charge_id)
    assert await landlord.work() == 0
    landlord.assert_clean(database_url)


async def test_replicas_at_once_charge_a_period_once(landlord: Landlord) -> None:
    for _ in range(5):
        await landlord.start(quantity=1)
    await asyncio.gather(*(landlord.recurring.charge_due() for _ in range(4)))
    await landlord.work()
    assert await landlord.shop.available() == "95"


async def test_a_charge_that_broke_off_is_made_anew_for_its_period(
    landlord: Landlord, api: Api, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    await landlord.start()

    async def die(*_args: object, **_more: object) -> None:
        raise psycopg.OperationalError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(api.services.charge_store, "end", die)
        assert await landlord.recurring.charge_due() == 1
    landlord.connection.execute("UPDATE open_holds SET expires_at = now()")
    assert await api.services.ledger.expire_holds(limit=10, grace_s=0) == 0
    landlord.connection.execute("UPDATE recurring_charges SET due_at = now()")
    await landlord.work()
    assert {row["status"] for row in await landlord.charges()} == {"captured", "expired"}
    assert await landlord.shop.available() == "98"
    landlord.assert_clean(database_url)


async def test_what_was_missed_is_caught_up_within_bounds(landlord: Landlord) -> None:
    await landlord.start(every="hour", quantity=1)
    await landlord.work()
    landlord.pass_time(hours=3)
    assert await landlord.work() == 3
    landlord.pass_time(days=40)
    # Seven days of hours, and more than the customer has.
    await landlord.work()
    row = await landlord.row()
    assert row["skipped"] == (40 - 7) * 24
    assert (row["status"], row["problem"]) == ("past_due", "insufficient_credits")
    assert await landlord.shop.available() == "0"
    assert len(await landlord.charges()) == 100


async def test_months_keep_their_day(landlord: Landlord) -> None:
    periods = landlord.connection.execute(
        "SELECT recurring_period('2027-01-31 09:00Z', 'month', n) AT TIME ZONE 'UTC'"
        " FROM generate_series(0, 3) AS n"
    ).fetchall()
    assert [(row[0].month, row[0].day) for row in periods] == [(1, 31), (2, 28), (3, 31), (4, 30)]
    numbers = landlord.connection.execute(
        "SELECT recurring_number('2027-01-31 09:00Z', 'month', at::timestamptz) FROM unnest(ARRAY["
        " '2027-01-31 08:59Z', '2027-02-28 08:59Z', '2027-02-28 09:00Z', '2027-03-30 09:00Z',"
        " '2028-01-31 09:00Z']) AS t (at)"
    ).fetchall()
    assert [row[0] for row in numbers] == [-1, 0, 1, 1, 12]


async def test_no_credits_is_past_due_and_at_last_paused(landlord: Landlord) -> None:
    await landlord.start(quantity=101)
    for attempt in range(72):
        row = await landlord.row()
        assert row["status"] == ("past_due" if attempt else "active")
        landlord.connection.execute("UPDATE recurring_charges SET due_at = now()")
        assert await landlord.work() == 1
    row = await landlord.row()
    assert (row["status"], row["problem"]) == ("paused", "insufficient_credits")
    landlord.connection.execute("UPDATE recurring_charges SET due_at = now()")
    assert await landlord.work() == 0
    await landlord.shop.operate("adjustments", {"credits": "1", "reason": "r", "reference": "a"})
    row = await landlord.change(row, "resume")
    assert (row["status"], row["problem"]) == ("active", None)
    assert await landlord.work() == 1
    assert (await landlord.row())["status"] == "active"
    assert await landlord.shop.available() == "0"


async def test_what_was_paused_goes_on_with_the_running_period(landlord: Landlord) -> None:
    row = await landlord.start()
    await landlord.work()
    paused = await landlord.change(row, "pause")
    assert paused["status"] == "paused"
    assert await landlord.change(row, "pause") == paused
    landlord.pass_time(days=3, hours=1)
    assert await landlord.work() == 0
    resumed = await landlord.change(row, "resume")
    assert (resumed["status"], resumed["skipped"]) == ("active", 2)
    assert await landlord.work() == 1
    assert await landlord.shop.available() == "96"


async def test_what_is_cancelled_is_over(landlord: Landlord) -> None:
    row = await landlord.start()
    cancelled = await landlord.change(row, "cancel")
    assert (cancelled["status"], cancelled["next_at"]) == ("cancelled", None)
    assert await landlord.work() == 0
    error = (await landlord.change(row, "resume", status=409))["error"]
    assert error["code"] == "recurring_charge_over"
    assert await landlord.change(row, "cancel") == cancelled


async def test_it_starts_and_ends_when_it_is_told(landlord: Landlord) -> None:
    now = datetime.now(UTC)
    row = await landlord.start(
        starts_at=(now + timedelta(days=1)).isoformat(),
        ends_at=(now + timedelta(days=2, hours=1)).isoformat(),
    )
    assert await landlord.work() == 0
    landlord.pass_time(days=1)
    assert await landlord.work() == 1
    assert (await landlord.row())["status"] == "active"
    landlord.pass_time(days=1)
    assert await landlord.work() == 1
    assert (await landlord.row())["status"] == "ended"
    assert len(await landlord.charges()) == 2
    await landlord.change(row, "pause", status=409)
    # One that nobody looked at until it was over.
    await landlord.start(every="hour", ends_at=(now + timedelta(minutes=30)).isoformat())
    landlord.pass_time(days=10)
    assert await landlord.work() == 0
    statuses = [each["status"] for each in (await landlord.shop.get("recurring-charges"))["data"]]
    assert statuses == ["ended", "ended"]
    assert len(await landlord.charges()) == 2


async def test_the_same_key_makes_one(landlord: Landlord) -> None:
    headers = {"idempotency-key": "rent"}
    body = {"action": "message", "every": "month"}
    first = await landlord.shop.post("recurring-charges", body, headers=headers)
    again = await landlord.shop.post("recurring-charges", body, headers=headers, status=200)
    assert first == again
    other = {**body, "every": "week"}
    error = await landlord.shop.post("recurring-charges", other, headers=headers, status=409)
    assert error["error"]["code"] == "idempotency_key_reused"


@pytest.mark.parametrize(
    "body",
    [
        {"action": "message", "every": "year"},
        {"action": "message"},
        {"action": "message", "every": "day", "starts_at": "2020-01-01T00:00:00Z"},
        {"action": "message", "every": "day", "starts_at": "2099-01-01T00:00:00"},
        {
            "action": "message",
            "every": "day",
            "starts_at": "2099-01-02T00:00:00Z",
            "ends_at": "2099-01-01T00:00:00Z",
        },
    ],
)
async def test_what_makes_no_sense_is_400(landlord: Landlord, body: dict[str, object]) -> None:
    await landlord.shop.post("recurring-charges", body, status=400)
    await landlord.shop.post("recurring-charges", {"action": "letter", "every": "day"}, status=404)


async def test_a_suspended_account_is_tried_again_and_a_closed_one_is_not(
    landlord: Landlord,
) -> None:
    await landlord.start()
    accounts = "UPDATE accounts SET status = %s, version = version + 1"
    for status, expected in (("suspended", "past_due"), ("closed", "paused")):
        landlord.connection.execute(accounts, (status,))
        landlord.connection.execute("UPDATE recurring_charges SET due_at = now()")
        assert await landlord.work() == 1
        found = landlord.connection.execute("SELECT status, problem FROM recurring_charges")
        assert found.fetchall() == [(expected, f"account_{status}")]


async def test_what_an_operator_made_the_customer_can_not_stop(landlord: Landlord) -> None:
    body = {"action": "message", "every": "day"}
    row = await landlord.shop.operate("recurring-charges", body)
    assert (row["operator"], row["account_id"]) == ("admin", landlord.shop.account_id)
    for change in ("pause", "resume", "cancel"):
        await landlord.change(row, change, status=403)
    await landlord.work()
    (charge,) = (await landlord.shop.get("charges"))["data"]
    await landlord.shop.post(f"charges/{charge['id']}/void", status=403)
    path = f"recurring-charges/{row['id']}"
    paused = await landlord.shop.operate(f"{path}/pause", status=200)
    assert paused["status"] == "paused"
    page = await landlord.shop.api.admin(
        "GET", f"/accounts/{landlord.shop.account_id}/recurring-charges"
    )
    assert page["data"] == [paused]
    assert (
        await landlord.shop.api.admin("GET", f"/accounts/{landlord.shop.account_id}/{path}")
        == paused
    )


async def test_those_of_another_account_are_404_and_other_roles_are_403(
    landlord: Landlord, api: Api
) -> None:
    row = await landlord.start()
    other = await api.new_account()
    key = (await api.new_key(other, role="manage"))["key"]
    path = f"/api/v1/recurring-charges/{row['id']}"
    await api.refused("GET", path, 404, key=key)
    await api.refused("GET", "/api/v1/recurring-charges/x", 404, key=key)
    for change in ("pause", "resume", "cancel"):
        await api.refused("POST", f"{path}/{change}", 404, key=key)
        foreign = f"/admin/v1/accounts/{other}/recurring-charges/{row['id']}/{change}"
        await api.refused("POST", foreign, 404, key=ADMIN_KEY)
    user = (await api.new_key(landlord.shop.account_id))["key"]
    await api.refused("POST", f"{path}/cancel", 403, key=user)
    assert (await landlord.row())["status"] == "active"


async def test_where_metering_is_away_it_is_tried_again_soon(
    landlord: Landlord, monkeypatch: pytest.MonkeyPatch
) -> None:
    await landlord.start()

    async def away(*_args: object) -> None:
        raise MeteringUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(landlord.shop.api.services.charges, "account_payer", away)
        assert await landlord.work() == 1
    row = await landlord.row()
    assert (row["status"], row["problem"]) == ("active", None)
    (due_in,) = landlord.connection.execute(
        "SELECT extract(EPOCH FROM due_at - now())::integer FROM recurring_charges"
    ).fetchone() or (0,)
    assert 50 < due_in <= 60


async def test_the_background_goes_on_after_postgresql_was_away(
    landlord: Landlord, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([psycopg.OperationalError("away"), 1, 0])
    has_gone_on = asyncio.Event()

    async def charge_due() -> int:
        outcome = next(outcomes, None)
        if outcome is None:
            has_gone_on.set()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome or 0

    monkeypatch.setattr("proxy.charges.recurring._POLL_S", 0)
    monkeypatch.setattr(landlord.recurring, "charge_due", charge_due)
    task = asyncio.create_task(landlord.recurring.run())
    await asyncio.wait_for(has_gone_on.wait(), 10)
    task.cancel()
