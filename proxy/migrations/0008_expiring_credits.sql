-- From version 7 to 8: credits that expire, those of each month, and tiers that can be changed.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of the version
-- before go on working; they don't tell what expires.
--
-- `entries` is read once, for its new constraint, and nobody can write it meanwhile: authorizations
-- and settlements wait, and the latter go to their proxies' spools.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

ALTER TABLE entries
DROP CONSTRAINT entries_kind_adds_up,
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
        WHEN 'credit_expiry' THEN
            phase = 1 AND amount < 0 AND posted_delta = amount AND reserved_delta = 0
        ELSE false
    END
);

-- Credits that are there until a time, by the entry of their grant. What is spent is taken from
-- those that expire first, and from credits that don't expire only when none of these are left. No
-- request waits for that: `remaining` is as of when somebody last looked (see allocate_credits).
CREATE TABLE expiring_credits (
    account_id uuid NOT NULL,
    grant_id uuid NOT NULL,
    amount bigint NOT NULL CHECK (amount > 0),
    remaining bigint NOT NULL CHECK (remaining >= 0),
    expired bigint NOT NULL DEFAULT 0 CHECK (expired >= 0),
    granted_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    -- When the sweeper looks next: some of them may still be held when their time comes.
    due_at timestamptz NOT NULL,
    closed_at timestamptz,
    PRIMARY KEY (account_id, grant_id),
    CONSTRAINT expiring_credits_add_up CHECK (remaining + expired <= amount),
    CONSTRAINT expiring_credits_close_empty CHECK ((closed_at IS NULL) = (remaining > 0))
);
CREATE INDEX expiring_credits_open ON expiring_credits (account_id, expires_at)
WHERE closed_at IS NULL;
CREATE INDEX expiring_credits_by_due ON expiring_credits (due_at) WHERE closed_at IS NULL;

-- What an account had spent in all when that was last taken from its expiring credits.
CREATE TABLE credit_allocations (
    account_id uuid PRIMARY KEY,
    spent bigint NOT NULL
);

-- How far the credits of a month are given, and when somebody looks again: of all replicas.
CREATE TABLE monthly_walk (
    is_only boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    -- The month as YYYY-MM and what each tier gets; where either changes, everybody comes again.
    month text NOT NULL,
    tiers jsonb NOT NULL,
    after uuid NOT NULL,
    due_at timestamptz NOT NULL
);
INSERT INTO monthly_walk
VALUES (true, '', '{}', '00000000-0000-0000-0000-000000000000', 'epoch');

-- A uuidv7 of now. PostgreSQL has one of its own from 18 on.
CREATE FUNCTION new_uuid7() RETURNS uuid LANGUAGE sql VOLATILE
RETURN encode(
    -- Six bytes of milliseconds before ten of a random uuid, and its version of 4 made 7.
    set_bit(set_bit(
        substring(int8send((extract(EPOCH FROM clock_timestamp()) * 1000)::bigint), 3)
        || substring(uuid_send(gen_random_uuid()), 7),
        52, 1
    ), 53, 1),
    'hex'
)::uuid;

-- What is left of an account's expiring credits at this moment, the first to expire first. `free` is
-- what no open hold may take: holds count as spent by the order of their credits.
--
-- Spent is what was posted beside requests less what is posted now; since the last look it is taken
-- first. Nor is more left than is posted: what an operator took back, and a debt that a grant was
-- used to pay, is gone.
CREATE FUNCTION expiring_credits_left(p_account_id uuid)
RETURNS TABLE (
    grant_id uuid, amount bigint, expired bigint, expires_at timestamptz, remaining bigint,
    free bigint
)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
    SELECT
        o.grant_id, o.amount, o.expired, o.expires_at,
        least(o.remaining, greatest(0, o.through - o.taken))::bigint,
        least(o.remaining, greatest(0, o.through - o.taken - o.reserved))::bigint
    FROM (
        SELECT
            x.grant_id, x.amount, x.expired, x.expires_at, x.remaining, b.reserved,
            sum(x.remaining) OVER (ORDER BY x.expires_at, x.grant_id) AS through,
            greatest(
                0,
                (
                    SELECT coalesce(sum(f.amount), 0) FROM funding AS f
                    WHERE f.account_id = p_account_id
                ) - b.posted - a.spent,
                sum(x.remaining) OVER () - greatest(b.posted, 0)
            ) AS taken
        FROM balances AS b
        INNER JOIN credit_allocations AS a ON a.account_id = p_account_id
        INNER JOIN expiring_credits AS x ON x.account_id = p_account_id AND x.closed_at IS NULL
        WHERE b.account_id = p_account_id
    ) AS o
    ORDER BY o.expires_at, o.grant_id
