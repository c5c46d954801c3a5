"""Where the figures come from: the machine, its versions, and how quiet it was."""

import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psycopg

from tests.bench import portkey

_PACKAGES = (
    "tallygate",
    "uvicorn",
    "starlette",
    "uvloop",
    "httptools",
    "aiohttp",
    "msgspec",
    "psycopg",
)
_FSYNCS = 100
_PAGE = 8192


def versions(database_url: str) -> dict[str, str]:
    """Return the versions of everything that takes part."""
    with psycopg.connect(database_url) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    return {
        "Python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "LiteLLM": version("litellm"),
        "Portkey's gateway": portkey.version(),
        "PostgreSQL": "" if row is None else str(row[0]),
        "nginx": _said(["nginx", "-v"], r"nginx/(\S+)"),
        "wrk": _said(["wrk", "-v"], r"wrk (?:debian/)?(\S+)"),
    }


def machine(data_dir: Path) -> dict[str, str]:
    """Return what the machine is."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    filesystem = _said(["stat", "--file-system", "--format", "%T", str(data_dir)], r"(\S+)")
    return {
        "processor": cpu.group(1) if cpu else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 2**30:.1f} GiB",
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "disk of the database": f"{filesystem}, an fsync takes {_fsync_ms(data_dir):.2f} ms",
    }


class Quietness:
    """How much of the machine was not ours while the benchmark ran."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._before = _jiffies()

    def stolen_percent(self) -> float:
        """Return how much of the time since then other machines took."""
        spent = [after - before for before, after in zip(self._before, _jiffies(), strict=True)]
        return spent[7] / max(1, sum(spent)) * 100


def _jiffies() -> list[int]:
    """User, nice, system, idle, iowait, irq, softirq and steal time of all cores so far."""
    with Path("/proc/stat").open() as file:
        return [int(field) for field in file.readline().split()[1:9]]


def _fsync_ms(directory: Path) -> float:
    """Time the write that each commit waits for: a page within a file that is already there."""
    path = directory / "fsync-probe"
    path.write_bytes(bytes(_PAGE * _FSYNCS))
    took: list[float] = []
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())
        for _ in range(_FSYNCS):
            file.write(bytes(_PAGE))
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    path.unlink()
    return median(took) * 1000


def _said(command: list[str], pattern: str) -> str:
    """Return what a program says of itself; both of these say it on standard error, or fail."""
    finished = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(pattern, finished.stdout + finished.stderr)
    return found.group(1) if found else "unknown"
