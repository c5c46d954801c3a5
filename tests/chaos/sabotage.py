"""Copies of the service with a guarantee taken out, to see that the judge notices."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.support.service import ROOT

_SETTLE = "await self._settler.settle(settlement)"
_RESPOND = "        await call.exchange.respond(_OK, body, headers)\n"


@dataclass(frozen=True)
class Sabotage:
    """What is done to one file of a copy; every text must be in it."""

    file: str
    changes: tuple[tuple[str, str], ...]


SABOTAGES = {
    # As most proxies do: the answer leaves, and is charged a moment later.
    "settle-after-answering": Sabotage(
        "proxy/relay.py",
        (
            (f"        {_SETTLE}\n        call.repeat.charged()\n", ""),
            (_RESPOND, f"{_RESPOND}        await asyncio.sleep(0.3)\n        {_SETTLE}\n"),
        ),
    ),
    # The spool says that it has what the disk was never given.
    "forgetful-spool": Sabotage(
        "proxy/spool.py", (("view = view[os.write(file, view) :]", "view = view[len(view) :]"),)
    ),
    # A settlement that is sent again is taken for a new one.
    "settle-twice": Sabotage(
        "schema.sql",
        (
            (
                "WHEN v_item.action = 'expire' OR v_entry.kind = 'capture' THEN false",
                "WHEN v_item.action = 'expire' THEN false",
            ),
            ("v_is_due := v_usage.status = 'needs_review' AND", "v_is_due :="),
            ("ELSE v_entry.kind = 'expire' AND v_usage.review_reason = 'orphaned'", "ELSE true"),
        ),
    ),
    # Holds are placed whatever is left.
    "admit-anything": Sabotage(
        "schema.sql",
        (
            ("IF p_amount > 0 AND p_state.held + p_amount > p_available THEN", "IF false THEN"),
            ("CHECK (posted - reserved + credit_limit + overdraft >= 0)", "CHECK (true)"),
        ),
    ),
}


def copy_with(sabotage: Sabotage, directory: Path) -> Path:
    """Make a copy of the service in a directory, sabotaged; returns the directory."""
    for package in ("proxy", "pricing"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, directory / package, ignore=ignored)
    for name in ("schema.sql", "config.yaml"):
        shutil.copy(ROOT / name, directory / name)
    path = directory / sabotage.file
    text = path.read_text()
    for old, new in sabotage.changes:
        if text.count(old) != 1:
            msg = f"{sabotage.file} has {old!r} {text.count(old)} times"
            raise ValueError(msg)
        text = text.replace(old, new)
    path.write_text(text)
    return directory
