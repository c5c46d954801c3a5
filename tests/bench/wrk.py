"""wrk against one contender, by one of the scripts beside this."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench.contenders import Contender, Stage
from tests.bench.processes import BenchError

_HERE = Path(__file__).parent
# In the middle of a burst a slow one needs seconds for an answer; that is a figure, no failure.
_TIMEOUT_S = 30
_OVER = "all have ended"


def wrk(
    stage: Stage,
    script: str,
    contender: Contender,
    *,
    body: bytes,
    connections: int,
    seconds: int,
    environ: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run it and return the JSON that its script prints last.

    The body goes by a file: a variable of the environment holds 128 KB.
    """
    path = stage.home / "body"
    path.write_bytes(body)
    headers = {"Content-Type": "application/json", **contender.headers}
    process = subprocess.Popen(
        [
            shutil.which("wrk") or "wrk", "--threads", "1", "--connections", str(connections),
            "--duration", f"{seconds}s", "--timeout", f"{_TIMEOUT_S}s",
            "--script", str(_HERE / script), f"{contender.url}/v1/chat/completions",
        ],
        env={
            **os.environ,
            "BENCH_BODY": str(path),
            "BENCH_KEYS": str(contender.keys or ""),
            "BENCH_HEADERS": "\n".join(f"{name}: {text}" for name, text in headers.items()),
            **(environ or {}),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith(_OVER):
                process.send_signal(signal.SIGINT)
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    try:
        return json.loads(said[-1])
    except (IndexError, ValueError):
        raise BenchError(f"wrk failed: {''.join(said)}") from None
