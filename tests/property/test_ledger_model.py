"""The ledger is what sixty lines of Python say that it is, whatever is done to it and at once."""

import ast
import time
from pathlib import Path

import pytest

from tests.property import ledger_model
from tests.soak.seeds import soak

# `make soak` for as long as `make test` has for it. A run has ten times as many operations.
_SECONDS = 20
_FUNCTIONS = {
    *("Authorize", "Settle", "Sweep", "Extend", "Fund", "Note", "Revoke", "SetOptions"),
}


# Where a history differs it is done again, to be told in full.
@pytest.mark.timeout(300)
def test_ledger_does_what_the_model_foretells(database_url: str) -> None:
    tally = soak(database_url, 1, time.time() + _SECONDS, shrink=False)
    assert tally.failure is None, tally.failure
    assert {function for function, _ in tally.answers} == _FUNCTIONS
    assert tally.raced > 0


def test_model_can_be_read_at_a_glance() -> None:
    text = Path(ledger_model.__file__).read_text()
    (docstring, *_) = ast.parse(text).body
    code = [line for line in text.splitlines()[docstring.end_lineno :] if line.strip()]
    assert len(code) <= 60
