"""Finds what is to be told, and forgets what was told long ago.

Nothing of it is on the path of a request: balances, keys and reviews are looked at every few
seconds and compared with what was told (`watch_page` in schema.sql). Replicas take turns at the
pages, so the work is the same however many there are.
"""

import asyncio
import logging
import random

from proxy.db import CONNECTION_ERRORS
from proxy.webhooks.store import WebhookStore

log = logging.getLogger(__name__)

# Some 30 ms of work where many are exhausted or have budgets: a million accounts take two minutes
# and a twentieth of a core.
_ACCOUNTS_A_PAGE = 5000
_PAUSE_S = 0.5
_PURGE_LIMIT = 1000
_ROUNDS_A_PURGE = 50


class Watch:
    """Looks at all accounts in pages, round by round."""

    def __init__(self, store: WebhookStore, *, interval_s: float, retention_s: float) -> None:
        self._store = store
        self._interval_s = interval_s
        self._retention_s = retention_s

    async def round(self) -> int:
        """Look at every account once, now and without pauses; returns how many events there are."""
        events = 0
        while True:
            page = await self._store.watch(accounts=_ACCOUNTS_A_PAGE, pause_s=0, interval_s=0)
            events += page.events
            if page.is_last:
                return events

    async def purge(self) -> int:
        """Forget events whose time is over; returns how many."""
        total = 0
        while purged := await self._store.purge(age_s=self._retention_s, limit=_PURGE_LIMIT):
            total += purged
        return total

    async def run(self) -> None:
        """Watch until cancelled, taking turns with other replicas."""
        rounds = 0
        while True:
            try:
                page = await self._store.watch(
                    accounts=_ACCOUNTS_A_PAGE, pause_s=_PAUSE_S, interval_s=self._interval_s
                )
                rounds += page.is_last
                if rounds >= _ROUNDS_A_PURGE:
                    rounds = 0
                    await self.purge()
                is_between = page.is_due and not page.is_last
            except CONNECTION_ERRORS as error:
                log.warning("webhooks not watched", extra={"error": type(error).__name__})
                is_between = False
            pause_s = _PAUSE_S if is_between else self._interval_s
            await asyncio.sleep(pause_s * random.uniform(0.9, 1.1))  # noqa: S311
