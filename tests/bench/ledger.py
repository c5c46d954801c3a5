"""What the ledger has of the requests that were measured."""

import time
from typing import LiteralString

import psycopg

from proxy.audit import audit

_SETTLED_TIMEOUT_S = 60


def ledger_facts(database_url: str, *, answered: int) -> dict[str, str]:
    """Count what was billed, and audit it; `answered` is what the load generator counted."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        deadline = time.monotonic() + _SETTLED_TIMEOUT_S
        # What was under way when the load generator left is settled a moment later.
        while _count(connection, "SELECT count(*) FROM tallygate.open_holds"):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        usage = "SELECT count(*) FROM tallygate.usage"
        billed = _count(connection, f"{usage} WHERE status = 'billed'")
        byok = _count(connection, f"{usage} WHERE status = 'byok'")
        other = _count(connection, f"{usage} WHERE status NOT IN ('billed', 'byok')")
        held = _count(connection, "SELECT count(*) FROM tallygate.open_holds")
    broken = sum(finding.violations for finding in audit(database_url))
    return {
        "answers that the load generator counted": f"{answered:,}",
        "requests billed, or recorded under the customer's own key": f"{billed + byok:,}",
        "of those under the customer's own key": f"{byok:,}",
        "void or waiting for review": f"{other:,}",
        "holds left open": f"{held:,}",
        "rows in which `tallygate audit` finds fault": f"{broken:,}",
    }


def _count(connection: psycopg.Connection[tuple[int]], query: LiteralString) -> int:
    row = connection.execute(query).fetchone()
    return 0 if row is None else row[0]
