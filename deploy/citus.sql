-- Beyond one primary: the ledger's tables distributed by account over the workers of a Citus cluster.
--
-- Run it once on the coordinator, as a superuser, when the workers are added, `tallygate migrate` has
-- run, and before there are customers:
--
--     psql -v ON_ERROR_STOP=1 --single-transaction -f deploy/citus.sql "$COORDINATOR_URL"
--
-- Tried by hand with Citus 14.0 on PostgreSQL 18: docs/scaling.md says what works there, and what does
-- not. Nothing here changes what the functions of the schema decide: they get a batch an account at a
-- time, and each of their statements says once more which account that is, because Citus sends a
-- statement to a shard only where it is told so of every table in it.

-- Functions run as their owner, and Citus reaches its nodes as whoever is at work: pg_hba.conf has to
-- let tallygate_owner in from the other nodes, and from nowhere else. The service logs in as
-- tallygate_service (service_login.sql): a login that has to change its role could not be passed on.
ALTER ROLE tallygate_owner LOGIN;

-- The triggers look at no table: they refuse changes of what is append-only.
SET LOCAL citus.enable_unsafe_triggers = on;
-- One connection to each node, so that all of this is one transaction.
SET LOCAL citus.multi_shard_modify_mode = 'sequential';

-- Small, rarely written, read beside accounts' rows: whole on every node.
SELECT create_reference_table('tallygate.meta');
SELECT create_reference_table('tallygate.price_books');
SELECT create_reference_table('tallygate.price_book_cancellations');
SELECT create_reference_table('tallygate.seals');
SELECT create_reference_table('tallygate.usage_rollup_state');
SELECT create_reference_table('tallygate.webhook_receivers');

