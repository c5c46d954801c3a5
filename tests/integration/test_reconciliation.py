"""A provider's account of a period against ours: what agrees, what does not, and who is missing."""

import csv
import json
import re
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from proxy.cli import main
from proxy.exports import ExportError, Line
from proxy.reconciliation import Comparison, Difference, Reconciler, Result, plain_model
from tests.integration.money import Money, NewAccount, capture, void
from tests.support.api import Api

DAY = date(2025, 11, 3)
NOON = datetime(2025, 11, 3, 12, tzinfo=UTC)
SAMPLES = Path(__file__).parents[1] / "support" / "exports"
MICRO = 1_000_000  # picos in a millionth of a dollar
# Exact, so that nothing is forgiven.
EXACT: dict[str, Any] = {"tolerance_ppm": 0, "tolerance_picos": 0}


class Books:
    """Requests of ours, at times of our choosing."""

    def __init__(self, money: Money) -> None:
        self.money = money
        self._numbers = count(1)

    def add(self, cost: int | None, *, at: datetime = NOON, **changes: Any) -> str:
        """Add a request that cost so many millionths of a dollar; returns its id."""
        request_id = self._id(at)
        model = changes.pop("model", "gpt-4o-mini")
        byok = changes.pop("byok", False)
        request = self.money.hold(0, request_id=request_id, model=model, byok=byok)
        known: dict[str, Any] = {"model_answered": "gpt-4o-mini-2024-07-18", **changes}
        bill = capture(request, 0, cost_picos=None if cost is None else cost * MICRO, **known)
        if cost is None:
            bill |= {"action": "void", "status": "needs_review", "price": None}
            bill |= {"review_reason": "usage_missing"}
        if byok:
            bill["status"] = "byok"
        self.money.settle(bill)
        self.put_at(request_id, at)
        return str(self.money.usage(request)["request_id"])

    def fail(self) -> None:
        """Add a request that no provider answered."""
        request = self.money.hold(0, request_id=self._id(NOON))
        self.money.settle(void(request))
        self.put_at(str(request["request_id"]), NOON)

    def _id(self, at: datetime) -> str:
        milliseconds = int(at.timestamp() * 1000)
        return f"{milliseconds << 80 | 0x7 << 76 | 0x8 << 60 | next(self._numbers):032x}"

    def put_at(self, request_id: str, at: datetime) -> None:
        self.money.connection.execute(
            "UPDATE usage SET created_at = %s, settled_at = %s WHERE request_id = %s",
            (at, at, request_id),
        )


@pytest.fixture
def books(account: NewAccount) -> Books:
    """Books without a request."""
    return Books(account())


def line(cost: int | None = None, *, day: date = DAY, **values: Any) -> Line:
    picos = None if cost is None else cost * MICRO
    return Line(day=day, cost_picos=picos, **values)


def compare(
    url: str, lines: list[Line], **comparison: Any
) -> tuple[Result, list[tuple[str, Difference]], bool]:
    """Compare; returns the result, the requests that differ, and whether it is within."""
    differing: list[tuple[str, Difference]] = []
    with closing(Reconciler(Comparison(**(EXACT | comparison)))) as reconciler:
        reconciler.take(lines)
        result = reconciler.compare(url, lambda kind, each: differing.append((kind, each)))
        return result, differing, result.is_within(reconciler.comparison)


def drifts(result: Result) -> dict[tuple[str, str | None], int]:
    """What they say less what we say of each day and model, in millionths of a dollar."""
    return {
        (day.isoformat(), model): (group.theirs.cost_picos - group.ours.cost_picos) // MICRO
        for (day, model), group in result.groups.items()
    }


# --- by model and day ---


def test_what_agrees_by_model_and_day_is_within(books: Books, database_url: str) -> None:
    for _ in range(3):
        books.add(100)
    books.add(7, model="embed", model_answered=None)
    lines = [
        line(120, model="gpt-4o-mini-2024-07-18"),
        line(180, model="openai/GPT-4o-mini-2024-07-18"),
        line(7, model="embed"),
    ]

    result, differing, is_within = compare(database_url, lines)

    assert is_within
    assert differing == []
    assert set(drifts(result).values()) == {0}
    group = result.groups[DAY, "gpt-4o-mini"]
    assert (group.ours.requests, group.ours.input_tokens, group.ours.output_tokens) == (3, 9, 12)
    assert result.drift_picos == 0


