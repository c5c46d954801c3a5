"""`tallygate audit`: every invariant of the ledger, checked against the rows themselves.

Reads one snapshot and changes nothing, so it may run beside a busy service. Invariants that compare
rows are a query each, whose result is the rows that break it; the prices are computed once more in
Python, by the code that made them, from usage and price book as they are stored. Results are
streamed: memory does not grow with the ledger.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import DictRow, dict_row

from pricing.errors import PricingError
from pricing.markup import Charge, byok_charge, charge
from pricing.money import PICOS_PER_NANO
from pricing.price_book import Markup, PriceBook, Rule, parse_price_book
from pricing.usage import Usage

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


@dataclass(frozen=True, slots=True)
class _Invariant:
    """`checked` counts the rows that it speaks of; `broken` selects those that break it."""

    name: str
    promise: str
    checked: LiteralString
    broken: LiteralString


_ENTRIES: LiteralString = "SELECT count(*) FROM entries"
_ACCOUNTS: LiteralString = "SELECT count(*) FROM balances"
_TRANSACTIONS: LiteralString = (
    "SELECT (SELECT count(*) FROM entries WHERE posted_delta <> 0)"
    " + (SELECT count(*) FROM usage WHERE cost_picos > 0 AND NOT byok)"
)

INVARIANTS = (
    _Invariant(
        "sequence_without_gaps",
        "an account's entries are numbered 1, 2, 3 …",
        _ENTRIES,
        """
        SELECT * FROM (
            SELECT
                e.account_id, e.request_id, e.kind, e.seq,
                lag(e.seq, 1, 0::bigint) OVER (PARTITION BY e.account_id ORDER BY e.seq) AS previous
            FROM entries AS e
        ) AS s
        WHERE s.seq <> s.previous + 1
        """,
    ),
    _Invariant(
        "sequence_ends_at_balance",
        "the balance counts every entry, the last one included",
        _ACCOUNTS,
        """
        SELECT account_id, b.seq AS balance_seq, e.seq AS last_seq
        FROM balances AS b
        FULL JOIN (SELECT account_id, max(seq) AS seq FROM entries GROUP BY account_id) AS e
            USING (account_id)
        WHERE b.seq IS DISTINCT FROM coalesce(e.seq, 0)
        """,
    ),
    _Invariant(
        "running_balances_chain",
        "each entry's balance is the one before plus its own delta",
        _ENTRIES,
        """
        SELECT * FROM (
            SELECT
                e.account_id, e.request_id, e.kind, e.seq,
                e.posted_after, lag(e.posted_after, 1, 0::bigint) OVER walk + e.posted_delta
                AS posted_expected,
                e.reserved_after, lag(e.reserved_after, 1, 0::bigint) OVER walk + e.reserved_delta
                AS reserved_expected
            FROM entries AS e
            WINDOW walk AS (PARTITION BY e.account_id ORDER BY e.seq)
        ) AS s
        WHERE s.posted_after <> s.posted_expected OR s.reserved_after <> s.reserved_expected
        """,
    ),
    _Invariant(
        "balances_equal_journal",
        "posted and reserved are the sums of the entries' deltas",
        _ACCOUNTS,
        """
        SELECT
            account_id, b.posted, coalesce(e.posted, 0) AS posted_in_entries,
            b.reserved, coalesce(e.reserved, 0) AS reserved_in_entries
        FROM balances AS b
        FULL JOIN (
            SELECT account_id, sum(posted_delta) AS posted, sum(reserved_delta) AS reserved
            FROM entries GROUP BY account_id
        ) AS e USING (account_id)
        WHERE b.posted IS DISTINCT FROM coalesce(e.posted, 0)
            OR b.reserved IS DISTINCT FROM coalesce(e.reserved, 0)
        """,
    ),
    _Invariant(
        "reserved_equals_open_holds",
        "what is reserved is the sum of the open holds",
        _ACCOUNTS,
        """
        SELECT account_id, b.reserved, coalesce(h.amount, 0) AS open_holds
        FROM balances AS b
        FULL JOIN (
            SELECT account_id, sum(amount) AS amount FROM open_holds GROUP BY account_id
        ) AS h USING (account_id)
        WHERE b.reserved IS DISTINCT FROM coalesce(h.amount, 0)
        """,
    ),
    _Invariant(
        "holds_end_once",
        "a hold is open, or it ended in exactly one capture, void or expiry",
        "SELECT count(*) FROM entries WHERE kind = 'hold'",
        """
        SELECT
            account_id, request_id, e.hold, o.amount AS open_hold, coalesce(e.endings, 0) AS endings
        FROM (
            SELECT
                account_id, request_id, max(amount) FILTER (WHERE kind = 'hold') AS hold,
                count(*) FILTER (WHERE kind = 'hold') AS holds,
                count(*) FILTER (WHERE kind IN ('capture', 'void', 'expire')) AS endings
            FROM entries WHERE kind IN ('hold', 'capture', 'void', 'expire')
            GROUP BY account_id, request_id
        ) AS e
        FULL JOIN open_holds AS o USING (account_id, request_id)
        WHERE e.holds IS DISTINCT FROM 1
            OR e.endings + (o.amount IS NOT NULL)::integer <> 1
            OR o.amount <> e.hold
        """,
    ),
    _Invariant(
        "endings_release_their_hold",
        "a capture, void or expiry gives back the whole of its hold",
        "SELECT count(*) FROM entries WHERE kind IN ('capture', 'void', 'expire')",
        """
        SELECT t.account_id, t.request_id, t.kind, t.seq, t.reserved_delta, h.amount AS hold
        FROM entries AS t
        LEFT JOIN entries AS h
            ON t.account_id = h.account_id AND t.request_id = h.request_id AND h.kind = 'hold'
        WHERE t.kind IN ('capture', 'void', 'expire')
            AND (h.amount IS NULL OR t.reserved_delta <> -h.amount OR h.reserved_delta <> h.amount)
        """,
    ),
    _Invariant(
        "late_captures_follow_expiry",
        "a late capture stands only behind the expiry of its hold",
        "SELECT count(*) FROM entries WHERE kind = 'late_capture'",
        """
        SELECT l.account_id, l.request_id, l.seq, x.seq AS expired_at_seq
        FROM entries AS l
        LEFT JOIN entries AS x
            ON l.account_id = x.account_id AND l.request_id = x.request_id AND x.kind = 'expire'
        WHERE l.kind = 'late_capture' AND (x.seq IS NULL OR x.seq > l.seq)
        """,
    ),
    _Invariant(
        "captures_equal_usage",
        "every capture has a usage row with its price, every priced usage row its capture",
        "SELECT (SELECT count(*) FROM entries WHERE kind IN ('capture', 'late_capture'))"
        " + (SELECT count(*) FROM usage WHERE status IN ('billed', 'byok'))",
        """
        SELECT account_id, request_id, c.kind, -c.posted_delta AS captured, u.status, u.price
        FROM (SELECT * FROM entries WHERE kind IN ('capture', 'late_capture')) AS c
        FULL JOIN (SELECT * FROM usage WHERE status IN ('billed', 'byok')) AS u
            USING (account_id, request_id)
        WHERE u.price IS DISTINCT FROM -c.posted_delta OR u.price IS DISTINCT FROM c.amount
        """,
    ),
    _Invariant(
        "usage_agrees_with_journal",
        "a usage row's status is what the entries of its request say, its hold what was held",
        "SELECT count(*) FROM usage",
        """
        SELECT account_id, request_id, u.status, u.byok, u.hold, e.kinds, e.hold AS held
        FROM usage AS u
        FULL JOIN (
            SELECT
                account_id, request_id, array_agg(kind ORDER BY phase) AS kinds,
                max(amount) FILTER (WHERE kind = 'hold') AS hold,
                bool_or(kind = 'capture') AS captured, bool_or(kind = 'void') AS voided,
                bool_or(kind = 'expire') AS expired, bool_or(kind = 'late_capture') AS late
            FROM entries
            WHERE kind IN ('hold', 'capture', 'void', 'expire', 'late_capture')
            GROUP BY account_id, request_id
        ) AS e USING (account_id, request_id)
        WHERE (u.request_id IS NULL AND (e.captured OR e.voided OR e.expired OR e.late))
            OR (
                u.request_id IS NOT NULL AND (
                    e.hold IS DISTINCT FROM u.hold
                    OR (u.status = 'byok' AND NOT u.byok) OR (u.status = 'billed' AND u.byok)
                    OR coalesce(
                        CASE
                            WHEN e.captured OR e.late THEN u.status NOT IN ('billed', 'byok')
                            WHEN e.voided OR e.expired
                            THEN u.status NOT IN ('void', 'needs_review')
                        END,
                        true
                    )
                )
            )
        """,
    ),
    _Invariant(
        "no_overspend",
        "available is below zero by nothing but the overdraft that is booked",
        _ACCOUNTS,
        """
        SELECT
            b.account_id, b.posted, b.reserved, b.credit_limit, b.overdraft,
            b.posted - b.reserved + b.credit_limit AS available
        FROM balances AS b
        WHERE b.posted - b.reserved + b.credit_limit + b.overdraft < 0
            OR b.overdraft <> greatest(0, -(b.posted - b.reserved + b.credit_limit))
        """,
    ),
    _Invariant(
        "holds_within_available",
        "no hold took more than was available when it was placed",
        "SELECT count(*) FROM entries WHERE kind = 'hold' AND amount > 0",
        """
        SELECT
            e.account_id, e.request_id, e.seq, e.amount, e.posted_after, e.reserved_after,
            b.credit_limit
        FROM entries AS e
        INNER JOIN balances AS b ON e.account_id = b.account_id
        WHERE e.kind = 'hold' AND e.amount > 0
            AND e.posted_after - e.reserved_after + b.credit_limit < 0
        """,
    ),
    _Invariant(
        "funding_equals_entries",
        "every deposit, grant, refund, adjustment and reversal has its entry of the same amount",
        "SELECT (SELECT count(*) FROM funding) + (SELECT count(*) FROM entries WHERE kind IN"
        " ('deposit', 'grant', 'refund', 'adjustment', 'reversal'))",
        """
        SELECT
            account_id, f.source, f.external_id, f.kind AS funding_kind, f.amount AS funding_amount,
            request_id AS entry_id, e.kind AS entry_kind, e.posted_delta AS entry_amount
        FROM (SELECT *, entry_id AS request_id FROM funding) AS f
        FULL JOIN (
            SELECT * FROM entries
            WHERE kind IN ('deposit', 'grant', 'refund', 'adjustment', 'reversal')
        ) AS e USING (account_id, request_id)
        WHERE f.kind IS DISTINCT FROM e.kind OR f.amount IS DISTINCT FROM e.posted_delta
            OR f.amount IS DISTINCT FROM e.amount
        """,
    ),
    _Invariant(
        "double_entry_balances",
        "each transaction's debits equal its credits",
        _TRANSACTIONS,
        """
        SELECT d.account_id, d.transaction_id, sum(d.debit) AS debit, sum(d.credit) AS credit
        FROM double_entry AS d
        GROUP BY d.account_id, d.transaction_id
        HAVING sum(d.debit) <> sum(d.credit)
        """,
    ),
    _Invariant(
        "liability_equals_balances",
        "what the books say we owe an account is its posted balance",
        _ACCOUNTS,
        """
        SELECT account_id, b.posted, coalesce(d.liability, 0) AS liability
        FROM balances AS b
        FULL JOIN (
            SELECT account_id, sum(credit - debit) AS liability
            FROM double_entry WHERE book = 'customer_liability' GROUP BY account_id
        ) AS d USING (account_id)
        WHERE b.posted IS DISTINCT FROM coalesce(d.liability, 0)
        """,
    ),
    _Invariant(
        "key_counters_equal_open_holds",
        "a key's counters of holds and reserved money are those of its open holds",
        "SELECT count(*) FROM key_counters",
        """
        SELECT
            account_id, key_id, c.holds, coalesce(h.holds, 0) AS open_holds,
            c.reserved, coalesce(h.amount, 0) AS open_amount
        FROM key_counters AS c
        FULL JOIN (
            -- The holds of a key without limits are not counted, and have no minute.
            SELECT account_id, key_id, count(*) AS holds, sum(amount) AS amount
            FROM open_holds WHERE minute IS NOT NULL GROUP BY account_id, key_id
        ) AS h USING (account_id, key_id)
        WHERE c.holds IS DISTINCT FROM coalesce(h.holds, 0)
            OR c.reserved IS DISTINCT FROM coalesce(h.amount, 0)
        """,
    ),
    _Invariant(
        "journal_is_append_only",
        "the service's role can change no table, and a trigger refuses changes of the journal",
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'tallygate'::regnamespace"
        " AND relkind IN ('r', 'p')",
        """
        WITH role AS (SELECT * FROM pg_roles WHERE rolname = 'tallygate_app'),
        tables AS (
            SELECT c.oid, c.relname, coalesce(parent.relname, c.relname) AS root
            FROM pg_class AS c
            LEFT JOIN pg_inherits AS i ON c.oid = i.inhrelid
            LEFT JOIN pg_class AS parent ON i.inhparent = parent.oid
            WHERE c.relnamespace = 'tallygate'::regnamespace AND c.relkind IN ('r', 'p')
        )
        SELECT t.relname AS object, 'tallygate_app has ' || p.privilege AS problem
        FROM tables AS t, role AS r, unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE'])
            AS p (privilege)
        WHERE CASE
            WHEN p.privilege IN ('INSERT', 'UPDATE')
            THEN has_any_column_privilege(r.oid, t.oid, p.privilege)
            ELSE has_table_privilege(r.oid, t.oid, p.privilege)
        END
        UNION ALL
        SELECT 'tallygate_app', 'is a superuser or a member of tallygate_owner' FROM role AS r
        WHERE r.rolsuper OR pg_has_role(r.oid, 'tallygate_owner', 'MEMBER')
        UNION ALL
        SELECT 'tallygate_app', 'there is no such role' WHERE NOT EXISTS (SELECT 1 FROM role)
        UNION ALL
        SELECT t.relname, 'no enabled trigger refuses UPDATE and DELETE'
        FROM tables AS t
        WHERE t.root IN ('entries', 'audit_trail', 'price_books') AND NOT EXISTS (
            SELECT 1 FROM pg_trigger AS g
            WHERE g.tgrelid = t.oid AND g.tgfoid = to_regproc('tallygate.refuse_change')
                AND g.tgenabled IN ('O', 'A')
                -- BEFORE each ROW, on UPDATE and DELETE (catalog/pg_trigger.h).
                AND g.tgtype & 27 = 27
        )
        """,
    ),
)


def audit(url: str) -> list[Finding]:
    """Check every invariant in one snapshot. Raises psycopg's errors where the database is away."""
    with psycopg.connect(url, connect_timeout=10, application_name="tallygate audit") as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        connection.execute("SET LOCAL search_path = tallygate, pg_temp")
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        connection.execute("SET LOCAL jit = off")
        findings = [_check(connection, invariant) for invariant in INVARIANTS]
        return [*findings, *_check_prices(connection)]


