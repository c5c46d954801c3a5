"""A minute of `make chaos`, and that its judge would notice."""

import subprocess
import sys

import pytest

from tests.chaos.stage import clean_environ
from tests.support.service import ROOT


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in processes of its own, which nobody measures: the clock is what counts there."""
    return subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=ROOT,
        env=clean_environ(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)
def test_a_minute_of_bad_days_loses_doubles_and_overspends_nothing() -> None:
    done = _run("--seconds", "60", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("lost 0, doubled 0, overspent 0\n"), done.stdout


@pytest.mark.timeout(300)
def test_a_service_that_charges_after_answering_is_found_out() -> None:
    killing = ("--only", "both replicas killed", "--seconds", "1")
    done = _run(*killing, "--sabotage", "settle-after-answering")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "answered, and needs_review (orphaned)" in done.stdout
    assert "doubled 0, overspent 0" in done.stdout