$$;

-- Take what was spent since the last time from an account's expiring credits, under the lock of its
-- balance. Before anything is added to them or expires, so that each takes its own share.
CREATE FUNCTION allocate_credits(p_account_id uuid) RETURNS void LANGUAGE plpgsql
SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_left record;
    v_spent bigint;
BEGIN
    FOR v_left IN SELECT * FROM expiring_credits_left(p_account_id) LOOP
        UPDATE expiring_credits AS x SET
            remaining = v_left.remaining,
            closed_at = CASE WHEN v_left.remaining = 0 THEN clock_timestamp() END
        WHERE x.account_id = p_account_id AND x.grant_id = v_left.grant_id
            AND x.remaining <> v_left.remaining;
    END LOOP;
    v_spent := (
        SELECT coalesce(sum(f.amount), 0) FROM funding AS f WHERE f.account_id = p_account_id
    ) - (SELECT b.posted FROM balances AS b WHERE b.account_id = p_account_id);
    INSERT INTO credit_allocations VALUES (p_account_id, v_spent)
    ON CONFLICT (account_id) DO UPDATE SET spent = excluded.spent;
END $$;

-- Post money that is no request's, under the lock of the balance and where nothing speaks against
-- it; answers the balance after it.
CREATE FUNCTION post_credits(
    p_account_id uuid, p_entry_id uuid, p_kind text, p_amount bigint, p_source text,
    p_external_id text, p_reason text, p_reference text, p_actor text
) RETURNS balances LANGUAGE plpgsql SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_now constant timestamptz := clock_timestamp();
    v_balance balances;
BEGIN
    UPDATE balances AS b SET
        posted = b.posted + p_amount,
        seq = b.seq + 1,
        overdraft = greatest(0, -(b.posted + p_amount - b.reserved + b.credit_limit))
    WHERE b.account_id = p_account_id RETURNING b.* INTO v_balance;
    INSERT INTO funding VALUES (
        p_account_id, p_source, p_external_id, p_entry_id, p_kind, p_amount, p_reason, p_actor,
        v_now
    );
    INSERT INTO entries VALUES (
        p_account_id, p_entry_id, 1, p_kind, v_balance.seq, p_amount, p_amount, 0,
        v_balance.posted, v_balance.reserved, p_reason, p_reference, v_now
    );
    RETURN v_balance;
END $$;

