"""Identifiers that sort by time: UUID version 7 (RFC 9562).

PostgreSQL makes them itself only from version 18 on, and the request id must exist before the
database hears of it, so that a repeated call is known as a replay.
"""

import os
import time
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from uuid import UUID

_VERSION = 0x7 << 76
_VARIANT = 0x2 << 62
_RANDOM_BITS = (1 << 62) - 1
_NANOS_PER_MILLISECOND = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def uuid7() -> UUID:
    """Make a uuidv7: 60 bits of Unix time, 62 random bits.

    The first 48 bits are milliseconds, the next 12 their fraction (RFC 9562, section 6.2, method
    3), so that ids of one process sort by time within a millisecond, too.
    """
    milliseconds, nanos = divmod(time.time_ns(), _NANOS_PER_MILLISECOND)
    fraction = (nanos << 12) // _NANOS_PER_MILLISECOND
    random = int.from_bytes(os.urandom(8), "big") & _RANDOM_BITS
    return UUID(int=milliseconds << 80 | _VERSION | fraction << 64 | _VARIANT | random)


def first_uuid7(moment: datetime) -> UUID:
    """Return the least id of a time, which is not before 1970; `uuid_floor` of schema.sql."""
    return UUID(int=(moment - _EPOCH) // timedelta(milliseconds=1) << 80)


def derived_uuid7(moment: datetime, name: str) -> UUID:
    """Make the uuidv7 of a time from 1970 on and a name: the same whenever it is asked for."""
    digest = int.from_bytes(sha256(name.encode()).digest()[:10])
    fraction, random = digest >> 68, digest & _RANDOM_BITS
    return UUID(int=first_uuid7(moment).int | _VERSION | fraction << 64 | _VARIANT | random)
