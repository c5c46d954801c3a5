"""Old months: detached with their totals carried over, and left to be dumped.

A month goes only when nothing of it can change any more and it is sealed and audited
(`retention_obstacle` in schema.sql); the oldest goes first. Its tables stay in the schema, where
`pg_dump` finds them: dropping them is the operator's.
"""

from dataclasses import dataclass
from datetime import date

import psycopg
from psycopg.rows import TupleRow, class_row

from proxy.ids import uuid7

OBSTACLES = {
    "unknown_month": "it has no partition that is attached",
    "too_recent": "it ended less than 35 days ago, and late captures of it may still come",
    "not_oldest": "an older month goes first",
    "open_holds": "some request of it has not ended",
    "open_reviews": "some request of it waits for a review: `tallygate review list`",
    "misplaced_rows": "the default partitions have rows: `tallygate doctor`",
    "unaudited": "the newest audit found something, or there was none: `tallygate audit`",
    "unsealed": "some of its entries are not sealed: `tallygate audit --seal`",
    "not_rolled_up": "its usage is not summed up yet: the service does that while it runs",
    "busy": "a long report, a dump or a reprice is in the way: again later",
}


@dataclass(slots=True)
class Month:
    """A month that is attached, and what came of it."""

    month: date
    # As the statistics estimate it; -1 where they know nothing.
    entries: int
    usage_rows: int
    bytes: int
    # None where it can be detached; else one of OBSTACLES.
    obstacle: str | None
    is_detached: bool = False


def months(url: str, before: date) -> list[Month]:
    """List the attached months before that one, oldest first, and what stands against each."""
    with _connect(url) as connection, connection.cursor(row_factory=class_row(Month)) as cursor:
        cursor.execute(
            "SELECT m.month, e.reltuples::bigint AS entries, u.reltuples::bigint AS usage_rows,"
            " pg_total_relation_size(e.oid) + pg_total_relation_size(u.oid) AS bytes,"
            " retention_obstacle(m.month) AS obstacle"
            " FROM (SELECT to_date(substring(c.relname FROM 9), 'YYYY_MM') AS month, i.inhrelid"
            " FROM pg_inherits AS i INNER JOIN pg_class AS c ON i.inhrelid = c.oid"
            " WHERE i.inhparent = 'entries'::regclass"
            " AND c.relname ~ '^entries_[0-9]{4}_[0-9]{2}$') AS m"
            " INNER JOIN pg_class AS e ON m.inhrelid = e.oid"
            " INNER JOIN pg_class AS u ON u.oid = to_regclass("
            "'usage' || to_char(m.month, '_YYYY_MM'))"
            " WHERE m.month < %s ORDER BY m.month",
            (before,),
        )
        return cursor.fetchall()


def detach(url: str, before: date, *, actor: str) -> list[Month]:
    """Detach the months before that one, oldest first, as far as nothing stands against it."""
    planned = months(url, before)
    with _connect(url) as connection:
        for number, month in enumerate(planned):
            ((outcome,),) = connection.execute(
                "SELECT detach_month(%s, %s, %s)", (month.month, uuid7(), actor)
            ).fetchall()
            month.is_detached = outcome == "detached"
            month.obstacle = None if month.is_detached else outcome
            if not month.is_detached:
                for later in planned[number + 1 :]:
                    later.obstacle = "not_oldest"
                break
    return planned


def _connect(url: str) -> psycopg.Connection[TupleRow]:
    connection = psycopg.connect(
        url, autocommit=True, connect_timeout=10, application_name="tallygate retention"
    )
    connection.execute("SET search_path = tallygate, pg_temp")
    connection.execute("SET timezone = 'UTC'")
    return connection
