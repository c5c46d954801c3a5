"""`make mutation`: each guard is removed in turn, and the tests that are named for it must fail.

At the end the judge of `make chaos` has to find out services that each have a guarantee less.

Everything happens in copies of the tree, never in the tree itself. First the tests run on a copy
that is whole, where they must pass: a test that always fails guards nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.sabotage import SABOTAGES
from tests.mutation.guards import GUARDS, Guard, Patch
from tests.mutation.guards_keys import KEY_GUARDS
from tests.mutation.judge import Judgement, judge_each
from tests.support.sections import read_section, write_section

ROOT = Path(__file__).parents[2]
_NOT_COPIED = shutil.ignore_patterns(
    *(".git", ".venv", ".tallygate", "node_modules", "__pycache__", "htmlcov", ".*_cache"),
    *(".hypothesis", ".coverage*"),
)
_EVERY = (*GUARDS, *KEY_GUARDS)
_TIMEOUT_S = 600
_TESTS_FAILED = 1
_NOBODY = "**nobody**"


class MutationError(Exception):
    """The run says nothing of a guard: the text says why."""


@dataclass(frozen=True)
class Verdict:
    """What the tests said to a guard's removal."""

    guard: Guard
    caught_by: Sequence[str]
    seconds: float
    problem: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the tests, whatever their parameters."""
        return list(dict.fromkeys(name.partition("[")[0] for name in self.caught_by))

    @property
    def survived(self) -> bool:
        """Whether nobody noticed, or nobody can tell."""
        return not self.caught_by


def main() -> int:
    """Run it; 1 where the removal of a guard is not noticed."""
    arguments = _arguments()
    guards = [guard for guard in _EVERY if arguments.only in guard.name]
    verdicts = _try_each(guards, arguments.jobs) if guards else []
    judgements = judge_each(arguments.only)
    if arguments.report is not None:
        before = read_section(arguments.report, "mutation")
        write_section(arguments.report, "mutation", _page(verdicts, judgements, before))
    _print(verdicts, judgements)
    return 1 if any(each.survived for each in (*verdicts, *judgements)) else 0


def _try_each(guards: Sequence[Guard], jobs: int) -> list[Verdict]:
    home = Path(tempfile.mkdtemp(prefix="tallygate-mutation-"))
    try:
        whole = _copy(home / "whole")
        tests = list(dict.fromkeys(test for guard in guards for test in guard.tests))
        print(f"{len(guards)} guards; their {len(tests)} tests on the whole tree …", flush=True)
        failed, output, code = _run(whole, tests)
        if code:
            print(output[-4000:])
            sys.exit(f"The tests fail already: {', '.join(failed) or 'see above'}")
        with ThreadPoolExecutor(jobs) as pool:
            homes = [home / str(number) for number in range(len(guards))]
            return list(pool.map(_try, homes, guards))
    finally:
        shutil.rmtree(home)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", default="", help="guards whose names hold this")
    parser.add_argument("--jobs", type=int, default=2, help="guards tried at once")
    parser.add_argument("--report", type=Path, help="a page to write the table into")
    return parser.parse_args()


def _copy(to: Path) -> Path:
    shutil.copytree(ROOT, to, ignore=_NOT_COPIED, symlinks=True)
    return to


def _try(home: Path, guard: Guard) -> Verdict:
    started = time.monotonic()
    tree = _copy(home)
    problem: str | None = None
    caught: list[str] = []
    try:
        for patch in guard.patches:
            _apply(tree, patch)
        caught, output, code = _run(tree, guard.tests)
        if code not in {0, _TESTS_FAILED}:
            caught, problem = [], f"pytest ended with {code}:\n{output[-2000:]}"
    except (MutationError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    finally:
        shutil.rmtree(tree)
    verdict = Verdict(guard, caught, time.monotonic() - started, problem)
    said = "SURVIVED" if verdict.survived else "caught"
    print(f"{said:<9} {guard.name}  ({verdict.seconds:.0f} s)", flush=True)
    return verdict


def _apply(tree: Path, patch: Patch) -> None:
    path = tree / patch.path
    text = path.read_text()
    if text.count(patch.old) != 1:
        msg = f"{patch.path} holds this {text.count(patch.old)} times, not once:\n{patch.old}"
        raise MutationError(msg)
    path.write_text(text.replace(patch.old, patch.new))


def _run(tree: Path, tests: Sequence[str]) -> tuple[list[str], str, int]:
    """Run tests in a copy of the tree; returns those that failed, the output, the exit code."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        # Before what is installed, which is the tree itself.
        env={**environ, "PYTHONPATH": str(tree)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    return failed, done.stdout + done.stderr, done.returncode


def _print(verdicts: Sequence[Verdict], judgements: Sequence[Judgement]) -> None:
    width = max((len(verdict.guard.name) for verdict in verdicts), default=24)
    print(f"\n{'guard removed':<{width}}  caught by")
    for verdict in verdicts:
        print(f"{verdict.guard.name:<{width}}  {', '.join(verdict.names) or 'NOBODY'}")
    for judgement in judgements:
        print(f"{judgement.sabotage:<{width}}  {judgement.said}")
    for verdict in verdicts:
        if verdict.problem is not None:
            print(f"\n{verdict.guard.name}: {verdict.problem}")
    print(f"\n{_sentence(verdicts, judgements)}")


def _sentence(verdicts: Sequence[Verdict], judgements: Sequence[Judgement]) -> str:
    survived = sum(each.survived for each in (*verdicts, *judgements))
    return _told(len(verdicts) + len(judgements), survived)


def _told(removed: int, survived: int) -> str:
    return f"mutation: {removed} guards removed, {survived} not noticed"


def _page(verdicts: Sequence[Verdict], judgements: Sequence[Judgement], before: str) -> str:
    """Make the table; guards that were left out this time keep the rows that they had `before`."""
    rows: dict[str, str] = {}
    for line in before.splitlines():
        if line.startswith("| ") and line.count(" | ") == 1:
            name, _, found = line.strip("| ").partition(" | ")
            rows[name] = found
    for verdict in verdicts:
        rows[verdict.guard.name] = ", ".join(f"`{name}`" for name in verdict.names) or _NOBODY
    for judgement in judgements:
        found = _NOBODY if judgement.survived else f"`make chaos`: {judgement.said}"
        rows[f"`{judgement.sabotage}`"] = found
    names = [*(guard.name for guard in _EVERY), *(f"`{name}`" for name in SABOTAGES)]
    table = [f"| {name} | {rows[name]} |" for name in names if name in rows]
    told = _told(len(table), sum(_NOBODY in row for row in table))
    head = f"Run of {datetime.now(UTC):%Y-%m-%d}. **{told}.**"
    return "\n".join([head, "", "| guard removed | caught by |", "|---|---|", *table])


if __name__ == "__main__":
    sys.exit(main())
