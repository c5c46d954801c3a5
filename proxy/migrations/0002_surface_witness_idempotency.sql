-- From version 1 to 2: the whole OpenAI surface, the witness, and idempotency keys.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of version 1
-- go on working on the result, so they may be replaced one after the other afterwards.
--
-- `usage` is read once, for its new constraints and its index, and nobody can write it meanwhile:
-- settlements wait, then go to their proxies' spools.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
-- Whoever waits for a table alone holds up everybody behind: better to fail behind a long report
-- or a dump, and to be run again.
SET LOCAL lock_timeout = '3s';

ALTER TABLE accounts ADD COLUMN replay_retries boolean NOT NULL DEFAULT true;

ALTER TABLE usage
ADD COLUMN input_characters bigint,
ADD COLUMN audio_ms bigint,
ADD COLUMN queries bigint,
ADD COLUMN service_tier text,
ADD COLUMN rated_picos bigint CHECK (rated_picos >= 0),
ADD COLUMN answer_id text,
ADD COLUMN attempts integer,
ADD COLUMN witness_picos bigint CHECK (witness_picos >= 0);
CREATE INDEX usage_by_answer ON usage (account_id, answer_id) WHERE endpoint = 'responses';

CREATE TABLE idempotency_keys (
    account_id uuid NOT NULL,
    key_hash bytea NOT NULL CHECK (length(key_hash) = 32),
    body_hash bytea NOT NULL CHECK (length(body_hash) = 32),
    request_id uuid NOT NULL,
    state text NOT NULL CHECK (state IN ('in_flight', 'done')),
    lease_until timestamptz NOT NULL,
    http_status integer,
    headers jsonb,
    body bytea,
    body_bytes integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, key_hash),
    CONSTRAINT idempotency_keys_answer_is_whole CHECK (
        num_nonnulls(http_status, headers, body) = CASE
            WHEN state = 'done' AND body IS NOT NULL THEN 3 ELSE 0
        END
    ),
    CONSTRAINT idempotency_keys_bytes_add_up CHECK (body_bytes = coalesce(length(body), 0))
);
CREATE INDEX idempotency_keys_by_expiry ON idempotency_keys (expires_at);
-- What idempotency_finish sums up, without the heap where it can.
CREATE INDEX idempotency_keys_kept ON idempotency_keys (account_id) INCLUDE (body_bytes)
WHERE body_bytes > 0;

ALTER TYPE settlement
ADD ATTRIBUTE input_characters bigint,
ADD ATTRIBUTE audio_ms bigint,
ADD ATTRIBUTE queries bigint,
ADD ATTRIBUTE service_tier text,
ADD ATTRIBUTE rated_picos bigint,
ADD ATTRIBUTE answer_id text;

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
            h.model, h.tier, h.streamed, h.byok, h.price_version,
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
        UPDATE key_counters AS c
        SET
            holds = c.holds - t.holds,
            reserved = c.reserved - t.hold,
            -- The estimate of tokens gives way to what was used, if its minute is still running.
            tokens = c.tokens + CASE WHEN c.minute = v_minute THEN t.tokens ELSE 0 END,
            period = period_start(k.budget_period, v_now),
            spent = t.charge
            + CASE WHEN c.period = period_start(k.budget_period, v_now) THEN c.spent ELSE 0 END
        FROM (
            SELECT
                p.account_id, p.key_id, count(*)::integer AS holds,
                sum(p.hold)::bigint AS hold, sum(p.charge)::bigint AS charge,
                coalesce(sum(coalesce(p.input_tokens + p.output_tokens, p.tokens) - p.tokens)
                    FILTER (WHERE p.minute = v_minute AND p.action = 'capture'), 0)::bigint
                AS tokens
            FROM judged AS p WHERE p.minute IS NOT NULL
            GROUP BY p.account_id, p.key_id
        ) AS t
        INNER JOIN virtual_keys AS k ON t.account_id = k.account_id AND t.key_id = k.key_id
        WHERE c.account_id = t.account_id AND c.key_id = t.key_id
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
            p.service_tier, p.rated_picos, p.answer_id
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
            UPDATE key_counters AS c SET
                period = period_start(k.budget_period, clock_timestamp()),
                spent = v_item.price + CASE
                    WHEN c.period = period_start(k.budget_period, clock_timestamp())
                    THEN c.spent ELSE 0
                END
            FROM virtual_keys AS k
            WHERE c.account_id = v_item.account_id AND c.key_id = v_usage.key_id
                AND k.account_id = c.account_id AND k.key_id = c.key_id AND k.is_limited;
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

