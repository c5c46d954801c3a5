"""Tables for the screen and docs/benchmarks.md."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from string import Template

from tests.bench import canned, figures
from tests.bench.figures import Pace, Whole
from tests.bench.names import (
    BARE,
    DIRECT,
    HUGE,
    LABELS,
    LARGE,
    METERED,
    PROMPT_BYTES,
    SMALL,
)
from tests.bench.results import Measured, Results, Streams, WholeAnswers
from tests.bench.targets import targets

_PAGE = Template((Path(__file__).parent / "benchmarks.md.in").read_text())
_STREAM_LABELS = {DIRECT: "direct", METERED: "**through Tallygate**"}
_NOT_MEASURED = "*Not measured yet.*"


def target_table(results: Results) -> str:
    """Show what was promised beside what came out."""
    return table(["", "target", "measured", "met"], [row.row() for row in targets(results)])


def whole_answers(whole: Whole, connections: int) -> str:
    """Show everybody at one number of connections."""
    header = [
        f"{connections} connection{'s' * (connections > 1)}", "of bare", "requests/s",
        "p50 ms", "p90 ms", "p99 ms", "CPU µs", "PostgreSQL µs", "peak MB", "batch", "failed",
    ]  # fmt: skip
    rows: list[list[str]] = []
    for name in whole.contenders(connections):
        runs = whole.of(name, connections)
        rows.append(
            [
                LABELS[name],
                _number(whole.ratio(name, BARE, connections), 2),
                f"{median(run.requests_per_s for run in runs):,.0f}",
                f"{median(run.p50_ms for run in runs):.2f}",
                f"{median(run.p90_ms for run in runs):.2f}",
                f"{median(run.p99_ms for run in runs):.2f}",
                f"{median(run.proxy_us for run in runs):.0f}",
                _postgres(runs),
                f"{max(run.peak_mb for run in runs):.0f}",
                _batches(run.batches for run in runs),
                f"{sum(run.failures for run in runs)}",
            ]
        )
    return table(header, rows)


def added(whole: Whole) -> str:
    """Show what each adds to an answer when nothing else is going on."""
    fewest = whole.connections()[0]
    rows = [
        [
            LABELS[name],
            _number(whole.added_ms(name, fewest, lambda run: run.p50_ms), 2),
            _number(whole.added_ms(name, fewest, lambda run: run.p99_ms), 2),
        ]
        for name in whole.contenders(fewest)
        if name != DIRECT
    ]
    return table(["added to the upstream's own time", "median ms", "p99 ms"], rows)


def workers(whole: Whole) -> str:
    """Show two workers beside one."""
    rows = [
        [
            f"{connections} connections",
            _number(whole.two_workers(connections), 2),
            _number(whole.two_workers_elsewhere(connections), 2),
        ]
        for connections in whole.connections()
        if whole.two_workers(connections) is not None
    ]
    header = ["two workers / one", "everything on these cores", "by the workers' processor time"]
    return table(header, rows) if rows else _NOT_MEASURED


def bodies(whole: Whole) -> str:
    """Show what larger prompts cost."""
    header = ["", "prompt", "of 0.3 KB", "requests/s", "MB/s", "CPU µs", "peak MB", "failed"]
    rows: list[list[str]] = []
    for connections in whole.connections():
        for name in dict.fromkeys(run.contender for run in whole.runs):
            for body in (SMALL, LARGE, HUGE):
                runs = whole.of(name, connections, body)
                if not runs:
                    continue
                per_s = median(run.requests_per_s for run in runs)
                size = len(canned.request_body(size=PROMPT_BYTES[body]))
                rows.append(
                    [
                        LABELS[name],
                        body,
                        _number(whole.larger_body(name, body), 3),
                        f"{per_s:,.0f}",
                        f"{per_s * size / 1e6:,.0f}",
                        f"{median(run.proxy_us for run in runs):,.0f}",
                        f"{max(run.peak_mb for run in runs):,.0f}",
                        f"{sum(run.failures for run in runs)}",
                    ]
                )
    return table(header, rows) if rows else _NOT_MEASURED


def streams(results: Results) -> str:
    """Show streams, direct and through Tallygate."""
    header = [
        "streams x events/s", "", "longer", "mean s", "p99 s", "longest s", "of a core",
        "CPU µs an event", "PostgreSQL µs a stream", "peak MB", "failed",
    ]  # fmt: skip
    rows = [
        _stream_row(results, pace, name)
        for pace in figures.paces(results.streams)
        for name in _STREAM_LABELS
    ]
    return table(header, rows) if rows else _NOT_MEASURED


def _stream_row(results: Results, pace: Pace, name: str) -> list[str]:
    runs: Sequence[Streams] = figures.at_pace(results.streams, name, pace)
    longer = figures.longer_percent(results.streams, pace) if name == METERED else None
    postgres = [run.postgres_us_per_stream for run in runs if run.postgres_us_per_stream]
    return [
        f"{pace.streams:,} x {pace.events_per_s}",
        _STREAM_LABELS[name],
        "" if longer is None else f"{longer:.1f}%",
        f"{median(run.mean_s for run in runs):.3f}",
        f"{median(run.p99_s for run in runs):.3f}",
        f"{max(run.max_s for run in runs):.3f}",
        f"{median(map(figures.core_percent, runs)):.0f}%",
        f"{median(run.proxy_s / run.events for run in runs) * 1e6:.0f}",
        f"{median(postgres):.0f}" if postgres else "",
        f"{max(run.peak_mb for run in runs):.0f}",
        f"{figures.failed(runs)}",
    ]


def first_byte(results: Results) -> str:
    """Show when the first event of a stream is there."""
    rows: list[list[str]] = []
    for name, label in _STREAM_LABELS.items():
        runs = [run for run in results.first_byte if run.contender == name]
        if runs:
            middle = median(run.p50_ms for run in runs)
            rows.append([label, f"{middle:.2f}", f"{median(run.p99_ms for run in runs):.2f}"])
    return table(["first event of a stream", "median ms", "p99 ms"], rows)


def flood(results: Results) -> str:
    """Show streams without a pace."""
    header = [
        "", "events", "events/s", "MB/s", "CPU µs an event", "peak MB", "failed"
    ]  # fmt: skip
    size = len(canned.content_event())
    rows: list[list[str]] = []
    for name, label in _STREAM_LABELS.items():
        runs = [run for run in results.flood if run.contender == name]
        if not runs:
            continue
        per_s = median(run.events / run.longest_s for run in runs)
        rows.append(
            [
                f"{runs[0].streams} streams, {label}",
                f"{runs[0].events:,}",
                f"{per_s:,.0f}",
                f"{per_s * size / 1e6:,.0f}",
                f"{median(run.proxy_us_per_event for run in runs):.1f}",
                f"{max(run.peak_mb for run in runs):.0f}",
                f"{figures.failed(runs)}",
            ]
        )
    return table(header, rows) if rows else _NOT_MEASURED


def stalled(results: Results) -> str:
    """Say what streams take whose clients take nothing."""
    found = results.stalled
    if found is None:
        return _NOT_MEASURED
    return (
        f"{found.streams} clients asked for a flood of {found.stream_mb:.0f} MB each and took "
        f"nothing for {found.seconds:.0f} s. In that time the source got rid of "
        f"{found.sent_mb:.1f} MB of each, the buffers of the kernel on both sides included, and "
        f"Tallygate's memory grew by {found.grown_mb:.0f} MB. Then they took all of it: "
        f"{found.whole} of {found.streams} came whole."
    )


def start(results: Results) -> str:
    """Show starting, doing nothing, and lying on a disk."""
    found = results.start
    if found is None:
        return _NOT_MEASURED
    rows = [
        ("`tallygate serve` ready after", f"{median(found.ready_s):.2f} s"),
        ("memory of an idle worker (RSS)", f"{found.idle_mb:.0f} MB"),
        ("site-packages, as pip leaves them", _megabytes(found.installed_mb)),
        ("the same without bytecode", _megabytes(found.installed_without_bytecode_mb)),
    ]
    return facts(dict(rows))


def ledger(results: Results) -> str:
    """Show what the ledger's functions do, called by nobody else."""
    if not results.ledger:
        return _NOT_MEASURED
    header = [
        "accounts", "connections", "batch", "holds/s", "a call, ms", "settlements/s", "a call, ms",
        "PostgreSQL µs",
    ]  # fmt: skip
    rows = [
        [
            f"{load.accounts:,}",
            f"{load.lanes}",
            f"{load.batch}",
            f"{load.holds_per_s:,.0f}",
            f"{load.hold_call_ms:.2f}",
            f"{load.settlements_per_s:,.0f}",
            f"{load.settlement_call_ms:.2f}",
            f"{load.postgres_us:.0f}",
        ]
        for load in results.ledger
    ]
    return f"{table(header, rows)}\n\n{_full(results)}"


