"""Whether what was sealed is what it was: the rows against their seals, these against kept lines.

Sealed rows don't change, so no snapshot is held: each page of points is a statement of its own.
"""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import DictRow, dict_row

from proxy.audit.archives import archived_months
from proxy.audit.findings import Finding
from proxy.db import read_login, set_local
from proxy.errors import ConfigurationError
from proxy.seals import Seal

# Of entries in a page, and of points.
PAGE_ENTRIES = 50_000
_PAGE_POINTS = 2_000
_MARK = 4
# A page's points lead to its entries, and these to their usage: by key, at every size.
_UNUSED = ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "material", "memoize")
_SETTINGS = {
    "statement_timeout": "0",
    "jit": "off",
    **{f"enable_{what}": "off" for what in _UNUSED},
}
_NIL = UUID(int=0)

_ROOTS: LiteralString = """
    SELECT
        s.number, s.sealed_at, s.root, s.previous, s.accounts, s.entries, p.points,
        lag(s.number, 1, 0) OVER walk AS number_before,
        lag(s.root, 1, ''::bytea) OVER walk AS root_before,
        coalesce(p.accounts, 0) AS accounts_found, coalesce(p.entries, 0) AS entries_found,
        seal_root(
            s.number, s.sealed_at, s.accounts, s.entries, s.previous, seal_content(s.number)
        ) AS root_expected
    FROM seals AS s
    LEFT JOIN LATERAL (
        SELECT
            count(*) AS points, count(DISTINCT q.account_id) AS accounts,
            sum(q.last_seq - q.first_seq + 1) AS entries
        FROM seal_points AS q WHERE q.number = s.number
    ) AS p ON true
    WINDOW walk AS (ORDER BY s.number) ORDER BY s.number
"""

_GAPS: LiteralString = """
    SELECT * FROM (
        SELECT
            p.account_id, p.number, p.first_seq, p.last_seq,
            lag(p.last_seq, 1, 0::bigint) OVER (PARTITION BY p.account_id ORDER BY p.last_seq)
            AS last_seq_before
        FROM seal_points AS p
    ) AS w WHERE w.first_seq <> w.last_seq_before + 1
"""

# An account that is gone has no balance to begin an incremental audit from.
_GONE: LiteralString = """
    SELECT p.account_id, max(p.last_seq) AS sealed_seq FROM seal_points AS p
    LEFT JOIN balances AS b ON p.account_id = b.account_id
    GROUP BY p.account_id, b.seq HAVING coalesce(b.seq, -1) < max(p.last_seq)
"""

_PAGE: LiteralString = """
    WITH points AS MATERIALIZED (
        SELECT p.account_id, p.first_seq, p.last_seq, p.number, p.digest
        FROM seal_points AS p
        WHERE (p.account_id, p.last_seq) > (%(account)s, %(seq)s) AND p.number <= %(through)s
        ORDER BY p.account_id, p.last_seq LIMIT %(points)s
    ),
    cut AS (
        SELECT
            p.*, f.seq AS floor_seq,
            sum(p.last_seq - p.first_seq + 1) OVER (
                ORDER BY p.account_id, p.last_seq
            ) - (p.last_seq - p.first_seq + 1) AS before
        FROM points AS p LEFT JOIN carried_floors AS f ON p.account_id = f.account_id
    ),
    taken AS MATERIALIZED (
        SELECT c.*, coalesce(NOT %(is_archived)s AND c.last_seq <= c.floor_seq, false) AS is_away
        FROM cut AS c WHERE c.before < %(entries)s
    )
    SELECT
        t.account_id, t.first_seq, t.last_seq, t.number, t.is_away, count(e.seq) AS found,
        sha256(string_agg(
            entry_leaf(ROW(e.*)::tallygate.entries, ROW(u.*)::tallygate.usage, u.cost_picos),
            ''::bytea ORDER BY e.seq
        )) = t.digest AS is_whole
    FROM taken AS t
    LEFT JOIN entries AS e
        ON NOT t.is_away AND t.account_id = e.account_id
        AND e.seq BETWEEN t.first_seq AND t.last_seq
    LEFT JOIN usage AS u
        ON e.kind IN ('capture', 'late_capture', 'correction')
        AND e.account_id = u.account_id AND e.request_id = u.request_id
    GROUP BY t.account_id, t.first_seq, t.last_seq, t.number, t.digest, t.is_away
    ORDER BY t.account_id, t.last_seq
"""

