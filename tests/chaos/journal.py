"""Append-only records on disk: what was acknowledged to whom must outlive whoever saw it.

One JSON document a line, written in one call to a file opened for appending. A process that is
killed leaves whole lines behind, and at most nothing of the last one.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self


class Journal:
    """Writes records; several processes may share a file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def write(self, **record: object) -> None:
        """Have a record in the kernel's hands when this returns."""
        os.write(self._file, json.dumps(record, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


class Reader:
    """Reads what was added since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the records that are new and whole."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)

    def rewound(self) -> Self:
        """A reader of the whole file."""
        return type(self)(self._path)
