"""`tallygate reconcile`: a provider's export against our usage, from a shell."""

# ruff: noqa: PLC0415 - no command pays for the imports of the others.

import argparse
import csv
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pricing.errors import InvalidAmountError
from pricing.money import PPM, nanos_from_usd, scale_exactly, usd_text_from_picos

if TYPE_CHECKING:
    from proxy.reconciliation import Comparison, Difference, Group, Kind, Note, Result, Side

Document = dict[str, Any]

_FORMATS = ("openai", "anthropic", "litellm", "csv")
_PICOS_PER_NANO = 1000
_EXAMPLES = 100
_MAX_SOURCE = 64
# How many of the worst groups a kept result names.
_KEPT_GROUPS = 20
# What an export must have told for a figure of theirs to mean anything.
_TOLD = {
    "requests": "requests",
    "input_tokens": "tokens",
    "output_tokens": "tokens",
    "cost_usd": "costs",
}
_COLUMNS = ("kind", "id", "day", "model", "ours_usd", "theirs_usd")


def add_reconcile(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    add: Callable[..., argparse.ArgumentParser],
    *,
    database_url: Callable[[Any], str],
    show: Callable[[argparse.Namespace, object, Iterable[str]], None],
    complain: Callable[[str, int], int],
) -> None:
    """Register the command; the rest is how `cli` makes one."""

    def run(arguments: argparse.Namespace, settings: object) -> int:
        from proxy.db import require_schema
        from proxy.exports import ExportError

        url = database_url(settings)
        require_schema(url)
        try:
            result, document = _reconcile(arguments, url)
        except (ExportError, OSError) as error:
            return complain(f"{arguments.file}: {error}", 2)
        show(arguments, document, _text(result, document))
        return 0 if document["within_tolerance"] else 1

    command = add(commands, "reconcile", run, "compare a provider's export with our usage")
    command.add_argument("file", type=Path, help="the export: JSON or CSV")
    command.add_argument("--format", choices=_FORMATS, required=True, help="whose export it is")
    command.add_argument(
        "--source", type=_source, help="the name to keep the result under (the format)"
    )
    command.add_argument(
        "--map", type=_columns, default={}, help="columns of a CSV: day=date,model=sku,cost=usd"
    )
    command.add_argument("--from", dest="first", type=_day, help="first day, UTC (the file's)")
    command.add_argument("--to", dest="last", type=_day, help="last day, UTC (the file's)")
    command.add_argument(
        "--models", type=_names, default=[], help="compare these alone, * for any text: gpt-*,o3"
    )
    command.add_argument(
        "--rename", type=_pair, action="append", default=[], help="THEIRS=OURS, a model's names"
    )
    command.add_argument(
        "--tolerance-percent", type=_ppm, default="1", help="of the larger side (1)"
    )
    command.add_argument(
        "--tolerance-usd", type=_picos, default="0.01", help="for each model and day (0.01)"
    )
    command.add_argument("--unmatched", type=Path, help="write every request that differs here")
    command.add_argument("--dry-run", action="store_true", help="keep no result")


def _reconcile(arguments: argparse.Namespace, url: str) -> tuple["Result", Document]:
    from proxy.exports import ExportError, check_columns, read_export
    from proxy.reconciliation import Comparison, Reconciler, record

    if arguments.format == "csv":
        check_columns(arguments.map)
    if arguments.first and arguments.last and arguments.first > arguments.last:
        raise ExportError("the last day is before the first")
    is_litellm = arguments.format == "litellm"
    comparison = Comparison(
        first_day=arguments.first,
        last_day=arguments.last,
        models=arguments.models,
        renamed=dict(arguments.rename),
        with_byok=is_litellm,
        by_asked_model=is_litellm,
        tolerance_ppm=arguments.tolerance_percent,
        tolerance_picos=arguments.tolerance_usd,
    )
    examples: dict[str, list[Document]] = {"differs": [], "only_ours": [], "only_theirs": []}
    with _unmatched(arguments.unmatched) as write, closing(Reconciler(comparison)) as reconciler:

        def note(kind: "Kind", difference: "Difference") -> None:
            if len(examples[kind]) < _EXAMPLES:
                examples[kind].append(_difference(difference))
            write(kind, difference)

        reconciler.take(read_export(arguments.file, arguments.format, arguments.map))
        result = reconciler.compare(url, note)
    document = _document(result, comparison, source=arguments.source or arguments.format)
    if not arguments.dry_run:
        worst = sorted(document["groups"], key=lambda group: group["within_tolerance"])
        document["reconciliation_id"] = record(
            url,
            result,
            source=document["source"],
            is_within=document["within_tolerance"],
            summary={**document, "groups": worst[:_KEPT_GROUPS]},
        )
    document["examples"] = examples
    return result, document


@contextmanager
def _unmatched(path: Path | None) -> Generator["Note"]:
    if path is None:
        yield lambda _kind, _difference: None
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        yield lambda kind, difference: writer.writerow({"kind": kind, **_difference(difference)})


# -------------------------------------------------------------------------------------------------
# What is shown
# -------------------------------------------------------------------------------------------------