_POINT: LiteralString = """
    SELECT digest, marks, (SELECT f.seq FROM carried_floors AS f WHERE f.account_id = %(account)s)
        AS floor_seq,
        ARRAY(SELECT c.seq FROM carried_seams AS c WHERE c.account_id = %(account)s) AS seams
    FROM seal_points WHERE account_id = %(account)s AND last_seq = %(last)s
"""

# The second hash is that before an operator changed the price, where one did.
_LEAVES: LiteralString = """
    SELECT
        e.seq, e.request_id, e.kind,
        entry_leaf(ROW(e.*)::tallygate.entries, ROW(u.*)::tallygate.usage, u.cost_picos) AS leaf,
        entry_leaf(ROW(e.*)::tallygate.entries, ROW(u.*)::tallygate.usage, t.cost_picos) AS before
    FROM entries AS e
    LEFT JOIN usage AS u
        ON e.kind IN ('capture', 'late_capture', 'correction')
        AND e.account_id = u.account_id AND e.request_id = u.request_id
    LEFT JOIN LATERAL (
        SELECT (a.detail ->> 'cost_picos_before')::bigint AS cost_picos FROM audit_trail AS a
        WHERE u.resolution = 'reprice' AND a.account_id = u.account_id
            AND a.action = 'review.reprice' AND a.detail ->> 'request_id' = u.request_id::text
        LIMIT 1
    ) AS t ON true
    WHERE e.account_id = %(account)s AND e.seq BETWEEN %(first)s AND %(last)s
    ORDER BY e.seq
"""


@dataclass(slots=True)
class Sealed:
    """What a check of the seals looked at, and what it found."""

    findings: list[Finding] = field(default_factory=list[Finding])
    seals: int = 0
    entries: int = 0
    # Entries of detached months, whose rows are not here: only their hashes were looked at.
    entries_away: int = 0


def check_seals(
    url: str, *, kept: Sequence[Seal] = (), archives: Sequence[Path] | None = None
) -> Sealed:
    """Check that everything sealed is unchanged, and the seals are those that were `kept`.

    With `archives`, plain dumps of detached months, what they hold is checked too, and so are
    detached tables that are still there; this needs temporary tables, and so no standby. Raises
    ConfigurationError for a file that is no such dump.
    """
    with psycopg.Connection[DictRow].connect(
        url, connect_timeout=10, application_name="tallygate audit", row_factory=dict_row
    ) as connection:
        connection.autocommit = True
        connection.prepare_threshold = None  # a pooler may stand in between
        if archives is not None and read_login(connection).is_pooled:
            msg = "archives need a session of their own: check them past the connection pooler"
            raise ConfigurationError(msg)
        # Archives stand before the tables that they belong to.
        path = "tallygate, pg_temp" if archives is None else "pg_temp, tallygate"
        attached = (
            nullcontext(enter_result=False)
            if archives is None
            else archived_months(connection, archives)
        )
        with attached as is_archived:
            return _Check(connection, path, is_archived=is_archived).run(kept)


