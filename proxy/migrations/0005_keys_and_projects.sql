-- From version 4 to 5: keys with roles, endpoints and networks of their own, projects, and limits of
-- an account as a whole.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of version 4
-- go on working: they tell no limits of accounts.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

ALTER TABLE accounts ADD COLUMN overrides jsonb NOT NULL DEFAULT '{}';

-- What an account's keys are grouped by. Archiving one revokes its keys.
CREATE TABLE projects (
    account_id uuid NOT NULL,
    project_id uuid NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'archived')),
    budget bigint CHECK (budget > 0),
    budget_period text NOT NULL DEFAULT 'total' CHECK (budget_period IN ('day', 'month', 'total')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    archived_at timestamptz,
    PRIMARY KEY (account_id, project_id)
);

ALTER TABLE virtual_keys
ADD COLUMN role text NOT NULL DEFAULT 'inference' CHECK (role IN ('inference', 'read-only', 'manage')),
ADD COLUMN project_id uuid,
ADD COLUMN allowed_endpoints text[],
ADD COLUMN allowed_networks cidr[],
ADD COLUMN replaced_by uuid;

-- Counters were a key's alone.
ALTER TABLE key_counters RENAME TO scope_counters;
ALTER TABLE scope_counters RENAME COLUMN key_id TO scope_id;
ALTER TABLE key_counters_pkey RENAME COLUMN key_id TO scope_id;
-- Since PostgreSQL 18 each NOT NULL has a name as well.
DO $$
DECLARE
    v_name text;
BEGIN
    FOR v_name IN
        SELECT c.conname FROM pg_constraint AS c WHERE c.conrelid = 'scope_counters'::regclass
    LOOP
        EXECUTE format(
            'ALTER TABLE scope_counters RENAME CONSTRAINT %I TO %I', v_name, replace(
                replace(v_name, 'key_counters_key_id', 'scope_counters_scope_id'),
                'key_counters', 'scope_counters'
            )
        );
    END LOOP;
END $$;
INSERT INTO scope_counters (account_id, scope_id)
SELECT a.account_id, a.account_id AS scope_id FROM accounts AS a;

ALTER TABLE open_holds ADD COLUMN project_id uuid, ADD COLUMN scopes uuid[];
UPDATE open_holds AS h SET scopes = ARRAY[h.key_id] WHERE h.minute IS NOT NULL;

ALTER TABLE usage ADD COLUMN project_id uuid, ADD COLUMN quantity bigint CHECK (quantity > 0);
ALTER TYPE settlement ADD ATTRIBUTE quantity bigint;

DROP AGGREGATE admission_walk (
    integer, boolean, bigint, bigint, bigint, integer, bigint, integer, bigint
);
DROP FUNCTION admission_step;
DROP TYPE admission;
-- Running state of one account while its requests of a batch are walked in arrival order. The
-- arrays are indexed by the number of the key or project within the account, and stay NULL where
-- none is limited.
CREATE TYPE admission AS (
    outcome text,
    held bigint,
    holds integer,
    tokens bigint,
    key_requests integer[],
    key_tokens bigint[],
    key_reserved bigint[],
    project_reserved bigint[]
);

CREATE FUNCTION admission_step(
    p_state admission, p_key integer, p_project integer, p_is_limited boolean, p_amount bigint,
    p_tokens bigint, p_available bigint, p_requests_left integer, p_tokens_left bigint,
    p_holds_left integer, p_budget_left bigint, p_project_budget_left bigint,
    p_account_requests_left integer, p_account_tokens_left bigint, p_account_holds_left integer
) RETURNS admission LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_requests integer := 0;
    v_tokens bigint := 0;
    v_reserved bigint := 0;
    v_project bigint := 0;
BEGIN
    IF p_is_limited THEN
        v_requests := coalesce(p_state.key_requests[p_key], 0);
        v_tokens := coalesce(p_state.key_tokens[p_key], 0);
        v_reserved := coalesce(p_state.key_reserved[p_key], 0);
        IF p_project_budget_left IS NOT NULL THEN
            v_project := coalesce(p_state.project_reserved[p_project], 0);
        END IF;
        p_state.outcome := CASE
            WHEN v_requests + 1 > p_requests_left THEN 'requests_per_minute'
            WHEN v_tokens + p_tokens > p_tokens_left THEN 'tokens_per_minute'
            WHEN v_requests + 1 > p_holds_left THEN 'max_concurrency'
            WHEN p_state.holds + 1 > p_account_requests_left THEN 'account_requests_per_minute'
            WHEN p_state.tokens + p_tokens > p_account_tokens_left THEN 'account_tokens_per_minute'
            WHEN p_state.holds + 1 > p_account_holds_left THEN 'account_max_concurrency'
            WHEN p_amount > 0 AND v_reserved + p_amount > p_budget_left THEN 'budget_exceeded'
            WHEN p_amount > 0 AND v_project + p_amount > p_project_budget_left
            THEN 'project_budget_exceeded'
        END;
        IF p_state.outcome IS NOT NULL THEN
            RETURN p_state;
        END IF;
    END IF;
    -- A hold of nothing (BYOK, free models) passes even where the account is overdrawn.
    IF p_amount > 0 AND p_state.held + p_amount > p_available THEN
        p_state.outcome := 'insufficient_credits';
        RETURN p_state;
    END IF;
    IF p_is_limited THEN
        p_state.key_requests[p_key] := v_requests + 1;
        p_state.key_tokens[p_key] := v_tokens + p_tokens;
        p_state.key_reserved[p_key] := v_reserved + p_amount;
        IF p_project_budget_left IS NOT NULL THEN
            p_state.project_reserved[p_project] := v_project + p_amount;
        END IF;
    END IF;
    p_state.held := p_state.held + p_amount;
    p_state.holds := p_state.holds + 1;
    p_state.tokens := p_state.tokens + p_tokens;
    p_state.outcome := 'held';
    RETURN p_state;
END $$;
CREATE AGGREGATE admission_walk (
    integer, integer, boolean, bigint, bigint, bigint, integer, bigint, integer, bigint, bigint,
    integer, bigint, integer
) (SFUNC = admission_step, STYPE = admission, INITCOND = '(,0,0,0,,,,)');

