"""One worker, two hundred thousand requests, and the memory that it takes meanwhile."""

import json
import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from proxy.db import migrate
from proxy.embedded.postgres import EmbeddedPostgres
from tests.bench import canned, nginx
from tests.support.service import Service, prepare_service

_SCRIPT = Path(__file__).with_name("load.lua")
_CONNECTIONS = 32
_SLICE_S = 5
# Of the requests, before memory is what it will be: caches, pools, arenas of the allocator.
_WARM = 0.2
_GROWTH_MIB = 8.0


def measure(requests: int) -> tuple[str, bool]:
    """Send so many; returns the text that tells of it, and whether memory stayed flat."""
    samples: list[tuple[int, float]] = []
    failures = 0
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="tallygate-growth-"))
        stack.callback(shutil.rmtree, home)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        postgres.start()
        stack.callback(postgres.stop)
        migrate(postgres.url())
        upstream, _ = stack.enter_context(nginx.static_upstream(home))
        (home / "service").mkdir()
        service = stack.enter_context(
            closing(
                prepare_service(
                    home / "service",
                    database_url=postgres.url(),
                    litellm_url=f"http://127.0.0.1:{upstream}",
                    litellm_key="none",
                )
            )
        )
        service.start()
        key = service.new_key(credits="10000000").key
        done = 0
        while done < requests:
            told = _slice(service, key)
            done += told["requests"]
            failures += told["failures"]
            samples.append((done, _resident_mib(service.pid)))
            print(f"{done:,} requests, {samples[-1][1]:.1f} MiB", flush=True)
    return _told(samples, failures)


def _slice(service: Service, key: str) -> dict[str, int]:
    finished = subprocess.run(
        [
            shutil.which("wrk") or "wrk", "--threads", "1", "--connections", str(_CONNECTIONS),
            "--duration", f"{_SLICE_S}s", "--timeout", "30s", "--script", str(_SCRIPT),
            f"{service.base_url}/v1/chat/completions",
        ],
        env={
            **os.environ,
            "GROWTH_BODY": canned.request_body().decode(),
            "GROWTH_KEY": key,
        },
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    return json.loads(finished.stdout.splitlines()[-1])


def _resident_mib(pid: int) -> float:
    """Return what a process has in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _told(samples: list[tuple[int, float]], failures: int) -> tuple[str, bool]:
    total = samples[-1][0]
    warm = [mib for done, mib in samples if done >= total * _WARM]
    growth = warm[-1] - warm[0]
    is_flat = growth <= _GROWTH_MIB and failures == 0
    shown = samples[:: max(1, len(samples) // 8)]
    if shown[-1] != samples[-1]:
        shown.append(samples[-1])
    rows = "\n".join(f"| {done:,} | {mib:.1f} MiB |" for done, mib in shown)
    text = (
        f"One worker, {total:,} requests, {failures} of them failed. From a fifth of them on its"
        f" memory changed by {growth:+.1f} MiB: {'flat' if is_flat else '**not flat**'}.\n\n"
        f"| requests | resident |\n| --- | --- |\n{rows}"
    )
    return text, is_flat
