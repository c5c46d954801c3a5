"""The statements of the incremental audit: what a page of accounts has written, and what is wrong.

The invariants are those of `invariants`, in the same words, asked of new entries and of what these
refer to. `OFFSET 0` keeps a look-up a look-up: nobody can tell the planner how few entries are new,
and a join that reads a whole table to find some thousand rows of it is what it would choose.
"""

from typing import LiteralString

# Where the increment of an account begins: at its newest point that is vouched for, or where its
# journal does.
BASES: LiteralString = """
    SELECT
        b.account_id, b.seq, b.seq - coalesce(greatest(p.last_seq, f.seq), 0) AS entries
    FROM balances AS b
    LEFT JOIN LATERAL (
        SELECT s.last_seq FROM seal_points AS s
        WHERE s.account_id = b.account_id AND s.number <= %(through)s
        ORDER BY s.last_seq DESC LIMIT 1
    ) AS p ON true
    LEFT JOIN carried_floors AS f ON b.account_id = f.account_id
    WHERE b.account_id > %(after)s ORDER BY b.account_id LIMIT %(accounts)s
"""

PAGE: LiteralString = """
WITH page AS MATERIALIZED (
    SELECT
        b.*, coalesce(o.seq, 0) AS from_seq, coalesce(o.posted_after, 0) AS from_posted,
        coalesce(o.reserved_after, 0) AS from_reserved,
        coalesce(o.sealed_at, '-infinity') AS from_at
    FROM balances AS b
    LEFT JOIN LATERAL (
        (
            SELECT s.last_seq AS seq, s.posted_after, s.reserved_after, m.sealed_at
            FROM seal_points AS s INNER JOIN seals AS m ON s.number = m.number
            WHERE s.account_id = b.account_id AND s.number <= %(through)s
            ORDER BY s.last_seq DESC LIMIT 1
        )
        UNION ALL
        SELECT f.seq, f.posted_after, f.reserved_after, NULL
        FROM carried_floors AS f WHERE f.account_id = b.account_id
        ORDER BY seq DESC LIMIT 1
    ) AS o ON true
    WHERE b.account_id > %(after)s AND b.account_id <= %(last)s
),
fresh AS MATERIALIZED (
    SELECT
        e.*,
        lag(e.seq, 1, p.from_seq) OVER walk AS previous,
        lag(e.posted_after, 1, p.from_posted) OVER walk + e.posted_delta AS posted_expected,
        lag(e.reserved_after, 1, p.from_reserved) OVER walk + e.reserved_delta
        AS reserved_expected
    FROM page AS p
    CROSS JOIN LATERAL (
        SELECT
            n.account_id, n.request_id, n.kind, n.seq, n.amount, n.posted_delta,
            n.reserved_delta, n.posted_after, n.reserved_after, n.reference
        FROM (
            SELECT * FROM entries AS k
            WHERE k.account_id = p.account_id AND k.seq > p.from_seq OFFSET 0
        ) AS n
        UNION ALL
        SELECT
            c.account_id, NULL, 'detached', c.seq, NULL, c.posted_delta, c.reserved_delta,
            c.posted_after, c.reserved_after, NULL
        FROM carried_seams AS c WHERE c.account_id = p.account_id AND c.seq > p.from_seq
    ) AS e
    WINDOW walk AS (PARTITION BY e.account_id ORDER BY e.seq)
),
ends AS MATERIALIZED (
    SELECT
        f.account_id, count(*) AS entries, max(f.seq) AS seq, sum(f.posted_delta) AS posted,
        sum(f.reserved_delta) AS reserved
    FROM fresh AS f GROUP BY f.account_id
),
touched AS MATERIALIZED (
    SELECT
        f.account_id, f.request_id, count(*) FILTER (WHERE f.kind = 'hold') AS holds,
        max(f.amount) FILTER (WHERE f.kind = 'hold') AS hold,
        count(*) FILTER (WHERE f.kind IN ('capture', 'void', 'expire')) AS endings,
        max(f.kind) FILTER (WHERE f.kind IN ('capture', 'void', 'expire')) AS ended_by,
        max(f.seq) FILTER (WHERE f.kind IN ('capture', 'void', 'expire')) AS ended_at,
        max(-f.reserved_delta) FILTER (WHERE f.kind IN ('capture', 'void', 'expire')) AS released,
        max(f.seq) FILTER (WHERE f.kind = 'late_capture') AS late_at,
        max(-f.posted_delta) FILTER (WHERE f.kind IN ('capture', 'late_capture')) AS captured,
        max(f.seq) FILTER (WHERE f.kind IN ('capture', 'late_capture')) AS captured_at,
        max(-f.posted_delta) FILTER (WHERE f.kind = 'correction') AS corrected,
        max(f.seq) FILTER (WHERE f.kind = 'correction') AS corrected_at
    FROM fresh AS f
    WHERE f.kind IN ('hold', 'capture', 'void', 'expire', 'late_capture', 'correction')
    GROUP BY f.account_id, f.request_id
),
requests AS MATERIALIZED (
    -- One that began in the increment is there whole; of any other the rest is looked up.
    SELECT t.* FROM touched AS t WHERE t.holds > 0
    UNION ALL
    SELECT
        t.account_id, t.request_id, count(*) FILTER (WHERE e.kind = 'hold'),
        max(e.amount) FILTER (WHERE e.kind = 'hold'),
        count(*) FILTER (WHERE e.kind IN ('capture', 'void', 'expire')),
        max(e.kind) FILTER (WHERE e.kind IN ('capture', 'void', 'expire')),
        max(e.seq) FILTER (WHERE e.kind IN ('capture', 'void', 'expire')),
        max(-e.reserved_delta) FILTER (WHERE e.kind IN ('capture', 'void', 'expire')),
        max(e.seq) FILTER (WHERE e.kind = 'late_capture'),
        max(-e.posted_delta) FILTER (WHERE e.kind IN ('capture', 'late_capture')),
        max(e.seq) FILTER (WHERE e.kind IN ('capture', 'late_capture')),
        max(-e.posted_delta) FILTER (WHERE e.kind = 'correction'),
        max(e.seq) FILTER (WHERE e.kind = 'correction')
    FROM touched AS t
    CROSS JOIN LATERAL (
        SELECT * FROM entries AS k
        WHERE k.account_id = t.account_id AND k.request_id = t.request_id OFFSET 0
    ) AS e
    WHERE t.holds = 0
    GROUP BY t.account_id, t.request_id
),
judged AS MATERIALIZED (
    SELECT
        r.*, u.status, u.price, u.hold AS usage_hold, o.amount AS open_hold, u.tier, u.model,
        u.byok, u.input_tokens, u.cached_input_tokens, u.cache_creation_tokens,
        u.cache_creation_1h_tokens, u.output_tokens, u.reasoning_tokens, u.audio_input_tokens,
        u.audio_output_tokens, u.image_input_tokens, u.image_output_tokens, u.images,
        u.input_characters, u.audio_ms, u.queries, u.cost_picos, u.cost_source,
        u.rounding_attos, u.rule, u.markup_ppm, u.price_version, u.resolution, u.resolved_at,
        u.endpoint, u.quantity
    FROM requests AS r
    LEFT JOIN LATERAL (
        SELECT * FROM usage AS k
        WHERE k.account_id = r.account_id AND k.request_id = r.request_id OFFSET 0
    ) AS u ON true
    LEFT JOIN LATERAL (
        SELECT k.amount FROM open_holds AS k
        WHERE k.account_id = r.account_id AND k.request_id = r.request_id OFFSET 0
    ) AS o ON true
),
funded AS MATERIALIZED (
    SELECT f.* FROM page AS p
    CROSS JOIN LATERAL (SELECT * FROM funding AS k WHERE k.account_id = p.account_id OFFSET 0) AS f
),
broken (invariant, account_id, detail) AS (
    SELECT
        'sequence_without_gaps', f.account_id, jsonb_build_object(
            'request_id', f.request_id, 'kind', f.kind, 'seq', f.seq, 'previous', f.previous
        )
    FROM fresh AS f WHERE f.seq <> f.previous + 1
    UNION ALL
    SELECT
        'sequence_ends_at_balance', p.account_id,
        jsonb_build_object('balance_seq', p.seq, 'last_seq', coalesce(e.seq, p.from_seq))
    FROM page AS p LEFT JOIN ends AS e ON p.account_id = e.account_id
    WHERE p.seq <> coalesce(e.seq, p.from_seq)
    UNION ALL
    SELECT
        'running_balances_chain', f.account_id, jsonb_build_object(
            'request_id', f.request_id, 'kind', f.kind, 'seq', f.seq,
            'posted_after', f.posted_after, 'posted_expected', f.posted_expected,
            'reserved_after', f.reserved_after, 'reserved_expected', f.reserved_expected
        )
    FROM fresh AS f
    WHERE f.posted_after <> f.posted_expected OR f.reserved_after <> f.reserved_expected
    UNION ALL
    SELECT
        'balances_equal_journal', p.account_id, jsonb_build_object(
            'posted', p.posted, 'posted_in_entries', p.from_posted + coalesce(e.posted, 0),
            'reserved', p.reserved, 'reserved_in_entries', p.from_reserved + coalesce(e.reserved, 0)
        )
    FROM page AS p LEFT JOIN ends AS e ON p.account_id = e.account_id
    WHERE p.posted <> p.from_posted + coalesce(e.posted, 0)
        OR p.reserved <> p.from_reserved + coalesce(e.reserved, 0)
    UNION ALL
    SELECT
        'reserved_equals_open_holds', account_id,
        jsonb_build_object('reserved', p.reserved, 'open_holds', coalesce(h.amount, 0))
    FROM page AS p
    FULL JOIN (
        SELECT o.account_id, sum(o.amount) AS amount FROM open_holds AS o
        WHERE o.account_id > %(after)s AND o.account_id <= %(last)s GROUP BY o.account_id
    ) AS h USING (account_id)
    WHERE p.reserved IS DISTINCT FROM coalesce(h.amount, 0)
    UNION ALL
    SELECT
        'holds_end_once', j.account_id, jsonb_build_object(
            'request_id', j.request_id, 'hold', j.hold, 'open_hold', j.open_hold,
            'endings', j.endings
        )
    FROM judged AS j
    WHERE j.holds <> 1 OR j.endings + (j.open_hold IS NOT NULL)::integer <> 1
        OR j.open_hold <> j.hold
    UNION ALL
    SELECT
        'holds_end_once', o.account_id, jsonb_build_object(
            'request_id', o.request_id, 'hold', h.amount, 'open_hold', o.amount, 'endings',
            (t.kind IS NOT NULL)::integer
        )
    FROM open_holds AS o
    LEFT JOIN LATERAL (
        SELECT k.amount FROM entries AS k
        WHERE k.account_id = o.account_id AND k.request_id = o.request_id AND k.phase = 0 OFFSET 0
    ) AS h ON true
    LEFT JOIN LATERAL (
        SELECT k.kind FROM entries AS k
        WHERE k.account_id = o.account_id AND k.request_id = o.request_id AND k.phase = 1 OFFSET 0
    ) AS t ON true
    LEFT JOIN touched AS f ON o.account_id = f.account_id AND o.request_id = f.request_id
    WHERE o.account_id > %(after)s AND o.account_id <= %(last)s AND f.request_id IS NULL
        AND (h.amount IS DISTINCT FROM o.amount OR t.kind IS NOT NULL)
    UNION ALL
    SELECT
        'endings_release_their_hold', j.account_id, jsonb_build_object(
            'request_id', j.request_id, 'kind', j.ended_by, 'seq', j.ended_at, 'hold', j.hold,
            'released', j.released
        )
    FROM judged AS j WHERE j.endings > 0 AND j.released IS DISTINCT FROM j.hold
    UNION ALL
    SELECT
        'late_captures_bring_late_truth', j.account_id, jsonb_build_object(
            'request_id', j.request_id, 'seq', j.late_at, 'ended_by', j.ended_by,
            'ended_at_seq', j.ended_at
        )
    FROM judged AS j
    WHERE j.late_at IS NOT NULL AND NOT coalesce(
        j.ended_at < j.late_at AND (
            j.ended_by = 'expire' OR (
                j.ended_by = 'void' AND (
                    coalesce(j.cost_source = 'witness', false)
                    OR coalesce(j.resolution = 'charge', false)
                )
            )
        ),
        false
    )
    UNION ALL
    SELECT
        'captures_equal_usage', j.account_id, jsonb_build_object(
            'request_id', j.request_id, 'captured', j.captured, 'corrected', j.corrected,
            'status', j.status, 'price', j.price, 'resolution', j.resolution
        )
    FROM judged AS j
    WHERE j.price IS DISTINCT FROM j.captured + coalesce(j.corrected, 0)
        OR (j.status IN ('billed', 'byok') AND j.captured IS NULL)
        OR (
            j.corrected_at IS NOT NULL AND (
                coalesce(j.corrected_at < j.captured_at, true)
                OR j.resolution IS DISTINCT FROM 'reprice'
            )
        )
    UNION ALL
    SELECT
        'decisions_stand_in_the_trail', j.account_id, jsonb_build_object(
            'request_id', j.request_id, 'resolution', j.resolution, 'price', j.price,
            'decisions', t.decisions, 'told', t.price
        )
    FROM judged AS j
    LEFT JOIN LATERAL (
        SELECT
            count(*) AS decisions, max(a.action) AS action,
            max((a.detail ->> 'price')::bigint) AS price
        FROM audit_trail AS a
        WHERE a.account_id = j.account_id AND a.action LIKE 'review.%%'
            AND a.detail ->> 'request_id' = j.request_id::text
    ) AS t ON true
    WHERE j.resolution IS NOT NULL AND (
        t.decisions <> 1 OR t.price IS DISTINCT FROM j.price
        OR t.action <> 'review.' || j.resolution OR j.resolved_at IS NULL
    )
    UNION ALL
    SELECT
        'usage_agrees_with_journal', j.account_id, jsonb_build_object(
            'request_id', j.request_id, 'status', j.status, 'byok', j.byok, 'hold', j.usage_hold,
            'ended_by', j.ended_by, 'held', j.hold
        )
    FROM judged AS j
    WHERE (j.status IS NULL AND (j.endings > 0 OR j.late_at IS NOT NULL))
        OR (
            j.status IS NOT NULL AND (
                j.hold IS DISTINCT FROM j.usage_hold
                OR (j.status = 'byok' AND NOT j.byok) OR (j.status = 'billed' AND j.byok)
                OR CASE
                    WHEN j.ended_by = 'capture' OR j.late_at IS NOT NULL
                    THEN j.status NOT IN ('billed', 'byok')
                    WHEN j.ended_by IS NOT NULL THEN j.status NOT IN ('void', 'needs_review')
                    ELSE true
                END
            )
        )
    UNION ALL
    SELECT
        'no_overspend', p.account_id, jsonb_build_object(
            'posted', p.posted, 'reserved', p.reserved, 'credit_limit', p.credit_limit,
            'overdraft', p.overdraft, 'available', p.posted - p.reserved + p.credit_limit
        )
    FROM page AS p
    WHERE p.overdraft <> greatest(0, -(p.posted - p.reserved + p.credit_limit))
    UNION ALL
    SELECT
        'holds_within_available', f.account_id, jsonb_build_object(
            'request_id', f.request_id, 'seq', f.seq, 'amount', f.amount,
            'posted_after', f.posted_after, 'reserved_after', f.reserved_after,
            'credit_limit', p.credit_limit
        )
    FROM fresh AS f INNER JOIN page AS p ON f.account_id = p.account_id
    WHERE f.kind = 'hold' AND f.amount > 0
        AND f.posted_after - f.reserved_after + p.credit_limit < 0
        -- The limit may have been lowered since.
        AND f.posted_after - f.reserved_after + credit_limit_at(f.account_id, f.seq) < 0
    UNION ALL
    SELECT
        'funding_equals_entries', f.account_id, jsonb_build_object(
            'entry_id', f.request_id, 'entry_kind', f.kind, 'entry_amount', f.posted_delta,
            'funding_kind', d.kind, 'funding_amount', d.amount, 'external_id', d.external_id
        )
    FROM fresh AS f
    LEFT JOIN funded AS d ON f.account_id = d.account_id AND f.request_id = d.entry_id
    WHERE f.kind IN (
        'deposit', 'grant', 'refund', 'adjustment', 'reversal', 'credit_expiry'
    ) AND (
        d.kind IS DISTINCT FROM f.kind OR d.amount IS DISTINCT FROM f.posted_delta
        OR d.amount IS DISTINCT FROM f.amount
    )
    UNION ALL
    SELECT
        'funding_equals_entries', d.account_id, jsonb_build_object(
            'entry_id', d.entry_id, 'funding_kind', d.kind, 'funding_amount', d.amount,
            'source', d.source, 'external_id', d.external_id
        )
    FROM funded AS d
    INNER JOIN page AS p ON d.account_id = p.account_id
    WHERE d.at >= p.from_at
        AND NOT EXISTS (
            SELECT 1 FROM entries AS e
            WHERE e.account_id = d.account_id AND e.request_id = d.entry_id AND e.phase = 1
        )
        AND NOT EXISTS (
            SELECT 1 FROM detached_months AS m
            WHERE d.entry_id < uuid_floor((m.month + interval '1 month') AT TIME ZONE 'UTC')
        )
    UNION ALL
    SELECT
        'expired_credits_were_granted', account_id, jsonb_build_object(
            'grant_id', granted_by, 'amount', x.amount, 'granted', g.amount, 'expired', x.expired,
            'expires_at', x.expires_at, 'expired_in_funding', e.amount, 'first_at', e.first_at
        )
    FROM (
        SELECT k.*, k.grant_id::text AS granted_by FROM expiring_credits AS k
        WHERE k.account_id > %(after)s AND k.account_id <= %(last)s
    ) AS x
    FULL JOIN (
        SELECT
            d.account_id, split_part(d.external_id, ':', 1) AS granted_by,
            -sum(d.amount) AS amount, min(d.at) AS first_at
        FROM funded AS d WHERE d.kind = 'credit_expiry' GROUP BY 1, 2
    ) AS e USING (account_id, granted_by)
    LEFT JOIN (
        SELECT d.account_id, d.entry_id::text AS granted_by, d.amount FROM funded AS d
        WHERE d.kind = 'grant'
    ) AS g USING (account_id, granted_by)
    WHERE x.expired IS DISTINCT FROM coalesce(e.amount, 0)
        OR x.amount IS DISTINCT FROM g.amount
        OR e.first_at < x.expires_at
    UNION ALL
    SELECT
        'refunds_within_price', r.account_id, jsonb_build_object(
            'subject_id', r.subject_id, 'amount', coalesce(u.price, 0),
            'given_back', refunded(r.account_id, r.subject_id)
        )
    FROM (
        SELECT DISTINCT d.account_id, d.subject_id FROM funded AS d
        INNER JOIN page AS p ON d.account_id = p.account_id
        WHERE d.kind = 'refund' AND d.subject_id IS NOT NULL AND d.at >= p.from_at
    ) AS r
    CROSS JOIN LATERAL (
        SELECT k.price FROM usage AS k
        WHERE k.account_id = r.account_id AND k.request_id = r.subject_id OFFSET 0
    ) AS u
    WHERE refunded(r.account_id, r.subject_id) > coalesce(u.price, 0)
    UNION ALL
    SELECT
        'refunds_within_price', d.account_id, jsonb_build_object(
            'subject_id', d.subject_id, 'amount', max(f.amount), 'given_back', -sum(d.amount)
        )
    FROM funded AS d
    INNER JOIN page AS p ON d.account_id = p.account_id
    LEFT JOIN funded AS f ON d.account_id = f.account_id AND d.subject_id = f.entry_id
    WHERE d.kind = 'reversal' AND d.subject_id IS NOT NULL
    GROUP BY d.account_id, d.subject_id
    HAVING max(d.at) >= max(p.from_at)
        AND (count(*) > 1 OR max(f.amount) IS DISTINCT FROM -sum(d.amount))
    UNION ALL
    SELECT
        'counters_equal_open_holds', account_id, jsonb_build_object(
            'scope_id', scope_id, 'holds', c.holds, 'open_holds', coalesce(h.holds, 0),
            'reserved', c.reserved, 'open_amount', coalesce(h.amount, 0)
        )
    FROM (
        SELECT k.* FROM scope_counters AS k
        WHERE k.account_id > %(after)s AND k.account_id <= %(last)s
    ) AS c
    FULL JOIN (
        SELECT o.account_id, s.scope_id, count(*) AS holds, sum(o.amount) AS amount
        FROM open_holds AS o CROSS JOIN unnest(o.scopes) AS s(scope_id)
        WHERE o.account_id > %(after)s AND o.account_id <= %(last)s
        GROUP BY o.account_id, s.scope_id
    ) AS h USING (account_id, scope_id)
    WHERE c.holds IS DISTINCT FROM coalesce(h.holds, 0)
        OR c.reserved IS DISTINCT FROM coalesce(h.amount, 0)
),
counted AS (
    SELECT
        (SELECT count(*) FROM page) AS accounts,
        (SELECT coalesce(sum(e.entries), 0) FROM ends AS e) AS entries,
        (SELECT count(*) FROM judged) AS requests
)
SELECT
    b.invariant, b.account_id, b.detail, NULL AS accounts, NULL AS entries, NULL AS requests,
    NULL::uuid AS request_id, NULL AS tier, NULL AS model, NULL::boolean AS byok, NULL AS status,
    NULL::bigint AS input_tokens, NULL::bigint AS cached_input_tokens,
    NULL::bigint AS cache_creation_tokens, NULL::bigint AS cache_creation_1h_tokens,
    NULL::bigint AS output_tokens, NULL::bigint AS reasoning_tokens,
    NULL::bigint AS audio_input_tokens, NULL::bigint AS audio_output_tokens,
    NULL::bigint AS image_input_tokens, NULL::bigint AS image_output_tokens,
    NULL::bigint AS images, NULL::bigint AS input_characters, NULL::bigint AS audio_ms,
    NULL::bigint AS queries, NULL::bigint AS cost_picos, NULL::bigint AS price,
    NULL::bigint AS rounding_attos, NULL AS rule, NULL::bigint AS markup_ppm,
    NULL::integer AS price_version, NULL AS resolution, NULL AS endpoint,
    NULL::bigint AS quantity
FROM broken AS b
UNION ALL
SELECT
    'counted', NULL, NULL, c.accounts, c.entries, c.requests, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL
FROM counted AS c
UNION ALL
SELECT
    NULL, j.account_id, NULL, NULL, NULL, NULL, j.request_id, j.tier, j.model, j.byok, j.status,
    j.input_tokens, j.cached_input_tokens, j.cache_creation_tokens, j.cache_creation_1h_tokens,
    j.output_tokens, j.reasoning_tokens, j.audio_input_tokens, j.audio_output_tokens,
    j.image_input_tokens, j.image_output_tokens, j.images, j.input_characters, j.audio_ms,
    j.queries, j.cost_picos, j.price, j.rounding_attos, j.rule, j.markup_ppm, j.price_version,
    j.resolution, j.endpoint, j.quantity
FROM judged AS j WHERE j.price IS NOT NULL
"""