CREATE OR REPLACE FUNCTION authorize_batch(p_batch json)
RETURNS TABLE (
    ord integer, outcome text, available bigint, budget_left bigint,
    requests_limit integer, requests_left integer, tokens_limit bigint, tokens_left bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
-- Plans are made once and while the tables are small: only a look-up by key, one for each row of the
-- batch, is right at every size.
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET enable_material = off SET enable_memoize = off SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_accounts uuid[];
    v_requests uuid[];
    v_now timestamptz;
    v_minute timestamptz;
BEGIN
    SELECT array_agg(r.account_id), array_agg(r.request_id ORDER BY r.request_id)
    INTO v_accounts, v_requests
    FROM json_to_recordset(p_batch) AS r(account_id uuid, request_id uuid);
    -- The locks, sorted, so that two batches can't wait for each other. The next statement has a
    -- new snapshot and so sees what whoever held the locks before us has committed.
    PERFORM 1 FROM balances AS b WHERE b.account_id = ANY(v_accounts)
    ORDER BY b.account_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    v_minute := date_trunc('minute', v_now);

    RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT
            r.*,
            row_number() OVER (PARTITION BY r.account_id, r.request_id ORDER BY r.ord) AS nth,
            dense_rank() OVER (PARTITION BY r.account_id ORDER BY r.key_id)::integer AS key_number,
            num_nonnulls(
                r.account_requests_per_minute, r.account_tokens_per_minute,
                r.account_max_concurrency
            ) > 0 AS is_account_limited
        FROM ROWS FROM (
            json_to_recordset(p_batch) AS (
                account_id uuid, request_id uuid, key_id uuid, version integer, amount bigint,
                tokens bigint, ttl_s integer, endpoint text, model text, tier text,
                streamed boolean, byok boolean, price_version integer,
                account_requests_per_minute integer, account_tokens_per_minute bigint,
                account_max_concurrency integer
            )
        ) WITH ORDINALITY AS r(
            account_id, request_id, key_id, version, amount, tokens, ttl_s, endpoint, model, tier,
            streamed, byok, price_version, account_requests_per_minute, account_tokens_per_minute,
            account_max_concurrency, ord
        )
    ),
    known AS MATERIALIZED (
        SELECT
            a.*,
            b.posted, b.reserved, b.seq, b.posted - b.reserved + b.credit_limit AS funds,
            k.requests_per_minute, k.tokens_per_minute, k.project_id,
            k.is_limited OR a.is_account_limited OR p.budget IS NOT NULL AS is_limited,
            nullif(
                array_remove(
                    ARRAY[
                        CASE WHEN k.is_limited THEN k.key_id END,
                        CASE WHEN p.budget IS NOT NULL THEN p.project_id END,
                        CASE WHEN a.is_account_limited THEN a.account_id END
                    ],
                    NULL
                ),
                '{}'
            ) AS scopes,
            CASE
                WHEN p.budget IS NOT NULL
                THEN dense_rank() OVER (PARTITION BY a.account_id ORDER BY p.project_id)
            END::integer AS project_number,
            k.requests_per_minute
            - CASE WHEN c.minute = v_minute THEN c.requests ELSE 0 END AS requests_free,
            k.tokens_per_minute
            - CASE WHEN c.minute = v_minute THEN c.tokens ELSE 0 END AS tokens_free,
            k.max_concurrency - c.holds AS holds_free,
            k.budget - c.reserved - CASE
                WHEN c.period = period_start(k.budget_period, v_now) THEN c.spent ELSE 0
            END AS budget_free,
            p.budget - cp.reserved - CASE
                WHEN cp.period = period_start(p.budget_period, v_now) THEN cp.spent ELSE 0
            END AS project_budget_free,
            a.account_requests_per_minute
            - CASE WHEN ca.minute = v_minute THEN ca.requests ELSE 0 END AS account_requests_free,
            a.account_tokens_per_minute
            - CASE WHEN ca.minute = v_minute THEN ca.tokens ELSE 0 END AS account_tokens_free,
            a.account_max_concurrency - ca.holds AS account_holds_free,
            CASE
                WHEN e.amount IS NOT NULL THEN CASE
                    WHEN e.amount <> a.amount THEN 'conflict'
                    WHEN h.request_id IS NOT NULL THEN 'exists'
                    ELSE 'already_settled'
                END
                WHEN a.nth > 1 THEN 'duplicate'
                WHEN k.key_id IS NULL OR b.account_id IS NULL THEN 'unknown_key'
                WHEN k.status = 'revoked' THEN 'key_revoked'
                WHEN k.expires_at <= v_now THEN 'key_expired'
                WHEN o.status <> 'active' THEN 'account_' || o.status
                WHEN o.version + k.version <> a.version THEN 'stale'
            END AS verdict
        FROM asked AS a
        LEFT JOIN balances AS b ON a.account_id = b.account_id
        LEFT JOIN accounts AS o ON a.account_id = o.account_id
        LEFT JOIN virtual_keys AS k ON a.account_id = k.account_id AND a.key_id = k.key_id
        LEFT JOIN projects AS p ON k.account_id = p.account_id AND k.project_id = p.project_id
        LEFT JOIN scope_counters AS c
            ON k.is_limited AND k.account_id = c.account_id AND k.key_id = c.scope_id
        LEFT JOIN scope_counters AS cp
            ON p.budget IS NOT NULL
            AND p.account_id = cp.account_id AND p.project_id = cp.scope_id
        LEFT JOIN scope_counters AS ca
            ON a.is_account_limited
            AND a.account_id = ca.account_id AND a.account_id = ca.scope_id
        -- The bounds let the executor open the partitions of this batch only.
        LEFT JOIN entries AS e
            ON a.account_id = e.account_id AND a.request_id = e.request_id AND e.phase = 0
            AND e.request_id BETWEEN v_requests[1] AND v_requests[cardinality(v_requests)]
        LEFT JOIN open_holds AS h
            ON e.account_id = h.account_id AND e.request_id = h.request_id
    ),
    walked AS MATERIALIZED (
        SELECT
            k.*,
            admission_walk(
                k.key_number, k.project_number, k.is_limited, k.amount, k.tokens, k.funds,
                k.requests_free, k.tokens_free, k.holds_free, k.budget_free,
                k.project_budget_free, k.account_requests_free, k.account_tokens_free,
                k.account_holds_free
            ) FILTER (WHERE k.verdict IS NULL)
            OVER (PARTITION BY k.account_id ORDER BY k.ord ROWS UNBOUNDED PRECEDING) AS state
        FROM known AS k
    ),
    admitted AS MATERIALIZED (
        SELECT * FROM walked AS w WHERE w.verdict IS NULL AND (w.state).outcome = 'held'
    ),
    new_holds AS (
        INSERT INTO open_holds
        SELECT
            a.account_id, a.request_id, a.key_id, a.amount, a.tokens,
            CASE WHEN a.is_limited THEN v_minute END,
            v_now + make_interval(secs => a.ttl_s), v_now, a.endpoint, a.model, a.tier,
            a.streamed, a.byok, a.price_version, a.project_id, a.scopes
        FROM admitted AS a
    ),
    new_entries AS (
        INSERT INTO entries
        SELECT
            a.account_id, a.request_id, 0, 'hold', a.seq + (a.state).holds, a.amount, 0, a.amount,
            a.posted, a.reserved + (a.state).held, NULL, NULL, v_now
        FROM admitted AS a
    ),
    new_balances AS (
        UPDATE balances AS b
        SET reserved = b.reserved + t.amount, seq = b.seq + t.holds
        FROM (
            SELECT a.account_id, sum(a.amount)::bigint AS amount, count(*) AS holds
            FROM admitted AS a GROUP BY a.account_id
        ) AS t
        WHERE b.account_id = t.account_id
    ),
    new_counters AS (
        UPDATE scope_counters AS c
        SET
            minute = v_minute,
            requests = CASE WHEN c.minute = v_minute THEN c.requests ELSE 0 END + t.holds,
            tokens = CASE WHEN c.minute = v_minute THEN c.tokens ELSE 0 END + t.tokens,
            holds = c.holds + t.holds,
            reserved = c.reserved + t.amount
        FROM (
            SELECT
                a.account_id, s.scope_id, sum(a.amount)::bigint AS amount,
                sum(a.tokens)::bigint AS tokens, count(*)::integer AS holds
            FROM admitted AS a CROSS JOIN unnest(a.scopes) AS s(scope_id)
            GROUP BY a.account_id, s.scope_id
        ) AS t
        WHERE c.account_id = t.account_id AND c.scope_id = t.scope_id
    ),
    told AS (
        SELECT
            w.*,
            w.requests_free - coalesce((w.state).key_requests[w.key_number], 0) AS key_requests,
            w.tokens_free - coalesce((w.state).key_tokens[w.key_number], 0) AS key_tokens,
            w.account_requests_free - (w.state).holds AS account_requests,
            w.account_tokens_free - (w.state).tokens AS account_tokens
        FROM walked AS w
    )
    SELECT
        w.ord::integer,
        coalesce(w.verdict, (w.state).outcome),
        w.funds - (w.state).held,
        least(
            w.budget_free - coalesce((w.state).key_reserved[w.key_number], 0),
            w.project_budget_free
            - coalesce((w.state).project_reserved[w.project_number], 0)
        ),
        CASE
            WHEN w.account_requests <= coalesce(w.key_requests, w.account_requests)
            THEN w.account_requests_per_minute ELSE w.requests_per_minute
        END,
        least(w.key_requests, w.account_requests),
        CASE
            WHEN w.account_tokens <= coalesce(w.key_tokens, w.account_tokens)
            THEN w.account_tokens_per_minute ELSE w.tokens_per_minute
        END,
        least(w.key_tokens, w.account_tokens)
    FROM told AS w
    ORDER BY w.ord;