def _full(results: Results) -> str:
    lines: list[str] = []
    for accounts in sorted({load.accounts for load in results.ledger}):
        best = max(
            (load for load in results.ledger if load.accounts == accounts),
            key=lambda load: load.holds_per_s,
        )
        full = figures.full_batch(results.ledger, accounts, 1)
        assert full is not None
        whose = "one account" if accounts == 1 else f"{accounts:,} accounts"
        lines.append(
            f"- On {whose} a connection's batches are full at {full.batch}: nine tenths of what "
            f"larger ones reach. The most is {best.holds_per_s:,.0f} holds a second, with "
            f"{best.lanes} connection{'s' * (best.lanes > 1)} and batches of {best.batch}."
        )
    return "\n".join(lines)


def booked(results: Results) -> str:
    """Show what the ledger has of all that was measured."""
    total = results.booked
    return facts(
        {
            "answers that the load generators counted": f"{total.answered:,}",
            "requests billed, or recorded under the customer's own key": (
                f"{total.billed + total.byok:,}"
            ),
            "of those under the customer's own key": f"{total.byok:,}",
            "void or waiting for review": f"{total.other:,}",
            "holds left open": f"{total.held:,}",
            "rows in which `tallygate audit` finds fault": f"{total.broken:,}",
        }
    )