def _check(connection: psycopg.Connection[Any], invariant: _Invariant) -> Finding:
    ((checked,),) = connection.execute(invariant.checked).fetchall()
    finding = Finding(invariant.name, invariant.promise, checked=checked)
    for broken in _stream(connection, invariant.broken):
        finding.report(broken)
    return finding


def _stream(connection: psycopg.Connection[Any], query: LiteralString) -> Iterator[DictRow]:
    with connection.cursor("audit", row_factory=dict_row) as cursor:
        cursor.itersize = _STREAMED_ROWS
        cursor.execute(query)
        yield from cursor


# -------------------------------------------------------------------------------------------------
# Prices
# -------------------------------------------------------------------------------------------------

_TOKEN_COLUMNS = tuple(Usage.__slots__)
_PRICED_USAGE: LiteralString = """
    SELECT
        account_id, request_id, tier, model, byok, status, input_tokens, cached_input_tokens,
        cache_creation_tokens, cache_creation_1h_tokens, output_tokens, reasoning_tokens,
        audio_input_tokens, audio_output_tokens, image_input_tokens, image_output_tokens, images,
        cost_picos, price, rounding_attos, rule, markup_ppm, price_version
    FROM usage WHERE price IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class _Book:
    book: PriceBook
    nanos_per_credit: int


def _check_prices(connection: psycopg.Connection[Any]) -> Iterable[Finding]:
    """Compute every charge once more from its usage and the version of the price book it names."""
    recomputed = Finding(
        "charges_recompute",
        "price, rounding, rule and markup follow from usage, cost and the price book's version",
    )
    covered = Finding(
        "prices_cover_costs", "no price is below the cost unless its rule allows a loss"
    )
    books = _price_books(connection)
    for row in _stream(connection, _PRICED_USAGE):
        found = books.get(row["price_version"])
        rule = None
        recomputed.checked += 1
        if isinstance(found, _Book):
            rule = found.book.select(str(row["account_id"]), row["tier"], row["model"])
            problem = _difference(row, rule, found.nanos_per_credit)
        else:
            problem = {"error": found or "there is no such version of the price book"}
        if problem:
            recomputed.report({**_identity(row), **problem})
        if row["status"] == "billed":
            covered.checked += 1
            may_lose = rule is not None and rule.allow_loss
            cost_picos: int | None = row["cost_picos"]
            # Without a cost nothing shows that the price covers it.
            is_covered = cost_picos is not None and row["price"] * PICOS_PER_NANO >= cost_picos
            if not (may_lose or is_covered):
                covered.report({**_identity(row), "cost_picos": cost_picos})
    return recomputed, covered


def _price_books(connection: psycopg.Connection[Any]) -> dict[int, _Book | str]:
    """Read every version; in place of one that can't be read stands the reason."""
    books: dict[int, _Book | str] = {}
    for row in _stream(connection, "SELECT version, document, nanos_per_credit FROM price_books"):
        try:
            books[row["version"]] = _Book(
                parse_price_book(row["document"]), row["nanos_per_credit"]
            )
        except PricingError as error:
            books[row["version"]] = f"its price book can't be read: {error}"
    return books