def test_a_difference_is_told_by_model_and_day(books: Books, database_url: str) -> None:
    next_day = NOON + timedelta(days=1)
    books.add(100)
    books.add(100, at=next_day)
    books.add(50, at=next_day, model_answered="o3")
    lines = [
        line(100, model="gpt-4o-mini"),
        line(130, model="gpt-4o-mini", day=next_day.date()),
        line(9, model="o1", day=next_day.date()),
    ]

    result, _, is_within = compare(database_url, lines)

    assert not is_within
    assert drifts(result) == {
        ("2025-11-03", "gpt-4o-mini"): 0,
        ("2025-11-04", "gpt-4o-mini"): 30,
        ("2025-11-04", "o3"): -50,
        ("2025-11-04", "o1"): 9,
    }
    assert result.drift_picos == -11 * MICRO


@pytest.mark.parametrize(
    "theirs, ppm, usd, is_within",
    [
        (101, 10_000, 0, True),
        (102, 10_000, 0, False),
        (99, 10_000, 0, True),
        (98, 10_000, 0, False),
        (102, 0, 2, True),
        (103, 0, 2, False),
    ],
)
def test_a_difference_counts_beyond_the_tolerance(
    books: Books,
    database_url: str,
    theirs: int,
    ppm: int,
    usd: int,
    is_within: bool,  # noqa: FBT001
) -> None:
    books.add(100)
    lines = [line(theirs, model="gpt-4o-mini")]
    found = compare(database_url, lines, tolerance_ppm=ppm, tolerance_picos=usd * MICRO)
    assert found[2] == is_within


def test_days_that_cancel_each_other_out_are_beyond_it(books: Books, database_url: str) -> None:
    books.add(100)
    books.add(100, at=NOON + timedelta(days=1))
    lines = [line(110, model="gpt-4o-mini")]
    lines += [line(90, model="gpt-4o-mini", day=DAY + timedelta(days=1))]
    result, _, is_within = compare(database_url, lines)
    assert (result.drift_picos, is_within) == (0, False)


def test_without_models_a_day_is_compared_whole(books: Books, database_url: str) -> None:
    books.add(100)
    books.add(50, model_answered="o3")
    result, _, is_within = compare(database_url, [line(150)])
    assert (drifts(result), is_within) == ({("2025-11-03", None): 0}, True)


def test_without_costs_tokens_are_compared_and_without_them_requests(
    books: Books, database_url: str
) -> None:
    books.add(100)
    tokens: dict[str, Any] = {"model": "gpt-4o-mini", "input_tokens": 3}
    assert compare(database_url, [line(**tokens, output_tokens=4)])[2]
    result, _, is_within = compare(database_url, [line(**tokens, output_tokens=5)])
    assert (is_within, result.drift_picos) == (False, None)
    assert compare(database_url, [line(model="gpt-4o-mini", requests=1)])[2]
    assert not compare(database_url, [line(model="gpt-4o-mini", requests=2)])[2]


def test_models_are_renamed_and_cut_to_a_pattern(books: Books, database_url: str) -> None:
    books.add(100, model_answered="claude-sonnet-4-20250514")
    books.add(50, model_answered="o3")
    lines = [line(100, model="Claude Sonnet 4"), line(1, model="o1")]
    options: dict[str, Any] = {
        "renamed": {"Claude Sonnet 4": "claude-sonnet-4"},
        "models": ["claude-*"],
    }

    result, _, is_within = compare(database_url, lines, **options)

    assert (drifts(result), is_within) == ({("2025-11-03", "claude-sonnet-4"): 0}, True)


