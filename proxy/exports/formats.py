"""The exports of OpenAI, Anthropic and LiteLLM, and any CSV file whose columns are named.

    openai      /v1/organization/costs and …/usage/{completions, embeddings, …} as JSON, grouped by
                line_item or model, in buckets of a day at most; the dashboard's CSV of either
    anthropic   /v1/organizations/cost_report (cents) and …/usage_report/messages as JSON, grouped
                by description or model; the Console's CSV of either (cost_usd)
    litellm     rows of /spend/logs or of its table: a line for each request
    csv         any other, with a column for each of `COLUMNS` that it has

Where a line names no model it is of all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from proxy.exports.lines import ExportError, Line, moment, name, picos, total, whole
from proxy.exports.records import Record, open_records

COLUMNS = ("day", "model", "id", "requests", "input", "output", "cost", "cost_cents")

_DAY = timedelta(days=1)
_CENTS_PER_USD = 100


def read_export(path: Path, format_: str, columns: Mapping[str, str]) -> Iterator[Line]:
    """Read an export line by line; `columns` names those of a `csv`. ExportError and OSError."""
    with open_records(path) as (is_json, records):
        for number, record in enumerate(records, 1):
            try:
                yield from _lines(record, format_, columns, is_json=is_json)
            except ExportError as error:
                raise ExportError(f"record {number}: {error}") from None


def _lines(
    record: Record, format_: str, columns: Mapping[str, str], *, is_json: bool
) -> Iterator[Line]:
    if format_ == "csv":
        if is_json:
            raise ExportError("this is JSON: name the format that it is of")
        yield _mapped(record, columns)
        return
    yield from FORMATS[format_](record)


# -------------------------------------------------------------------------------------------------
# OpenAI
# -------------------------------------------------------------------------------------------------


def _openai(record: Record) -> Iterator[Line]:
    start = record.get("start_time") or record.get("start_time_iso")
    end = record.get("end_time") or record.get("end_time_iso")
    if start is None:
        raise ExportError("there is no start_time: this is no export of OpenAI's usage or costs")
    begins = moment(start)
    if end is not None and moment(end) - begins > _DAY:
        raise ExportError("a bucket is longer than a day: export it with bucket_width=1d")
    # A bucket of the API has results, a row of the dashboard's CSV is one.
    for result in _results(record) if "results" in record else [record]:
        line = Line(
            day=begins.date(),
            model=_model_of_item(result.get("line_item")) or name(result.get("model")),
            requests=whole(result.get("num_model_requests")),
            input_tokens=whole(result.get("input_tokens")),
            output_tokens=whole(result.get("output_tokens")),
            cost_picos=_openai_cost(result),
        )
        # Days without any use stand in the CSV as well, and say nothing.
        if (line.requests, line.input_tokens, line.cost_picos) != (None, None, None):
            yield line


def _openai_cost(result: Record) -> int | None:
    amount = result.get("amount")
    if isinstance(amount, Mapping):
        amount = cast("Mapping[str, Any]", amount)
        _require_usd(amount.get("currency"))
        return picos(amount.get("value"))
    _require_usd(result.get("amount_currency"))
    return picos(result.get("amount_value"))


def _model_of_item(item: object) -> str | None:
    """The model of a line of an invoice: `gpt-4o-mini-2024-07-18, cached input`."""
    text = name(item)
    return None if text is None else text.rpartition(", ")[0] or text


# -------------------------------------------------------------------------------------------------
# Anthropic
# -------------------------------------------------------------------------------------------------


def _anthropic(record: Record) -> Iterator[Line]:
    if "results" not in record:
        yield _anthropic_row(record)
        return
    begins = moment(record.get("starting_at"))
    ending = record.get("ending_at")
    if ending is not None and moment(ending) - begins > _DAY:
        raise ExportError("a bucket is longer than a day: export it with bucket_width=1d")
    for result in _results(record):
        _require_usd(result.get("currency"))
        creation = result.get("cache_creation")
        created: Record = {}
        if isinstance(creation, Mapping):
            created = cast("Record", creation)
        yield Line(
            day=begins.date(),
            model=name(result.get("model")),
            input_tokens=total(
                result.get("uncached_input_tokens"),
                result.get("cache_read_input_tokens"),
                *created.values(),
            ),
            output_tokens=whole(result.get("output_tokens")),
            # "123.45" are 1.23 dollars: the API counts in the currency's lowest unit.
            cost_picos=picos(result.get("amount"), per_usd=_CENTS_PER_USD),
        )


def _anthropic_row(row: Record) -> Line:
    if "usage_date_utc" not in row:
        raise ExportError("there is no usage_date_utc: this is no export of Anthropic's")
    return Line(
        day=moment(row["usage_date_utc"]).date(),
        model=name(row.get("model_version")) or name(row.get("model")),
        input_tokens=total(
            row.get("usage_input_tokens_no_cache"),
            row.get("usage_input_tokens_cache_write_5m"),
            row.get("usage_input_tokens_cache_write_1h"),
            row.get("usage_input_tokens_cache_read"),
        ),
        output_tokens=whole(row.get("usage_output_tokens")),
        cost_picos=picos(row.get("cost_usd")),
    )


# -------------------------------------------------------------------------------------------------
# LiteLLM, and whatever else has columns
# -------------------------------------------------------------------------------------------------


def _litellm(row: Record) -> Iterator[Line]:
    if "spend" not in row or "startTime" not in row:
        raise ExportError("there is no spend or no startTime: this is no row of LiteLLM's logs")
    yield Line(
        day=moment(row["startTime"]).date(),
        # The name that was asked for; `model` is that of the deployment.
        model=name(row.get("model_group")) or name(row.get("model")),
        # Our own id; older versions have only the provider's.
        request_id=name(row.get("litellm_call_id")) or name(row.get("request_id")),
        requests=1,
        input_tokens=whole(row.get("prompt_tokens")),
        output_tokens=whole(row.get("completion_tokens")),
        cost_picos=picos(row["spend"]),
    )


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise ExportError unless the columns say enough to compare anything."""
    unknown = sorted(set(columns) - set(COLUMNS))
    if unknown:
        raise ExportError(f"{unknown[0]!r} is no column: known are {', '.join(COLUMNS)}")
    if "day" not in columns:
        raise ExportError("say which column has the day or the time, such as day=date")
    if not set(columns) & {"cost", "cost_cents", "input", "output", "requests"}:
        raise ExportError("name a column that can be compared, such as cost=amount_usd")


