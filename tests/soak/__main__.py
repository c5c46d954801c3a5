"""`make soak`: the ledger against its model for as long as you like; ends with a tally.

Each process has a database of its own and draws from a seed of its own. What is done, and how it is
compared, is tests/property/ledger_machine.py.
"""

import argparse
import multiprocessing
import secrets
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.soak.seeds import soak
from tests.soak.tally import Tally, page, sentence, together
from tests.support.postgres import Cluster
from tests.support.sections import write_section


def main() -> int:
    """Run it; 1 where PostgreSQL and the model differed anywhere."""
    arguments = _arguments()
    print(
        f"The ledger against its model for {arguments.seconds} s, on {arguments.processes} "
        f"databases, seed {arguments.seed} …",
        flush=True,
    )
    # Not below a directory that is private to root: PostgreSQL runs as somebody else.
    directory = Path(tempfile.mkdtemp(prefix="tallygate-soak-"))
    try:
        cluster = Cluster(directory)
        try:
            tally = _run(cluster, arguments)
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(directory)
    if arguments.report is not None:
        text = page(tally, seconds=arguments.seconds, seed=arguments.seed)
        write_section(arguments.report, "soak", text)
    _print(tally, arguments)
    return 0 if tally.failure is None else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="how long to try")
    parser.add_argument("--processes", type=int, default=2, help="databases tried at once")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(10**9), help="to repeat what a run did"
    )
    parser.add_argument("--report", type=Path, help="a page to write the table into")
    return parser.parse_args()


def _run(cluster: Cluster, arguments: argparse.Namespace) -> Tally:
    # Wall-clock time, which the processes share.
    until = time.time() + arguments.seconds
    urls = [cluster.clone() for _ in range(arguments.processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(urls), mp_context=context) as pool:
        running = [
            pool.submit(soak, url, arguments.seed * 1000 + number, until)
            for number, url in enumerate(urls)
        ]
        return together(one.result() for one in running)


def _print(tally: Tally, arguments: argparse.Namespace) -> None:
    print(f"\n{'function':<20} {'tried':>9} {'refused':>9}  answers")
    for function, tried, refused, told in tally.rows():
        print(f"{function:<20} {tried:>9,} {refused:>9,}  {told}")
    if tally.failure is not None:
        print(f"\n{tally.failure}", file=sys.stderr)
    print(f"\n{sentence(tally, seconds=arguments.seconds, seed=arguments.seed)}")


if __name__ == "__main__":
    sys.exit(main())
