-- From version 8 to 9: usage summed up by the hour, statements, and a balance that is low.
--
-- What each of these is for stands in schema.sql, whose definitions these are. The service rolls up
-- what there is, an hour of usage after the other; summaries are right from the start, and faster
-- when it is through. Proxies of version 8 go on: the functions that they call leave marks as well.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

-- What summaries are made of. A request belongs to the hour in which it began, by its id.
--
-- In every snapshot, an hour from frozen_until up to rolled_until that has no mark in usage_dirty
-- has here what its rows of usage add up to; a marked one is read from usage, and so is what comes
-- after rolled_until. Hours before frozen_until are those of detached months: they stay as they are.
--
-- Whoever changes usage leaves a mark in the same transaction, unless the request began less than an
-- hour ago: see settle_batch. An hour is rolled up when it ended two hours ago and every transaction
-- is over that had begun by then: see roll_up_usage. So whatever changed it without a mark is seen.
CREATE TABLE usage_rollups (
    account_id uuid NOT NULL,
    hour timestamptz NOT NULL,
    -- Tells the rows of an hour apart.
    number integer NOT NULL,
    key_id uuid NOT NULL,
    project_id uuid,
    model text NOT NULL,
    tier text NOT NULL,
    endpoint text NOT NULL,
    status text NOT NULL,
    error_code text,
    requests bigint NOT NULL CHECK (requests > 0),
    -- NULL where no request of them told.
    input_tokens numeric,
    cached_input_tokens numeric,
    cache_creation_tokens numeric,
    cache_creation_1h_tokens numeric,
    output_tokens numeric,
    reasoning_tokens numeric,
    audio_input_tokens numeric,
    audio_output_tokens numeric,
    image_input_tokens numeric,
    image_output_tokens numeric,
    images numeric,
    input_characters numeric,
    audio_ms numeric,
    queries numeric,
    quantity numeric,
    price numeric,
    -- What providers take from us: a BYOK request is the customer's own bill.
    cost_picos numeric,
    PRIMARY KEY (account_id, hour, number)
);

-- The same by the day of UTC over all accounts; always what usage_rollups add up to.
CREATE TABLE usage_days (
    day date NOT NULL,
    tier text NOT NULL,
    model text NOT NULL,
    endpoint text NOT NULL,
    status text NOT NULL,
    -- Empty where there was no error.
    error_code text NOT NULL,
    requests numeric NOT NULL,
    input_tokens numeric NOT NULL,
    output_tokens numeric NOT NULL,
    price numeric NOT NULL,
    cost_picos numeric NOT NULL,
    PRIMARY KEY (day, tier, model, endpoint, status, error_code)
);

-- Days on which an account has a row in usage_rollups.
CREATE TABLE usage_active_days (
    account_id uuid NOT NULL,
    day date NOT NULL,
    PRIMARY KEY (account_id, day)
);
CREATE INDEX usage_active_days_by_day ON usage_active_days (day, account_id);

-- Hours whose usage was changed after they may have been rolled up. A mark is never written twice,
-- so that nobody waits for whoever takes it away.
CREATE TABLE usage_dirty (
    account_id uuid NOT NULL,
    hour timestamptz NOT NULL,
    mark_id uuid NOT NULL,
    PRIMARY KEY (account_id, hour, mark_id)
);

-- One row. What is to be rolled up next ends at fenced_until, when all transactions up to `fence`
-- are over.
CREATE TABLE usage_rollup_state (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    frozen_until timestamptz NOT NULL,
    rolled_until timestamptz NOT NULL,
    fenced_until timestamptz,
    fence xid8,
    CONSTRAINT usage_rollup_state_runs_forward CHECK (frozen_until <= rolled_until)
);
-- All that there is, from the oldest month on. Hours of months that were detached before are lost to
-- summaries.
INSERT INTO usage_rollup_state (frozen_until, rolled_until)
SELECT f.frozen_until, greatest(
    f.frozen_until,
    least(f.oldest_month, date_trunc('hour', now(), 'UTC') - interval '2 hours')
)
FROM (
    SELECT
        coalesce(
            (
                SELECT (max(d.month) + interval '1 month') AT TIME ZONE 'UTC'
                FROM detached_months AS d
            ),
            'epoch'
        ) AS frozen_until,
        (
            SELECT min(to_date(substring(c.relname FROM 7), 'YYYY_MM'))::timestamp AT TIME ZONE 'UTC'
            FROM pg_inherits AS i INNER JOIN pg_class AS c ON i.inhrelid = c.oid
            WHERE i.inhparent = 'usage'::regclass AND c.relname ~ '^usage_[0-9]{4}_[0-9]{2}$'
        ) AS oldest_month
) AS f;

