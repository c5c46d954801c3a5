"""Tiers over the admin API, the credits that they give, and credits that expire."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from proxy.audit import audit
from proxy.expiring_credits import CreditSweeper
from proxy.tiers import Tiers
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import NANOS_PER_CREDIT, Api

TIERS = {
    "free": {
        "allowed_models": ["gpt-4o-mini", "demo*"],
        "requests_per_minute": 3,
        "monthly_credits": "50",
        "starter_credits": "7.5",
        "max_request_credits": "2",
        "markup": "3",
    },
    "pro": {"requests_per_minute": 60, "monthly_credits": "80"},
}
MONTHLY = {"free": 50, "pro": 80}


@pytest.fixture
async def tiered(api: Api, database_url: str) -> Api:
    """The APIs of a house with tiers."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT tallygate.freeze_nanos_per_credit(%s)", (NANOS_PER_CREDIT,))
    tiers = Tiers(TIERS, default="default", nanos_per_credit=NANOS_PER_CREDIT)
    return api.with_(tiers=tiers)


def of(money: dict[str, str]) -> str:
    return money["credits"]


def next_month() -> datetime:
    first = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (first + timedelta(days=32)).replace(day=1)


async def funding(api: Api, account_id: str) -> list[tuple[Any, ...]]:
    async with api.services.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT source, external_id, amount / %s::numeric FROM funding WHERE account_id = %s"
            " ORDER BY entry_id",
            (NANOS_PER_CREDIT, account_id),
        )
        return await cursor.fetchall()


# --- over the admin API ---


@pytest.mark.anyio
async def test_tiers_are_shown_in_the_order_of_the_configuration(tiered: Api) -> None:
    free, pro = (await tiered.admin("GET", "/tiers"))["data"]

    assert (free["name"], pro["name"]) == ("free", "pro")
    assert free["allowed_models"] == ["gpt-4o-mini", "demo*"]
    assert (of(free["max_request"]), of(free["monthly"]), free["markup"]) == ("2", "50", "3")
    assert of(free["starter"]) == "7.5"
    assert (pro["allowed_models"], pro["max_request"], pro["markup"]) == (None, None, None)


@pytest.mark.anyio
async def test_a_tier_that_nobody_configured_is_refused_but_the_default(tiered: Api) -> None:
    body = {"name": "Ada", "tier": "fre"}
    error = await tiered.refused("POST", "/admin/v1/accounts", 400, json=body)
    assert (error["param"], "free, pro" in error["message"]) == ("tier", True)
    assert await tiered.new_account(tier="default")
    account_id = await tiered.new_account()
    path = f"/admin/v1/accounts/{account_id}/tier"
    assert (await tiered.refused("PUT", path, 400, json={"tier": "x"}))["param"] == "tier"


@pytest.mark.anyio
async def test_any_tier_will_do_where_none_is_configured(api: Api) -> None:
    account_id = await api.new_account(tier="gold")
    assert (await api.admin("PUT", f"/accounts/{account_id}/tier", {"tier": "lead"}))["tier"]


@pytest.mark.anyio
async def test_a_new_account_starts_with_what_its_tier_gives(tiered: Api) -> None:
    account_id = await tiered.new_account(tier="free")

    balance = await tiered.admin("GET", f"/accounts/{account_id}/balance")
    assert of(balance["posted"]) == "57.5"
    (expiring,) = balance["expiring"]
    assert of(expiring) == "50"
    assert datetime.fromisoformat(expiring["expires_at"]) == next_month()
    month = datetime.now(UTC).strftime("monthly:%Y-%m")
    assert await funding(tiered, account_id) == [("tier", "starter", 7.5), ("tier", month, 50)]
    # The grant is the operator's, by the account that they made; the month's is nobody's act.
    trail = (await tiered.admin("GET", "/audit-trail"))["data"]
    assert [event["action"] for event in trail] == ["grant", "account.create"]


@pytest.mark.anyio
async def test_an_upgrade_gives_the_difference_once(tiered: Api) -> None:
    account_id = await tiered.new_account(tier="free")
    path = f"/accounts/{account_id}/tier"
    for tier in ("pro", "free", "pro"):
        changed = await tiered.admin("PUT", path, {"tier": tier})
    assert changed["terms"]["requests_per_minute"] == 60

    month = datetime.now(UTC).strftime("monthly:%Y-%m")
    assert (await funding(tiered, account_id))[1:] == [
        ("tier", month, 50),
        ("tier", f"{month}:pro", 30),
    ]
    trail = (await tiered.admin("GET", "/audit-trail"))["data"]
    assert [event["action"] for event in trail[:3]] == ["account.tier"] * 3
    assert trail[0]["detail"] == {"tier": "pro", "before": "free"}


