"""What becomes of the reports of the witness inside LiteLLM: costs filled in, doubted, counted.

A request never waits for a report. Reports stay in memory until their request is settled, a few
seconds as a rule, and what they bring is the operator's to see (`witness_picos`, `attempts`) or
decides what nobody could decide without them:

    the request                            what the report does
    settled with a cost                    agrees, or puts it up for review (`witness_mismatch`)
    charged by an estimate of our own      is noted: two guesses contradict nothing
    a transcription that we rated          is noted: LiteLLM measures the customer's file
    void                                   is noted; a cost was the provider's for nothing
    for review, because …
      client_gone                          we stopped reading: brings the charge
      usage_missing, price_missing,        the answer was delivered whole and its cost not told:
      price_unknown                        brings the charge
      stream_cut                           is noted: whether half an answer is charged is the
                                           operator's decision, whatever it cost
      orphaned                             the same, since it was our crash that cut the answer:
                                           charged only where cut streams are
      litellm_cache_hit, cost_incomplete   is noted: LiteLLM's cost is known to be wrong there
      anything else, or decided already    is noted
    not settled yet                        waits for it, a quarter of an hour at most

A charge is the row's own: its version of the price book, its rule, its account and tier. A cost of
zero says nothing, as everywhere: LiteLLM says it of free and of unpriced models alike.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import structs

from pricing.agreement import agrees
from pricing.errors import PricingError
from pricing.money import MAX_AMOUNT, picos_from_float_text
from pricing.price_book import Markup
from pricing.rating import ModelPrices, rate
from pricing.usage import OUTPUT_CLASSES, Usage
from proxy.catalog import Catalog
from proxy.db import CONNECTION_ERRORS
from proxy.endpoints import ENDPOINTS
from proxy.ledger import Ledger, Settlement, WitnessNote
from proxy.metering import MeteringPolicy
from proxy.metrics import FAILED_ATTEMPT_COST_USD, FAILED_ATTEMPTS, REVIEWS, WITNESS_REPORTS
from proxy.price_books import PriceBooks
from proxy.recompute import charge_of, usage_of
from proxy.reports import Reports, Row
from proxy.settlement import Settler
from proxy.wire.typed_usage import usage_from_pictures, usage_from_responses, usage_from_sound
from proxy.wire.usage import usage_from_openai

log = logging.getLogger(__name__)

_CAPACITY = 10_000
_BATCH = 500
_POLL_S = 0.5
# A settlement may be this much later than its report, and as a rule is not.
_DELAY_S = 2.0
_LONGEST_DELAY_S = 60.0
# Longer than a hold lives whose proxy died.
_PATIENCE_S = 900.0
# How many attempts are remembered, so that one that LiteLLM logs twice counts once.
_REMEMBERED = 20_000
_MOST_ATTEMPTS = 100

_CHARGED_STATUSES = frozenset({"billed", "byok"})
_CHARGED = frozenset({"client_gone", "usage_missing", "price_missing", "price_unknown"})
_CHARGED_IF_CUT_IS = _CHARGED | {"orphaned"}
_ENDPOINTS = {endpoint.name: endpoint for endpoint in ENDPOINTS.values()}
_COMPARED = frozenset({"header", "stream", "rated", "witness"})

_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Number = Annotated[str, msgspec.Meta(max_length=64)]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What LiteLLM's callback tells of one attempt; `cost` and `margin` in USD as it writes them.

    `attempt` is the same where LiteLLM logs an attempt twice; `attempts` is how many it had made
    by then.
    """

    call_id: UUID
    account_id: UUID
    outcome: Literal["success", "failure"]
    attempt: Annotated[str, msgspec.Meta(max_length=64)]
    attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1
    cost: _Number | None = None
    margin: _Number | None = None
    usage: dict[str, Any] | None = None
    model: _Text | None = None
    deployment: _Text | None = None
    started_at: float | None = None

    @property
    def cost_picos(self) -> int | None:
        """What the provider took, without a margin of LiteLLM's; None where it does not say."""
        try:
            cost = picos_from_float_text(self.cost or "0")
            cost -= picos_from_float_text(self.margin or "0")
        except PricingError:
            return None
        return cost if 0 < cost <= MAX_AMOUNT else None


