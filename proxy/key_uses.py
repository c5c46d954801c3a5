"""When virtual keys were last used, written down every few seconds.

No request waits for it: `Principals` notes a use in memory, and what each replica has seen is
written in the background. So it is accurate to some seconds, and what a killed process had not
written is lost.
"""

import asyncio
import logging
import time
from uuid import UUID

from proxy.db import CONNECTION_ERRORS, Pool

log = logging.getLogger(__name__)

_INTERVAL_S = 10.0


class KeyUses:
    """What this process saw of keys since it wrote the last time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # By key: its account, and when it was last used, as `time.monotonic` has it.
        self.seen: dict[UUID, tuple[UUID, float]] = {}

    async def flush(self) -> None:
        """Write down what was seen; what can't be written waits for the next time."""
        seen = dict(self.seen)
        self.seen.clear()
        if not seen:
            return
        now = time.monotonic()
        accounts = [account_id for account_id, _ in seen.values()]
        ages_s = [now - at for _, at in seen.values()]
        try:
            async with self._pool.connection() as connection:
                await connection.execute(
                    "SELECT note_key_uses(%s, %s, %s)", (accounts, list(seen), ages_s)
                )
        except CONNECTION_ERRORS:
            log.warning("uses of keys not written yet", exc_info=True)
            for key_id, use in seen.items():
                self.seen.setdefault(key_id, use)

    async def run(self) -> None:
        """Write every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            await self.flush()