@pytest.mark.anyio
async def test_an_account_may_have_terms_of_its_own(tiered: Api) -> None:
    account_id = await tiered.new_account(tier="free")
    path = f"/accounts/{account_id}/overrides"
    overrides = {"allowed_models": ["*"], "monthly_credits": "60.50", "max_request_credits": 9}

    changed = await tiered.admin("PUT", path, overrides)

    assert changed["overrides"] == {
        "allowed_models": ["*"], "monthly_credits": "60.5", "max_request_credits": "9",
    }  # fmt: skip
    assert (changed["terms"]["allowed_models"], changed["terms"]["requests_per_minute"]) == (
        ["*"],
        3,
    )
    assert of(changed["terms"]["max_request"]) == "9"
    assert (await tiered.admin("GET", f"/accounts/{account_id}/terms")) == changed
    assert [row[2] for row in await funding(tiered, account_id)] == [7.5, 50, 10.5]
    changed = await tiered.admin("PUT", path, {})
    assert (changed["overrides"], changed["terms"]["allowed_models"]) == (
        {},
        ["gpt-4o-mini", "demo*"],
    )


@pytest.mark.anyio
async def test_overrides_that_make_no_sense_are_refused(tiered: Api) -> None:
    path = f"/admin/v1/accounts/{await tiered.new_account()}/overrides"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"requests_per_minute": None}, "requests_per_minute"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": 2**31}, "requests_per_minute"),
        ({"allowed_models": []}, "allowed_models"),
        ({"allowed_models": ["a\x00"]}, "allowed_models.0"),
        ({"max_request_credits": "0"}, "max_request_credits"),
        ({"max_request_credits": "-1"}, "max_request_credits"),
        ({"monthly_credits": "0.0000000001"}, "monthly_credits"),
        ({"markup": "1"}, "markup"),
        ({"starter_credits": "1"}, "starter_credits"),
    ]
    for body, param in wrong:
        error = await tiered.refused("PUT", path, 400, json=body)
        assert error["param"] == param, body


@pytest.mark.anyio
async def test_a_grant_that_expires_is_shown_to_its_customer(api: Api) -> None:
    account_id = await api.new_account(credits="5")
    key = (await api.new_key(account_id))["key"]
    until = (datetime.now(UTC) + timedelta(days=3)).isoformat()
    grant = {"credits": "20", "reason": "promotion", "reference": "p", "expires_at": until}
    path = f"/accounts/{account_id}/grants"

    granted = await api.admin("POST", path, grant)

    assert (await api.admin("POST", path, grant)) == granted
    assert of(granted["balance"]["posted"]) == "25"
    balance = (await api.call("GET", "/api/v1/balance", key=key)).json()
    (expiring,) = balance["expiring"]
    assert (of(expiring), of(balance["available"])) == ("20", "25")
    assert datetime.fromisoformat(expiring["expires_at"]) == datetime.fromisoformat(until)
    later = {**grant, "expires_at": (datetime.now(UTC) + timedelta(days=9)).isoformat()}
    error = await api.refused("POST", f"/admin/v1{path}", 409, json=later)
    assert error["param"] == "reference"
    past = {**grant, "expires_at": "2020-01-01T00:00:00Z"}
    assert (await api.refused("POST", f"/admin/v1{path}", 400, json=past))["param"] == "expires_at"


# --- the sweeper ---


@pytest.mark.anyio
async def test_every_account_gets_its_month_and_loses_what_is_left(
    tiered: Api, database_url: str
) -> None:
    services = tiered.services
    create = services.accounts.create_account
    made = [
        await create(name=tier, tier=tier, credit_limit_nanos=0, actor="test")
        for tier in ("free", "pro", "default", "free")
    ]
    suspended = made[3]
    with psycopg.connect(database_url, autocommit=True) as owner:
        owner.execute(
            "UPDATE tallygate.accounts SET status = 'suspended' WHERE account_id = %s",
            (suspended,),
        )
        monthly = services.tiers.monthly_nanos
        sweeper = CreditSweeper(services.expiring_credits, monthly, interval_s=15)
        await sweeper.sweep()
        await sweeper.sweep()
        assert [await amounts(tiered, each) for each in made] == [[50], [80], [], []]

        owner.execute("UPDATE tallygate.expiring_credits SET expires_at = now(), due_at = now()")
        await sweeper.sweep()
        # Nobody is given the same month twice.
        assert [await amounts(tiered, each) for each in made] == [[50, -50], [80, -80], [], []]
        # An hour later, who is not suspended any more; and when the configuration says otherwise.
        owner.execute("UPDATE tallygate.accounts SET status = 'active'")
        await sweeper.sweep()
        assert await amounts(tiered, suspended) == []
        more = CreditSweeper(
            services.expiring_credits, {**monthly, "pro": 100 * NANOS_PER_CREDIT}, interval_s=15
        )
        await more.sweep()
    assert await amounts(tiered, suspended) == [50]
    assert await amounts(tiered, made[1]) == [80, -80, 20]
    assert [finding for finding in audit(database_url) if finding.violations] == []


async def amounts(api: Api, account_id: UUID) -> list[Any]:
    return [row[2] for row in await funding(api, str(account_id))]


