"""What audits found, kept in the database: for metrics, and for where the next one may begin."""

import time
from dataclasses import dataclass, field
from typing import Literal

import psycopg

from proxy.audit.findings import Finding
from proxy.ids import uuid7

Scope = Literal["full", "incremental", "sealed"]


@dataclass(slots=True)
class Run:
    """An audit that is under way."""

    # The newest seal when it began.
    through_seal: int
    _began: float = field(default_factory=time.monotonic)

    @classmethod
    def begin(cls, url: str) -> "Run":
        """Note where the seals stand now. Raises psycopg's errors where the database is away."""
        with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
            ((number,),) = connection.execute(
                "SELECT coalesce(max(number), 0) FROM tallygate.seals"
            ).fetchall()
        return cls(number)

    def end(self, url: str, scope: Scope, findings: list[Finding], *, entries: int) -> bool:
        """Keep the result; False where this database can't be written: a standby, a plain login."""
        violations = sum(finding.violations for finding in findings)
        milliseconds = int((time.monotonic() - self._began) * 1000)
        try:
            with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
                connection.execute(
                    "SELECT tallygate.record_audit(%s, %s, %s, %s, %s, %s)",
                    (uuid7(), scope, self.through_seal, violations, entries, milliseconds),
                )
        except (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.InsufficientPrivilege):
            return False
        return True
