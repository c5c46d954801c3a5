"""What is to be told is found once, kept, and told in order until somebody takes it."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from standardwebhooks import WebhookVerificationError

from proxy.ids import uuid7
from proxy.webhooks import Backlog, Delivery, Reach, RetryPolicy, Sender, Watch, WebhookStore
from proxy.webhooks.store import Claimed
from tests.integration.money import Money, NewAccount, capture
from tests.support.api import NANOS_PER_CREDIT, Api
from tests.support.receiver import Inbox, ReceiverProcess, open_inbox
from tests.support.service import free_port

pytestmark = pytest.mark.anyio

LOCALLY = Reach(allow_http=True, allow_private=True)
REVIEW = {"review_reason": "cost_mismatch"}
AT_ONCE = RetryPolicy(first_s=0.0, longest_s=0.0, give_up_s=3600.0)


@dataclass
class House:
    """The API, the watch and the delivery on one database, and a receiver."""

    api: Api
    inbox: Inbox
    retries: RetryPolicy = AT_ONCE
    secret: str = ""
    id: str = ""
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.store, interval_s=0.01, retention_s=0.0)

    @property
    def store(self) -> WebhookStore:
        return self.api.services.webhooks

    @property
    def path(self) -> str:
        return f"/webhooks/{self.id}"

    def delivery(self, reach: Reach = LOCALLY) -> Delivery:
        return Delivery(
            self.store,
            Sender(reach, timeout_s=5),
            self.retries,
            nanos_per_credit=NANOS_PER_CREDIT,
            timeout_s=5,
        )

    async def receiver(self, **body: object) -> str:
        made = await self.api.admin("POST", "/webhooks", {"url": self.inbox.url, **body})
        self.id, self.secret = made["id"], made["secret"]
        return made["id"]

    async def deliver(self, reach: Reach = LOCALLY) -> int:
        """Deliver what is due now; returns the number of attempts."""
        return await self.delivery(reach).serve(UUID(self.id))

    async def tell(self) -> list[Any]:
        """Find what there is to tell and deliver it; returns what was received for it."""
        before = len(self.inbox.received)
        await self.watch.round()
        await self.deliver()
        return [received.verify(self.secret) for received in self.inbox.received[before:]]

    async def deliveries(self, **filters: str) -> list[Any]:
        page = await self.api.admin("GET", self.path + "/deliveries", params=filters)
        return page["data"]


@pytest.fixture
async def house(api: Api) -> AsyncIterator[House]:
    api = api.with_(webhook_reach=LOCALLY)
    async with open_inbox() as inbox:
        yield House(api, inbox)


def threshold(money: Money, nanos: int) -> None:
    money.all(
        "UPDATE accounts SET low_balance_threshold = %s WHERE account_id = %s RETURNING 1",
        nanos,
        money.account_id,
    )


def spend(money: Money, nanos: int, **changes: object) -> str:
    request = money.hold(nanos)
    assert money.settle(capture(request, nanos, **changes)) == ["captured"]
    return str(request["request_id"])


def credits_(amount: str, usd: str) -> dict[str, str]:
    return {"credits": amount, "usd": usd}


# --- what is told ---


async def test_low_and_exhausted_balances_are_told_once_a_crossing(
    house: House, account: NewAccount
) -> None:
    money = account(funds=10_000_000)
    threshold(money, 4_000_000)
    await house.receiver()
    assert await house.tell() == []

    spend(money, 7_000_000)
    (low,) = await house.tell()
    assert low["type"] == "balance.low"
    assert low["data"] == {
        "account_id": str(money.account_id),
        "balance": {
            "posted": credits_("3", "0.003"),
            "held": credits_("0", "0"),
            "available": credits_("3", "0.003"),
        },
        "threshold": credits_("4", "0.004"),
    }
    assert low["timestamp"].endswith("Z")
    spend(money, 1_000_000)
    assert await house.tell() == []  # it is low still
    spend(money, 2_000_000)
    (exhausted,) = await house.tell()
    assert exhausted["type"] == "balance.exhausted"
    assert exhausted["data"]["balance"]["posted"] == credits_("0", "0")

    money.fund(9_000_000, "second")
    assert await house.tell() == []
    spend(money, 9_000_000)
    assert [event["type"] for event in await house.tell()] == ["balance.low", "balance.exhausted"]


async def test_holds_do_not_make_a_balance_low(house: House, account: NewAccount) -> None:
    money = account(funds=10_000_000)
    threshold(money, 4_000_000)
    await house.receiver()
    money.hold(10_000_000)
    assert await house.tell() == []


async def test_an_account_that_never_had_anything_is_not_exhausted(
    house: House, account: NewAccount
) -> None:
    account()
    await house.receiver()
    assert await house.tell() == []


async def test_a_key_over_its_budget_is_told_once_a_period(
    house: House, account: NewAccount
) -> None:
    money = account(funds=10_000_000, budget=2_000_000, budget_period="day")
    await house.receiver()
    spend(money, 1_999_999)
    assert await house.tell() == []
    spend(money, 1)
    (over,) = await house.tell()
    assert over["type"] == "key.over_budget"
    assert over["data"] == {
        "account_id": str(money.account_id),
        "key_id": str(money.key_id),
        "budget": {**credits_("2", "0.002"), "period": "day"},
        "spent": credits_("2", "0.002"),
    }
    assert await house.tell() == []
    # What was told of yesterday says nothing of today.
    money.all("UPDATE webhook_told SET mark = mark - interval '1 day' RETURNING 1")
    assert [event["type"] for event in await house.tell()] == ["key.over_budget"]


async def test_each_review_that_lasts_is_told(house: House, account: NewAccount) -> None:
    money = account(funds=10_000_000)
    await house.receiver()
    request_id = spend(money, 2_000_000, **REVIEW)
    (opened,) = await house.tell()
    assert opened["type"] == "review.opened"
    assert opened["data"] == {
        "account_id": str(money.account_id),
        "request_id": request_id,
        "reason": "cost_mismatch",
        "model": "m",
        "endpoint": "chat.completions",
        "price": credits_("2", "0.002"),
    }
    assert await house.tell() == []


async def test_a_failed_audit_is_told_and_a_clean_one_is_not(
    house: House, account: NewAccount
) -> None:
    money, run_id = account(), uuid7()
    await house.receiver()
    money.all("SELECT record_audit(%s, 'full', 0, 0, 10, 5)", uuid7())
    money.all("SELECT record_audit(%s, 'incremental', 0, 3, 10, 5)", run_id)
    (failed,) = await house.tell()
    assert failed["type"] == "audit.failed"
    assert failed["data"] == {
        "account_id": None, "run_id": str(run_id), "scope": "incremental", "findings": 3,
    }  # fmt: skip


async def test_pages_miss_nobody_and_ids_that_run_out_neither(
    house: House, account: NewAccount
) -> None:
    for _ in range(5):
        spend(account(funds=1000), 1000)
    pages = 0
    events = 0
    while True:
        page = await house.store.watch(accounts=2, pause_s=0, interval_s=0)
        pages, events = pages + 1, events + page.events
        if page.is_last:
            break
    assert (pages, events) == (3, 5)
    money = account(funds=1000)
    for _ in range(3):
        spend(money, 1, **REVIEW)
    found: list[tuple[Any, ...]] = []
    while not found or not found[-1][2]:
        found.append(
            money.one("SELECT * FROM watch_page(100, 0, 0, %s)", [uuid7() for _ in range(2)])
        )
    assert found == [(True, 2, False), (True, 1, True)]


async def test_one_replica_watches_at_a_time(house: House, account: NewAccount) -> None:
    spend(account(funds=1000), 1000)
    money = account()
    with money.connection.transaction():
        money.all("SELECT * FROM webhook_watch FOR UPDATE")
        page = await house.store.watch(accounts=10, pause_s=0, interval_s=60)
        assert not page.is_due
    page = await house.store.watch(accounts=10, pause_s=0, interval_s=60)
    assert (page.is_due, page.events, page.is_last) == (True, 1, True)
    assert not (await house.store.watch(accounts=10, pause_s=0, interval_s=60)).is_due


# --- how it is delivered ---


async def test_what_is_refused_holds_up_its_account_and_nobody_else(
    house: House, account: NewAccount
) -> None:
    one, other = account(funds=100), account(funds=100)
    await house.receiver(event_types=["review.opened"])
    first, second = spend(one, 1, **REVIEW), spend(one, 1, **REVIEW)
    third = spend(other, 1, **REVIEW)
    house.retries = RetryPolicy(first_s=3600, longest_s=3600, give_up_s=7200)
    house.inbox.refusals = {first: 503}
    told = await house.tell()
    assert {event["data"]["request_id"] for event in told} == {first, third}

    waiting, refused = await house.deliveries(status="pending")
    assert (refused["last_error"], refused["attempts"]) == ("answered 503", 1)
    assert (waiting["last_error"], waiting["attempts"]) == (None, 0)
    assert refused["next_attempt_at"] is not None
    assert waiting["next_attempt_at"] is None
    statuses = [row["status"] for row in await house.deliveries()]
    assert sorted(statuses) == ["delivered", "pending", "pending"]
    assert (await house.store.backlog() or Backlog(0, 0, 0)).pending == 2

    # The same id again, so that the receiver knows it, and only then the next one.
    again = {"event_id": refused["event_id"]}
    assert await house.api.admin("POST", house.path + "/replay", again) == {"queued": 1}
    assert [event["data"]["request_id"] for event in await house.tell()] == [first, second]
    assert len({received.id for received in house.inbox.received}) == 3


async def test_what_nobody_takes_in_time_has_failed_and_the_next_is_tried(
    house: House, account: NewAccount
) -> None:
    money = account(funds=100)
    await house.receiver()
    first, second = spend(money, 1, **REVIEW), spend(money, 1, **REVIEW)
    house.retries = RetryPolicy(first_s=0, longest_s=0, give_up_s=0)
    house.inbox.statuses = [302]
    told = await house.tell()
    assert [event["data"]["request_id"] for event in told] == [first, second]
    delivered, failed = await house.deliveries()
    assert (delivered["status"], delivered["last_status"]) == ("delivered", 204)
    assert (failed["status"], failed["last_status"], failed["attempts"]) == ("failed", 302, 1)
    assert failed["last_error"] == "answered 302, and redirects are not followed"
    assert await house.store.backlog() == Backlog(pending=0, oldest_s=0, failed=1)
    metrics = (await house.api.call("GET", "/metrics")).text
    assert "tallygate_webhooks_failed 1.0" in metrics
    assert 'tallygate_webhook_attempts_total{outcome="failed"}' in metrics


async def test_a_receiver_that_is_gone_is_paused_and_told_all_when_it_is_back(
    house: House, account: NewAccount
) -> None:
    money = account(funds=100)
    await house.receiver()
    requests = [spend(money, 1, **REVIEW) for _ in range(2)]
    house.inbox.statuses = [410]
    assert len(await house.tell()) == 1
    receiver = await house.api.admin("GET", house.path)
    assert (receiver["status"], receiver["gone"]) == ("paused", True)
    assert await house.tell() == []
    assert await house.store.due_receivers() == []

    receiver = await house.api.admin("PATCH", house.path, {"status": "active"})
    assert (receiver["status"], receiver["gone"]) == ("active", False)
    assert [event["data"]["request_id"] for event in await house.tell()] == requests


async def test_what_a_dead_replica_had_is_delivered_by_another(
    house: House, account: NewAccount
) -> None:
    money = account(funds=100)
    await house.receiver()
    spend(money, 1, **REVIEW)
    await house.watch.round()
    (dead,) = await house.store.claim(UUID(house.id), limit=8, lease_s=0)
    (live,) = await house.store.claim(UUID(house.id), limit=8, lease_s=60)
    assert live.event_id == dead.event_id

    async def finish(claimed: Claimed, outcome: str) -> str:
        return await house.store.finish(
            UUID(house.id), claimed, outcome=outcome, status=500, error="x", retry_s=0, give_up_s=0
        )

    # The one who was thought dead comes back: its word counts no more, before and after.
    assert await finish(dead, "refused") == "lost"
    assert [row["attempts"] for row in await house.deliveries()] == [0]
    assert await finish(live, "delivered") == "delivered"
    assert await finish(dead, "refused") == "lost"
    assert [row["status"] for row in await house.deliveries()] == ["delivered"]


async def test_what_is_leased_is_nobody_elses(house: House, account: NewAccount) -> None:
    money = account(funds=100)
    await house.receiver()
    spend(money, 1, **REVIEW)
    await house.watch.round()
    assert len(await house.store.claim(UUID(house.id), limit=8, lease_s=60)) == 1
    assert await house.deliver() == 0


async def test_receivers_take_the_types_that_they_want_and_both_secrets_sign_for_a_while(
    house: House, account: NewAccount
) -> None:
    money = account(funds=100)
    await house.receiver(event_types=["audit.failed", "review.opened"])
    old = house.secret
    rotated = await house.api.admin("POST", house.path + "/rotate", {"overlap_s": 600})
    assert rotated["old_secret_until"] is not None
    spend(money, 100, **REVIEW)
    house.secret = rotated["secret"]
    assert [event["type"] for event in await house.tell()] == ["review.opened"]
    assert house.inbox.received[0].verify(old)

    last = await house.api.admin("POST", house.path + "/rotate", {"overlap_s": 0})
    await house.api.admin("POST", house.path + "/test")
    house.secret = last["secret"]
    assert [event["type"] for event in await house.tell()] == ["webhook.test"]
    for secret in (old, rotated["secret"]):
        with pytest.raises(WebhookVerificationError):
            house.inbox.received[-1].verify(secret)


async def test_events_are_sent_again_and_to_receivers_that_came_later(
    house: House, account: NewAccount
) -> None:
    money = account(funds=100)
    requests = [spend(money, 1, **REVIEW) for _ in range(3)]
    await house.watch.round()
    await house.receiver()
    await house.api.admin("POST", house.path + "/test")
    assert [event["type"] for event in await house.tell()] == ["webhook.test"]

    queued = await house.api.admin(
        "POST", house.path + "/replay", {"since": "2001-01-01T00:00:00Z"}
    )
    assert queued == {"queued": 3}  # a test is not sent again
    assert [event["data"]["request_id"] for event in await house.tell()] == requests
    again = {"event_id": house.inbox.received[2].id}
    assert await house.api.admin("POST", house.path + "/replay", again) == {"queued": 1}
    assert [event["data"]["request_id"] for event in await house.tell()] == requests[1:2]


async def test_old_events_are_forgotten_but_those_that_wait(
    house: House, account: NewAccount
) -> None:
    one, other = account(funds=100), account(funds=100)
    await house.receiver()
    house.retries = RetryPolicy(first_s=3600, longest_s=3600, give_up_s=7200)
    spend(one, 1, **REVIEW)
    await house.tell()
    house.inbox.statuses = [500]
    spend(other, 1, **REVIEW)
    await house.tell()
    # Ids are made a moment before the events of the millisecond that has to be over.
    while not await house.watch.purge():
        pass
    assert [row["status"] for row in await house.deliveries()] == ["pending"]
    # Nobody knows how long a receiver stays paused: what waits for it is forgotten.
    await house.api.admin("PATCH", house.path, {"status": "paused"})
    assert await house.watch.purge() == 1
    assert await house.deliveries() == []
    await house.api.admin("PATCH", house.path, {"status": "active"})
    assert await house.tell() == []


async def test_nothing_is_sent_into_the_own_network(house: House, account: NewAccount) -> None:
    money = account(funds=100)
    await house.receiver()
    spend(money, 1, **REVIEW)
    await house.watch.round()
    house.retries = RetryPolicy(first_s=3600, longest_s=3600, give_up_s=7200)
    assert await house.deliver(Reach(allow_http=True, allow_private=False)) == 1
    assert house.inbox.received == []
    (row,) = await house.deliveries()
    assert row["last_status"] is None
    assert "localhost is no address of the internet" in row["last_error"]


async def test_a_receiver_that_is_not_there_is_told_of(house: House, account: NewAccount) -> None:
    house.inbox.port = free_port()
    await house.receiver()
    house.retries = RetryPolicy(first_s=3600, longest_s=3600, give_up_s=7200)
    spend(account(funds=100), 1, **REVIEW)
    await house.tell()
    (row,) = await house.deliveries()
    assert row["last_error"].startswith("ConnectError")


# --- killed and restarted under load ---


async def test_a_receiver_killed_and_restarted_under_load_gets_everything_in_order(
    house: House, account: NewAccount, tmp_path: Path
) -> None:
    house.inbox.port = free_port()
    house.retries = RetryPolicy(first_s=0.02, longest_s=0.1, give_up_s=3600)
    await house.receiver()
    receiver = ReceiverProcess(house.inbox.port, house.secret, tmp_path / "events")
    accounts = [account(funds=1000) for _ in range(6)]
    expected: dict[str, list[str]] = {str(money.account_id): [] for money in accounts}
    replicas = [house.delivery(), house.delivery()]

    async def deliver() -> None:
        async with asyncio.TaskGroup() as group:
            for replica in replicas:
                group.create_task(replica.serve(UUID(house.id)))

    async def deliver_and_be_killed(arrived: int) -> None:
        """It dies in the middle of a delivery, when so many have arrived."""
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            delivering = group.create_task(deliver())
            while len(receiver.events()) < arrived:
                await asyncio.sleep(0)
                if delivering.done():
                    delivering = group.create_task(deliver())
            receiver.kill()

    try:
        for round_number in range(4):
            receiver.start()
            for money in accounts * 8:
                expected[str(money.account_id)].append(spend(money, 1, **REVIEW))
            await house.watch.round()
            if round_number < 3:
                await deliver_and_be_killed(48 * round_number + 24)
        while (await house.store.backlog() or Backlog(1, 0, 0)).pending:
            await deliver()
    finally:
        receiver.kill()
    assert_told_in_order(receiver.events(), expected)


def assert_told_in_order(events: list[Any], expected: dict[str, list[str]]) -> None:
    """Each account's requests arrived, by first arrival in their order."""
    first_arrivals: dict[str, list[str]] = {name: [] for name in expected}
    ids: dict[str, str] = {}
    for event in events:
        data = event["data"]
        if data["request_id"] not in first_arrivals[data["account_id"]]:
            first_arrivals[data["account_id"]].append(data["request_id"])
        # A repetition has the id of the first, by which the receiver knows it.
        assert ids.setdefault(data["request_id"], event["id"]) == event["id"]
    assert first_arrivals == expected
    assert len(set(ids.values())) == sum(len(requests) for requests in expected.values())


