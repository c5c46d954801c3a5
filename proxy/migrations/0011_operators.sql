-- From version 10 to 11: keys of operators, the standing of accounts, and models that can be switched
-- off.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of the version
-- before go on working; what is switched off reaches those of this one only.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

-- Keys of the admin API; that of TALLYGATE_ADMIN_KEY is not among them. What a role may is said in
-- proxy/operators.py. The name is what the audit trail calls whoever holds the key.
CREATE TABLE admin_keys (
    admin_key_id uuid PRIMARY KEY,
    key_hash bytea NOT NULL UNIQUE CHECK (length(key_hash) = 32),
    prefix text NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 64),
    role text NOT NULL CHECK (role IN ('owner', 'finance', 'support', 'read-only')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by text NOT NULL,
    expires_at timestamptz,
    revoked_at timestamptz,
    -- To the minute.
    last_used_at timestamptz
);
-- A name is one key's at a time, or the trail would not tell whose act it was.
CREATE UNIQUE INDEX admin_keys_by_name ON admin_keys (name) WHERE revoked_at IS NULL;

-- Models, or all models of a provider, that nobody may call for now. Whoever changes it raises
-- models_version in `meta`, by which authorize_batch finds out a proxy that does not know yet.
CREATE TABLE model_switches (
    switch_id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('model', 'provider')),
    -- The name of a provider; of models also a pattern such as gpt-4o*.
    pattern text NOT NULL CHECK (length(pattern) BETWEEN 1 AND 256),
    reason text NOT NULL,
    switched_by text NOT NULL,
    switched_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (kind, pattern)
);
INSERT INTO meta VALUES ('models_version', '0');

-- What operators look accounts up by. A name is found by any three letters of it.
CREATE FUNCTION name_trigrams(p_name text) RETURNS text[] LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
-- It takes far longer than a look into the index that has its results.
COST 10000
RETURN (
    SELECT array_agg(DISTINCT substr(lower(p_name), n.i, 3))
    FROM generate_series(1, length(lower(p_name)) - 2) AS n(i)
);
CREATE INDEX accounts_by_name ON accounts USING gin (name_trigrams(name)) WITH (fastupdate = off);
CREATE INDEX audit_trail_by_event ON audit_trail (event_id);

-- p_key is {name, role, prefix, expires_at}. False where another key has the name.
CREATE FUNCTION create_admin_key(
    p_admin_key_id uuid, p_key_hash bytea, p_key jsonb, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_key admin_keys := jsonb_populate_record(NULL::admin_keys, p_key);
BEGIN
    INSERT INTO admin_keys (
        admin_key_id, key_hash, prefix, name, role, created_by, expires_at
    ) VALUES (
        p_admin_key_id, p_key_hash, v_key.prefix, v_key.name, v_key.role, p_actor,
        v_key.expires_at
    ) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_admin_key_id, clock_timestamp(), p_actor,
        'admin_key.create', p_key || jsonb_build_object('admin_key_id', p_admin_key_id)
    );
    RETURN true;
END $$;

