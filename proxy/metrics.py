"""Every metric, declared once.

No label holds an account or a key: their number is unbounded and they are nobody's business. A
`model` label is a name from the catalog or "unknown". With several workers each process writes
its own files in PROMETHEUS_MULTIPROC_DIR, and a scrape of any of them sums up all.
"""

import asyncio
from bisect import bisect_left
from collections import Counter as Tally
from collections import defaultdict
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

REQUESTS = Counter("tallygate_requests", "Requests by outcome", ["endpoint", "model", "status"])
REQUEST_SECONDS = Histogram(
    "tallygate_request_seconds",
    "From the request's first byte to its answer's last",
    ["endpoint", "model", "status"],
    buckets=_LATENCY,
)
FIRST_BYTE_SECONDS = Histogram(
    "tallygate_first_byte_seconds",
    "From the request's first byte to its answer's first",
    ["endpoint", "model"],
    buckets=_LATENCY,
)
BATCH_SIZE = Histogram(
    "tallygate_batch_size",
    "Items in one call of the ledger",
    ["call"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
LEDGER_SECONDS = Histogram(
    "tallygate_ledger_seconds",
    "One call of the ledger, commit included",
    ["call"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
)
SETTLEMENTS = Counter("tallygate_settlements", "Settlements by what the ledger said", ["outcome"])
SETTLEMENTS_SPOOLED = Counter(
    "tallygate_settlements_spooled", "Settlements that went to the local spool"
)
SETTLEMENTS_REJECTED = Counter(
    "tallygate_settlements_rejected",
    "Settlements that the database refused and that were set aside; each needs a human",
)
UPSTREAM_ERRORS = Counter("tallygate_upstream_errors", "Failures of LiteLLM or beyond", ["code"])
REVIEWS = Counter("tallygate_reviews", "Requests put up for review", ["reason"])
REVIEWS_RESOLVED = Counter(
    "tallygate_reviews_resolved", "Requests that an operator has decided on", ["decision"]
)
COST_MISMATCHES = Counter(
    "tallygate_cost_mismatches",
    "Requests whose reported cost is not what our own rating says",
    ["endpoint", "model"],
)
WITNESS_REPORTS = Counter(
    "tallygate_witness_reports", "Reports from inside LiteLLM by what came of them", ["outcome"]
)
FAILED_ATTEMPTS = Counter(
    "tallygate_failed_attempts", "Times that LiteLLM asked a provider in vain", ["model"]
)
FAILED_ATTEMPT_COST_USD = Counter(
    "tallygate_failed_attempt_cost_usd",
    "What LiteLLM says that providers took for what no customer got, in US dollars",
    ["model"],
)
# Money is exact in the ledger; these are floats for graphs.
SOLD_USD = Counter("tallygate_sold_usd", "What customers were charged, in US dollars")
SOLD_CREDITS = Counter("tallygate_sold_credits", "What customers were charged, in credits")
PROVIDER_COST_USD = Counter(
    "tallygate_provider_cost_usd", "What providers charged for it, in US dollars"
)
MARGIN_USD = Gauge(
    "tallygate_margin_usd", "Sold less provider cost, in US dollars", multiprocess_mode="sum"
)
OVERDRAFT_USD = Counter(
    "tallygate_overdraft_usd", "Charges beyond what was available, in US dollars"
)
IN_FLIGHT = Gauge(
    "tallygate_requests_in_flight", "Requests being relayed", multiprocess_mode="livesum"
)
HOLDS_EXPIRED = Counter("tallygate_holds_expired", "Holds that the sweeper gave up on")
WEBHOOK_ATTEMPTS = Counter(
    "tallygate_webhook_attempts", "Attempts to deliver a webhook by what came of them", ["outcome"]
)
REPLAYS = Counter("tallygate_replays", "Answers given again, uncharged", ["store"])
REPLAY_STORE_BYTES = Gauge(
    "tallygate_replay_store_bytes",
    "Memory that keeps answers for SDKs' own retries",
    multiprocess_mode="livesum",
)


class RequestObserver:
    """Counts requests and their seconds, and writes them into the metrics some at a time.

    Each touch of a metric that processes share takes microseconds, and a request has four. What a
    scrape of another worker does not see yet is a quarter of a second of them.
    """

    _FLUSH_S = 0.25

    def __init__(self) -> None:
        self._in_flight = 0
        # By endpoint, model and status: how many there were of each bucket, and their seconds.
        self._buckets: dict[tuple[str, str, str], Tally[int]] = {}
        self._seconds = defaultdict[tuple[str, str, str], float](float)
        # The loop on which the next flush is due.
        self._due_on: asyncio.AbstractEventLoop | None = None

    def begin(self) -> None:
        """A request has come; from within the event loop."""
        self._in_flight += 1
        self._flush_soon()

    def end(self, endpoint: str, model: str, status: int, seconds: float) -> None:
        """A request that began has ended."""
        self._in_flight -= 1
        labels = (endpoint, model, str(status))
        buckets = self._buckets.get(labels)
        if buckets is None:
            buckets = self._buckets[labels] = Tally()
        buckets[bisect_left(_LATENCY, seconds)] += 1
        self._seconds[labels] += seconds
        self._flush_soon()

    def _flush_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._due_on is not loop:
            self._due_on = loop
            loop.call_later(self._FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what was counted."""
        self._due_on = None
        IN_FLIGHT.inc(self._in_flight)
        self._in_flight = 0
        for labels, buckets in self._buckets.items():
            REQUESTS.labels(*labels).inc(buckets.total())
            # The library has no way to observe many at once.
            histogram: Any = REQUEST_SECONDS.labels(*labels)
            histogram._sum.inc(self._seconds[labels])  # noqa: SLF001
            for number, count in buckets.items():
                histogram._buckets[number].inc(count)  # noqa: SLF001
        self._buckets.clear()
        self._seconds.clear()


OBSERVER = RequestObserver()

# What a scrape reads from PostgreSQL and the spool, the same in every process: nobody counts it.
SCRAPED_GAUGES = {
    "tallygate_catalog_age_seconds": "Since LiteLLM last told its models and prices",
    "tallygate_postgresql_up": "Whether PostgreSQL answered this scrape",
    "tallygate_holds_open": "Holds that have not ended",
    "tallygate_reserved_usd": "What they set aside, in US dollars",
    "tallygate_review_queue": "Requests that wait for an operator's review",
    "tallygate_review_oldest_seconds": "Age of the request that has waited longest",
    "tallygate_reviews_waiting": "Requests that wait for an operator's review, by reason",
    "tallygate_reconciliation_drift_usd": "What a provider's account says less what ours does",
    "tallygate_reconciliation_age_seconds": "Since a provider's account was last compared",
    "tallygate_reconciliation_within": "Whether nothing in it was beyond the tolerance",
    "tallygate_misplaced_rows": "Rows that fit no month's partition, counted up to 10,000",
    "tallygate_audit_last_clean_timestamp_seconds": "When an audit found nothing; 0: never",
    "tallygate_audit_findings": "Violations that the newest audit found",
    "tallygate_webhooks_pending": "Webhooks that wait for a receiver, or for their turn",
    "tallygate_webhooks_oldest_seconds": "Since the one that has waited longest was queued",
    "tallygate_webhooks_failed": "Webhooks that nobody took in time, and that are not forgotten",
    "tallygate_spool_bytes": "Settlements on this machine's disk that wait for PostgreSQL",
    "tallygate_settlements_rejected_waiting": "Settlements that wait for a human",
}
