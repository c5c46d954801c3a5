"""Everything about an account as one zip archive, made while it is sent: memory stays flat.

Its files are JSON and JSON Lines in the shapes of the API. The customer's has what a customer sees:
no cost of a provider, no note of an operator.
"""

import asyncio
import functools
import io
import zipfile
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from proxy.api.exports import Download
from proxy.api.services import Services
from proxy.api.shapes import Row, Shapes, audit_event, utc
from proxy.ledger import Balance
from proxy.privacy import Snapshot

_Shape = Callable[[Row], Any]
# Rows in pages, and how each of them looks.
_List = tuple[AsyncIterator[Sequence[Row]], _Shape]

# Of the archive in one piece, about.
_CHUNK_BYTES = 64 * 1024
_PAGE = 500


class _Sink(io.RawIOBase):
    """Takes what zipfile writes, and can't be gone back in: as a socket."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        part = bytes(data)
        self._parts.append(part)
        self.size += len(part)
        return len(part)

    def take(self) -> bytes:
        """Return what was written since the last time."""
        data = b"".join(self._parts)
        self._parts.clear()
        self.size = 0
        return data


async def archive(
    services: Services, snapshot: Snapshot, account: Row, *, is_operators: bool
) -> AsyncGenerator[bytes]:
    """Yield the archive of an account in chunks; `account` is as `Accounts.account` has it.

    Money is as of the snapshot; keys and projects, which no sum is made of, as they are read.
    """
    shapes = Shapes(services.nanos_per_credit)
    lists = {
        **_descriptions(services, account["account_id"], shapes),
        **_money(snapshot, shapes, is_operators=is_operators),
    }
    sink = _Sink()
    rows: dict[str, int] = {}
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
        balance = await snapshot.balance()
        whole = {
            **shapes.account(account),
            "balance": shapes.balance(
                Balance(balance["posted"], balance["reserved"], balance["credit_limit"])
            ),
        }
        file.writestr("account.json", _json(whole))
        for name, (pages, shape) in lists.items():
            rows[name] = 0
            # It is not known before how large it gets.
            with file.open(name, "w", force_zip64=True) as entry:
                async for page in pages:
                    rows[name] += len(page)
                    # In a thread, because requests wait for the loop meanwhile.
                    await asyncio.to_thread(_write, entry.write, page, shape)
                    if sink.size >= _CHUNK_BYTES:
                        yield sink.take()
        told = {"account_id": account["account_id"], "created_at": datetime.now(UTC), "rows": rows}
        file.writestr("manifest.json", _json(told))
    yield sink.take()


def _descriptions(services: Services, account_id: UUID, shapes: Shapes) -> dict[str, _List]:
    keys = functools.partial(services.keys.keys, account_id)
    projects = functools.partial(services.projects.projects, account_id)
    return {
        "keys.jsonl": (_pages(keys, "key_id"), shapes.key),
        "projects.jsonl": (_pages(projects, "project_id"), shapes.project),
    }


def _money(snapshot: Snapshot, shapes: Shapes, *, is_operators: bool) -> dict[str, _List]:
    return {
        "usage.jsonl": (snapshot.usage(), shapes.admin_usage if is_operators else shapes.usage),
        "ledger.jsonl": (snapshot.entries(), shapes.admin_entry if is_operators else shapes.entry),
        "funding.jsonl": (
            snapshot.funding(),
            lambda row: _funding(row, shapes, is_operators=is_operators),
        ),
        "charges.jsonl": (snapshot.charges(), lambda row: _charge(row, shapes)),
        "recurring_charges.jsonl": (snapshot.recurring_charges(), _recurring),
        "audit_trail.jsonl": (snapshot.audit_trail(), audit_event if is_operators else _act),
    }


async def _pages(
    read: Callable[..., Awaitable[Sequence[Row]]], key: str
) -> AsyncGenerator[Sequence[Row]]:
    before: UUID | None = None
    while rows := await read(before=before, limit=_PAGE):
        yield rows
        before = rows[-1][key]


def _charge(row: Row, shapes: Shapes) -> dict[str, object]:
    return {**row, "price": shapes.money(row["price"])}


def _recurring(row: Row) -> dict[str, object]:
    return {
        **row,
        "starts_at": utc(row["starts_at"]),
        "ends_at": utc(row["ends_at"]),
        "created_at": utc(row["created_at"]),
    }


def _funding(row: Row, shapes: Shapes, *, is_operators: bool) -> dict[str, object]:
    notes = {"reason": row["reason"], "actor": row["actor"]} if is_operators else {}
    return {
        "entry_id": row["entry_id"],
        "created_at": utc(row["at"]),
        "kind": row["kind"],
        "amount": shapes.money(row["amount"]),
        "source": row["source"],
        "reference": row["external_id"],
        "expires_at": utc(row["expires_at"]),
        **notes,
    }


def _act(row: Row) -> dict[str, object]:
    return {"id": row["event_id"], "created_at": utc(row["at"]), "action": row["action"]}


def _write(write: Callable[[bytes], int], page: Sequence[Row], shape: _Shape) -> None:
    write(b"".join(msgspec.json.encode(shape(row)) + b"\n" for row in page))


def _json(document: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document)) + b"\n"


def download(services: Services, account: Row, *, is_operators: bool) -> Download:
    """Answer with the archive of an account; RateLimitError while others are under way."""
    services.privacy.begin()

    async def parts() -> AsyncGenerator[bytes]:
        try:
            async with services.privacy.snapshot(account["account_id"]) as snapshot:
                async for chunk in archive(services, snapshot, account, is_operators=is_operators):
                    yield chunk
        finally:
            services.privacy.end()

    return Download(
        parts(),
        media_type="application/zip",
        filename=f"account-{account['account_id']}.zip",
        stall_timeout_s=services.client_stall_timeout_s,
    )
