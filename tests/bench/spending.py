"""What a measurement used: processor time and memory of the proxy, PostgreSQL's, ledger calls."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

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
    # Asking for metrics takes time of the proxy and PostgreSQL too: outside of what is counted.
    calls_before = _ledger_calls(contender)
    forget_peak(contender.pid)
    cpu_before, postgres_before = cpu_by_process(contender.pid), cpu_seconds(stage.postgres_pid())
    yield spent
    cpu_after, postgres_after = cpu_by_process(contender.pid), cpu_seconds(stage.postgres_pid())
    spent.peak_mb = peak_mb(contender.pid)
    used = [cpu - cpu_before.get(pid, 0) for pid, cpu in cpu_after.items()]
    spent.proxy_s, spent.busiest_s = sum(used), max(used)
    if contender.uses_ledger:
        spent.postgres_s = postgres_after - postgres_before
        spent.batches = {}
        for call, after in _ledger_calls(contender).items():
            before = calls_before.get(call, _Calls())
            if count := after.count - before.count:
                spent.batches[call] = round((after.items - before.items) / count, 2)


@dataclass
class _Calls:
    """How often the ledger was called, and for how many requests."""

    count: float = 0
    items: float = 0


def _ledger_calls(contender: Contender) -> dict[str, _Calls]:
    found: dict[str, _Calls] = {}
    if not contender.uses_ledger:
        return found
    answer = httpx.get(f"{contender.url}/metrics", timeout=10, trust_env=False)
    if answer.status_code != 200:
        raise BenchError(f"/metrics answers {answer.status_code}: {answer.text[:500]}")
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name == "tallygate_batch_size_sum":
                found.setdefault(sample.labels["call"], _Calls()).items = sample.value
            elif sample.name == "tallygate_batch_size_count":
                found.setdefault(sample.labels["call"], _Calls()).count = sample.value
    return found
