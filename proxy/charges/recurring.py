"""Recurring charges: an action charged again each hour, day, week or month.

The id of a period's charge follows from the period, so whoever comes to it again, after a crash or
on another replica, finds the charge that there is: a period is charged once.
"""

import asyncio
import logging
import random
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import Literal
from uuid import UUID

import msgspec

from proxy.charges.making import Charges, Order, key_hash_of, price_of
from proxy.charges.schedule import Change, Due, RecurringStore, Row
from proxy.db import CONNECTION_ERRORS
from proxy.errors import (
    ConflictError,
    InsufficientCreditsError,
    MeteringUnavailableError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    TallygateError,
)
from proxy.ids import derived_uuid7, uuid7
from proxy.price_books import PriceBooks

log = logging.getLogger(__name__)

Every = Literal["hour", "day", "week", "month"]

_POLL_S = 5.0
_AT_ONCE = 20
_LEASE_S = 120
# What began longer ago is not charged after the fact, as long as another period runs.
_CATCH_UP_S = 7 * 86_400
# A period that is refused is tried again each hour, for three days.
_RETRY_S = 3600
_ATTEMPTS = 72
_SOON_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """What is to be charged again each period; members as in Order, times in UTC.

    It starts now where `starts_at` is None, and goes on until it is cancelled where `ends_at` is.
    """

    action: str
    quantity: int
    every: Every
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    description: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    key: str | None = None
    operator: str | None = None


class RecurringCharges:
    """Makes and changes recurring charges, and carries them out in the background."""

    def __init__(self, store: RecurringStore, charges: Charges, price_books: PriceBooks) -> None:
        self._store = store
        self._charges = charges
        self._price_books = price_books

    async def create(
        self, account_id: UUID, wanted: Subscription, *, actor: str
    ) -> tuple[Row, bool]:
        """Make a recurring charge, or find the one of the same key; and whether it is new."""
        published = self._price_books.current
        price_of(published.book, wanted.action, wanted.quantity, published.nanos_per_credit)
        key_hash = key_hash_of(wanted.key, wanted.operator)
        metadata = dict(sorted(wanted.metadata.items()))
        times = (wanted.starts_at, wanted.ends_at)
        asked = (wanted.action, wanted.quantity, wanted.every, *times, wanted.description, metadata)
        outcome, recurring_id = await self._store.create(
            {
                "account_id": str(account_id),
                "recurring_id": str(uuid7()),
                "key_hash": None if key_hash is None else f"\\x{key_hash.hex()}",
                "body_hash": f"\\x{sha256(msgspec.json.encode(asked)).hexdigest()}",
                "action": wanted.action,
                "quantity": wanted.quantity,
                "every": wanted.every,
                "starts_at": None if times[0] is None else times[0].isoformat(),
                "ends_at": None if times[1] is None else times[1].isoformat(),
                "operator": wanted.operator,
                "description": wanted.description,
                "metadata": metadata,
            },
            actor=actor,
        )
        if outcome == "conflict":
            message = "This Idempotency-Key came with another recurring charge. Use a new key."
            raise ConflictError(message, code="idempotency_key_reused")
        return await self.recurring(account_id, recurring_id), outcome == "new"

    async def recurring(self, account_id: UUID, recurring_id: UUID) -> Row:
        """Read one, as the store does; NotFoundError."""
        row = await self._store.recurring(account_id, recurring_id)
        if row is None:
            raise _unknown()
        return row

    async def change(
        self,
        account_id: UUID,
        recurring_id: UUID,
        change: Change,
        *,
        is_operator: bool,
        actor: str,
    ) -> Row:
        """Pause, resume or cancel one; raises what its caller hears where that can't be."""
        outcome = await self._store.change(
            account_id, recurring_id, change, is_operator=is_operator, actor=actor
        )
        if outcome == "unknown":
            raise _unknown()
        if outcome == "not_allowed":
            message = "This recurring charge was made by the operator, who alone may change it."
            raise PermissionDeniedError(message)
        if outcome == "over":
            message = "This recurring charge is over for good. Make a new one."
            raise ConflictError(message, code="recurring_charge_over")
        return await self.recurring(account_id, recurring_id)

    # --- in the background ---

    async def run(self) -> None:
        """Charge what is due until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S * random.uniform(0.5, 1.5))  # noqa: S311
            try:
                while await self.charge_due():
                    pass
            except CONNECTION_ERRORS as error:
                log.warning("recurring charges wait", extra={"error": type(error).__name__})

    async def charge_due(self) -> int:
        """Charge a period of each that is due; returns how many were looked at.

        Raises one of CONNECTION_ERRORS where the database is away.
        """
        due = await self._store.claim(limit=_AT_ONCE, lease_s=_LEASE_S, catch_up_s=_CATCH_UP_S)
        # Together, so that their holds go to the ledger in one batch.
        async with asyncio.TaskGroup() as group:
            for each in due:
                group.create_task(self._carry_out(each))
        return len(due)

    async def _carry_out(self, due: Due) -> None:
        try:
            await self._charge(due)
        except CONNECTION_ERRORS as error:
            # Somebody comes back to it when the lease is over.
            log.warning("recurring charge waits", extra={"error": type(error).__name__})

    async def _charge(self, due: Due) -> None:
        name = f"{due.recurring_id}:{due.period}:{due.generation}"
        charge_id = derived_uuid7(due.period_at, name)
        order = Order(
            action=due.action,
            quantity=due.quantity,
            description=due.description,
            metadata=due.metadata,
            operator=due.operator,
            recurring_id=due.recurring_id,
        )
        read_payer = partial(self._charges.account_payer, due.account_id)
        try:
            row, _ = await self._charges.make(
                order, await read_payer(), read_payer, request_id=charge_id
            )
        except TallygateError as error:
            await self._refused(due, error)
            return
        if row["price"] is None:
            # It broke off once and its hold was over before anybody came back to it.
            await self._store.finish(due, "again")
            return
        await self._store.finish(due, "charged", charge_id=charge_id)

    async def _refused(self, due: Due, error: TallygateError) -> None:
        log.warning(
            "recurring charge refused",
            extra={"recurring_id": due.recurring_id, "period": due.period, "error": error.code},
        )
        if isinstance(error, RateLimitError | MeteringUnavailableError):
            await self._store.finish(due, "later", retry_s=_SOON_S)
            return
        # Whoever has no credits may get some; an account that is closed stays so.
        is_lasting = (
            not isinstance(error, InsufficientCreditsError | NotFoundError)
            and error.code != "account_suspended"
        )
        await self._store.finish(
            due,
            "refused",
            problem=error.code,
            retry_s=_RETRY_S,
            attempts=1 if is_lasting else _ATTEMPTS,
        )


def _unknown() -> NotFoundError:
    return NotFoundError("This account has no recurring charge with that id.")