def test_the_period_is_the_files_unless_it_is_said(books: Books, database_url: str) -> None:
    for hours in (-13, 0, 11, 12):
        books.add(100, at=NOON + timedelta(hours=hours))
    lines = [line(200, model="gpt-4o-mini")]

    assert compare(database_url, lines)[2]
    longer = compare(database_url, lines, last_day=DAY + timedelta(days=1))
    assert drifts(longer[0]) == {
        ("2025-11-03", "gpt-4o-mini"): 0,
        ("2025-11-04", "gpt-4o-mini"): -100,
    }
    days = {"first_day": DAY + timedelta(days=1), "last_day": DAY + timedelta(days=1)}
    shorter = compare(database_url, lines, **days)
    assert (shorter[0].outside_period, shorter[0].lines) == (1, 1)
    assert compare(database_url, [], first_day=DAY, last_day=DAY)[0].groups != {}


def test_no_line_and_no_period_is_refused(database_url: str) -> None:
    with pytest.raises(ExportError, match="no line of the period"):
        compare(database_url, [])


def test_what_counts_is_what_a_provider_was_asked(books: Books, database_url: str) -> None:
    """Failures cost nothing and are left out; a customer's own key is nobody's invoice."""
    money = books.money
    books.fail()
    books.add(70, byok=True)
    books.add(None)
    wasted = books.add(None)
    money.connection.execute(
        "UPDATE usage SET status = 'void', review_reason = NULL, witness_picos = 5000000"
        " WHERE request_id = %s",
        (wasted,),
    )

    (group,) = compare(database_url, [line(5, model="gpt-4o-mini")])[0].groups.values()

    assert (group.ours.requests, group.ours.unknown_costs) == (2, 1)
    assert group.ours.cost_picos == group.theirs.cost_picos == 5 * MICRO
    by_litellm = compare(database_url, [line(75, model="gpt-4o-mini")], with_byok=True)
    assert by_litellm[2]


@pytest.mark.parametrize(
    "name, plain",
    [
        ("gpt-4o-2024-08-06", "gpt-4o"),
        ("claude-3-7-sonnet-20250219", "claude-3-7-sonnet"),
        ("vertex_ai/claude-3-7-sonnet@20250219", "claude-3-7-sonnet"),
        ("Llama-3.1-8B", "llama-3.1-8b"),
        ("o3", "o3"),
        (None, None),
    ],
)
def test_names_of_a_model_are_one(name: str | None, plain: str | None) -> None:
    assert plain_model(name) == plain


# --- by id ---


def test_requests_are_matched_by_either_id(books: Books, database_url: str) -> None:
    ours = books.add(100)
    books.add(50, answer_id="chatcmpl-1")
    lines = [
        line(100, model="x", request_id=ours),
        line(50, model="y", request_id="chatcmpl-1", day=DAY + timedelta(days=1)),
    ]

    result, differing, is_within = compare(database_url, lines)

    assert (result.matched, result.differing, result.only_ours, result.only_theirs) == (2, 0, 0, 0)
    # Under our names and days on both sides, whatever theirs are.
    assert drifts(result) == {("2025-11-03", "gpt-4o-mini"): 0}
    assert (differing, is_within) == ([], True)


def test_requests_that_differ_or_are_missing_are_named(books: Books, database_url: str) -> None:
    cheap, dear, lost = books.add(100), books.add(100), books.add(30)
    lines = [
        line(90, request_id=cheap),
        line(110, request_id=dear),
        line(8, request_id="elsewhere", model="m"),
    ]

    result, differing, is_within = compare(database_url, lines)

    assert {
        (kind, each.request_id, each.ours_picos, each.theirs_picos) for kind, each in differing
    } == {
        ("differs", cheap, 100 * MICRO, 90 * MICRO),
        ("differs", dear, 100 * MICRO, 110 * MICRO),
        ("only_ours", lost, 30 * MICRO, None),
        ("only_theirs", "elsewhere", None, 8 * MICRO),
    }
    assert (result.matched, result.differing) == (2, 2)
    assert result.differing_picos == 20 * MICRO
    assert not is_within


def test_requests_that_cancel_each_other_out_are_beyond_the_tolerance(
    books: Books, database_url: str
) -> None:
    first, second = books.add(100), books.add(100)
    lines = [line(90, request_id=first), line(110, request_id=second)]
    result, _, is_within = compare(database_url, lines)
    assert (result.drift_picos, is_within) == (0, False)


