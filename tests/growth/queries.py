"""What customers and operators read, each many times over, on accounts picked at random."""

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

import psycopg

from proxy.db import make_pool
from proxy.history import ANY_USAGE, EntryFilter, History
from proxy.ledger import Ledger
from proxy.reports import Reports
from tests.growth.cpu import Cpu

_PAGE = 50
# Half of an account's requests are older than this many pages behind its newest.
_DEEP = 30


@dataclass(frozen=True)
class Read:
    """How long a query took, of so many tries; milliseconds."""

    name: str
    p50_ms: float
    p99_ms: float
    max_ms: float
    # PostgreSQL's processor time, the mean; None where that of other queries is in it.
    server_ms: float | None


async def read_all(url: str, keys: list[tuple[UUID, UUID]], *, times: int) -> list[Read]:
    """Time every query of the account API and the admin API."""
    some = random.Random(2)
    samples = _samples(url, [some.choice(keys)[0] for _ in range(times)])
    async with make_pool(url, max_size=1) as pool:
        reports, ledger, history = Reports(pool), Ledger(url, pool), History(pool)

        async def deep_usage(account: UUID, _: "_Sample") -> object:
            before = None
            for _page in range(_DEEP):
                page = await history.usage(account, ANY_USAGE, before=before, limit=_PAGE)
                if len(page.rows) < _PAGE:
                    break
                before = page.rows[-1]["request_id"]
            began = time.perf_counter()
            await history.usage(account, ANY_USAGE, before=before, limit=_PAGE)
            return time.perf_counter() - began

        queries: dict[str, Callable[[UUID, _Sample], Awaitable[object]]] = {
            "balance": lambda account, _: ledger.balance(account),
            "newest page of usage": lambda account, _: history.usage(
                account, ANY_USAGE, before=None, limit=_PAGE
            ),
            f"{_DEEP}th page of usage, or the last": deep_usage,
            "newest page of the ledger": lambda account, _: history.entries(
                account, EntryFilter(), before=None, limit=_PAGE
            ),
            "a receipt": lambda account, sample: reports.usage_row(account, sample.request_id),
            "whose a stored response is": lambda account, sample: reports.model_of_answer(
                account, sample.answer_id
            ),
            "recent output of a model": lambda account, _: reports.recent_output_tokens(
                account, "model-1"
            ),
            "the review queue, newest page": lambda _account, _: reports.reviews(
                before=None, limit=_PAGE
            ),
            "a scrape of metrics": lambda _account, _: reports.operations(),
        }
        await ledger.balance(samples[0].account_id)
        read = [await _timed(name, query, samples, Cpu(url)) for name, query in queries.items()]
        await ledger.close()
    return read


@dataclass(frozen=True)
class _Sample:
    account_id: UUID
    request_id: UUID
    answer_id: str


def _samples(url: str, accounts: list[UUID]) -> list[_Sample]:
    """Pick a request of each account somewhere in its past, and a stored response."""
    with psycopg.connect(url) as connection:
        connection.execute("SET search_path = tallygate")
        samples: list[_Sample] = []
        for account in accounts:
            row = connection.execute(
                "SELECT request_id, coalesce(answer_id, 'none') FROM usage WHERE account_id = %s"
                " AND endpoint = 'responses' ORDER BY request_id OFFSET %s LIMIT 1",
                (account, random.Random(account.int).randrange(20)),
            ).fetchone()
            request_id, answer_id = row or (account, "none")
            samples.append(_Sample(account, request_id, str(answer_id)))
    return samples


async def _timed(
    name: str,
    query: Callable[[UUID, _Sample], Awaitable[object]],
    samples: list[_Sample],
    cpu: Cpu,
) -> Read:
    took: list[float] = []
    is_alone = True
    for sample in samples:
        began = time.perf_counter()
        answer = await query(sample.account_id, sample)
        is_alone = not isinstance(answer, float)
        elapsed = answer if isinstance(answer, float) else time.perf_counter() - began
        took.append(elapsed * 1000)
    server_s, _ = cpu.taken_s()
    took.sort()
    return Read(
        name,
        *(took[len(took) // 2], took[int(len(took) * 0.99)], took[-1]),
        1000 * server_s / len(took) if is_alone else None,
    )