# --- the API ---


async def test_receivers_are_listed_changed_and_deleted(house: House) -> None:
    await house.receiver(description="billing", event_types=["balance.low", "balance.low"])
    receiver = await house.api.admin("GET", house.path)
    assert receiver == {
        "id": house.id,
        "url": house.inbox.url,
        "description": "billing",
        "event_types": ["balance.low"],
        "status": "active",
        "gone": False,
        "old_secret_until": None,
        "created_at": receiver["created_at"],
    }
    change = {"url": "https://example.com/x", "event_types": None, "description": None}
    changed = await house.api.admin("PATCH", house.path, change)
    assert changed == {**receiver, "url": "https://example.com/x", "event_types": None}
    assert (await house.api.admin("GET", "/webhooks"))["data"] == [changed]
    await house.api.admin("DELETE", house.path)
    assert (await house.api.admin("GET", "/webhooks"))["data"] == []
    trail = (await house.api.admin("GET", "/audit-trail"))["data"]
    assert [act["action"] for act in trail] == [
        "webhook.delete", "webhook.change", "webhook.create",
    ]  # fmt: skip
    assert house.secret not in json.dumps(trail)


async def test_deleting_a_receiver_forgets_what_was_under_way(
    house: House, account: NewAccount
) -> None:
    money = account(funds=100)
    await house.receiver()
    spend(money, 1, **REVIEW)
    await house.watch.round()
    await house.api.admin("DELETE", house.path)
    assert money.one("SELECT count(*) FROM webhook_deliveries") == (0,)
    assert money.one("SELECT count(*) FROM webhook_lanes") == (0,)
    assert await house.deliver() == 0