def test_attempts_of_a_request_are_added_up(books: Books, database_url: str) -> None:
    ours = books.add(100)
    lines = [line(cost, request_id=ours, requests=1) for cost in (0, 60, 40)]
    result, _, is_within = compare(database_url, lines)
    assert (result.matched, is_within) == (1, True)
    (group,) = result.groups.values()
    assert group.theirs.requests == 1


def test_an_unknown_cost_differs_from_one_that_is_told(books: Books, database_url: str) -> None:
    ours = books.add(None)
    result, ((kind, difference),), is_within = compare(database_url, [line(9, request_id=ours)])
    assert (kind, difference.ours_picos, difference.theirs_picos) == ("differs", None, 9 * MICRO)
    assert (result.drift_picos, is_within) == (9 * MICRO, False)


def test_midnight_makes_no_difference_to_a_request(books: Books, database_url: str) -> None:
    """They count what we count on the day before or after."""
    before = books.add(100, at=NOON - timedelta(hours=12, seconds=1))
    after = books.add(100, at=NOON + timedelta(hours=12, seconds=1))
    books.add(100, at=NOON - timedelta(hours=13))
    lines = [line(100, request_id=each, model="gpt-4o-mini") for each in (before, after)]
    result, _, is_within = compare(database_url, lines)
    assert (result.matched, result.only_ours, is_within) == (2, 0, True)
    assert set(result.groups) == {(DAY, "gpt-4o-mini")}


def test_an_id_counts_once(books: Books, database_url: str) -> None:
    books.add(100, answer_id="same")
    books.add(100, answer_id="same")
    lines = [line(100, request_id="same", model="gpt-4o-mini")]
    result, _, is_within = compare(database_url, lines)
    assert (result.matched, result.only_ours, is_within) == (1, 1, False)


# --- from a shell ---

Run = Callable[..., Any]


