"""What is said of measurements: each round with itself, every target, a page of what there is."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import figures, report, results
from tests.bench.figures import Pace, Whole
from tests.bench.names import BARE, DIRECT, LARGE, LITELLM, METERED, PORTKEY, SMALL, WORKERS
from tests.bench.results import (
    Booked,
    FirstByte,
    LedgerLoad,
    Measured,
    Results,
    Start,
    Streams,
    WholeAnswers,
)
from tests.bench.targets import targets

RUN = WholeAnswers(
    contender=METERED, body=SMALL, round=0, connections=32, requests=1000, failures=0,
    requests_per_s=1000, p50_ms=2, p90_ms=3, p99_ms=5, proxy_us=200, busiest_us=200, peak_mb=90,
    postgres_us=100, batches={"authorize": 8.0},
)  # fmt: skip
STREAMS = Streams(
    contender=METERED, round=0, streams=1000, events_per_s=20, seconds=5, whole=1000,
    events=100_000, mean_s=5.1, p50_s=5.1, p99_s=5.2, max_s=5.3, proxy_s=3, peak_mb=200,
    postgres_us_per_stream=1000, batches=None,
)  # fmt: skip


def run(contender: str, per_s: float, number: int = 0, **changes: object) -> WholeAnswers:
    changed = replace(RUN, contender=contender, round=number, requests_per_s=per_s)
    return replace(changed, **changes)


def everything() -> Results:
    whole = [
        replace(made, connections=connections)
        for connections in (1, 32, 128)
        for made in (
            run(DIRECT, 9000, p50_ms=1, p99_ms=1, postgres_us=None, batches=None),
            run(BARE, 1250, postgres_us=None, batches=None),
            run(METERED, 1000),
            run(WORKERS, 1500, busiest_us=110),
            run(PORTKEY, 100, postgres_us=None, batches=None),
            run(LITELLM, 10, postgres_us=None, batches=None),
        )
    ]
    return Results(
        machine={"cores": "2"},
        versions={"Python": "3"},
        measured={
            "whole": Measured(
                at="2000-01-01T00:00+00:00", rounds=1, seconds=1, took_s=60, load=0.5,
                stolen_percent=0, booked=Booked(answered=10, billed=12),
            )
        },
        whole=whole,
        bodies=[run(METERED, 1000), run(METERED, 700, body=LARGE)],
        streams=[STREAMS, replace(STREAMS, contender=DIRECT, mean_s=5.0, proxy_s=1)],
        first_byte=[
            FirstByte(contender=DIRECT, round=0, streams=9, p50_ms=0.1, p99_ms=1),
            FirstByte(contender=METERED, round=0, streams=9, p50_ms=1.2, p99_ms=2),
        ],
        start=Start(
            ready_s=[1.5], idle_mb=85, installed_mb=70, installed_without_bytecode_mb=55
        ),
        ledger=[
            LedgerLoad(
                accounts=1, lanes=1, batch=batch, holds_per_s=per_s, hold_call_ms=1,
                settlements_per_s=per_s, settlement_call_ms=1, postgres_us=10,
            )
            for batch, per_s in ((1, 1000), (64, 9100), (256, 10_000))
        ],
    )  # fmt: skip


def test_ratios_compare_each_round_with_itself() -> None:
    """A machine that is four times as fast in one round says nothing about the two."""
    slow_fast = [run(METERED, 100, 0), run(METERED, 400, 1), run(METERED, 100, 2)]
    others = [run(BARE, 200, 0), run(BARE, 800, 1), run(BARE, 200, 2)]
    assert Whole([*slow_fast, *others]).ratio(METERED, BARE, 32) == 0.5


def test_ratio_of_somebody_who_was_left_out_is_none() -> None:
    assert Whole([run(METERED, 100)]).ratio(METERED, PORTKEY, 32) is None


def test_two_workers_elsewhere_are_as_fast_as_the_busier_one() -> None:
    whole = Whole([run(METERED, 1000, busiest_us=200), run(WORKERS, 900, busiest_us=125)])
    assert whole.two_workers(32) == 0.9
    assert whole.two_workers_elsewhere(32) == 1.6


def test_body_is_compared_with_the_small_one_of_its_group() -> None:
    whole = Whole([run(METERED, 1000), run(METERED, 600, body=LARGE)])
    assert whole.larger_body(METERED, LARGE) == 0.6
    assert whole.larger_body(BARE, LARGE) is None


def test_streams_are_longer_than_those_of_their_source() -> None:
    found = everything()
    assert figures.longer_percent(found.streams, Pace(1000, 20)) == pytest.approx(2)
    assert figures.core_percent(STREAMS) == 60
    assert figures.failed([replace(STREAMS, whole=990)]) == 10


def test_smallest_batch_that_reaches_nine_tenths_is_full() -> None:
    full = figures.full_batch(everything().ledger, 1, 1)
    assert full is not None
    assert full.batch == 64


def test_targets_are_those_that_were_promised() -> None:
    assert [(t.name, t.limit, t.at_least) for t in targets(Results())] == [
        ("metered / bare relay on the same stack, 32 connections", 0.75, True),
        ("metered / bare relay on the same stack, 128 connections", 0.9, True),
        ("metered / LiteLLM's proxy without a database", 35, True),
        ("metered / Portkey gateway without metering", 4, True),
        ("added latency at one connection, median", 1.8, False),
        ("added latency at one connection, p99", 6, False),
        ("added to first byte of a stream, median (the hold only)", 1.2, False),
        ("1,000 streams x 20 events/s, failed", 0, False),
        ("1,000 streams x 20 events/s, longer than direct", 3, False),
        ("1,000 streams x 20 events/s, of a core", 70, False),
        ("2 workers on 2 cores with everything else elsewhere / 1 worker", 1.7, True),
        ("100 KB prompt / 0.3 KB prompt throughput", 0.6, True),
        ("`serve` ready after its start", 2, False),
        ("RSS of a worker, idle", 110, False),
        ("RSS of a worker at 1,000 open streams", 300, False),
        ("the thin install on disk", 60, False),
    ]


def test_target_that_was_not_measured_is_not_met_and_not_missed() -> None:
    assert {target.is_met for target in targets(Results())} == {None}
    assert targets(Results())[0].row()[2:] == ["", "not measured"]


def test_targets_are_met_or_not() -> None:
    met = {target.name: target.is_met for target in targets(everything())}
    assert [name for name, is_met in met.items() if not is_met] == [
        "metered / bare relay on the same stack, 128 connections",
        "the thin install on disk",
    ]


def test_page_is_made_from_what_was_written_down(tmp_path: Path) -> None:
    found = everything()
    path = tmp_path / "benchmarks.json"
    results.save(found, path, targets=[])
    assert results.load(path) == found
    page = report.page(results.load(path))
    assert "| **Tallygate, metered**" in page
    assert "1,000 x 20" in page
    assert "batches are full at 64" in page
    assert "| answers that the load generators counted | 10 |" in page


def test_page_of_a_part_says_what_is_missing() -> None:
    page = report.page(replace(everything(), streams=[], flood=[], whole=[], ledger=[]))
    assert page.count("*Not measured yet.*") >= 5


def test_contender_that_could_not_be_installed_is_named() -> None:
    page = report.page(replace(everything(), left_out={PORTKEY: "npm could not install it"}))
    assert "Portkey's gateway, not metering took no part: npm could not install it." in page


def test_results_of_an_older_shape_count_as_none(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    path.write_text('{"machine": {}, "ledger": {"answers": "1"}, "whole_answers": []}')
    assert results.load(path) == Results()
    assert results.load(tmp_path / "nothing.json") == Results()


def test_what_the_ledger_has_is_summed_over_the_groups() -> None:
    group = everything().measured["whole"]
    found = replace(everything(), measured={"whole": group, "bodies": group})
    assert found.booked == Booked(answered=20, billed=24)