@dataclass(slots=True)
class _Call:
    """The reports of one request, and when it is looked at next; monotonic seconds."""

    key: tuple[UUID, UUID]
    came_at: float
    due_at: float
    reports: list[Report] = field(default_factory=list[Report])

    @property
    def answers(self) -> list[Report]:
        """The attempts that LiteLLM takes for answered, the last one first: one, as a rule."""
        answers = [report for report in self.reports if report.outcome == "success"]
        return sorted(answers, key=lambda report: report.started_at or 0, reverse=True)

    @property
    def attempts(self) -> int:
        """How often LiteLLM asked a provider."""
        return max(report.attempts for report in self.reports)

    def cost_picos(self, status: str) -> int | None:
        """What LiteLLM says a request of this status cost; None where it does not say.

        The cost of a failed attempt is not that of an answer which came all the same.
        """
        answers = self.answers
        if answers:
            return answers[0].cost_picos
        if status in _CHARGED_STATUSES:
            return None
        return max((report.cost_picos or 0 for report in self.reports), default=0) or None


class WitnessReports:
    """Takes reports and works them off beside the requests."""

    def __init__(
        self,
        *,
        reports: Reports,
        ledger: Ledger,
        settler: Settler,
        price_books: PriceBooks,
        catalog: Catalog,
        policy: MeteringPolicy,
        delay_s: float = _DELAY_S,
        patience_s: float = _PATIENCE_S,
        capacity: int = _CAPACITY,
    ) -> None:
        self._reports = reports
        self._ledger = ledger
        self._settler = settler
        self._price_books = price_books
        self._catalog = catalog
        self._policy = policy
        self._delay_s = delay_s
        self._patience_s = patience_s
        self._capacity = capacity
        self._calls: OrderedDict[tuple[UUID, UUID], _Call] = OrderedDict()
        self._seen: OrderedDict[tuple[UUID, str], None] = OrderedDict()

    def take(self, reports: Iterable[Report], *, malformed: int = 0, dropped: int = 0) -> None:
        """Queue reports; `dropped` are those that LiteLLM lost on their way."""
        now = time.monotonic()
        for report in reports:
            self._take(report, now)
        _count("malformed", malformed)
        _count("dropped", dropped)

    def _take(self, report: Report, now: float) -> None:
        attempt = (report.call_id, report.attempt)
        if attempt in self._seen:
            _count("repeated")
            return
        self._seen[attempt] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        key = (report.account_id, report.call_id)
        call = self._calls.get(key)
        if call is None:
            if len(self._calls) >= self._capacity:
                _, lost = self._calls.popitem(last=False)
                _count("dropped", len(lost.reports))
            call = self._calls[key] = _Call(key, now, now + self._delay_s)
        if len(call.reports) < _MOST_ATTEMPTS:
            call.reports.append(report)

    async def run(self) -> None:
        """Work reports off as they fall due, until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            await self.work_off(time.monotonic())

    async def drain(self) -> None:
        """Work off what is here, due or not: what waits for a settlement after this is lost."""
        await self.work_off(float("inf"))

    async def work_off(self, now: float) -> None:
        """Look at every request that is due."""
        due = [call for call in self._calls.values() if call.due_at <= now]
        for start in range(0, len(due), _BATCH):
            calls = due[start : start + _BATCH]
            for call in calls:
                # Again after as long as it has waited so far, whatever comes of this.
                pause_s = max(now - call.came_at, self._delay_s)
                call.due_at = now + min(pause_s, _LONGEST_DELAY_S)
            try:
                await self._look_at(calls, now)
            except CONNECTION_ERRORS as error:
                log.warning("reports wait for PostgreSQL", extra={"error": type(error).__name__})
                for call in calls:
                    call.came_at = now  # it has waited for nothing yet

    async def _look_at(self, calls: list[_Call], now: float) -> None:
        rows = {
            (row["account_id"], row["request_id"]): row
            for row in await self._reports.requests([call.key for call in calls])
        }
        ended: list[tuple[_Call, Row]] = []
        for call in calls:
            row = rows.get(call.key)
            if row is not None and row["status"] != "pending":
                call.reports = [self._believed(report, row) for report in call.reports]
                ended.append((call, row))
            elif row is None or now - call.came_at >= self._patience_s:
                self._forget(call, "unmatched")
        outcomes = [await self._judge(call, row) for call, row in ended]
        noted = await self._ledger.note_witness(
            [
                _note(call, row, mismatch=outcome == "contradicted")
                for (call, row), outcome in zip(ended, outcomes, strict=True)
            ]
        )
        for (call, row), outcome, is_noted in zip(ended, outcomes, noted, strict=True):
            self._forget(call, outcome if is_noted else "unmatched")
            if is_noted:
                _observe(call, row, outcome)

    def _forget(self, call: _Call, outcome: str) -> None:
        self._calls.pop(call.key, None)
        _count(outcome, len(call.reports))

    async def _judge(self, call: _Call, row: Row) -> str:
        """Do what the table above says; returns the outcome that is counted."""
        if row["status"] == "needs_review":
            charged = _CHARGED_IF_CUT_IS if self._policy.charge_incomplete else _CHARGED
            answer = next(iter(call.answers), None)
            is_open = row["resolved_at"] is None and row["review_reason"] in charged
            return await self._charge(answer, row) if is_open and answer else "noted"
        answers = [report for report in call.answers if report.cost_picos is not None]
        if row["cost_source"] not in _COMPARED or row["cost_picos"] is None or not answers:
            return "noted"
        if row["cost_source"] == "rated" and _is_measured(row):
            return "noted"
        # Where several attempts succeeded, any may be the one whose cost was charged.
        is_right = any(self._agrees(report, row) for report in answers)
        return "agreed" if is_right else "contradicted"

    def _agrees(self, report: Report, row: Row) -> bool:
        told, charged = report.cost_picos or 0, int(row["cost_picos"])
        if agrees(told, charged, self._policy.cost_tolerance_ppm):
            return True
        # Of a deployment that is not known, our own prices are the dearest of several.
        is_bound = row["cost_source"] == "rated" and not self._is_priced_exactly(report, row)
        return is_bound and told < charged

    async def _charge(self, answer: Report, row: Row) -> str:
        """Charge a request whose cost only the witness knows."""
        settlement = await self._settlement(answer, row)
        if settlement is None:
            return "noted"
        settled = await self._settler.settle(settlement)
        # Another worker, or an operator, may have been quicker.
        return "charged" if settled.outcome in {"captured_late", "spooled"} else "noted"

    async def _settlement(self, answer: Report, row: Row) -> Settlement | None:
        """Make the charge; None where the cost, or what the rule asks for, stays unknown."""
        published = await self._price_books.read(row["price_version"])
        if published is None:
            return None
        usage, counts = usage_of(row), dict[str, int]()
        if usage is None:
            usage = _usage_of_report(answer, row["endpoint"])
            counts = {} if usage is None else {n: getattr(usage, n) for n in Usage.__slots__}
        rated = self._rated(answer, row, usage)
        cost: int | None = row["cost_picos"] or answer.cost_picos or rated
        if cost is None:
            return None
        rule = published.book.select(str(row["account_id"]), row["tier"], row["model"])
        try:
            charged = charge_of(
                {**row, **counts, "cost_picos": cost}, rule, published.nanos_per_credit
            )
        except PricingError:
            return None
        terms = rule.terms
        is_doubtful = (
            rated is not None
            and self._is_priced_exactly(answer, row)
            and not agrees(cost, rated, self._policy.cost_tolerance_ppm)
        )
        settlement = Settlement(
            account_id=row["account_id"],
            request_id=row["request_id"],
            action="capture",
            status="byok" if row["byok"] else "billed",
            price=charged.price_nanos,
            rounding_attos=charged.rounding_attos,
            rule=charged.rule,
            markup_ppm=terms.factor_ppm if isinstance(terms, Markup) and not row["byok"] else None,
            model_answered=row["model_answered"] or _storable(answer.model),
            cost_picos=cost,
            cost_source="witness",
            rated_picos=rated,
            review_reason="cost_mismatch" if is_doubtful else None,
        )
        return structs.replace(settlement, **counts)

    def _believed(self, report: Report, row: Row) -> Report:
        """Take a cost away that is known to be a part of one, as metering does."""
        prices = self._prices(report, row)
        endpoint = _ENDPOINTS.get(row["endpoint"])
        is_partial = endpoint is not None and endpoint.reports_input_cost_only
        if is_partial and prices is not None and prices.dearest(OUTPUT_CLASSES, 0):
            return structs.replace(report, cost=None)
        return report

    def _rated(self, report: Report, row: Row, usage: Usage | None) -> int | None:
        prices = self._prices(report, row)
        if prices is None or usage is None:
            return None
        try:
            return rate(prices.for_service_tier(row["service_tier"]), usage)
        except PricingError:
            return None

    def _prices(self, report: Report, row: Row) -> ModelPrices | None:
        model = self._catalog.get(row["model"])
        return None if model is None else model.prices_of(report.deployment)

    def _is_priced_exactly(self, report: Report, row: Row) -> bool:
        model = self._catalog.get(row["model"])
        return model is not None and model.is_priced_exactly(report.deployment)


def _note(call: _Call, row: Row, *, mismatch: bool) -> WitnessNote:
    return WitnessNote(
        account_id=row["account_id"],
        request_id=row["request_id"],
        cost_picos=call.cost_picos(row["status"]),
        attempts=max(call.attempts, row["attempts"] or 0),
        mismatch=mismatch,
    )


def _is_measured(row: Row) -> bool:
    """Whether LiteLLM's cost is of the customer's file, so that the provider's count goes first."""
    endpoint = _ENDPOINTS.get(row["endpoint"])
    return endpoint is not None and endpoint.reports_measured_cost


