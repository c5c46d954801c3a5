"""What was written since the newest seal that a clean audit vouches for, and every balance.

Each invariant speaks of one account, so accounts are taken a page at a time, each in a snapshot of
its own: none is older than a page takes. Nothing is read but what is new, and what that refers to
by its key. Three things only the full audit sees: usage that belongs to no entry, the view of the
double entry, and decisions on requests that have no new entry.
"""

import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from uuid import UUID

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import DictRow, dict_row

from proxy.audit.findings import Finding, stream
from proxy.audit.full import check
from proxy.audit.invariants import INVARIANTS
from proxy.audit.page import BASES, PAGE
from proxy.audit.prices import PriceCheck
from proxy.db import set_local

# Of entries in a page, unless one account alone has more.
PAGE_ENTRIES = 20_000
_PAGE_ACCOUNTS = 5_000
_NIL = UUID(int=0)

_SETTINGS = {
    "search_path": "tallygate, pg_temp",
    "statement_timeout": "0",
    "work_mem": "64MB",
    "jit": "off",
    "enable_seqscan": "off",
}

_OF_THE_WHOLE = frozenset({"double_entry_balances", "liability_equals_balances"})
_OF_THE_CATALOG = "journal_is_append_only"
_OF_ACCOUNTS = frozenset(
    {
        "sequence_ends_at_balance",
        "balances_equal_journal",
        "reserved_equals_open_holds",
        "no_overspend",
        "counters_equal_open_holds",
        "expired_credits_were_granted",
        "refunds_within_price",
    }
)
_OF_ENTRIES = frozenset(
    {
        "sequence_without_gaps",
        "running_balances_chain",
        "holds_within_available",
        "funding_equals_entries",
    }
)


@dataclass(slots=True)
class Increment:
    """What an incremental audit looked at, and what it found."""

    # The seal from which on it looked; 0 for the beginning.
    since_seal: int
    # The newest seal when it began: if it is clean, everything up to there is vouched for.
    through_seal: int
    findings: list[Finding] = field(default_factory=list[Finding])
    accounts: int = 0
    entries: int = 0
    pages: int = 0
    longest_snapshot_s: float = 0.0


def audit_increment(url: str, *, page_entries: int = PAGE_ENTRIES) -> Increment:
    """Check what was written since the newest seal before which a clean audit has looked.

    Raises psycopg's errors where the database is away.
    """
    with psycopg.Connection[DictRow].connect(
        url, connect_timeout=10, application_name="tallygate audit", row_factory=dict_row
    ) as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        connection.prepare_threshold = None  # a pooler may stand in between
        return _audit(connection, page_entries)


def _audit(connection: psycopg.Connection[DictRow], page_entries: int) -> Increment:
    set_local(connection, _SETTINGS)
    (known,) = connection.execute(
        "SELECT (SELECT coalesce(max(number), 0) FROM seals) AS newest, coalesce(("
        "SELECT max(through_seal) FROM audit_runs WHERE findings = 0), 0) AS vouched"
    ).fetchall()
    increment = Increment(known["vouched"], known["newest"])
    findings = {
        invariant.name: Finding(invariant.name, invariant.promise)
        for invariant in INVARIANTS
        if invariant.name not in _OF_THE_WHOLE
    }
    prices = PriceCheck(connection)
    for invariant in INVARIANTS:
        if invariant.name == _OF_THE_CATALOG:
            findings[invariant.name] = check(connection, invariant)
    connection.commit()
    for page in _pages(_Reader(connection, increment.since_seal, page_entries)):
        began = time.monotonic()
        for row in page.rows:
            match row["invariant"]:
                case None:
                    prices.check(row)
                case "counted":
                    increment.accounts += row["accounts"]
                    increment.entries += int(row["entries"])
                    _count(findings.values(), row)
                case name:
                    findings[name].report({"account_id": row["account_id"], **row["detail"]})
        increment.pages += 1
        snapshot_s = time.monotonic() - began if page.is_streamed else page.snapshot_s
        increment.longest_snapshot_s = max(increment.longest_snapshot_s, snapshot_s)
    increment.findings = [*findings.values(), *prices.findings]
    return increment


@dataclass(slots=True)
class _Page:
    last: UUID
    rows: Iterable[DictRow]
    snapshot_s: float
    # Whether the rows are still to be read, over the connection.
    is_streamed: bool = False


class _Reader:
    """Reads a page in one transaction."""

    def __init__(
        self, connection: psycopg.Connection[DictRow], through: int, page_entries: int
    ) -> None:
        self._connection = connection
        self._through = through
        self._page_entries = page_entries

    def read(self, after: UUID) -> _Page | None:
        """Read the page of the accounts behind `after`; None where there is none any more."""
        began = time.monotonic()
        set_local(self._connection, _SETTINGS)
        last, entries = self._bounds(after)
        if last is None:
            self._connection.commit()
            return None
        parameters: dict[str, object] = {"through": self._through, "after": after, "last": last}
        if entries > self._page_entries:
            # One account with more than a page: its rows must not all be in memory.
            rows = self._streamed(parameters)
            return _Page(last, rows, 0.0, is_streamed=True)
        rows = self._connection.execute(PAGE, parameters).fetchall()
        self._connection.commit()
        return _Page(last, rows, time.monotonic() - began)

    def _streamed(self, parameters: dict[str, object]) -> Iterator[DictRow]:
        yield from stream(self._connection, PAGE, parameters)
        self._connection.commit()

    def _bounds(self, after: UUID) -> tuple[UUID | None, int]:
        """Return the last account of a page, and how many entries it has."""
        parameters = {"through": self._through, "after": after, "accounts": _PAGE_ACCOUNTS}
        last: UUID | None = None
        total = 0
        for row in self._connection.execute(BASES, parameters).fetchall():
            if last is not None and total + row["entries"] > self._page_entries:
                break
            total += row["entries"]
            last = row["account_id"]
        return last, total


def _pages(reader: _Reader) -> Generator[_Page]:
    """Read one page while the one before is looked at: PostgreSQL and Python have a core each."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(reader.read, _NIL)
        while (page := upcoming.result()) is not None:
            if page.is_streamed:
                yield page
                upcoming = thread.submit(reader.read, page.last)
            else:
                upcoming = thread.submit(reader.read, page.last)
                yield page


def _count(findings: Iterable[Finding], row: DictRow) -> None:
    for finding in findings:
        if finding.name in _OF_ACCOUNTS:
            finding.checked += row["accounts"]
        elif finding.name in _OF_ENTRIES:
            finding.checked += int(row["entries"])
        elif finding.name != _OF_THE_CATALOG:
            finding.checked += row["requests"]
