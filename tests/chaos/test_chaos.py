"""`make chaos` in brief: a fault of each kind under one load. `make mutation` judges its judge."""

import subprocess
import sys

import pytest

from tests.chaos.stage import clean_environ
from tests.support.service import ROOT


@pytest.mark.timeout(600)
def test_bad_days_in_brief_lose_double_and_overspend_nothing() -> None:
    # In processes of its own, which nobody measures: the clock is what counts there.
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--brief"],
        cwd=ROOT,
        env=clean_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("lost 0, doubled 0, overspent 0\n"), done.stdout
