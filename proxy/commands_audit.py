"""`tallygate audit` and `tallygate retention`, from a shell."""

# ruff: noqa: PLC0415 - no command pays for the imports of the others.

import argparse
import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxy.audit import Finding
    from proxy.retention import Month
    from proxy.seals import Seal

_ACTOR = "cli"
_EVERYTHING = Path()
_PARENTS = ("entries", "usage")

Show = Callable[[argparse.Namespace, object, Iterable[str]], None]
Table = Callable[[Sequence[Sequence[object]]], list[str]]


class _Commands:
    """The commands, and what `cli` makes one of."""

    def __init__(
        self,
        *,
        database_url: Callable[[Any], str],
        show: Show,
        table: Table,
        complain: Callable[[str, int], int],
    ) -> None:
        self._database_url = database_url
        self._show = show
        self._table = table
        self._complain = complain

    def audit(self, arguments: argparse.Namespace, settings: object) -> int:
        """Look at the ledger as far as was asked; 1 where something is wrong."""
        from proxy.db import require_schema

        url = self._database_url(settings)
        require_schema(url)
        if arguments.seals:
            return self._list_seals(arguments, url)
        if arguments.archive is not None and arguments.since_seal is None:
            return self._complain("--archive goes with --since-seal", 2)
        findings, looked_at = _look(arguments, url)
        broken = [finding for finding in findings if finding.violations]
        if arguments.seal and not broken:
            return self._seal(arguments, url)
        document = {"clean": not broken, **looked_at, "invariants": findings}
        self._show(arguments, document, self._text(findings, broken, looked_at))
        return 1 if broken else 0

    def _text(
        self,
        findings: Sequence["Finding"],
        broken: Sequence["Finding"],
        looked_at: Mapping[str, object],
    ) -> list[str]:
        lines = self._table(
            [
                ("invariant", "checked", "violations"),
                *((found.name, found.checked, found.violations) for found in findings),
            ]
        )
        for found in broken:
            lines += ["", f"{found.name}: {found.promise}"]
            lines += [f"  {_row_text(row)}" for row in found.rows]
            if found.violations > len(found.rows):
                lines.append(f"  … and {found.violations - len(found.rows)} more")
        lines.append("")
        if looked_at:
            lines.append(_row_text(looked_at))
        lines.append(
            f"{len(broken)} of {len(findings)} invariants are broken" if broken else "clean"
        )
        return lines

    def _seal(self, arguments: argparse.Namespace, url: str) -> int:
        from proxy.seals import line_of

        made = asyncio.run(_with_sealer(url, is_new=True))
        if not made:
            return self._complain("somebody else sealed it in this moment", 1)
        self._show(arguments, made[0], [line_of(made[0])])
        return 0

    def _list_seals(self, arguments: argparse.Namespace, url: str) -> int:
        from proxy.seals import line_of

        seals = asyncio.run(_with_sealer(url, is_new=False))
        self._show(arguments, {"data": seals}, [line_of(seal) for seal in seals])
        return 0

    def retention(self, arguments: argparse.Namespace, settings: object) -> int:
        """Show which months could go, or detach them; 1 where it was told to and could not."""
        from proxy.db import require_schema
        from proxy.retention import detach, months

        url = self._database_url(settings)
        require_schema(url)
        if arguments.detach:
            listed = detach(url, arguments.before, actor=_ACTOR)
        else:
            listed = months(url, arguments.before)
        document = {"data": [_month(month) for month in listed]}
        self._show(arguments, document, self._months_text(arguments, listed))
        return 1 if arguments.detach and any(not month.is_detached for month in listed) else 0

    def _months_text(self, arguments: argparse.Namespace, listed: Sequence["Month"]) -> list[str]:
        from proxy.retention import OBSTACLES

        if not listed:
            return [f"no month before {arguments.before:%Y-%m} is attached"]
        lines = self._table(
            [
                ("month", "entries", "usage", "bytes", ""),
                *(
                    (
                        f"{month.month:%Y-%m}", month.entries, month.usage_rows, month.bytes,
                        "detached" if month.is_detached else month.obstacle or "can go",
                    )
                    for month in listed
                ),
            ]
        )  # fmt: skip
        lines += [
            f"  {name}: {OBSTACLES[name]}"
            for name in sorted({month.obstacle for month in listed if month.obstacle})
        ]
        gone = [f"{month.month:%Y_%m}" for month in listed if month.is_detached]
        if gone:
            lines += [
                "Dump these tables, then drop them when the dump is what was sealed:",
                *(f"  tallygate.{parent}_{name}" for name in gone for parent in _PARENTS),
            ]
        elif not arguments.detach:
            lines.append("Nothing was changed: --detach does it.")
        return lines


