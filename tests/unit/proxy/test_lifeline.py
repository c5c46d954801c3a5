"""A child ends with its supervisor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proxy.lifeline import SUPERVISOR_VARIABLE, die_with_supervisor

CHILD = """
import os, signal, sys
os.environ["TALLYGATE_SUPERVISOR_PID"] = str(os.getppid())
from proxy.lifeline import die_with_supervisor
die_with_supervisor()
print(os.getpid(), flush=True)
signal.pause()
"""
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}])
"""


def test_nothing_is_asked_where_there_is_no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUPERVISOR_VARIABLE, raising=False)
    die_with_supervisor()


def test_child_of_a_supervisor_that_is_gone_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUPERVISOR_VARIABLE, "1" if os.getppid() != 1 else "2")
    monkeypatch.setattr(sys, "platform", "test")  # this process is not to die with anybody
    with pytest.raises(SystemExit, match="gone"):
        die_with_supervisor()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_child_is_ended_with_a_killed_supervisor() -> None:
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=root
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while _runs(child):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
