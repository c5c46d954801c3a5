"""Idempotency keys: one request of many is carried out, and its answer is given again."""

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from typing import Any
from uuid import UUID

import psycopg
import pytest

from proxy.db import Pool, make_pool
from proxy.errors import ConflictError, InvalidRequestError, MeteringUnavailableError
from proxy.ids import uuid7
from proxy.replays import Claim, IdempotencyStore, KeptAnswer, Replay
from tests.integration.money import Money, NewAccount, capture, void, wait_for_waiters

pytestmark = pytest.mark.anyio

BODY, OTHER_BODY = sha256(b"body").digest(), sha256(b"other").digest()
ANSWER = KeptAnswer(
    201, ((b"content-type", b"text/event-stream"), (b"x-name", b"na\xefve")), b"data: \x00\xff\n\n"
)


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    pool = make_pool(database_url)
    await pool.open()
    yield pool
    await pool.close()


def store_of(pool: Pool, **changes: Any) -> IdempotencyStore:
    limits = {"max_answer_bytes": 1000, "max_account_bytes": 2500} | changes
    return IdempotencyStore(pool, **limits)


@pytest.fixture
def store(pool: Pool) -> IdempotencyStore:
    return store_of(pool)


async def claim(
    store: IdempotencyStore, money: Money, key: str = "k", request: dict[str, object] | None = None
) -> Claim:
    """Claim a key, by default for a request that the ledger never hears of."""
    request_id = uuid7() if request is None else UUID(str(request["request_id"]))
    claimed = await store.begin(money.account_id, key, BODY, request_id)
    assert isinstance(claimed, Claim)
    return claimed


async def refusal(store: IdempotencyStore, money: Money, body: bytes = BODY) -> ConflictError:
    with pytest.raises(ConflictError) as caught:
        await store.begin(money.account_id, "k", body, uuid7())
    assert (caught.value.status, caught.value.retryable) == (409, False)
    return caught.value


def end_leases(money: Money) -> None:
    money.connection.execute("UPDATE idempotency_keys SET lease_until = now()")