def add_audit(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    add: Callable[..., argparse.ArgumentParser],
    *,
    database_url: Callable[[Any], str],
    show: Show,
    table: Table,
    complain: Callable[[str, int], int],
) -> None:
    """Register the commands; the rest is how `cli` makes one."""
    made = _Commands(database_url=database_url, show=show, table=table, complain=complain)
    audit = add(commands, "audit", made.audit, "check every invariant of the ledger")
    scope = audit.add_mutually_exclusive_group()
    scope.add_argument(
        "--incremental", action="store_true", help="only what came since the last audited seal"
    )
    scope.add_argument(
        "--since-seal", nargs="?", type=Path, const=_EVERYTHING, metavar="FILE",
        help="that what was sealed is unchanged, also by the seals kept in FILE, and what came"
        " since",
    )  # fmt: skip
    scope.add_argument(
        "--seal", action="store_true", help="seal what is clean, and print the line to be kept"
    )
    scope.add_argument("--seals", action="store_true", help="print the lines of all seals")
    audit.add_argument(
        "--archive", nargs="*", type=Path, metavar="DUMP",
        help="with --since-seal: check detached months too, also in plain dumps of them",
    )  # fmt: skip
    retention = add(commands, "retention", made.retention, "detach old months")
    retention.add_argument(
        "--before", required=True, type=_month_of, metavar="YYYY-MM", help="the first that stays"
    )
    retention.add_argument("--detach", action="store_true", help="do it; else it is only shown")


def _look(arguments: argparse.Namespace, url: str) -> tuple[list["Finding"], dict[str, object]]:
    """Audit, and keep the result; returns it with what was looked at."""
    from proxy.audit import Run, audit, audit_increment, check_seals
    from proxy.seals import read_kept

    run = Run.begin(url)
    looked_at: dict[str, object] = {}
    if not (arguments.incremental or arguments.seal or arguments.since_seal is not None):
        findings = audit(url)
        entries = max(finding.checked for finding in findings)
        run.end(url, "full", findings, entries=entries)
        return findings, looked_at
    findings: list[Finding] = []
    entries = 0
    if arguments.since_seal is not None:
        kept = [] if arguments.since_seal == _EVERYTHING else read_kept(arguments.since_seal)
        sealed = check_seals(url, kept=kept, archives=arguments.archive)
        findings += sealed.findings
        entries += sealed.entries
        looked_at |= {
            "seals": sealed.seals,
            "sealed_entries": sealed.entries,
            "sealed_entries_away": sealed.entries_away,
        }
    increment = audit_increment(url)
    findings += increment.findings
    entries += increment.entries
    looked_at |= {
        "since_seal": increment.since_seal,
        "entries": increment.entries,
        "accounts": increment.accounts,
        "pages": increment.pages,
        "longest_snapshot_s": round(increment.longest_snapshot_s, 3),
    }
    scope = "incremental" if arguments.since_seal is None else "sealed"
    run.end(url, scope, findings, entries=entries)
    return findings, looked_at


async def _with_sealer(url: str, *, is_new: bool) -> list["Seal"]:
    from proxy.db import make_pool
    from proxy.seals import Sealer

    async with make_pool(url, max_size=1) as pool:
        sealer = Sealer(pool)
        if not is_new:
            return await sealer.seals()
        made = await sealer.seal()
        return [] if made is None else [made]


def _month(month: "Month") -> dict[str, object]:
    return {
        "month": f"{month.month:%Y-%m}",
        "entries": month.entries,
        "usage_rows": month.usage_rows,
        "bytes": month.bytes,
        "obstacle": month.obstacle,
        "is_detached": month.is_detached,
    }


def _month_of(text: str) -> date:
    try:
        return datetime.strptime(text, "%Y-%m").replace(tzinfo=UTC).date()
    except ValueError:
        msg = f"{text!r} is no month: write 2026-01"
        raise argparse.ArgumentTypeError(msg) from None


def _row_text(row: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in row.items())
