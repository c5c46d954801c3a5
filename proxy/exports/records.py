"""Records of a file, one at a time: memory does not grow with the file.

JSON may be a list of objects, objects one after the other, or pages `{"data": [...], ...}` as the
providers' APIs answer them, one after the other as well. Numbers with a fraction stay text.
"""

import csv
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import msgspec

from proxy.exports.lines import ExportError

Record = Mapping[str, Any]

MAX_RECORD_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 256 * 1024
_STRUCTURE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'["\\]')
_DELIMITERS = ",\t;"


@contextmanager
def open_records(path: Path) -> Generator[tuple[bool, Iterator[Record]]]:
    """Open a file; gives whether it is JSON, and its records. Raises ExportError and OSError."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        is_json = start[:1] in {b"{", b"["}
    if is_json:
        with path.open("rb") as file:
            yield True, _numbered(_json(file))
    else:
        with path.open(encoding="utf-8-sig", newline="") as text:
            yield False, _numbered(_csv(text))


def _numbered(records: Iterator[Record]) -> Iterator[Record]:
    """Say in an error behind which record it was."""
    number = 0
    while True:
        try:
            record = next(records)
        except StopIteration:
            return
        except ExportError as error:
            raise ExportError(f"after record {number}: {error}") from None
        number += 1
        yield record


def _csv(text: TextIO) -> Iterator[Record]:
    try:
        header = text.readline()
        delimiter = max(_DELIMITERS, key=header.count)
        columns = next(csv.reader([header], delimiter=delimiter), list[str]())
        names = [column.strip() for column in columns]
        if len(set(names)) < max(len(names), 2):
            raise ExportError("the first line of a CSV file must name its columns, each once")
        for row in csv.DictReader(text, names, delimiter=delimiter):
            if None in row:
                raise ExportError("a row has more columns than the header")
            yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ExportError(f"it is no CSV file in UTF-8: {error}") from None


def _json(file: BinaryIO) -> Iterator[Record]:
    # Money goes from text to integers, never by way of a float.
    decoder = msgspec.json.Decoder(dict[str, Any], float_hook=str)
    for text in json_objects(file):
        try:
            record = decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ExportError(f"it is not valid JSON: {error}") from None
        pages: object = record.get("data")
        if isinstance(pages, list) and "has_more" in record:
            # A list of pages; one that stands by itself is cut already.
            yield from cast("list[Record]", pages)
        else:
            yield record


def json_objects(file: BinaryIO) -> Iterator[bytes]:
    """Cut a file into the objects that are its records, without looking into them."""
    cutter = _Cutter()
    while chunk := file.read(_CHUNK_BYTES):
        yield from cutter.feed(chunk)
    cutter.close()


class _Cutter:
    """Follows brackets and strings; keeps the bytes of the object that it is in, and no others."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._at: int = 0
        self._depth = 0
        self._string_at: int | None = None
        self._last_string = b""
        # At which depth records begin, and where in the buffer the one that is open began.
        self._record_depth = 0
        self._record_at: int | None = None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Take more of the file; gives the records that it completes."""
        self._bytes += chunk
        while True:
            pattern = _STRUCTURE if self._string_at is None else _IN_STRING
            found = pattern.search(self._bytes, self._at)
            if found is None:
                self._at = max(self._at, len(self._bytes))
                break
            self._at = found.end()
            record = self._step(found.group(), found.start())
            if record is not None:
                yield record
        self._forget()

    def close(self) -> None:
        """The file is over; ExportError where it ends in the middle."""
        if self._depth or self._string_at is not None:
            raise ExportError("the file ends in the middle: export it again")

    def _step(self, sign: bytes, at: int) -> bytes | None:
        if self._string_at is not None:
            if sign == b"\\":
                self._at += 1  # whatever is escaped; it may be in the next chunk
            else:
                self._last_string = bytes(self._bytes[self._string_at + 1 : at])
                self._string_at = None
        elif sign == b'"':
            self._string_at = at
        elif sign in b"{[":
            self._open(sign, at)
        else:
            return self._close(at)
        return None

    def _open(self, sign: bytes, at: int) -> None:
        if sign == b"[":
            if self._depth == 0:
                self._record_depth = 1
            elif self._depth == 1 and self._record_depth == 0 and self._last_string == b"data":
                # The object is a page, and no record itself.
                self._record_depth, self._record_at = 2, None
        elif self._depth == self._record_depth and self._record_at is None:
            self._record_at = at
        self._depth += 1

    def _close(self, at: int) -> bytes | None:
        self._depth -= 1
        if self._depth < 0:
            raise ExportError("it is not valid JSON: a bracket closes what is not open")
        record = None
        if self._depth == self._record_depth and self._record_at is not None:
            record = bytes(self._bytes[self._record_at : at + 1])
            self._record_at = None
        if self._depth == 0:
            self._record_depth = 0
        elif self._depth == 1 and self._record_depth == 2:
            # The rest of a page: nothing in it is a record.
            self._record_depth = -1
        return record

    def _forget(self) -> None:
        kept = self._at if self._record_at is None else self._record_at
        if self._string_at is not None:
            kept = min(kept, self._string_at)
        kept = min(kept, len(self._bytes))
        if len(self._bytes) - kept > MAX_RECORD_BYTES:
            raise ExportError(f"a record is larger than {MAX_RECORD_BYTES} bytes")
        del self._bytes[:kept]
        self._at -= kept
        if self._record_at is not None:
            self._record_at -= kept
        if self._string_at is not None:
            self._string_at -= kept
