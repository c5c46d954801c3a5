-- Tallygate's ledger: the complete current schema, and what a fresh installation loads.
--
-- Every amount is an integer of nano-USD unless its name says otherwise (cost_picos is pico-USD).
-- Money moves in three functions only: authorize_batch places holds, settle_batch ends them, fund
-- adds or takes what is not a request. Each is atomic, set-based, and takes the balance rows it
-- needs in the order of account_id before it reads anything it decides on.
--
-- Every key of a table that grows with customers leads with account_id, no hot table has a foreign
-- key, and nothing counts with a sequence: the tables can be distributed by account_id as they are.

DO $$
DECLARE
    v_role text;
BEGIN
    -- Roles belong to the whole cluster: another database of it may have made them already.
    FOREACH v_role IN ARRAY ARRAY['tallygate_owner', 'tallygate_app'] LOOP
        IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = v_role) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', v_role);
            EXCEPTION WHEN duplicate_object OR unique_violation THEN
                NULL;  -- made by a migration of another database in this very moment
            END;
        END IF;
        IF NOT pg_has_role(current_user, v_role, 'MEMBER') THEN
            EXECUTE format('GRANT %I TO CURRENT_USER', v_role);
        END IF;
    END LOOP;
END $$;

CREATE SCHEMA tallygate AUTHORIZATION tallygate_owner;
SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;

-- ---------------------------------------------------------------------------------------------
-- Settings that the data depends on
-- ---------------------------------------------------------------------------------------------

CREATE TABLE meta (
    name text PRIMARY KEY,
    value text NOT NULL
);
INSERT INTO meta VALUES ('schema_version', '1');

CREATE TABLE price_books (
    version integer PRIMARY KEY CHECK (version > 0),
    valid_from timestamptz NOT NULL DEFAULT clock_timestamp(),
    document jsonb NOT NULL,
    nanos_per_credit bigint NOT NULL CHECK (nanos_per_credit > 0),
    published_by text NOT NULL
);

-- ---------------------------------------------------------------------------------------------
-- Accounts and keys
-- ---------------------------------------------------------------------------------------------

CREATE TABLE accounts (
    account_id uuid PRIMARY KEY,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    tier text NOT NULL CHECK (length(tier) BETWEEN 1 AND 64),
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended', 'closed')),
    -- Raised by every change that a proxy may have cached; see authorize_batch.
    version integer NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE virtual_keys (
    account_id uuid NOT NULL,
    key_id uuid NOT NULL,
    key_hash bytea NOT NULL CHECK (length(key_hash) = 32),
    prefix text NOT NULL,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    status text NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'revoked')),
    version integer NOT NULL DEFAULT 1,
    expires_at timestamptz,
    allowed_models text[],
    requests_per_minute integer CHECK (requests_per_minute > 0),
    tokens_per_minute bigint CHECK (tokens_per_minute > 0),
    max_concurrency integer CHECK (max_concurrency > 0),
    budget bigint CHECK (budget > 0),
    budget_period text NOT NULL DEFAULT 'total' CHECK (budget_period IN ('day', 'month', 'total')),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at timestamptz,
    is_limited boolean NOT NULL GENERATED ALWAYS AS (
        coalesce(requests_per_minute, tokens_per_minute, max_concurrency, budget) IS NOT NULL
    ) STORED,
    PRIMARY KEY (account_id, key_id)
);
CREATE INDEX virtual_keys_by_hash ON virtual_keys (key_hash);