-- At once. False if there is no such key; true again for one that was revoked before.
CREATE FUNCTION revoke_admin_key(p_admin_key_id uuid, p_event_id uuid, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_name text;
BEGIN
    UPDATE admin_keys AS k SET revoked_at = clock_timestamp()
    WHERE k.admin_key_id = p_admin_key_id AND k.revoked_at IS NULL
    RETURNING k.name INTO v_name;
    IF FOUND THEN
        INSERT INTO audit_trail VALUES (
            '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
            'admin_key.revoke',
            jsonb_build_object('admin_key_id', p_admin_key_id, 'name', v_name)
        );
        RETURN true;
    END IF;
    RETURN EXISTS (SELECT 1 FROM admin_keys AS k WHERE k.admin_key_id = p_admin_key_id);
END $$;

-- Whose key this is, and that it was used; no row where nobody's.
CREATE FUNCTION use_admin_key(p_key_hash bytea)
RETURNS TABLE (admin_key_id uuid, name text, role text, is_revoked boolean, is_expired boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_now constant timestamptz := clock_timestamp();
BEGIN
    UPDATE admin_keys AS k SET last_used_at = v_now
    WHERE
        k.key_hash = p_key_hash AND k.revoked_at IS NULL
        AND coalesce(k.expires_at > v_now, true)
        AND coalesce(k.last_used_at < v_now - interval '1 minute', true);
    RETURN QUERY
    SELECT
        k.admin_key_id, k.name, k.role, k.revoked_at IS NOT NULL,
        coalesce(k.expires_at <= v_now, false)
    FROM admin_keys AS k WHERE k.key_hash = p_key_hash;
END $$;

-- Suspend an account, have it served again, or close it for good: its keys are revoked, open holds
-- end as they do, and what is left of its balance stays. Takes effect on the next authorization of
-- every replica. Answers `done`, `exists` where it stands so already, `closed` where it was closed,
-- and NULL where there is no such account.
CREATE FUNCTION set_account_status(
    p_account_id uuid, p_status text, p_reason text, p_event_id uuid, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_before text;
    v_keys integer := 0;
BEGIN
    SELECT a.status INTO v_before FROM accounts AS a
    WHERE a.account_id = p_account_id FOR NO KEY UPDATE;
    IF v_before IS NULL OR v_before IN (p_status, 'closed') THEN
        RETURN CASE v_before WHEN p_status THEN 'exists' ELSE v_before END;
    END IF;
    UPDATE accounts AS a SET status = p_status, version = a.version + 1
    WHERE a.account_id = p_account_id;
    IF p_status = 'closed' THEN
        UPDATE virtual_keys AS k
        SET status = 'revoked', revoked_at = clock_timestamp(), version = k.version + 1
        WHERE k.account_id = p_account_id AND k.status = 'active';
        GET DIAGNOSTICS v_keys = ROW_COUNT;
    END IF;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, clock_timestamp(), p_actor,
        CASE p_status
            WHEN 'active' THEN 'account.resume'
            WHEN 'suspended' THEN 'account.suspend'
            ELSE 'account.close'
        END,
        jsonb_strip_nulls(
            jsonb_build_object('reason', p_reason, 'before', v_before, 'keys_revoked', v_keys)
        )
    );
    RETURN 'done';
END $$;

-- False if there is no such account.
CREATE FUNCTION rename_account(p_account_id uuid, p_name text, p_event_id uuid, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_before text;
BEGIN
    SELECT a.name INTO v_before FROM accounts AS a
    WHERE a.account_id = p_account_id FOR NO KEY UPDATE;
    IF v_before <> p_name THEN
        UPDATE accounts AS a SET name = p_name WHERE a.account_id = p_account_id;
        INSERT INTO audit_trail VALUES (
            p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.rename',
            jsonb_build_object('name', p_name, 'before', v_before)
        );
    END IF;
    RETURN v_before IS NOT NULL;
END $$;

-- Every authorization that begins from now on is told to look at the switches first.
CREATE FUNCTION raise_models_version() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
    UPDATE meta SET value = (value::integer + 1)::text WHERE name = 'models_version'
$$;

-- Switch models off, on every replica at once. Answers the id of the switch that says so, which is
-- an earlier one where they were off before.
CREATE FUNCTION switch_models_off(
    p_switch_id uuid, p_kind text, p_pattern text, p_reason text, p_actor text
) RETURNS uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
BEGIN
    PERFORM raise_models_version();
    INSERT INTO model_switches (switch_id, kind, pattern, reason, switched_by)
    VALUES (p_switch_id, p_kind, p_pattern, p_reason, p_actor)
    ON CONFLICT (kind, pattern) DO NOTHING;
    IF FOUND THEN
        INSERT INTO audit_trail VALUES (
            '00000000-0000-0000-0000-000000000000', p_switch_id, clock_timestamp(), p_actor,
            'models.off', jsonb_build_object(p_kind, p_pattern, 'reason', p_reason)
        );
    END IF;
    RETURN (
        SELECT s.switch_id FROM model_switches AS s
        WHERE s.kind = p_kind AND s.pattern = p_pattern
    );
END $$;

-- Switch them on again. False where there is no such switch.
CREATE FUNCTION switch_models_on(p_switch_id uuid, p_event_id uuid, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_switch model_switches;
BEGIN
    PERFORM raise_models_version();
    DELETE FROM model_switches AS s WHERE s.switch_id = p_switch_id RETURNING s.* INTO v_switch;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'models.on', jsonb_build_object(v_switch.kind, v_switch.pattern)
    );
    RETURN true;
END $$;

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

REVOKE ALL ON FUNCTION
name_trigrams, create_admin_key, revoke_admin_key, use_admin_key, set_account_status,
rename_account, raise_models_version, switch_models_off, switch_models_on
FROM PUBLIC;
GRANT SELECT ON admin_keys, model_switches TO tallygate_app;
GRANT EXECUTE ON FUNCTION
create_admin_key, revoke_admin_key, use_admin_key, set_account_status, rename_account,
switch_models_off, switch_models_on, name_trigrams
TO tallygate_app;

RESET ROLE;
