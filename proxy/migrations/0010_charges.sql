-- From version 9 to 10: charges for metered actions, once and recurring; refunds and reversals that
-- know what they are of, and credit limits that change.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of the version
-- before go on as they did.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

-- What it gives back or takes back: the request of a refund, the entry of a reversal.
ALTER TABLE funding ADD COLUMN subject_id uuid;
CREATE INDEX funding_by_subject ON funding (account_id, subject_id) WHERE subject_id IS NOT NULL;

-- Decide a batch of requests and place their holds.
--
-- p_batch is a JSON array of {account_id, request_id, key_id, version, amount, tokens, ttl_s,
-- endpoint, model, tier, streamed, byok, price_version, account_requests_per_minute,
-- account_tokens_per_minute, account_max_concurrency}. `version` is the sum of the account's and
-- the key's version and, but for charges, models_version of `meta` as the proxy knows them;
-- the last three are the limits of the account's tier, left out where there are none. What no key
-- asks for has the account's id as its key_id, and the account's version. Answers a row for each, in
-- order:
--
--   held                   the hold stands
--   exists                 this request already has its hold: a replay after a lost answer
--   duplicate              the same request stands in this batch before
--   already_settled        it had one, and it has ended
--   conflict               it has one of another amount
--   stale                  the proxy's copy of account, key or switches is outdated: read them and ask
--                          again
--   unknown_key, key_revoked, key_expired, account_suspended, account_closed
--   insufficient_credits, budget_exceeded, project_budget_exceeded
--   requests_per_minute, tokens_per_minute, max_concurrency, and the same with account_ before them
--
-- Of a key's limits and the account's, those that leave less are told.
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
    v_models integer;
BEGIN
    SELECT
        array_agg(r.account_id), array_agg(r.request_id ORDER BY r.request_id),
        (SELECT m.value::integer FROM meta AS m WHERE m.name = 'models_version')
    INTO v_accounts, v_requests, v_models
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
            coalesce(k.is_limited, false) OR a.is_account_limited OR p.budget IS NOT NULL
            AS is_limited,
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
                WHEN b.account_id IS NULL OR (k.key_id IS NULL AND a.key_id <> a.account_id)
                THEN 'unknown_key'
                WHEN k.status = 'revoked' THEN 'key_revoked'
                WHEN k.expires_at <= v_now THEN 'key_expired'
                WHEN o.status <> 'active' THEN 'account_' || o.status
                -- The action of a charge is no model, so no switch is for it.
                WHEN o.version + coalesce(
                    k.version + CASE a.endpoint WHEN 'charges' THEN 0 ELSE v_models END, 0
                ) <> a.version THEN 'stale'
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

