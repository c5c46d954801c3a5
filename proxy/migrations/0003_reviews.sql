-- From version 2 to 3: operators resolve reviews, and reconciliations are kept.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of version 2
-- go on working on the result, so they may be replaced one after the other afterwards.
--
-- `entries` and `usage` are read once, for their new constraints, and nobody can write them
-- meanwhile: authorizations and settlements wait, and the latter go to their proxies' spools.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
-- Whoever waits for a table alone holds up everybody behind: better to fail behind a long report
-- or a dump, and to be run again.
SET LOCAL lock_timeout = '3s';

ALTER TABLE entries
DROP CONSTRAINT entries_phase_check,
DROP CONSTRAINT entries_kind_adds_up,
ADD CONSTRAINT entries_phase_check CHECK (phase IN (0, 1, 2, 3)),
ADD CONSTRAINT entries_kind_adds_up CHECK (
    CASE kind
        WHEN 'hold' THEN
            phase = 0 AND amount >= 0 AND posted_delta = 0 AND reserved_delta = amount
        WHEN 'capture' THEN
            phase = 1 AND amount >= 0 AND posted_delta = -amount AND reserved_delta <= 0
        WHEN 'void' THEN
            phase = 1 AND amount >= 0 AND posted_delta = 0 AND reserved_delta = -amount
        WHEN 'expire' THEN
            phase = 1 AND amount >= 0 AND posted_delta = 0 AND reserved_delta = -amount
        WHEN 'late_capture' THEN
            phase = 2 AND amount >= 0 AND posted_delta = -amount AND reserved_delta = 0
        WHEN 'correction' THEN
            phase = 3 AND amount <> 0 AND posted_delta = amount AND reserved_delta = 0
        WHEN 'deposit' THEN
            phase = 1 AND amount > 0 AND posted_delta = amount AND reserved_delta = 0
        WHEN 'grant' THEN
            phase = 1 AND amount > 0 AND posted_delta = amount AND reserved_delta = 0
        WHEN 'refund' THEN
            phase = 1 AND amount > 0 AND posted_delta = amount AND reserved_delta = 0
        WHEN 'adjustment' THEN
            phase = 1 AND amount <> 0 AND posted_delta = amount AND reserved_delta = 0
        WHEN 'reversal' THEN
            phase = 1 AND amount <> 0 AND posted_delta = amount AND reserved_delta = 0
        ELSE false
    END
);

ALTER TABLE usage
ADD COLUMN resolution text CHECK (resolution IN ('charge', 'waive', 'reprice')),
ADD CONSTRAINT usage_resolution_has_time CHECK (resolution IS NULL OR resolved_at IS NOT NULL);

CREATE TABLE reconciliations (
    reconciliation_id uuid PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Whose account it was, in the operator's words.
    source text NOT NULL CHECK (length(source) BETWEEN 1 AND 64),
    actor text NOT NULL,
    -- Days of UTC, both of them in it.
    first_day date NOT NULL,
    last_day date NOT NULL,
    -- What they say that it cost less what we know of; NULL where they told no costs.
    drift_picos numeric,
    is_within boolean NOT NULL,
    summary jsonb NOT NULL,
    CONSTRAINT reconciliations_period_runs_forward CHECK (first_day <= last_day)
);
CREATE INDEX reconciliations_by_source ON reconciliations (source, reconciliation_id);