@pytest.mark.parametrize(
    "method, path, body",
    [
        ("GET", "", None),
        ("PATCH", "", {"status": "paused"}),
        ("DELETE", "", None),
        ("POST", "/rotate", {}),
        ("POST", "/test", None),
        ("POST", "/replay", {"since": "2026-01-01T00:00:00Z"}),
        ("GET", "/deliveries", None),
    ],
)
@pytest.mark.parametrize("id_", ["0198c0de-0000-7000-8000-000000000000", "nobody"])
async def test_an_unknown_receiver_is_not_found(
    api: Api, method: str, path: str, body: object, id_: str
) -> None:
    request: dict[str, Any] = {} if body is None else {"json": body}
    error = await api.refused(method, f"/admin/v1/webhooks/{id_}{path}", 404, **request)
    assert "no receiver" in error["message"]


@pytest.mark.parametrize(
    "body, param",
    [
        ({"url": "http://example.com"}, "url"),
        ({"url": "https://127.0.0.1/x"}, "url"),
        ({"url": "https://example.com", "event_types": ["nothing"]}, "event_types.0"),
        ({"url": "https://example.com", "event_types": []}, "event_types"),
        ({"url": "https://example.com", "secret": "mine"}, "secret"),
    ],
)
async def test_a_wrong_receiver_is_refused(api: Api, body: dict[str, object], param: str) -> None:
    error = await api.refused("POST", "/admin/v1/webhooks", 400, json=body)
    assert error["param"] == param


@pytest.mark.parametrize(
    "body, status",
    [
        ({}, 400),
        ({"event_id": str(uuid7()), "since": "2026-01-01T00:00:00Z"}, 400),
        ({"event_id": str(uuid7())}, 404),
        ({"since": "0001-01-01T00:00:00+14:00"}, 202),
        ({"since": "9999-12-31T23:59:59-14:00"}, 202),
    ],
)
async def test_replays_of_nothing_and_of_all_times(
    house: House, body: dict[str, object], status: int
) -> None:
    await house.receiver()
    path = f"/admin/v1/webhooks/{house.id}"
    if status != 202:
        await house.api.refused("POST", path + "/replay", status, json=body)
    else:
        assert await house.api.admin("POST", house.path + "/replay", body) == {"queued": 0}
    await house.api.refused("GET", path + "/deliveries?status=lost", 400)