-- Grant credits that expire; like `fund` otherwise. The same grant with another time is a conflict.
-- What the service does by itself is not in the trail of what operators did.
CREATE FUNCTION fund_expiring(
    p_account_id uuid, p_entry_id uuid, p_amount bigint, p_source text, p_external_id text,
    p_reason text, p_actor text, p_expires_at timestamptz
) RETURNS TABLE (outcome text, entry_id uuid, posted bigint, reserved bigint, credit_limit bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    v_balance balances;
    v_prior funding;
    v_is_same boolean;
    v_remaining bigint;
    v_now timestamptz;
BEGIN
    SELECT * INTO v_balance FROM balances AS b
    WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'unknown_account', NULL::uuid, NULL::bigint, NULL::bigint, NULL::bigint;
        RETURN;
    END IF;
    SELECT * INTO v_prior FROM funding AS f
    WHERE f.account_id = p_account_id AND f.source = p_source AND f.external_id = p_external_id;
    IF FOUND THEN
        v_is_same := v_prior.kind = 'grant' AND v_prior.amount = p_amount AND EXISTS (
            SELECT 1 FROM expiring_credits AS x
            WHERE x.account_id = p_account_id AND x.grant_id = v_prior.entry_id
                AND x.expires_at = p_expires_at
        );
        RETURN QUERY SELECT
            CASE WHEN v_is_same THEN 'exists' ELSE 'conflict' END,
            v_prior.entry_id, v_balance.posted, v_balance.reserved, v_balance.credit_limit;
        RETURN;
    END IF;
    PERFORM allocate_credits(p_account_id);
    v_balance := post_credits(
        p_account_id, p_entry_id, 'grant', p_amount, p_source, p_external_id, p_reason,
        p_external_id, p_actor
    );
    v_now := clock_timestamp();
    -- A debt is paid first, as by every deposit.
    v_remaining := least(p_amount, greatest(0, v_balance.posted));
    INSERT INTO expiring_credits VALUES (
        p_account_id, p_entry_id, p_amount, v_remaining, 0, v_now, p_expires_at, p_expires_at,
        CASE WHEN v_remaining = 0 THEN v_now END
    );
    IF p_actor <> 'tallygate' THEN
        INSERT INTO audit_trail VALUES (
            p_account_id, p_entry_id, v_now, p_actor, 'grant', jsonb_build_object(
                'amount', p_amount, 'source', p_source, 'reference', p_external_id,
                'reason', p_reason, 'expires_at', p_expires_at
            )
        );
    END IF;
    RETURN QUERY SELECT
        'posted', p_entry_id, v_balance.posted, v_balance.reserved, v_balance.credit_limit;
END $$;

-- Take back what is left of an account's credits whose time is over, and is not held; what is held
-- is looked at again when its requests have had time to end.
CREATE FUNCTION expire_credits_of(p_account_id uuid) RETURNS void LANGUAGE plpgsql
SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_now timestamptz;
    v_left record;
BEGIN
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    PERFORM allocate_credits(p_account_id);
    FOR v_left IN
        SELECT * FROM expiring_credits_left(p_account_id) AS l WHERE l.expires_at <= v_now
    LOOP
        IF v_left.free > 0 THEN
            PERFORM post_credits(
                p_account_id, new_uuid7(), 'credit_expiry', -v_left.free, 'expiry',
                -- The rest may follow: by what had expired before, each has a name of its own.
                v_left.grant_id || ':' || v_left.expired, NULL, v_left.grant_id::text,
                'tallygate'
            );
        END IF;
        UPDATE expiring_credits AS x SET
            remaining = v_left.remaining - v_left.free,
            expired = v_left.expired + v_left.free,
            closed_at = CASE WHEN v_left.remaining = v_left.free THEN v_now END,
            due_at = v_now + interval '15 seconds'
        WHERE x.account_id = p_account_id AND x.grant_id = v_left.grant_id;
    END LOOP;
END $$;

-- Expire credits whose time is over; says how many grants were looked at. One sweeper works at a
-- time; the others find the lock taken and leave.
CREATE FUNCTION expire_credits(p_limit integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_due uuid[];
    v_account uuid;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.expire_credits')) THEN
        RETURN 0;
    END IF;
    v_due := ARRAY(
        SELECT x.account_id FROM expiring_credits AS x
        WHERE x.closed_at IS NULL AND x.due_at <= clock_timestamp()
        ORDER BY x.due_at LIMIT p_limit
    );
    -- Sorted, as everybody does who locks more than one.
    FOR v_account IN SELECT DISTINCT d.id FROM unnest(v_due) AS d (id) ORDER BY d.id LOOP
        PERFORM expire_credits_of(v_account);
    END LOOP;
    RETURN cardinality(v_due);
END $$;

-- What an account is to get of a month: by its tier, or as its overrides say in credits.
CREATE FUNCTION monthly_amount(
    p_tier text, p_overrides jsonb, p_tiers jsonb, p_nanos_per_credit bigint
) RETURNS bigint LANGUAGE sql IMMUTABLE
RETURN coalesce(
    ((p_overrides ->> 'monthly_credits')::numeric * p_nanos_per_credit)::bigint,
    (p_tiers ->> p_tier)::bigint,
    0
);

-- Give an account its credits of this month (of UTC), which expire with it; what a better tier has
-- more, once for each tier. p_tiers has nano-USD by tier. Answers what it got just now.
CREATE FUNCTION grant_month(p_account_id uuid, p_tiers jsonb) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp SET timezone = 'UTC'
SET enable_seqscan = off AS $$
DECLARE
    v_nanos_per_credit constant bigint := (
        SELECT m.value FROM meta AS m WHERE m.name = 'nanos_per_credit'
    );
    v_now timestamptz;
    v_reference text;
    v_account accounts;
    v_granted bigint;
    v_amount bigint;
    v_outcome text;
BEGIN
    PERFORM 1 FROM balances AS b WHERE b.account_id = p_account_id FOR NO KEY UPDATE;
    SELECT * INTO v_account FROM accounts AS a WHERE a.account_id = p_account_id;
    IF v_account.status IS DISTINCT FROM 'active' THEN
        RETURN 0;
    END IF;
    v_now := clock_timestamp();
    v_reference := to_char(v_now, '"monthly:"YYYY-MM');
    SELECT coalesce(sum(f.amount), 0) INTO v_granted FROM funding AS f
    WHERE f.account_id = p_account_id AND f.source = 'tier'
        AND starts_with(f.external_id, v_reference);
    v_amount := monthly_amount(
        v_account.tier, v_account.overrides, p_tiers, v_nanos_per_credit
    ) - v_granted;
    IF v_amount <= 0 THEN
        RETURN 0;
    END IF;
    IF v_granted > 0 THEN
        v_reference := v_reference || ':' || v_account.tier;
    END IF;
    SELECT f.outcome INTO v_outcome FROM fund_expiring(
        p_account_id, new_uuid7(), v_amount, 'tier', v_reference, 'credits of the month',
        'tallygate', date_trunc('month', v_now) + interval '1 month'
    ) AS f;
    RETURN CASE v_outcome WHEN 'posted' THEN v_amount ELSE 0 END;
END $$;

-- Give the next p_limit accounts their credits of this month. Says whether there are more to do at
-- once; after the last account, p_interval_s pass until somebody looks again.
CREATE FUNCTION grant_monthly_credits(p_tiers jsonb, p_limit integer, p_interval_s integer)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp SET timezone = 'UTC'
SET enable_seqscan = off AS $$
DECLARE
    v_walk monthly_walk;
    v_month constant text := to_char(clock_timestamp(), 'YYYY-MM');
    v_nanos_per_credit constant bigint := (
        SELECT m.value FROM meta AS m WHERE m.name = 'nanos_per_credit'
    );
    v_page uuid[];
    v_account uuid;
BEGIN
    SELECT * INTO v_walk FROM monthly_walk AS w FOR UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF v_walk.month <> v_month OR v_walk.tiers <> p_tiers THEN
        v_walk.after := '00000000-0000-0000-0000-000000000000';
    ELSIF v_walk.due_at > clock_timestamp() THEN
        RETURN false;
    END IF;
    v_page := ARRAY(
        SELECT a.account_id FROM accounts AS a WHERE a.account_id > v_walk.after
        ORDER BY a.account_id LIMIT p_limit
    );
    FOR v_account IN
        SELECT a.account_id FROM unnest(v_page) AS p (id)
        INNER JOIN accounts AS a ON p.id = a.account_id
        WHERE a.status = 'active'
            AND monthly_amount(a.tier, a.overrides, p_tiers, v_nanos_per_credit) > (
                SELECT coalesce(sum(f.amount), 0) FROM funding AS f
                WHERE f.account_id = a.account_id AND f.source = 'tier'
                    AND starts_with(f.external_id, 'monthly:' || v_month)
            )
        ORDER BY a.account_id
    LOOP
        PERFORM grant_month(v_account, p_tiers);
    END LOOP;
    UPDATE monthly_walk AS w SET
        month = v_month,
        tiers = p_tiers,
        after = CASE
            WHEN cardinality(v_page) = p_limit THEN v_page[p_limit]
            ELSE '00000000-0000-0000-0000-000000000000'
        END,
        due_at = CASE
            WHEN cardinality(v_page) = p_limit THEN clock_timestamp()
            ELSE clock_timestamp() + make_interval(secs => p_interval_s)
        END
    WHERE w.is_only;
    RETURN cardinality(v_page) = p_limit;
END $$;

-- Make an account with what its tier gives it: credits to start with, once ever, and those of this
-- month. The same account id answers false.
CREATE FUNCTION open_account(
    p_account_id uuid, p_name text, p_tier text, p_credit_limit bigint, p_actor text,
    p_starter bigint, p_tiers jsonb
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
BEGIN
    IF NOT create_account(p_account_id, p_name, p_tier, p_credit_limit, p_actor) THEN
        RETURN false;
    END IF;
    IF p_starter > 0 THEN
        PERFORM fund(
            p_account_id, new_uuid7(), 'grant', p_starter, 'tier', 'starter', 'starter credits',
            p_actor
        );
    END IF;
    PERFORM grant_month(p_account_id, p_tiers);
    RETURN true;
END $$;

-- Change an account's tier. Takes effect on the next authorization of every replica. False if there
-- is no such account.
CREATE FUNCTION set_account_tier(
    p_account_id uuid, p_tier text, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_before text;
BEGIN
    SELECT a.tier INTO v_before FROM accounts AS a
    WHERE a.account_id = p_account_id FOR NO KEY UPDATE;
    IF v_before <> p_tier THEN
        UPDATE accounts AS a SET tier = p_tier, version = a.version + 1
        WHERE a.account_id = p_account_id;
        INSERT INTO audit_trail VALUES (
            p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.tier',
            jsonb_build_object('tier', p_tier, 'before', v_before)
        );
    END IF;
    RETURN v_before IS NOT NULL;
END $$;

-- Say what of its tier does not hold for an account; it replaces what was said before. Takes effect
-- on the next authorization of every replica. False if there is no such account.
CREATE FUNCTION set_account_overrides(
    p_account_id uuid, p_overrides jsonb, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    v_before jsonb;
BEGIN
    SELECT a.overrides INTO v_before FROM accounts AS a
    WHERE a.account_id = p_account_id FOR NO KEY UPDATE;
    IF v_before <> p_overrides THEN
        UPDATE accounts AS a SET overrides = p_overrides, version = a.version + 1
        WHERE a.account_id = p_account_id;
        INSERT INTO audit_trail VALUES (
            p_account_id, p_event_id, clock_timestamp(), p_actor, 'account.overrides',
            jsonb_build_object('overrides', p_overrides, 'before', v_before)
        );
    END IF;
    RETURN v_before IS NOT NULL;
END $$;

REVOKE ALL ON FUNCTION
new_uuid7, expiring_credits_left, allocate_credits, post_credits, fund_expiring,
expire_credits_of, expire_credits, monthly_amount, grant_month,
grant_monthly_credits, open_account, set_account_tier, set_account_overrides
FROM PUBLIC;
GRANT SELECT ON expiring_credits, credit_allocations, monthly_walk TO tallygate_app;
GRANT EXECUTE ON FUNCTION
expiring_credits_left, fund_expiring, expire_credits, grant_month, grant_monthly_credits,
open_account, set_account_tier, set_account_overrides
TO tallygate_app;
