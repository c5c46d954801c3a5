"""Answers that are given again without a charge: to an idempotency key, and to an SDK's retry.

`IdempotencyStore` keeps them in PostgreSQL for a day, for clients that send an Idempotency-Key.
`RetryStore` keeps them in this process for two minutes, for SDKs that send a request again on
their own, with nothing to know it by but the key and the same body.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import Any, LiteralString
from uuid import UUID

import msgspec

from proxy.db import CONNECTION_ERRORS, Pool, unavailable
from proxy.errors import ConflictError, InvalidRequestError
from proxy.metrics import REPLAY_STORE_BYTES, REPLAYS

log = logging.getLogger(__name__)

_MAX_KEY_CHARACTERS = 255
# What an answer takes beside its bytes, so that small ones are bounded by memory as well.
_OVERHEAD_BYTES = 1000

_REPLAYS_BY_KEY = REPLAYS.labels("idempotency")
_REPLAYS_OF_RETRIES = REPLAYS.labels("retry")


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A whole answer, as it goes out again; headers as ASGI has them."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def identity_of(key: str, endpoint: str, body: bytes, *extra: bytes) -> bytes:
    """What makes two requests the same: virtual key, endpoint, body and the headers that count."""
    digest = blake2b(digest_size=32)
    # Each with its length, so that no two requests run into one text.
    for part in (key.encode(), endpoint.encode(), *extra):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    digest.update(body)
    return digest.digest()


# -------------------------------------------------------------------------------------------------
# Idempotency-Key
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """This request holds the key: it must be finished once charged, or else released."""

    account_id: UUID
    key_hash: bytes
    request_id: UUID


@dataclass(frozen=True, slots=True)
class Replay:
    """The key's request was carried out before, as `request_id`."""

    request_id: UUID
    answer: KeptAnswer


class IdempotencyStore:
    """Idempotency keys of all accounts, and the answers to them, in PostgreSQL."""

    def __init__(
        self,
        pool: Pool,
        *,
        ttl_s: int = 86_400,
        lease_s: int = 60,
        max_answer_bytes: int,
        max_account_bytes: int,
    ) -> None:
        self._pool = pool
        self._ttl_s = ttl_s
        self._lease_s = lease_s
        self.max_answer_bytes = max_answer_bytes
        self._max_account_bytes = max_account_bytes

    async def begin(
        self, account_id: UUID, key: str, body_hash: bytes, request_id: UUID
    ) -> Claim | Replay:
        """Claim a client's key for a request whose `identity_of` is `body_hash`.

        Raises InvalidRequestError for what can't be a key, ConflictError where the request must
        not be carried out, and MeteringUnavailableError where PostgreSQL is away.
        """
        if not key.strip() or len(key) > _MAX_KEY_CHARACTERS:
            msg = f"An Idempotency-Key has 1 to {_MAX_KEY_CHARACTERS} characters."
            raise InvalidRequestError(msg, code="invalid_idempotency_key")
        key_hash = sha256(key.encode()).digest()
        parameters = (account_id, key_hash, body_hash, request_id, self._lease_s, self._ttl_s)
        outcome, holder, status, headers, body = await self._begin(parameters)
        if outcome == "new":
            return Claim(account_id, key_hash, request_id)
        if outcome == "replay":
            _REPLAYS_BY_KEY.inc()
            pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            return Replay(holder, KeptAnswer(status, tuple(pairs), body))
        raise _conflict(outcome, holder)

    async def _begin(self, parameters: tuple[object, ...]) -> tuple[Any, ...]:
        query: LiteralString = (
            "SELECT outcome, request_id, http_status, headers, body"
            " FROM idempotency_begin(%s, %s, %s, %s, %s, %s)"
        )
        try:
            return await self._one(query, parameters)
        except CONNECTION_ERRORS:
            pass  # it may have been claimed: the same request asks again, and is told the same
        try:
            return await self._one(query, parameters)
        except CONNECTION_ERRORS as error:
            raise unavailable() from error

    async def finish(self, claim: Claim, answer: KeptAnswer | None) -> bool:
        """Keep the answer of a charged request; None for one that is too large to be kept.

        Returns whether it is kept. Where PostgreSQL is away it is not, and the key's lease runs
        out: nothing is carried out again, because the request was charged.
        """
        kept: tuple[int | None, str | None, bytes | None] = (None, None, None)
        if answer is not None and len(answer.body) <= self.max_answer_bytes:
            pairs = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in answer.headers]
            kept = (answer.status, msgspec.json.encode(pairs).decode(), answer.body)
        try:
            (is_kept,) = await self._one(
                "SELECT idempotency_finish(%s, %s, %s, %s, %s::jsonb, %b, %s)",
                (
                    *(claim.account_id, claim.key_hash, claim.request_id),
                    *kept,
                    self._max_account_bytes,
                ),
            )
        except CONNECTION_ERRORS as error:
            log.warning("answer not kept", extra={"error": type(error).__name__})
            return False
        return bool(is_kept)

    async def release(self, claim: Claim) -> None:
        """Give the key back: the request was not charged, and may come again with it.

        Where PostgreSQL is away the same happens when the key's lease runs out.
        """
        try:
            await self._one(
                "SELECT idempotency_release(%s, %s, %s)",
                (claim.account_id, claim.key_hash, claim.request_id),
            )
        except CONNECTION_ERRORS as error:
            log.warning("idempotency key not released", extra={"error": type(error).__name__})

    async def purge(self, *, limit: int) -> int:
        """Forget keys whose time is over; returns how many, at most `limit`.

        Raises one of CONNECTION_ERRORS where PostgreSQL is away.
        """
        (purged,) = await self._one("SELECT purge_idempotency_keys(%s)", (limit,))
        return int(purged)

    async def _one(self, query: LiteralString, parameters: tuple[object, ...]) -> tuple[Any, ...]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(query, parameters)
            (row,) = await cursor.fetchall()
            return row