-- Everything that grows with customers. admin_keys, audit_runs, detached_months, model_switches, monthly_walk, price_book_drafts, reconciliations, usage_days stay on the
-- coordinator: they are about the whole ledger, and nothing joins them to accounts.
SELECT create_distributed_table('tallygate.balances', 'account_id');
SELECT create_distributed_table('tallygate.accounts', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.virtual_keys', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.projects', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.key_uses', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.scope_counters', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.open_holds', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.entries', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.usage', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.funding', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.expiring_credits', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.credit_allocations', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.charges', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.recurring_charges', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.idempotency_keys', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.audit_trail', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.seal_points', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.carried_totals', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.carried_floors', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.carried_seams', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.usage_rollups', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.usage_active_days', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.usage_dirty', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.webhook_counts', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.webhook_deliveries', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.webhook_events', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.webhook_lanes', 'account_id', colocate_with := 'tallygate.balances');
SELECT create_distributed_table('tallygate.webhook_told', 'account_id', colocate_with := 'tallygate.balances');

-- What runs inside a statement runs where the shard is.
SELECT create_distributed_function(f.oid::regprocedure)
FROM pg_proc AS f
WHERE f.pronamespace = 'tallygate'::regnamespace
    AND f.proname IN ('admission_step', 'admission_walk', 'period_start', 'recurring_period', 'uuid_floor', 'usage_hour', 'entry_leaf', 'without_names', 'monthly_amount', 'name_trigrams')
ORDER BY f.proname;

-- narrow: from here on it is plain SQL, which a test runs on a PostgreSQL without Citus.

-- To Citus a function in an UPDATE must depend on nothing; this one never did, and now says so.
CREATE OR REPLACE FUNCTION tallygate.period_start(p_period text, p_at timestamptz)
RETURNS timestamptz LANGUAGE sql IMMUTABLE STRICT
RETURN CASE p_period
    WHEN 'total' THEN 'epoch'::timestamptz
    ELSE date_trunc(p_period, p_at AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'
END;

ALTER FUNCTION tallygate.authorize_batch(json) RENAME TO authorize_group;
ALTER FUNCTION tallygate.settle_batch(json, integer) RENAME TO settle_group;
ALTER FUNCTION tallygate.note_witness(json) RENAME TO note_witness_group;

DO $citus$
DECLARE
    v_edit record;
    v_before text;
    v_account constant text := E'DECLARE\n    v_account constant uuid := p_batch -> 0 ->> ''account_id'';\n';
BEGIN
    FOR v_edit IN
        SELECT * FROM (
            VALUES
            ('authorize_group(json)', E'DECLARE\n', v_account),
            ('authorize_group(json)', 'b.account_id = ANY(v_accounts)', 'b.account_id = v_account'),
            ('authorize_group(json)', 'ON a.account_id = b.account_id', 'ON a.account_id = b.account_id AND b.account_id = v_account'),
            ('authorize_group(json)', 'ON a.account_id = o.account_id', 'ON a.account_id = o.account_id AND o.account_id = v_account'),
            ('authorize_group(json)', 'ON a.account_id = k.account_id', 'ON a.account_id = k.account_id AND k.account_id = v_account'),
            ('authorize_group(json)', 'ON k.account_id = p.account_id', 'ON p.account_id = v_account AND k.account_id = p.account_id'),
            ('authorize_group(json)', 'ON k.is_limited AND', 'ON c.account_id = v_account AND k.is_limited AND'),
            ('authorize_group(json)', 'AND p.account_id = cp.account_id', 'AND cp.account_id = v_account AND p.account_id = cp.account_id'),
            ('authorize_group(json)', 'AND a.account_id = ca.account_id', 'AND ca.account_id = v_account AND a.account_id = ca.account_id'),
            ('authorize_group(json)', 'ON a.account_id = e.account_id', 'ON a.account_id = e.account_id AND e.account_id = v_account'),
            ('authorize_group(json)', 'ON e.account_id = h.account_id', 'ON e.account_id = h.account_id AND h.account_id = v_account'),
            ('authorize_group(json)', 'WHERE b.account_id = t.account_id', 'WHERE b.account_id = t.account_id AND b.account_id = v_account'),
            ('authorize_group(json)', 'WHERE c.account_id = t.account_id', 'WHERE c.account_id = t.account_id AND c.account_id = v_account'),
            ('settle_group(json,integer)', E'DECLARE\n', v_account),
            ('settle_group(json,integer)', E'b.account_id = ANY(\n        ARRAY(SELECT r.account_id FROM json_to_recordset(p_batch) AS r(account_id uuid))\n    )', 'b.account_id = v_account'),
            ('settle_group(json,integer)', 'WHERE h.account_id = a.account_id', 'WHERE h.account_id = v_account AND h.account_id = a.account_id'),
            ('settle_group(json,integer)', 'ON e.account_id = b.account_id', 'ON e.account_id = b.account_id AND b.account_id = v_account'),
            ('settle_group(json,integer)', 'WHERE b.account_id = t.account_id', 'WHERE b.account_id = t.account_id AND b.account_id = v_account'),
            ('settle_group(json,integer)', 'ON p.account_id = k.account_id', 'ON p.account_id = k.account_id AND k.account_id = v_account'),
            ('settle_group(json,integer)', 'ON p.account_id = o.account_id', 'ON p.account_id = o.account_id AND o.account_id = v_account'),
            ('settle_group(json,integer)', 'WHERE c.account_id = t.account_id', 'WHERE c.account_id = t.account_id AND c.account_id = v_account'),
            -- Nor may an UPDATE ask for the time.
            ('settle_without_hold(json,integer[])', 'clock_timestamp()', 'v_now'),
            ('settle_without_hold(json,integer[])', E'DECLARE\n', v_account || E'    v_now constant timestamptz := clock_timestamp();\n'),
            ('settle_without_hold(json,integer[])', 'ON r.account_id = u.account_id', 'ON u.account_id = v_account AND r.account_id = u.account_id'),
            ('note_witness_group(json)', E'DECLARE\n', v_account),
            ('note_witness_group(json)', 'ON r.account_id = u.account_id', 'ON u.account_id = v_account AND r.account_id = u.account_id'),
            ('note_witness_group(json)', 'AND u.account_id = n.account_id', 'AND u.account_id = v_account AND u.account_id = n.account_id')
        ) AS e (signature, said, says)
    LOOP
        v_before := pg_get_functiondef(('tallygate.' || v_edit.signature)::regprocedure);
        IF strpos(v_before, v_edit.said) = 0 THEN
            RAISE EXCEPTION '% does not say % any more: this file is of another release',
                v_edit.signature, v_edit.said;
        END IF;
        EXECUTE replace(v_before, v_edit.said, v_edit.says);
    END LOOP;
    -- Citus has to see the account, not the place where it will stand.
    FOR v_edit IN
        SELECT DISTINCT f.oid::regprocedure AS signature FROM pg_proc AS f
        WHERE f.pronamespace = 'tallygate'::regnamespace
            AND 'plan_cache_mode=force_generic_plan' = ANY(f.proconfig)
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET plan_cache_mode = force_custom_plan', v_edit.signature);
    END LOOP;
END $citus$;

-- A batch an account at a time, in the order of accounts: two calls can't wait for each other.
CREATE FUNCTION tallygate.account_groups(p_batch json)
RETURNS TABLE (items json, ords integer[]) LANGUAGE sql IMMUTABLE STRICT AS $$
    SELECT json_agg(i.item ORDER BY i.ord), array_agg(i.ord::integer ORDER BY i.ord)
    FROM json_array_elements(p_batch) WITH ORDINALITY AS i (item, ord)
    GROUP BY i.item ->> 'account_id' ORDER BY i.item ->> 'account_id'
$$;

CREATE FUNCTION tallygate.authorize_batch(p_batch json)
RETURNS TABLE (
    ord integer, outcome text, available bigint, budget_left bigint,
    requests_limit integer, requests_left integer, tokens_limit bigint, tokens_left bigint
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        g.ords[a.ord], a.outcome, a.available, a.budget_left, a.requests_limit, a.requests_left,
        a.tokens_limit, a.tokens_left
    FROM account_groups(p_batch) AS g CROSS JOIN LATERAL authorize_group(g.items) AS a
    ORDER BY 1;
END $$;

CREATE FUNCTION tallygate.settle_batch(p_batch json, p_grace_s integer DEFAULT 0)
RETURNS TABLE (ord integer, outcome text, overdraft bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT g.ords[s.ord], s.outcome, s.overdraft
    FROM account_groups(p_batch) AS g CROSS JOIN LATERAL settle_group(g.items, p_grace_s) AS s
    ORDER BY 1;
END $$;

CREATE FUNCTION tallygate.note_witness(p_batch json) RETURNS TABLE (ord integer, outcome text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT g.ords[n.ord], n.outcome
    FROM account_groups(p_batch) AS g CROSS JOIN LATERAL note_witness_group(g.items) AS n
    ORDER BY 1;
END $$;

-- In a function of plain SQL Citus can't see the account at all.
CREATE OR REPLACE FUNCTION tallygate.extend_holds(
    p_account_ids uuid[], p_request_ids uuid[], p_ttl_s integer
) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    v_hold record;
    v_until constant timestamptz := clock_timestamp() + make_interval(secs => p_ttl_s);
    v_extended integer := 0;
BEGIN
    FOR v_hold IN
        SELECT r.account_id, r.request_id
        FROM unnest(p_account_ids, p_request_ids) AS r (account_id, request_id)
    LOOP
        -- One that is locked is being settled in this moment, and needs no more time.
        PERFORM 1 FROM open_holds AS h
        WHERE h.account_id = v_hold.account_id AND h.request_id = v_hold.request_id
        FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        UPDATE open_holds AS h SET expires_at = v_until
        WHERE h.account_id = v_hold.account_id AND h.request_id = v_hold.request_id;
        v_extended := v_extended + 1;
    END LOOP;
    RETURN v_extended;
END $$;

-- A DELETE over all shards knows no limit; what is left over is gone at the next sweep.
CREATE OR REPLACE FUNCTION tallygate.purge_idempotency_keys(p_limit integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_now constant timestamptz := clock_timestamp();
BEGIN
    DELETE FROM idempotency_keys AS k WHERE k.expires_at <= v_now;
    RETURN 0;
END $$;

ALTER FUNCTION tallygate.account_groups(json) OWNER TO tallygate_owner;
ALTER FUNCTION tallygate.authorize_batch(json) OWNER TO tallygate_owner;
ALTER FUNCTION tallygate.settle_batch(json, integer) OWNER TO tallygate_owner;
ALTER FUNCTION tallygate.note_witness(json) OWNER TO tallygate_owner;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallygate FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
tallygate.authorize_batch(json), tallygate.settle_batch(json, integer), tallygate.note_witness(json)
TO tallygate_app;