def _difference(row: DictRow, rule: Rule, nanos_per_credit: int) -> dict[str, Any]:
    """Return each value of the charge that is not what it should be; empty if all are."""
    try:
        expected = _charge(row, rule, nanos_per_credit)
    except PricingError as error:
        return {"error": f"it can't be priced: {error}"}
    is_markup = isinstance(rule.terms, Markup) and not row["byok"]
    values = {
        "price": expected.price_nanos,
        "rounding_attos": expected.rounding_attos,
        "rule": expected.rule,
        "markup_ppm": rule.terms.factor_ppm
        if is_markup and isinstance(rule.terms, Markup)
        else None,
    }
    wrong = {name: value for name, value in values.items() if row[name] != value}
    return {name: row[name] for name in wrong} | {
        f"{name}_expected": value for name, value in wrong.items()
    }


def _charge(row: DictRow, rule: Rule, nanos_per_credit: int) -> Charge:
    cost_picos: int | None = row["cost_picos"]
    if row["byok"]:
        return byok_charge(rule, cost_picos=cost_picos, nanos_per_credit=nanos_per_credit)
    usage = None
    if row["input_tokens"] is not None or row["output_tokens"] is not None:
        usage = Usage.checked(**{name: row[name] or 0 for name in _TOKEN_COLUMNS})
    return charge(rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=nanos_per_credit)


def _identity(row: DictRow) -> dict[str, Any]:
    names = ("account_id", "request_id", "price_version", "price")
    return {name: row[name] for name in names}
