"""Downloads of any size in constant memory: rows in short reads, each sent before the next.

No transaction spans two reads, so an export holds up nobody; ledger entries never change, and of
usage each row is what it was when it was read. CSV is that of RFC 4180 with a line of names. A cell
of text that a spreadsheet would take for a formula begins with an apostrophe.
"""

import asyncio
import csv
import io
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, get_args, get_type_hints

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.api.answers import Cost, Counts, Money
from proxy.api.operations import Parameter
from proxy.errors import InvalidRequestError

# Of rows in a read: some milliseconds of this process, which has requests to serve beside.
PART = 250
FORMATS = ("csv", "jsonl")
MEDIA_TYPES = ("text/csv", "application/jsonl")
FORMAT = Parameter(
    name="format",
    schema={"type": "string", "enum": list(FORMATS), "default": "csv"},
    summary="CSV with a line of names, or a JSON object a line.",
)

# What a spreadsheet reads as the beginning of a formula.
_FORMULA = re.compile(r"[=+\-@\t\r]")

Shape = Mapping[str, Any]


def format_in(request: Request, known: Sequence[str] = FORMATS) -> str:
    """Read which format is wanted, the first if none is named; InvalidRequestError."""
    asked = request.query_params.get("format", known[0])
    if asked not in known:
        raise InvalidRequestError(f"format must be {' or '.join(known)}.", param="format")
    return asked


class Table:
    """Rows of one type as lines of CSV. Money has two columns, costs one, counts one each."""

    def __init__(self, row: type) -> None:
        self._columns: list[tuple[str, Callable[[Shape], object]]] = []
        for name, hint in get_type_hints(row).items():
            kinds = {hint, *get_args(hint)}
            if Counts in kinds:
                for count in Counts.__annotations__:
                    self._columns.append((count, _member(name, count)))
            elif Money in kinds:
                self._columns.append((f"{name}_credits", _member(name, "credits")))
                self._columns.append((f"{name}_usd", _member(name, "usd")))
            elif Cost in kinds:
                self._columns.append((f"{name}_usd", _member(name, "usd")))
            else:
                self._columns.append((name, _cell_of(name)))

    @property
    def header(self) -> bytes:
        """The first line."""
        return csv_lines([[name for name, _ in self._columns]])

    def lines(self, rows: Iterable[Shape]) -> bytes:
        """Write rows as lines."""
        return csv_lines([[cell(row) for _, cell in self._columns] for row in rows])


def csv_lines(rows: Iterable[Sequence[object]]) -> bytes:
    """Write cells as lines of CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue().encode()


def json_lines(rows: Iterable[Shape]) -> bytes:
    """Write rows as JSON objects, one a line."""
    return b"".join(msgspec.json.encode(row) + b"\n" for row in rows)


def text_cell(value: object) -> object:
    """Turn a value into a cell; a text can't be taken for a formula."""
    match value:
        case None:
            return ""
        case bool():
            return "true" if value else "false"
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case date():
            return value.isoformat()
        case str() if _FORMULA.match(value):
            return f"'{value}"
        case _:
            return value


def _cell_of(name: str) -> Callable[[Shape], object]:
    return lambda row: text_cell(row[name])


def _member(name: str, member: str) -> Callable[[Shape], object]:
    # Numbers and amounts, which no customer writes: a negative one stays a number.
    return lambda row: "" if row[name] is None or row[name][member] is None else row[name][member]


class Download(Response):
    """An answer whose parts are made while it is sent.

    A client that leaves, or that takes nothing for the stall timeout, ends the work: what it has is
    cut off, which it can tell from the missing last chunk.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes],
        *,
        media_type: str,
        filename: str,
        stall_timeout_s: float,
    ) -> None:
        super().__init__(
            headers={
                "content-disposition": f'attachment; filename="{filename}"',
                "cache-control": "no-store",
            },
            media_type=media_type,
        )
        # Nobody knows how long it will be.
        del self.headers["content-length"]
        self._parts = parts
        self._stall_timeout_s = stall_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, as ASGI has it."""
        first = await anext(self._parts, b"")  # fails before the answer has begun, if at all
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        watch = asyncio.create_task(_gone(receive))
        try:
            if scope["method"] == "HEAD" or await self._send_all(first, send, watch):
                await send({"type": "http.response.body", "body": b""})
        finally:
            watch.cancel()
            await self._parts.aclose()

    async def _send_all(self, first: bytes, send: Send, watch: asyncio.Task[None]) -> bool:
        """Send every part; False where the client has gone or stalls."""
        if not await self._is_taken(first, send):
            return False
        async for part in self._parts:
            if watch.done() or not await self._is_taken(part, send):
                return False
        return True

    async def _is_taken(self, part: bytes, send: Send) -> bool:
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except TimeoutError:
            return False
        return True


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
