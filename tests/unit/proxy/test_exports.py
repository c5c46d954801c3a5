"""Exports of providers and LiteLLM: what a line of each says, and files that are none."""

import io
import json
import tracemalloc
from datetime import date
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from proxy.exports import ExportError, Line, check_columns, read_export
from proxy.exports.lines import moment, picos
from proxy.exports.records import MAX_RECORD_BYTES, json_objects

SAMPLES = Path(__file__).parents[2] / "support" / "exports"
DAY, DAY_AFTER_NEXT = date(2025, 11, 3), date(2025, 11, 5)
MINI, SONNET = "gpt-4o-mini-2024-07-18", "claude-sonnet-4-20250514"
INVOICE = {
    "day": "Date",
    "model": "SKU",
    "requests": "Calls",
    "input": "Tokens in",
    "output": "Tokens out",
    "cost": "Amount",
}


def line(day: date = DAY, **values: Any) -> Line:
    return Line(day=day, **values)


EXPECTED = {
    "openai_costs.json": [
        line(model=MINI, cost_picos=150_000_000),
        line(model=MINI, cost_picos=300_000_000),
        line(model="text-embedding-3-small", cost_picos=20_000),
        line(DAY_AFTER_NEXT, model="web search tool calls", cost_picos=10_000_000_000),
        line(DAY_AFTER_NEXT, cost_picos=-5_000_000_000),
    ],
    "openai_usage.json": [
        line(model=MINI, requests=5, input_tokens=1000, output_tokens=500),
        line(model="text-embedding-3-small", requests=1, input_tokens=1),
    ],
    "openai_costs.csv": [
        line(cost_picos=450_000_000),
        line(DAY_AFTER_NEXT, cost_picos=5_000_000_000),
    ],
    "openai_usage.csv": [line(model=MINI, requests=5, input_tokens=1000, output_tokens=500)],
    "anthropic_costs.json": [
        line(model=SONNET, cost_picos=3_000_000_000),
        line(model=SONNET, cost_picos=1_237_891_200_000),
        line(cost_picos=10_000_000_000),
    ],
    "anthropic_usage.json": [line(model=SONNET, input_tokens=3200, output_tokens=500)],
    "anthropic_costs.csv": [
        line(model="Claude Sonnet 4", cost_picos=3_000_000_000),
        line(model="Claude Sonnet 4", cost_picos=1_237_891_200_000),
    ],
    "anthropic_usage.csv": [line(model=SONNET, input_tokens=3200, output_tokens=500)],
    "litellm_spend_logs.json": [
        line(
            model="small",
            request_id="019a4900-0000-7000-8000-000000000001",
            requests=1,
            input_tokens=10,
            output_tokens=20,
            cost_picos=13_500_000,
        ),
        line(
            model="openai/text-embedding-3-small",
            request_id="chatcmpl-OLDERversion",
            requests=1,
            input_tokens=3,
            output_tokens=0,
            cost_picos=0,
        ),
    ],
    "invoice.csv": [
        line(
            model="mistral-small",
            requests=5,
            input_tokens=1000,
            output_tokens=500,
            cost_picos=4_500_000_000,
        ),
        line(
            model="mistral-small",
            requests=1,
            input_tokens=10,
            output_tokens=5,
            cost_picos=500_000_000,
        ),
        line(
            DAY_AFTER_NEXT,
            model="mistral-small",
            requests=1,
            input_tokens=10,
            output_tokens=5,
            cost_picos=-100_000_000,
        ),
    ],
}


def read(path: Path) -> list[Line]:
    format_ = path.name.partition("_")[0]
    if format_ == "invoice.csv":
        return list(read_export(path, "csv", INVOICE))
    return list(read_export(path, format_, {}))


@pytest.mark.parametrize("name", EXPECTED)
def test_each_export_says_what_stands_in_it(name: str) -> None:
    assert read(SAMPLES / name) == EXPECTED[name]