def _observe(call: _Call, row: Row, outcome: str) -> None:
    """Count the attempts, and what they cost, that no customer got anything of."""
    # The report of the answer may come after that of an attempt before it.
    is_answered = row["status"] in _CHARGED_STATUSES or (
        bool(call.answers) and row["status"] != "void"
    )
    # What an earlier report of the same request has noted is counted.
    failed = call.attempts - (row["attempts"] or int(is_answered))
    if failed > 0:
        FAILED_ATTEMPTS.labels(row["model"]).inc(failed)
    answer = call.answers[0] if is_answered and call.answers else None
    wasted = sum(report.cost_picos or 0 for report in call.reports if report is not answer)
    if wasted:
        FAILED_ATTEMPT_COST_USD.labels(row["model"]).inc(wasted / 1e12)
    if outcome == "contradicted" and row["review_reason"] is None:
        REVIEWS.labels("witness_mismatch").inc()


def _count(outcome: str, number: int = 1) -> None:
    if number:
        WITNESS_REPORTS.labels(outcome).inc(number)


def _usage_of_report(report: Report, endpoint: str) -> Usage | None:
    """Read a usage in the shape that LiteLLM's callback has it for the endpoint."""
    if endpoint.startswith("images"):
        return usage_from_pictures(report.usage)
    if endpoint.startswith("audio"):
        return usage_from_sound(report.usage, None)
    return usage_from_openai(report.usage) or usage_from_responses(report.usage)


def _storable(name: str | None) -> str | None:
    return None if name is None else name.replace("\x00", "")