def _document(result: "Result", comparison: "Comparison", *, source: str) -> Document:
    total = result.total
    groups = sorted(result.groups.items(), key=lambda item: (item[0][0], item[0][1] or ""))
    return {
        "source": source,
        "first_day": result.first_day.isoformat(),
        "last_day": result.last_day.isoformat(),
        "within_tolerance": result.is_within(comparison),
        "tolerance": {
            "percent": _percent_text(comparison.tolerance_ppm),
            "usd": _usd(comparison.tolerance_picos),
        },
        "lines": result.lines,
        "lines_outside_period": result.outside_period,
        "total": _group(result, total, comparison),
        "ids": {
            "matched": result.matched,
            "differing": result.differing,
            "differing_usd": _usd(result.differing_picos),
            "only_ours": result.only_ours,
            "only_theirs": result.only_theirs,
        }
        if result.told.ids
        else None,
        "groups": [
            {"day": day.isoformat(), "model": model, **_group(result, group, comparison)}
            for (day, model), group in groups
        ],
    }


def _group(result: "Result", group: "Group", comparison: "Comparison") -> Document:
    drift = group.theirs.cost_picos - group.ours.cost_picos if result.told.costs else None
    return {
        "ours": {**_side(group.ours), "unknown_costs": group.ours.unknown_costs},
        "theirs": {
            name: value
            for name, value in _side(group.theirs).items()
            if getattr(result.told, _TOLD[name])
        },
        "drift_usd": None if drift is None else _usd(drift),
        "drift_percent": None if drift is None else _share(drift, group.ours.cost_picos),
        "within_tolerance": result.is_group_within(group, comparison),
    }


def _side(side: "Side") -> Document:
    return {
        "requests": side.requests,
        "input_tokens": side.input_tokens,
        "output_tokens": side.output_tokens,
        "cost_usd": _usd(side.cost_picos),
    }


def _difference(difference: "Difference") -> Document:
    ours, theirs = difference.ours_picos, difference.theirs_picos
    return {
        "id": difference.request_id,
        "day": difference.day.isoformat(),
        "model": difference.model,
        "ours_usd": None if ours is None else _usd(ours),
        "theirs_usd": None if theirs is None else _usd(theirs),
    }


def _text(result: "Result", document: Document) -> list[str]:
    nameless = "(none)" if result.told.models else "(all)"
    rows: list[tuple[str, ...]] = [
        ("day", "model", "requests", "ours USD", "theirs USD", "drift USD", "%", ""),
        *((each["day"], each["model"] or nameless, *_cells(each)) for each in document["groups"]),
        ("total", "", *_cells(document["total"])),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    ids = document["ids"]
    if ids is not None:
        text = (
            f"{ids['matched']} requests on both sides, {ids['differing']} of them differ;"
            f" {ids['only_ours']} only ours, {ids['only_theirs']} only theirs"
        )
        lines += ["", text]
        for kind, found in document["examples"].items():
            lines += [f"  {kind} {_example(each)}" for each in found[:10]]
    if result.outside_period:
        lines += ["", f"{result.outside_period} of {result.lines} lines are outside the period"]
    verdict = "within" if document["within_tolerance"] else "BEYOND"
    tolerance = document["tolerance"]
    lines += ["", f"{verdict} the tolerance of {tolerance['percent']}% or ${tolerance['usd']}"]
    return lines


def _cells(group: Mapping[str, Any]) -> tuple[str, ...]:
    ours, theirs = group["ours"], group["theirs"]
    return (
        f"{ours['requests']}/{theirs.get('requests', '?')}",
        ours["cost_usd"] + ("?" if ours["unknown_costs"] else ""),
        theirs.get("cost_usd", "-"),
        group["drift_usd"] or "-",
        group["drift_percent"] or "-",
        "" if group["within_tolerance"] else "<-",
    )


def _example(difference: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in difference.items() if value is not None)


def _usd(picos: int) -> str:
    return usd_text_from_picos(picos)


def _share(part: int, whole: int) -> str | None:
    """A part of a whole in percent, cut to two places; None of nothing."""
    if whole == 0:
        return None
    hundredths = abs(part) * 10_000 // abs(whole)
    return f"{'-' if part < 0 else ''}{hundredths // 100}.{hundredths % 100:02d}"


def _percent_text(ppm: int) -> str:
    return f"{ppm / (PPM / 100):g}"


# -------------------------------------------------------------------------------------------------
# Arguments
# -------------------------------------------------------------------------------------------------


def _source(text: str) -> str:
    if not (text.isprintable() and 0 < len(text.strip()) <= _MAX_SOURCE):
        msg = f"a source has 1 to {_MAX_SOURCE} printable characters"
        raise argparse.ArgumentTypeError(msg)
    return text.strip()


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        msg = f"{text!r} is no day: write 2025-11-30"
        raise argparse.ArgumentTypeError(msg) from None


def _pair(text: str) -> tuple[str, str]:
    left, sign, right = text.rpartition("=")
    if not (left and sign and right):
        msg = f"{text!r} is no pair: write THEIRS=OURS"
        raise argparse.ArgumentTypeError(msg)
    return left.strip(), right.strip()


def _columns(text: str) -> dict[str, str]:
    return dict(_pair(part) for part in text.split(","))


def _names(text: str) -> list[str]:
    return [name for name in re.split(r"\s*,\s*", text.strip()) if name]


def _ppm(text: str) -> int:
    try:
        return scale_exactly(text, PPM // 100)
    except InvalidAmountError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _picos(text: str) -> int:
    try:
        return nanos_from_usd(text) * _PICOS_PER_NANO
    except InvalidAmountError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
