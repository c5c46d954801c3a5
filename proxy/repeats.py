"""Requests that come again: with the client's Idempotency-Key, or as an SDK's own retry.

Either gets the answer that the first one was charged for, and is not charged again.
"""

from collections.abc import Sequence

from proxy.accounts import Principal
from proxy.errors import ConflictError
from proxy.exchange import Exchange
from proxy.replays import Attempt, Claim, IdempotencyStore, KeptAnswer, RetryStore, identity_of

REPLAY_OF = b"x-tallygate-replay-of"


class Repeat:
    """What is known of a request's coming again.

    `answer` is what it gets where it was carried out before. Else the request is to be carried
    out, and to end in `charged` or `forget`; its answer is collected with `add` meanwhile, as far
    as anybody keeps it.
    """

    def __init__(
        self,
        *,
        store: IdempotencyStore,
        max_bytes: int = 0,
        answer: KeptAnswer | None = None,
        claim: Claim | None = None,
        attempt: Attempt | None = None,
    ) -> None:
        self.answer = answer
        self._store = store
        self._max_bytes = max_bytes
        self._claim = claim
        self._attempt = attempt
        self._parts: list[bytes] = []
        self._size = 0
        self._kept: KeptAnswer | None = None

    def add(self, part: bytes) -> None:
        """Collect a part of a streamed answer."""
        if self._claim is None and self._attempt is None:
            return
        self._size += len(part)
        if self._size <= self._max_bytes and (
            self._attempt is None or self._attempt.collect(len(part))
        ):
            self._parts.append(part)
            return
        # Nothing of it is kept, however little may follow.
        self._max_bytes = -1
        self._parts.clear()
        if self._attempt is not None:
            self._attempt.give_up()

    async def keep(
        self, exchange: Exchange, headers: Sequence[tuple[bytes, bytes]], last: bytes
    ) -> None:
        """Keep the answer, whose last part this is: before it is charged and before it leaves.

        A crash between this and the charge leaves an answer that nobody paid for, which the
        sweeper puts up for review; the other order would leave a charge without an answer.
        """
        if self._claim is None and self._attempt is None:
            return
        self.add(last)
        if self._size <= self._max_bytes:
            named = (*headers, (REPLAY_OF, str(exchange.request_id).encode()))
            self._kept = KeptAnswer(200, named, b"".join(self._parts))
        self._parts.clear()
        if self._claim is not None:
            await self._store.finish(self._claim, self._kept)

    def charged(self) -> None:
        """The request is settled: from now on its retries are answered with what was kept."""
        if self._attempt is not None:
            self._attempt.charged(self._kept)
        self._claim = self._attempt = None

    async def forget(self) -> None:
        """The request brought nothing: whoever comes again is served anew."""
        claim, attempt = self._claim, self._attempt
        self._claim = self._attempt = None
        if attempt is not None:
            attempt.forget()
        if claim is not None:
            await self._store.release(claim)


class Repeats:
    """Tells requests that come again from new ones."""

    def __init__(
        self, store: IdempotencyStore, retries: RetryStore, provider_key_headers: Sequence[str]
    ) -> None:
        self._store = store
        self._retries = retries
        # What nobody keeps has no state.
        self._unkept = Repeat(store=store)
        # Whose key an answer was bought with is a part of what was asked for.
        self._headers = [name.lower().encode() for name in provider_key_headers]
        self._headers += [b"anthropic-beta", b"x-tallygate-live-cost"]

    async def begin(
        self, exchange: Exchange, principal: Principal, endpoint: str, body: bytes
    ) -> Repeat:
        """Look a request up by its key and `body`; raises ConflictError for one that must wait."""
        idempotency_key = exchange.header(b"idempotency-key")
        number = _retry_number(exchange)
        if idempotency_key is None and (number is None or not principal.replay_retries):
            return self._unkept
        extra = [(exchange.header(name) or "").encode() for name in self._headers]
        if idempotency_key is not None:
            identity = identity_of("", endpoint, body, *extra)
            found = await self._store.begin(
                principal.account_id, idempotency_key, identity, exchange.request_id
            )
            if isinstance(found, Claim):
                limit = self._store.max_answer_bytes
                return Repeat(store=self._store, claim=found, max_bytes=limit)
            return Repeat(store=self._store, answer=found.answer)
        identity = identity_of(exchange.virtual_key or "", endpoint, body, *extra)
        number = number or 0
        # Where the attempt failed, one of those that waited for it goes on in its place.
        while (attempt := self._retries.find(identity, number=number)) is not None:
            answer = await attempt.answer()
            if answer is not None:
                return Repeat(store=self._store, answer=answer)
            if attempt.was_charged:
                raise ConflictError(
                    "This request was carried out and charged a moment ago, and its answer is too "
                    "large to be kept. Send it again as a new request if you need it once more.",
                    code="retry_answer_not_kept",
                )
        return Repeat(
            store=self._store,
            attempt=self._retries.begin(identity, number=number),
            max_bytes=self._retries.max_answer_bytes,
        )


def _retry_number(exchange: Exchange) -> int | None:
    """How many attempts an SDK made before this one; None where it does not say."""
    text = exchange.header(b"x-stainless-retry-count") or ""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 3 else None
