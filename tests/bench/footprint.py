"""Starting, doing nothing, and lying on a disk."""

import compileall
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from statistics import median

from tests.bench.contenders import Stage
from tests.bench.names import LITELLM
from tests.bench.processes import BenchError, resident_mb
from tests.bench.results import Start
from tests.bench.services import MASTER_KEY
from tests.support.service import ROOT, Service, prepare_service

_START_TIMEOUT_S = 30
# After that the background tasks have done what they do at first.
_IDLE_S = 3.0
_INSTALL_TIMEOUT_S = 180


def footprint(stage: Stage, *, starts: int) -> Start:
    """Start `tallygate serve` beside what it needs, look at it idle, and install it elsewhere."""
    ready: list[float] = []
    idle: list[float] = []
    for number in range(starts):
        home = stage.home / f"start-{number}"
        home.mkdir()
        service = prepare_service(
            home,
            database_url=stage.database_url,
            litellm_url=stage.contenders[LITELLM].url,
            litellm_key=MASTER_KEY,
        )
        with closing(service):
            ready.append(_ready_s(service))
            time.sleep(_IDLE_S)
            idle.append(resident_mb(service.pid))
    with_bytecode, without = _installed_mb(stage.home / "thin")
    return Start(
        ready_s=ready,
        idle_mb=median(idle),
        installed_mb=with_bytecode,
        installed_without_bytecode_mb=without,
    )


def _ready_s(service: Service) -> float:
    """Start it; returns the seconds until /readyz says yes."""
    started = time.perf_counter()
    service.start(wait=False)
    while time.perf_counter() - started < _START_TIMEOUT_S:
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", service.port), 5) as connection,
        ):
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if connection.recv(4096).startswith(b"HTTP/1.1 200"):
                return time.perf_counter() - started
        time.sleep(0.01)
    raise BenchError(f"the service is not ready:\n{service.log()[-2000:]}")


def _installed_mb(directory: Path) -> tuple[float | None, float | None]:
    """Install the thin service by its lock.

    Returns the megabytes of its site-packages as pip leaves them, which compiles what it installs,
    and as they came; None twice where no registry is to be had.
    """
    lock = ROOT / "requirements-proxy.lock"
    install = ["install", "--quiet", "--no-deps", "--require-hashes", "--requirement", str(lock)]
    uv = [str(Path(sys.executable).with_name("uv")), "pip", *install]
    uv += ["--python", sys.executable, "--link-mode", "copy"]
    pip = [sys.executable, "-m", "pip", *install, "--no-compile"]
    for command in (uv, pip):
        with suppress(OSError, subprocess.TimeoutExpired):
            finished = subprocess.run(
                [*command, "--target", str(directory)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_INSTALL_TIMEOUT_S,
            )
            if finished.returncode == 0:
                break
        shutil.rmtree(directory, ignore_errors=True)
    else:
        return None, None
    for package in ("pricing", "proxy"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, directory / package, ignore=ignored)
    without = _on_disk_mb(directory)
    compileall.compile_dir(directory, quiet=2)
    with_bytecode = _on_disk_mb(directory)
    shutil.rmtree(directory)
    return with_bytecode, without


def _on_disk_mb(directory: Path) -> float:
    """Sum up blocks, as `du` does."""
    return sum(path.lstat().st_blocks for path in directory.rglob("*")) * 512 / 1e6
