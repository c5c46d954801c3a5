"""The invariants of the whole ledger: a query each, whose result is the rows that break it."""

from typing import LiteralString

from proxy.audit.invariant import Invariant
from proxy.audit.rollups import ROLLUPS

_ENTRIES: LiteralString = "SELECT count(*) FROM entries"
_ACCOUNTS: LiteralString = "SELECT count(*) FROM balances"
_TRANSACTIONS: LiteralString = (
    "SELECT (SELECT count(*) FROM entries WHERE posted_delta <> 0)"
    " + (SELECT count(*) FROM usage WHERE cost_picos > 0 AND NOT byok)"
)

INVARIANTS = (
    Invariant(
        "sequence_without_gaps",
        "an account's entries are numbered 1, 2, 3 …",
        _ENTRIES,
        """
        SELECT * FROM (
            SELECT
                e.account_id, e.request_id, e.kind, e.seq,
                lag(e.seq, 1, coalesce(f.seq, 0)) OVER (PARTITION BY e.account_id ORDER BY e.seq)
                AS previous
            FROM (
                SELECT account_id, request_id, kind, seq FROM entries
                UNION ALL
                SELECT account_id, NULL, 'detached', seq FROM carried_seams
            ) AS e
            LEFT JOIN carried_floors AS f ON e.account_id = f.account_id
        ) AS s
        WHERE s.seq <> s.previous + 1
        """,
    ),
    Invariant(
        "sequence_ends_at_balance",
        "the balance counts every entry, the last one included",
        _ACCOUNTS,
        """
        SELECT account_id, b.seq AS balance_seq, e.seq AS last_seq
        FROM balances AS b
        FULL JOIN (
            SELECT account_id, max(seq) AS seq FROM (
                SELECT account_id, seq FROM entries
                UNION ALL
                SELECT account_id, seq FROM carried_seams
                UNION ALL
                SELECT account_id, seq FROM carried_floors
            ) AS known GROUP BY account_id
        ) AS e USING (account_id)
        WHERE b.seq IS DISTINCT FROM coalesce(e.seq, 0)
        """,
    ),
    Invariant(
        "running_balances_chain",
        "each entry's balance is the one before plus its own delta",
        _ENTRIES,
        """
        SELECT * FROM (
            SELECT
                e.account_id, e.request_id, e.kind, e.seq,
                e.posted_after,
                lag(e.posted_after, 1, coalesce(f.posted_after, 0)) OVER walk + e.posted_delta
                AS posted_expected,
                e.reserved_after,
                lag(e.reserved_after, 1, coalesce(f.reserved_after, 0)) OVER walk
                + e.reserved_delta AS reserved_expected
            FROM (
                SELECT
                    account_id, request_id, kind, seq, posted_delta, reserved_delta, posted_after,
                    reserved_after
                FROM entries
                UNION ALL
                SELECT
                    account_id, NULL, 'detached', seq, posted_delta, reserved_delta, posted_after,
                    reserved_after
                FROM carried_seams
            ) AS e
            LEFT JOIN carried_floors AS f ON e.account_id = f.account_id
            WINDOW walk AS (PARTITION BY e.account_id ORDER BY e.seq)
        ) AS s
        WHERE s.posted_after <> s.posted_expected OR s.reserved_after <> s.reserved_expected
        """,
    ),
    Invariant(
        "balances_equal_journal",
        "posted and reserved are the sums of the entries' deltas, the detached ones included",
        _ACCOUNTS,
        """
        SELECT
            account_id, b.posted, coalesce(e.posted, 0) AS posted_in_entries,
            b.reserved, coalesce(e.reserved, 0) AS reserved_in_entries
        FROM balances AS b
        FULL JOIN (
            SELECT account_id, sum(posted) AS posted, sum(reserved) AS reserved
            FROM (
                SELECT account_id, posted_delta AS posted, reserved_delta AS reserved FROM entries
                UNION ALL
                SELECT account_id, posted, reserved FROM carried_totals
            ) AS known GROUP BY account_id
        ) AS e USING (account_id)
        WHERE b.posted IS DISTINCT FROM coalesce(e.posted, 0)
            OR b.reserved IS DISTINCT FROM coalesce(e.reserved, 0)
        """,
    ),
    Invariant(
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
    Invariant(
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
    Invariant(
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
    Invariant(
        "late_captures_bring_late_truth",
        "a late capture follows an expiry, or a void by the word of the witness or an operator",
        "SELECT count(*) FROM entries WHERE kind = 'late_capture'",
        """
        SELECT l.account_id, l.request_id, l.seq, x.kind AS ended_by, x.seq AS ended_at_seq
        FROM entries AS l
        LEFT JOIN usage AS u ON l.account_id = u.account_id AND l.request_id = u.request_id
        LEFT JOIN entries AS x
            ON l.account_id = x.account_id AND l.request_id = x.request_id
            AND (
                x.kind = 'expire' OR x.kind = 'void'
                AND (u.cost_source = 'witness' OR u.resolution IN ('charge', 'reprice'))
            )
        WHERE l.kind = 'late_capture' AND (x.seq IS NULL OR x.seq > l.seq)
        """,
    ),
    Invariant(
        "captures_equal_usage",
        "every capture, with its correction, has a usage row with its price, and every price them",
        "SELECT (SELECT count(*) FROM entries WHERE kind IN ('capture', 'late_capture'))"
        " + (SELECT count(*) FROM usage WHERE status IN ('billed', 'byok'))",
        """
        SELECT account_id, request_id, c.kind, c.amount, x.amount AS correction, u.status, u.price
        FROM (SELECT * FROM entries WHERE kind IN ('capture', 'late_capture')) AS c
        FULL JOIN (SELECT * FROM usage WHERE status IN ('billed', 'byok')) AS u
            USING (account_id, request_id)
        FULL JOIN (SELECT * FROM entries WHERE kind = 'correction') AS x
            USING (account_id, request_id)
        WHERE u.price IS DISTINCT FROM c.amount - coalesce(x.amount, 0)
            OR c.amount IS DISTINCT FROM -c.posted_delta OR x.amount <> x.posted_delta
            OR x.seq < c.seq OR (x.seq > 0 AND u.resolution IS DISTINCT FROM 'reprice')
        """,
    ),
    Invariant(
        "decisions_stand_in_the_trail",
        "what an operator decided of a request stands in the audit trail, with its price",
        "SELECT count(*) FROM usage WHERE resolution IS NOT NULL",
        """
        SELECT u.account_id, u.request_id, u.resolution, u.price, array_agg(t.detail) AS told
        FROM usage AS u LEFT JOIN audit_trail AS t
            ON u.account_id = t.account_id AND t.action LIKE 'review.%'
            AND u.request_id = (t.detail ->> 'request_id')::uuid
        WHERE u.resolution IS NOT NULL GROUP BY u.account_id, u.request_id
        HAVING count(t.event_id) <> 1 OR max(t.action) <> 'review.' || u.resolution
            OR max((t.detail ->> 'price')::bigint) IS DISTINCT FROM u.price
        """,
    ),
    Invariant(
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
    Invariant(
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
    Invariant(
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
            -- The limit may have been lowered since.
            AND e.posted_after - e.reserved_after + credit_limit_at(e.account_id, e.seq) < 0
        """,
    ),
    Invariant(
        "funding_equals_entries",
        "every deposit, grant, refund, adjustment, reversal and expiry of credits has its entry of"
        " the same amount",
        "SELECT (SELECT count(*) FROM funding) + (SELECT count(*) FROM entries WHERE kind IN"
        " ('deposit', 'grant', 'refund', 'adjustment', 'reversal', 'credit_expiry'))",
        """
        WITH kept AS (
            -- Entries below this id were detached, if they are not there; NULL where none were.
            SELECT
                uuid_floor((max(month) + interval '1 month') AT TIME ZONE 'UTC') AS from_id
            FROM detached_months
        ),
        paired AS (
            SELECT
                account_id, f.source, f.external_id, f.kind AS funding_kind,
                f.amount AS funding_amount, request_id AS entry_id, e.kind AS entry_kind,
                e.posted_delta AS entry_amount, e.amount
            FROM (SELECT *, entry_id AS request_id FROM funding) AS f
            FULL JOIN (
                SELECT * FROM entries
                WHERE kind IN (
                    'deposit', 'grant', 'refund', 'adjustment', 'reversal', 'credit_expiry'
                )
            ) AS e USING (account_id, request_id)
        )
        SELECT
            p.account_id, p.source, p.external_id, p.funding_kind, p.funding_amount, p.entry_id,
            p.entry_kind, p.entry_amount
        FROM paired AS p, kept AS k
        WHERE (
            p.funding_kind IS DISTINCT FROM p.entry_kind
            OR p.funding_amount IS DISTINCT FROM p.entry_amount
            OR p.funding_amount IS DISTINCT FROM p.amount
        ) AND NOT coalesce(p.entry_kind IS NULL AND p.entry_id < k.from_id, false)
        UNION ALL
        SELECT account_id, NULL, NULL, kind, f.amount, NULL, kind, c.posted
        FROM (
            SELECT p.account_id, p.funding_kind AS kind, sum(p.funding_amount) AS amount
            FROM paired AS p, kept AS k
            WHERE p.entry_kind IS NULL AND p.entry_id < k.from_id
            GROUP BY p.account_id, p.funding_kind
        ) AS f
        FULL JOIN (
            SELECT * FROM carried_totals
            WHERE kind IN (
                'deposit', 'grant', 'refund', 'adjustment', 'reversal', 'credit_expiry'
            )
        ) AS c USING (account_id, kind)
        WHERE f.amount IS DISTINCT FROM c.posted
        """,
    ),
    Invariant(
        "expired_credits_were_granted",
        "credits that expire were granted, and none expires before its time or twice",
        _ACCOUNTS,
        """
        SELECT
            account_id, granted_by AS grant_id, x.amount, g.amount AS granted, x.expired,
            x.expires_at, e.amount AS expired_in_funding, e.first_at
        FROM (SELECT *, grant_id::text AS granted_by FROM expiring_credits) AS x
        FULL JOIN (
            SELECT
                account_id, split_part(external_id, ':', 1) AS granted_by,
                -sum(amount) AS amount, min(at) AS first_at
            FROM funding WHERE kind = 'credit_expiry' GROUP BY 1, 2
        ) AS e USING (account_id, granted_by)
        LEFT JOIN (
            SELECT account_id, entry_id::text AS granted_by, amount FROM funding
            WHERE kind = 'grant'
        ) AS g USING (account_id, granted_by)
        WHERE x.expired IS DISTINCT FROM coalesce(e.amount, 0)
            OR x.amount IS DISTINCT FROM g.amount
            OR e.first_at < x.expires_at
        """,
    ),
    Invariant(
        "refunds_within_price",
        "no request is refunded more than its price, no money is reversed twice or in part",
        "SELECT count(*) FROM funding WHERE subject_id IS NOT NULL",
        """
        SELECT
            u.account_id, u.request_id AS subject_id, coalesce(u.price, 0) AS amount,
            refunded(u.account_id, u.request_id) AS given_back
        FROM (
            SELECT DISTINCT account_id, subject_id FROM funding
            WHERE kind = 'refund' AND subject_id IS NOT NULL
        ) AS r
        -- Of a month that was detached there is no price any more.
        INNER JOIN usage AS u ON r.account_id = u.account_id AND r.subject_id = u.request_id
        WHERE refunded(u.account_id, u.request_id) > coalesce(u.price, 0)
        UNION ALL
        SELECT r.account_id, r.subject_id, max(f.amount), -sum(r.amount)
        FROM funding AS r
        LEFT JOIN funding AS f ON r.account_id = f.account_id AND r.subject_id = f.entry_id
        WHERE r.kind = 'reversal' AND r.subject_id IS NOT NULL
        GROUP BY r.account_id, r.subject_id
        HAVING count(*) > 1 OR max(f.amount) IS DISTINCT FROM -sum(r.amount)
        """,
    ),
    Invariant(
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
    Invariant(
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
    Invariant(
        "counters_equal_open_holds",
        "the counters of holds and reserved money of whatever has limits are those of its open"
        " holds",
        "SELECT count(*) FROM scope_counters",
        """
        SELECT
            account_id, scope_id, c.holds, coalesce(h.holds, 0) AS open_holds,
            c.reserved, coalesce(h.amount, 0) AS open_amount
        FROM scope_counters AS c
        FULL JOIN (
            -- A hold that nothing limits is not counted, and has no scopes.
            SELECT o.account_id, s.scope_id, count(*) AS holds, sum(o.amount) AS amount
            FROM open_holds AS o CROSS JOIN unnest(o.scopes) AS s (scope_id)
            GROUP BY o.account_id, s.scope_id
        ) AS h USING (account_id, scope_id)
        WHERE c.holds IS DISTINCT FROM coalesce(h.holds, 0)
            OR c.reserved IS DISTINCT FROM coalesce(h.amount, 0)
        """,
    ),
    Invariant(
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
        WHERE (
            t.root IN (
                'entries', 'audit_trail', 'price_books', 'price_book_cancellations', 'seals',
                'seal_points', 'detached_months'
            )
            -- The tables of detached months, which have no parent any more.
            OR t.root ~ '^(entries|usage)_[0-9]{4}_[0-9]{2}$'
        ) AND NOT EXISTS (
            SELECT 1 FROM pg_trigger AS g
            WHERE g.tgrelid = t.oid AND g.tgfoid = to_regproc('tallygate.refuse_change')
                AND g.tgenabled IN ('O', 'A')
                -- BEFORE each ROW, on UPDATE and DELETE (catalog/pg_trigger.h).
                AND g.tgtype & 27 = 27
        )
        """,
    ),
    *ROLLUPS,
)
