"""A wall clock that can be stepped, for a Python process that has this directory on its path.

CHAOS_CLOCK names a file that holds an offset in seconds; it is read anew whenever it changes, so
that a clock jumps while the process lives. The monotonic clock is left alone, as it is on a machine
whose time is corrected.
"""

import os
import time
from pathlib import Path

_path = Path(os.environ.get("CHAOS_CLOCK", ""))
_time_ns = time.time_ns
_last = [0, 0]


def _offset_ns() -> int:
    try:
        changed = _path.stat().st_mtime_ns
        if changed != _last[0]:
            _last[:] = [changed, int(float(_path.read_text() or 0) * 1_000_000_000)]
    except (OSError, ValueError):
        pass
    return _last[1]


if "CHAOS_CLOCK" in os.environ:
    time.time_ns = lambda: _time_ns() + _offset_ns()
    time.time = lambda: time.time_ns() / 1_000_000_000
