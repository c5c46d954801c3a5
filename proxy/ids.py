"""Identifiers that sort by time: UUID version 7 (RFC 9562).

PostgreSQL makes them itself only from version 18 on, and the request id must exist before the
database hears of it, so that a repeated call is known as a replay.
"""

import os
import time
from uuid import UUID

_VERSION = 0x7 << 76
_VARIANT = 0x2 << 62
_RANDOM_BITS = (1 << 62) - 1
_NANOS_PER_MILLISECOND = 1_000_000


def uuid7() -> UUID:
    """Make a uuidv7: 60 bits of Unix time, 62 random bits.

    The first 48 bits are milliseconds, the next 12 their fraction (RFC 9562, section 6.2, method
    3), so that ids of one process sort by time within a millisecond, too.
    """
    milliseconds, nanos = divmod(time.time_ns(), _NANOS_PER_MILLISECOND)
    fraction = (nanos << 12) // _NANOS_PER_MILLISECOND
    random = int.from_bytes(os.urandom(8), "big") & _RANDOM_BITS
    return UUID(int=milliseconds << 80 | _VERSION | fraction << 64 | _VARIANT | random)
