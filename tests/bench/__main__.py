"""`make bench`: everybody side by side in one run; prints tables and writes docs/benchmarks.*."""

import argparse
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from proxy.errors import ConfigurationError
from tests.bench import canned, measure, report
from tests.bench.contenders import Stage, stage
from tests.bench.figures import Figures
from tests.bench.ledger import ledger_facts
from tests.bench.machine import Quietness, machine, versions
from tests.bench.processes import BenchError
from tests.support.service import ROOT

TOOLS = ("wrk", "nginx")


def main() -> int:
    """Run it; 2 where it can't be run."""
    arguments = _arguments()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} not found: apt-get install wrk nginx-light")
        return 2
    if sys.platform != "linux":
        print("the benchmark reads processor times from /proc, which only Linux has")
        return 2
    # So that whatever ends us lets the children be ended too.
    signal.signal(signal.SIGTERM, _leave)
    try:
        _bench(arguments)
    except KeyboardInterrupt:
        return 130
    except (BenchError, ConfigurationError, pytest.fail.Exception) as error:
        notes: list[str] = getattr(error, "__notes__", [])
        print(error, *notes, sep="\n", file=sys.stderr)
        return 2
    return 0


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(143)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns for everybody")
    parser.add_argument("--seconds", type=int, default=4, help="length of one run")
    parser.add_argument("--connections", default="1,32,128", help="numbers to measure at")
    parser.add_argument("--streams", type=int, default=200, help="streams at once")
    parser.add_argument("--events-per-s", type=int, default=50, help="of one stream")
    parser.add_argument("--stream-seconds", type=int, default=5, help="length of one stream")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where to write")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one short round, printed and not written: does it work?",
    )
    arguments = parser.parse_args()
    arguments.connections = [int(number) for number in arguments.connections.split(",")]
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.stream_seconds = 1, 1, 2
    return arguments


def _bench(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    quietness = Quietness()
    print("Starting PostgreSQL, nginx, LiteLLM and Tallygate …", flush=True)
    with stage(
        events_per_s=arguments.events_per_s, stream_seconds=arguments.stream_seconds
    ) as running:
        warm = _warm_up(running)
        figures = Figures(_whole(running, arguments), _streams(running, arguments))
        answered = sum(
            run.requests - run.failures
            for run in (*warm, *figures.whole)
            if run.batches is not None
        ) + sum(run.whole for run in figures.streams if run.batches is not None)
        ledger = ledger_facts(running.database_url, answered=answered)
        told = {
            "ledger": ledger,
            "machine": {**machine(running.postgres.data_dir), **quietness.told()},
            "versions": versions(running.database_url),
        }
    settings = {
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "streams": arguments.streams,
        "events_per_s": arguments.events_per_s,
        "stream_seconds": arguments.stream_seconds,
        "prompt_bytes": len(canned.request_body()),
        "answer_bytes": len(canned.answer()),
        "cores": told["machine"]["cores"],
        "minutes": max(1, round((time.monotonic() - began) / 60)),
    }
    _print(figures, ledger)
    if not arguments.quick:
        text = report.page(figures, settings=settings, **told)
        (arguments.output / "benchmarks.md").write_text(text)
        raw = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
            **told,
            "targets": [{**asdict(t), "is_met": t.is_met} for t in figures.targets()],
            "whole_answers": [asdict(run) for run in figures.whole],
            "streams": [asdict(run) for run in figures.streams],
        }
        text = json.dumps(_rounded(raw), indent=2) + "\n"
        (arguments.output / "benchmarks.json").write_text(text)
        print(f"\nWritten to {arguments.output}/benchmarks.md and benchmarks.json")


def _rounded(value: object) -> object:
    """Return a document without the digits that mean nothing."""
    match value:
        case float():
            return round(value, 4)
        case dict():
            items = cast("dict[str, object]", value).items()
            return {name: _rounded(member) for name, member in items}
        case list():
            return [_rounded(member) for member in cast("list[object]", value)]
        case _:
            return value


def _warm_up(running: Stage) -> list[measure.WholeAnswers]:
    """Open connections and fill caches; what comes out counts for the ledger alone."""
    for contender in running.whole:
        measure.check(contender, stream=False)
    for contender in running.streamed:
        measure.check(contender, stream=True)
    return [
        measure.whole_answers(running, contender, connections=32, seconds=1, number=0)
        for contender in running.whole
    ]


def _whole(running: Stage, arguments: argparse.Namespace) -> list[measure.WholeAnswers]:
    measured: list[measure.WholeAnswers] = []
    for connections in arguments.connections:
        for number in range(arguments.rounds):
            # Alternating, so that nobody always comes after the same neighbour.
            for contender in running.whole[:: 1 if number % 2 == 0 else -1]:
                run = measure.whole_answers(
                    running,
                    contender,
                    connections=connections,
                    seconds=arguments.seconds,
                    number=number,
                )
                measured.append(run)
                _progress(
                    number, arguments.rounds, f"{connections:>4} connections", contender.name,
                    f"{run.requests_per_s:>8,.0f}/s  p50 {run.p50_ms:.2f} ms",
                )  # fmt: skip
    return measured


def _streams(running: Stage, arguments: argparse.Namespace) -> list[measure.Streams]:
    measured: list[measure.Streams] = []
    for number in range(arguments.rounds):
        for contender in running.streamed[:: 1 if number % 2 == 0 else -1]:
            run = measure.streams(
                running,
                contender,
                count=arguments.streams,
                events_per_s=arguments.events_per_s,
                seconds=arguments.stream_seconds,
                number=number,
            )
            measured.append(run)
            _progress(
                number, arguments.rounds, f"{arguments.streams:>4} streams", contender.name,
                f"mean {run.mean_s:.3f} s  whole {run.whole}",
            )  # fmt: skip
    return measured


def _progress(number: int, rounds: int, what: str, name: str, figures: str) -> None:
    print(f"round {number + 1}/{rounds}  {what:<16}  {name:<8}  {figures}", flush=True)


def _print(figures: Figures, ledger: dict[str, str]) -> None:
    tables = [
        report.targets(figures),
        *(report.whole_answers(figures, count) for count in figures.connections()),
        report.added(figures),
        report.streams(figures),
        report.facts(ledger),
    ]
    print("\n" + "\n\n".join(tables))


if __name__ == "__main__":
    sys.exit(main())