def _conflict(outcome: str, holder: UUID) -> ConflictError:
    if outcome == "conflict":
        msg = "This Idempotency-Key came with another request before. Use a new key for a new one."
        return ConflictError(msg, code="idempotency_key_reused")
    if outcome == "in_flight":
        msg = (
            f"The request with this Idempotency-Key is still being carried out, as {holder}. Send "
            "it again later for its answer."
        )
        return ConflictError(msg, code="idempotency_in_flight")
    msg = (
        f"The request with this Idempotency-Key was charged, as {holder}, and its answer is not "
        f"kept. See GET /api/v1/usage/{holder}, and use a new key to send it again."
    )
    return ConflictError(
        msg, code="idempotency_answer_not_kept", details={"request_id": str(holder)}
    )


# -------------------------------------------------------------------------------------------------
# SDKs' own retries
# -------------------------------------------------------------------------------------------------


class Attempt:
    """One request that is carried out: in flight until it is `charged`, or else `forget`."""

    __slots__ = (
        "_answer",
        "_collected",
        "_ended",
        "_store",
        "_waiters",
        "ended_at",
        "found",
        "identity",
        "number",
        "size",
        "was_charged",
    )

    def __init__(self, store: "RetryStore", identity: bytes, number: int) -> None:
        self._store = store
        self.identity = identity
        # How many attempts its client says were before it.
        self.number = number
        # Bytes of its answer that are in memory while it comes.
        self._collected = 0
        self._answer: KeptAnswer | None = None
        self._ended = False
        # Made by the first who waits: hardly any attempt is ever retried.
        self._waiters: asyncio.Event | None = None
        self.ended_at = 0.0
        self.size = _OVERHEAD_BYTES
        # How many retries it was found by.
        self.found = 0
        # Whether it ended in a charge, even where its answer was too large to be kept.
        self.was_charged = False

    def collect(self, size: int) -> bool:
        """Whether there is room for so many bytes more of an answer that is not whole yet.

        Where there is none, what it has collected is given up as well.
        """
        if self._store.make_room(size):
            self._collected += size
            return True
        self.give_up()
        return False

    def give_up(self) -> None:
        """The answer is not collected any more."""
        self._store.make_room(-self._collected)
        self._collected = 0

    def charged(self, answer: KeptAnswer | None) -> None:
        """It was charged; `answer` is None where it is too large to be kept."""
        if self._ended:
            return
        if answer is not None and len(answer.body) <= self._store.max_answer_bytes:
            self._answer = answer
            self.size += len(answer.body) + sum(len(n) + len(v) for n, v in answer.headers)
        self.was_charged = True
        self._end()
        self._store.keep(self)

    def forget(self) -> None:
        """It was not charged, so retries go their own way. Nothing, where it has ended."""
        if self._ended:
            return
        self._end()
        self._store.remove(self)

    def _end(self) -> None:
        self._ended = True
        self.give_up()
        if self._waiters is not None:
            self._waiters.set()

    async def answer(self) -> KeptAnswer | None:
        """Wait for the end; None where there is no answer to give: see `was_charged`."""
        if not self._ended:
            if self._waiters is None:
                self._waiters = asyncio.Event()
            await self._waiters.wait()
        if self._answer is not None:
            _REPLAYS_OF_RETRIES.inc()
        return self._answer