def test_walk_goes_on_behind_the_last_account_and_waits_after_the_last(
    account: NewAccount,
) -> None:
    accounts = sorted((account() for _ in range(5)), key=lambda money: money.account_id)
    walk = "SELECT grant_monthly_credits('{\"default\": 9}', 2, 3600)"

    went_on = [accounts[0].one(walk)[0] for _ in range(4)]

    assert went_on == [True, True, False, False]
    assert [money.balance()[0] for money in accounts] == [9] * 5
    late = account()
    assert (late.one(walk)[0], late.balance()[0]) == (False, 0)
    late.connection.execute("UPDATE monthly_walk SET month = '2020-01'")
    for _ in range(4):
        late.one(walk)
    assert late.balance()[0] == 9


# --- what expires ---


def left(money: Money) -> list[Any]:
    rows = money.all(
        "SELECT remaining, free FROM expiring_credits_left(%s) WHERE remaining > 0",
        money.account_id,
    )
    return [tuple(row) for row in rows]


def expire(money: Money) -> int:
    money.connection.execute("UPDATE expiring_credits SET due_at = expires_at")
    return money.one("SELECT expire_credits(100)")[0]


def test_what_a_request_under_way_holds_expires_when_it_has_ended(account: NewAccount) -> None:
    money = account(funds=10)
    money.fund_expiring(100, "gone")
    kept, captured = money.hold(30), money.hold(40)

    assert expire(money) == 1
    assert money.balance() == (80, 70, 0)
    money.settle(capture(captured, 25))
    money.settle(void(kept))
    assert left(money) == [(45, 45)]
    assert expire(money) == 1

    assert money.balance() == (10, 0, 0)
    assert expire(money) == 0
    assert money.kinds()[-1] == "credit_expiry"
    rows = money.all(
        "SELECT e.amount, e.reference = x.grant_id::text FROM entries AS e, expiring_credits AS x"
        " WHERE e.kind = 'credit_expiry' ORDER BY e.seq"
    )
    assert rows == [(-30, True), (-45, True)]


def test_an_expiry_can_go_no_deeper_than_what_is_there(account: NewAccount) -> None:
    money = account(funds=10)
    money.fund_expiring(100, "gone", 60)
    money.settle(capture(money.hold(50), 200))  # more than there was: an overdraft
    money.connection.execute("UPDATE expiring_credits SET expires_at = now()")

    expire(money)

    assert money.balance() == (-90, 0, 90)
    assert "credit_expiry" not in money.kinds()
    # What comes next pays the debt first.
    money.fund_expiring(100, "next")
    assert left(money) == [(10, 10)]
    expire(money)
    assert money.balance() == (0, 0, 0)


def test_what_was_spent_before_a_grant_is_not_taken_from_it(account: NewAccount) -> None:
    money = account(funds=1000)
    money.settle(capture(money.hold(400), 400))
    money.fund_expiring(100, "new", 60)
    assert left(money) == [(100, 100)]
    money.settle(capture(money.hold(30), 30))
    money.fund_expiring(50, "sooner", 30)
    money.settle(capture(money.hold(60), 60))
    assert left(money) == [(60, 60)]


def test_an_expiry_waits_for_a_settlement_and_takes_what_it_leaves(account: NewAccount) -> None:
    money, other = account(), account()
    money.fund_expiring(100, "gone")
    request = money.hold(100)
    sweeper = threading.Thread(target=lambda: other.one("SELECT expire_credits(100)"))
    with money.connection.transaction():
        money.settle(capture(request, 60))
        sweeper.start()
        with psycopg.connect(
            money.connection.info.dsn, autocommit=True, options="-c search_path=tallygate"
        ) as watcher:
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while watcher.execute(waiting).fetchone() == (0,):
                pass
    sweeper.join()

    assert money.balance() == (0, 0, 0)
    assert money.one("SELECT expired FROM expiring_credits") == (40,)


def test_one_sweeper_works_at_a_time(account: NewAccount) -> None:
    money, other = account(), account()
    money.fund_expiring(100, "gone")
    with other.connection.transaction():
        assert other.one("SELECT expire_credits(100)") == (1,)
        assert money.one("SELECT expire_credits(100)") == (0,)
    assert money.one("SELECT expire_credits(100)") == (0,)


def test_the_service_may_do_all_of_it(account: NewAccount) -> None:
    money = account()
    money.connection.execute("SET ROLE tallygate_app")
    money.fund_expiring(100, "gone")
    assert left(money) == [(100, 100)]
    assert money.one("SELECT expire_credits(9)") == (1,)
    assert money.one("SELECT grant_month(%s, '{\"default\": 5}')", money.account_id) == (5,)
    assert money.one("SELECT grant_monthly_credits('{}', 9, 9)") == (False,)
    opened = "SELECT open_account(gen_random_uuid(), 'b', 'c', 0, 'test', 7, '{\"c\": 3}')"
    assert money.one(opened) == (True,)


def test_an_id_of_the_database_is_a_uuidv7_of_now(account: NewAccount) -> None:
    money = account()
    made = [money.one("SELECT new_uuid7()")[0] for _ in range(100)]
    assert {(each.version, each.variant) for each in made} == {(7, "specified in RFC 4122")}
    assert len(set(made)) == 100
    age_ms = datetime.now(UTC).timestamp() * 1000 - (made[-1].int >> 80)
    assert -1000 < age_ms < 60_000