END $$;

CREATE FUNCTION count_spending(
    p_account_id uuid, p_key_id uuid, p_project_id uuid, p_amount bigint, p_at timestamptz,
    p_settled_at timestamptz
) RETURNS void LANGUAGE sql SET search_path = tallygate, pg_temp AS $$
    UPDATE scope_counters AS c SET
        period = t.period,
        spent = p_amount + CASE WHEN c.period = t.period THEN c.spent ELSE 0 END
    FROM (
        SELECT k.key_id AS scope_id, period_start(k.budget_period, p_at) AS period
        FROM virtual_keys AS k
        WHERE k.account_id = p_account_id AND k.key_id = p_key_id AND k.is_limited
        UNION ALL
        SELECT p.project_id, period_start(p.budget_period, p_at)
        FROM projects AS p
        WHERE p.account_id = p_account_id AND p.project_id = p_project_id
            AND p.budget IS NOT NULL
    ) AS t
    WHERE c.account_id = p_account_id AND c.scope_id = t.scope_id
        AND (p_settled_at IS NULL OR p_settled_at >= t.period)
$$;

CREATE OR REPLACE FUNCTION settle_batch(p_batch json, p_grace_s integer DEFAULT 0)
RETURNS TABLE (ord integer, outcome text, overdraft bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET enable_material = off SET enable_memoize = off SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz;
    v_minute timestamptz;
    v_done integer[];
    v_outcomes text[];
    v_overdrafts bigint[];
BEGIN
    PERFORM 1 FROM balances AS b
    WHERE b.account_id = ANY(
        ARRAY(SELECT r.account_id FROM json_to_recordset(p_batch) AS r(account_id uuid))
    )
    ORDER BY b.account_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    v_minute := date_trunc('minute', v_now);

    WITH ended AS (
        DELETE FROM open_holds AS h
        USING (
            SELECT DISTINCT ON (r.account_id, r.request_id) r.*
            FROM json_populate_recordset(NULL::settlement, p_batch) WITH ORDINALITY AS r
            ORDER BY r.account_id, r.request_id, r.ordinality
        ) AS a
        WHERE h.account_id = a.account_id AND h.request_id = a.request_id
            AND (
                a.action <> 'expire'
                OR h.expires_at <= v_now - make_interval(secs => p_grace_s)
            )
        RETURNING
            a.*, h.key_id, h.amount AS hold, h.tokens, h.minute, h.created_at, h.endpoint,
            h.model, h.tier, h.streamed, h.byok, h.price_version, h.project_id, h.scopes,
            CASE WHEN a.action = 'capture' THEN a.price ELSE 0 END AS charge
    ),
    posted AS MATERIALIZED (
        SELECT
            e.*,
            b.seq + row_number() OVER walk AS seq,
            b.posted - sum(e.charge) OVER walk AS posted_after,
            b.reserved - sum(e.hold) OVER walk AS reserved_after,
            b.posted - sum(e.charge) OVER walk - b.reserved + sum(e.hold) OVER walk
            + b.credit_limit AS available_after
        FROM ended AS e INNER JOIN balances AS b ON e.account_id = b.account_id
        WINDOW walk AS (PARTITION BY e.account_id ORDER BY e.ordinality)
    ),
    judged AS MATERIALIZED (
        SELECT
            p.*,
            CASE
                WHEN p.charge > p.hold
                THEN least(greatest(0, -p.available_after), p.charge - p.hold) ELSE 0
            END::bigint AS overdraft
        FROM posted AS p
    ),
    new_entries AS (
        INSERT INTO entries
        SELECT
            p.account_id, p.request_id, 1, p.action, p.seq,
            CASE WHEN p.action = 'capture' THEN p.charge ELSE p.hold END,
            -p.charge, -p.hold, p.posted_after, p.reserved_after, NULL, NULL, v_now
        FROM judged AS p
    ),
    new_balances AS (
        UPDATE balances AS b
        SET
            posted = b.posted - t.charge,
            reserved = b.reserved - t.hold,
            seq = b.seq + t.entries,
            overdraft = greatest(
                0, -(b.posted - t.charge - b.reserved + t.hold + b.credit_limit)
            )
        FROM (
            SELECT
                p.account_id, sum(p.charge)::bigint AS charge, sum(p.hold)::bigint AS hold,
                count(*) AS entries
            FROM judged AS p GROUP BY p.account_id
        ) AS t
        WHERE b.account_id = t.account_id
    ),
    new_counters AS (
        UPDATE scope_counters AS c
        SET
            holds = c.holds - t.holds,
            reserved = c.reserved - t.hold,
            -- The estimate of tokens gives way to what was used, if its minute is still running.
            tokens = c.tokens + CASE WHEN c.minute = v_minute THEN t.tokens ELSE 0 END,
            period = t.period,
            spent = t.charge + CASE WHEN c.period = t.period THEN c.spent ELSE 0 END
        FROM (
            SELECT
                p.account_id, s.scope_id, count(*)::integer AS holds,
                period_start(
                    coalesce(min(k.budget_period), min(o.budget_period), 'total'), v_now
                ) AS period,
                sum(p.hold)::bigint AS hold, sum(p.charge)::bigint AS charge,
                coalesce(sum(coalesce(p.input_tokens + p.output_tokens, p.tokens) - p.tokens)
                    FILTER (WHERE p.minute = v_minute AND p.action = 'capture'), 0)::bigint
                AS tokens
            FROM judged AS p
            CROSS JOIN unnest(p.scopes) AS s(scope_id)
            LEFT JOIN virtual_keys AS k ON p.account_id = k.account_id AND s.scope_id = k.key_id
            LEFT JOIN projects AS o ON p.account_id = o.account_id AND s.scope_id = o.project_id
            GROUP BY p.account_id, s.scope_id
        ) AS t
        WHERE c.account_id = t.account_id AND c.scope_id = t.scope_id
    ),
    new_usage AS (
        INSERT INTO usage
        SELECT
            p.account_id, p.request_id, p.key_id, p.created_at, v_now, p.endpoint, p.model,
            p.model_answered, p.tier, p.streamed, p.byok,
            CASE WHEN p.action = 'expire' THEN 'needs_review' ELSE p.status END,
            p.input_tokens, p.cached_input_tokens, p.cache_creation_tokens,
            p.cache_creation_1h_tokens, p.output_tokens, p.reasoning_tokens, p.audio_input_tokens,
            p.audio_output_tokens, p.image_input_tokens, p.image_output_tokens, p.images,
            p.cost_picos, p.cost_source,
            CASE WHEN p.action = 'capture' THEN p.price END,
            p.rounding_attos, p.rule, p.markup_ppm, p.price_version, p.hold, p.overdraft,
            CASE
                WHEN p.action = 'expire' THEN 'orphaned'
                WHEN p.overdraft > 0 THEN coalesce(p.review_reason, 'overdraft')
                ELSE p.review_reason
            END,
            NULL, p.error_code, p.upstream_status, coalesce(p.client_gone, false),
            p.first_byte_ms, p.duration_ms, p.input_characters, p.audio_ms, p.queries,
            p.service_tier, p.rated_picos, p.answer_id, NULL, NULL, NULL, p.project_id, p.quantity
        FROM judged AS p
    )
    SELECT
        array_agg(p.ordinality),
        array_agg(CASE p.action
            WHEN 'capture' THEN 'captured' WHEN 'void' THEN 'voided' ELSE 'expired'
        END),
        array_agg(p.overdraft)
    INTO v_done, v_outcomes, v_overdrafts
    FROM judged AS p;

    RETURN QUERY SELECT * FROM unnest(v_done, v_outcomes, v_overdrafts);
    IF json_array_length(p_batch) > coalesce(cardinality(v_done), 0) THEN
        RETURN QUERY SELECT * FROM settle_without_hold(p_batch, coalesce(v_done, '{}'));
    END IF;
END $$;

CREATE OR REPLACE FUNCTION settle_without_hold(p_batch json, p_done integer[])
RETURNS TABLE (ord integer, outcome text, overdraft bigint)
LANGUAGE plpgsql SET search_path = tallygate, pg_temp AS $$
#variable_conflict use_column
DECLARE
    v_item settlement;
    v_ord integer;
    v_entry entries;
    v_usage usage;
    v_balance balances;
    v_available bigint;
    v_is_due boolean;
BEGIN
    -- note_witness writes rows of usage without the locks of settle_batch: both take them sorted.
    PERFORM 1
    FROM ROWS FROM (
        json_to_recordset(p_batch) AS (account_id uuid, request_id uuid)
    ) WITH ORDINALITY AS r(account_id, request_id, ord)
    INNER JOIN usage AS u ON r.account_id = u.account_id AND r.request_id = u.request_id
    WHERE r.ord <> ALL(p_done)
    ORDER BY u.account_id, u.request_id FOR NO KEY UPDATE OF u;
    FOR v_ord IN 1..json_array_length(p_batch) LOOP
        CONTINUE WHEN v_ord = ANY(p_done);
        v_item := json_populate_record(NULL::settlement, p_batch -> (v_ord - 1));
        ord := v_ord;
        overdraft := 0;
        SELECT * INTO v_entry FROM entries AS e
        WHERE e.account_id = v_item.account_id AND e.request_id = v_item.request_id
            AND e.phase = 1;
        IF NOT FOUND THEN
            PERFORM 1 FROM open_holds AS h
            WHERE h.account_id = v_item.account_id AND h.request_id = v_item.request_id;
            outcome := CASE WHEN FOUND THEN 'not_due' ELSE 'unknown' END;
            RETURN NEXT;
            CONTINUE;
        END IF;
        SELECT * INTO v_usage FROM usage AS u
        WHERE u.account_id = v_item.account_id AND u.request_id = v_item.request_id;
        v_is_due := v_usage.status = 'needs_review' AND v_usage.resolved_at IS NULL AND CASE
            WHEN v_item.action = 'expire' OR v_entry.kind = 'capture' THEN false
            WHEN v_item.action = 'capture' AND v_item.cost_source = 'witness' THEN true
            ELSE v_entry.kind = 'expire' AND v_usage.review_reason = 'orphaned'
        END;
        IF NOT coalesce(v_is_due, false) THEN
            outcome := CASE
                WHEN v_entry.kind = 'capture' OR v_usage.status IN ('billed', 'byok')
                THEN 'already_captured'
                WHEN v_entry.kind = 'void' THEN 'already_voided'
                ELSE 'already_expired'
            END;
            RETURN NEXT;
            CONTINUE;
        END IF;
        outcome := 'amended';
        IF v_item.action = 'capture' THEN
            outcome := 'captured_late';
            SELECT * INTO v_balance FROM balances AS b WHERE b.account_id = v_item.account_id;
            INSERT INTO entries VALUES (
                v_item.account_id, v_item.request_id, 2, 'late_capture', v_balance.seq + 1,
                v_item.price, -v_item.price, 0, v_balance.posted - v_item.price,
                v_balance.reserved, NULL, NULL, clock_timestamp()
            );
            PERFORM count_spending(
                v_item.account_id, v_usage.key_id, v_usage.project_id, v_item.price,
                clock_timestamp(), NULL
            );
            v_available := v_balance.posted - v_item.price - v_balance.reserved
            + v_balance.credit_limit;
            overdraft := least(greatest(0, -v_available), v_item.price);
            UPDATE balances AS b SET
                posted = b.posted - v_item.price, seq = b.seq + 1,
                overdraft = greatest(0, -v_available)
            WHERE b.account_id = v_item.account_id;
        END IF;
        -- What it does not say stays as the row has it, for the witness knows only LiteLLM's side.
        UPDATE usage AS u SET
            settled_at = clock_timestamp(), status = v_item.status,
            model_answered = coalesce(v_item.model_answered, u.model_answered),
            cost_picos = v_item.cost_picos, cost_source = v_item.cost_source,
            price = CASE WHEN v_item.action = 'capture' THEN v_item.price END,
            rounding_attos = v_item.rounding_attos, rule = v_item.rule,
            markup_ppm = v_item.markup_ppm, overdraft = settle_without_hold.overdraft,
            review_reason = CASE
                WHEN settle_without_hold.overdraft > 0
                THEN coalesce(v_item.review_reason, 'overdraft')
                ELSE v_item.review_reason
            END,
            error_code = coalesce(v_item.error_code, u.error_code),
            upstream_status = coalesce(v_item.upstream_status, u.upstream_status),
            client_gone = u.client_gone OR coalesce(v_item.client_gone, false),
            first_byte_ms = coalesce(v_item.first_byte_ms, u.first_byte_ms),
            duration_ms = coalesce(v_item.duration_ms, u.duration_ms),
            service_tier = coalesce(v_item.service_tier, u.service_tier),
            rated_picos = coalesce(v_item.rated_picos, u.rated_picos),
            answer_id = coalesce(v_item.answer_id, u.answer_id)
        WHERE u.account_id = v_item.account_id AND u.request_id = v_item.request_id;
        -- Counts come all or none: parts of one report need not fit into the wholes of another.
        UPDATE usage AS u SET
            input_tokens = v_item.input_tokens, cached_input_tokens = v_item.cached_input_tokens,
            cache_creation_tokens = v_item.cache_creation_tokens,
            cache_creation_1h_tokens = v_item.cache_creation_1h_tokens,
            output_tokens = v_item.output_tokens, reasoning_tokens = v_item.reasoning_tokens,
            audio_input_tokens = v_item.audio_input_tokens,
            audio_output_tokens = v_item.audio_output_tokens,
            image_input_tokens = v_item.image_input_tokens,
            image_output_tokens = v_item.image_output_tokens, images = v_item.images,
            input_characters = v_item.input_characters, audio_ms = v_item.audio_ms,
            queries = v_item.queries
        WHERE u.account_id = v_item.account_id AND u.request_id = v_item.request_id
            AND num_nonnulls(
                v_item.input_tokens, v_item.output_tokens, v_item.images,
                v_item.input_characters, v_item.audio_ms, v_item.queries
            ) > 0;
        RETURN NEXT;
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION create_account(
    p_account_id uuid, p_name text, p_tier text, p_credit_limit bigint, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    INSERT INTO accounts (account_id, name, tier) VALUES (p_account_id, p_name, p_tier)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO balances (account_id, credit_limit) VALUES (p_account_id, p_credit_limit);
    INSERT INTO scope_counters (account_id, scope_id) VALUES (p_account_id, p_account_id);
    INSERT INTO audit_trail VALUES (
        p_account_id, p_account_id, clock_timestamp(), p_actor, 'account.create',
        jsonb_build_object('name', p_name, 'tier', p_tier, 'credit_limit', p_credit_limit)
    );
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION create_key(p_account_id uuid, p_key_hash bytea, p_key jsonb, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_key virtual_keys := jsonb_populate_record(NULL::virtual_keys, p_key);
BEGIN
    PERFORM 1 FROM accounts AS a WHERE a.account_id = p_account_id AND a.status <> 'closed';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF v_key.project_id IS NOT NULL THEN
        -- Nor is it archived before the key is there to be revoked.
        PERFORM 1 FROM projects AS p
        WHERE p.account_id = p_account_id AND p.project_id = v_key.project_id
            AND p.status = 'active'
        FOR SHARE;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
    END IF;
    INSERT INTO virtual_keys (
        account_id, key_id, key_hash, prefix, name, expires_at, allowed_models,
        requests_per_minute, tokens_per_minute, max_concurrency, budget, budget_period, role,
        project_id, allowed_endpoints, allowed_networks
    ) VALUES (
        p_account_id, v_key.key_id, p_key_hash, v_key.prefix, v_key.name, v_key.expires_at,
        v_key.allowed_models, v_key.requests_per_minute, v_key.tokens_per_minute,
        v_key.max_concurrency, v_key.budget, coalesce(v_key.budget_period, 'total'),
        coalesce(v_key.role, 'inference'), v_key.project_id, v_key.allowed_endpoints,
        v_key.allowed_networks
    );
    INSERT INTO scope_counters (account_id, scope_id) VALUES (p_account_id, v_key.key_id);
    INSERT INTO audit_trail VALUES (
        p_account_id, v_key.key_id, clock_timestamp(), p_actor, 'key.create', p_key
    );
    RETURN true;
END $$;

CREATE OR REPLACE FUNCTION resolve_review(
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
        PERFORM count_spending(
            p_account_id, v_usage.key_id, v_usage.project_id, v_taken, v_now,
            CASE p_decision WHEN 'charge' THEN NULL ELSE v_usage.settled_at END
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
    u.attempts, u.witness_picos, u.resolution, u.project_id, u.quantity
FROM usage AS u
UNION ALL
SELECT
    h.account_id, h.request_id, h.key_id, h.created_at, NULL, h.endpoint, h.model, NULL, h.tier,
    h.streamed, h.byok, 'pending', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, h.price_version, h.amount, 0::bigint, NULL, NULL, NULL,
    NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, h.project_id,
    NULL
FROM open_holds AS h;

-- When each key was last used, to some seconds. One that never was has no row.
CREATE TABLE key_uses (
    account_id uuid NOT NULL,
    key_id uuid NOT NULL,
    last_used_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, key_id)
) WITH (fillfactor = 50);

-- What operators look keys up by, over all accounts.
CREATE INDEX virtual_keys_by_id ON virtual_keys (key_id);
CREATE INDEX virtual_keys_by_prefix ON virtual_keys (prefix COLLATE "C", key_id);

-- Write down when keys were last used: so many seconds ago. Sorted, so that two replicas can't wait
-- for each other, and the later time counts, whoever is later in saying so.
CREATE FUNCTION note_key_uses(
    p_account_ids uuid[], p_key_ids uuid[], p_ages_s double precision[]
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
    INSERT INTO key_uses AS k
    SELECT u.account_id, u.key_id, clock_timestamp() - make_interval(secs => u.age_s)
    FROM unnest(p_account_ids, p_key_ids, p_ages_s) AS u(account_id, key_id, age_s)
    ORDER BY u.account_id, u.key_id
    ON CONFLICT (account_id, key_id) DO UPDATE
    SET last_used_at = greatest(k.last_used_at, excluded.last_used_at)
$$;

-- The number of an account's first entry at or after p_at, by halving; one more than that of its
-- last where there is none. Entries are numbered in the order of their times.
CREATE FUNCTION first_seq_since(p_account_id uuid, p_at timestamptz) RETURNS bigint
LANGUAGE plpgsql SET search_path = tallygate, pg_temp SET enable_seqscan = off AS $$
DECLARE
    v_low bigint := 1;
    v_high bigint := (SELECT b.seq + 1 FROM balances AS b WHERE b.account_id = p_account_id);
    v_middle bigint;
    v_entry record;
BEGIN
    WHILE v_low < v_high LOOP
        v_middle := (v_low + v_high) / 2;
        -- Numbers of detached months are missing: the next one there is stands for them.
        SELECT e.seq, e.at INTO v_entry FROM entries AS e
        WHERE e.account_id = p_account_id AND e.seq >= v_middle ORDER BY e.seq LIMIT 1;
        IF v_entry.at < p_at THEN
            v_low := v_entry.seq + 1;
        ELSE
            v_high := v_middle;
        END IF;
    END LOOP;
    RETURN v_low;
END $$;

-- What an account's entries p_first to p_last have taken, since p_since, of the budget of these keys
-- or projects, in nano-USD: the sum that counting them one by one would have come to. A correction
-- and a refund count when their request ended, a refund taken back when it was made, everything else
-- when it was posted.
CREATE FUNCTION spent_by(
    p_account_id uuid, p_scope_ids uuid[], p_since timestamptz, p_first bigint, p_last bigint
) RETURNS bigint
LANGUAGE plpgsql SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN (
        SELECT coalesce(sum(-t.posted_delta), 0)::bigint
        FROM (
            SELECT e.posted_delta, u.key_id, u.project_id
            FROM entries AS e
            INNER JOIN usage AS u
                ON e.account_id = p_account_id AND u.account_id = p_account_id
                AND e.request_id = u.request_id
            WHERE e.seq BETWEEN p_first AND p_last AND e.posted_delta <> 0
                AND CASE e.kind WHEN 'correction' THEN u.settled_at ELSE e.at END >= p_since
            UNION ALL
            SELECT e.posted_delta, u.key_id, u.project_id
            FROM funding AS f
            INNER JOIN usage AS u
                ON f.account_id = p_account_id AND u.account_id = p_account_id
                AND f.subject_id = u.request_id
            INNER JOIN entries AS e ON e.account_id = p_account_id AND f.entry_id = e.request_id
            WHERE f.kind = 'refund' AND f.subject_id IS NOT NULL
                AND e.seq BETWEEN p_first AND p_last AND u.settled_at >= p_since
            UNION ALL
            SELECT e.posted_delta, u.key_id, u.project_id
            FROM funding AS r
            INNER JOIN funding AS f
                ON r.account_id = p_account_id AND f.account_id = p_account_id
                AND r.subject_id = f.entry_id
            INNER JOIN usage AS u ON u.account_id = p_account_id AND f.subject_id = u.request_id
            INNER JOIN entries AS e ON e.account_id = p_account_id AND r.entry_id = e.request_id
            WHERE r.kind = 'reversal' AND r.subject_id IS NOT NULL AND f.kind = 'refund'
                AND e.seq BETWEEN p_first AND p_last AND f.at >= p_since
        ) AS t
        WHERE t.key_id = ANY(p_scope_ids) OR t.project_id = ANY(p_scope_ids)
    );
END $$;

-- What the running period of a budget has taken so far: p_since is where it began, p_through the last
-- entry that is in p_spent. Called with what an earlier call has answered it adds what came since,
-- so that most of it can be added up before a lock for which every request of the account waits.
CREATE FUNCTION spent_so_far(
    p_account_id uuid, p_scope_ids uuid[], p_period text,
    INOUT p_since timestamptz, INOUT p_through bigint, INOUT p_spent bigint
)
LANGUAGE plpgsql SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_since constant timestamptz := period_start(p_period, clock_timestamp());
    v_last constant bigint := (
        SELECT b.seq FROM balances AS b WHERE b.account_id = p_account_id
    );
BEGIN
    IF p_since IS DISTINCT FROM v_since THEN
        p_since := v_since;
        p_through := first_seq_since(p_account_id, v_since) - 1;
        p_spent := 0;
    END IF;
    p_spent := p_spent + spent_by(p_account_id, p_scope_ids, v_since, p_through + 1, v_last);
    p_through := v_last;
END $$;

-- A key and those in whose place it was put: it goes on with what they have used.
CREATE FUNCTION key_line(p_account_id uuid, p_key_id uuid) RETURNS uuid[]
LANGUAGE sql SET search_path = tallygate, pg_temp SET enable_seqscan = off AS $$
    WITH RECURSIVE line AS (
        SELECT p_key_id AS key_id
        UNION
        SELECT k.key_id FROM line AS l
        INNER JOIN virtual_keys AS k
            ON k.account_id = p_account_id AND l.key_id = k.replaced_by
    )
    SELECT array_agg(l.key_id) FROM line AS l
$$;

-- Begin to count in a key's or project's limits the open holds of these keys or projects, as if there
-- had been limits when they were placed. Under the lock of the balance.
CREATE FUNCTION count_open_holds(p_account_id uuid, p_scope_id uuid, p_origin_ids uuid[])
RETURNS void
LANGUAGE plpgsql SET search_path = tallygate, pg_temp SET enable_seqscan = off AS $$
DECLARE
    v_minute constant timestamptz := date_trunc('minute', clock_timestamp());
BEGIN
    WITH counted AS (
        UPDATE open_holds AS h
        SET
            scopes = array_append(h.scopes, p_scope_id),
            minute = coalesce(h.minute, date_trunc('minute', h.created_at))
        WHERE h.account_id = p_account_id
            AND (h.key_id = ANY(p_origin_ids) OR h.project_id = ANY(p_origin_ids))
            AND (h.scopes IS NULL OR p_scope_id <> ALL(h.scopes))
        RETURNING h.amount, h.tokens, h.minute
    )
    UPDATE scope_counters AS c SET
        minute = v_minute,
        requests = CASE WHEN c.minute = v_minute THEN c.requests ELSE 0 END + t.requests,
        tokens = CASE WHEN c.minute = v_minute THEN c.tokens ELSE 0 END + t.tokens,
        holds = c.holds + t.holds,
        reserved = c.reserved + t.amount
    FROM (
        SELECT
            count(*)::integer AS holds, coalesce(sum(d.amount), 0)::bigint AS amount,
            (count(*) FILTER (WHERE d.minute = v_minute))::integer AS requests,
            coalesce(sum(d.tokens) FILTER (WHERE d.minute = v_minute), 0)::bigint AS tokens
        FROM counted AS d
    ) AS t
    WHERE c.account_id = p_account_id AND c.scope_id = p_scope_id;
END $$;

-- What an act changed, for the audit trail: {before, after} of the members that p_changes names.
CREATE FUNCTION changes_of(p_before jsonb, p_after jsonb, p_changes jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE STRICT
RETURN (
    SELECT jsonb_build_object(
        'before', jsonb_object_agg(c.key, p_before -> c.key),
        'after', jsonb_object_agg(c.key, p_after -> c.key)
    )
    FROM jsonb_each(p_changes) AS c (key, value)
);

-- Change a key: what p_changes names of {name, role, project_id, expires_at, allowed_models,
-- allowed_endpoints, allowed_networks, requests_per_minute, tokens_per_minute, max_concurrency,
-- budget, budget_period}; null takes a limit away. A limit that is new counts what is open already,
-- a budget that is new or of another period what its running period has taken. Takes effect on the
-- next authorization of every replica.
--
--   changed                             also where it says what is so already
--   unknown                             there is no such key
--   revoked                             it is no more to be changed
--   unknown_project, archived_project   where the key was to go
CREATE FUNCTION update_key(
    p_account_id uuid, p_key_id uuid, p_changes jsonb, p_event_id uuid, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    v_old virtual_keys;
    v_new virtual_keys;
    v_status text;
    v_since timestamptz;
    v_through bigint;
    v_spent bigint;
BEGIN
    SELECT * INTO v_old FROM virtual_keys AS k
    WHERE k.account_id = p_account_id AND k.key_id = p_key_id;
    v_new := jsonb_populate_record(v_old, p_changes);
    IF v_new.budget IS NOT NULL AND (
        v_old.budget IS NULL OR v_old.budget_period <> v_new.budget_period
    ) THEN
        SELECT s.* INTO v_since, v_through, v_spent FROM spent_so_far(
            p_account_id, key_line(p_account_id, p_key_id), v_new.budget_period, NULL, NULL, NULL
        ) AS s;
    END IF;
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_old FROM virtual_keys AS k
    WHERE k.account_id = p_account_id AND k.key_id = p_key_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'unknown';
    ELSIF v_old.status = 'revoked' THEN
        RETURN 'revoked';
    END IF;
    v_new := jsonb_populate_record(v_old, p_changes);
    IF v_new.project_id IS DISTINCT FROM v_old.project_id AND v_new.project_id IS NOT NULL THEN
        v_status := (
            SELECT p.status FROM projects AS p
            WHERE p.account_id = p_account_id AND p.project_id = v_new.project_id
        );
        IF v_status IS DISTINCT FROM 'active' THEN
            RETURN coalesce(v_status, 'unknown') || '_project';
        END IF;
    END IF;
    IF v_new IS NOT DISTINCT FROM v_old THEN
        RETURN 'changed';
    END IF;
    UPDATE virtual_keys AS k SET
        name = v_new.name, role = v_new.role, project_id = v_new.project_id,
        expires_at = v_new.expires_at, allowed_models = v_new.allowed_models,
        allowed_endpoints = v_new.allowed_endpoints, allowed_networks = v_new.allowed_networks,
        requests_per_minute = v_new.requests_per_minute,
        tokens_per_minute = v_new.tokens_per_minute, max_concurrency = v_new.max_concurrency,
        budget = v_new.budget, budget_period = v_new.budget_period, version = k.version + 1
    WHERE k.account_id = p_account_id AND k.key_id = p_key_id
    RETURNING * INTO v_new;
    IF v_new.is_limited AND NOT v_old.is_limited THEN
        PERFORM count_open_holds(p_account_id, p_key_id, key_line(p_account_id, p_key_id));
    END IF;
    IF v_new.budget IS NOT NULL AND (
        v_old.budget IS NULL OR v_old.budget_period <> v_new.budget_period
    ) THEN
        SELECT s.* INTO v_since, v_through, v_spent FROM spent_so_far(
            p_account_id, key_line(p_account_id, p_key_id), v_new.budget_period, v_since,
            v_through, v_spent
        ) AS s;
        UPDATE scope_counters AS c SET period = v_since, spent = v_spent
        WHERE c.account_id = p_account_id AND c.scope_id = p_key_id;
    END IF;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, clock_timestamp(), p_actor, 'key.update',
        jsonb_build_object('key_id', p_key_id) || changes_of(
            to_jsonb(v_old), to_jsonb(v_new), p_changes
        )
    );
    RETURN 'changed';
END $$;

-- Put a key in another's place, with the same settings and with what that one has used of its
-- limits. The old one ends after p_overlap_s seconds, or at once where that is 0; from now on each
-- of the two counts its own requests, and requests under way count for both.
--
--   rotated    done
--   unknown    there is no such key
--   revoked, expired, replaced   it has ended, or another was put in its place before
--   closed     the account is
CREATE FUNCTION rotate_key(
    p_account_id uuid, p_key_id uuid, p_new_key_id uuid, p_key_hash bytea, p_prefix text,
    p_overlap_s integer, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_old virtual_keys;
    v_now timestamptz;
BEGIN
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_old FROM virtual_keys AS k
    WHERE k.account_id = p_account_id AND k.key_id = p_key_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    IF v_old.key_id IS NULL THEN
        RETURN 'unknown';
    ELSIF v_old.status = 'revoked' THEN
        RETURN 'revoked';
    ELSIF v_old.replaced_by IS NOT NULL THEN
        RETURN 'replaced';
    ELSIF v_old.expires_at <= v_now THEN
        RETURN 'expired';
    END IF;
    PERFORM 1 FROM accounts AS a WHERE a.account_id = p_account_id AND a.status <> 'closed';
    IF NOT FOUND THEN
        RETURN 'closed';
    END IF;
    INSERT INTO virtual_keys (
        account_id, key_id, key_hash, prefix, name, expires_at, allowed_models,
        requests_per_minute, tokens_per_minute, max_concurrency, budget, budget_period, role,
        project_id, allowed_endpoints, allowed_networks
    ) VALUES (
        p_account_id, p_new_key_id, p_key_hash, p_prefix, v_old.name, v_old.expires_at,
        v_old.allowed_models, v_old.requests_per_minute, v_old.tokens_per_minute,
        v_old.max_concurrency, v_old.budget, v_old.budget_period, v_old.role, v_old.project_id,
        v_old.allowed_endpoints, v_old.allowed_networks
    );
    INSERT INTO scope_counters
    SELECT
        c.account_id, p_new_key_id, c.minute, c.requests, c.tokens, c.holds, c.reserved, c.period,
        c.spent
    FROM scope_counters AS c WHERE c.account_id = p_account_id AND c.scope_id = p_key_id;
    UPDATE open_holds AS h SET scopes = array_append(h.scopes, p_new_key_id)
    WHERE h.account_id = p_account_id AND p_key_id = ANY(h.scopes);
    UPDATE virtual_keys AS k SET
        replaced_by = p_new_key_id, version = k.version + 1,
        status = CASE p_overlap_s WHEN 0 THEN 'revoked' ELSE k.status END,
        revoked_at = CASE p_overlap_s WHEN 0 THEN v_now END,
        expires_at = CASE p_overlap_s
            WHEN 0 THEN k.expires_at
            ELSE least(k.expires_at, v_now + make_interval(secs => p_overlap_s))
        END
    WHERE k.account_id = p_account_id AND k.key_id = p_key_id;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_new_key_id, v_now, p_actor, 'key.rotate', jsonb_build_object(
            'key_id', p_key_id, 'replaced_by', p_new_key_id, 'overlap_s', p_overlap_s
        )
    );
    RETURN 'rotated';
END $$;

-- p_project is {name, budget, budget_period}. False if there is no such open account.
CREATE FUNCTION create_project(
    p_account_id uuid, p_project_id uuid, p_project jsonb, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
BEGIN
    PERFORM 1 FROM accounts AS a WHERE a.account_id = p_account_id AND a.status <> 'closed';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO projects (account_id, project_id, name, budget, budget_period) VALUES (
        p_account_id, p_project_id, p_project ->> 'name', (p_project ->> 'budget')::bigint,
        coalesce(p_project ->> 'budget_period', 'total')
    );
    INSERT INTO scope_counters (account_id, scope_id) VALUES (p_account_id, p_project_id);
    INSERT INTO audit_trail VALUES (
        p_account_id, p_project_id, clock_timestamp(), p_actor, 'project.create',
        jsonb_build_object('project_id', p_project_id) || p_project
    );
    RETURN true;
END $$;

-- Change what p_changes names of {name, budget, budget_period}, as update_key does. Answers changed,
-- unknown, or archived, which is no more to be changed.
CREATE FUNCTION update_project(
    p_account_id uuid, p_project_id uuid, p_changes jsonb, p_event_id uuid, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    v_old projects;
    v_new projects;
    v_since timestamptz;
    v_through bigint;
    v_spent bigint;
BEGIN
    SELECT * INTO v_old FROM projects AS p
    WHERE p.account_id = p_account_id AND p.project_id = p_project_id;
    v_new := jsonb_populate_record(v_old, p_changes);
    IF v_new.budget IS NOT NULL AND (
        v_old.budget IS NULL OR v_old.budget_period <> v_new.budget_period
    ) THEN
        SELECT s.* INTO v_since, v_through, v_spent FROM spent_so_far(
            p_account_id, ARRAY[p_project_id], v_new.budget_period, NULL, NULL, NULL
        ) AS s;
    END IF;
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_old FROM projects AS p
    WHERE p.account_id = p_account_id AND p.project_id = p_project_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'unknown';
    ELSIF v_old.status = 'archived' THEN
        RETURN 'archived';
    END IF;
    v_new := jsonb_populate_record(v_old, p_changes);
    IF v_new IS NOT DISTINCT FROM v_old THEN
        RETURN 'changed';
    END IF;
    UPDATE projects AS p SET
        name = v_new.name, budget = v_new.budget, budget_period = v_new.budget_period
    WHERE p.account_id = p_account_id AND p.project_id = p_project_id;
    IF v_new.budget IS NOT NULL AND v_old.budget IS NULL THEN
        PERFORM count_open_holds(p_account_id, p_project_id, ARRAY[p_project_id]);
    END IF;
    IF v_new.budget IS NOT NULL AND (
        v_old.budget IS NULL OR v_old.budget_period <> v_new.budget_period
    ) THEN
        SELECT s.* INTO v_since, v_through, v_spent FROM spent_so_far(
            p_account_id, ARRAY[p_project_id], v_new.budget_period, v_since, v_through, v_spent
        ) AS s;
        UPDATE scope_counters AS c SET period = v_since, spent = v_spent
        WHERE c.account_id = p_account_id AND c.scope_id = p_project_id;
    END IF;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, clock_timestamp(), p_actor, 'project.update',
        jsonb_build_object('project_id', p_project_id) || changes_of(
            to_jsonb(v_old), to_jsonb(v_new), p_changes
        )
    );
    RETURN 'changed';
END $$;

-- Revoke a project's keys, at once and on every replica, and take no more of them. What it was
-- called and what it used stays. Answers archived, also for one that was, or unknown.
CREATE FUNCTION archive_project(
    p_account_id uuid, p_project_id uuid, p_event_id uuid, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_status text;
    v_keys jsonb;
    v_now timestamptz;
BEGIN
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT p.status INTO v_status FROM projects AS p
    WHERE p.account_id = p_account_id AND p.project_id = p_project_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'unknown';
    ELSIF v_status = 'archived' THEN
        RETURN 'archived';
    END IF;
    v_now := clock_timestamp();
    UPDATE projects AS p SET status = 'archived', archived_at = v_now
    WHERE p.account_id = p_account_id AND p.project_id = p_project_id;
    WITH revoked AS (
        UPDATE virtual_keys AS k
        SET status = 'revoked', revoked_at = v_now, version = k.version + 1
        WHERE k.account_id = p_account_id AND k.project_id = p_project_id
            AND k.status = 'active'
        RETURNING k.key_id
    )
    SELECT coalesce(jsonb_agg(r.key_id ORDER BY r.key_id), '[]') INTO v_keys FROM revoked AS r;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, v_now, p_actor, 'project.archive',
        jsonb_build_object('project_id', p_project_id, 'revoked_keys', v_keys)
    );
    RETURN 'archived';
END $$;

REVOKE ALL ON FUNCTION
admission_step, count_spending, note_key_uses, first_seq_since, spent_by, spent_so_far, key_line,
count_open_holds, changes_of, update_key, rotate_key, create_project, update_project,
archive_project
FROM PUBLIC;
REVOKE ALL ON FUNCTION admission_walk(
    integer, integer, boolean, bigint, bigint, bigint, integer, bigint, integer, bigint, bigint,
    integer, bigint, integer
) FROM PUBLIC;
GRANT SELECT ON projects, key_uses TO tallygate_app;
GRANT EXECUTE ON FUNCTION
update_key, rotate_key, note_key_uses, create_project, update_project, archive_project
TO tallygate_app;