class RetryStore:
    """Attempts of the last minutes and their answers, in memory.

    Bounded by bytes, number and time; the oldest go first, when others come. Attempts in flight are
    as many as there are requests, and each must be ended: `forget` may be called in any case. What
    they collect of streamed answers is bounded by as many bytes again.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_answer_bytes: int,
        max_answers: int = 10_000,
        ttl_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self.max_answer_bytes = max_answer_bytes
        self._max_answers = max_answers
        self._ttl_s = ttl_s
        self._clock = clock
        # Several of one identity where a client asks the same several times at once.
        self._attempts: dict[bytes, list[Attempt]] = {}
        # Those that were charged, in the order in which they ended.
        self._charged: deque[Attempt] = deque()
        self._bytes = 0
        self._collected = 0

    def begin(self, identity: bytes, *, number: int = 0) -> Attempt:
        """Note an attempt that is about to be carried out, after `number` others."""
        attempt = Attempt(self, identity, number)
        same = self._attempts.get(identity)
        if same is None:
            self._attempts[identity] = [attempt]
        else:
            same.append(attempt)
        return attempt

    def find(self, identity: bytes, *, number: int = 1) -> Attempt | None:
        """Find what the `number`th retry repeats; None where nothing is known of it.

        It repeats an attempt with fewer before it: another's first retry is none of its own. Of
        several it is the one that fewest retries have found, and of those the oldest: whoever
        asked for several answers at once and retries several gets different ones.
        """
        self._prune()
        same = [each for each in self._attempts.get(identity, ()) if each.number < number]
        if not same:
            return None
        attempt = min(same, key=lambda attempt: attempt.found)
        attempt.found += 1
        return attempt

    def make_room(self, size: int) -> bool:
        """Set so many bytes aside for answers in flight, or give them back; False for no room."""
        if self._collected + size > self._max_bytes:
            return False
        self._collected += size
        return True

    def keep(self, attempt: Attempt) -> None:
        """Keep an attempt that was charged, as long as there is room."""
        attempt.ended_at = self._clock()
        self._charged.append(attempt)
        self._bytes += attempt.size
        REPLAY_STORE_BYTES.inc(attempt.size)
        self._prune()

    def remove(self, attempt: Attempt) -> None:
        """No retry finds it any more."""
        same = self._attempts[attempt.identity]
        same.remove(attempt)
        if not same:
            del self._attempts[attempt.identity]

    def _prune(self) -> None:
        charged = self._charged
        oldest = self._clock() - self._ttl_s
        freed = 0
        while charged and (
            charged[0].ended_at <= oldest
            or self._bytes > self._max_bytes
            or len(charged) > self._max_answers
        ):
            attempt = charged.popleft()
            self._bytes -= attempt.size
            freed += attempt.size
            self.remove(attempt)
        if freed:
            REPLAY_STORE_BYTES.dec(freed)
