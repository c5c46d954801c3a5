"""What reports of the witness do to requests: filled in, doubted, counted, and each once."""

import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID, uuid4

import psycopg
import pytest
from prometheus_client import REGISTRY

from proxy.catalog import Catalog
from proxy.control import LiteLLMControl
from proxy.db import Session, make_pool
from proxy.ids import uuid7
from proxy.ledger import Ledger
from proxy.metering import MeteringPolicy
from proxy.price_books import PriceBooks
from proxy.reports import Reports
from proxy.settlement import Settler
from proxy.spool import Spool
from proxy.witness import Report, WitnessReports
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.litellm_models import IMAGE, MODELS

pytestmark = pytest.mark.anyio

Request = dict[str, object]
BOOK: dict[str, object] = {"default": {"kind": "markup", "factor": "2.0"}}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}
# Of "priced": ten tokens in and five out, in USD, and as picos.
COST, PICOS = "6e-05", 60_000_000
# Twice the cost, in nano-USD.
PRICE = 120_000


@dataclass
class Bench:
    """The witness's desk on a real ledger."""

    money: Money
    witness: WitnessReports
    outcomes: dict[str, float] = field(default_factory=dict[str, float])

    def report(self, request: Request, **changes: Any) -> Report:
        values: dict[str, Any] = {
            "call_id": UUID(str(request["request_id"])),
            "account_id": UUID(str(request["account_id"])),
            "outcome": "success",
            "attempt": uuid4().hex,
            "cost": COST,
            "usage": USAGE,
            "model": "priced",
        }
        return Report(**(values | changes))

    async def tell(self, *reports: Report, after_s: float = 0) -> list[str]:
        """Have reports worked off at once; returns the outcomes that were counted."""
        before = _outcomes()
        self.witness.take(reports)
        await self.witness.work_off(time.monotonic() + after_s)
        after = _outcomes()
        return sorted(
            name for name, count in after.items() for _ in range(int(count - before.get(name, 0)))
        )

    def hold(self, **changes: object) -> Request:
        return self.money.hold(1_000_000, **{"model": "priced"} | changes)

    def review(self, reason: str, **changes: object) -> Request:
        """A request that ended uncharged, for this reason."""
        request = self.hold(**changes)
        review = void(request, status="needs_review", review_reason=reason)
        assert self.money.settle(review) == ["voided"]
        return request

    def billed(self, picos: int = PICOS, **changes: object) -> Request:
        request = self.hold()
        self.money.settle(capture(request, 2 * picos // 1000, cost_picos=picos, **changes))
        return request

    def row(self, request: Request) -> dict[str, Any]:
        return self.money.usage(request)


def _outcomes() -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for metric in REGISTRY.collect()
        if metric.name == "tallygate_witness_reports"
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


def metric(name: LiteralString, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0


MakeBench = Callable[..., Any]


@pytest.fixture
async def make_bench(
    account: NewAccount, database_url: str, tmp_path: Path
) -> AsyncIterator[MakeBench]:
    money = account(funds=10**9)
    pool = make_pool(database_url)
    await pool.open()
    ledger, lane = Ledger(database_url, pool), Session(database_url, timeout_s=5)
    settler = Settler(
        [lane],
        Session(database_url, timeout_s=5),
        Spool(tmp_path / "spool"),
        nanos_per_credit=1_000_000,
    )
    cache = tmp_path / "catalog.json"
    rows = [{"model_name": name, "model_info": info} for name, info in MODELS.items()]
    rows += [
        {"model_name": "twice", "model_info": {**MODELS[name], "id": name}}
        for name in ("priced", "dear")
    ]
    cache.write_text(json.dumps(rows))
    control = LiteLLMControl("http://litellm.invalid", "")
    catalog = Catalog(control, cache, free_models=["free"])
    catalog.load_cache()

    async def make(book: dict[str, object] | None = None, **options: Any) -> Bench:
        publish = "SELECT publish_price_book(%s, 1000000, %s, 'test')"
        money.one(publish, json.dumps(book or BOOK), uuid7())
        policy = MeteringPolicy(
            charge_incomplete=options.pop("charge_incomplete", False), cost_tolerance_ppm=10_000
        )
        prices = PriceBooks(pool)
        await prices.refresh()
        witness = WitnessReports(
            reports=Reports(pool),
            ledger=ledger,
            settler=settler,
            price_books=prices,
            catalog=catalog,
            policy=policy,
            **{"delay_s": 0, **options},
        )
        return Bench(money, witness)

    yield make
    await settler.drain()
    await ledger.close()
    await lane.close()
    await control.close()
    await pool.close()


@pytest.mark.parametrize(
    "reason", ["client_gone", "usage_missing", "price_missing", "price_unknown"]
)
async def test_cost_that_nobody_else_knew_is_charged(make_bench: MakeBench, reason: str) -> None:
    bench = await make_bench()
    request = bench.review(reason)
    assert await bench.tell(bench.report(request)) == ["charged"]
    row = bench.row(request)
    assert (row["status"], row["price"], row["review_reason"]) == ("billed", PRICE, None)
    assert (row["cost_picos"], row["cost_source"], row["rated_picos"]) == (PICOS, "witness", PICOS)
    assert (row["input_tokens"], row["output_tokens"], row["images"]) == (10, 5, 0)
    assert (row["witness_picos"], row["attempts"], row["markup_ppm"]) == (PICOS, 1, 2_000_000)
    assert row["model_answered"] == "priced"
    assert bench.money.balance() == (10**9 - PRICE, 0, 0)


@pytest.mark.parametrize(
    "reason", ["stream_cut", "orphaned", "litellm_cache_hit", "cost_incomplete", "another"]
)
async def test_what_is_the_operators_decision_is_noted_and_not_charged(
    make_bench: MakeBench, reason: str
) -> None:
    bench = await make_bench()
    request = bench.review(reason)
    assert await bench.tell(bench.report(request)) == ["noted"]
    row = bench.row(request)
    assert (row["status"], row["review_reason"]) == ("needs_review", reason)
    assert (row["witness_picos"], row["attempts"], row["cost_picos"]) == (PICOS, 1, None)
    assert bench.money.balance() == (10**9, 0, 0)


async def test_what_an_operator_has_resolved_is_only_noted(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.review("usage_missing")
    bench.money.connection.execute("UPDATE usage SET resolved_at = now()")
    assert await bench.tell(bench.report(request)) == ["noted"]
    row = bench.row(request)
    assert (row["status"], row["witness_picos"]) == ("needs_review", PICOS)


async def test_an_orphan_is_charged_where_cut_streams_are(make_bench: MakeBench) -> None:
    bench = await make_bench(charge_incomplete=True)
    orphan = bench.hold(ttl_s=0)
    bench.money.one("SELECT expire_holds(10, 0)")
    cut = bench.review("stream_cut")
    assert await bench.tell(bench.report(orphan), bench.report(cut)) == ["charged", "noted"]
    assert bench.row(orphan)["price"] == PRICE


async def test_a_failure_charges_nobody(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.review("client_gone")
    assert await bench.tell(bench.report(request, outcome="failure")) == ["noted"]
    assert bench.row(request)["status"] == "needs_review"


async def test_zero_is_no_cost_and_usage_is_rated_instead(make_bench: MakeBench) -> None:
    bench = await make_bench()
    rated, unpriced = bench.review("usage_missing"), bench.review("client_gone", model="unpriced")
    free, silent = bench.review("usage_missing", model="free"), bench.review("usage_missing")
    outcomes = await bench.tell(
        bench.report(rated, cost="0.0"),
        bench.report(unpriced, cost="0.0"),
        bench.report(free, cost=None),
        bench.report(silent, cost="0.0", usage=None),
    )
    assert outcomes == ["charged", "charged", "noted", "noted"]
    assert [bench.row(request)["price"] for request in (rated, unpriced, free, silent)] == [
        PRICE,
        None,
        0,
        None,
    ]
    assert bench.row(unpriced)["witness_picos"] is None


async def test_margin_of_litellm_is_nobodys_cost(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request, charged = bench.review("usage_missing"), bench.billed()
    with_margin = {"cost": "0.00007", "margin": "0.00001"}
    assert await bench.tell(
        bench.report(request, **with_margin), bench.report(charged, **with_margin)
    ) == ["agreed", "charged"]
    assert bench.row(request)["cost_picos"] == PICOS


async def test_charge_is_by_the_price_book_that_the_request_was_admitted_under(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench()
    old = bench.review("usage_missing")
    dearer: dict[str, object] = {
        "default": {"kind": "markup", "factor": "3.0"},
        "rules": [{"tier": "gold", "kind": "markup", "factor": "5.0"}],
    }
    bench = await make_bench(dearer)
    new = bench.review("usage_missing", price_version=2)
    gold = bench.review("usage_missing", price_version=2, tier="gold")
    never = bench.review("usage_missing", price_version=9)
    reports = [bench.report(request) for request in (old, new, gold, never)]
    assert await bench.tell(*reports) == ["charged", "charged", "charged", "noted"]
    assert [bench.row(request)["price"] for request in (old, new, gold, never)] == [
        PRICE,
        180_000,
        300_000,
        None,
    ]


async def test_rule_that_prices_tokens_is_charged_by_the_tokens_of_the_witness(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench(
        {"default": {"kind": "per_token", "credits": {"input": "10", "output": "20"}}}
    )
    with_usage, without = bench.review("usage_missing"), bench.review("usage_missing")
    outcomes = await bench.tell(bench.report(with_usage), bench.report(without, usage=None))
    assert outcomes == ["charged", "noted"]
    assert bench.row(with_usage)["price"] == (10 * 10 + 5 * 20) * 1000


async def test_usage_that_the_row_has_stays(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.hold()
    known = {"input_tokens": 7, "output_tokens": 3, "model_answered": "m-2025"}
    bench.money.settle(void(request, status="needs_review", review_reason="price_missing", **known))
    await bench.tell(bench.report(request))
    row = bench.row(request)
    assert {name: row[name] for name in known} == known
    # Seven in and three out are less than what the witness says: an operator shall look at it.
    assert (row["status"], row["review_reason"]) == ("billed", "cost_mismatch")


async def test_fee_on_the_customers_own_key_comes_late_too(make_bench: MakeBench) -> None:
    bench = await make_bench(
        {"default": {"kind": "markup", "factor": "2.0", "byok_fee_percent": "5"}}
    )
    request = bench.review("usage_missing", byok=True)
    assert await bench.tell(bench.report(request)) == ["charged"]
    row = bench.row(request)
    assert (row["status"], row["price"], row["markup_ppm"]) == ("byok", 3000, None)


async def test_pictures_are_counted_as_their_endpoint_counts_them(make_bench: MakeBench) -> None:
    bench = await make_bench()
    model = next(name for name in MODELS if name == "image-tokens")
    request = bench.review("usage_missing", endpoint="images.generations", model=model)
    usage = {"input_tokens": 10, "output_tokens": 5, "input_tokens_details": {"image_tokens": 4}}
    assert await bench.tell(bench.report(request, cost=None, usage=usage)) == ["charged"]
    row = bench.row(request)
    assert (row["image_input_tokens"], row["image_output_tokens"]) == (4, 5)
    assert MODELS[model].items() >= IMAGE.items()


async def test_cost_that_agrees_is_noted_and_one_that_does_not_is_put_up_for_review(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench()
    right, close, wrong = bench.billed(), bench.billed(), bench.billed(PICOS // 2)
    reviews = metric("tallygate_reviews_total", reason="witness_mismatch")
    assert await bench.tell(
        bench.report(right), bench.report(close, cost="6.01e-05"), bench.report(wrong)
    ) == ["agreed", "agreed", "contradicted"]
    assert [bench.row(request)["review_reason"] for request in (right, close, wrong)] == [
        None,
        None,
        "witness_mismatch",
    ]
    row = bench.row(wrong)
    assert (row["status"], row["cost_picos"], row["witness_picos"]) == (
        "billed",
        PICOS // 2,
        PICOS,
    )
    assert metric("tallygate_reviews_total", reason="witness_mismatch") == reviews + 1


async def test_guesses_contradict_nothing(make_bench: MakeBench) -> None:
    bench = await make_bench()
    estimated = bench.billed(1000, cost_source="estimated")
    untold, failed = bench.billed(), bench.billed()
    assert (
        await bench.tell(
            bench.report(estimated),
            bench.report(untold, cost="0.0"),
            # What LiteLLM makes of a stream with an error after its usage.
            bench.report(failed, outcome="failure", cost="1e-06"),
        )
        == ["noted"] * 3
    )
    assert bench.row(estimated)["review_reason"] is None
    assert bench.row(failed)["witness_picos"] is None


async def test_cheaper_deployment_is_no_contradiction_where_the_dearest_one_was_reckoned_with(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench()
    unknown, known, reported, beyond = (bench.hold(model="twice") for _ in range(4))
    dear = {"cost_picos": 20_000_000_000}
    bench.money.settle(
        capture(unknown, 1, cost_source="rated", **dear),
        capture(known, 1, cost_source="rated", **dear),
        capture(reported, 1, cost_source="header", **dear),
        capture(beyond, 1, cost_source="rated", cost_picos=1000),
    )
    assert [
        await bench.tell(bench.report(unknown)),
        await bench.tell(bench.report(known, deployment="priced")),
        await bench.tell(bench.report(reported)),
        await bench.tell(bench.report(beyond)),
    ] == [["agreed"], ["contradicted"], ["contradicted"], ["contradicted"]]


async def test_usage_is_rated_by_the_prices_of_the_deployment_that_answered(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench()
    cheap, dear = (bench.review("usage_missing", model="twice") for _ in range(2))
    await bench.tell(
        bench.report(cheap, cost=None, deployment="priced"),
        bench.report(dear, cost="6e-05", deployment="dear"),
    )
    assert (bench.row(cheap)["price"], bench.row(cheap)["review_reason"]) == (PRICE, None)
    assert (bench.row(dear)["price"], bench.row(dear)["review_reason"]) == (PRICE, "cost_mismatch")


async def test_costs_that_are_known_to_be_wrong_say_nothing(make_bench: MakeBench) -> None:
    bench = await make_bench()
    # Of speech that is sold by the token LiteLLM leaves out the sound.
    speech = {"endpoint": "audio.speech", "model": "speech-tokens"}
    spoken, unknown = bench.hold(**speech), bench.review("price_missing", **speech)
    # Of a transcription it measures the customer's file.
    heard = bench.hold(endpoint="audio.transcriptions", model="transcribe")
    bench.money.settle(
        capture(spoken, 1, cost_source="rated", cost_picos=5 * PICOS),
        capture(heard, 1, cost_source="rated", cost_picos=5 * PICOS),
    )
    reports = [bench.report(request, usage=None) for request in (spoken, unknown, heard)]
    assert await bench.tell(*reports) == ["noted"] * 3
    told = [bench.row(request)["witness_picos"] for request in (spoken, unknown, heard)]
    assert told == [None, None, PICOS]
    assert bench.row(unknown)["status"] == "needs_review"


async def test_void_that_cost_something_is_counted(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.hold()
    bench.money.settle(void(request))
    cost = metric("tallygate_failed_attempt_cost_usd_total", model="priced")
    failed = metric("tallygate_failed_attempts_total", model="priced")
    assert await bench.tell(bench.report(request)) == ["noted"]
    assert bench.row(request)["witness_picos"] == PICOS
    assert bench.money.balance() == (10**9, 0, 0)
    assert metric("tallygate_failed_attempts_total", model="priced") == failed + 1
    assert metric("tallygate_failed_attempt_cost_usd_total", model="priced") == pytest.approx(
        cost + 6e-05
    )


async def test_failed_attempts_count_beside_the_answer(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.billed()
    cost = metric("tallygate_failed_attempt_cost_usd_total", model="priced")
    failed = metric("tallygate_failed_attempts_total", model="priced")
    assert await bench.tell(
        bench.report(request, outcome="failure", cost="1e-05", started_at=1),
        bench.report(request, attempts=3, started_at=2),
    ) == ["agreed", "agreed"]
    row = bench.row(request)
    assert (row["attempts"], row["witness_picos"], row["review_reason"]) == (3, PICOS, None)
    assert metric("tallygate_failed_attempts_total", model="priced") == failed + 2
    assert metric("tallygate_failed_attempt_cost_usd_total", model="priced") == pytest.approx(
        cost + 1e-05
    )
    # A report that comes later, such as to another worker, counts what is new in it.
    await bench.tell(bench.report(request, attempts=2), bench.report(request, attempts=1))
    assert bench.row(request)["attempts"] == 3
    assert metric("tallygate_failed_attempts_total", model="priced") == failed + 2


async def test_attempts_count_once_however_their_reports_come(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.billed()
    failed = metric("tallygate_failed_attempts_total", model="priced")
    await bench.tell(bench.report(request, outcome="failure", cost="0"))
    await bench.tell(bench.report(request, attempts=3))
    assert bench.row(request)["attempts"] == 3
    assert metric("tallygate_failed_attempts_total", model="priced") == failed + 2


async def test_of_two_attempts_that_were_answered_the_last_is_charged_and_the_other_counted(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench()
    request = bench.review("client_gone")
    cost = metric("tallygate_failed_attempt_cost_usd_total", model="priced")
    await bench.tell(
        bench.report(request, attempts=2, started_at=2),
        bench.report(request, cost="0.5", started_at=1),
    )
    assert bench.row(request)["price"] == PRICE
    assert metric("tallygate_failed_attempt_cost_usd_total", model="priced") == pytest.approx(
        cost + 0.5
    )


async def test_attempt_that_litellm_logs_twice_counts_once(make_bench: MakeBench) -> None:
    bench = await make_bench()
    request = bench.review("usage_missing")
    first = bench.report(request, attempt="a")
    assert await bench.tell(first, bench.report(request, attempt="a", cost="0.9")) == [
        "charged",
        "repeated",
    ]
    assert await bench.tell(first) == ["repeated"]
    assert bench.money.balance() == (10**9 - PRICE, 0, 0)
    # After a restart nothing is remembered, and the ledger knows it all the same.
    bench = await make_bench()
    assert await bench.tell(first) == ["agreed"]
    assert bench.money.balance() == (10**9 - PRICE, 0, 0)


async def test_report_waits_for_its_settlement(make_bench: MakeBench) -> None:
    bench = await make_bench(delay_s=2)
    request = bench.hold()
    assert await bench.tell(bench.report(request)) == []
    assert await bench.tell(after_s=3) == []
    bench.money.settle(capture(request, PRICE, cost_picos=PICOS))
    assert await bench.tell(after_s=4) == []
    assert await bench.tell(after_s=7) == ["agreed"]
    assert await bench.tell(after_s=1000) == []


async def test_report_of_a_request_that_never_ends_is_given_up(make_bench: MakeBench) -> None:
    bench = await make_bench()
    stuck = bench.hold()
    unknown = bench.money.request(1)
    assert await bench.tell(bench.report(stuck), bench.report(unknown)) == ["unmatched"]
    assert await bench.tell(after_s=800) == []
    assert await bench.tell(after_s=2000) == ["unmatched"]


async def test_reports_wait_for_postgresql(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = await make_bench()
    request = bench.hold()
    reports = bench.witness._reports  # noqa: SLF001 - the one that is away for a while

    async def away(_keys: object) -> None:
        raise psycopg.OperationalError("away")

    with monkeypatch.context() as outage:
        outage.setattr(reports, "requests", away)
        assert await bench.tell(bench.report(request)) == []
        assert await bench.tell(after_s=2000) == []
    # What the outage took is not its fault: the settlement may still be in the spool.
    assert await bench.tell(after_s=2100) == []
    bench.money.settle(capture(request, PRICE, cost_picos=PICOS))
    assert await bench.tell(after_s=2200) == ["agreed"]


async def test_rule_that_needs_no_cost_charges_nothing_without_one(make_bench: MakeBench) -> None:
    flat: dict[str, object] = {"kind": "flat", "credits": "1", "allow_loss": True}
    bench = await make_bench({"default": flat})
    request = bench.review("client_gone")
    assert await bench.tell(bench.report(request, cost=None, usage=None)) == ["noted"]
    assert bench.row(request)["status"] == "needs_review"


async def test_the_oldest_reports_are_dropped_where_there_are_too_many(
    make_bench: MakeBench,
) -> None:
    bench = await make_bench(capacity=2)
    requests = [bench.review("usage_missing") for _ in range(3)]
    reports = [bench.report(request) for request in requests]
    assert await bench.tell(*reports) == ["charged", "charged", "dropped"]
    assert bench.row(requests[0])["status"] == "needs_review"


async def test_an_ending_process_works_off_what_it_has(make_bench: MakeBench) -> None:
    bench = await make_bench(delay_s=600)
    request = bench.review("usage_missing")
    bench.witness.take([bench.report(request)])
    await bench.witness.drain()
    assert bench.row(request)["price"] == PRICE


async def test_cost_that_no_ledger_can_hold_is_none(make_bench: MakeBench) -> None:
    bench = await make_bench()
    requests = [bench.review("usage_missing") for _ in range(4)]
    costs = ["nan", "1e30", "-1", "inf"]
    reports = [
        bench.report(request, cost=cost, usage=None)
        for request, cost in zip(requests, costs, strict=True)
    ]
    assert await bench.tell(*reports) == ["noted"] * 4