-- Expire holds whose proxy died: the customer is not charged, and the usage row asks for review.
-- A charge's hold that nobody captured in its time is void, and there is nothing to review: nobody
-- was told that it was captured. One sweeper works at a time; the others find the lock taken and
-- leave. Says how many requests expired.
CREATE OR REPLACE FUNCTION expire_holds(p_limit integer, p_grace_s integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_due json;
    v_expired integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.expire_holds')) THEN
        RETURN 0;
    END IF;
    SELECT json_agg(
        CASE d.endpoint
            WHEN 'charges' THEN json_build_object(
                'account_id', d.account_id, 'request_id', d.request_id, 'action', 'void',
                'status', 'void', 'error_code', 'hold_expired'
            )
            ELSE json_build_object(
                'account_id', d.account_id, 'request_id', d.request_id, 'action', 'expire'
            )
        END
    ) INTO v_due
    FROM (
        SELECT h.account_id, h.request_id, h.endpoint FROM open_holds AS h
        WHERE h.expires_at <= clock_timestamp() - make_interval(secs => p_grace_s)
        ORDER BY h.expires_at LIMIT p_limit
    ) AS d;
    IF v_due IS NULL THEN
        RETURN 0;
    END IF;
    SELECT count(*) INTO v_expired
    FROM settle_batch(v_due, p_grace_s) AS s WHERE s.outcome = 'expired';
    RETURN v_expired;
END $$;

-- The hash of an entry and, where it is a charge, of what was charged for. A later reprice may
-- replace the cost, so the one that was sealed is given.
--
-- Between bars: numbers as they are, NULL as nothing, and texts behind their length, so that no two
-- rows have the same. What only describes the making of the price (rule, markup, rounding) is not
-- in it: the audit makes it anew from what is.
CREATE OR REPLACE FUNCTION entry_leaf(p_entry entries, p_usage usage, p_cost_picos bigint) RETURNS bytea
LANGUAGE sql STABLE
RETURN sha256(convert_to(
    concat(
        (p_entry).account_id, '|', (p_entry).seq, '|', (p_entry).request_id, '|',
        (p_entry).phase, '|', (p_entry).kind, '|', (p_entry).amount, '|',
        (p_entry).posted_delta, '|', (p_entry).reserved_delta, '|', (p_entry).posted_after, '|',
        (p_entry).reserved_after, '|', (extract(EPOCH FROM (p_entry).at) * 1000000)::bigint, '|',
        octet_length((p_entry).reason), ':', (p_entry).reason, '|',
        octet_length((p_entry).reference), ':', (p_entry).reference, '|',
        (p_usage).key_id, '|', octet_length((p_usage).endpoint), ':', (p_usage).endpoint, '|',
        octet_length((p_usage).model), ':', (p_usage).model, '|',
        octet_length((p_usage).tier), ':', (p_usage).tier, '|',
        (p_usage).byok, '|', (p_usage).price_version, '|', p_cost_picos, '|',
        (p_usage).input_tokens, '|', (p_usage).cached_input_tokens, '|',
        (p_usage).cache_creation_tokens, '|', (p_usage).cache_creation_1h_tokens, '|',
        (p_usage).output_tokens, '|', (p_usage).reasoning_tokens, '|',
        (p_usage).audio_input_tokens, '|', (p_usage).audio_output_tokens, '|',
        (p_usage).image_input_tokens, '|', (p_usage).image_output_tokens, '|',
        (p_usage).images, '|', (p_usage).input_characters, '|', (p_usage).audio_ms, '|',
        (p_usage).queries,
        -- Nothing at all for what is no action: seals of before it know no quantity.
        '|' || (p_usage).quantity
    ),
    'UTF8'
));
-- Carry out what an operator decided of a request that waits for a review.
--
--   charge    it ended uncharged: it is charged p_price after all, as a late capture
--   waive     it ended uncharged: it stays so, and is void; it was charged: that stands
--   reprice   it was charged: it gets p_price, and the difference is posted as a correction. Also
--             where nobody had asked for a review
--
-- The rest is how that price was made: p_rule is 'review' where it was set by hand, p_cost_picos
-- NULL where the row's own cost stands. p_settled_at is what the row said when the price was made.
-- Nothing refuses a charge: what is not available is booked as overdraft. Answers
--
--   resolved         done now
--   exists           the same was decided before
--   conflict         something else was
--   stale            the row was completed meanwhile: read it again
--   not_waiting      nobody asked for a review of it, or what it waited for has come
--   not_charged      there is no price to change
--   already_charged  there is one: reprice it
--   refunded         more was refunded than it is to cost: reverse a refund first
--   unknown          no such request has ended
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
        WHEN p_decision = 'reprice' AND p_price < refunded(p_account_id, p_request_id)
        THEN 'refunded'
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
    INSERT INTO usage_dirty VALUES (p_account_id, usage_hour(p_request_id), gen_random_uuid());
    RETURN NEXT;
END $$;

-- ---------------------------------------------------------------------------------------------
-- Metered actions: charges that are no request to a model, once or again and again
-- ---------------------------------------------------------------------------------------------

-- What was asked of a charge. Its money is in the ledger, under the same id, as that of any request:
-- a charge without a hold there never came to be.
CREATE TABLE charges (
    account_id uuid NOT NULL,
    request_id uuid NOT NULL,
    -- SHA-256 of its Idempotency-Key and of what was asked with it.
    key_hash bytea CHECK (length(key_hash) = 32),
    body_hash bytea NOT NULL CHECK (length(body_hash) = 32),
    action text NOT NULL,
    quantity bigint NOT NULL CHECK (quantity > 0),
    -- What all of it is sold for, by this version of the price book: the amount of its hold.
    price bigint NOT NULL CHECK (price >= 0),
    rounding_attos bigint NOT NULL,
    price_version integer NOT NULL,
    -- Whether it is held until somebody captures it; else it is captured at once.
    is_hold boolean NOT NULL,
    ttl_s integer NOT NULL CHECK (ttl_s > 0),
    -- Who made it and alone may end it; NULL for the account's own key.
    operator text,
    recurring_id uuid,
    description text,
    metadata jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (account_id, request_id)
);
CREATE UNIQUE INDEX charges_by_key ON charges (account_id, key_hash);

-- What is charged again each period. Periods are counted from starts_at, the first is 0.
CREATE TABLE recurring_charges (
    account_id uuid NOT NULL,
    recurring_id uuid NOT NULL,
    key_hash bytea CHECK (length(key_hash) = 32),
    body_hash bytea NOT NULL CHECK (length(body_hash) = 32),
    action text NOT NULL,
    quantity bigint NOT NULL CHECK (quantity > 0),
    every text NOT NULL CHECK (every IN ('hour', 'day', 'week', 'month')),
    starts_at timestamptz NOT NULL,
    ends_at timestamptz,
    operator text,
    description text,
    metadata jsonb NOT NULL DEFAULT '{}',
    status text NOT NULL DEFAULT 'active' CHECK (
        status IN ('active', 'past_due', 'paused', 'cancelled', 'ended')
    ),
    -- The period that is charged next, and how many charges of it ended without one: each has an id
    -- of its own, which follows from the two.
    period integer NOT NULL DEFAULT 0 CHECK (period >= 0),
    generation integer NOT NULL DEFAULT 0 CHECK (generation >= 0),
    -- How often that period was refused, and why.
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    problem text,
    -- When somebody looks next.
    due_at timestamptz NOT NULL,
    -- Periods that were never charged: it was paused, or the service was away for too long.
    skipped integer NOT NULL DEFAULT 0 CHECK (skipped >= 0),
    last_charge_id uuid,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (account_id, recurring_id)
);
CREATE UNIQUE INDEX recurring_charges_by_key ON recurring_charges (account_id, key_hash);
CREATE INDEX recurring_charges_by_due ON recurring_charges (due_at)
WHERE status IN ('active', 'past_due');

-- Note what is asked of a charge, before its hold: whoever comes with the same key goes on with the
-- same id, so that it is charged once however often and wherever it is broken off. p_charge has the
-- columns of `charges`. Answers the id and terms to go on with:
--
--   new        nobody asked for it before; or it was to be captured at once and ended uncharged
--   exists     it was asked for before, at these terms
--   conflict   something else was, with the same key
CREATE FUNCTION begin_charge(p_charge jsonb, p_event_id uuid)
RETURNS TABLE (
    outcome text, request_id uuid, price bigint, rounding_attos bigint, price_version integer
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_charge charges := jsonb_populate_record(NULL::charges, p_charge);
    v_prior charges;
BEGIN
    outcome := 'new';
    LOOP
        INSERT INTO charges SELECT v_charge.* ON CONFLICT DO NOTHING;
        EXIT WHEN FOUND;
        IF v_charge.key_hash IS NULL THEN
            SELECT * INTO v_prior FROM charges AS c
            WHERE c.account_id = v_charge.account_id AND c.request_id = v_charge.request_id
            FOR NO KEY UPDATE;
        ELSE
            SELECT * INTO v_prior FROM charges AS c
            WHERE c.account_id = v_charge.account_id AND c.key_hash = v_charge.key_hash
            FOR NO KEY UPDATE;
        END IF;
        CONTINUE WHEN NOT FOUND;  -- it was forgotten in this moment
        outcome := CASE
            WHEN v_prior.body_hash = v_charge.body_hash THEN 'exists' ELSE 'conflict'
        END;
        EXIT WHEN outcome = 'conflict' OR v_prior.is_hold OR v_charge.key_hash IS NULL
            OR v_prior.request_id = v_charge.request_id;
        PERFORM 1 FROM usage AS u
        WHERE u.account_id = v_prior.account_id AND u.request_id = v_prior.request_id
            AND u.status = 'void';
        EXIT WHEN NOT FOUND;
        -- It broke off and its hold is over, so its id is used up. The key begins anew.
        UPDATE charges AS c SET key_hash = NULL
        WHERE c.account_id = v_prior.account_id AND c.request_id = v_prior.request_id;
        outcome := 'new';
    END LOOP;
    IF outcome = 'new' THEN
        IF v_charge.operator IS NOT NULL AND v_charge.recurring_id IS NULL THEN
            INSERT INTO audit_trail VALUES (
                v_charge.account_id, p_event_id, clock_timestamp(), v_charge.operator,
                'charge.create', jsonb_build_object(
                    'request_id', v_charge.request_id, 'action', v_charge.action,
                    'quantity', v_charge.quantity, 'price', v_charge.price,
                    'hold', v_charge.is_hold
                )
            );
        END IF;
        v_prior := v_charge;
    END IF;
    request_id := v_prior.request_id;
    price := v_prior.price;
    rounding_attos := v_prior.rounding_attos;
    price_version := v_prior.price_version;
    RETURN NEXT;
END $$;

-- The ledger refused a charge: forget what was asked, unless it has its hold after all.
CREATE FUNCTION forget_charge(
    p_account_id uuid, p_request_id uuid, p_refusal text, p_event_id uuid
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_charge charges;
BEGIN
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    PERFORM 1 FROM entries AS e
    WHERE e.account_id = p_account_id AND e.request_id = p_request_id AND e.phase = 0;
    IF NOT FOUND THEN
        DELETE FROM charges AS c
        WHERE c.account_id = p_account_id AND c.request_id = p_request_id
        RETURNING c.* INTO v_charge;
        IF v_charge.operator IS NOT NULL AND v_charge.recurring_id IS NULL THEN
            INSERT INTO audit_trail VALUES (
                p_account_id, p_event_id, clock_timestamp(), v_charge.operator, 'charge.refused',
                jsonb_build_object('request_id', p_request_id, 'refusal', p_refusal)
            );
        END IF;
    END IF;
END $$;

-- End a charge's hold by settle_batch, for an operator with a line in the trail (p_actor, else
-- NULL). p_settlement is one of its items. Its outcomes, and
--
--   too_late   its time to be captured is over, though the sweeper has not come yet
--   forgotten  what was asked is not known any more: it is void
CREATE FUNCTION end_charge(p_settlement json, p_event_id uuid, p_actor text)
RETURNS TABLE (outcome text, overdraft bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_item settlement := json_populate_record(NULL::settlement, p_settlement);
    v_charge charges;
BEGIN
    overdraft := 0;
    PERFORM 1 FROM balances AS b WHERE b.account_id = v_item.account_id FOR NO KEY UPDATE;
    SELECT * INTO v_charge FROM charges AS c
    WHERE c.account_id = v_item.account_id AND c.request_id = v_item.request_id;
    IF NOT FOUND THEN
        PERFORM 1 FROM settle_batch(json_build_array(json_build_object(
            'account_id', v_item.account_id, 'request_id', v_item.request_id, 'action', 'void',
            'status', 'void'
        )));
        outcome := 'forgotten';
        RETURN NEXT;
        RETURN;
    END IF;
    IF v_item.action = 'capture' AND v_charge.is_hold THEN
        PERFORM 1 FROM open_holds AS h
        WHERE h.account_id = v_item.account_id AND h.request_id = v_item.request_id
            AND h.expires_at <= clock_timestamp();
        IF FOUND THEN
            outcome := 'too_late';
            RETURN NEXT;
            RETURN;
        END IF;
    END IF;
    SELECT s.outcome, s.overdraft INTO end_charge.outcome, end_charge.overdraft
    FROM settle_batch(json_build_array(p_settlement)) AS s;
    IF p_actor IS NOT NULL AND outcome IN ('captured', 'voided') THEN
        INSERT INTO audit_trail VALUES (
            v_item.account_id, p_event_id, clock_timestamp(), p_actor,
            'charge.' || v_item.action, jsonb_build_object(
                'request_id', v_item.request_id, 'action', v_charge.action,
                'quantity', v_item.quantity, 'price', v_item.price
            )
        );
    END IF;
    RETURN NEXT;
END $$;

-- When a period begins: counted from the first, so that the 31st comes back after a short month.
CREATE FUNCTION recurring_period(p_starts_at timestamptz, p_every text, p_number integer)
RETURNS timestamptz LANGUAGE sql IMMUTABLE STRICT
RETURN (
    p_starts_at AT TIME ZONE 'UTC' + CASE p_every
        WHEN 'hour' THEN make_interval(hours => p_number)
        WHEN 'day' THEN make_interval(days => p_number)
        WHEN 'week' THEN make_interval(weeks => p_number)
        ELSE make_interval(months => p_number)
    END
) AT TIME ZONE 'UTC';

-- The number of the period that holds a time; negative before the first.
CREATE FUNCTION recurring_number(p_starts_at timestamptz, p_every text, p_at timestamptz)
RETURNS integer LANGUAGE sql IMMUTABLE STRICT
RETURN (
    SELECT CASE
        WHEN p_every = 'month'
        THEN months - (recurring_period(p_starts_at, 'month', months) > p_at)::integer
        ELSE floor(
            extract(EPOCH FROM p_at - p_starts_at)
            / CASE p_every WHEN 'hour' THEN 3600 WHEN 'day' THEN 86400 ELSE 604800 END
        )::integer
    END
    FROM (
        SELECT (
            12 * (
                extract(YEAR FROM p_at AT TIME ZONE 'UTC')
                - extract(YEAR FROM p_starts_at AT TIME ZONE 'UTC')
            ) + extract(MONTH FROM p_at AT TIME ZONE 'UTC')
            - extract(MONTH FROM p_starts_at AT TIME ZONE 'UTC')
        )::integer AS months
    ) AS elapsed
);

-- Make a recurring charge. p_recurring has the columns of `recurring_charges`. Answers new, exists or
-- conflict as begin_charge does.
CREATE FUNCTION create_recurring_charge(p_recurring jsonb, p_event_id uuid, p_actor text)
RETURNS TABLE (outcome text, recurring_id uuid)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_new recurring_charges := jsonb_populate_record(NULL::recurring_charges, p_recurring);
    v_prior recurring_charges;
BEGIN
    INSERT INTO recurring_charges AS r (
        account_id, recurring_id, key_hash, body_hash, action, quantity, every, starts_at, ends_at,
        operator, description, metadata, due_at
    ) VALUES (
        v_new.account_id, v_new.recurring_id, v_new.key_hash, v_new.body_hash, v_new.action,
        v_new.quantity, v_new.every, coalesce(v_new.starts_at, clock_timestamp()), v_new.ends_at,
        v_new.operator, v_new.description, v_new.metadata,
        coalesce(v_new.starts_at, clock_timestamp())
    ) ON CONFLICT DO NOTHING;
    IF FOUND THEN
        INSERT INTO audit_trail VALUES (
            v_new.account_id, p_event_id, clock_timestamp(), p_actor, 'recurring_charge.create',
            jsonb_build_object(
                'recurring_id', v_new.recurring_id, 'action', v_new.action,
                'quantity', v_new.quantity, 'every', v_new.every
            )
        );
        RETURN QUERY SELECT 'new', v_new.recurring_id;
        RETURN;
    END IF;
    SELECT * INTO v_prior FROM recurring_charges AS r
    WHERE r.account_id = v_new.account_id
        AND (r.key_hash = v_new.key_hash OR r.recurring_id = v_new.recurring_id);
    RETURN QUERY SELECT
        CASE WHEN v_prior.body_hash = v_new.body_hash THEN 'exists' ELSE 'conflict' END,
        v_prior.recurring_id;
END $$;

-- Pause, resume or cancel a recurring charge; p_is_operator may do so with any, the account's own
-- keys with their own. What was missed while it was paused is skipped, the running period is not.
--
--   done           done now
--   exists         it is as wanted already
--   over           it is cancelled or has ended, for good
--   not_allowed    an operator made it
--   unknown        there is no such
CREATE FUNCTION change_recurring_charge(
    p_account_id uuid, p_recurring_id uuid, p_change text, p_is_operator boolean,
    p_event_id uuid, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_now timestamptz;
    v_charge recurring_charges;
    v_status constant text := CASE p_change
        WHEN 'pause' THEN 'paused' WHEN 'resume' THEN 'active' ELSE 'cancelled'
    END;
    v_period integer;
BEGIN
    SELECT * INTO v_charge FROM recurring_charges AS r
    WHERE r.account_id = p_account_id AND r.recurring_id = p_recurring_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'unknown';
    ELSIF v_charge.operator IS NOT NULL AND NOT p_is_operator THEN
        RETURN 'not_allowed';
    ELSIF v_charge.status = v_status THEN
        RETURN 'exists';
    ELSIF v_charge.status IN ('cancelled', 'ended') THEN
        RETURN 'over';
    END IF;
    v_now := clock_timestamp();
    v_period := v_charge.period;
    IF p_change = 'resume' AND v_charge.status = 'paused' THEN
        v_period := greatest(
            v_period, recurring_number(v_charge.starts_at, v_charge.every, v_now)
        );
    END IF;
    UPDATE recurring_charges AS r SET
        status = v_status, attempts = 0, period = v_period,
        generation = CASE WHEN v_period = r.period THEN r.generation ELSE 0 END,
        skipped = r.skipped + v_period - r.period,
        problem = CASE p_change WHEN 'resume' THEN NULL ELSE r.problem END,
        due_at = recurring_period(r.starts_at, r.every, v_period)
    WHERE r.account_id = p_account_id AND r.recurring_id = p_recurring_id;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, v_now, p_actor, 'recurring_charge.' || p_change,
        jsonb_build_object('recurring_id', p_recurring_id, 'status', v_charge.status)
    );
    RETURN 'done';
END $$;

-- Take recurring charges that are due, for p_lease_s: whoever dies with them leaves them to the next.
-- What began more than p_catch_up_s ago is skipped, but the running period is not.
CREATE FUNCTION claim_recurring_charges(p_limit integer, p_lease_s integer, p_catch_up_s integer)
RETURNS TABLE (
    account_id uuid, recurring_id uuid, period integer, generation integer,
    period_at timestamptz, action text, quantity bigint, operator text, description text,
    metadata jsonb
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz;
    v_due record;
    v_period integer;
    v_is_over boolean;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.recurring_charges')) THEN
        RETURN;
    END IF;
    v_now := clock_timestamp();
    FOR v_due IN
        SELECT r.* FROM recurring_charges AS r
        WHERE r.status IN ('active', 'past_due') AND r.due_at <= v_now
        ORDER BY r.due_at LIMIT p_limit FOR NO KEY UPDATE SKIP LOCKED
    LOOP
        v_period := greatest(v_due.period, least(
            recurring_number(v_due.starts_at, v_due.every, v_now),
            recurring_number(
                v_due.starts_at, v_due.every, v_now - make_interval(secs => p_catch_up_s)
            ) + 1
        ));
        v_is_over := coalesce(
            recurring_period(v_due.starts_at, v_due.every, v_period) >= v_due.ends_at, false
        );
        UPDATE recurring_charges AS r SET
            status = CASE WHEN v_is_over THEN 'ended' ELSE r.status END,
            period = v_period,
            generation = CASE WHEN v_period = r.period THEN r.generation ELSE 0 END,
            skipped = r.skipped + v_period - r.period,
            due_at = v_now + make_interval(secs => p_lease_s)
        WHERE r.account_id = v_due.account_id AND r.recurring_id = v_due.recurring_id
        RETURNING r.generation INTO v_due.generation;
        IF NOT v_is_over THEN
            RETURN QUERY SELECT
                v_due.account_id, v_due.recurring_id, v_period, v_due.generation,
                recurring_period(v_due.starts_at, v_due.every, v_period), v_due.action,
                v_due.quantity, v_due.operator, v_due.description, v_due.metadata;
        END IF;
    END LOOP;
END $$;

-- Say what came of a period; false where that was known already.
--
--   charged   by p_charge_id: on to the next
--   again     the charge under its id ended uncharged: once more under the next id
--   later     nothing is known of it, or it came too soon: try in p_retry_s
--   refused   for p_problem: try in p_retry_s, and pause after p_attempts
CREATE FUNCTION finish_recurring_charge(
    p_account_id uuid, p_recurring_id uuid, p_period integer, p_outcome text, p_charge_id uuid,
    p_problem text, p_retry_s integer, p_attempts integer
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_now constant timestamptz := clock_timestamp();
BEGIN
    UPDATE recurring_charges AS r SET
        period = r.period + (p_outcome = 'charged')::integer,
        generation = CASE p_outcome
            WHEN 'charged' THEN 0 WHEN 'again' THEN r.generation + 1 ELSE r.generation
        END,
        attempts = CASE p_outcome
            WHEN 'charged' THEN 0 WHEN 'refused' THEN r.attempts + 1 ELSE r.attempts
        END,
        problem = CASE p_outcome
            WHEN 'charged' THEN NULL WHEN 'refused' THEN p_problem ELSE r.problem
        END,
        last_charge_id = coalesce(p_charge_id, r.last_charge_id),
        due_at = CASE p_outcome
            WHEN 'charged' THEN recurring_period(r.starts_at, r.every, r.period + 1)
            WHEN 'again' THEN v_now
            ELSE v_now + make_interval(secs => p_retry_s)
        END,
        -- It may have been paused or cancelled while it was charged.
        status = CASE
            WHEN r.status NOT IN ('active', 'past_due') THEN r.status
            WHEN p_outcome = 'charged' THEN CASE
                WHEN recurring_period(r.starts_at, r.every, r.period + 1) >= r.ends_at THEN 'ended'
                ELSE 'active'
            END
            WHEN p_outcome = 'refused' THEN CASE
                WHEN r.attempts + 1 >= p_attempts THEN 'paused' ELSE 'past_due'
            END
            ELSE r.status
        END
    WHERE r.account_id = p_account_id AND r.recurring_id = p_recurring_id
        AND r.period = p_period;
    RETURN FOUND;
END $$;

-- ---------------------------------------------------------------------------------------------
-- What operators correct: refunds, reversals, credit limits
-- ---------------------------------------------------------------------------------------------

-- What was refunded of a request so far, in nano-USD.
CREATE FUNCTION refunded(p_account_id uuid, p_request_id uuid) RETURNS bigint
LANGUAGE sql STABLE SET search_path = tallygate, pg_temp AS $$
    SELECT coalesce(sum(f.amount), 0)::bigint FROM funding AS f
    WHERE f.account_id = p_account_id AND f.subject_id = p_request_id AND f.kind = 'refund'
        AND NOT EXISTS (
            SELECT 1 FROM funding AS r
            WHERE r.account_id = p_account_id AND r.subject_id = f.entry_id
                AND r.kind = 'reversal'
        )
$$;

-- Give back what a request or a charge was sold for, or a part of it: never more than its price in
-- all. p_amount NULL is what is left of that; p_request_id NULL a refund of nothing in particular.
-- Idempotent by p_reference. `refunded` is what was refunded of the request after it.
--
--   posted, exists, conflict, unknown_account   as fund has them
--   unknown      no such request has ended
--   not_charged  it has no price
--   exceeds      less is left of its price than p_amount, or nothing
CREATE FUNCTION refund(
    p_account_id uuid, p_entry_id uuid, p_request_id uuid, p_amount bigint, p_reference text,
    p_reason text, p_actor text
) RETURNS TABLE (
    outcome text, entry_id uuid, amount bigint, refunded bigint, posted bigint, reserved bigint,
    credit_limit bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_balance balances;
    v_prior funding;
    v_usage usage;
    v_refunded bigint := 0;
    v_amount bigint := p_amount;
BEGIN
    SELECT * INTO v_balance FROM balances AS b
    WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_prior FROM funding AS f
    WHERE f.account_id = p_account_id AND f.source = 'refund' AND f.external_id = p_reference;
    SELECT * INTO v_usage FROM usage AS u
    WHERE u.account_id = p_account_id AND u.request_id = p_request_id;
    IF p_request_id IS NOT NULL THEN
        v_refunded := refunded(p_account_id, p_request_id);
        v_amount := coalesce(p_amount, v_usage.price - v_refunded);
    END IF;
    outcome := CASE
        WHEN v_balance.account_id IS NULL THEN 'unknown_account'
        WHEN v_prior.entry_id IS NOT NULL THEN CASE
            WHEN v_prior.subject_id IS NOT DISTINCT FROM p_request_id
                AND v_prior.amount = coalesce(p_amount, v_prior.amount)
            THEN 'exists'
            ELSE 'conflict'
        END
        WHEN p_request_id IS NULL THEN 'posted'
        WHEN v_usage.request_id IS NULL THEN 'unknown'
        WHEN v_usage.price IS NULL THEN 'not_charged'
        WHEN v_amount <= 0 OR v_amount > v_usage.price - v_refunded THEN 'exceeds'
        ELSE 'posted'
    END;
    entry_id := v_prior.entry_id;
    amount := v_prior.amount;
    IF outcome = 'posted' THEN
        v_balance := post_credits(
            p_account_id, p_entry_id, 'refund', v_amount, 'refund', p_reference, p_reason,
            p_reference, p_actor
        );
        UPDATE funding AS f SET subject_id = p_request_id
        WHERE f.account_id = p_account_id AND f.source = 'refund' AND f.external_id = p_reference;
        -- As a correction: in the budgets whose running period the charge counts in.
        PERFORM count_spending(
            p_account_id, v_usage.key_id, v_usage.project_id, -v_amount, clock_timestamp(),
            v_usage.settled_at
        ) WHERE p_request_id IS NOT NULL;
        INSERT INTO audit_trail VALUES (
            p_account_id, p_entry_id, clock_timestamp(), p_actor, 'refund', jsonb_build_object(
                'amount', v_amount, 'request_id', p_request_id, 'reference', p_reference,
                'reason', p_reason
            )
        );
        entry_id := p_entry_id;
        amount := v_amount;
        v_refunded := v_refunded + v_amount;
    END IF;
    refunded := v_refunded;
    posted := v_balance.posted;
    reserved := v_balance.reserved;
    credit_limit := v_balance.credit_limit;
    RETURN NEXT;
END $$;

-- Take back a deposit, grant, refund or adjustment, all of it and once. Idempotent by p_reference.
--
--   posted, exists, conflict, insufficient_credits, unknown_account   as fund has them
--   unknown            the account has no such entry of money that is no request's
--   not_reversible     it is a reversal itself, or credits that expired
--   expiring           credits that expire by themselves: what of them is there nobody can tell
--   already_reversed   it was taken back before
CREATE FUNCTION reverse_funding(
    p_account_id uuid, p_entry_id uuid, p_reversed_id uuid, p_reference text, p_reason text,
    p_actor text
) RETURNS TABLE (
    outcome text, entry_id uuid, amount bigint, posted bigint, reserved bigint,
    credit_limit bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_balance balances;
    v_prior funding;
    v_funding funding;
    v_usage usage;
BEGIN
    SELECT * INTO v_balance FROM balances AS b
    WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_prior FROM funding AS f
    WHERE f.account_id = p_account_id AND f.source = 'reversal' AND f.external_id = p_reference;
    SELECT * INTO v_funding FROM funding AS f
    WHERE f.account_id = p_account_id AND f.entry_id = p_reversed_id;
    outcome := CASE
        WHEN v_balance.account_id IS NULL THEN 'unknown_account'
        WHEN v_prior.entry_id IS NOT NULL THEN CASE
            WHEN v_prior.subject_id = p_reversed_id THEN 'exists' ELSE 'conflict'
        END
        WHEN v_funding.entry_id IS NULL THEN 'unknown'
        WHEN v_funding.kind NOT IN ('deposit', 'grant', 'refund', 'adjustment')
        THEN 'not_reversible'
        WHEN EXISTS (
            SELECT 1 FROM expiring_credits AS x
            WHERE x.account_id = p_account_id AND x.grant_id = p_reversed_id
        ) THEN 'expiring'
        WHEN EXISTS (
            SELECT 1 FROM funding AS f
            WHERE f.account_id = p_account_id AND f.subject_id = p_reversed_id
                AND f.kind = 'reversal'
        ) THEN 'already_reversed'
        WHEN v_funding.amount > 0
            AND v_balance.posted - v_funding.amount - v_balance.reserved
            + v_balance.credit_limit < 0
        THEN 'insufficient_credits'
        ELSE 'posted'
    END;
    entry_id := v_prior.entry_id;
    amount := coalesce(v_prior.amount, -v_funding.amount);
    IF outcome = 'posted' THEN
        v_balance := post_credits(
            p_account_id, p_entry_id, 'reversal', -v_funding.amount, 'reversal', p_reference,
            p_reason, p_reference, p_actor
        );
        UPDATE funding AS f SET subject_id = p_reversed_id
        WHERE f.account_id = p_account_id AND f.source = 'reversal'
            AND f.external_id = p_reference;
        IF v_funding.kind = 'refund' AND v_funding.subject_id IS NOT NULL THEN
            SELECT * INTO v_usage FROM usage AS u
            WHERE u.account_id = p_account_id AND u.request_id = v_funding.subject_id;
            PERFORM count_spending(
                p_account_id, v_usage.key_id, v_usage.project_id, v_funding.amount,
                clock_timestamp(), v_funding.at
            );
        END IF;
        INSERT INTO audit_trail VALUES (
            p_account_id, p_entry_id, clock_timestamp(), p_actor, 'reversal', jsonb_build_object(
                'amount', -v_funding.amount, 'entry_id', p_reversed_id, 'kind', v_funding.kind,
                'reference', p_reference, 'reason', p_reason
            )
        );
        entry_id := p_entry_id;
    END IF;
    posted := v_balance.posted;
    reserved := v_balance.reserved;
    credit_limit := v_balance.credit_limit;
    RETURN NEXT;
END $$;

-- Say how far an account may go below zero. Not below what it uses of that already: `in_use`. The
-- audit finds in the trail which limit held when a hold was placed. Answers set, exists (it is that
-- already), in_use or unknown_account.
CREATE FUNCTION set_credit_limit(
    p_account_id uuid, p_credit_limit bigint, p_reason text, p_event_id uuid, p_actor text
) RETURNS TABLE (outcome text, posted bigint, reserved bigint, credit_limit bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_balance balances;
BEGIN
    SELECT * INTO v_balance FROM balances AS b
    WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    outcome := CASE
        WHEN v_balance.account_id IS NULL THEN 'unknown_account'
        WHEN v_balance.credit_limit = p_credit_limit THEN 'exists'
        WHEN p_credit_limit < v_balance.credit_limit
            AND v_balance.posted - v_balance.reserved + p_credit_limit < 0
        THEN 'in_use'
        ELSE 'set'
    END;
    IF outcome = 'set' THEN
        UPDATE balances AS b SET
            credit_limit = p_credit_limit,
            overdraft = greatest(0, -(b.posted - b.reserved + p_credit_limit))
        WHERE b.account_id = p_account_id;
        INSERT INTO audit_trail VALUES (
            p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.credit_limit',
            jsonb_build_object(
                'credit_limit', p_credit_limit, 'before', v_balance.credit_limit,
                'seq', v_balance.seq, 'reason', p_reason
            )
        );
        v_balance.credit_limit := p_credit_limit;
    END IF;
    posted := v_balance.posted;
    reserved := v_balance.reserved;
    credit_limit := v_balance.credit_limit;
    RETURN NEXT;
END $$;

-- The limit that held when an account's entry of this number was written.
CREATE FUNCTION credit_limit_at(p_account_id uuid, p_seq bigint) RETURNS bigint
LANGUAGE sql STABLE SET search_path = tallygate, pg_temp AS $$
    SELECT coalesce(
        (
            SELECT (t.detail ->> 'before')::bigint FROM audit_trail AS t
            WHERE t.account_id = p_account_id AND t.action = 'account.credit_limit'
                AND (t.detail ->> 'seq')::bigint >= p_seq
            ORDER BY (t.detail ->> 'seq')::bigint, t.event_id LIMIT 1
        ),
        (SELECT b.credit_limit FROM balances AS b WHERE b.account_id = p_account_id)
    )
$$;

-- ---------------------------------------------------------------------------------------------
-- Rights
-- ---------------------------------------------------------------------------------------------

REVOKE ALL ON FUNCTION
begin_charge, forget_charge, end_charge, recurring_period, recurring_number,
create_recurring_charge, change_recurring_charge, claim_recurring_charges,
finish_recurring_charge, refunded, refund, reverse_funding, set_credit_limit, credit_limit_at
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
begin_charge, forget_charge, end_charge, recurring_period, create_recurring_charge,
change_recurring_charge, claim_recurring_charges, finish_recurring_charge, refunded, refund,
reverse_funding, set_credit_limit, credit_limit_at
TO tallygate_app;
GRANT SELECT ON charges, recurring_charges TO tallygate_app;
