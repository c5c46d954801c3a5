"""A campaign: fault after fault under load, and after each the judge."""

import random
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.faults import Fault
from tests.chaos.journal import Reader
from tests.chaos.stage import ChaosError, Stage, wait_for
from tests.chaos.verdict import Judge, Verdict

# How many answers come before a fault, and after it, before its round ends.
_ANSWERS = 40
_BRIEF_ANSWERS = 10
_CUSTOMERS = 24
_PAUSE_MS = 120.0
# What the two poor accounts get for each round: some five requests.
_ALMS_NANOS = 6_000_000

# Kinds of entries that only a fault makes, and what a replica says of one.
_TRACES = {"expire": "holds expired", "late_capture": "charges posted after their hold expired"}
_SAID = {
    "settle failed, spooling": "batches of charges sent to the spool",
    "neither ledger nor spool": "times that neither PostgreSQL nor the disk took a charge",
    "authorize failed": "batches of requests refused for want of PostgreSQL",
    "heartbeat missed": "heartbeats missed",
}


@dataclass
class Outcome:
    """What one kind of fault has led to."""

    fault: Fault
    # Why it could not be done here; None where it can.
    obstacle: str | None
    injected: int = 0
    verdict: Verdict = field(default_factory=Verdict)


class Campaign:
    """Injects faults into a stage until its time is up."""

    def __init__(self, stage: Stage, faults: Sequence[Fault]) -> None:
        self._stage = stage
        self._random = random.Random(stage.seed)
        self._judge = Judge(
            stage.database,
            stage.accounts,
            stage.provider.journal,
            [replica.spool for replica in stage.replicas],
        )
        self.outcomes = [Outcome(fault, fault.obstacle()) for fault in faults]
        # What the faults have led to on the way: that they were faults.
        self.traces: Counter[str] = Counter()

    def run(self, seconds: float) -> Iterator[str]:
        """Go on until the time is up, at least once; yields what each round has shown in a line."""
        ends_at = time.monotonic() + seconds
        for number, outcome in enumerate(self._turns(), 1):
            started = time.monotonic()
            outcome.injected += 1
            try:
                verdict = self._round(number, outcome.fault)
            except ChaosError as error:
                verdict = Verdict(wrong=[f"after {outcome.fault.name}: {error}"])
            outcome.verdict.add(verdict)
            took_s = time.monotonic() - started
            yield (
                f"{number:4}  {outcome.fault.name:34}{verdict.acknowledged:5} acknowledged"
                f" {took_s:6.1f} s  {'WRONG' if verdict.failings else 'clean'}"
            )
            yield from (f"      {failing}" for failing in verdict.failings[:20])
            if verdict.wrong and not verdict.acknowledged:
                return  # something did not come back: nothing more can be learned
            if time.monotonic() + took_s / 2 > ends_at:
                break
        self._trace()

    def run_brief(self) -> Iterator[str]:
        """Inject every fault once under one load, for one verdict; yields each fault, then that."""
        stage = self._stage
        outcomes = [outcome for outcome in self.outcomes if outcome.obstacle is None]
        self._random.shuffle(outcomes)
        verdict = Verdict()
        started = time.monotonic()
        try:
            with self._load("brief") as journal:
                for outcome in outcomes:
                    outcome.injected += 1
                    yield f"{time.monotonic() - started:5.1f} s  {outcome.fault.name}"
                    outcome.fault.inject(stage, self._random)
                    stage.wait_up()
                    wait_answers(journal, _BRIEF_ANSWERS)
            stage.wait_settled()
            verdict = self._judge.judge([journal])
        except ChaosError as error:
            verdict.wrong.append(str(error))
        # It is nobody's alone; the sum over all of them is what counts.
        outcomes[-1].verdict.add(verdict)
        yield f"{time.monotonic() - started:5.1f} s  {'WRONG' if verdict.failings else 'clean'}"
        yield from (f"      {failing}" for failing in verdict.failings[:20])
        self._trace()

    def _turns(self) -> Iterator[Outcome]:
        """Every fault in an order drawn from the seed, then all again in another."""
        possible = [outcome for outcome in self.outcomes if outcome.obstacle is None]
        while possible:
            self._random.shuffle(possible)
            yield from possible

    def _trace(self) -> None:
        stage = self._stage
        for row in stage.rows("SELECT kind, count(*) AS number FROM entries GROUP BY kind"):
            if row["kind"] in _TRACES:
                self.traces[_TRACES[row["kind"]]] = row["number"]
        (overdrawn,) = stage.rows("SELECT count(*) AS number FROM usage WHERE overdraft > 0")
        self.traces["charges booked as overdraft"] = overdrawn["number"]
        for replica in stage.replicas:
            log = replica.service.log()
            self.traces["commits whose answer was lost"] += replica.wire.lost
            for said, meaning in _SAID.items():
                self.traces[meaning] += log.count(f'"{said}"')

    @contextmanager
    def _load(self, name: str) -> Generator[Path]:
        """Have customers call while the context lasts; yields their journal."""
        for poor in self._stage.poor:
            poor.fund(_ALMS_NANOS)
        calling = self._stage.customers(name, customers=_CUSTOMERS, pause_ms=_PAUSE_MS)
        with calling as journal:
            yield journal

    def _round(self, number: int, fault: Fault) -> Verdict:
        stage = self._stage
        with self._load(str(number)) as journal:
            wait_answers(journal, _ANSWERS)
            fault.inject(stage, self._random)
            stage.wait_up()
            wait_answers(journal, _ANSWERS)
        stage.wait_settled()
        return self._judge.judge([journal])


def wait_answers(journal: Path, count: int) -> None:
    """Wait until so many more answers came."""
    reader = Reader(journal)
    for _ in reader:
        pass
    answered = 0

    def enough() -> bool:
        nonlocal answered
        answered += sum(1 for told in reader if told["whole"])
        return answered >= count

    wait_for(enough, f"{count} answers")