-- The hour of UTC in which a request began.
CREATE FUNCTION usage_hour(p_request_id uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE STRICT
RETURN to_timestamp(
    ('x' || substr(replace(p_request_id::text, '-', ''), 1, 12))::bit(48)::bigint / 3600000 * 3600
);

-- What the usage of these accounts in these hours adds up to.
CREATE FUNCTION sum_usage(p_account_ids uuid[], p_hours timestamptz[]) RETURNS SETOF usage_rollups
LANGUAGE sql STABLE SET search_path = tallygate, pg_temp AS $$
    SELECT
        r.account_id, r.hour,
        (row_number() OVER (PARTITION BY r.account_id, r.hour))::integer, s.*
    FROM unnest(p_account_ids, p_hours) AS r (account_id, hour)
    CROSS JOIN LATERAL (
        SELECT
            u.key_id, u.project_id, u.model, u.tier, u.endpoint, u.status, u.error_code, count(*),
            sum(u.input_tokens), sum(u.cached_input_tokens), sum(u.cache_creation_tokens),
            sum(u.cache_creation_1h_tokens), sum(u.output_tokens), sum(u.reasoning_tokens),
            sum(u.audio_input_tokens), sum(u.audio_output_tokens), sum(u.image_input_tokens),
            sum(u.image_output_tokens), sum(u.images), sum(u.input_characters), sum(u.audio_ms),
            sum(u.queries), sum(u.quantity), sum(u.price),
            sum(u.cost_picos) FILTER (WHERE NOT u.byok)
        FROM usage AS u
        WHERE u.account_id = r.account_id
            AND u.request_id >= uuid_floor(r.hour)
            AND u.request_id < uuid_floor(r.hour + interval '1 hour')
        GROUP BY u.key_id, u.project_id, u.model, u.tier, u.endpoint, u.status, u.error_code
    ) AS s;
$$;

-- Roll these hours of these accounts up, again or for the first time. Nobody else may be at it.
CREATE FUNCTION put_rollups(p_account_ids uuid[], p_hours timestamptz[]) RETURNS void
LANGUAGE plpgsql SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    WITH gone AS (
        DELETE FROM usage_rollups AS u
        USING unnest(p_account_ids, p_hours) AS r (account_id, hour)
        WHERE u.account_id = r.account_id AND u.hour = r.hour
        RETURNING u.*
    )
    UPDATE usage_days AS d SET
        requests = d.requests - t.requests, input_tokens = d.input_tokens - t.input_tokens,
        output_tokens = d.output_tokens - t.output_tokens, price = d.price - t.price,
        cost_picos = d.cost_picos - t.cost_picos
    FROM (
        SELECT
            (g.hour AT TIME ZONE 'UTC')::date AS day, g.tier, g.model, g.endpoint, g.status,
            coalesce(g.error_code, '') AS error_code, sum(g.requests) AS requests,
            coalesce(sum(g.input_tokens), 0) AS input_tokens,
            coalesce(sum(g.output_tokens), 0) AS output_tokens,
            coalesce(sum(g.price), 0) AS price, coalesce(sum(g.cost_picos), 0) AS cost_picos
        FROM gone AS g GROUP BY 1, 2, 3, 4, 5, 6
    ) AS t
    WHERE d.day = t.day AND d.tier = t.tier AND d.model = t.model AND d.endpoint = t.endpoint
        AND d.status = t.status AND d.error_code = t.error_code;

    WITH made AS (
        INSERT INTO usage_rollups SELECT s.* FROM sum_usage(p_account_ids, p_hours) AS s
        RETURNING *
    ),
    active AS (
        INSERT INTO usage_active_days
        SELECT DISTINCT m.account_id, (m.hour AT TIME ZONE 'UTC')::date FROM made AS m
        ON CONFLICT DO NOTHING
    )
    INSERT INTO usage_days AS d
    SELECT
        (m.hour AT TIME ZONE 'UTC')::date, m.tier, m.model, m.endpoint, m.status,
        coalesce(m.error_code, ''), sum(m.requests), coalesce(sum(m.input_tokens), 0),
        coalesce(sum(m.output_tokens), 0), coalesce(sum(m.price), 0),
        coalesce(sum(m.cost_picos), 0)
    FROM made AS m GROUP BY 1, 2, 3, 4, 5, 6
    ON CONFLICT (day, tier, model, endpoint, status, error_code) DO UPDATE SET
        requests = d.requests + excluded.requests,
        input_tokens = d.input_tokens + excluded.input_tokens,
        output_tokens = d.output_tokens + excluded.output_tokens,
        price = d.price + excluded.price,
        cost_picos = d.cost_picos + excluded.cost_picos;

    DELETE FROM usage_days AS d
    WHERE d.requests = 0 AND d.day IN (
        SELECT (r.hour AT TIME ZONE 'UTC')::date FROM unnest(p_hours) AS r (hour)
    );
END $$;

-- Roll up the next hour of all accounts, if it is due. Answers
--
--   rolled    done: call it again
--   fenced    there are hours to roll up, as soon as what runs now is over: call it later
--   waiting   some transaction that began before the fence still runs
--   done      nothing is due
--   busy      somebody else is at it
--
-- No clock says here that a transaction is over. A settlement that leaves no mark takes its time
-- after it has locked a balance, and so after it got its number; it began within an hour of its
-- request. Every number that was given out when the fence was set is at most the fence: when the
-- oldest transaction that runs is above it, all of them are seen, or will never be. The second hour
-- is for a standby that is promoted with a slower clock.
CREATE FUNCTION roll_up_usage() RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_due constant timestamptz := date_trunc('hour', clock_timestamp(), 'UTC') - interval '2 hours';
    v_state usage_rollup_state;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.usage_rollups')) THEN
        RETURN 'busy';
    END IF;
    SELECT * INTO v_state FROM usage_rollup_state AS s;
    IF coalesce(v_state.fenced_until <= v_state.rolled_until, true)
        -- The numbers begin anew where the database was restored from a dump.
        OR v_state.fence > pg_snapshot_xmax(pg_current_snapshot())
    THEN
        IF v_due <= v_state.rolled_until THEN
            RETURN 'done';
        END IF;
        UPDATE usage_rollup_state AS s SET fenced_until = v_due, fence = pg_current_xact_id();
        RETURN 'fenced';
    END IF;
    IF pg_snapshot_xmin(pg_current_snapshot()) <= v_state.fence THEN
        RETURN 'waiting';
    END IF;
    PERFORM put_rollups(array_agg(b.account_id), array_agg(v_state.rolled_until)) FROM balances AS b;
    UPDATE usage_rollup_state AS s SET rolled_until = v_state.rolled_until + interval '1 hour';
    RETURN 'rolled';
END $$;

-- Roll up again what is marked, p_limit marks at most; answers how many it took away, NULL where
-- somebody else is at it.
--
-- A mark is taken away before its hour is read: whoever marks it later is not seen, and the mark
-- stays. Marks of hours that are not rolled up yet, or never again, need nothing.
CREATE FUNCTION refresh_rollups(p_limit integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_state usage_rollup_state;
    v_account_ids uuid[];
    v_hours timestamptz[];
    v_taken integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.usage_rollups')) THEN
        RETURN NULL;
    END IF;
    SELECT * INTO v_state FROM usage_rollup_state AS s;
    WITH taken AS (
        DELETE FROM usage_dirty AS m
        USING (
            SELECT o.account_id, o.hour, o.mark_id FROM usage_dirty AS o
            ORDER BY o.account_id, o.hour, o.mark_id LIMIT p_limit
        ) AS n
        WHERE m.account_id = n.account_id AND m.hour = n.hour AND m.mark_id = n.mark_id
        RETURNING m.account_id, m.hour
    ),
    hours AS (
        SELECT t.account_id, t.hour, count(*) AS marks FROM taken AS t
        GROUP BY t.account_id, t.hour
    )
    SELECT
        sum(h.marks),
        array_agg(h.account_id) FILTER (WHERE h.hour >= v_state.frozen_until
            AND h.hour < v_state.rolled_until),
        array_agg(h.hour) FILTER (WHERE h.hour >= v_state.frozen_until
            AND h.hour < v_state.rolled_until)
    INTO v_taken, v_account_ids, v_hours
    FROM hours AS h;
    IF v_account_ids IS NOT NULL THEN
        PERFORM put_rollups(v_account_ids, v_hours);
    END IF;
    RETURN coalesce(v_taken, 0);
END $$;

-- The number of an account's last entry that was posted before a time, as far as entries are kept;
-- NULL where none was. It looks for it as in a phone book: of two entries the one with the higher
-- number was posted later.
CREATE FUNCTION entry_before(p_account_id uuid, p_at timestamptz) RETURNS bigint
LANGUAGE plpgsql STABLE STRICT SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_low bigint;
    v_high bigint;
    v_middle bigint;
    v_first bigint;
    v_entry record;
BEGIN
    SELECT e.seq INTO v_first FROM entries AS e
    WHERE e.account_id = p_account_id ORDER BY e.seq LIMIT 1;
    SELECT e.seq INTO v_high FROM entries AS e
    WHERE e.account_id = p_account_id ORDER BY e.seq DESC LIMIT 1;
    -- Everything up to v_low was posted before, everything above v_high was not.
    v_low := v_first - 1;
    WHILE v_low < v_high LOOP
        v_middle := v_low + (v_high - v_low + 1) / 2;
        -- The next one that is kept: those between are detached.
        SELECT e.seq, e.at INTO v_entry FROM entries AS e
        WHERE e.account_id = p_account_id AND e.seq >= v_middle ORDER BY e.seq LIMIT 1;
        IF v_entry.at < p_at THEN
            v_low := v_entry.seq;
        ELSE
            v_high := v_middle - 1;
        END IF;
    END LOOP;
    RETURN CASE WHEN v_low >= v_first THEN v_low END;
END $$;

-- Say below what balance an account's is low; NULL for nothing. False if there is no such account.
CREATE FUNCTION set_low_balance(
    p_account_id uuid, p_threshold bigint, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
BEGIN
    UPDATE accounts AS a SET low_balance_threshold = p_threshold
    WHERE a.account_id = p_account_id AND a.low_balance_threshold IS DISTINCT FROM p_threshold;
    IF NOT FOUND THEN
        RETURN EXISTS (SELECT 1 FROM accounts AS a WHERE a.account_id = p_account_id);
    END IF;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.low_balance',
        jsonb_build_object('threshold', p_threshold)
    );
    RETURN true;
END $$;

-- What fits no month may be older than that.
INSERT INTO usage_dirty
SELECT d.account_id, d.hour, gen_random_uuid()
FROM (
    SELECT DISTINCT u.account_id, usage_hour(u.request_id) AS hour FROM usage_default AS u
) AS d;

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
    v_recent uuid;
    v_is_late boolean;
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
    v_recent := uuid_floor(v_now - interval '1 hour');

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
        array_agg(p.overdraft),
        bool_or(p.request_id < v_recent)
    INTO v_done, v_outcomes, v_overdrafts, v_is_late
    FROM judged AS p;

    RETURN QUERY SELECT * FROM unnest(v_done, v_outcomes, v_overdrafts);
    IF json_array_length(p_batch) > coalesce(cardinality(v_done), 0) THEN
        RETURN QUERY SELECT * FROM settle_without_hold(p_batch, coalesce(v_done, '{}'));
        v_is_late := true;
    END IF;
    -- Usage of hours that may have been rolled up; a mark too many costs nothing but a look.
    IF v_is_late THEN
        INSERT INTO usage_dirty
        SELECT r.account_id, r.hour, gen_random_uuid()
        FROM (
            SELECT DISTINCT i.account_id, usage_hour(i.request_id) AS hour
            FROM json_to_recordset(p_batch) AS i(account_id uuid, request_id uuid)
            WHERE i.request_id < v_recent
        ) AS r;
    END IF;
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

CREATE OR REPLACE FUNCTION retention_obstacle(p_month date) RETURNS text
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = tallygate, pg_temp
SET timezone = 'UTC' SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_floor constant uuid := uuid_floor(p_month);
    v_ceiling constant uuid := uuid_floor(p_month + interval '1 month');
    v_oldest text;
BEGIN
    SELECT min(c.relname::text) INTO v_oldest
    FROM pg_inherits AS i INNER JOIN pg_class AS c ON i.inhrelid = c.oid
    WHERE i.inhparent = 'entries'::regclass AND c.relname ~ '^entries_[0-9]{4}_[0-9]{2}$';
    IF NOT EXISTS (
        SELECT 1 FROM pg_inherits AS i
        WHERE i.inhparent = 'entries'::regclass
            AND i.inhrelid = to_regclass('entries' || to_char(p_month, '_YYYY_MM'))
    ) THEN
        RETURN 'unknown_month';
    END IF;
    IF p_month + interval '1 month' > clock_timestamp() - interval '35 days' THEN
        RETURN 'too_recent';
    END IF;
    IF v_oldest <> 'entries' || to_char(p_month, '_YYYY_MM') THEN
        RETURN 'not_oldest';
    END IF;
    IF EXISTS (
        SELECT 1 FROM open_holds AS h WHERE h.request_id >= v_floor AND h.request_id < v_ceiling
    ) THEN
        RETURN 'open_holds';
    END IF;
    IF EXISTS (
        SELECT 1 FROM usage AS u
        WHERE u.request_id >= v_floor AND u.request_id < v_ceiling
            AND u.review_reason IS NOT NULL AND u.resolved_at IS NULL
    ) THEN
        RETURN 'open_reviews';
    END IF;
    IF EXISTS (SELECT 1 FROM entries_default) OR EXISTS (SELECT 1 FROM usage_default) THEN
        RETURN 'misplaced_rows';
    END IF;
    IF coalesce(
        (SELECT r.findings FROM audit_runs AS r ORDER BY r.run_id DESC LIMIT 1), 1
    ) > 0 THEN
        RETURN 'unaudited';
    END IF;
    IF EXISTS (
        SELECT 1 FROM balances AS b
        WHERE EXISTS (
            SELECT 1 FROM entries AS e
            WHERE e.account_id = b.account_id
                AND e.request_id >= v_floor AND e.request_id < v_ceiling
                AND e.seq > coalesce(
                    (
                        SELECT p.last_seq FROM seal_points AS p WHERE p.account_id = b.account_id
                        ORDER BY p.last_seq DESC LIMIT 1
                    ),
                    0
                )
        )
    ) THEN
        RETURN 'unsealed';
    END IF;
    IF (SELECT s.rolled_until FROM usage_rollup_state AS s) < p_month + interval '1 month' THEN
        RETURN 'not_rolled_up';
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION detach_month(p_month date, p_event_id uuid, p_actor text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET timezone = 'UTC' SET lock_timeout = '500ms' SET jit = off
AS $$
DECLARE
    v_floor constant uuid := uuid_floor(p_month);
    v_ceiling constant uuid := uuid_floor(p_month + interval '1 month');
    v_began constant timestamptz := clock_timestamp();
    v_parent text;
    v_name text;
    v_obstacle text;
    v_month detached_months;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.detach_month')) THEN
        RETURN 'busy';
    END IF;
    v_obstacle := retention_obstacle(p_month);
    IF v_obstacle IS NOT NULL THEN
        RETURN v_obstacle;
    END IF;
    v_month.month := p_month;
    v_month.detached_at := v_began;
    v_month.actor := p_actor;

    -- Summaries have the month's rollups from here on, which nobody changes any more.
    IF refresh_rollups(2147483647) IS NULL THEN
        RETURN 'busy';
    END IF;
    UPDATE usage_rollup_state AS s SET frozen_until = p_month + interval '1 month';

    INSERT INTO carried_totals AS c (account_id, kind, entries, posted, reserved)
    SELECT e.account_id, e.kind, count(*), sum(e.posted_delta), sum(e.reserved_delta)
    FROM entries AS e WHERE e.request_id >= v_floor AND e.request_id < v_ceiling
    GROUP BY e.account_id, e.kind
    ON CONFLICT (account_id, kind) DO UPDATE SET
        entries = c.entries + excluded.entries,
        posted = c.posted + excluded.posted,
        reserved = c.reserved + excluded.reserved;
    INSERT INTO carried_totals AS c (account_id, kind, entries, posted, reserved, cost_picos)
    SELECT u.account_id, 'provider_cost', 0, 0, 0, sum(u.cost_picos)
    FROM usage AS u
    WHERE u.request_id >= v_floor AND u.request_id < v_ceiling
        AND u.cost_picos > 0 AND NOT u.byok
    GROUP BY u.account_id
    ON CONFLICT (account_id, kind) DO UPDATE SET cost_picos = c.cost_picos + excluded.cost_picos;

    -- The floor is the entry before the first that is kept: a month's, an earlier one's that fills
    -- a gap, or where the floor was before.
    INSERT INTO carried_floors AS c (account_id, seq, posted_after, reserved_after)
    SELECT l.account_id, l.seq, s.posted_after, s.reserved_after
    FROM (
        SELECT
            b.account_id,
            coalesce(
                (
                    SELECT e.seq FROM entries AS e
                    WHERE e.account_id = b.account_id AND e.request_id >= v_ceiling
                    ORDER BY e.seq LIMIT 1
                ) - 1,
                b.seq
            ) AS seq
        FROM balances AS b
        WHERE EXISTS (
            SELECT 1 FROM entries AS e
            WHERE e.account_id = b.account_id
                AND e.request_id >= v_floor AND e.request_id < v_ceiling
        )
    ) AS l
    CROSS JOIN LATERAL (
        SELECT e.posted_after, e.reserved_after FROM entries AS e
        WHERE e.account_id = l.account_id AND e.seq = l.seq
            AND e.request_id >= v_floor AND e.request_id < v_ceiling
        UNION ALL
        SELECT m.posted_after, m.reserved_after FROM carried_seams AS m
        WHERE m.account_id = l.account_id AND m.seq = l.seq
        UNION ALL
        SELECT f.posted_after, f.reserved_after FROM carried_floors AS f
        WHERE f.account_id = l.account_id AND f.seq = l.seq
        UNION ALL
        SELECT 0, 0 WHERE l.seq = 0
    ) AS s
    ON CONFLICT (account_id) DO UPDATE SET
        seq = excluded.seq, posted_after = excluded.posted_after,
        reserved_after = excluded.reserved_after;
    INSERT INTO carried_seams (
        account_id, seq, posted_delta, reserved_delta, posted_after, reserved_after
    )
    SELECT e.account_id, e.seq, e.posted_delta, e.reserved_delta, e.posted_after, e.reserved_after
    FROM entries AS e INNER JOIN carried_floors AS f ON e.account_id = f.account_id
    WHERE e.request_id >= v_floor AND e.request_id < v_ceiling AND e.seq > f.seq;
    DELETE FROM carried_seams AS m USING carried_floors AS f
    WHERE m.account_id = f.account_id AND m.seq <= f.seq;

    SELECT count(*), coalesce(sum(e.posted_delta), 0) INTO v_month.entries, v_month.posted
    FROM entries AS e WHERE e.request_id >= v_floor AND e.request_id < v_ceiling;
    SELECT count(*), coalesce(sum(u.price), 0), coalesce(sum(u.cost_picos), 0)
    INTO v_month.usage_rows, v_month.price, v_month.cost_picos
    FROM usage AS u WHERE u.request_id >= v_floor AND u.request_id < v_ceiling;
    INSERT INTO detached_months SELECT v_month.*;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'retention.detach', jsonb_build_object(
            'month', to_char(p_month, 'YYYY-MM'), 'entries', v_month.entries,
            'usage_rows', v_month.usage_rows, 'posted', v_month.posted
        )
    );

    FOREACH v_parent IN ARRAY ARRAY['entries', 'usage'] LOOP
        v_name := v_parent || to_char(p_month, '_YYYY_MM');
        EXECUTE format('LOCK TABLE %I IN ACCESS EXCLUSIVE MODE', v_name);
    END LOOP;
    -- A price may be changed at any age; whoever did it since we began is not in the totals.
    PERFORM 1 FROM audit_trail AS t
    WHERE t.action = 'review.reprice' AND t.at >= v_began - interval '1 minute';
    IF FOUND THEN
        RAISE EXCEPTION 'a price was changed meanwhile' USING ERRCODE = 'lock_not_available';
    END IF;
    FOREACH v_parent IN ARRAY ARRAY['entries', 'usage'] LOOP
        v_name := v_parent || to_char(p_month, '_YYYY_MM');
        EXECUTE format('ALTER TABLE %I DETACH PARTITION %I', v_parent, v_name);
        EXECUTE format('DROP TRIGGER IF EXISTS entries_append_only ON %I', v_name);
        EXECUTE format(
            'CREATE TRIGGER %I BEFORE UPDATE OR DELETE ON %I'
            ' FOR EACH ROW EXECUTE FUNCTION refuse_change()',
            v_name || '_append_only', v_name
        );
        EXECUTE format('GRANT SELECT ON %I TO tallygate_app', v_name);
    END LOOP;
    RETURN 'detached';
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN 'busy';
END $$;

REVOKE ALL ON FUNCTION
usage_hour, sum_usage, put_rollups, roll_up_usage, refresh_rollups, entry_before, set_low_balance
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
usage_hour, roll_up_usage, refresh_rollups, entry_before, set_low_balance
TO tallygate_app;
GRANT SELECT ON usage_rollups, usage_days, usage_active_days, usage_dirty, usage_rollup_state
TO tallygate_app;

RESET ROLE;
