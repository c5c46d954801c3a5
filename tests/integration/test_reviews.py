"""The review queue: what an operator decides is done once, is told, and stands."""

import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pricing.errors import PricingError
from proxy.audit import audit
from proxy.db import Pool, make_pool
from proxy.ids import uuid7
from proxy.reports import Reports, ReviewFilter
from proxy.reviews import Decision, Reviews
from tests.integration.money import Money, NewAccount, Row, capture, void, wait_for_waiters

Request = dict[str, object]

BOOK = {
    "default": {"kind": "markup", "factor": "2.0", "byok_fee_percent": "10"},
    "rules": [
        {
            "model": "tokens",
            "kind": "per_token",
            "credits": {"input": "1", "output": "2"},
            "allow_loss": True,
        },
    ],
}
DEARER = {"default": {"kind": "markup", "factor": "3.0"}}


def publish(money: Money, book: dict[str, Any] = BOOK) -> None:
    money.one("SELECT publish_price_book(%s, 1000000, %s, 'test')", json.dumps(book), uuid4())


def uncharged(money: Money, amount: int = 400, **changes: object) -> Request:
    """A request whose answer was delivered and whose cost nobody knew."""
    request = money.hold(amount, **changes)
    ending = void(request, status="needs_review", review_reason="usage_missing")
    assert money.settle(ending) == ["voided"]
    return request


def orphaned(money: Money, amount: int = 400) -> Request:
    """A request whose proxy died."""
    request = money.hold(amount, ttl_s=0)
    assert money.one("SELECT expire_holds(10, 0)") == (1,)
    return request


def doubted(money: Money, price: int = 90, **changes: object) -> Request:
    """A request that was charged, at a cost that somebody should look at."""
    request = money.hold(400)
    bill = capture(request, price, review_reason="cost_mismatch", **changes)
    assert money.settle(bill) == ["captured"]
    return request


def resolve(
    money: Money,
    request: Request,
    decision: str,
    price: int | None = None,
    *,
    account_id: UUID | None = None,
    settled_at: datetime | None = None,
    connection: psycopg.Connection[Any] | None = None,
) -> Row:
    """Decide by hand; returns outcome and overdraft."""
    row = (
        (connection or money.connection)
        .execute(
            "SELECT * FROM tallygate.resolve_review("
            "%s, %s, %s, %s, %s, 0, %s, NULL, NULL, %s, 'me', 'because')",
            (
                account_id or money.account_id,
                request["request_id"],
                decision,
                settled_at,
                price,
                None if price is None else "review",
                uuid7(),
            ),
        )
        .fetchone()
    )
    assert row is not None
    return row


def told(money: Money) -> list[Row]:
    """What the trail has of reviews, the oldest first."""
    return money.all(
        "SELECT actor, action, detail ->> 'request_id', detail ->> 'reason',"
        " (detail ->> 'price_before')::bigint, (detail ->> 'price')::bigint"
        " FROM audit_trail WHERE action LIKE 'review.%%' ORDER BY event_id"
    )


def is_clean(url: str) -> bool:
    return [found for found in audit(url) if found.violations] == []


def summary(money: Money, request: Request) -> tuple[object, ...]:
    row = money.usage(request)
    return (row["status"], row["price"], row["resolution"])


# --- what each decision does ---


@pytest.mark.parametrize("ended_by", [uncharged, orphaned])
def test_a_charge_takes_the_price_after_all(
    account: NewAccount, database_url: str, ended_by: Callable[[Money], Request]
) -> None:
    money = account(funds=1000, budget=10_000)
    publish(money)
    request = ended_by(money)
    reason = money.usage(request)["review_reason"]

    assert resolve(money, request, "charge", 150) == ("resolved", 0)

    assert money.balance() == (850, 0, 0)
    assert money.kinds()[-1] == "late_capture"
    row = money.usage(request)
    assert (row["status"], row["price"], row["rule"]) == ("billed", 150, "review")
    assert (row["resolution"], row["review_reason"]) == ("charge", reason)
    assert row["resolved_at"] is not None
    assert (row["rounding_attos"], row["markup_ppm"], row["cost_picos"]) == (0, None, None)
    assert money.one("SELECT sum(spent)::bigint FROM scope_counters") == (150,)
    assert told(money) == [
        ("me", "review.charge", request["request_id"], "because", None, 150),
    ]
    assert is_clean(database_url)


