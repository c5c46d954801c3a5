"""Sends events until they are taken: of each account in order, several accounts at a time.

Every replica does. What one has claimed the others leave alone until its lease is over, so an event
that was under way when a process died is sent by another: at least once, and sometimes twice.
"""

import asyncio
import logging
import random
import time
from dataclasses import dataclass
from uuid import UUID

from proxy.db import CONNECTION_ERRORS
from proxy.metrics import WEBHOOK_ATTEMPTS
from proxy.webhooks.events import body_of
from proxy.webhooks.sender import Sender
from proxy.webhooks.signing import signed_headers
from proxy.webhooks.store import Claimed, Target, WebhookStore

log = logging.getLogger(__name__)

_POLL_S = 1.0
_AT_ONCE = 8
# Beyond the time of an attempt: for the database to hear of it.
_LEASE_MARGIN_S = 30.0
_GROWTH = 3


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a delivery is tried again; seconds."""

    first_s: float
    longest_s: float
    # Since it was queued.
    give_up_s: float

    def delay_s(self, attempts: int, jitter: float) -> float:
        """Seconds until the next attempt after so many in vain; `jitter` is of [0, 1)."""
        # Beyond that the longest is reached from any first, and floats end.
        delay = min(self.first_s * _GROWTH ** min(attempts - 1, 40), self.longest_s)
        return delay * (0.5 + jitter / 2)


class Delivery:
    """Delivers what is due, of every receiver on its own: one that is slow holds up no other."""

    def __init__(
        self,
        store: WebhookStore,
        sender: Sender,
        retries: RetryPolicy,
        *,
        nanos_per_credit: int,
        timeout_s: float,
    ) -> None:
        self._store = store
        self._sender = sender
        self._retries = retries
        self._nanos_per_credit = nanos_per_credit
        self._lease_s = timeout_s + _LEASE_MARGIN_S
        self._serving: set[UUID] = set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    due = await self._store.due_receivers()
                except CONNECTION_ERRORS as error:
                    log.warning("webhooks wait", extra={"error": type(error).__name__})
                    due = []
                for receiver_id in due:
                    if receiver_id not in self._serving:
                        self._serving.add(receiver_id)
                        group.create_task(self._serve_once(receiver_id))
                await asyncio.sleep(_POLL_S * random.uniform(0.5, 1.5))  # noqa: S311

    async def _serve_once(self, receiver_id: UUID) -> None:
        try:
            await self.serve(receiver_id)
        except CONNECTION_ERRORS as error:
            log.warning("webhooks wait", extra={"error": type(error).__name__})
        finally:
            self._serving.discard(receiver_id)

    async def serve(self, receiver_id: UUID) -> int:
        """Deliver to a receiver until nothing is due for it; returns the number of attempts."""
        attempts = 0
        while True:
            claimed = await self._store.claim(receiver_id, limit=_AT_ONCE, lease_s=self._lease_s)
            # After the claim: a secret that was rotated before it signs all of it.
            target = await self._store.target(receiver_id)
            if not claimed or target is None:
                return attempts
            async with asyncio.TaskGroup() as group:
                for each in claimed:
                    group.create_task(self._deliver(receiver_id, target, each))
            attempts += len(claimed)

    async def _deliver(self, receiver_id: UUID, target: Target, claimed: Claimed) -> None:
        body = body_of(claimed, self._nanos_per_credit)
        headers = signed_headers(target.secrets, claimed.event_id, body, now_s=int(time.time()))
        attempt = await self._sender.send(target.url, headers, body)
        retry_s = self._retries.delay_s(claimed.attempts + 1, random.random())  # noqa: S311
        outcome = await self._store.finish(
            receiver_id,
            claimed,
            outcome=attempt.outcome,
            status=attempt.status,
            error=attempt.error,
            retry_s=retry_s,
            give_up_s=self._retries.give_up_s,
        )
        WEBHOOK_ATTEMPTS.labels("gone" if attempt.outcome == "gone" else outcome).inc()
        if attempt.error is not None:
            log.warning(
                "webhook not delivered",
                extra={
                    "receiver_id": receiver_id,
                    "event_id": claimed.event_id,
                    "outcome": outcome,
                    "error": attempt.error,
                },
            )