async def test_answer_is_given_again_byte_for_byte(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    first = await claim(store, money)
    assert await store.finish(first, ANSWER)
    again = await store.begin(money.account_id, "k", BODY, uuid7())
    assert again == Replay(first.request_id, ANSWER)


async def test_of_many_at_once_one_is_carried_out(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    answers = await asyncio.gather(
        *[store.begin(money.account_id, "k", BODY, uuid7()) for _ in range(20)],
        return_exceptions=True,
    )
    assert sum(isinstance(answer, Claim) for answer in answers) == 1
    codes = {answer.code for answer in answers if isinstance(answer, ConflictError)}
    assert codes == {"idempotency_in_flight"}


async def test_of_many_that_take_over_at_once_one_is_carried_out(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    await claim(store, money)
    end_leases(money)
    begins = [
        asyncio.create_task(store.begin(money.account_id, "k", BODY, uuid7())) for _ in range(5)
    ]
    with money.connection.transaction():
        money.all("SELECT 1 FROM idempotency_keys FOR UPDATE")
        await asyncio.to_thread(wait_for_waiters, money, 5)
    answers = await asyncio.gather(*begins, return_exceptions=True)
    assert sum(isinstance(answer, Claim) for answer in answers) == 1


async def test_key_belongs_to_its_account_and_to_its_body(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money, other = account(), account()
    first = await claim(store, money)
    await claim(store, other)
    assert (await refusal(store, money, OTHER_BODY)).code == "idempotency_key_reused"
    await store.finish(first, ANSWER)
    assert (await refusal(store, money, OTHER_BODY)).code == "idempotency_key_reused"


@pytest.mark.parametrize("key", ["", "  ", "x" * 256])
async def test_what_can_not_be_a_key_is_refused(
    account: NewAccount, store: IdempotencyStore, key: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await store.begin(account().account_id, key, BODY, uuid7())
    assert caught.value.code == "invalid_idempotency_key"


async def test_longest_key_is_taken(account: NewAccount, store: IdempotencyStore) -> None:
    await claim(store, account(), "x" * 255)


async def test_request_that_was_not_charged_may_come_again(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    await store.release(await claim(store, money))
    await claim(store, money)


async def test_who_lost_the_key_neither_finishes_nor_releases_it(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    first = await claim(store, money)
    end_leases(money)
    second = await claim(store, money)
    assert not await store.finish(first, ANSWER)
    await store.release(first)
    assert (await refusal(store, money)).code == "idempotency_in_flight"
    assert await store.finish(second, ANSWER)
    assert await store.finish(second, ANSWER)
    await store.release(second)
    assert isinstance(await store.begin(money.account_id, "k", BODY, uuid7()), Replay)


async def test_same_request_that_asks_again_is_told_the_same(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    first = await claim(store, money)
    assert await store.begin(money.account_id, "k", BODY, first.request_id) == first


async def test_lease_does_not_end_while_the_request_holds_money(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account(funds=1000)
    request = money.hold(100)
    first = await claim(store, money, request=request)
    end_leases(money)
    assert (await refusal(store, money)).code == "idempotency_in_flight"
    # Charged this moment, and its answer is about to be kept.
    money.settle(capture(request, 5))
    assert (await refusal(store, money)).code == "idempotency_in_flight"
    assert await store.finish(first, ANSWER)


@pytest.mark.parametrize("status", ["billed", "byok"])
async def test_charged_request_whose_proxy_died_is_not_carried_out_again(
    account: NewAccount, store: IdempotencyStore, status: str
) -> None:
    money = account(funds=1000)
    request = money.hold(100, byok=status == "byok")
    await claim(store, money, request=request)
    money.settle(capture(request, 5, status=status))
    end_leases(money)
    money.connection.execute("UPDATE usage SET settled_at = now() - interval '1 hour'")
    error = await refusal(store, money)
    assert error.code == "idempotency_answer_not_kept"
    assert f"GET /api/v1/usage/{request['request_id']}" in error.message
    assert error.details == {"request_id": request["request_id"]}


async def test_request_that_ended_uncharged_with_its_proxy_is_carried_out_again(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account(funds=1000)
    request = money.hold(100)
    await claim(store, money, request=request)
    money.settle(void(request, status="needs_review", review_reason="price_missing"))
    end_leases(money)
    await claim(store, money)


@pytest.mark.parametrize("answer", [None, KeptAnswer(200, (), b"x" * 1001)])
async def test_answer_that_is_too_large_is_not_kept_and_its_request_not_repeated(
    account: NewAccount, store: IdempotencyStore, answer: KeptAnswer | None
) -> None:
    money = account()
    first = await claim(store, money)
    assert not await store.finish(first, answer)
    error = await refusal(store, money)
    assert error.code == "idempotency_answer_not_kept"
    assert str(first.request_id) in error.message


async def test_an_account_keeps_so_many_bytes_and_no_other_pays_for_it(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money, other = account(), account()
    large = KeptAnswer(200, (), b"x" * 1000)
    kept = [await store.finish(await claim(store, money, key), large) for key in "abc"]
    assert kept == [True, True, False]
    assert await store.finish(await claim(store, other), large)
    assert await store.finish(await claim(store, money, "d"), KeptAnswer(200, (), b"x" * 500))


async def test_expired_key_is_as_good_as_new_and_is_purged(
    account: NewAccount, pool: Pool, store: IdempotencyStore
) -> None:
    money = account()
    expired = store_of(pool, ttl_s=0)
    for key in "abcd":
        await expired.finish(await claim(expired, money, key), ANSWER)
    await claim(store, money, "a")
    assert await store.purge(limit=2) == 2
    assert await store.purge(limit=2) == 1
    assert await store.purge(limit=2) == 0
    assert money.one("SELECT count(*), sum(body_bytes) FROM idempotency_keys") == (1, 0)


async def test_service_can_read_keys_and_change_none(account: NewAccount) -> None:
    money = account()
    money.connection.execute("SET ROLE tallygate_app")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        money.connection.execute("UPDATE idempotency_keys SET body = NULL")


async def test_without_postgresql_nothing_is_claimed_and_no_answer_fails(
    account: NewAccount, store: IdempotencyStore
) -> None:
    money = account()
    first = await claim(store, money)
    nowhere = make_pool("postgresql://postgres@127.0.0.1:1/none")
    away = store_of(nowhere)
    nowhere.timeout = 0.05
    await nowhere.open()
    with pytest.raises(MeteringUnavailableError):
        await away.begin(money.account_id, "k", BODY, uuid7())
    assert not await away.finish(first, ANSWER)
    await away.release(first)
    await nowhere.close()


async def test_claim_survives_a_cut_connection(
    account: NewAccount, store: IdempotencyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    money = account()
    real = psycopg.AsyncConnection.execute
    lost: list[bool] = []

    async def execute(self: Any, query: Any, *args: Any, **options: Any) -> Any:
        cursor = await real(self, query, *args, **options)
        if "idempotency_begin" in str(query) and not lost:
            lost.append(True)
            raise psycopg.OperationalError("the connection was cut after COMMIT")
        return cursor

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", execute)
    await claim(store, money)
    assert lost
