-- From version 6 to 7: webhooks from an outbox, and the erasure of an account.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Everything is new but
-- two functions, which do for proxies of version 6 what they did.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

ALTER TABLE accounts
ADD COLUMN low_balance_threshold bigint CHECK (low_balance_threshold > 0),
ADD COLUMN erased_at timestamptz;

-- Receivers of the operator's. The secrets are in clear: what is sent is signed with them.
CREATE TABLE webhook_receivers (
    receiver_id uuid PRIMARY KEY,
    url text NOT NULL CHECK (length(url) BETWEEN 1 AND 2000),
    description text NOT NULL CHECK (length(description) <= 200),
    -- NULL for every type.
    event_types text[],
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'paused')),
    -- It answered 410, and was paused for it.
    is_gone boolean NOT NULL DEFAULT false,
    secret text NOT NULL,
    -- The secret before the last rotation, which signs as well until its time is over.
    old_secret text,
    old_secret_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT webhook_receivers_old_secret_ends CHECK (
        num_nonnulls(old_secret, old_secret_until) <> 1
    )
);

-- What is to be told, written in the transaction that found it so. Events of no account stand under
-- the nil uuid. An account's are numbered, and told in that order.
CREATE TABLE webhook_events (
    account_id uuid NOT NULL,
    number bigint NOT NULL CHECK (number > 0),
    event_id uuid NOT NULL,
    type text NOT NULL,
    data jsonb NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (account_id, number)
);
CREATE INDEX webhook_events_by_id ON webhook_events (event_id);
-- The number of an account's newest event; whoever adds one has this row.
CREATE TABLE webhook_counts (
    account_id uuid PRIMARY KEY,
    events bigint NOT NULL
);

-- An event for a receiver, and what has come of it.
CREATE TABLE webhook_deliveries (
    account_id uuid NOT NULL,
    number bigint NOT NULL,
    receiver_id uuid NOT NULL,
    event_id uuid NOT NULL,
    status text NOT NULL CHECK (status IN ('pending', 'delivered', 'failed')),
    queued_at timestamptz NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    last_attempt_at timestamptz,
    -- What the receiver answered; NULL where it did not.
    last_status integer,
    last_error text,
    PRIMARY KEY (account_id, number, receiver_id)
);
CREATE INDEX webhook_deliveries_by_receiver ON webhook_deliveries (receiver_id, event_id);
CREATE INDEX webhook_deliveries_pending ON webhook_deliveries (account_id, receiver_id, number)
WHERE status = 'pending';
CREATE INDEX webhook_deliveries_unfinished ON webhook_deliveries (status, queued_at)
WHERE status <> 'delivered';

-- Where something is pending for a receiver and an account: only its oldest is tried, so that they
-- arrive in order. Whoever tries it moves due_at to when the lease of it ends.
CREATE TABLE webhook_lanes (
    account_id uuid NOT NULL,
    receiver_id uuid NOT NULL,
    due_at timestamptz NOT NULL,
    PRIMARY KEY (account_id, receiver_id)
);
CREATE INDEX webhook_lanes_by_due ON webhook_lanes (receiver_id, due_at);

-- What was told and is still so: see watch_page. `mark` tells one time from the next, where the
-- same may begin anew unseen: the budget's period.
CREATE TABLE webhook_told (
    account_id uuid NOT NULL,
    type text NOT NULL,
    subject uuid NOT NULL,
    mark timestamptz NOT NULL,
    PRIMARY KEY (account_id, type, subject)
);
-- Behind which account the next page of the watch begins, and when it is due: of all replicas.
CREATE TABLE webhook_watch (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    after uuid NOT NULL,
    due_at timestamptz NOT NULL
);
INSERT INTO webhook_watch VALUES (true, '00000000-0000-0000-0000-000000000000', 'epoch');

-- What watch_page looks at beside balances.
CREATE INDEX accounts_with_threshold ON accounts (account_id)
WHERE low_balance_threshold IS NOT NULL;
CREATE INDEX virtual_keys_with_budget ON virtual_keys (account_id, key_id)
WHERE budget IS NOT NULL;

-- Write an event, for every receiver that takes its type or, where one is named, for that alone.
CREATE FUNCTION put_webhook_event(
    p_account_id uuid, p_event_id uuid, p_type text, p_data jsonb, p_receiver_id uuid
) RETURNS void
LANGUAGE plpgsql SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_number bigint;
    v_receiver_id uuid;
    v_now constant timestamptz := clock_timestamp();
