"""Rows of detached months, put beside those that are kept for as long as an audit takes.

Temporary tables and views, which shadow the real ones by their names: whatever is asked about
entries and usage is then asked about all of them.
"""

import gzip
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.rows import DictRow

from proxy.errors import ConfigurationError

_COPY = re.compile(
    rb"COPY (?:\w+\.)?(?P<table>(?P<parent>entries|usage)_\d{4}_\d{2})"
    rb" \((?P<columns>[\w\", ]+)\) FROM stdin;\n"
)
_END = b"\\.\n"
_PARENTS = ("entries", "usage")


@contextmanager
def archived_months(
    connection: psycopg.Connection[DictRow], files: Sequence[Path]
) -> Generator[bool]:
    """Put detached tables and dumps beside what is kept; yields whether every month is there.

    `files` are what `pg_dump` writes in plain text, gzipped or not.
    """
    connection.execute("SET search_path = tallygate, pg_temp")
    tables: dict[str, sql.Composable] = {
        row["table"]: sql.Identifier("tallygate", row["table"])
        for row in connection.execute(
            "SELECT c.relname::text AS table FROM pg_class AS c"
            " WHERE c.relnamespace = 'tallygate'::regnamespace AND NOT c.relispartition"
            " AND c.relname ~ '^(entries|usage)_[0-9]{4}_[0-9]{2}$'"
        )
    }
    for file in files:
        for table in _load(connection, file):
            tables[table] = sql.Identifier("pg_temp", f"archived_{table}")
    for parent in _PARENTS:
        _shadow(connection, parent, {n: t for n, t in tables.items() if n.startswith(parent)})
    connection.execute("SET search_path = pg_temp, tallygate")
    missing = connection.execute(
        "SELECT p.parent || to_char(m.month, '_YYYY_MM') AS table"
        " FROM detached_months AS m, unnest(%s::text[]) AS p (parent)",
        (list(_PARENTS),),
    )
    try:
        yield all(row["table"] in tables for row in missing)
    finally:
        if not connection.closed:
            connection.execute("SET search_path = tallygate, pg_temp")
            connection.execute("DISCARD TEMP")


def _load(connection: psycopg.Connection[DictRow], file: Path) -> Iterator[str]:
    """Load the months that a dump holds; yields the names of their tables."""
    found = 0
    try:
        with _opened(file) as lines:
            for line in lines:
                match = _COPY.fullmatch(line)
                if match is None:
                    continue
                table, parent = match["table"].decode(), match["parent"].decode()
                _copy(connection, table, parent, match["columns"].decode(), lines)
                found += 1
                yield table
    except (OSError, EOFError) as error:
        msg = f"{file} can't be read: {error}"
        raise ConfigurationError(msg) from None
    if not found:
        msg = (
            f"{file} holds no month of entries or usage: dump the tables with"
            " pg_dump --data-only, in plain text"
        )
        raise ConfigurationError(msg)


def _opened(file: Path) -> BufferedIOBase:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")


def _copy(
    connection: psycopg.Connection[DictRow],
    table: str,
    parent: str,
    columns: str,
    lines: BufferedIOBase,
) -> None:
    target = sql.Identifier("pg_temp", f"archived_{table}")
    connection.execute(
        sql.SQL("CREATE TEMP TABLE {} (LIKE {})").format(
            sql.Identifier(f"archived_{table}"), sql.Identifier("tallygate", parent)
        )
    )
    names = sql.SQL(", ").join(
        sql.Identifier(name.strip().strip('"')) for name in columns.split(",")
    )
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(target, names)
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for line in lines:
            if line == _END:
                break
            copy.write(line)
    key = "seq" if parent == "entries" else "request_id"
    connection.execute(
        sql.SQL("CREATE INDEX ON {} (account_id, {})").format(target, sql.Identifier(key))
    )
    connection.execute(sql.SQL("ANALYZE {}").format(target))


def _shadow(
    connection: psycopg.Connection[DictRow], parent: str, tables: dict[str, sql.Composable]
) -> None:
    """Make a view of the parent's name, of it and its detached months.

    A month that was detached before a column was added has none such.
    """
    columns = [
        row["name"]
        for row in connection.execute(
            "SELECT attname::text AS name FROM pg_attribute"
            " WHERE attrelid = ('tallygate.' || %s)::regclass AND attnum > 0 AND NOT attisdropped"
            " ORDER BY attnum",
            (parent,),
        )
    ]
    parts: list[sql.Composable] = [_selection(columns, sql.Identifier("tallygate", parent))]
    for table in tables.values():
        there = {
            row["name"]
            for row in connection.execute(
                "SELECT attname::text AS name FROM pg_attribute"
                " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
                (table.as_string(connection),),
            )
        }
        parts.append(_selection([name if name in there else None for name in columns], table))
    connection.execute(
        sql.SQL("CREATE TEMP VIEW {} AS {}").format(
            sql.Identifier(parent), sql.SQL(" UNION ALL ").join(parts)
        )
    )


def _selection(columns: Sequence[str | None], table: sql.Composable) -> sql.Composable:
    # The first part of a union names the columns and gives them their types.
    names = sql.SQL(", ").join(
        sql.SQL("NULL") if name is None else sql.Identifier(name) for name in columns
    )
    return sql.SQL("SELECT {} FROM {}").format(names, table)
