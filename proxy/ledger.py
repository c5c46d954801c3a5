"""The ledger: the only caller of the functions of `schema.sql` that move money.

`authorize` queues its item, which the next batch carries. Authorizing and settling are safe to
repeat: after a lost answer the same batch is sent again, and the database says what it had done.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

import msgspec
import psycopg

from proxy.batcher import Batcher
from proxy.db import CONNECTION_ERRORS, Pool, Session, unavailable
from proxy.metrics import LEDGER_SECONDS

log = logging.getLogger(__name__)


_HELD = frozenset({"held", "exists"})


class HoldRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request that asks for a hold; amounts in nano-USD."""

    account_id: UUID
    request_id: UUID
    key_id: UUID
    # The account's version plus the key's and that of the switches of models, as the caller knows
    # them; where no key asks, the account's alone.
    version: int
    amount: int
    tokens: int
    ttl_s: int
    endpoint: str
    model: str
    tier: str
    streamed: bool
    byok: bool
    price_version: int
    # What the account may do as a whole; None for no limit.
    account_requests_per_minute: int | None = None
    account_tokens_per_minute: int | None = None
    account_max_concurrency: int | None = None


class Authorization(msgspec.Struct, frozen=True):
    """What the ledger said: `outcome` as documented at authorize_batch; limits None where none."""

    outcome: str
    available_nanos: int | None
    budget_left_nanos: int | None
    requests_limit: int | None
    requests_left: int | None
    tokens_limit: int | None
    tokens_left: int | None

    @property
    def is_held(self) -> bool:
        """Whether the request may go on; a replay of one that may, may too."""
        return self.outcome in _HELD


