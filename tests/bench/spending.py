"""What a measurement used: processor time of proxy and PostgreSQL, and calls of the ledger."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.bench.contenders import Contender, Stage
from tests.bench.processes import BenchError, cpu_seconds


@dataclass
class Spent:
    """What was used between two moments."""

    proxy_s: float = 0
    postgres_s: float = 0
    # Call of the ledger -> mean number of requests in it.
    batches: dict[str, float] | None = None


@contextmanager
def spending(stage: Stage, contender: Contender) -> Generator[Spent]:
    """Fill in, at its end, what the time inside the context took."""
    spent = Spent()
    before = _Counters.of(stage, contender)
    yield spent
    after = _Counters.of(stage, contender)
    spent.proxy_s = after.proxy_s - before.proxy_s
    if contender.uses_ledger:
        spent.postgres_s = after.postgres_s - before.postgres_s
        spent.batches = {
            call: round((items - before.items.get(call, 0)) / calls, 2)
            for call, items in after.items.items()
            if (calls := after.calls[call] - before.calls.get(call, 0))
        }


@dataclass(frozen=True)
class _Counters:
    proxy_s: float
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
        return cls(cpu_seconds(contender.pid), cpu_seconds(stage.postgres_pid()), items, calls)
