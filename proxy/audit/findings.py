"""What an audit finds, and how rows are read for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg.rows import DictRow, dict_row

MAX_EXAMPLES = 20
_STREAMED_ROWS = 2000


@dataclass(slots=True)
class Finding:
    """One invariant with what was found: how many rows were checked, how many break it."""

    name: str
    promise: str
    checked: int = 0
    violations: int = 0
    # The first rows that break it, with the values that show why.
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def report(self, row: Mapping[str, Any]) -> None:
        """Count a row that breaks the invariant, and keep it if it is among the first."""
        self.violations += 1
        if len(self.rows) < MAX_EXAMPLES:
            self.rows.append(dict(row))


def stream(
    connection: psycopg.Connection[Any],
    query: LiteralString,
    parameters: Mapping[str, object] | None = None,
) -> Iterator[DictRow]:
    """Read a query's rows without having them all in memory; needs a transaction."""
    with connection.cursor("audit", row_factory=dict_row) as cursor:
        cursor.itersize = _STREAMED_ROWS
        cursor.execute(query, parameters)
        yield from cursor