-- What a limited key has used in the running minute and budget period. A row exists for every key;
-- it is touched only for keys that have a limit, and only under the lock of the balance row.
CREATE TABLE key_counters (
    account_id uuid NOT NULL,
    key_id uuid NOT NULL,
    minute timestamptz NOT NULL DEFAULT 'epoch',
    requests integer NOT NULL DEFAULT 0,
    tokens bigint NOT NULL DEFAULT 0,
    holds integer NOT NULL DEFAULT 0 CHECK (holds >= 0),
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    period timestamptz NOT NULL DEFAULT 'epoch',
    spent bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (account_id, key_id)
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- ---------------------------------------------------------------------------------------------
-- The ledger
-- ---------------------------------------------------------------------------------------------

-- One narrow row an account, and no second index, so that updates stay on their page (HOT).
-- available = posted - reserved + credit_limit. It falls below zero only by `overdraft`, which
-- settle_batch books where an answer that was already delivered cost more than there was.
CREATE TABLE balances (
    account_id uuid PRIMARY KEY,
    posted bigint NOT NULL DEFAULT 0,
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    credit_limit bigint NOT NULL DEFAULT 0 CHECK (credit_limit >= 0),
    overdraft bigint NOT NULL DEFAULT 0 CHECK (overdraft >= 0),
    seq bigint NOT NULL DEFAULT 0,
    CONSTRAINT balances_no_overspend CHECK (posted - reserved + credit_limit + overdraft >= 0)
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

CREATE TABLE open_holds (
    account_id uuid NOT NULL,
    request_id uuid NOT NULL,
    key_id uuid NOT NULL,
    amount bigint NOT NULL CHECK (amount >= 0),
    tokens bigint NOT NULL DEFAULT 0 CHECK (tokens >= 0),
    -- The minute whose counters this hold is in; NULL where the key had no limit.
    minute timestamptz,
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    endpoint text NOT NULL,
    model text NOT NULL,
    tier text NOT NULL,
    streamed boolean NOT NULL,
    byok boolean NOT NULL,
    price_version integer NOT NULL,
    PRIMARY KEY (account_id, request_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
CREATE INDEX open_holds_by_expiry ON open_holds (expires_at);

-- The journal. A hold is a row (phase 0), what ended it another (phase 1); a charge that became
-- known only after its hold had expired is a third (phase 2). Money that is no request's comes
-- under an id of its own (phase 1). The key holds over all partitions, because request ids are
-- uuidv7 and the partitions are cut along them.
CREATE TABLE entries (
    account_id uuid NOT NULL,
    request_id uuid NOT NULL,
    phase smallint NOT NULL CHECK (phase IN (0, 1, 2)),
    kind text NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    amount bigint NOT NULL,
    posted_delta bigint NOT NULL,
    reserved_delta bigint NOT NULL,
    posted_after bigint NOT NULL,
    reserved_after bigint NOT NULL CHECK (reserved_after >= 0),
    reason text,
    reference text,
    at timestamptz NOT NULL,
    PRIMARY KEY (account_id, request_id, phase),
    CONSTRAINT entries_kind_adds_up CHECK (
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
    )
) PARTITION BY RANGE (request_id);
CREATE INDEX entries_by_seq ON entries (account_id, seq);

-- What each request used, what it cost us and what it was sold for. Written once, when its hold
-- ends; a row that needs review is completed once more, by its late settlement or an operator.
CREATE TABLE usage (
    account_id uuid NOT NULL,
    request_id uuid NOT NULL,
    key_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    settled_at timestamptz NOT NULL,
    endpoint text NOT NULL,
    model text NOT NULL,
    model_answered text,
    tier text NOT NULL,
    streamed boolean NOT NULL,
    byok boolean NOT NULL,
    status text NOT NULL CHECK (status IN ('billed', 'needs_review', 'void', 'byok')),
    input_tokens bigint,
    cached_input_tokens bigint,
    cache_creation_tokens bigint,
    cache_creation_1h_tokens bigint,
    output_tokens bigint,
    reasoning_tokens bigint,
    audio_input_tokens bigint,
    audio_output_tokens bigint,
    image_input_tokens bigint,
    image_output_tokens bigint,
    images bigint,
    cost_picos bigint CHECK (cost_picos >= 0),
    cost_source text,
    price bigint CHECK (price >= 0),
    rounding_attos bigint,
    rule text,
    markup_ppm bigint,
    price_version integer NOT NULL,
    hold bigint NOT NULL,
    overdraft bigint NOT NULL DEFAULT 0,
    review_reason text,
    resolved_at timestamptz,
    error_code text,
    upstream_status integer,
    client_gone boolean NOT NULL DEFAULT false,
    first_byte_ms integer,
    duration_ms integer,
    PRIMARY KEY (account_id, request_id),
    -- An unknown cost is a state of its own and never a price of zero.
    CONSTRAINT usage_billed_has_price CHECK ((status IN ('billed', 'byok')) = (price IS NOT NULL)),
    CONSTRAINT usage_review_has_reason CHECK (status <> 'needs_review' OR review_reason IS NOT NULL)
) PARTITION BY RANGE (request_id);
CREATE INDEX usage_open_reviews ON usage (account_id, request_id)
WHERE review_reason IS NOT NULL AND resolved_at IS NULL;

-- Deposits and grants, idempotent by what the outside calls them.
CREATE TABLE funding (
    account_id uuid NOT NULL,
    source text NOT NULL,
    external_id text NOT NULL,
    entry_id uuid NOT NULL,
    kind text NOT NULL,
    amount bigint NOT NULL,
    reason text,
    actor text NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (account_id, source, external_id)
);

-- Who did what as an operator. Acts that concern no account stand under the nil uuid.
CREATE TABLE audit_trail (
    account_id uuid NOT NULL,
    event_id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    action text NOT NULL,
    detail jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (account_id, event_id)
);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only: correct it with a reversal', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;
CREATE TRIGGER entries_append_only BEFORE UPDATE OR DELETE ON entries
FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_trail_append_only BEFORE UPDATE OR DELETE ON audit_trail
FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER price_books_append_only BEFORE UPDATE OR DELETE ON price_books
FOR EACH ROW EXECUTE FUNCTION refuse_change();

-- ---------------------------------------------------------------------------------------------
-- Partitions
-- ---------------------------------------------------------------------------------------------

-- The least uuidv7 of an instant (RFC 9562: the first 48 bits are Unix milliseconds).
CREATE FUNCTION uuid_floor(p_at timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE STRICT
RETURN (
    lpad(to_hex((extract(EPOCH FROM p_at) * 1000)::bigint), 12, '0') || repeat('0', 20)
)::uuid;

-- Make the partitions of the month of p_from and p_months more; says how many it made.
CREATE FUNCTION ensure_partitions(p_from timestamptz, p_months integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp SET timezone = 'UTC'
-- It needs its table alone for a moment, and whoever waits for that holds up everybody behind. It
-- is called months ahead of need: behind a long report or a dump it gives up and comes again.
SET lock_timeout = '500ms' AS $$
DECLARE
    v_made integer := 0;
    v_month timestamptz;
    v_parent text;
    v_name text;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.ensure_partitions'));
    FOR i IN 0..p_months LOOP
        v_month := date_trunc('month', p_from) + make_interval(months => i);
        FOREACH v_parent IN ARRAY ARRAY['entries', 'usage'] LOOP
            v_name := v_parent || to_char(v_month, '_YYYY_MM');
            CONTINUE WHEN to_regclass(v_name) IS NOT NULL;
            EXECUTE format(
                'CREATE TABLE %I PARTITION OF %I FOR VALUES FROM (%L) TO (%L)',
                v_name, v_parent, uuid_floor(v_month), uuid_floor(v_month + interval '1 month')
            );
            v_made := v_made + 1;
        END LOOP;
    END LOOP;
    RETURN v_made;
END $$;

-- A proxy with a wrong clock must not make a settlement fail: what fits no month lands here, and
-- `tallygate doctor` says so.
CREATE TABLE entries_default PARTITION OF entries DEFAULT;
CREATE TABLE usage_default PARTITION OF usage DEFAULT;
SELECT ensure_partitions(now() - interval '1 month', 4);

-- ---------------------------------------------------------------------------------------------
-- authorize
-- ---------------------------------------------------------------------------------------------

-- Running state of one account while its requests of a batch are walked in arrival order. The
-- arrays are indexed by the key's number within the account, and stay NULL without limited keys.
CREATE TYPE admission AS (
    outcome text,
    held bigint,
    holds integer,
    key_requests integer[],
    key_tokens bigint[],
    key_reserved bigint[]
);

-- One step of the walk: a request is admitted if it fits into what those before it have left, so
-- that one too large does not refuse the ones behind it. NULL for a limit means there is none.
CREATE FUNCTION admission_step(
    p_state admission, p_key integer, p_is_limited boolean, p_amount bigint, p_tokens bigint,
    p_available bigint, p_requests_left integer, p_tokens_left bigint, p_holds_left integer,
    p_budget_left bigint
) RETURNS admission LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    v_requests integer := 0;
    v_tokens bigint := 0;
    v_reserved bigint := 0;
BEGIN
    IF p_is_limited THEN
        v_requests := coalesce(p_state.key_requests[p_key], 0);
        v_tokens := coalesce(p_state.key_tokens[p_key], 0);
        v_reserved := coalesce(p_state.key_reserved[p_key], 0);
        p_state.outcome := CASE
            WHEN v_requests + 1 > p_requests_left THEN 'requests_per_minute'
            WHEN v_tokens + p_tokens > p_tokens_left THEN 'tokens_per_minute'
            WHEN v_requests + 1 > p_holds_left THEN 'max_concurrency'
            WHEN p_amount > 0 AND v_reserved + p_amount > p_budget_left THEN 'budget_exceeded'
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
    END IF;
    p_state.held := p_state.held + p_amount;
    p_state.holds := p_state.holds + 1;
    p_state.outcome := 'held';
    RETURN p_state;
END $$;
CREATE AGGREGATE admission_walk (
    integer, boolean, bigint, bigint, bigint, integer, bigint, integer, bigint
) (SFUNC = admission_step, STYPE = admission, INITCOND = '(,0,0,,,)');

-- Where a budget period began.
CREATE FUNCTION period_start(p_period text, p_at timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE STRICT
RETURN CASE p_period
    WHEN 'total' THEN 'epoch'::timestamptz
    ELSE date_trunc(p_period, p_at, 'UTC')
END;

-- Decide a batch of requests and place their holds.
--
-- p_batch is a JSON array of {account_id, request_id, key_id, version, amount, tokens, ttl_s,
-- endpoint, model, tier, streamed, byok, price_version}. `version` is the sum of the account's and
-- the key's version as the proxy knows them. Answers a row for each, in order:
--
--   held                   the hold stands
--   exists                 this request already has its hold: a replay after a lost answer
--   duplicate              the same request stands in this batch before
--   already_settled        it had one, and it has ended
--   conflict               it has one of another amount
--   stale                  the proxy's copy of account or key is outdated: read it and ask again
--   unknown_key, key_revoked, key_expired, account_suspended, account_closed
--   insufficient_credits, budget_exceeded
--   requests_per_minute, tokens_per_minute, max_concurrency
CREATE FUNCTION authorize_batch(p_batch json)
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
            dense_rank() OVER (PARTITION BY r.account_id ORDER BY r.key_id)::integer AS key_number
        FROM ROWS FROM (
            json_to_recordset(p_batch) AS (
                account_id uuid, request_id uuid, key_id uuid, version integer, amount bigint,
                tokens bigint, ttl_s integer, endpoint text, model text, tier text,
                streamed boolean, byok boolean, price_version integer
            )
        ) WITH ORDINALITY AS r(
            account_id, request_id, key_id, version, amount, tokens, ttl_s, endpoint, model, tier,
            streamed, byok, price_version, ord
        )
    ),
    known AS MATERIALIZED (
        SELECT
            a.*,
            b.posted, b.reserved, b.seq, b.posted - b.reserved + b.credit_limit AS funds,
            k.is_limited, k.requests_per_minute, k.tokens_per_minute,
            k.requests_per_minute
            - CASE WHEN c.minute = v_minute THEN c.requests ELSE 0 END AS requests_free,
            k.tokens_per_minute
            - CASE WHEN c.minute = v_minute THEN c.tokens ELSE 0 END AS tokens_free,
            k.max_concurrency - c.holds AS holds_free,
            k.budget - c.reserved - CASE
                WHEN c.period = period_start(k.budget_period, v_now) THEN c.spent ELSE 0
            END AS budget_free,
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
        LEFT JOIN key_counters AS c
            ON k.is_limited AND k.account_id = c.account_id AND k.key_id = c.key_id
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
                k.key_number, k.is_limited, k.amount, k.tokens, k.funds, k.requests_free,
                k.tokens_free, k.holds_free, k.budget_free
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
            a.streamed, a.byok, a.price_version
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
        UPDATE key_counters AS c
        SET
            minute = v_minute,
            requests = CASE WHEN c.minute = v_minute THEN c.requests ELSE 0 END + t.holds,
            tokens = CASE WHEN c.minute = v_minute THEN c.tokens ELSE 0 END + t.tokens,
            holds = c.holds + t.holds,
            reserved = c.reserved + t.amount
        FROM (
            SELECT
                a.account_id, a.key_id, sum(a.amount)::bigint AS amount,
                sum(a.tokens)::bigint AS tokens, count(*)::integer AS holds
            FROM admitted AS a WHERE a.is_limited GROUP BY a.account_id, a.key_id
        ) AS t
        WHERE c.account_id = t.account_id AND c.key_id = t.key_id
    )
    SELECT
        w.ord::integer,
        coalesce(w.verdict, (w.state).outcome),
        w.funds - (w.state).held,
        w.budget_free - coalesce((w.state).key_reserved[w.key_number], 0),
        w.requests_per_minute,
        w.requests_free - coalesce((w.state).key_requests[w.key_number], 0),
        w.tokens_per_minute,
        w.tokens_free - coalesce((w.state).key_tokens[w.key_number], 0)
    FROM walked AS w
    ORDER BY w.ord;
END $$;

-- Give live requests more time. Harmless for a hold that has ended.
CREATE FUNCTION extend_holds(p_account_ids uuid[], p_request_ids uuid[], p_ttl_s integer)
RETURNS integer LANGUAGE sql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
    WITH live AS (
        SELECT h.account_id, h.request_id
        FROM unnest(p_account_ids, p_request_ids) AS r(account_id, request_id)
        INNER JOIN open_holds AS h
            ON r.account_id = h.account_id AND r.request_id = h.request_id
        -- One that is locked is being settled in this moment, and needs no more time.
        FOR UPDATE OF h SKIP LOCKED
    ),
    extended AS (
        UPDATE open_holds AS h
        SET expires_at = clock_timestamp() + make_interval(secs => p_ttl_s)
        FROM live AS l
        WHERE h.account_id = l.account_id AND h.request_id = l.request_id
        RETURNING 1
    )
    SELECT count(*)::integer FROM extended;
$$;

-- ---------------------------------------------------------------------------------------------
-- settle
-- ---------------------------------------------------------------------------------------------

-- What a settlement says of a request: the columns of `usage` that only the meter knows.
CREATE TYPE settlement AS (
    account_id uuid, request_id uuid, action text, status text, price bigint,
    model_answered text, input_tokens bigint, cached_input_tokens bigint,
    cache_creation_tokens bigint, cache_creation_1h_tokens bigint, output_tokens bigint,
    reasoning_tokens bigint, audio_input_tokens bigint, audio_output_tokens bigint,
    image_input_tokens bigint, image_output_tokens bigint, images bigint, cost_picos bigint,
    cost_source text, rounding_attos bigint, rule text, markup_ppm bigint, review_reason text,
    error_code text, upstream_status integer, client_gone boolean, first_byte_ms integer,
    duration_ms integer
);

-- End a batch of holds: capture what each request costs the customer, void, or expire it.
--
-- p_batch is a JSON array of settlements, action being capture, void or expire. Idempotent, and it
-- never refuses a capture that exceeds its hold: what goes beyond is taken from what is available,
-- and beyond that booked as overdraft. Answers a row for each:
--
--   captured, voided, expired   done now
--   captured_late, amended      the hold had expired before; the usage row is put right, and a
--                               capture is posted as an entry of its own
--   already_captured, already_voided, already_expired
--   not_due                     an expiry that lost against a heartbeat
--   unknown                     there never was such a hold
CREATE FUNCTION settle_batch(p_batch json, p_grace_s integer DEFAULT 0)
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
            p.first_byte_ms, p.duration_ms
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

-- The rest of settle_batch, under its locks: settlements that found no open hold. Most repeat what
-- is done. One whose hold the sweeper gave up on brings the truth late: it replaces the guess,
-- unless an operator has decided meanwhile.
CREATE FUNCTION settle_without_hold(p_batch json, p_done integer[])
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
BEGIN
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
        IF v_item.action = 'expire' OR v_entry.kind <> 'expire'
            OR v_usage.status <> 'needs_review' OR v_usage.review_reason <> 'orphaned'
            OR v_usage.resolved_at IS NOT NULL
        THEN
            outcome := CASE
                WHEN v_entry.kind = 'capture' OR v_usage.status = 'billed' THEN 'already_captured'
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
        UPDATE usage AS u SET
            settled_at = clock_timestamp(), status = v_item.status,
            model_answered = v_item.model_answered, input_tokens = v_item.input_tokens,
            cached_input_tokens = v_item.cached_input_tokens,
            cache_creation_tokens = v_item.cache_creation_tokens,
            cache_creation_1h_tokens = v_item.cache_creation_1h_tokens,
            output_tokens = v_item.output_tokens, reasoning_tokens = v_item.reasoning_tokens,
            audio_input_tokens = v_item.audio_input_tokens,
            audio_output_tokens = v_item.audio_output_tokens,
            image_input_tokens = v_item.image_input_tokens,
            image_output_tokens = v_item.image_output_tokens, images = v_item.images,
            cost_picos = v_item.cost_picos, cost_source = v_item.cost_source,
            price = CASE WHEN v_item.action = 'capture' THEN v_item.price END,
            rounding_attos = v_item.rounding_attos, rule = v_item.rule,
            markup_ppm = v_item.markup_ppm, overdraft = settle_without_hold.overdraft,
            review_reason = CASE
                WHEN settle_without_hold.overdraft > 0
                THEN coalesce(v_item.review_reason, 'overdraft')
                ELSE v_item.review_reason
            END,
            error_code = v_item.error_code, upstream_status = v_item.upstream_status,
            client_gone = coalesce(v_item.client_gone, false),
            first_byte_ms = v_item.first_byte_ms, duration_ms = v_item.duration_ms
        WHERE u.account_id = v_item.account_id AND u.request_id = v_item.request_id;
        RETURN NEXT;
    END LOOP;
END $$;

-- Expire holds whose proxy died: the customer is not charged, and the usage row asks for review.
-- One sweeper works at a time; the others find the lock taken and leave.
CREATE FUNCTION expire_holds(p_limit integer, p_grace_s integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_due json;
    v_expired integer;
BEGIN
    IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.expire_holds')) THEN
        RETURN 0;
    END IF;
    SELECT json_agg(json_build_object(
        'account_id', d.account_id, 'request_id', d.request_id, 'action', 'expire'
    )) INTO v_due
    FROM (
        SELECT h.account_id, h.request_id FROM open_holds AS h
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

-- ---------------------------------------------------------------------------------------------
-- fund
-- ---------------------------------------------------------------------------------------------

-- Post money that is no request's: deposit, grant, refund (all > 0), adjustment, reversal (<> 0).
-- Idempotent by (source, external_id): the same again answers `exists` with the first entry, other
-- money under the same name `conflict`. What would take more than is available is refused.
CREATE FUNCTION fund(
    p_account_id uuid, p_entry_id uuid, p_kind text, p_amount bigint, p_source text,
    p_external_id text, p_reason text, p_actor text
) RETURNS TABLE (outcome text, entry_id uuid, posted bigint, reserved bigint, credit_limit bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
#variable_conflict use_column
DECLARE
    v_balance balances;
    v_prior funding;
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
        RETURN QUERY SELECT
            CASE
                WHEN v_prior.kind = p_kind AND v_prior.amount = p_amount THEN 'exists'
                ELSE 'conflict'
            END,
            v_prior.entry_id, v_balance.posted, v_balance.reserved, v_balance.credit_limit;
        RETURN;
    END IF;
    IF p_amount < 0
        AND v_balance.posted + p_amount - v_balance.reserved + v_balance.credit_limit < 0 THEN
        RETURN QUERY SELECT
            'insufficient_credits', NULL::uuid, v_balance.posted, v_balance.reserved,
            v_balance.credit_limit;
        RETURN;
    END IF;
    v_now := clock_timestamp();
    INSERT INTO funding VALUES (
        p_account_id, p_source, p_external_id, p_entry_id, p_kind, p_amount, p_reason, p_actor,
        v_now
    );
    INSERT INTO entries VALUES (
        p_account_id, p_entry_id, 1, p_kind, v_balance.seq + 1, p_amount, p_amount, 0,
        v_balance.posted + p_amount, v_balance.reserved, p_reason, p_external_id, v_now
    );
    UPDATE balances AS b SET
        posted = b.posted + p_amount,
        seq = b.seq + 1,
        overdraft = greatest(0, -(b.posted + p_amount - b.reserved + b.credit_limit))
    WHERE b.account_id = p_account_id;
    INSERT INTO audit_trail VALUES (
        p_account_id, p_entry_id, v_now, p_actor, p_kind, jsonb_build_object(
            'amount', p_amount, 'source', p_source, 'reference', p_external_id, 'reason', p_reason
        )
    );
    RETURN QUERY SELECT
        'posted', p_entry_id, v_balance.posted + p_amount, v_balance.reserved,
        v_balance.credit_limit;
END $$;

-- ---------------------------------------------------------------------------------------------
-- What operators do
-- ---------------------------------------------------------------------------------------------

-- The reference makes it safe to send again: the same account id answers false.
CREATE FUNCTION create_account(
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
    INSERT INTO audit_trail VALUES (
        p_account_id, p_account_id, clock_timestamp(), p_actor, 'account.create',
        jsonb_build_object('name', p_name, 'tier', p_tier, 'credit_limit', p_credit_limit)
    );
    RETURN true;
END $$;

-- p_key is {key_id, name, prefix, expires_at, allowed_models, requests_per_minute,
-- tokens_per_minute, max_concurrency, budget, budget_period}. False if there is no such account.
CREATE FUNCTION create_key(p_account_id uuid, p_key_hash bytea, p_key jsonb, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_key virtual_keys := jsonb_populate_record(NULL::virtual_keys, p_key);
BEGIN
    PERFORM 1 FROM accounts AS a WHERE a.account_id = p_account_id AND a.status <> 'closed';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO virtual_keys (
        account_id, key_id, key_hash, prefix, name, expires_at, allowed_models,
        requests_per_minute, tokens_per_minute, max_concurrency, budget, budget_period
    ) VALUES (
        p_account_id, v_key.key_id, p_key_hash, v_key.prefix, v_key.name, v_key.expires_at,
        v_key.allowed_models, v_key.requests_per_minute, v_key.tokens_per_minute,
        v_key.max_concurrency, v_key.budget, coalesce(v_key.budget_period, 'total')
    );
    INSERT INTO key_counters (account_id, key_id) VALUES (p_account_id, v_key.key_id);
    INSERT INTO audit_trail VALUES (
        p_account_id, v_key.key_id, clock_timestamp(), p_actor, 'key.create', p_key
    );
    RETURN true;
END $$;

-- Takes effect on the next authorization of every replica. False if there is no such key; true
-- again for one that was revoked before.
CREATE FUNCTION revoke_key(p_account_id uuid, p_key_id uuid, p_event_id uuid, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    UPDATE virtual_keys AS k
    SET status = 'revoked', revoked_at = clock_timestamp(), version = k.version + 1
    WHERE k.account_id = p_account_id AND k.key_id = p_key_id AND k.status = 'active';
    IF FOUND THEN
        INSERT INTO audit_trail VALUES (
            p_account_id, p_event_id, clock_timestamp(), p_actor, 'key.revoke',
            jsonb_build_object('key_id', p_key_id)
        );
        RETURN true;
    END IF;
    RETURN EXISTS (
        SELECT 1 FROM virtual_keys AS k WHERE k.account_id = p_account_id AND k.key_id = p_key_id
    );
END $$;

-- Publish a price book as a new version, unless it is what the newest one says already; answers
-- the version in force.
CREATE FUNCTION publish_price_book(
    p_document jsonb, p_nanos_per_credit bigint, p_event_id uuid, p_actor text
) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_newest price_books;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.publish_price_book'));
    SELECT * INTO v_newest FROM price_books AS p ORDER BY p.version DESC LIMIT 1;
    IF v_newest.document = p_document AND v_newest.nanos_per_credit = p_nanos_per_credit THEN
        RETURN v_newest.version;
    END IF;
    INSERT INTO price_books (version, document, nanos_per_credit, published_by)
    VALUES (coalesce(v_newest.version, 0) + 1, p_document, p_nanos_per_credit, p_actor);
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'price_book.publish', jsonb_build_object('version', coalesce(v_newest.version, 0) + 1)
    );
    RETURN coalesce(v_newest.version, 0) + 1;
END $$;

-- Fix at first use what a credit is worth; answers what it is fixed at.
CREATE FUNCTION freeze_nanos_per_credit(p_nanos bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    INSERT INTO meta VALUES ('nanos_per_credit', p_nanos::text) ON CONFLICT DO NOTHING;
    RETURN (SELECT m.value::bigint FROM meta AS m WHERE m.name = 'nanos_per_credit');
END $$;

-- ---------------------------------------------------------------------------------------------
-- Views
-- ---------------------------------------------------------------------------------------------

-- Every request: those that ended, and those that are pending.
CREATE VIEW usage_history AS
SELECT
    u.account_id, u.request_id, u.key_id, u.created_at, u.settled_at, u.endpoint, u.model,
    u.model_answered, u.tier, u.streamed, u.byok, u.status, u.input_tokens,
    u.cached_input_tokens, u.cache_creation_tokens, u.cache_creation_1h_tokens, u.output_tokens,
    u.reasoning_tokens, u.audio_input_tokens, u.audio_output_tokens, u.image_input_tokens,
    u.image_output_tokens, u.images, u.cost_picos, u.cost_source, u.price, u.rounding_attos,
    u.rule, u.markup_ppm, u.price_version, u.hold, u.overdraft, u.review_reason, u.resolved_at,
    u.error_code, u.upstream_status, u.client_gone, u.first_byte_ms, u.duration_ms
FROM usage AS u
UNION ALL
SELECT
    h.account_id, h.request_id, h.key_id, h.created_at, NULL, h.endpoint, h.model, NULL, h.tier,
    h.streamed, h.byok, 'pending', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, h.price_version, h.amount, 0::bigint, NULL, NULL, NULL,
    NULL, false, NULL, NULL
FROM open_holds AS h;

CREATE VIEW balances_in_credits AS
SELECT
    b.account_id,
    b.posted / m.value::numeric AS posted,
    b.reserved / m.value::numeric AS held,
    (b.posted - b.reserved + b.credit_limit) / m.value::numeric AS available,
    b.overdraft / m.value::numeric AS overdraft
FROM balances AS b, meta AS m WHERE m.name = 'nanos_per_credit';

CREATE VIEW entries_in_credits AS
SELECT
    e.account_id, e.seq, e.at, e.kind, e.request_id,
    e.posted_delta / m.value::numeric AS posted_delta,
    e.reserved_delta / m.value::numeric AS reserved_delta,
    e.posted_after / m.value::numeric AS posted_after,
    e.reserved_after / m.value::numeric AS reserved_after,
    e.reason, e.reference
FROM entries AS e, meta AS m WHERE m.name = 'nanos_per_credit';

CREATE VIEW usage_in_credits AS
SELECT
    u.account_id, u.request_id, u.created_at, u.endpoint, u.model, u.status,
    u.price / m.value::numeric AS price,
    u.cost_picos / (m.value::numeric * 1000) AS cost,
    u.cost_source, u.price_version
FROM usage AS u, meta AS m WHERE m.name = 'nanos_per_credit';

-- The books as an accountant keeps them, in nano-USD. Each transaction's debits equal its credits.
-- A prepaid balance is owed to the customer until it is used; the provider is owed what each
-- request cost, whether or not the customer paid for it. BYOK requests are the customer's own bill.
CREATE VIEW double_entry AS
SELECT
    e.account_id, e.request_id AS transaction_id, e.at, l.book, l.debit::numeric, l.credit::numeric
FROM entries AS e
CROSS JOIN LATERAL (
    VALUES
    (
        CASE
            WHEN e.kind = 'deposit' THEN 'cash'
            WHEN e.kind IN ('capture', 'late_capture') THEN 'revenue'
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

-- ---------------------------------------------------------------------------------------------
-- Rights: the service reads everything and writes through the functions alone
-- ---------------------------------------------------------------------------------------------

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallygate FROM PUBLIC;
GRANT USAGE ON SCHEMA tallygate TO tallygate_app;
GRANT SELECT ON ALL TABLES IN SCHEMA tallygate TO tallygate_app;
GRANT EXECUTE ON FUNCTION
authorize_batch, settle_batch, extend_holds, expire_holds, fund, create_account, create_key,
revoke_key, publish_price_book, freeze_nanos_per_credit, ensure_partitions, uuid_floor,
period_start
TO tallygate_app;

RESET ROLE;