CREATE FUNCTION note_witness(p_batch json) RETURNS TABLE (ord integer, outcome text)
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
                WHEN n.mismatch THEN coalesce(u.review_reason, 'witness_mismatch')
                ELSE u.review_reason
            END,
            resolved_at = CASE
                WHEN n.mismatch AND u.review_reason IS NULL THEN NULL ELSE u.resolved_at
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

CREATE FUNCTION idempotency_begin(
    p_account_id uuid, p_key_hash bytea, p_body_hash bytea, p_request_id uuid, p_lease_s integer,
    p_ttl_s integer
) RETURNS TABLE (outcome text, request_id uuid, http_status integer, headers jsonb, body bytea)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_now timestamptz := clock_timestamp();
    v_lease interval := make_interval(secs => p_lease_s);
    v_ttl interval := make_interval(secs => p_ttl_s);
    v_key idempotency_keys;
    v_status text;
    v_settled_at timestamptz;
BEGIN
    LOOP
        INSERT INTO idempotency_keys (
            account_id, key_hash, body_hash, request_id, state, lease_until, created_at, expires_at
        ) VALUES (
            p_account_id, p_key_hash, p_body_hash, p_request_id, 'in_flight', v_now + v_lease,
            v_now, v_now + v_ttl
        ) ON CONFLICT DO NOTHING;
        IF FOUND THEN
            RETURN QUERY SELECT 'new', p_request_id, NULL::integer, NULL::jsonb, NULL::bytea;
            RETURN;
        END IF;
        SELECT * INTO v_key FROM idempotency_keys AS k
        WHERE k.account_id = p_account_id AND k.key_hash = p_key_hash FOR NO KEY UPDATE;
        EXIT WHEN FOUND;  -- else it was released in this moment
    END LOOP;

    outcome := CASE
        WHEN v_key.expires_at <= v_now THEN 'new'
        WHEN v_key.body_hash <> p_body_hash THEN 'conflict'
        WHEN v_key.state = 'done' AND v_key.body IS NOT NULL THEN 'replay'
        WHEN v_key.state = 'done' THEN 'lost'
        WHEN v_key.request_id = p_request_id THEN 'new'
        WHEN v_key.lease_until > v_now THEN 'in_flight'
    END;
    IF outcome IS NULL THEN
        -- Its lease is over: either it takes longer, or its proxy died. A hold and the usage row
        -- in its place change in one transaction, so one of the two looks sees what there is.
        PERFORM 1 FROM open_holds AS h
        WHERE h.account_id = p_account_id AND h.request_id = v_key.request_id;
        IF FOUND THEN
            outcome := 'in_flight';
        ELSE
            SELECT u.status, u.settled_at INTO v_status, v_settled_at FROM usage AS u
            WHERE u.account_id = p_account_id AND u.request_id = v_key.request_id;
            outcome := CASE
                WHEN v_status IS NULL OR v_status NOT IN ('billed', 'byok') THEN 'new'
                WHEN v_settled_at > v_now - v_lease THEN 'in_flight'  -- its answer may be on its way
                ELSE 'lost'
            END;
        END IF;
    END IF;
    IF outcome = 'new' THEN
        UPDATE idempotency_keys AS k SET
            body_hash = p_body_hash, request_id = p_request_id, state = 'in_flight',
            lease_until = v_now + v_lease, http_status = NULL, headers = NULL, body = NULL,
            body_bytes = 0, created_at = v_now, expires_at = v_now + v_ttl
        WHERE k.account_id = p_account_id AND k.key_hash = p_key_hash;
        RETURN QUERY SELECT outcome, p_request_id, NULL::integer, NULL::jsonb, NULL::bytea;
    ELSIF outcome = 'replay' THEN
        RETURN QUERY SELECT
            outcome, v_key.request_id, v_key.http_status, v_key.headers, v_key.body;
    ELSE
        RETURN QUERY SELECT outcome, v_key.request_id, NULL::integer, NULL::jsonb, NULL::bytea;
    END IF;
