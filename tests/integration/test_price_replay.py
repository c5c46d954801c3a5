"""A draft tried on past usage: what is counted how, and within which bounds."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pricing.price_book import parse_price_book
from proxy.db import Pool, make_pool
from proxy.errors import InvalidRequestError, RateLimitError
from proxy.price_replay import PriceReplays
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import NANOS_PER_CREDIT, Api

pytestmark = pytest.mark.anyio

DRAFTS = "/price-books/drafts"
TRIPLE = {"default": {"kind": "markup", "factor": "3"}}
DAY = timedelta(days=1)
# As many requests as capture() makes, over and over: 3 tokens in, 4 out, cost 50 nanos.
FILL = """
INSERT INTO usage (
    account_id, request_id, key_id, created_at, settled_at, endpoint, model, tier, streamed, byok,
    status, input_tokens, output_tokens, cost_picos, cost_source, price, rounding_attos, rule,
    markup_ppm, price_version, hold
)
SELECT
    %(account_id)s, (left(uuid_floor(%(at)s)::text, 24) || lpad(to_hex(n), 12, '0'))::uuid,
    %(key_id)s, %(at)s, %(at)s, 'chat.completions', 'm' || n %% 7, 'free', false, false,
    'billed', 3, 4, 50000, 'header', 100, 0, 'default', 2000000, 1, 100