BEGIN
    INSERT INTO webhook_counts AS c VALUES (p_account_id, 1)
    ON CONFLICT (account_id) DO UPDATE SET events = c.events + 1
    RETURNING c.events INTO v_number;
    INSERT INTO webhook_events
    VALUES (p_account_id, v_number, p_event_id, p_type, p_data, v_now);
    FOR v_receiver_id IN
        SELECT e.receiver_id FROM webhook_receivers AS e
        WHERE CASE
            WHEN p_receiver_id IS NULL THEN coalesce(p_type = ANY(e.event_types), true)
            ELSE e.receiver_id = p_receiver_id
        END
        ORDER BY e.receiver_id
        FOR KEY SHARE  -- none of them is deleted meanwhile
    LOOP
        INSERT INTO webhook_deliveries (
            account_id, number, receiver_id, event_id, status, queued_at
        ) VALUES (p_account_id, v_number, v_receiver_id, p_event_id, 'pending', v_now);
        -- The lane may be ended by whoever delivered the last of it: DO NOTHING would not wait.
        INSERT INTO webhook_lanes AS l VALUES (p_account_id, v_receiver_id, v_now)
        ON CONFLICT (account_id, receiver_id) DO UPDATE SET due_at = l.due_at;
    END LOOP;
END $$;