END $$;

CREATE FUNCTION idempotency_finish(
    p_account_id uuid, p_key_hash bytea, p_request_id uuid, p_http_status integer,
    p_headers jsonb, p_body bytea, p_max_account_bytes bigint
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_fits boolean := false;
    v_is_kept boolean;
BEGIN
    IF p_body IS NOT NULL THEN
        SELECT coalesce(sum(k.body_bytes), 0) + length(p_body) <= p_max_account_bytes INTO v_fits
        FROM idempotency_keys AS k
        WHERE k.account_id = p_account_id AND k.body_bytes > 0;
    END IF;
    UPDATE idempotency_keys AS k SET
        state = 'done',
        http_status = CASE WHEN v_fits THEN p_http_status END,
        headers = CASE WHEN v_fits THEN p_headers END,
        body = CASE WHEN v_fits THEN p_body END,
        body_bytes = CASE WHEN v_fits THEN length(p_body) ELSE 0 END
    WHERE k.account_id = p_account_id AND k.key_hash = p_key_hash
        AND k.request_id = p_request_id AND k.state = 'in_flight';
    SELECT k.body IS NOT NULL INTO v_is_kept FROM idempotency_keys AS k
    WHERE k.account_id = p_account_id AND k.key_hash = p_key_hash
        AND k.request_id = p_request_id;
    RETURN v_is_kept;
END $$;

CREATE FUNCTION idempotency_release(p_account_id uuid, p_key_hash bytea, p_request_id uuid)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
BEGIN
    DELETE FROM idempotency_keys AS k
    WHERE k.account_id = p_account_id AND k.key_hash = p_key_hash
        AND k.request_id = p_request_id AND k.state = 'in_flight';
    RETURN FOUND;
END $$;

CREATE FUNCTION purge_idempotency_keys(p_limit integer) RETURNS integer
LANGUAGE sql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
    WITH expired AS MATERIALIZED (
        SELECT k.account_id, k.key_hash FROM idempotency_keys AS k
        WHERE k.expires_at <= clock_timestamp()
        -- One that is locked is being taken over in this moment.
        ORDER BY k.expires_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    ),
    purged AS (
        DELETE FROM idempotency_keys AS k USING expired AS e
        WHERE k.account_id = e.account_id AND k.key_hash = e.key_hash
        RETURNING 1
    )
    SELECT count(*)::integer FROM purged;
$$;

CREATE FUNCTION set_account_options(
    p_account_id uuid, p_replay_retries boolean, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    UPDATE accounts AS a SET replay_retries = p_replay_retries, version = a.version + 1
    WHERE a.account_id = p_account_id AND a.replay_retries <> p_replay_retries;
    IF FOUND THEN
        INSERT INTO audit_trail VALUES (
            p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.options',
            jsonb_build_object('replay_retries', p_replay_retries)
        );
        RETURN true;
    END IF;
    RETURN EXISTS (SELECT 1 FROM accounts AS a WHERE a.account_id = p_account_id);
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
    u.attempts, u.witness_picos
FROM usage AS u
UNION ALL
SELECT
    h.account_id, h.request_id, h.key_id, h.created_at, NULL, h.endpoint, h.model, NULL, h.tier,
    h.streamed, h.byok, 'pending', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, h.price_version, h.amount, 0::bigint, NULL, NULL, NULL,
    NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
FROM open_holds AS h;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallygate FROM PUBLIC;
GRANT SELECT ON idempotency_keys TO tallygate_app;
GRANT EXECUTE ON FUNCTION
note_witness, set_account_options, idempotency_begin, idempotency_finish, idempotency_release,
purge_idempotency_keys
TO tallygate_app;

RESET ROLE;