def test_a_waived_request_stays_uncharged_and_is_void(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=1000)
    request = uncharged(money)
    kinds = money.kinds()

    assert resolve(money, request, "waive") == ("resolved", 0)

    assert summary(money, request) == ("void", None, "waive")
    assert (money.balance(), money.kinds()) == ((1000, 0, 0), kinds)
    assert [row[1:2] for row in told(money)] == [("review.waive",)]
    assert is_clean(database_url)


def test_a_waived_doubt_leaves_the_charge_as_it_is(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    publish(money)
    request = doubted(money, 90)

    assert resolve(money, request, "waive") == ("resolved", 0)

    assert summary(money, request) == ("billed", 90, "waive")
    assert money.balance() == (910, 0, 0)
    assert told(money)[0][4:] == (90, 90)
    assert is_clean(database_url)


@pytest.mark.parametrize("price, correction", [(40, 50), (0, 90), (140, -50)])
def test_another_price_is_a_correction_of_the_old_one(
    account: NewAccount, database_url: str, price: int, correction: int
) -> None:
    money = account(funds=1000, budget=10_000)
    publish(money)
    request = doubted(money, 90)

    assert resolve(money, request, "reprice", price) == ("resolved", 0)

    assert money.balance() == (1000 - price, 0, 0)
    assert money.kinds() == ["grant", "hold", "capture", "correction"]
    entry = money.one(
        "SELECT phase, amount, posted_delta, reserved_delta, reason FROM entries"
        " WHERE kind = 'correction'"
    )
    assert entry == (3, correction, correction, 0, "because")
    assert money.one("SELECT amount FROM entries WHERE kind = 'capture'") == (90,)
    assert summary(money, request) == ("billed", price, "reprice")
    assert money.one("SELECT sum(spent)::bigint FROM scope_counters") == (price,)
    assert told(money)[0][4:] == (90, price)
    assert is_clean(database_url)


def test_the_same_price_again_posts_nothing(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    publish(money)
    request = doubted(money, 90)
    assert resolve(money, request, "reprice", 90) == ("resolved", 0)
    assert money.kinds() == ["grant", "hold", "capture"]
    assert summary(money, request) == ("billed", 90, "reprice")
    assert is_clean(database_url)


def test_a_price_may_be_corrected_where_nobody_had_doubted_it(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=1000)
    publish(money)
    request = money.hold(400)
    money.settle(capture(request, 90))
    assert resolve(money, request, "waive") == ("not_waiting", 0)
    assert resolve(money, request, "reprice", 40) == ("resolved", 0)
    assert is_clean(database_url)


def test_late_truth_can_be_repriced_as_well(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    publish(money)
    request = uncharged(money)
    money.settle(capture(request, 90, cost_source="witness", review_reason="cost_mismatch"))
    assert resolve(money, request, "reprice", 40) == ("resolved", 0)
    assert money.kinds()[-2:] == ["late_capture", "correction"]
    money.connection.execute("UPDATE usage SET cost_source = 'review'")  # had a cost been named
    assert is_clean(database_url)


def test_a_fee_on_the_customers_own_key_stays_one(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    publish(money)
    request = uncharged(money, 5, byok=True)
    resolve(money, request, "charge", 3)
    assert summary(money, request) == ("byok", 3, "charge")
    assert is_clean(database_url)


def test_a_correction_counts_in_the_period_of_its_capture(account: NewAccount) -> None:
    money = account(funds=1000, budget=10_000, budget_period="day")
    request = doubted(money, 90)
    money.connection.execute("UPDATE usage SET settled_at = settled_at - interval '1 day'")
    resolve(money, request, "reprice", 40)
    assert money.one("SELECT sum(spent)::bigint FROM scope_counters") == (90,)


# --- money that is not there ---


def test_a_charge_beyond_what_is_there_is_an_overdraft_that_a_deposit_clears(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=100)
    publish(money)
    request = uncharged(money, 50)

    assert resolve(money, request, "charge", 130) == ("resolved", 30)

    assert money.balance() == (-30, 0, 30)
    assert money.usage(request)["overdraft"] == 30
    assert money.authorize(money.request(1)) == ["insufficient_credits"]
    money.fund(50, "second", "deposit")
    assert money.balance() == (20, 0, 0)
    assert is_clean(database_url)


def test_a_charge_takes_what_others_hold_only_as_an_overdraft(
    account: NewAccount, database_url: str
) -> None:
    money = account(funds=100)
    publish(money)
    request = uncharged(money, 50)
    other = money.hold(80)
    assert resolve(money, request, "charge", 30) == ("resolved", 10)
    assert money.settle(capture(other, 80)) == ["captured"]
    assert money.balance() == (-10, 0, 10)
    assert is_clean(database_url)


def test_a_lower_price_pays_an_overdraft_back(account: NewAccount, database_url: str) -> None:
    money = account(funds=100)
    publish(money)
    request = money.hold(50)
    money.settle(capture(request, 160))
    assert money.balance() == (-60, 0, 60)
    resolve(money, request, "reprice", 40)
    assert (money.balance(), money.usage(request)["overdraft"]) == ((60, 0, 0), 40)
    assert is_clean(database_url)


# --- once ---


@pytest.mark.parametrize(
    "make, decision, price, others",
    [
        (uncharged, "charge", 150, [("charge", 151), ("waive", None), ("reprice", 150)]),
        (uncharged, "waive", None, [("charge", 150), ("reprice", 150)]),
        (doubted, "waive", None, [("charge", 90), ("reprice", 40)]),
        (doubted, "reprice", 40, [("reprice", 41), ("waive", None), ("charge", 40)]),
    ],
)
def test_the_same_decision_again_is_answered_and_another_is_a_conflict(
    account: NewAccount,
    database_url: str,
    make: Callable[[Money], Request],
    decision: str,
    price: int | None,
    others: list[tuple[str, int | None]],
) -> None:
    money = account(funds=1000)
    publish(money)
    request = make(money)
    assert resolve(money, request, decision, price)[0] == "resolved"
    before = (money.balance(), money.kinds(), money.usage(request), told(money))

    assert resolve(money, request, decision, price) == ("exists", 0)
    for other, other_price in others:
        assert resolve(money, request, other, other_price) == ("conflict", 0)

    assert (money.balance(), money.kinds(), money.usage(request), told(money)) == before
    assert is_clean(database_url)


def test_a_decision_must_fit_the_request(account: NewAccount) -> None:
    money = account(funds=1000)
    open_, failed, done = money.hold(1), money.hold(1), money.hold(1)
    money.settle(void(failed), capture(done, 1))
    waiting, charged = uncharged(money), doubted(money)
    cases = [
        (open_, "waive", "unknown"),
        (money.request(1), "waive", "unknown"),
        (failed, "charge", "not_waiting"),
        (failed, "waive", "not_waiting"),
        (failed, "reprice", "not_charged"),
        (done, "waive", "not_waiting"),
        (done, "charge", "already_charged"),
        (waiting, "reprice", "not_charged"),
        (charged, "charge", "already_charged"),
    ]
    for request, decision, outcome in cases:
        price = None if decision == "waive" else 1
        assert resolve(money, request, decision, price) == (outcome, 0), (decision, outcome)
    assert told(money) == []


def test_another_accounts_request_is_unknown(account: NewAccount) -> None:
    money, other = account(funds=1000), account(funds=1000)
    request = uncharged(money)
    for stranger in (other.account_id, uuid7()):
        answer = resolve(money, request, "charge", 5, account_id=stranger)
        assert answer == ("unknown", 0)
    assert other.balance() == (1000, 0, 0)


def test_a_price_of_what_the_row_said_before_is_stale(account: NewAccount) -> None:
    money = account(funds=1000)
    request = orphaned(money)
    settled_at: datetime = money.usage(request)["settled_at"]
    review = void(request, status="needs_review", review_reason="price_missing")
    assert money.settle({**review, "input_tokens": 3, "output_tokens": 4}) == ["amended"]
    assert resolve(money, request, "charge", 5, settled_at=settled_at) == ("stale", 0)
    settled_at = money.usage(request)["settled_at"]
    assert resolve(money, request, "charge", 5, settled_at=settled_at) == ("resolved", 0)


# --- what comes late ---


@pytest.mark.parametrize("make", [uncharged, orphaned])
@pytest.mark.parametrize("decision, price", [("charge", 150), ("waive", None)])
def test_neither_spool_nor_witness_undoes_a_decision(
    account: NewAccount,
    database_url: str,
    make: Callable[[Money], Request],
    decision: str,
    price: int | None,
) -> None:
    money = account(funds=1000)
    publish(money)
    request = make(money)
    resolve(money, request, decision, price)
    before = (money.balance(), money.kinds(), money.usage(request))

    answers = money.settle(
        capture(request, 70),
        capture(request, 70, cost_source="witness"),
        void(request),
        void(request, status="needs_review", review_reason="price_missing"),
    )

    assert {answer.split("_")[0] for answer in answers} == {"already"}
    assert (money.balance(), money.kinds(), money.usage(request)) == before
    assert is_clean(database_url)


@pytest.mark.parametrize("is_doubted", [True, False])
def test_a_witness_who_disagrees_asks_nobody_twice(account: NewAccount, is_doubted: bool) -> None:  # noqa: FBT001
    money = account(funds=1000)
    request = money.hold(400)
    reason = "cost_mismatch" if is_doubted else None
    money.settle(capture(request, 90, review_reason=reason))
    resolve(money, request, "reprice", 40)
    note = {**{name: request[name] for name in ("account_id", "request_id")}, "mismatch": True}
    note |= {"cost_picos": 5, "attempts": 2}
    assert money.all("SELECT outcome FROM note_witness(%s)", json.dumps([note])) == [("noted",)]
    row = money.usage(request)
    assert (row["witness_picos"], row["attempts"]) == (5, 2)
    assert (row["resolution"], row["review_reason"]) == ("reprice", reason)
    assert row["resolved_at"] is not None


def test_what_came_before_the_decision_stands(account: NewAccount, database_url: str) -> None:
    money = account(funds=1000)
    publish(money)
    late, known = orphaned(money), uncharged(money)
    money.settle(capture(late, 70), capture(known, 80, cost_source="witness"))
    assert resolve(money, late, "charge", 150) == ("already_charged", 0)
    assert resolve(money, known, "waive") == ("not_waiting", 0)
    assert money.balance() == (850, 0, 0)
    assert is_clean(database_url)


@pytest.mark.parametrize("first", range(4))
def test_of_everybody_at_once_one_wins(account: NewAccount, database_url: str, first: int) -> None:
    """An operator, a colleague of theirs, the witness and a spool, in every order of arrival."""
    money = account(funds=1000)
    publish(money)
    request = orphaned(money)

    def operator(price: int | None) -> str:
        decision = "waive" if price is None else "charge"
        with psycopg.connect(database_url, autocommit=True) as connection:
            return resolve(money, request, decision, price, connection=connection)[0]

    def late(source: str) -> str:
        bill = json.dumps([capture(request, 70, cost_source=source)])
        with psycopg.connect(database_url, autocommit=True) as connection:
            row = connection.execute(
                "SELECT outcome FROM tallygate.settle_batch(%s)", (bill,)
            ).fetchone()
        assert row is not None
        return row[0]

    acts: list[Callable[[], str]] = [
        lambda: operator(150),
        lambda: operator(None),
        lambda: late("witness"),
        lambda: late("header"),
    ]
    acts = acts[first:] + acts[:first]
    outcomes: list[Future[str]] = []
    with ThreadPoolExecutor(4) as threads:
        with psycopg.connect(database_url) as gate:
            gate.execute("SELECT 1 FROM tallygate.balances FOR NO KEY UPDATE")
            for number, act in enumerate(acts, 1):
                outcomes.append(threads.submit(act))
                wait_for_waiters(money, number)
        answers = [outcome.result() for outcome in outcomes]

    won = [answer for answer in answers if answer in {"resolved", "captured_late"}]
    assert len(won) == 1
    price = money.usage(request)["price"]
    assert money.balance() == (1000 - (price or 0), 0, 0)
    assert money.kinds().count("late_capture") == (price is not None)
    assert is_clean(database_url)


@pytest.mark.parametrize("decision, price", [("reprice", 40), ("waive", None)])
def test_a_decision_waits_for_a_doubt_that_is_being_raised(
    account: NewAccount,
    database_url: str,
    decision: str,
    price: int | None,
) -> None:
    money = account(funds=1000)
    publish(money)
    request = money.hold(400)
    money.settle(capture(request, 90))
    note = {**{name: request[name] for name in ("account_id", "request_id")}, "mismatch": True}
    note |= {"cost_picos": 5, "attempts": 2}
    with ThreadPoolExecutor(1) as threads:
        with psycopg.connect(database_url) as witness:
            witness.execute("SELECT * FROM tallygate.note_witness(%s)", (json.dumps([note]),))

            def decide() -> Row:
                with psycopg.connect(database_url, autocommit=True) as connection:
                    return resolve(money, request, decision, price, connection=connection)

            decided = threads.submit(decide)
            wait_for_waiters(money, 1)
        assert decided.result() == ("resolved", 0)
    row = money.usage(request)
    assert (row["witness_picos"], row["price"]) == (5, price or 90)
    assert (row["review_reason"], row["resolution"]) == ("witness_mismatch", decision)
    assert is_clean(database_url)


# --- by a cost ---


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """The service's pool."""
    async with make_pool(database_url) as opened:
        yield opened


@pytest.fixture
def reviews(pool: Pool) -> Reviews:
    """The service's reviews."""
    return Reviews(pool, Reports(pool))


async def decide(reviews: Reviews, money: Money, request: Request, decision: Decision) -> str:
    resolved = await reviews.resolve(
        money.account_id, UUID(str(request["request_id"])), decision, actor="me", reason="because"
    )
    assert resolved.row is None or resolved.row["request_id"] == UUID(str(request["request_id"]))
    return resolved.outcome


@pytest.mark.anyio
async def test_a_cost_is_priced_as_the_request_was_sold_and_the_audit_agrees(
    account: NewAccount, database_url: str, reviews: Reviews
) -> None:
    money = account(funds=1_000_000)
    publish(money)
    waiting, charged = uncharged(money), doubted(money, 90)
    publish(money, DEARER)
    decision = Decision("charge", cost_picos=50_001)

    assert await decide(reviews, money, waiting, decision) == "resolved"
    again = Decision("reprice", cost_picos=30_000)
    assert await decide(reviews, money, charged, again) == "resolved"

    row = money.usage(waiting)
    assert (row["price"], row["rounding_attos"], row["rule"]) == (101, 998_000_000, "default")
    assert (row["cost_picos"], row["cost_source"]) == (50_001, "review")
    assert (row["markup_ppm"], row["price_version"]) == (2_000_000, 1)
    assert (money.usage(charged)["price"], money.usage(charged)["cost_picos"]) == (60, 30_000)
    assert is_clean(database_url)
    assert await decide(reviews, money, waiting, decision) == "exists"
    assert await decide(reviews, money, charged, again) == "exists"
    # The same price, made otherwise.
    assert await decide(reviews, money, charged, Decision("reprice", price_nanos=60)) == "conflict"
    # Another cost of another price, and another of the same.
    for cost_picos in (50_000, 50_500):
        other = Decision("charge", cost_picos=cost_picos)
        assert await decide(reviews, money, waiting, other) == "conflict"


@pytest.mark.anyio
async def test_a_fee_is_priced_of_the_cost_on_the_customers_key(
    account: NewAccount, database_url: str, reviews: Reviews
) -> None:
    money = account(funds=1_000_000)
    publish(money)
    request = uncharged(money, 5, byok=True)
    await decide(reviews, money, request, Decision("charge", cost_picos=50_000))
    row = money.usage(request)
    assert (row["status"], row["price"], row["markup_ppm"]) == ("byok", 5, None)
    assert is_clean(database_url)


@pytest.mark.anyio
async def test_a_cost_makes_no_price_where_the_rule_wants_tokens(
    account: NewAccount, database_url: str, reviews: Reviews
) -> None:
    money = account(funds=10_000_000)
    publish(money)
    request = uncharged(money, model="tokens")
    with pytest.raises(PricingError, match="usage is unknown"):
        await decide(reviews, money, request, Decision("charge", cost_picos=5))
    assert await decide(reviews, money, request, Decision("charge", price_nanos=5)) == "resolved"
    assert is_clean(database_url)


@pytest.mark.anyio
async def test_without_its_price_book_a_request_is_priced_by_hand_only(
    account: NewAccount, reviews: Reviews
) -> None:
    money = account(funds=1000)
    request = uncharged(money)
    with pytest.raises(PricingError, match="version 1 of the price book"):
        await decide(reviews, money, request, Decision("charge", cost_picos=5))
    assert await decide(reviews, money, request, Decision("charge", price_nanos=5)) == "resolved"


@pytest.mark.anyio
async def test_a_row_that_is_completed_meanwhile_is_priced_anew(
    account: NewAccount, database_url: str, pool: Pool
) -> None:
    money = account(funds=10_000_000)
    publish(money)
    request = money.hold(400, model="tokens", ttl_s=0)
    money.one("SELECT expire_holds(10, 0)")
    review = void(request, status="needs_review", review_reason="price_missing")
    first = {**review, "input_tokens": 1000, "output_tokens": 1}

    class Completed(Reports):
        """The spool comes between the operator's look and their decision."""

        async def usage_row(self, account_id: UUID, request_id: UUID) -> dict[str, Any] | None:
            row = await super().usage_row(account_id, request_id)
            if row is not None and row["review_reason"] == "orphaned":
                row |= {"input_tokens": 5, "output_tokens": 5}
                assert money.settle(first) == ["amended"]
            return row

    reviews = Reviews(pool, Completed(pool))
    assert await decide(reviews, money, request, Decision("charge", cost_picos=0)) == "resolved"
    assert money.usage(request)["price"] == 1_002_000
    assert is_clean(database_url)


@pytest.mark.anyio
async def test_what_has_not_ended_or_never_was_is_unknown(
    account: NewAccount, reviews: Reviews
) -> None:
    money = account(funds=1000)
    for request in (money.hold(5), money.request(5)):
        request_id = UUID(str(request["request_id"]))
        for decision in (Decision("waive"), Decision("charge", price_nanos=1)):
            resolved = await reviews.resolve(
                money.account_id, request_id, decision, actor="me", reason="because"
            )
            assert (resolved.outcome, resolved.row) == ("unknown", None)


# --- the list ---


@pytest.mark.anyio
async def test_the_queue_is_cut_by_reason_account_model_and_age(
    account: NewAccount, pool: Pool
) -> None:
    reports = Reports(pool)
    money, other = account(funds=10_000), account(funds=10_000)
    old, young = uncharged(money, model="a"), uncharged(money, model="b")
    doubt, decided = doubted(other), uncharged(other)
    resolve(other, decided, "waive")
    money.connection.execute(
        "UPDATE usage SET created_at = created_at - interval '2 hours' WHERE model = 'a'"
    )

    async def found(**wanted: Any) -> list[str]:
        rows = await reports.reviews(ReviewFilter(**wanted), before=None, limit=10)
        return [str(row["request_id"]) for row in rows]

    everything = [str(each["request_id"]) for each in (doubt, young, old)]
    assert await found() == everything
    assert await found(reason="cost_mismatch") == everything[:1]
    assert await found(account_id=money.account_id) == everything[1:]
    assert await found(model="b") == everything[1:2]
    assert await found(older_than=timedelta(hours=1)) == everything[2:]
    assert await found(older_than=timedelta(hours=1), model="b") == []
    page = await reports.reviews(before=UUID(everything[0]), limit=1)
    assert [str(row["request_id"]) for row in page] == everything[1:2]
    counts = await reports.review_counts()
    assert [(row["review_reason"], row["is_charged"], row["requests"]) for row in counts] == [
        ("usage_missing", False, 2),
        ("cost_mismatch", True, 1),
    ]
    operations = await reports.operations()
    assert operations is not None
    assert (operations.reviews, operations.reviews_by_reason) == (
        3,
        {"usage_missing": 2, "cost_mismatch": 1},
    )
