"""`python -m tests.chaos`: bad days by the seed; see docs/reliability.md.

Exits with 1 if anything is lost, doubled or overspent, or does not agree otherwise.
"""

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.chaos import report
from tests.chaos.campaign import Campaign
from tests.chaos.faults import BRIEF_FAULTS, FAULTS, LITELLM_FAULTS, Fault
from tests.chaos.sabotage import SABOTAGES, copy_with
from tests.chaos.stage import Stage

# The real LiteLLM takes ten seconds to start, so it has its turn in long runs alone.
_LITELLM_SECONDS = 60.0
_LONG_SECONDS = 240.0


def main() -> int:
    """Run, and say what came of it."""
    options = _parse()
    logging.disable()  # that a child died is what we are here for
    # Whoever ends us wants everything ended that we have started.
    signal.signal(signal.SIGTERM, _leave)
    started = time.monotonic()
    campaigns: list[Campaign] = []
    faults, litellm_faults = _choose(options)
    litellm_seconds = min(options.seconds, _LITELLM_SECONDS) if litellm_faults else 0.0
    if faults:
        seconds = options.seconds - litellm_seconds
        campaigns.append(_campaign(options, faults, seconds, has_litellm=False))
    if litellm_faults:
        campaigns.append(_campaign(options, litellm_faults, litellm_seconds, has_litellm=True))
    if options.report is not None:
        took_s = time.monotonic() - started
        report.write(options.report, campaigns, seconds=took_s, seed=options.seed)
    _say(f"chaos: {report.tally(campaigns)}")
    return 1 if report.total(campaigns).failings else 0


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (600)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of faults, and of load")
    parser.add_argument("--only", action="append", default=[], help="a fault by its name")
    parser.add_argument(
        "--brief", action="store_true", help="one of each kind of fault, once, in about a minute"
    )
    parser.add_argument("--sabotage", choices=SABOTAGES, help="of the service: the run must fail")
    parser.add_argument("--report", type=Path, help="the document to write the table into")
    parser.add_argument("--keep", action="store_true", help="keep journals and logs")
    return parser.parse_args()


def _choose(options: argparse.Namespace) -> tuple[list[Fault], list[Fault]]:
    """Faults to inject with LiteLLM stood in for, and with the real one."""
    if not options.only:
        if options.brief:
            return BRIEF_FAULTS, []
        is_long = options.seconds >= _LONG_SECONDS and not options.sabotage
        return FAULTS, LITELLM_FAULTS if is_long else []
    names = {fault.name for fault in (*FAULTS, *LITELLM_FAULTS)}
    if unknown := set(options.only) - names:
        sys.exit(f"no such fault: {', '.join(unknown)}. There are: {', '.join(sorted(names))}")
    first, second = (
        [fault for fault in faults if fault.name in options.only]
        for faults in (FAULTS, LITELLM_FAULTS)
    )
    return first, second


def _campaign(
    options: argparse.Namespace, faults: Sequence[Fault], seconds: float, *, has_litellm: bool
) -> Campaign:
    with _home(keep=options.keep) as home:
        code = None
        if options.sabotage:
            code = copy_with(SABOTAGES[options.sabotage], home / "code")
        stage = Stage(home, seed=options.seed, code=code, has_litellm=has_litellm)
        try:
            campaign = Campaign(stage, faults)
            for line in campaign.run_brief() if options.brief else campaign.run(seconds):
                _say(line)
                if options.sabotage and report.total([campaign]).failings:
                    break  # it was found out
        finally:
            stage.close()
        return campaign


@contextmanager
def _home(*, keep: bool) -> Generator[Path]:
    """A directory that PostgreSQL, which may run as somebody else, can reach."""
    home = Path(tempfile.mkdtemp(prefix="tallygate-chaos-"))
    home.chmod(0o755)
    try:
        yield home
    finally:
        if keep:
            _say(f"kept: {home}")
        else:
            shutil.rmtree(home)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a run is watched


if __name__ == "__main__":
    sys.exit(main())
