"""What is made once in a run of the tests, whichever of its workers needs it first."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return the path that `make` has filled in this run; other workers wait until it has."""
    base = factory.getbasetemp()
    # A worker's directory stands in the run's.
    home = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = home / name
    with FileLock(home / f"{name}.lock"):
        if not path.exists():
            fresh = home / f"{name}.new"
            make(fresh)
            fresh.rename(path)
    return path
