"""`make bench`: everybody side by side in one run; prints tables and writes docs/benchmarks.*."""

import argparse
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from proxy.errors import ConfigurationError
from tests.bench import report, results
from tests.bench.contenders import Stage, stage
from tests.bench.groups import QUICK, THOROUGH, Plan, rounds_and_seconds, run
from tests.bench.ledger import booked, broken
from tests.bench.machine import Quietness, machine, versions
from tests.bench.names import GROUPS
from tests.bench.processes import BenchError
from tests.bench.results import Booked, Measured, Results
from tests.bench.targets import targets
from tests.support.service import ROOT

TOOLS = ("wrk", "nginx")


def main() -> int:
    """Run it; 2 where it can't be run."""
    arguments = _arguments()
    if arguments.page:
        _write(results.load(arguments.output / "benchmarks.json"), arguments.output)
        return 0
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        print(f"{' and '.join(missing)} not found: apt-get install wrk nginx-light")
        return 2
    if sys.platform != "linux":
        print("the benchmark reads processor times from /proc, which only Linux has")
        return 2
    # So that whatever ends us lets the children be ended too.
    signal.signal(signal.SIGTERM, _leave)
    # A thousand streams are two thousand sockets of the proxy.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
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
    parser.add_argument("--only", help=f"groups to repeat, of {','.join(GROUPS)}")
    parser.add_argument("--rounds", type=int, default=THOROUGH.rounds, help="turns for everybody")
    parser.add_argument("--seconds", type=int, default=THOROUGH.seconds, help="length of one run")
    parser.add_argument(
        "--body-seconds", type=int, default=THOROUGH.body_seconds, help="with other prompts"
    )
    parser.add_argument("--connections", default="1,32,128,256", help="numbers to measure at")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="where to write")
    parser.add_argument(
        "--page", action="store_true", help="measure nothing, make the page anew from the JSON"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one short round, printed and not written: does it work?",
    )
    arguments = parser.parse_args()
    arguments.groups = GROUPS if arguments.only is None else tuple(arguments.only.split(","))
    if unknown := set(arguments.groups) - set(GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}: there are {', '.join(GROUPS)}")
    return arguments


def _plan(arguments: argparse.Namespace) -> Plan:
    if arguments.quick:
        return QUICK
    return replace(
        THOROUGH,
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        body_seconds=arguments.body_seconds,
        connections=[int(number) for number in arguments.connections.split(",")],
    )


def _bench(arguments: argparse.Namespace) -> None:
    plan, groups = _plan(arguments), arguments.groups
    path = arguments.output / "benchmarks.json"
    found = Results() if arguments.quick else results.load(path)
    began = time.monotonic()
    print("Starting PostgreSQL, nginx and whoever takes part …", flush=True)
    with stage(groups, accounts=plan.accounts) as running:
        told = machine(running.postgres.data_dir)
        if found.measured and _hardware(found.machine) != _hardware(told):
            # Figures of two machines side by side would be read as one's.
            print("the figures that are there are of another machine: beginning anew")
            found = Results()
        found.machine, found.versions = told, versions(running.database_url)
        _measure(running, plan, groups, found)
    _print(found)
    print(f"\nIt took {time.monotonic() - began:.0f} s.")
    if not arguments.quick:
        _write(found, arguments.output)


def _measure(running: Stage, plan: Plan, groups: Sequence[str], found: Results) -> None:
    urls = [running.database_url, running.spool_database_url]
    before = Booked()
    for group in groups:
        started, quietness = time.monotonic(), Quietness()
        run(group, running, plan, found)
        now = booked(urls, answered=running.answered)
        rounds, seconds = rounds_and_seconds(group, plan)
        found.measured[group] = Measured(
            at=datetime.now(UTC).isoformat(timespec="minutes"),
            rounds=rounds,
            seconds=seconds,
            took_s=time.monotonic() - started,
            load=quietness.load,
            stolen_percent=quietness.stolen_percent(),
            booked=now - before,
        )
        before = now
    print("Auditing the ledger …", flush=True)
    last = found.measured[groups[-1]]
    audited = replace(last.booked, broken=broken(urls))
    found.measured[groups[-1]] = replace(last, booked=audited)


def _hardware(told: dict[str, str]) -> list[str | None]:
    return [told.get(name) for name in ("processor", "cores", "memory")]


def _write(found: Results, output: Path) -> None:
    # In the order of the groups, whichever was repeated last.
    found.measured = {name: found.measured[name] for name in GROUPS if name in found.measured}
    (output / "benchmarks.md").write_text(report.page(found))
    promised = [{**asdict(target), "is_met": target.is_met} for target in targets(found)]
    results.save(found, output / "benchmarks.json", targets=promised)
    print(f"Written to {output}/benchmarks.md and benchmarks.json")


def _print(found: Results) -> None:
    print("\n" + "\n\n".join(report.tables(found).values()))


if __name__ == "__main__":
    sys.exit(main())