class _Check:
    def __init__(
        self, connection: psycopg.Connection[DictRow], path: str, *, is_archived: bool
    ) -> None:
        self._connection = connection
        self._settings = {**_SETTINGS, "search_path": path}
        # Whether the rows of every detached month are at hand.
        self._is_archived = is_archived
        self._sealed = Sealed()
        self._chain = Finding(
            "seals_chain", "each seal's root follows from what it covers and the seal before"
        )
        self._kept = Finding("seals_as_kept", "the seals are those that were kept elsewhere")
        self._points = Finding("seals_cover_all", "an account's seals cover its entries from 1 on")
        self._unchanged = Finding("sealed_entries_unchanged", "a sealed entry is as it was sealed")

    def run(self, kept: Sequence[Seal]) -> Sealed:
        roots = self._rows(_ROOTS)
        for row in roots:
            self._check_root(row)
        self._compare(roots, kept)
        self._points.checked = sum(row["points"] for row in roots)
        for row in (*self._rows(_GAPS), *self._rows(_GONE)):
            self._points.report(row)
        self._check_points(roots[-1]["number"] if roots else 0)
        self._sealed.seals = len(roots)
        self._sealed.entries = self._unchanged.checked
        self._sealed.findings = [self._chain, self._kept, self._points, self._unchanged]
        return self._sealed

    def _rows(self, query: LiteralString, **parameters: object) -> list[DictRow]:
        with self._connection.transaction():
            set_local(self._connection, self._settings)
            return self._connection.execute(query, parameters).fetchall()

    def _check_root(self, row: DictRow) -> None:
        self._chain.checked += 1
        problems = {
            "root": row["root"] != row["root_expected"],
            "previous": row["previous"] != row["root_before"],
            "number": row["number"] != row["number_before"] + 1,
            "accounts": row["accounts"] != row["accounts_found"],
            "entries": row["entries"] != row["entries_found"],
        }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            self._chain.report({"seal": row["number"], "wrong": ", ".join(wrong)})

    def _compare(self, roots: Sequence[DictRow], kept: Sequence[Seal]) -> None:
        here = {row["number"]: bytes(row["root"]).hex() for row in roots}
        for seal in kept:
            self._kept.checked += 1
            root = here.get(seal.number)
            if root != seal.root:
                self._kept.report({"seal": seal.number, "kept": seal.root, "here": root or "none"})

    def _check_points(self, through: int) -> None:
        account, seq = _NIL, 0
        while True:
            page = self._rows(
                _PAGE,
                account=account,
                seq=seq,
                through=through,
                points=_PAGE_POINTS,
                entries=PAGE_ENTRIES,
                is_archived=self._is_archived,
            )
            if not page:
                return
            for row in page:
                if row["is_away"]:
                    self._sealed.entries_away += row["last_seq"] - row["first_seq"] + 1
                elif row["is_whole"]:
                    self._unchanged.checked += row["found"]
                else:
                    self._look_closer(row)
            account, seq = page[-1]["account_id"], page[-1]["last_seq"]

    def _look_closer(self, point: DictRow) -> None:
        """Name the entries by which a point is not what it was."""
        parameters = {"account": point["account_id"], "last": point["last_seq"]}
        (stored,) = self._rows(_POINT, **parameters)
        leaves: dict[int, DictRow] = {}
        twice: set[int] = set()
        for row in self._rows(_LEAVES, **parameters, first=point["first_seq"]):
            if row["seq"] in leaves:
                twice.add(row["seq"])
            leaves[row["seq"]] = row
        away = set[int](() if self._is_archived else stored["seams"])
        floor = 0 if self._is_archived else stored["floor_seq"] or 0
        chosen: list[bytes] = []
        is_clean, is_whole = True, True
        for index, seq in enumerate(range(point["first_seq"], point["last_seq"] + 1)):
            row = leaves.get(seq)
            if row is None and (seq <= floor or seq in away):
                self._sealed.entries_away += 1
                is_whole = False
                continue
            self._unchanged.checked += 1
            mark = bytes(stored["marks"][_MARK * index : _MARK * (index + 1)])
            leaf = None if row is None else _fitting(row, mark)
            if seq in twice or leaf is None:
                problem = "deleted" if row is None else "twice" if seq in twice else "changed"
                self._unchanged.report({**_where(point), "seq": seq, **_what(row), "is": problem})
                is_clean = False
                continue
            chosen.append(leaf)
        if is_clean and is_whole and hashlib.sha256(b"".join(chosen)).digest() != stored["digest"]:
            self._unchanged.report(
                {
                    **_where(point),
                    "seq": f"{point['first_seq']} to {point['last_seq']}",
                    "is": "changed, and so are its marks",
                }
            )


def _fitting(row: DictRow, mark: bytes) -> bytes | None:
    """Return the hash that was sealed: of the row, or of what it was before it was repriced."""
    for name in ("leaf", "before"):
        leaf: bytes = bytes(row[name])
        if leaf[:_MARK] == mark:
            return leaf
    return None


def _where(point: DictRow) -> dict[str, Any]:
    return {"account_id": point["account_id"], "seal": point["number"]}


def _what(row: DictRow | None) -> dict[str, Any]:
    return {} if row is None else {"request_id": row["request_id"], "kind": row["kind"]}