@pytest.fixture
def run(
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Run `tallygate reconcile`; returns its document, or its text where that is asked for."""
    monkeypatch.setenv("TALLYGATE_DATABASE_URL", database_url)
    monkeypatch.setenv("TALLYGATE_DATA_DIR", str(tmp_path))

    def call(*argv: object, code: int = 0, plain: bool = False) -> Any:
        arguments = ["reconcile", *map(str, argv)]
        with pytest.raises(SystemExit) as ended:
            main(arguments if plain else [*arguments, "--json"])
        output = capsys.readouterr()
        assert ended.value.code == code, output
        return output.out + output.err if plain or code == 2 else json.loads(output.out)

    return call


def kept(url: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(
            "SELECT source, first_day, last_day, drift_picos, is_within, actor"
            " FROM tallygate.reconciliations ORDER BY reconciliation_id"
        ).fetchall()


def test_an_export_is_compared_and_the_result_kept(
    run: Run, books: Books, database_url: str
) -> None:
    books.add(450)
    books.add(None, model_answered="text-embedding-3-small")
    before = books.money.all("SELECT * FROM usage ORDER BY request_id")

    argv = (SAMPLES / "openai_costs.json", "--format", "openai", "--tolerance-usd", "0.001")

    document = run(*argv, code=1)

    assert document["total"]["drift_usd"] == "0.00500002"
    assert document["total"]["ours"]["unknown_costs"] == 1
    groups = document["groups"]
    assert [(each["day"], each["model"], each["drift_usd"]) for each in groups] == [
        ("2025-11-03", "gpt-4o-mini", "0"),
        ("2025-11-03", "text-embedding-3-small", "0.00000002"),
        ("2025-11-05", None, "-0.005"),
        ("2025-11-05", "web search tool calls", "0.01"),
    ]
    assert [each["within_tolerance"] for each in groups] == [True, True, False, False]
    assert document["ids"] is None
    assert kept(database_url) == [("openai", DAY, date(2025, 11, 5), 5_000_020_000, False, "cli")]
    assert books.money.all("SELECT * FROM usage ORDER BY request_id") == before
    text = run(*argv, plain=True, code=1)
    assert re.search(r"web search tool calls +0/\? +0 +0.01 +0.01 +- +<-", text)
    assert re.search(r"gpt-4o-mini +1/\? +0.00045 +0.00045 +0 +0.00\n", text)
    assert "BEYOND the tolerance of 1% or $0.001" in text


def test_spend_logs_are_matched_and_what_is_missing_is_written(
    run: Run, books: Books, tmp_path: Path, database_url: str
) -> None:
    lost = books.add(30)
    path = tmp_path / "unmatched.csv"

    document = run(
        *(SAMPLES / "litellm_spend_logs.json", "--format", "litellm", "--source", "eu"),
        *("--unmatched", path, "--tolerance-usd", "0", "--dry-run"),
        code=1,
    )

    assert document["source"] == "eu"
    assert (document["ids"]["only_ours"], document["ids"]["only_theirs"]) == (1, 2)
    assert [each["id"] for each in document["examples"]["only_ours"]] == [lost]
    with path.open(newline="") as file:
        rows = {
            (row["kind"], row["id"], row["ours_usd"], row["theirs_usd"])
            for row in csv.DictReader(file)
        }
    assert rows == {
        ("only_ours", lost, "0.00003", ""),
        ("only_theirs", "019a4900-0000-7000-8000-000000000001", "", "0.0000135"),
        ("only_theirs", "chatcmpl-OLDERversion", "", "0"),
    }
    assert kept(database_url) == []


def test_any_table_is_compared_by_its_columns(run: Run, books: Books) -> None:
    books.add(5000, model_answered="mistral-small")
    columns = "day=Date,model=SKU,requests=Calls,cost=Amount"
    options = ("--format", "csv", "--map", columns, "--to", "2025-11-03", "--dry-run")

    document = run(SAMPLES / "invoice.csv", *options, "--models", "mistral-*")

    assert document["within_tolerance"]
    assert (document["lines"], document["lines_outside_period"]) == (3, 1)
    assert document["total"]["theirs"] == {"requests": 6, "cost_usd": "0.005"}


@pytest.mark.parametrize(
    "argv, problem",
    [
        (("nowhere.json", "--format", "openai"), "No such file"),
        ((SAMPLES / "invoice.csv", "--format", "csv"), "which column has the day"),
        ((SAMPLES / "invoice.csv", "--format", "csv", "--map", "day"), "no pair"),
        ((SAMPLES / "invoice.csv", "--format", "openai"), "no start_time"),
        ((SAMPLES / "openai_costs.csv", "--format", "openai", "--from", "yesterday"), "no day"),
        (
            (SAMPLES / "openai_costs.csv", "--format", "openai", "--from", "2026-01-01"),
            "no line of the period",
        ),
        (
            (
                *(SAMPLES / "openai_costs.csv", "--format", "openai"),
                *("--from", "2025-11-04", "--to", "2025-11-03"),
            ),
            "before the first",
        ),
        (
            (SAMPLES / "openai_costs.csv", "--format", "openai", "--tolerance-percent", "x"),
            "not a decimal number",
        ),
        ((SAMPLES / "openai_costs.csv", "--format", "openai", "--source", " "), "1 to 64"),
    ],
)
def test_what_can_not_be_compared_is_said(
    run: Run, argv: tuple[object, ...], problem: str, database_url: str
) -> None:
    assert problem in run(*argv, code=2)
    assert kept(database_url) == []


@pytest.mark.anyio
async def test_the_newest_result_of_each_source_is_a_metric(
    api: Api, run: Run, books: Books
) -> None:
    books.add(450)
    for source, name in (
        ("a", "openai_costs.csv"),
        ("b", "openai_usage.csv"),
        ("a", "openai_costs.json"),
    ):
        options = ("--format", "openai", "--source", source, "--tolerance-usd", "0")
        run(SAMPLES / name, *options, code=1)

    text = (await api.call("GET", "/metrics")).text

    assert 'tallygate_reconciliation_drift_usd{source="a"} 0.00500002' in text
    assert 'tallygate_reconciliation_within{source="a"} 0.0' in text
    assert 'tallygate_reconciliation_age_seconds{source="b"}' in text
    # It tells tokens and no costs.
    assert 'tallygate_reconciliation_drift_usd{source="b"}' not in text