def _mapped(row: Record, columns: Mapping[str, str]) -> Line:
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise ExportError(f"there is no column {missing[0]!r}, but {', '.join(row)}")

    def value(column: str) -> object:
        return row[columns[column]] if column in columns else None

    request_id = name(value("id"))
    cost = picos(value("cost"))
    return Line(
        day=moment(value("day")).date(),
        model=name(value("model")),
        request_id=request_id,
        requests=1 if request_id and "requests" not in columns else whole(value("requests")),
        input_tokens=whole(value("input")),
        output_tokens=whole(value("output")),
        cost_picos=picos(value("cost_cents"), per_usd=_CENTS_PER_USD) if cost is None else cost,
    )


def _results(bucket: Record) -> Sequence[Record]:
    results = bucket["results"]
    if not isinstance(results, list) or not all(
        isinstance(result, Mapping) for result in cast("list[object]", results)
    ):
        raise ExportError("the results of a bucket are no list of objects")
    return cast("list[Record]", results)


def _require_usd(currency: object) -> None:
    text = name(currency)
    if text is not None and text.lower() != "usd":
        raise ExportError(f"amounts are in {text[:8]!r}, and only US dollars can be compared")


FORMATS: Mapping[str, Callable[[Record], Iterator[Line]]] = {
    "openai": _openai,
    "anthropic": _anthropic,
    "litellm": _litellm,
}