CREATE OR REPLACE FUNCTION note_witness(p_batch json) RETURNS TABLE (ord integer, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET enable_material = off SET enable_memoize = off SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_requests uuid[];
BEGIN
    SELECT array_agg(r.request_id ORDER BY r.request_id) INTO v_requests
    FROM json_to_recordset(p_batch) AS r(request_id uuid);
    PERFORM 1
    FROM json_to_recordset(p_batch) AS r(account_id uuid, request_id uuid)
    INNER JOIN usage AS u
        ON r.account_id = u.account_id AND r.request_id = u.request_id
        AND u.request_id BETWEEN v_requests[1] AND v_requests[cardinality(v_requests)]
    ORDER BY u.account_id, u.request_id FOR NO KEY UPDATE OF u;

    RETURN QUERY
    WITH notes AS MATERIALIZED (
        SELECT
            r.*,
            row_number() OVER (PARTITION BY r.account_id, r.request_id ORDER BY r.ord DESC) AS nth
        FROM ROWS FROM (
            json_to_recordset(p_batch) AS (
                account_id uuid, request_id uuid, cost_picos bigint, attempts integer,
                mismatch boolean
            )
        ) WITH ORDINALITY AS r(account_id, request_id, cost_picos, attempts, mismatch, ord)
    ),
    written AS (
        UPDATE usage AS u
        SET
            witness_picos = coalesce(n.cost_picos, u.witness_picos),
            attempts = coalesce(n.attempts, u.attempts),
            review_reason = CASE
                WHEN n.mismatch AND u.resolved_at IS NULL
                THEN coalesce(u.review_reason, 'witness_mismatch')
                ELSE u.review_reason
            END
        FROM notes AS n
        WHERE n.nth = 1 AND u.account_id = n.account_id AND u.request_id = n.request_id
            AND u.request_id BETWEEN v_requests[1] AND v_requests[cardinality(v_requests)]
        RETURNING u.account_id, u.request_id
    )
    SELECT n.ord::integer, CASE WHEN w.request_id IS NULL THEN 'unknown' ELSE 'noted' END
    FROM notes AS n
    LEFT JOIN written AS w ON n.account_id = w.account_id AND n.request_id = w.request_id
    ORDER BY n.ord;
END $$;

CREATE FUNCTION resolve_review(
    p_account_id uuid, p_request_id uuid, p_decision text, p_settled_at timestamptz,
    p_price bigint, p_rounding_attos bigint, p_rule text, p_markup_ppm bigint,
    p_cost_picos bigint, p_event_id uuid, p_actor text, p_reason text
) RETURNS TABLE (outcome text, overdraft bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_balance balances;
    v_usage usage;
    v_now timestamptz;
    v_is_charged boolean;
    v_taken bigint := 0;
    v_available bigint;
BEGIN
    overdraft := 0;
    -- The balance first, as everybody who posts does, then the row, which note_witness takes alone.
    SELECT * INTO v_balance FROM balances AS b
    WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_usage FROM usage AS u
    WHERE u.account_id = p_account_id AND u.request_id = p_request_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    v_is_charged := v_usage.status IN ('billed', 'byok');
    outcome := CASE
        WHEN v_usage.request_id IS NULL THEN 'unknown'
        WHEN v_usage.resolved_at IS NOT NULL THEN CASE
            WHEN v_usage.resolution = p_decision AND (
                p_decision = 'waive' OR (
                    v_usage.price = p_price AND v_usage.rule = p_rule
                    AND v_usage.cost_picos IS NOT DISTINCT FROM
                    coalesce(p_cost_picos, v_usage.cost_picos)
                )
            ) THEN 'exists'
            ELSE 'conflict'
        END
        WHEN p_decision = 'charge' AND v_is_charged THEN 'already_charged'
        WHEN p_decision = 'reprice' AND NOT v_is_charged THEN 'not_charged'
        WHEN p_decision <> 'reprice' AND v_usage.review_reason IS NULL THEN 'not_waiting'
        WHEN v_usage.settled_at <> p_settled_at THEN 'stale'
        ELSE 'resolved'
    END;
    IF outcome <> 'resolved' THEN
        RETURN NEXT;
        RETURN;
    END IF;
    IF p_decision <> 'waive' THEN
        v_taken := p_price - coalesce(v_usage.price, 0);
    END IF;
    IF p_decision = 'charge' OR v_taken <> 0 THEN
        INSERT INTO entries VALUES (
            p_account_id, p_request_id,
            CASE p_decision WHEN 'charge' THEN 2 ELSE 3 END,
            CASE p_decision WHEN 'charge' THEN 'late_capture' ELSE 'correction' END,
            v_balance.seq + 1,
            CASE p_decision WHEN 'charge' THEN v_taken ELSE -v_taken END,
            -v_taken, 0, v_balance.posted - v_taken, v_balance.reserved, p_reason, NULL, v_now
        );
        v_available := v_balance.posted - v_taken - v_balance.reserved + v_balance.credit_limit;
        overdraft := greatest(0, least(-v_available, v_taken));
        UPDATE balances AS b SET
            posted = b.posted - v_taken, seq = b.seq + 1, overdraft = greatest(0, -v_available)
        WHERE b.account_id = p_account_id;
        -- A charge counts in the budget's running period, a correction where its capture did.
        UPDATE key_counters AS c SET
            period = period_start(k.budget_period, v_now),
            spent = v_taken + CASE
                WHEN c.period = period_start(k.budget_period, v_now) THEN c.spent ELSE 0
            END
        FROM virtual_keys AS k
        WHERE c.account_id = p_account_id AND c.key_id = v_usage.key_id
            AND k.account_id = c.account_id AND k.key_id = c.key_id AND k.is_limited
            AND (
                p_decision = 'charge'
                OR v_usage.settled_at >= period_start(k.budget_period, v_now)
            );
    END IF;
    UPDATE usage AS u SET resolution = p_decision, resolved_at = v_now
    WHERE u.account_id = p_account_id AND u.request_id = p_request_id;
    IF p_decision <> 'waive' THEN
        UPDATE usage AS u SET
            status = CASE WHEN u.byok THEN 'byok' ELSE 'billed' END,
            price = p_price, rounding_attos = p_rounding_attos, rule = p_rule,
            markup_ppm = p_markup_ppm,
            cost_picos = coalesce(p_cost_picos, u.cost_picos),
            cost_source = CASE WHEN p_cost_picos IS NULL THEN u.cost_source ELSE 'review' END,
            overdraft = least(u.overdraft + resolve_review.overdraft, p_price)
        WHERE u.account_id = p_account_id AND u.request_id = p_request_id;
    ELSIF NOT v_is_charged THEN
        UPDATE usage AS u SET status = 'void'
        WHERE u.account_id = p_account_id AND u.request_id = p_request_id;
    END IF;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, v_now, p_actor, 'review.' || p_decision, jsonb_build_object(
            'request_id', p_request_id, 'reason', p_reason,
            'review_reason', v_usage.review_reason, 'price_before', v_usage.price,
            'price', CASE p_decision WHEN 'waive' THEN v_usage.price ELSE p_price END,
            'cost_picos_before', v_usage.cost_picos,
            'cost_picos', CASE p_decision
                WHEN 'waive' THEN v_usage.cost_picos
                ELSE coalesce(p_cost_picos, v_usage.cost_picos)
            END
        )
    );
    RETURN NEXT;
END $$;

CREATE FUNCTION record_reconciliation(
    p_reconciliation_id uuid, p_source text, p_first_day date, p_last_day date,
    p_drift_picos numeric, p_is_within boolean, p_summary jsonb, p_actor text
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
    INSERT INTO reconciliations (
        reconciliation_id, source, actor, first_day, last_day, drift_picos, is_within, summary
    ) VALUES (
        p_reconciliation_id, p_source, p_actor, p_first_day, p_last_day, p_drift_picos, p_is_within,
        p_summary
    );
$$;

CREATE OR REPLACE VIEW usage_history AS
SELECT
    u.account_id, u.request_id, u.key_id, u.created_at, u.settled_at, u.endpoint, u.model,
    u.model_answered, u.tier, u.streamed, u.byok, u.status, u.input_tokens,
    u.cached_input_tokens, u.cache_creation_tokens, u.cache_creation_1h_tokens, u.output_tokens,
    u.reasoning_tokens, u.audio_input_tokens, u.audio_output_tokens, u.image_input_tokens,
    u.image_output_tokens, u.images, u.cost_picos, u.cost_source, u.price, u.rounding_attos,
    u.rule, u.markup_ppm, u.price_version, u.hold, u.overdraft, u.review_reason, u.resolved_at,
    u.error_code, u.upstream_status, u.client_gone, u.first_byte_ms, u.duration_ms,
    u.input_characters, u.audio_ms, u.queries, u.service_tier, u.rated_picos, u.answer_id,
    u.attempts, u.witness_picos, u.resolution
FROM usage AS u
UNION ALL
SELECT
    h.account_id, h.request_id, h.key_id, h.created_at, NULL, h.endpoint, h.model, NULL, h.tier,
    h.streamed, h.byok, 'pending', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, h.price_version, h.amount, 0::bigint, NULL, NULL, NULL,
    NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
FROM open_holds AS h;

CREATE OR REPLACE VIEW double_entry AS
SELECT
    e.account_id, e.request_id AS transaction_id, e.at, l.book, l.debit::numeric, l.credit::numeric
FROM entries AS e
CROSS JOIN LATERAL (
    VALUES
    (
        CASE
            WHEN e.kind = 'deposit' THEN 'cash'
            WHEN e.kind IN ('capture', 'late_capture', 'correction') THEN 'revenue'
            WHEN e.kind = 'refund' THEN 'refunds'
            ELSE 'promotions_and_adjustments'
        END,
        greatest(e.posted_delta, 0), greatest(-e.posted_delta, 0)
    ),
    ('customer_liability', greatest(-e.posted_delta, 0), greatest(e.posted_delta, 0))
) AS l (book, debit, credit)
WHERE e.posted_delta <> 0
UNION ALL
SELECT u.account_id, u.request_id, u.settled_at, l.book, l.debit, l.credit
FROM usage AS u
CROSS JOIN LATERAL (
    VALUES
    ('provider_cost', u.cost_picos / 1000.0, 0.0), ('provider_payable', 0.0, u.cost_picos / 1000.0)
) AS l (book, debit, credit)
WHERE u.cost_picos > 0 AND NOT u.byok;

REVOKE ALL ON FUNCTION resolve_review, record_reconciliation FROM PUBLIC;
GRANT SELECT ON reconciliations TO tallygate_app;
GRANT EXECUTE ON FUNCTION resolve_review, record_reconciliation TO tallygate_app;

RESET ROLE;