FROM generate_series(1, %(rows)s) AS n
"""


def fill(money: Money, at: datetime, rows: int) -> None:
    ids = {"account_id": money.account_id, "key_id": money.key_id}
    money.connection.execute(FILL, {**ids, "at": at, "rows": rows})


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    async with make_pool(database_url, max_size=2) as opened:
        yield opened


async def replay(api: Api, document: dict[str, Any], **period: str) -> Any:
    made = await api.admin("POST", DRAFTS, {"name": "new", "document": document})
    around = {
        "from": (datetime.now(UTC) - DAY).isoformat(),
        "until": (datetime.now(UTC) + DAY).isoformat(),
    }
    path = f"{DRAFTS}/{made['id']}/replay"
    # Ids of requests are of whole milliseconds, and the last of them was this very one.
    await asyncio.sleep(0.002)
    return await api.admin("POST", path, period or around)


def usd(revenue: dict[str, Any]) -> list[str]:
    return [revenue[name]["usd"] for name in ("now", "draft", "change")]


async def test_requests_are_counted_by_model_and_tier(api: Api, account: NewAccount) -> None:
    money = account(funds=10**9)
    for model, tier, price in (("a", "free", 100), ("a", "pro", 100), ("b", "pro", 1000)):
        money.settle(capture(money.hold(1000, model=model, tier=tier), price))
    # The cost is half the price; what was void, and what is pending, is nobody's revenue.
    money.settle(void(money.hold(7)))
    money.hold(8)
    found = await replay(api, {**TRIPLE, "rules": [{"model": "a", "kind": "flat", "credits": 1}]})
    assert found["requests"] == 3
    assert usd(found["revenue"]) == ["0.0000012", "0.0020015", "0.0020003"]
    assert [(row["model"], row["requests"], *usd(row["revenue"])) for row in found["models"]] == [
        ("a", 2, "0.0000002", "0.002", "0.0019998"),
        ("b", 1, "0.000001", "0.0000015", "0.0000005"),
    ]
    assert [(row["tier"], row["requests"], *usd(row["revenue"])) for row in found["tiers"]] == [
        ("pro", 2, "0.0000011", "0.0010015", "0.0010004"),
        ("free", 1, "0.0000001", "0.001", "0.0009999"),
    ]
    assert (found["unpriced"], found["set_by_hand"]) == ([], 0)
    assert found["waiting"] == {"requests": 0, "priced": 0, "revenue": {"credits": "0", "usd": "0"}}


async def test_rules_for_an_account_are_for_that_account(api: Api, account: NewAccount) -> None:
    mine, theirs = account(funds=10**9), account(funds=10**9)
    for money in (theirs, mine, theirs):
        money.settle(capture(money.hold(1000), 100))
    rule = {"account": str(mine.account_id), "kind": "markup", "factor": "100"}
    found = await replay(api, {**TRIPLE, "rules": [rule]})
    assert usd(found["revenue"])[1] == "0.0000053"


async def test_what_the_draft_cant_price_would_wait_for_a_review(
    api: Api, account: NewAccount
) -> None:
    money = account(funds=10**9)
    unknown = {"cost_picos": None, "rule": "rules[0]", "markup_ppm": None}
    money.settle(capture(money.hold(1000, model="a"), 100, **unknown))
    counts = {"input_tokens": None, "output_tokens": None}
    money.settle(capture(money.hold(1000, model="b"), 10, **counts))
    money.settle(capture(money.hold(1000, model="c"), 1, output_tokens=10**7))
    price = {"kind": "per_token", "credits": {"input": 1, "output": 10**9}, "multiplier": 1000}
    found = await replay(api, {**TRIPLE, "rules": [{"model": "[bc]", **price}]})
    assert [
        (row["reason"], row["requests"], row["revenue"]["usd"]) for row in found["unpriced"]
    ] == [
        ("no_cost_to_mark_up", 1, "0.0000001"),
        ("price_too_large", 1, "0.000000001"),
        ("usage_unknown", 1, "0.00000001"),
    ]
    assert (found["requests"], *usd(found["revenue"])) == (
        3, "0.000000111", "0", "-0.000000111",
    )  # fmt: skip


async def test_what_waits_now_may_have_a_price_under_the_draft(
    api: Api, account: NewAccount
) -> None:
    money = account(funds=10**9)
    for model, reason in (("a", "price_missing"), ("b", "price_missing"), ("a", "orphaned")):
        waits = {"status": "needs_review", "review_reason": reason}
        money.settle(void(money.hold(1000, model=model), **waits))
    free = {"kind": "flat", "credits": "2", "allow_loss": True}
    found = await replay(api, {**TRIPLE, "rules": [{"model": "a", **free}]})
    # An orphaned request would be one under any book.
    assert (found["waiting"]["requests"], found["waiting"]["priced"]) == (2, 1)
    assert found["waiting"]["revenue"] == {"credits": "2", "usd": "0.002"}
    assert (found["requests"], found["unpriced"]) == (0, [])


async def test_prices_set_by_hand_and_actions_are_what_they_are(
    api: Api, account: NewAccount
) -> None:
    money = account(funds=10**9)
    request = money.hold(1000)
    money.settle(capture(request, 100, review_reason="cost_mismatch"))
    decision = {"account_id": str(money.account_id), "decision": "reprice", "credits": "0.0005"}
    path = f"/reviews/{request['request_id']}"
    await api.admin("POST", path, {**decision, "reason": "agreed"})
    for name in ("upload", "gone"):
        action = {"quantity": 3, "rule": f"actions.{name}", "markup_ppm": None, "cost_picos": None}
        money.settle(capture(money.hold(1000, model=name, endpoint="charges"), 7, **action))
    found = await replay(api, {**TRIPLE, "actions": {"upload": "0.000001"}})
    assert (found["set_by_hand"], found["requests"]) == (1, 3)
    assert {row["model"]: usd(row["revenue"])[:2] for row in found["models"]} == {
        "m": ["0.0000005", "0.0000005"],
        "upload": ["0.000000007", "0.000000003"],
        "gone": ["0.000000007", "0"],
    }
    (unpriced,) = found["unpriced"]
    assert unpriced["reason"] == "action_without_price"


async def test_a_period_is_from_its_first_instant_to_before_its_last(
    api: Api, account: NewAccount
) -> None:
    money = account()
    until = datetime(2026, 3, 21, tzinfo=UTC)
    # In three months, and at both ends.
    for days, rows in ((60, 1), (30, 10), (10, 100), (0, 1000)):
        fill(money, until - timedelta(days=days), rows)
    for days, requests in ((60, 111), (59, 110), (30, 110), (29, 100)):
        since = until - timedelta(days=days)
        found = await replay(api, TRIPLE, **{"from": since.isoformat(), "until": until.isoformat()})
        assert found["requests"] == requests


async def test_the_last_whole_month_is_replayed_if_nothing_is_said(api: Api) -> None:
    made = await api.admin("POST", DRAFTS, {"name": "new", "document": TRIPLE})
    found = await api.admin("POST", f"{DRAFTS}/{made['id']}/replay", {})
    first, until = (datetime.fromisoformat(found[name]) for name in ("from", "until"))
    now = datetime.now(UTC)
    assert (until.year, until.month, until.day, until.hour) == (now.year, now.month, 1, 0)
    assert until - first in {timedelta(days=days) for days in (28, 29, 30, 31)}
    assert (first.day, first.hour, first.utcoffset()) == (1, 0, timedelta())


async def test_a_period_that_is_none_is_refused(api: Api) -> None:
    made = await api.admin("POST", DRAFTS, {"name": "new", "document": TRIPLE})
    path = f"/admin/v1{DRAFTS}/{made['id']}/replay"
    for since, until, param in (
        ("2026-01-02T00:00:00Z", "2026-01-01T00:00:00Z", "from"),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "from"),
        ("2025-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "from"),
        ("0001-01-01T00:00:00+14:00", "0001-02-01T00:00:00Z", "from"),
        ("9999-12-30T00:00:00Z", "9999-12-31T23:59:59-14:00", "from"),
        ("2026-01-01T00:00:00", "2026-01-02T00:00:00Z", "from"),
        (None, "2026-01-01T00:00:00Z", "from"),
        ("2026-01-01T00:00:00Z", None, "until"),
    ):
        error = await api.refused("POST", path, 400, json={"from": since, "until": until})
        assert error["param"] == param


async def test_a_month_that_was_detached_is_said_to_be_gone(api: Api, account: NewAccount) -> None:
    account().all(
        "INSERT INTO detached_months VALUES ('2026-02-01', now(), 't', 0, 0, 0, 0, 0) RETURNING 1"
    )
    made = await api.admin("POST", DRAFTS, {"name": "new", "document": TRIPLE})
    path = f"/admin/v1{DRAFTS}/{made['id']}/replay"
    period = {"from": "2026-02-28T23:59:59Z", "until": "2026-03-02T00:00:00Z"}
    error = await api.refused("POST", path, 400, json=period)
    assert "2026-02 was detached" in error["message"]
    whole = {**period, "from": "2026-03-01T00:00:00Z"}
    assert (await api.admin("POST", path.removeprefix("/admin/v1"), whole))["requests"] == 0


async def test_a_replay_gives_way_keeps_nothing_and_comes_to_an_end(
    pool: Pool, account: NewAccount
) -> None:
    rows = 60_000
    now = datetime.now(UTC)
    fill(account(), now, rows)
    replays, book = PriceReplays(pool), parse_price_book(TRIPLE)
    period = {"since": now - DAY, "until": now + DAY}
    gaps: list[float] = []

    async def take_turns() -> None:
        # By the work done between them, so that a busy machine makes no difference.
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            gaps.append(time.thread_time() - before)
            before += gaps[-1]

    await replays.replay(book, NANOS_PER_CREDIT, since=now - DAY, until=now - DAY / 2)
    resident = resident_kib()
    task = asyncio.create_task(take_turns())
    other = asyncio.create_task(replays.replay(book, NANOS_PER_CREDIT, **period))
    await asyncio.sleep(0)
    with pytest.raises(RateLimitError, match="Another replay is under way"):
        await replays.replay(book, NANOS_PER_CREDIT, **period)
    found = await other
    task.cancel()
    assert (found.total.requests, found.total.draft_nanos) == (rows, rows * 150)
    assert {sold.requests for sold in found.models.values()} == {rows // 7, rows // 7 + 1}
    # Others had their turn after every fifty requests. All rows at once would be 16 MiB.
    work_of_250_s = sum(gaps) * 250 / rows
    assert sum(gap > work_of_250_s for gap in gaps) < 50
    assert resident_kib() - resident < 5 * 1024

    hurried = PriceReplays(pool, timeout_s=0.1)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=r"given up after 0\.1 s") as refused:
            await hurried.replay(book, NANOS_PER_CREDIT, **period)
        assert "Ask for shorter periods" in refused.value.message


async def test_names_beyond_the_first_thousand_are_lumped_together(
    pool: Pool, account: NewAccount
) -> None:
    now = datetime.now(UTC)
    fill(money := account(), now, 1500)
    money.connection.execute("UPDATE usage SET model = request_id::text")
    found = await PriceReplays(pool).replay(
        parse_price_book(TRIPLE), NANOS_PER_CREDIT, since=now - DAY, until=now + DAY
    )
    assert (len(found.models), found.models[None].requests) == (1001, 500)


def resident_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])
