"""What a run has shown: the line that it ends with, and the table of docs/reliability.md."""

import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.campaign import Campaign, Outcome
from tests.chaos.verdict import Verdict

_BEGIN, _END = "<!-- chaos: begin -->", "<!-- chaos: end -->"


def total(campaigns: Sequence[Campaign]) -> Verdict:
    """Everything that was found."""
    whole = Verdict()
    for outcome in _outcomes(campaigns):
        whole.add(outcome.verdict)
    return whole


def _outcomes(campaigns: Sequence[Campaign]) -> list[Outcome]:
    return [outcome for campaign in campaigns for outcome in campaign.outcomes]


def tally(campaigns: Sequence[Campaign]) -> str:
    """The run in a line."""
    verdict = total(campaigns)
    line = (
        f"{sum(outcome.injected for outcome in _outcomes(campaigns))} faults injected,"
        f" {verdict.acknowledged} requests acknowledged, lost {len(verdict.lost)},"
        f" doubled {len(verdict.doubled)}, overspent {len(verdict.overspent)}"
    )
    return f"{line}, otherwise wrong {len(verdict.wrong)}" if verdict.wrong else line


def write(path: Path, campaigns: Sequence[Campaign], *, seconds: float, seed: int) -> None:
    """Put the run's table between the marks of a document."""
    head, begin, rest = path.read_text().partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    if not begin or not end:
        msg = f"{path} lacks {_BEGIN} or {_END}"
        raise ValueError(msg)
    path.write_text(f"{head}{_BEGIN}\n{_section(campaigns, seconds, seed)}{_END}{tail}")


def _section(campaigns: Sequence[Campaign], seconds: float, seed: int) -> str:
    verdict = total(campaigns)
    traces: Counter[str] = Counter()
    for campaign in campaigns:
        traces += campaign.traces
    when = f"{datetime.now(UTC):%Y-%m-%d}"
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    lines = [
        f"Run of {when}: {seconds:.0f} s, seed {seed}, {machine}. **{tally(campaigns)}.**",
        "",
        "| fault | what is done | times | acknowledged | lost | doubled | overspent |",
        "|---|---|--:|--:|--:|--:|--:|",
        *(_row(outcome) for outcome in _outcomes(campaigns)),
        "",
        f"What customers got: {_listed(verdict.told)}.",
        "",
        f"What the ledger says of them: {_listed(verdict.rows)}.",
        "",
        f"What the faults led to: {_listed(traces)}.",
        "",
    ]
    return "\n".join(lines)


def _row(outcome: Outcome) -> str:
    verdict, what = outcome.verdict, outcome.fault.what
    if outcome.obstacle is not None:
        return f"| {outcome.fault.name} | {what} | left out: {outcome.obstacle} | | | | |"
    figures = (
        outcome.injected,
        verdict.acknowledged,
        len(verdict.lost),
        len(verdict.doubled),
        len(verdict.overspent),
    )
    return f"| {outcome.fault.name} | {what} | {' | '.join(map(str, figures))} |"


def _listed(counts: Counter[str]) -> str:
    return "; ".join(f"{name} {number}" for name, number in counts.most_common())
