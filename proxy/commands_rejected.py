"""`tallygate rejected`: settlements that the ledger did not take, from a shell."""

# ruff: noqa: PLC0415 - no command pays for the imports of the others.

import argparse
import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from proxy.set_aside import Aside, Posted
    from proxy.spool import Spool

_ACTOR = "cli"
_TIMEOUT_S = 10.0

Show = Callable[[argparse.Namespace, object, Iterable[str]], None]
Lines = Callable[[Mapping[str, Any]], list[str]]


def add_rejected(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    add: Callable[..., argparse.ArgumentParser],
    *,
    database_url: Callable[[Any], str],
    show: Show,
    lines: Lines,
    complain: Callable[[str, int], int],
) -> None:
    """Register the commands; the rest is how `cli` makes one."""

    def command(
        act: Callable[[argparse.Namespace, Any, "Spool", list["Aside"]], tuple[object, int]],
    ) -> Callable[[argparse.Namespace, Any], int]:
        def run(arguments: argparse.Namespace, settings: Any) -> int:  # noqa: ANN401 - cli's
            from proxy.set_aside import read_aside
            from proxy.spool import Spool

            directory = settings.data_dir / "spool"
            # Looking must not make it: it would belong to whoever looks.
            spool = Spool(directory) if directory.is_dir() else None
            wanted: Sequence[UUID] = getattr(arguments, "request_id", ())
            kept: list[Aside] = [] if spool is None else read_aside(spool)
            asides = [
                aside for aside in kept if not wanted or aside.settlement.request_id in wanted
            ]
            missing = set(wanted) - {aside.settlement.request_id for aside in asides}
            if missing:
                return complain(f"no settlement of {missing.pop()} was set aside", 1)
            document: dict[str, object] = {"data": []}
            code = 0
            if spool is not None:
                document["data"], code = act(arguments, settings, spool, asides)
            show(arguments, document, lines(document))
            return code

        return run

    def post(
        _arguments: argparse.Namespace,
        settings: Any,  # noqa: ANN401 - cli's
        spool: "Spool",
        asides: list["Aside"],
    ) -> tuple[object, int]:
        posted = asyncio.run(_post(database_url(settings), spool, asides))
        rows = [
            {**_row(done.settlement), "outcome": done.outcome, "detail": done.detail}
            for done in posted
        ]
        return rows, 0 if all(done.is_done for done in posted) else 1

    group = commands.add_parser(
        "rejected", help="settlements that the ledger did not take"
    ).add_subparsers(required=True, metavar="COMMAND")
    add(group, "list", command(_list), "show what was set aside")
    posting = add(group, "post", command(post), "post what was set aside, all of it or these")
    posting.add_argument("request_id", nargs="*", type=UUID)
    dropping = add(group, "drop", command(_drop), "give these up: nobody is charged for them")
    dropping.add_argument("request_id", nargs="+", type=UUID)


def _list(
    _arguments: argparse.Namespace, _settings: object, _spool: "Spool", asides: list["Aside"]
) -> tuple[object, int]:
    return [_row(aside.settlement) for aside in asides], 0


def _drop(
    _arguments: argparse.Namespace, _settings: object, spool: "Spool", asides: list["Aside"]
) -> tuple[object, int]:
    for aside in asides:
        spool.forget_rejected(aside.payload)
    return [_row(aside.settlement) for aside in asides], 0


def _row(settlement: Any) -> dict[str, object]:  # noqa: ANN401 - imported where it is needed
    from pricing.money import usd_text

    return {
        "account_id": settlement.account_id,
        "request_id": settlement.request_id,
        "action": settlement.action,
        "model": settlement.model_answered,
        "price_usd": None if settlement.price is None else usd_text(settlement.price),
    }


async def _post(url: str, spool: "Spool", asides: Sequence["Aside"]) -> list["Posted"]:
    from proxy.db import Session, make_pool, require_schema
    from proxy.ledger import Ledger
    from proxy.set_aside import SetAside

    require_schema(url)
    session = Session(url, timeout_s=_TIMEOUT_S)
    async with make_pool(url, max_size=1) as pool:
        ledger = Ledger(url, pool, timeout_s=_TIMEOUT_S)
        try:
            return await SetAside(spool, session, pool, ledger).post(asides, actor=_ACTOR)
        finally:
            await ledger.close()
            await session.close()
