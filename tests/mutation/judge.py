"""Whether the judge of `make chaos` notices: services with a guarantee taken out, on a bad day."""

import subprocess
import sys
from dataclasses import dataclass

from tests.chaos.sabotage import SABOTAGES
from tests.chaos.stage import clean_environ
from tests.support.service import ROOT

# The fault that brings each of them to light.
_FAULTS = {
    "settle-after-answering": "both replicas killed",
    "forgetful-spool": "PostgreSQL away, replicas killed",
    "settle-twice": "commits unanswered",
    "admit-anything": "worker killed",
}
# A fault may hit nobody; its rounds go on until one of them is found wrong.
_SECONDS = "120"
_FOUND = 1
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Judgement:
    """What the judge said to a sabotaged service."""

    sabotage: str
    # The last line of its run, with the fault that brought it to light.
    said: str
    survived: bool


def judge_each(only: str) -> list[Judgement]:
    """Run each sabotaged service whose name holds `only` through its fault."""
    return [_judge(name, _FAULTS[name]) for name in SABOTAGES if only in name]


def _judge(sabotage: str, fault: str) -> Judgement:
    command = ["--sabotage", sabotage, "--only", fault, "--seconds", _SECONDS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *command],
        cwd=ROOT,
        env=clean_environ(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    said = (done.stdout.splitlines() or [done.stderr[-500:]])[-1].removeprefix("chaos: ")
    # What is wrong in some other way than money is no proof: something may just not have come up.
    has_found = done.returncode == _FOUND and any(
        f"{failing} {number}" in said
        for failing in ("lost", "doubled", "overspent")
        for number in "123456789"
    )
    return Judgement(sabotage, f"{said} (after *{fault}*)", not has_found)