def test_every_sample_is_read() -> None:
    assert {path.name for path in SAMPLES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("name", ["openai_costs.json", "anthropic_costs.json"])
def test_pages_may_stand_one_after_the_other_or_in_a_list(name: str, tmp_path: Path) -> None:
    page = (SAMPLES / name).read_text()
    (behind := tmp_path / f"{name.partition('_')[0]}_a").write_text(page + page)
    (listed := tmp_path / f"{name.partition('_')[0]}_b").write_text(f"[{page},{page}]")
    assert read(behind) == read(listed) == EXPECTED[name] * 2


def test_rows_may_stand_a_line_each(tmp_path: Path) -> None:
    rows = json.loads((SAMPLES / "litellm_spend_logs.json").read_text())
    (path := tmp_path / "litellm_").write_text("\n".join(map(json.dumps, rows)))
    assert read(path) == EXPECTED["litellm_spend_logs.json"]


def test_rows_may_be_a_table(tmp_path: Path) -> None:
    (path := tmp_path / "litellm_").write_text(
        "\ufeffrequest_id,spend,startTime,model,prompt_tokens,completion_tokens\n"
        'chatcmpl-1,1.35e-05,2025-11-03T09:30:00,"a ""model""",1,2\n'
    )
    (found,) = read(path)
    assert (found.request_id, found.model, found.cost_picos) == (
        "chatcmpl-1",
        'a "model"',
        13_500_000,
    )


DOCUMENTS = [
    b'{"x":{"data":[{"no":1}]},"data":[{"a":"}]\\"","r":[{"q":[{"z":"\\\\"}]}]},{}],"h":[{"no":2}]}',
    b'{"a":[1,2],"data":"x","l":[{"k":1}]}{"b":2}',
    '[{"a":[{"b":1}]} , 5, {"c":"\u00e9{\\"["}]'.encode(),
    b" [ ] ",
]


@pytest.mark.parametrize("first", DOCUMENTS)
@pytest.mark.parametrize("second", DOCUMENTS)
def test_records_are_cut_alike_wherever_the_file_is_torn(
    first: bytes, second: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = first + second
    whole = list(json_objects(io.BytesIO(document)))
    assert all(isinstance(json.loads(record), dict) for record in whole)
    for size in range(1, 12):
        monkeypatch.setattr("proxy.exports.records._CHUNK_BYTES", size)
        assert list(json_objects(io.BytesIO(document))) == whole


def test_memory_does_not_grow_with_the_file() -> None:
    row = b'{"request_id":"a","metadata":"' + b"x" * 1000 + b'"},'

    pieces = chain([b"["], repeat(row, 8000), [b"{}]"])

    class Rows(io.BytesIO):
        """Eight megabytes that are nowhere."""

        def read(self, size: int | None = -1, /) -> bytes:
            assert size
            return next(pieces, b"")

    tracemalloc.start()
    try:
        number = sum(1 for _ in json_objects(Rows()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number == 8001
    assert peak < 2_000_000


@pytest.mark.parametrize(
    "text, problem",
    [
        ("[{", "ends in the middle"),
        ('[{"start_time": "', "ends in the middle"),
        ('[{"start_time": 1,,}]', "not valid JSON"),
        ("[]]", "closes what is not open"),
        ("[{}]", "no start_time"),
        ('[{"start_time": "yesterday"}]', "neither a time nor a day"),
        ('[{"start_time": 1762128000, "end_time": 1762732800}]', "bucket_width=1d"),
        ('[{"start_time": 1762128000, "results": 5}]', "no list of objects"),
        ('[{"start_time": 1762128000, "num_model_requests": -1}]', "is no count"),
        ('[{"start_time": 1762128000, "num_model_requests": true}]', "a value is bool"),
        (
            '[{"start_time": 1762128000, "amount": {"value": 1, "currency": "eur"}}]',
            "only US dollars",
        ),
        (
            '[{"start_time": 1762128000, "results": [{"amount": {"value": "1,5"}}]}]',
            "an amount is none",
        ),
        ("start_time,start_time\n1,2\n", "name its columns, each once"),
        ("\n", "name its columns, each once"),
        ("start_time,model\n1762128000,a,b\n", "more columns than the header"),
        ("amount_value,model\n1,a\n", "no start_time"),
    ],
)
def test_a_file_that_is_none_is_refused_and_the_place_is_told(
    text: str, problem: str, tmp_path: Path
) -> None:
    (path := tmp_path / "openai_").write_text(text)
    with pytest.raises(ExportError, match=problem):
        read(path)


@pytest.mark.parametrize("name", ["anthropic_", "litellm_"])
def test_another_providers_export_is_told_apart(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((SAMPLES / "openai_costs.csv").read_bytes())
    with pytest.raises(ExportError, match="record 1: there is no"):
        read(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (path := tmp_path / "openai_").write_bytes(b"start_time,model\n1762128000,\xff\xfe\n")
    with pytest.raises(ExportError, match="UTF-8"):
        read(path)


def test_a_record_without_end_is_refused() -> None:
    text = io.BytesIO(b'[{"a":"' + b"x" * (MAX_RECORD_BYTES + 2**20) + b'"}]')
    with pytest.raises(ExportError, match="is larger than"):
        list(json_objects(text))


@pytest.mark.parametrize(
    "columns, problem",
    [
        ({"cost": "c"}, "which column has the day"),
        ({"day": "d"}, "can be compared"),
        ({"day": "d", "price": "c"}, "'price' is no column"),
    ],
)
def test_columns_must_say_enough(columns: dict[str, str], problem: str) -> None:
    with pytest.raises(ExportError, match=problem):
        check_columns(columns)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "x.csv").write_text("date,usd\n2025-11-03,1\n")
    columns = {"day": "date", "cost": "amount"}
    with pytest.raises(ExportError, match="no column 'amount', but date, usd"):
        list(read_export(path, "csv", columns))
    (path := tmp_path / "x.json").write_text("[{}]")
    with pytest.raises(ExportError, match="this is JSON"):
        list(read_export(path, "csv", columns))


def test_cents_and_ids_of_any_table_are_read(tmp_path: Path) -> None:
    (path := tmp_path / "x.csv").write_text("date,cents,id\n2025-11-03 10:00:00,12.5,a\n")
    columns = {"day": "date", "cost_cents": "cents", "id": "id"}
    (found,) = read_export(path, "csv", columns)
    assert found == line(request_id="a", requests=1, cost_picos=125_000_000_000)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("0.1", 100_000_000_000),
        ("-$0.1", -100_000_000_000),
        ("3.7000000000000005e-05", 37_000_000),
        ("", None),
        (None, None),
        (0, 0),
    ],
)
def test_money_is_exact(text: object, expected: int | None) -> None:
    assert picos(text) == expected


def test_times_are_brought_to_utc() -> None:
    assert moment("2025-11-03T23:30:00-01:00").date() == date(2025, 11, 4)
    assert moment("2025-11-03T23:30:00").date() == DAY
    assert moment("1762214399").date() == moment(1762214399).date() == DAY
