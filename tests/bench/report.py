"""Tables for the screen and docs/benchmarks.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from string import Template

from tests.bench.contenders import BARE, LABELS, METERED
from tests.bench.figures import Figures
from tests.bench.measure import Streams

_PAGE = Template((Path(__file__).parent / "benchmarks.md.in").read_text())
_STREAM_LABELS = {"direct": "direct", METERED: "**through Tallygate**"}


def targets(figures: Figures) -> str:
    """Show what was promised beside what came out."""
    header = ["", "target", "measured", "met"]
    return table(header, [target.row() for target in figures.targets()])


def whole_answers(figures: Figures, connections: int) -> str:
    """Show everybody at one number of connections."""
    header = [
        f"{connections} connection{'s' * (connections > 1)}", "requests/s", "of bare",
        "p50 ms", "p90 ms", "p99 ms", "CPU µs", "PostgreSQL µs", "batch", "failed",
    ]  # fmt: skip
    rows: list[list[str]] = []
    for name in dict.fromkeys(run.contender for run in figures.whole):
        runs = figures.runs(name, connections)
        uses_ledger = runs[0].batches is not None
        rows.append(
            [
                LABELS[name],
                f"{median(run.requests_per_s for run in runs):,.0f}",
                f"{figures.ratio(name, BARE, connections):.2f}",
                f"{median(run.p50_ms for run in runs):.2f}",
                f"{median(run.p90_ms for run in runs):.2f}",
                f"{median(run.p99_ms for run in runs):.2f}",
                f"{median(run.proxy_us for run in runs):.0f}",
                f"{median(run.postgres_us for run in runs):.0f}" if uses_ledger else "",
                _batches(run.batches for run in runs),
                f"{sum(run.failures for run in runs)}",
            ]
        )
    return table(header, rows)


def added(figures: Figures) -> str:
    """Show what each adds to an answer when nothing else is going on."""
    fewest = figures.connections()[0]
    rows = [
        [
            LABELS[name],
            f"{figures.added_ms(name, fewest, lambda run: run.p50_ms):.2f}",
            f"{figures.added_ms(name, fewest, lambda run: run.p99_ms):.2f}",
        ]
        for name in dict.fromkeys(run.contender for run in figures.whole)
        if name != "direct"
    ]
    return table(["added to the upstream's own time", "median ms", "p99 ms"], rows)


def streams(figures: Figures) -> str:
    """Show streams, direct and through Tallygate."""
    header = [
        f"{figures.streams[0].streams} streams", "mean s", "p50 s", "p99 s", "longest s",
        "CPU of a core", "CPU µs an event", "PostgreSQL µs a stream", "failed",
    ]  # fmt: skip
    return table(header, [_stream_row(figures.stream_runs(name)) for name in _STREAM_LABELS])


def _stream_row(runs: Sequence[Streams]) -> list[str]:
    return [
        _STREAM_LABELS[runs[0].contender],
        f"{median(run.mean_s for run in runs):.3f}",
        f"{median(run.p50_s for run in runs):.3f}",
        f"{median(run.p99_s for run in runs):.3f}",
        f"{max(run.max_s for run in runs):.3f}",
        f"{median(run.proxy_share for run in runs):.0%}",
        f"{median(run.proxy_us_per_event for run in runs):.0f}",
        f"{median(run.postgres_us_per_stream for run in runs):.0f}",
        f"{sum(run.streams - run.whole for run in runs)}",
    ]


def facts(told: Mapping[str, str]) -> str:
    """Show names and what belongs to them."""
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in told.items())]
    )


def page(
    figures: Figures,
    *,
    settings: Mapping[str, object],
    ledger: Mapping[str, str],
    machine: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """Return docs/benchmarks.md."""
    return _PAGE.substitute(
        {name: str(value) for name, value in settings.items()},
        targets=targets(figures),
        added=added(figures),
        whole="\n\n".join(whole_answers(figures, count) for count in figures.connections()),
        streaming=streams(figures),
        ledger=facts(ledger),
        machine=facts(machine),
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table that can be read as plain text too."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def _batches(rounds: Iterable[Mapping[str, float] | None]) -> str:
    """Return the mean size of a call of the ledger, by call, over the rounds."""
    sizes: dict[str, list[float]] = {}
    for batches in rounds:
        for call, size in (batches or {}).items():
            sizes.setdefault(call, []).append(size)
    return ", ".join(f"{call} {mean(found):.1f}" for call, found in sorted(sizes.items()))
