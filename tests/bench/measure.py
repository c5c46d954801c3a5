"""One measurement: wrk against one contender, and what the machine did meanwhile."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.bench import canned
from tests.bench.contenders import Contender, Stage
from tests.bench.processes import BenchError
from tests.bench.spending import spending

_HERE = Path(__file__).parent
# In the middle of a burst a slow one needs seconds for an answer; that is a figure, no failure.
_TIMEOUT_S = 30
# Streams begin spread over this time.
SPREAD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class WholeAnswers:
    """Requests one after another on each of so many connections."""

    contender: str
    round: int
    connections: int
    requests: int
    failures: int
    requests_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    proxy_us: float
    postgres_us: float
    batches: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Streams:
    """So many streams at once, each as long as its source makes it."""

    contender: str
    round: int
    streams: int
    whole: int
    events: int
    mean_s: float
    p50_s: float
    p99_s: float
    max_s: float
    proxy_us_per_event: float
    postgres_us_per_stream: float
    # Of one core, while the streams ran.
    proxy_share: float
    batches: dict[str, float] | None


def check(contender: Contender, *, stream: bool) -> None:
    """Ask once, and see an answer: figures of errors are no figures."""
    body = canned.request_body(stream=stream)
    headers = {**contender.headers, "content-type": "application/json"}
    url = f"{contender.url}/v1/chat/completions"
    answer = httpx.post(url, content=body, headers=headers, timeout=30, trust_env=False)
    if answer.status_code != 200:
        raise BenchError(f"{contender.name} answers {answer.status_code}: {answer.text[:500]}")


def whole_answers(
    stage: Stage, contender: Contender, *, connections: int, seconds: int, number: int
) -> WholeAnswers:
    """Measure requests that are answered whole."""
    with spending(stage, contender) as spent:
        told = _wrk(
            "load.lua",
            contender,
            connections=connections,
            seconds=seconds,
            environ={"BENCH_BODY": canned.request_body().decode()},
        )
    requests = max(1, told["requests"])
    return WholeAnswers(
        contender=contender.name,
        round=number,
        connections=connections,
        requests=told["requests"],
        failures=told["failures"],
        requests_per_s=told["requests"] / told["duration"] * 1e6,
        p50_ms=told["p50"] / 1e3,
        p90_ms=told["p90"] / 1e3,
        p99_ms=told["p99"] / 1e3,
        proxy_us=spent.proxy_s / requests * 1e6,
        postgres_us=spent.postgres_s / requests * 1e6,
        batches=spent.batches,
    )


def streams(
    stage: Stage,
    contender: Contender,
    *,
    count: int,
    events_per_s: int,
    seconds: float,
    number: int,
) -> Streams:
    """Measure streams that run at the same time."""
    with spending(stage, contender) as spent:
        told = _wrk(
            "streams.lua",
            contender,
            connections=count,
            # wrk stays for as long as it is told: half as long again as the streams should last.
            seconds=round(SPREAD_S + seconds * 1.5 + 2),
            environ={
                "BENCH_BODY": canned.request_body(stream=True).decode(),
                "BENCH_STREAMS": str(count),
                "BENCH_SPREAD_MS": str(round(SPREAD_S * 1000)),
            },
        )
    events = count * round(events_per_s * seconds)
    return Streams(
        contender=contender.name,
        round=number,
        streams=count,
        whole=told["whole"],
        events=events,
        mean_s=told["mean"] / 1e6,
        p50_s=told["p50"] / 1e6,
        p99_s=told["p99"] / 1e6,
        max_s=told["max"] / 1e6,
        proxy_us_per_event=spent.proxy_s / events * 1e6,
        postgres_us_per_stream=spent.postgres_s / count * 1e6,
        proxy_share=spent.proxy_s / (seconds + SPREAD_S),
        batches=spent.batches,
    )


def _wrk(
    script: str,
    contender: Contender,
    *,
    connections: int,
    seconds: int,
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Run wrk and return the JSON that its script prints last."""
    headers = {"Content-Type": "application/json", **contender.headers}
    finished = subprocess.run(
        [
            shutil.which("wrk") or "wrk", "--threads", "1", "--connections", str(connections),
            "--duration", f"{seconds}s", "--timeout", f"{_TIMEOUT_S}s",
            "--script", str(_HERE / script), f"{contender.url}/v1/chat/completions",
        ],
        env={
            **os.environ,
            **environ,
            "BENCH_HEADERS": "\n".join(f"{name}: {text}" for name, text in headers.items()),
        },
        check=False,
        capture_output=True,
        text=True,
    )  # fmt: skip
    try:
        return json.loads(finished.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise BenchError(f"wrk failed: {finished.stdout}{finished.stderr}") from None
