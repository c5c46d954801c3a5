"""A period's usage once more, under a price book that is not in force: what it would have brought.

Every charge is made anew by the code that bills. Nothing is written, memory does not grow with the
usage, and the event loop is given back every few dozen requests.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, LiteralString

from psycopg import AsyncConnection
from psycopg.rows import TupleRow, dict_row

from pricing.errors import CostUnknownError, PricingError, UsageUnknownError
from pricing.price_book import PriceBook, Rule
from proxy.db import Pool
from proxy.errors import InvalidRequestError, RateLimitError
from proxy.recompute import BY_HAND, CHARGES, action_of, charge_of

MAX_DAYS = 92
# Some ten million requests, and no longer: PostgreSQL keeps what it has replaced meanwhile.
TIMEOUT_S = 300.0
_PAGE_ROWS = 500
# About a millisecond of work.
_ROWS_AT_ONCE = 50
# Customers can make models up where LiteLLM has a pattern for a name.
_MAX_NAMES = 1000
_MAX_RULES_KEPT = 50_000

# A request whose answer was delivered and whose price could not be made: another book may. What
# waits for anything else would wait under every book.
_WAITING = (
    "price_unknown", "price_missing", "usage_missing", "cost_incomplete", "litellm_cache_hit",
)  # fmt: skip

_USAGE: LiteralString = (
    "SELECT account_id, endpoint, model, tier, byok, price, cost_picos, rule, resolution, quantity,"
    " input_tokens, cached_input_tokens, cache_creation_tokens, cache_creation_1h_tokens,"
    " output_tokens, reasoning_tokens, audio_input_tokens, audio_output_tokens,"
    " image_input_tokens, image_output_tokens, images, input_characters, audio_ms, queries"
    " FROM usage WHERE request_id >= uuid_floor(%(since)s) AND request_id < uuid_floor(%(until)s)"
    " AND (price IS NOT NULL OR (status = 'needs_review' AND review_reason = ANY(%(waiting)s)))"
)
_DETACHED: LiteralString = (
    "SELECT month FROM detached_months WHERE month::timestamp AT TIME ZONE 'UTC' < %(until)s"
    " AND (month + interval '1 month') AT TIME ZONE 'UTC' > %(since)s ORDER BY month"
)


@dataclass(slots=True)
class Sold:
    """Requests with what they were sold for, and what they would be; nano-USD."""

    requests: int = 0
    now_nanos: int = 0
    draft_nanos: int = 0

    @property
    def change_nanos(self) -> int:
        """How much more they would bring."""
        return self.draft_nanos - self.now_nanos

    def add(self, now_nanos: int, draft_nanos: int) -> None:
        """Count one more."""
        self.requests += 1
        self.now_nanos += now_nanos
        self.draft_nanos += draft_nanos


@dataclass(slots=True)
class Replay:
    """What a replay found.

    `total` has every request that was charged; by model and tier it is cut up, whatever is beyond
    the first thousand names under None. Those that the draft can't price are in it with nothing
    for the draft, and in `unpriced` by reason: they would wait for a review. Prices that were set
    by hand stay as they are. `waiting` are requests that have no price now because the book they
    were sold by could make none; they are not in the total.
    """

    total: Sold = field(default_factory=Sold)
    models: dict[str | None, Sold] = field(default_factory=dict[str | None, Sold])
    tiers: dict[str | None, Sold] = field(default_factory=dict[str | None, Sold])
    unpriced: dict[str, Sold] = field(default_factory=dict[str, Sold])
    set_by_hand: int = 0
    waiting: int = 0
    waiting_priced: Sold = field(default_factory=Sold)


class PriceReplays:
    """Replays, one at a time; raises psycopg's errors where the database is away."""

    def __init__(self, pool: Pool, *, timeout_s: float = TIMEOUT_S) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._is_busy = False

    async def replay(
        self, book: PriceBook, nanos_per_credit: int, *, since: datetime, until: datetime
    ) -> Replay:
        """Replay what began from `since` to before `until`, by the state of this moment.

        Raises InvalidRequestError where a month of it was detached, or it is too much for the
        time there is, and RateLimitError while another replay is under way in this process.
        """
        if self._is_busy:
            # Each holds a connection for long, and there are few.
            message = "Another replay is under way here. Try again when it is through."
            raise RateLimitError(message, retry_after_s=10)
        self._is_busy = True
        pricing = _Pricing(book, nanos_per_credit)
        found = Replay()
        period = {"since": since, "until": until, "waiting": list(_WAITING)}
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with (
                limit,
                self._pool.connection() as connection,
                connection.transaction(),
            ):
                await connection.execute(
                    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
                )
                await _refuse_detached(connection, period)
                await _read(connection, period, pricing, found)
        except TimeoutError:
            if not limit.expired():
                raise
            message = (
                f"The replay was given up after {self._timeout_s:g} s, and had priced "
                f"{found.total.requests} requests. Ask for shorter periods, and add them up."
            )
            raise InvalidRequestError(message, param="from") from None
        finally:
            self._is_busy = False
        return found