-- Find what is to be told among the next p_accounts accounts. What is so now less what was told is
-- to be told; what was told and is so no more is forgotten, and told again when it comes again. So
-- whatever lasts is told, once, however long nobody watched; what came and went in between is not.
--
--   balance.low         posted plus credit limit is below the account's threshold
--   balance.exhausted   it is less than a credit
--   key.over_budget     what was charged in the running period has reached the key's budget
--   review.opened       a request of the last three days waits for an operator
--
-- Holds don't count: they are ceilings, and most of each comes back.
--
-- p_ids are ids for new events: as many as there are, the rest is found next time. A page is due
-- p_pause_s after the one before, a round p_interval_s after the last. Answers whether it was due,
-- how many events there are, and whether the round is over.
CREATE FUNCTION watch_page(
    p_accounts integer, p_pause_s double precision, p_interval_s double precision, p_ids uuid[]
) RETURNS TABLE (is_due boolean, events integer, is_last boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_now constant timestamptz := clock_timestamp();
    v_after uuid;
    v_due_at timestamptz;
    v_last uuid;
    v_credit bigint;
    v_new jsonb;
    v_event jsonb;
BEGIN
    SELECT w.after, w.due_at INTO v_after, v_due_at FROM webhook_watch AS w FOR UPDATE SKIP LOCKED;
    is_due := coalesce(v_due_at <= v_now, false);
    events := 0;
    is_last := false;
    IF NOT is_due THEN
        RETURN NEXT;
        RETURN;
    END IF;
    SELECT b.account_id INTO v_last FROM balances AS b WHERE b.account_id > v_after
    ORDER BY b.account_id OFFSET p_accounts - 1 LIMIT 1;
    is_last := v_last IS NULL;
    v_last := coalesce(v_last, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
    v_credit := (SELECT m.value::bigint FROM meta AS m WHERE m.name = 'nanos_per_credit');

    WITH found AS MATERIALIZED (
        SELECT
            b.account_id, 1 AS rank, 'balance.low' AS type, b.account_id AS subject,
            'epoch'::timestamptz AS mark,
            jsonb_build_object(
                'posted', b.posted, 'held', b.reserved, 'credit_limit', b.credit_limit,
                'threshold', a.low_balance_threshold
            ) AS data
        FROM accounts AS a INNER JOIN balances AS b ON a.account_id = b.account_id
        WHERE a.low_balance_threshold IS NOT NULL
            AND a.account_id > v_after AND a.account_id <= v_last
            AND b.posted + b.credit_limit < a.low_balance_threshold
        UNION ALL
        SELECT
            b.account_id, 2, 'balance.exhausted', b.account_id, 'epoch',
            jsonb_build_object(
                'posted', b.posted, 'held', b.reserved, 'credit_limit', b.credit_limit
            )
        FROM balances AS b
        WHERE b.account_id > v_after AND b.account_id <= v_last
            -- One that never had anything has not lost it.
            AND b.seq > 0 AND b.posted + b.credit_limit < coalesce(v_credit, 1)
        UNION ALL
        SELECT
            k.account_id, 3, 'key.over_budget', k.key_id, c.period,
            jsonb_build_object(
                'key_id', k.key_id, 'budget', k.budget, 'period', k.budget_period,
                'spent', c.spent
            )
        FROM virtual_keys AS k
        INNER JOIN scope_counters AS c ON k.account_id = c.account_id AND k.key_id = c.scope_id
        WHERE k.budget IS NOT NULL AND k.account_id > v_after AND k.account_id <= v_last
            AND k.status = 'active' AND c.spent >= k.budget
            AND c.period = period_start(k.budget_period, v_now)
        UNION ALL
        SELECT
            u.account_id, 4, 'review.opened', u.request_id, 'epoch',
            jsonb_build_object(
                'request_id', u.request_id, 'reason', u.review_reason, 'model', u.model,
                'endpoint', u.endpoint, 'price', u.price
            )
        FROM usage AS u
        WHERE u.account_id > v_after AND u.account_id <= v_last
            AND u.request_id >= uuid_floor(v_now - interval '3 days')
            AND u.review_reason IS NOT NULL AND u.resolved_at IS NULL
    ),
    forgotten AS (
        DELETE FROM webhook_told AS t
        WHERE t.account_id > v_after AND t.account_id <= v_last
            AND NOT EXISTS (
                SELECT 1 FROM found AS f
                WHERE f.account_id = t.account_id AND f.type = t.type AND f.subject = t.subject
            )
    )
    SELECT jsonb_agg(to_jsonb(n) ORDER BY n.account_id, n.rank, n.subject) INTO v_new
    FROM (
        SELECT f.* FROM found AS f
        WHERE NOT EXISTS (
            SELECT 1 FROM webhook_told AS t
            WHERE t.account_id = f.account_id AND t.type = f.type AND t.subject = f.subject
                AND t.mark = f.mark
        )
        ORDER BY f.account_id, f.rank, f.subject LIMIT cardinality(p_ids)
    ) AS n;

    FOR v_event IN SELECT e.value FROM jsonb_array_elements(v_new) AS e LOOP
        events := events + 1;
        PERFORM put_webhook_event(
            (v_event ->> 'account_id')::uuid, p_ids[events], v_event ->> 'type', v_event -> 'data',
            NULL
        );
        INSERT INTO webhook_told AS t VALUES (
            (v_event ->> 'account_id')::uuid, v_event ->> 'type', (v_event ->> 'subject')::uuid,
            (v_event ->> 'mark')::timestamptz
        ) ON CONFLICT (account_id, type, subject) DO UPDATE SET mark = excluded.mark;
    END LOOP;
    -- Where ids were used up there may be more of this page.
    is_last := is_last AND events < cardinality(p_ids);
    UPDATE webhook_watch AS w SET
        after = CASE
            WHEN is_last THEN '00000000-0000-0000-0000-000000000000'
            WHEN events < cardinality(p_ids) THEN v_last
            ELSE v_after
        END,
        due_at = clock_timestamp() + make_interval(
            secs => CASE WHEN is_last THEN p_interval_s ELSE p_pause_s END
        )
    WHERE w.is_only;
    RETURN NEXT;
END $$;

-- Take up to p_limit events that are due for a receiver, each the oldest pending of its account, for
-- p_lease_s: whoever takes longer may find that somebody else sent it too.
CREATE FUNCTION claim_webhooks(p_receiver_id uuid, p_limit integer, p_lease_s double precision)
RETURNS TABLE (
    account_id uuid, number bigint, event_id uuid, type text, data jsonb, at timestamptz,
    attempts integer, lease timestamptz
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
#variable_conflict use_column
DECLARE
    v_lane record;
    v_taken integer := 0;
BEGIN
    lease := clock_timestamp() + make_interval(secs => p_lease_s);
    FOR v_lane IN
        SELECT l.account_id, l.due_at FROM webhook_lanes AS l
        WHERE l.receiver_id = p_receiver_id AND l.due_at <= clock_timestamp()
            AND EXISTS (
                SELECT 1 FROM webhook_receivers AS e
                WHERE e.receiver_id = p_receiver_id AND e.status = 'active'
            )
        -- Others take from the same end.
        ORDER BY l.due_at LIMIT 4 * p_limit
    LOOP
        EXIT WHEN v_taken = p_limit;
        PERFORM 1 FROM webhook_lanes AS l
        WHERE l.account_id = v_lane.account_id AND l.receiver_id = p_receiver_id
            AND l.due_at = v_lane.due_at
        FOR UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        SELECT d.account_id, d.number, d.event_id, e.type, e.data, e.at, d.attempts
        INTO account_id, number, event_id, type, data, at, attempts
        FROM webhook_deliveries AS d
        INNER JOIN webhook_events AS e
            ON d.account_id = e.account_id AND d.number = e.number
            AND e.account_id = v_lane.account_id
        WHERE d.account_id = v_lane.account_id AND d.receiver_id = p_receiver_id
            AND d.status = 'pending'
        ORDER BY d.number LIMIT 1;
        IF NOT FOUND THEN  -- it was forgotten for its age, or erased
            DELETE FROM webhook_lanes AS l
            WHERE l.account_id = v_lane.account_id AND l.receiver_id = p_receiver_id;
            CONTINUE;
        END IF;
        UPDATE webhook_lanes AS l SET due_at = lease
        WHERE l.account_id = v_lane.account_id AND l.receiver_id = p_receiver_id;
        v_taken := v_taken + 1;
        RETURN NEXT;
    END LOOP;
END $$;

-- Say what came of an event that was claimed: p_outcome is delivered, refused, or gone where the
-- receiver wants nothing any more. Answers
--
--   delivered   the next of the account is due
--   pending     it is tried again, in p_retry_s or when the receiver is no longer paused
--   failed      nobody took it for p_give_up_s since it was queued; the next of the account is due
--   lost        the lease was over, and somebody else has it
CREATE FUNCTION finish_webhook(
    p_account_id uuid, p_receiver_id uuid, p_number bigint, p_lease timestamptz, p_outcome text,
    p_status integer, p_error text, p_retry_s double precision, p_give_up_s double precision
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_now timestamptz;
    v_outcome text;
BEGIN
    IF p_outcome = 'gone' THEN
        UPDATE webhook_receivers AS e SET status = 'paused', is_gone = true
        WHERE e.receiver_id = p_receiver_id AND e.status = 'active';
    END IF;
    PERFORM 1 FROM webhook_lanes AS l
    WHERE l.account_id = p_account_id AND l.receiver_id = p_receiver_id AND l.due_at = p_lease
    FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 'lost';
    END IF;
    v_now := clock_timestamp();
    UPDATE webhook_deliveries AS d SET
        status = CASE
            WHEN p_outcome = 'delivered' THEN 'delivered'
            WHEN p_outcome = 'refused' AND d.queued_at <= v_now - make_interval(secs => p_give_up_s)
            THEN 'failed'
            ELSE 'pending'
        END,
        attempts = d.attempts + 1, last_attempt_at = v_now, last_status = p_status,
        last_error = p_error
    WHERE d.account_id = p_account_id AND d.number = p_number AND d.receiver_id = p_receiver_id
    RETURNING d.status INTO v_outcome;
    IF v_outcome = 'pending' THEN
        UPDATE webhook_lanes AS l SET due_at = v_now + make_interval(secs => p_retry_s)
        WHERE l.account_id = p_account_id AND l.receiver_id = p_receiver_id;
        RETURN v_outcome;
    END IF;
    PERFORM 1 FROM webhook_deliveries AS d
    WHERE d.account_id = p_account_id AND d.receiver_id = p_receiver_id AND d.status = 'pending'
    LIMIT 1;
    IF FOUND THEN
        UPDATE webhook_lanes AS l SET due_at = v_now
        WHERE l.account_id = p_account_id AND l.receiver_id = p_receiver_id;
    ELSE
        DELETE FROM webhook_lanes AS l
        WHERE l.account_id = p_account_id AND l.receiver_id = p_receiver_id;
    END IF;
    RETURN coalesce(v_outcome, 'lost');
END $$;

CREATE FUNCTION create_webhook(
    p_receiver_id uuid, p_url text, p_description text, p_event_types text[], p_secret text,
    p_actor text
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    INSERT INTO webhook_receivers (receiver_id, url, description, event_types, secret)
    VALUES (p_receiver_id, p_url, p_description, p_event_types, p_secret);
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_receiver_id, clock_timestamp(), p_actor,
        'webhook.create', jsonb_build_object('receiver_id', p_receiver_id, 'url', p_url)
    );
END $$;

-- p_change has those of {url, description, event_types, status} that change. What is pending for a
-- receiver that is active again is due at once, with all of its time. False if there is no such.
CREATE FUNCTION change_webhook(
    p_receiver_id uuid, p_change jsonb, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_new webhook_receivers;
    v_old webhook_receivers;
    v_now constant timestamptz := clock_timestamp();
BEGIN
    SELECT * INTO v_old FROM webhook_receivers AS e
    WHERE e.receiver_id = p_receiver_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    v_new := jsonb_populate_record(v_old, p_change);
    UPDATE webhook_receivers AS e SET
        url = v_new.url, description = v_new.description, event_types = v_new.event_types,
        status = v_new.status, is_gone = e.is_gone AND v_new.status = 'paused'
    WHERE e.receiver_id = p_receiver_id;
    IF v_old.status = 'paused' AND v_new.status = 'active' THEN
        UPDATE webhook_lanes AS l SET due_at = v_now WHERE l.receiver_id = p_receiver_id;
        UPDATE webhook_deliveries AS d SET queued_at = v_now
        WHERE d.receiver_id = p_receiver_id AND d.status = 'pending';
    END IF;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, v_now, p_actor, 'webhook.change',
        p_change || jsonb_build_object('receiver_id', p_receiver_id)
    );
    RETURN true;
END $$;

-- Both secrets sign for p_overlap_s; one that was still signing from a rotation before does no more.
CREATE FUNCTION rotate_webhook_secret(
    p_receiver_id uuid, p_secret text, p_overlap_s integer, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
BEGIN
    UPDATE webhook_receivers AS e SET
        secret = p_secret, old_secret = e.secret,
        old_secret_until = clock_timestamp() + make_interval(secs => p_overlap_s)
    WHERE e.receiver_id = p_receiver_id;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'webhook.rotate', jsonb_build_object(
            'receiver_id', p_receiver_id, 'overlap_s', p_overlap_s
        )
    );
    RETURN true;
END $$;

-- What was pending for it is forgotten; the events stay for others. False if there is no such.
CREATE FUNCTION delete_webhook(p_receiver_id uuid, p_event_id uuid, p_actor text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_url text;
BEGIN
    DELETE FROM webhook_receivers AS e WHERE e.receiver_id = p_receiver_id
    RETURNING e.url INTO v_url;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM webhook_lanes AS l WHERE l.receiver_id = p_receiver_id;
    DELETE FROM webhook_deliveries AS d WHERE d.receiver_id = p_receiver_id;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'webhook.delete', jsonb_build_object('receiver_id', p_receiver_id, 'url', v_url)
    );
    RETURN true;
END $$;

-- Queue an event that only tries whether a receiver gets it. False if there is no such receiver.
CREATE FUNCTION test_webhook(p_receiver_id uuid, p_event_id uuid, p_actor text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
BEGIN
    PERFORM 1 FROM webhook_receivers AS e WHERE e.receiver_id = p_receiver_id FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM put_webhook_event(
        '00000000-0000-0000-0000-000000000000', p_event_id, 'webhook.test',
        jsonb_build_object('receiver_id', p_receiver_id), p_receiver_id
    );
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'webhook.test', jsonb_build_object('receiver_id', p_receiver_id)
    );
    RETURN true;
END $$;

-- Queue events again for a receiver, or for the first time: the one of p_event_id, or all that it
-- takes since p_since. Answers how many; NULL if there is no such receiver.
CREATE FUNCTION replay_webhooks(
    p_receiver_id uuid, p_event_id uuid, p_since timestamptz, p_act_id uuid, p_actor text
) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_now constant timestamptz := clock_timestamp();
    v_event_types text[];
    v_accounts uuid[];
    v_numbers bigint[];
    v_queued integer;
BEGIN
    SELECT e.event_types INTO v_event_types FROM webhook_receivers AS e
    WHERE e.receiver_id = p_receiver_id FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT array_agg(e.account_id), array_agg(e.number) INTO v_accounts, v_numbers
    FROM webhook_events AS e
    WHERE CASE
        WHEN p_event_id IS NULL
        THEN e.type <> 'webhook.test' AND coalesce(e.type = ANY(v_event_types), true)
        -- A test is for the receiver that it was made for.
        ELSE e.type <> 'webhook.test' OR e.data ->> 'receiver_id' = p_receiver_id::text
    END
    AND e.event_id >= coalesce(p_event_id, uuid_floor(p_since))
    AND e.event_id <= coalesce(p_event_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
    -- The lanes first, and sorted, as whoever delivers takes them. One that waits for its next try
    -- waits no longer.
    INSERT INTO webhook_lanes AS l
    SELECT DISTINCT a.account_id, p_receiver_id, v_now FROM unnest(v_accounts) AS a (account_id)
    ORDER BY a.account_id
    ON CONFLICT (account_id, receiver_id) DO UPDATE SET due_at = excluded.due_at;
    INSERT INTO webhook_deliveries AS d (
        account_id, number, receiver_id, event_id, status, queued_at
    )
    SELECT e.account_id, e.number, p_receiver_id, e.event_id, 'pending', v_now
    FROM unnest(v_accounts, v_numbers) AS a (account_id, number)
    INNER JOIN webhook_events AS e ON a.account_id = e.account_id AND a.number = e.number
    ON CONFLICT (account_id, number, receiver_id) DO UPDATE SET
        status = 'pending', queued_at = excluded.queued_at, attempts = 0;
    GET DIAGNOSTICS v_queued = ROW_COUNT;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_act_id, v_now, p_actor, 'webhook.replay',
        jsonb_build_object(
            'receiver_id', p_receiver_id, 'event_id', p_event_id, 'since', p_since,
            'events', v_queued
        )
    );
    RETURN v_queued;
END $$;

-- Forget events older than p_age_s and what came of them, but those that a receiver may still get;
-- says how many.
CREATE FUNCTION purge_webhook_events(p_age_s double precision, p_limit integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan
AS $$
DECLARE
    v_accounts uuid[];
    v_numbers bigint[];
BEGIN
    SELECT array_agg(o.account_id), array_agg(o.number) INTO v_accounts, v_numbers
    FROM (
        SELECT e.account_id, e.number FROM webhook_events AS e
        WHERE e.event_id < uuid_floor(clock_timestamp() - make_interval(secs => p_age_s))
            AND NOT EXISTS (
                SELECT 1 FROM webhook_deliveries AS d
                INNER JOIN webhook_receivers AS r ON d.receiver_id = r.receiver_id
                WHERE d.account_id = e.account_id AND d.number = e.number
                    AND d.status = 'pending' AND r.status = 'active'
            )
        ORDER BY e.event_id LIMIT p_limit
    ) AS o;
    DELETE FROM webhook_deliveries AS d
    USING unnest(v_accounts, v_numbers) AS o (account_id, number)
    WHERE d.account_id = o.account_id AND d.number = o.number;
    DELETE FROM webhook_events AS e
    USING unnest(v_accounts, v_numbers) AS o (account_id, number)
    WHERE e.account_id = o.account_id AND e.number = o.number;
    RETURN coalesce(cardinality(v_accounts), 0);
END $$;

-- The detail of an act of an operator without what may tell of a person: numbers, ids and times
-- stay, and the texts that are named here. What is not known is not kept.
CREATE FUNCTION without_names(p_detail jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE STRICT
RETURN (
    SELECT coalesce(jsonb_object_agg(d.key, CASE
        WHEN jsonb_typeof(d.value) IN ('number', 'boolean', 'null') THEN d.value
        WHEN d.key IN (
            'budget_period', 'receiver_id', 'event_id', 'expires_at', 'key_id', 'project_id',
            'reference', 'request_id', 'review_reason', 'role', 'source', 'status', 'tier'
        ) AND jsonb_typeof(d.value) = 'string' THEN d.value
        ELSE '"erased"'::jsonb
    END), '{}')
    FROM jsonb_each(p_detail) AS d (key, value)
);

-- What the service may be told to erase by itself.
CREATE INDEX accounts_to_erase ON accounts (account_id)
WHERE status = 'closed' AND erased_at IS NULL;

-- Remove what tells of a person from a closed account, for good. Money stays, and so does what seals
-- vouch for: entries with their reasons and references, usage, funding. Answers
--
--   erased        done now
--   exists        done before
--   not_closed    it is in use: close it first
--   open_holds    some request of it has not ended
--   unknown       there is no such account
CREATE FUNCTION erase_account(p_account_id uuid, p_event_id uuid, p_actor text, p_reason text)
RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_account accounts;
BEGIN
    -- The balance first, as everybody does.
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_account FROM accounts AS a
    WHERE a.account_id = p_account_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN 'unknown';
    ELSIF v_account.erased_at IS NOT NULL THEN
        RETURN 'exists';
    ELSIF v_account.status <> 'closed' THEN
        RETURN 'not_closed';
    END IF;
    PERFORM 1 FROM open_holds AS h WHERE h.account_id = p_account_id LIMIT 1;
    IF FOUND THEN
        RETURN 'open_holds';
    END IF;
    UPDATE accounts AS a
    SET name = 'erased', erased_at = clock_timestamp(), version = a.version + 1
    WHERE a.account_id = p_account_id;
    -- No text has a hash of zeros: nobody's key leads here any more.
    UPDATE virtual_keys AS k SET
        name = 'erased', prefix = '', key_hash = decode(repeat('00', 32), 'hex'),
        allowed_networks = NULL, status = 'revoked',
        revoked_at = coalesce(k.revoked_at, clock_timestamp()), version = k.version + 1
    WHERE k.account_id = p_account_id;
    UPDATE projects AS p SET name = 'erased' WHERE p.account_id = p_account_id;
    UPDATE charges AS c SET description = NULL, metadata = '{}', key_hash = NULL
    WHERE c.account_id = p_account_id;
    UPDATE recurring_charges AS c SET
        description = NULL, metadata = '{}', key_hash = NULL, status = 'cancelled'
    WHERE c.account_id = p_account_id;
    UPDATE charges AS c SET description = NULL, metadata = '{}'
    WHERE c.account_id = p_account_id AND (c.description IS NOT NULL OR c.metadata <> '{}');
    UPDATE recurring_charges AS c SET description = NULL, metadata = '{}'
    WHERE c.account_id = p_account_id;
    DELETE FROM idempotency_keys AS k WHERE k.account_id = p_account_id;
    DELETE FROM webhook_lanes AS l WHERE l.account_id = p_account_id;
    DELETE FROM webhook_deliveries AS d WHERE d.account_id = p_account_id;
    DELETE FROM webhook_events AS e WHERE e.account_id = p_account_id;
    -- refuse_change lets this through, for this account and until this line is over.
    PERFORM set_config('tallygate.erasing', p_account_id::text, true);
    UPDATE audit_trail AS t SET detail = without_names(t.detail)
    WHERE t.account_id = p_account_id;
    PERFORM set_config('tallygate.erasing', '', true);
    INSERT INTO audit_trail VALUES (
        p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.erase',
        jsonb_build_object('reason', p_reason)
    );
    RETURN 'erased';
END $$;

CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- Nothing but erase_account sets this. Whatever the statement says, names go and the rest stays.
    IF TG_OP = 'UPDATE' AND TG_TABLE_NAME = 'audit_trail' THEN
        IF current_setting('tallygate.erasing', true) = OLD.account_id::text THEN
            NEW := OLD;
            NEW.detail := tallygate.without_names(OLD.detail);
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION '% is append-only: correct it with a reversal', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

CREATE OR REPLACE FUNCTION record_audit(
    p_run_id uuid, p_scope text, p_through_seal integer, p_findings bigint, p_entries bigint,
    p_duration_ms integer
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    INSERT INTO audit_runs (run_id, scope, through_seal, findings, entries, duration_ms)
    VALUES (p_run_id, p_scope, p_through_seal, p_findings, p_entries, p_duration_ms);
    IF p_findings > 0 THEN
        PERFORM put_webhook_event(
            '00000000-0000-0000-0000-000000000000', p_run_id, 'audit.failed',
            jsonb_build_object('run_id', p_run_id, 'scope', p_scope, 'findings', p_findings), NULL
        );
    END IF;
END $$;

REVOKE ALL ON FUNCTION
put_webhook_event, watch_page, claim_webhooks, finish_webhook, create_webhook, change_webhook,
rotate_webhook_secret, delete_webhook, test_webhook, replay_webhooks, purge_webhook_events,
without_names, erase_account
FROM PUBLIC;
GRANT SELECT ON
webhook_receivers, webhook_events, webhook_counts, webhook_deliveries, webhook_lanes,
webhook_told, webhook_watch
TO tallygate_app;
GRANT EXECUTE ON FUNCTION
watch_page, claim_webhooks, finish_webhook, create_webhook, change_webhook,
rotate_webhook_secret, delete_webhook, test_webhook, replay_webhooks, purge_webhook_events,
erase_account
TO tallygate_app;