def measured(groups: Mapping[str, Measured]) -> str:
    """Show when each group was measured, and how quiet the machine was."""
    header = ["group", "at", "rounds", "s a run", "took", "load before", "stolen"]
    rows = [
        [
            f"`{name}`",
            group.at.replace("T", " ").removesuffix("+00:00"),
            f"{group.rounds}",
            f"{group.seconds or ''}",
            f"{group.took_s:.0f} s",
            f"{group.load:.2f}",
            f"{group.stolen_percent:.1f}%",
        ]
        for name, group in groups.items()
    ]
    return table(header, rows)


def facts(told: Mapping[str, str]) -> str:
    """Show names and what belongs to them."""
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in told.items())]
    )


def tables(results: Results) -> dict[str, str]:
    """Return every table, by its name in the page's template."""
    whole = Whole(results.whole)
    connections = whole.connections()
    left_out = [f"{LABELS[name]} took no part: {why}." for name, why in results.left_out.items()]
    return {
        "targets": target_table(results),
        "whole": "\n\n".join([*(whole_answers(whole, count) for count in connections), *left_out])
        or _NOT_MEASURED,
        "added": added(whole) if connections else _NOT_MEASURED,
        "workers": workers(whole),
        "bodies": bodies(Whole(results.bodies)),
        "streaming": streams(results),
        "first_byte": first_byte(results) if results.first_byte else _NOT_MEASURED,
        "flood": flood(results),
        "stalled": stalled(results),
        "start": start(results),
        "load": ledger(results),
        "booked": booked(results),
    }


def page(results: Results) -> str:
    """Return docs/benchmarks.md."""
    minutes = sum(group.took_s for group in results.measured.values()) / 60
    return _PAGE.substitute(
        tables(results),
        measured=measured(results.measured),
        machine=facts(results.machine),
        versions=", ".join(f"{name} {number}" for name, number in results.versions.items()),
        cores=results.machine.get("cores", "few"),
        minutes=f"{max(1, round(minutes))}",
        prompt_bytes=len(canned.request_body()),
        answer_bytes=len(canned.answer()),
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


def _postgres(runs: Sequence[WholeAnswers]) -> str:
    """Return PostgreSQL's time for a request, and its share of what it and the proxy take."""
    used = [run.postgres_us for run in runs if run.postgres_us is not None]
    if not used:
        return ""
    shares = [
        run.postgres_us / (run.postgres_us + run.proxy_us)
        for run in runs
        if run.postgres_us is not None and run.postgres_us + run.proxy_us > 0
    ]
    return f"{median(used):.0f} ({median(shares or [0]):.0%})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _megabytes(value: float | None) -> str:
    return "not measured: no package registry" if value is None else f"{value:.1f} MB"


def _batches(rounds: Iterable[Mapping[str, float] | None]) -> str:
    """Return the mean size of a call of the ledger, by call, over the rounds."""
    sizes: dict[str, list[float]] = {}
    for batches in rounds:
        for call, size in (batches or {}).items():
            sizes.setdefault(call, []).append(size)
    return ", ".join(f"{call} {mean(found):.1f}" for call, found in sorted(sizes.items()))