async def _refuse_detached(
    connection: AsyncConnection[TupleRow], period: Mapping[str, object]
) -> None:
    cursor = await connection.execute(_DETACHED, period)
    rows = await cursor.fetchall()
    if rows:
        month: date = rows[0][0]
        message = f"The usage of {month:%Y-%m} was detached, and can't be replayed. Begin after it."
        raise InvalidRequestError(message, param="from")


async def _read(
    connection: AsyncConnection[TupleRow],
    period: Mapping[str, object],
    pricing: "_Pricing",
    found: Replay,
) -> None:
    async with connection.cursor(name="price_replay", row_factory=dict_row) as cursor:
        await cursor.execute(_USAGE, period)
        while rows := await cursor.fetchmany(_PAGE_ROWS):
            for begin in range(0, len(rows), _ROWS_AT_ONCE):
                for row in rows[begin : begin + _ROWS_AT_ONCE]:
                    pricing.count(row, found)
                await asyncio.sleep(0)


class _Pricing:
    """Prices rows of usage by a book."""

    def __init__(self, book: PriceBook, nanos_per_credit: int) -> None:
        self._book = book
        self._nanos_per_credit = nanos_per_credit
        self._names_accounts = any(rule.account is not None for rule in book.rules)
        self._rules: dict[tuple[str, str, str], Rule] = {}

    def count(self, row: Mapping[str, Any], found: Replay) -> None:
        """Price one row, and add it to what was found."""
        if row["price"] is None:
            found.waiting += 1
            draft_nanos, _ = self._price(row)
            if draft_nanos is not None:
                found.waiting_priced.add(0, draft_nanos)
            return
        now_nanos: int = row["price"]
        if row["rule"] == BY_HAND and row["resolution"] in {"charge", "reprice"}:
            found.set_by_hand += 1
            draft_nanos = now_nanos
        else:
            draft_nanos, reason = self._price(row)
            if draft_nanos is None:
                found.unpriced.setdefault(reason, Sold()).add(now_nanos, 0)
        charged = (now_nanos, draft_nanos or 0)
        found.total.add(*charged)
        _named(found.models, row["model"]).add(*charged)
        _named(found.tiers, row["tier"]).add(*charged)

    def _price(self, row: Mapping[str, Any]) -> tuple[int | None, str]:
        """Return the price in nano-USD, or None and why there is none."""
        try:
            if row["endpoint"] == CHARGES:
                if row["model"] not in self._book.action_nanocredits:
                    return None, "action_without_price"
                charged = action_of(row, self._book, self._nanos_per_credit)
            else:
                charged = charge_of(row, self._rule(row), self._nanos_per_credit)
        except CostUnknownError as error:
            return None, error.reason
        except UsageUnknownError:
            return None, "usage_unknown"
        except PricingError:
            return None, "price_too_large"
        return charged.price_nanos, ""

    def _rule(self, row: Mapping[str, Any]) -> Rule:
        # A book of many rules is searched once for what is asked again and again.
        account = str(row["account_id"]) if self._names_accounts else ""
        asked = (account, row["tier"], row["model"])
        rule = self._rules.get(asked)
        if rule is None:
            if len(self._rules) >= _MAX_RULES_KEPT:
                self._rules.clear()
            rule = self._rules[asked] = self._book.select(*asked)
        return rule


def _named(sold: dict[str | None, Sold], name: str) -> Sold:
    found = sold.get(name)
    if found is None:
        found = sold.setdefault(name if len(sold) < _MAX_NAMES else None, Sold())
    return found
