"""What the ledger has of the requests that were measured."""

import time
from collections.abc import Sequence
from typing import LiteralString

import psycopg

from proxy.audit import audit
from tests.bench.results import Booked

_SETTLED_TIMEOUT_S = 120
_USAGE = "SELECT count(*) FROM tallygate.usage WHERE status "


def booked(database_urls: Sequence[str], *, answered: int) -> Booked:
    """Count what was billed so far; `answered` is what the load generators counted."""
    total = Booked(answered=answered)
    for url in database_urls:
        with psycopg.connect(url, autocommit=True) as connection:
            deadline = time.monotonic() + _SETTLED_TIMEOUT_S
            # What was under way when the load generator left is settled a moment later.
            while held := _count(connection, "SELECT count(*) FROM tallygate.open_holds"):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            total += Booked(
                billed=_count(connection, _USAGE + "= 'billed'"),
                byok=_count(connection, _USAGE + "= 'byok'"),
                other=_count(connection, _USAGE + "NOT IN ('billed', 'byok')"),
                held=held,
            )
    return total


def broken(database_urls: Sequence[str]) -> int:
    """Audit the databases; returns in how many rows fault is found."""
    return sum(finding.violations for url in database_urls for finding in audit(url))


def _count(connection: psycopg.Connection[tuple[int]], query: LiteralString) -> int:
    row = connection.execute(query).fetchone()
    return 0 if row is None else row[0]
