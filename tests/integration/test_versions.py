"""The oldest PostgreSQL that is supported runs the ledger as the newest does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.service import ROOT

_OLDEST = "15"
# What decides about money. All the tests run there with TEST_POSTGRES_VERSION=15, by hand.
_CORE = ("authorize", "settle", "holds_and_time")


@pytest.mark.timeout(300)
def test_the_ledgers_tests_pass_on_the_oldest_postgresql(tmp_path: Path) -> None:
    if not Path(f"/usr/lib/postgresql/{_OLDEST}/bin/postgres").exists():
        pytest.skip(f"Debian's package postgresql-{_OLDEST} is not installed")
    environ = {name: text for name, text in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            # The usual one is ours, and whoever starts takes everybody else's rights to it.
            f"--basetemp={tmp_path / 'own'}",
            *(f"tests/integration/test_{name}.py" for name in _CORE),
        ],
        cwd=ROOT,
        env={**environ, "TEST_POSTGRES_VERSION": _OLDEST},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
