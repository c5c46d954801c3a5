"""What a measurement used: processor time and memory of the proxy, PostgreSQL's, ledger calls."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.contenders import Contender, Stage
from tests.bench.processes import (
    BenchError,
    cpu_by_process,
    cpu_seconds,
    forget_peak,
    peak_mb,
)


@dataclass
class Spent:
    """What was used between two moments."""

    proxy_s: float = 0
    # By the process that used most.
    busiest_s: float = 0
    peak_mb: float = 0
    postgres_s: float | None = None
    # Call of the ledger -> mean number of requests in it.
    batches: dict[str, float] | None = None


@contextmanager
def spending(stage: Stage, contender: Contender) -> Generator[Spent]:
    """Fill in, at its end, what the time inside the context took."""
    spent = Spent()
    before = _Counters.of(stage, contender)
    forget_peak(contender.pid)
    yield spent
    spent.peak_mb = peak_mb(contender.pid)
    after = _Counters.of(stage, contender)
    used = {pid: cpu - before.cpu.get(pid, 0) for pid, cpu in after.cpu.items()}
    spent.proxy_s, spent.busiest_s = sum(used.values()), max(used.values())
    if contender.uses_ledger:
        spent.postgres_s = after.postgres_s - before.postgres_s
        spent.batches = {
            call: round((items - before.items.get(call, 0)) / calls, 2)
            for call, items in after.items.items()
            if (calls := after.calls[call] - before.calls.get(call, 0))
        }


@dataclass(frozen=True)
class _Counters:
    cpu: dict[int, float]
    postgres_s: float
    items: dict[str, float]
    calls: dict[str, float]

    @classmethod
    def of(cls, stage: Stage, contender: Contender) -> Self:
        items: dict[str, float] = {}
        calls: dict[str, float] = {}
        if contender.uses_ledger:
            answer = httpx.get(f"{contender.url}/metrics", timeout=10, trust_env=False)
            if answer.status_code != 200:
                raise BenchError(f"/metrics answers {answer.status_code}: {answer.text[:500]}")
            for family in text_string_to_metric_families(answer.text):
                for sample in family.samples:
                    if sample.name == "tallygate_batch_size_sum":
                        items[sample.labels["call"]] = sample.value
                    elif sample.name == "tallygate_batch_size_count":
                        calls[sample.labels["call"]] = sample.value
        cpu = cpu_by_process(contender.pid)
        return cls(cpu, cpu_seconds(stage.postgres_pid()), items, calls)
