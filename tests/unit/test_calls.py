"""What a request costs does not creep up: counted in calls, which no noise of a machine changes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# The most that each may take, some 3% above what it takes. Where a change is worth more calls, or
# saves some, put what `python -m tests.bench.inprocess` prints, and 3% on top, here.
MOST_CALLS = {
    "request": 333.5,  # that is answered whole
    "stream": 593.0,  # without its events
    "event": 46.6,  # of a stream, where each comes alone
}

Counts = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def counts() -> Counts:
    """Count in a process of its own: whatever ran before here has its own caches and hooks."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.bench.inprocess"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize("what", list(MOST_CALLS))
def test_request_takes_no_more_calls_than_agreed(counts: Counts, what: str) -> None:
    assert counts["counted"][what] <= MOST_CALLS[what]


@pytest.mark.parametrize("what", list(MOST_CALLS))
def test_ceiling_is_close_enough_to_hold(counts: Counts, what: str) -> None:
    assert counts["counted"][what] > 0.8 * MOST_CALLS[what], "lower the ceiling to what it takes"


@pytest.mark.parametrize("what", list(MOST_CALLS))
def test_needless_calls_are_noticed(counts: Counts, what: str) -> None:
    more = counts["with_ten_more"][what] - counts["counted"][what]
    assert more == pytest.approx(10, abs=2)
