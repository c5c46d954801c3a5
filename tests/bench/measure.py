"""One measurement: a load on one contender, and what the machine did meanwhile."""

from contextlib import nullcontext

import httpx

from tests.bench import canned
from tests.bench.contenders import Contender, Stage
from tests.bench.names import PROMPT_BYTES, SMALL, SPOOL
from tests.bench.processes import BenchError
from tests.bench.results import Flood, Streams, WholeAnswers
from tests.bench.services import refusing_settlements
from tests.bench.spending import spending
from tests.bench.wrk import wrk

# So many streams begin in a second, as those of real customers do not all begin at once.
_BEGIN_PER_S = 250


def check(contender: Contender, *, stream: bool) -> None:
    """Ask once, and see an answer: figures of errors are no figures."""
    body = canned.request_body(stream=stream)
    headers = {**contender.headers, "content-type": "application/json"}
    url = f"{contender.url}/v1/chat/completions"
    answer = httpx.post(url, content=body, headers=headers, timeout=30, trust_env=False)
    if answer.status_code != 200:
        raise BenchError(f"{contender.name} answers {answer.status_code}: {answer.text[:500]}")


def whole_answers(
    stage: Stage,
    contender: Contender,
    *,
    connections: int,
    seconds: int,
    number: int,
    body: str = SMALL,
) -> WholeAnswers:
    """Measure requests that are answered whole."""
    away = (
        refusing_settlements(stage.spool_database_url) if contender.name == SPOOL else nullcontext()
    )
    with away, spending(stage, contender) as spent:
        told = wrk(
            stage,
            "load.lua",
            contender,
            body=canned.request_body(size=PROMPT_BYTES[body]),
            connections=connections,
            seconds=seconds,
        )
    if not told["requests"]:
        raise BenchError(f"{contender.name} answered nothing in {seconds} s: make it more seconds")
    requests = told["requests"]
    if contender.uses_ledger:
        stage.answered += told["requests"] - told["failures"]
    return WholeAnswers(
        contender=contender.name,
        body=body,
        round=number,
        connections=connections,
        requests=told["requests"],
        failures=told["failures"],
        requests_per_s=told["requests"] / told["duration"] * 1e6,
        p50_ms=told["p50"] / 1e3,
        p90_ms=told["p90"] / 1e3,
        p99_ms=told["p99"] / 1e3,
        proxy_us=spent.proxy_s / requests * 1e6,
        busiest_us=spent.busiest_s / requests * 1e6,
        peak_mb=spent.peak_mb,
        postgres_us=None if spent.postgres_s is None else spent.postgres_s / requests * 1e6,
        batches=spent.batches,
    )


def set_pace(source: Contender, events_per_s: int, events: int) -> None:
    """Say how the streams of the source are from now on; 0 events a second: a flood."""
    url = f"{source.url}/pace/{events_per_s}/{events}"
    httpx.get(url, timeout=10, trust_env=False).raise_for_status()


def streams(
    stage: Stage,
    contender: Contender,
    *,
    count: int,
    events_per_s: int,
    seconds: int,
    number: int,
) -> Streams:
    """Measure streams that run at the same time."""
    events = events_per_s * seconds
    spread_s = max(1.0, count / _BEGIN_PER_S)
    set_pace(stage.streamed[0], events_per_s, events)
    with spending(stage, contender) as spent:
        told = wrk(
            stage,
            "streams.lua",
            contender,
            body=canned.request_body(stream=True),
            connections=count,
            # Ended when all streams have; where a proxy is overwhelmed they take much longer.
            seconds=round(spread_s + seconds * 5 + 10),
            environ={
                "BENCH_STREAMS": str(count),
                "BENCH_SPREAD_MS": str(round(spread_s * 1000)),
            },
        )
    if contender.uses_ledger:
        stage.answered += told["whole"]
    return Streams(
        contender=contender.name,
        round=number,
        streams=count,
        events_per_s=events_per_s,
        seconds=seconds,
        whole=told["whole"],
        events=count * events,
        mean_s=told["mean"] / 1e6,
        p50_s=told["p50"] / 1e6,
        p99_s=told["p99"] / 1e6,
        max_s=told["max"] / 1e6,
        proxy_s=spent.proxy_s,
        peak_mb=spent.peak_mb,
        postgres_us_per_stream=(
            None if spent.postgres_s is None else spent.postgres_s / count * 1e6
        ),
        batches=spent.batches,
    )


def flood(stage: Stage, contender: Contender, *, count: int, events: int, number: int) -> Flood:
    """Measure streams that come as fast as they are taken."""
    set_pace(stage.streamed[0], 0, events)
    with spending(stage, contender) as spent:
        told = wrk(
            stage,
            "streams.lua",
            contender,
            body=canned.request_body(stream=True),
            connections=count,
            seconds=60,
            environ={"BENCH_STREAMS": str(count), "BENCH_SPREAD_MS": "0"},
        )
    if contender.uses_ledger:
        stage.answered += told["whole"]
    return Flood(
        contender=contender.name,
        round=number,
        streams=count,
        whole=told["whole"],
        events=count * events,
        longest_s=told["max"] / 1e6,
        proxy_us_per_event=spent.proxy_s / (count * events) * 1e6,
        peak_mb=spent.peak_mb,
    )
