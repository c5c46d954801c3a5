"""Identifiers that sort by time: UUID version 7 (RFC 9562).

PostgreSQL makes them itself only from version 18 on, and the request id must exist before the
database hears of it, so that a repeated call is known as a replay.
"""

import os
import time
from uuid import UUID

_VERSION = 0x7 << 76
_VARIANT = 0x2 << 62
_RANDOM_12_BITS = 0xFFF << 64
_RANDOM_62_BITS = (1 << 62) - 1


def uuid7() -> UUID:
    """Make a uuidv7: 48 bits of Unix milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    return UUID(
        int=milliseconds << 80
        | _VERSION
        | (random & _RANDOM_12_BITS)
        | _VARIANT
        | (random & _RANDOM_62_BITS)
    )
