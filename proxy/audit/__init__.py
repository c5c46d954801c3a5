"""`tallygate audit`: every invariant of the ledger, checked against the rows themselves.

`audit` looks at everything, in one snapshot; `audit_increment` at what came since the newest seal
that a clean audit vouches for, a page of accounts at a time; `check_seals` whether what was sealed
is what it was. All of them only read, so they may run beside a busy service.
"""

from proxy.audit.findings import MAX_EXAMPLES, Finding
from proxy.audit.full import audit
from proxy.audit.increment import Increment, audit_increment
from proxy.audit.invariants import INVARIANTS
from proxy.audit.runs import Run
from proxy.audit.sealed import Sealed, check_seals

__all__ = [
    "INVARIANTS",
    "MAX_EXAMPLES",
    "Finding",
    "Increment",
    "Run",
    "Sealed",
    "audit",
    "audit_increment",
    "check_seals",
]
