"""The benchmark's children: started, waited for, timed, and ended by their pid."""

import os
import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.support.service import ROOT

START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """The benchmark can't go on; the text is for whoever started it."""


@contextmanager
def running(command: Sequence[str], *, log: Path, ready_url: str) -> Generator[int]:
    """Run a server for as long as the context lasts; yields its pid once it answers."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            # A Ctrl-C is for us: we end the others, in order.
            start_new_session=True,
        )
    try:
        _wait(process, log, ready_url)
        yield process.pid
    finally:
        end(process)


def _wait(process: subprocess.Popen[bytes], log: Path, url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            httpx.get(url, timeout=1, trust_env=False)
            return
        time.sleep(0.05)
    raise BenchError(f"{process.args} did not start:\n{log.read_text()[-2000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with SIGTERM, and with SIGKILL if it does not listen."""
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def cpu_seconds(pid: int) -> float:
    """Return what a process and its descendants, ended ones included, have used so far."""
    return sum(cpu_by_process(pid).values())


def cpu_by_process(pid: int) -> dict[int, float]:
    """Return what a process and each of its descendants have used so far, in seconds."""
    used: dict[int, float] = {}
    for one in (pid, *_descendants(pid)):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name, in brackets, may hold blanks: count from its end.
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            # User and system time, its own and that of the children it has waited for.
            used[one] = sum(int(field) for field in fields[11:15]) / _TICKS_PER_S
    return used


def forget_peak(pid: int) -> None:
    """Begin to measure the most memory of a process and its descendants anew."""
    for one in (pid, *_descendants(pid)):
        # nginx's worker is somebody else's, where its master is root's.
        with suppress(OSError):
            Path(f"/proc/{one}/clear_refs").write_text("5")


def peak_mb(pid: int) -> float:
    """Return the most memory that a process and its descendants had since then, in megabytes."""
    return sum(_memory_mb(one, "VmHWM") for one in (pid, *_descendants(pid)))


def resident_mb(pid: int) -> float:
    """Return the memory that one process has now, in megabytes."""
    return _memory_mb(pid, "VmRSS")


def _memory_mb(pid: int, name: str) -> float:
    with suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in task.read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