class Settlement(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How one request ended; the members are those of the SQL type of the same name."""

    account_id: UUID
    request_id: UUID
    action: Literal["capture", "void"]
    status: Literal["billed", "needs_review", "void", "byok"]
    price: int | None = None
    model_answered: str | None = None
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_creation_tokens: int | None = None
    cache_creation_1h_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None
    audio_input_tokens: int | None = None
    audio_output_tokens: int | None = None
    image_input_tokens: int | None = None
    image_output_tokens: int | None = None
    images: int | None = None
    cost_picos: int | None = None
    cost_source: str | None = None
    rounding_attos: int | None = None
    rule: str | None = None
    markup_ppm: int | None = None
    review_reason: str | None = None
    error_code: str | None = None
    upstream_status: int | None = None
    client_gone: bool = False
    first_byte_ms: int | None = None
    duration_ms: int | None = None
    input_characters: int | None = None
    audio_ms: int | None = None
    queries: int | None = None
    service_tier: str | None = None
    # What our own rating says, to be compared with the reported cost; None where it can't say.
    rated_picos: int | None = None
    answer_id: str | None = None
    # How many of a metered action.
    quantity: int | None = None


class WitnessNote(msgspec.Struct, frozen=True):
    """What the witness inside LiteLLM saw of one request; None for what it does not know."""

    account_id: UUID
    request_id: UUID
    cost_picos: int | None
    # How often LiteLLM asked a provider.
    attempts: int | None
    # Whether its cost contradicts the one that was charged: the request is put up for review.
    mismatch: bool


class Settled(msgspec.Struct, frozen=True):
    """What the ledger said to a settlement: `outcome` as documented at settle_batch."""

    outcome: str
    overdraft_nanos: int


@dataclass(frozen=True, slots=True)
class Balance:
    """An account's balance in nano-USD."""

    posted: int
    held: int
    credit_limit: int

    @property
    def available(self) -> int:
        """What new holds may take."""
        return self.posted - self.held + self.credit_limit


@dataclass(frozen=True, slots=True)
class Funded:
    """Outcome of `fund`: posted, exists, conflict, insufficient_credits or unknown_account."""

    outcome: str
    entry_id: UUID | None
    balance: Balance | None


class Ledger:
    """Money, over a few connections of its own for the batches and the pool for the rest."""

    def __init__(self, url: str, pool: Pool, *, lanes: int = 1, timeout_s: float = 5.0) -> None:
        self._pool = pool
        self._authorize_sessions = [Session(url, timeout_s=timeout_s) for _ in range(lanes)]
        self._settle_sessions = [Session(url, timeout_s=timeout_s) for _ in range(lanes)]
        self._heartbeat = Session(url, timeout_s=timeout_s)
        # Its own, because a sweep must not make a heartbeat late.
        self._sweep = Session(url, timeout_s=6 * timeout_s)
        self._authorizations = Batcher[HoldRequest, Authorization](
            "authorize", [_AuthorizeLane(session) for session in self._authorize_sessions]
        )

    @property
    def settle_sessions(self) -> list[Session]:
        """The connections that settlements go over, one for each lane."""
        return self._settle_sessions

    async def authorize(self, request: HoldRequest) -> Authorization:
        """Ask for a hold.

        Raises MeteringUnavailableError where PostgreSQL is away. Where that `is_in_doubt` the hold
        may stand all the same, and the caller must void the request.
        """
        return await self._authorizations.submit(request)

    async def extend_holds(self, holds: Sequence[tuple[UUID, UUID]], ttl_s: int) -> None:
        """Give live requests, as pairs of account and request id, `ttl_s` from now."""
        await self._heartbeat.fetch(
            "SELECT extend_holds($1::uuid[], $2::uuid[], $3)",
            (
                "{" + ",".join(str(hold[0]) for hold in holds) + "}",
                "{" + ",".join(str(hold[1]) for hold in holds) + "}",
                str(ttl_s),
            ),
        )

    async def expire_holds(self, *, limit: int, grace_s: int) -> int:
        """Expire holds that are overdue by `grace_s`; returns how many."""
        rows = await self._sweep.fetch("SELECT expire_holds($1, $2)", (str(limit), str(grace_s)))
        return int(rows[0][0] or 0)

    async def note_witness(self, notes: Sequence[WitnessNote]) -> list[bool]:
        """Write notes beside the usage of their requests, price and status untouched.

        Returns for each whether it is written; where not, no such request has ended. Raises
        psycopg's errors where the database is away.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT outcome = 'noted' FROM note_witness(%s) ORDER BY ord",
                (msgspec.json.encode(notes).decode(),),
            )
            return [row[0] for row in await cursor.fetchall()]

    async def ensure_partitions(self) -> None:
        """Have the partitions of this month and the next three."""
        await self._sweep.fetch("SELECT ensure_partitions(now(), 3)", ())

    async def fund(
        self,
        account_id: UUID,
        entry_id: UUID,
        *,
        kind: str,
        amount_nanos: int,
        source: str,
        external_id: str,
        reason: str | None,
        actor: str,
    ) -> Funded:
        """Post money that is no request's, once for each (source, external_id)."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT outcome, entry_id, posted, reserved, credit_limit"
                " FROM fund(%s, %s, %s, %s, %s, %s, %s, %s)",
                (account_id, entry_id, kind, amount_nanos, source, external_id, reason, actor),
            )
            row = await cursor.fetchone()
        if row is None:  # pragma: no cover - the function always answers a row
            msg = "fund answered no row"
            raise RuntimeError(msg)
        balance = None if row[2] is None else Balance(row[2], row[3], row[4])
        return Funded(row[0], row[1], balance)

    async def balance(self, account_id: UUID) -> Balance | None:
        """Read an account's balance; None where there is no such account."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(
                "SELECT posted, reserved, credit_limit FROM balances WHERE account_id = %s",
                (account_id,),
            )
            row = await cursor.fetchone()
        return None if row is None else Balance(*row)

    async def close(self) -> None:
        """Let what is queued finish, then close the connections."""
        await self._authorizations.drain()
        batched = (*self._authorize_sessions, *self._settle_sessions)
        for session in (*batched, self._heartbeat, self._sweep):
            await session.close()


class _AuthorizeLane:
    """Flushes authorizations over one connection, once more after it broke."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seconds = LEDGER_SECONDS.labels("authorize")

    async def __call__(self, batch: Sequence[HoldRequest]) -> Sequence[Authorization | Exception]:
        try:
            return await self._ask(batch)
        except CONNECTION_ERRORS:
            # The same request ids again: holds that were committed answer `exists`.
            was_in_doubt = self._session.is_in_doubt
        except psycopg.Error as error:
            # One item that the database can't take must not refuse its neighbours.
            if len(batch) == 1:
                return [error]
            return [item for request in batch for item in await self([request])]
        try:
            return await self._ask(batch)
        except CONNECTION_ERRORS as error:
            log.warning("authorize failed", extra={"error": type(error).__name__})
            in_doubt = was_in_doubt or self._session.is_in_doubt
            raise unavailable(is_in_doubt=in_doubt) from error

    async def _ask(self, batch: Sequence[HoldRequest]) -> list[Authorization]:
        started = time.perf_counter()
        rows = await self._session.fetch(
            "SELECT outcome, available, budget_left, requests_limit, requests_left, tokens_limit,"
            " tokens_left FROM authorize_batch($1)",
            (msgspec.json.encode(batch).decode(),),
        )
        self._seconds.observe(time.perf_counter() - started)
        return [
            Authorization(_text(outcome), *[None if n is None else int(n) for n in numbers])
            for outcome, *numbers in rows
        ]


def _text(value: bytes | None) -> str:
    return bytes(value or b"").decode()


async def settle_batch(session: Session, settlements: Sequence[bytes]) -> list[Settled]:
    """Settle a batch of encoded settlements; one row for each, in order.

    Raises one of CONNECTION_ERRORS, or another psycopg.Error where the database refuses one.
    """
    started = time.perf_counter()
    rows = await session.fetch(
        "SELECT ord, outcome, overdraft FROM settle_batch($1)",
        ((b"[" + b",".join(settlements) + b"]").decode(),),
    )
    LEDGER_SECONDS.labels("settle").observe(time.perf_counter() - started)
    answers = {
        int(ord_ or 0): Settled(_text(outcome), int(overdraft or 0))
        for ord_, outcome, overdraft in rows
    }
    return [answers[number] for number in range(1, len(settlements) + 1)]
