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
INSERT INTO meta VALUES ('schema_version', '4');

CREATE TABLE price_books (
    version integer PRIMARY KEY CHECK (version > 0),
    valid_from timestamptz NOT NULL DEFAULT clock_timestamp(),
    document jsonb NOT NULL,
    nanos_per_credit bigint NOT NULL CHECK (nanos_per_credit > 0),
    published_by text NOT NULL
);

-- What comparing a provider's account of a period with ours has shown; the books stay as they are.
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
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Whether an SDK's own retry of a charged request gets the same answer again, uncharged.
    replay_retries boolean NOT NULL DEFAULT true
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
-- known only after its hold had ended is a third (phase 2), an operator's correction of a price a
-- fourth (phase 3). Money that is no request's comes under an id of its own (phase 1). The key holds over all partitions, because request ids are
-- uuidv7 and the partitions are cut along them.
CREATE TABLE entries (
    account_id uuid NOT NULL,
    request_id uuid NOT NULL,
    phase smallint NOT NULL CHECK (phase IN (0, 1, 2, 3)),
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
    input_characters bigint,
    audio_ms bigint,
    queries bigint,
    service_tier text,
    -- What our own rating of the usage says that it cost: to be compared with cost_picos.
    rated_picos bigint CHECK (rated_picos >= 0),
    -- The provider's id of the answer, such as chatcmpl-…, resp_… or msg_….
    answer_id text,
    -- How often LiteLLM asked a provider, and what it says that cost: what the witness reports.
    attempts integer,
    witness_picos bigint CHECK (witness_picos >= 0),
    -- What an operator decided at resolved_at. A price set by hand has the rule 'review'.
    resolution text CHECK (resolution IN ('charge', 'waive', 'reprice')),
    PRIMARY KEY (account_id, request_id),
    -- An unknown cost is a state of its own and never a price of zero.
    CONSTRAINT usage_billed_has_price CHECK ((status IN ('billed', 'byok')) = (price IS NOT NULL)),
    CONSTRAINT usage_review_has_reason CHECK (
        status <> 'needs_review' OR review_reason IS NOT NULL
    ),
    CONSTRAINT usage_resolution_has_time CHECK (resolution IS NULL OR resolved_at IS NOT NULL)
) PARTITION BY RANGE (request_id);
CREATE INDEX usage_open_reviews ON usage (account_id, request_id)
WHERE review_reason IS NOT NULL AND resolved_at IS NULL;
-- Whose a stored response is: it may be read and deleted by that account alone.
CREATE INDEX usage_by_answer ON usage (account_id, answer_id) WHERE endpoint = 'responses';

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

-- Requests that came with an Idempotency-Key, by its SHA-256, and their answers for as long as a
-- repetition is answered by them. An answer that was too large is NULL: the request was charged,
-- and is not carried out again.
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

-- What each audit found, for metrics, and how far the ledger is known to be clean: an incremental
-- audit begins at the newest seal that a clean one vouches for.
CREATE TABLE audit_runs (
    run_id uuid PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    scope text NOT NULL CHECK (scope IN ('full', 'incremental', 'sealed')),
    -- The newest seal when it began; 0 where there was none.
    through_seal integer NOT NULL CHECK (through_seal >= 0),
    findings bigint NOT NULL CHECK (findings >= 0),
    entries bigint NOT NULL CHECK (entries >= 0),
    duration_ms integer NOT NULL CHECK (duration_ms >= 0)
);
CREATE INDEX audit_runs_clean ON audit_runs (run_id) INCLUDE (at, through_seal)
WHERE findings = 0;

-- A hash of everything that was written since the seal before, chained to that one's. It covers
-- each account's entries by their numbers, not by a clock: what comes late has a later number.
CREATE TABLE seals (
    number integer PRIMARY KEY CHECK (number > 0),
    sealed_at timestamptz NOT NULL,
    accounts bigint NOT NULL CHECK (accounts >= 0),
    entries bigint NOT NULL CHECK (entries >= 0),
    -- The root of the seal before; empty for the first.
    previous bytea NOT NULL CHECK (length(previous) IN (0, 32)),
    root bytea NOT NULL CHECK (length(root) = 32)
);

-- What a seal says of an account: entries first_seq to last_seq hash to `digest`, and leave the
-- account with this balance. `marks` has the first bytes of each entry's own hash, which name the
-- entry that was changed.
CREATE TABLE seal_points (
    account_id uuid NOT NULL,
    last_seq bigint NOT NULL,
    first_seq bigint NOT NULL CHECK (first_seq > 0),
    number integer NOT NULL,
    posted_after bigint NOT NULL,
    reserved_after bigint NOT NULL,
    digest bytea NOT NULL CHECK (length(digest) = 32),
    marks bytea NOT NULL,
    PRIMARY KEY (account_id, last_seq),
    CONSTRAINT seal_points_mark_each_entry CHECK (length(marks) = 4 * (last_seq - first_seq + 1))
);
CREATE INDEX seal_points_by_seal ON seal_points (number);

-- Months that were detached: their tables are archives, and their totals are carried over below.
CREATE TABLE detached_months (
    month date PRIMARY KEY CHECK (extract(DAY FROM month) = 1),
    detached_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL,
    entries bigint NOT NULL,
    usage_rows bigint NOT NULL,
    posted numeric NOT NULL,
    price numeric NOT NULL,
    cost_picos numeric NOT NULL
);

-- What the entries of detached months add up to, by account and kind. Provider cost, which has no
-- entry, stands under the kind 'provider_cost'.
CREATE TABLE carried_totals (
    account_id uuid NOT NULL,
    kind text NOT NULL,
    entries bigint NOT NULL,
    posted numeric NOT NULL,
    reserved numeric NOT NULL,
    cost_picos numeric NOT NULL DEFAULT 0,
    PRIMARY KEY (account_id, kind)
);

-- Where an account's journal begins: the entries that are kept follow the one of this number.
CREATE TABLE carried_floors (
    account_id uuid PRIMARY KEY,
    seq bigint NOT NULL,
    posted_after bigint NOT NULL,
    reserved_after bigint NOT NULL
);

-- Detached entries above the floor: requests of a month may end in the next one. They fill the gaps
-- in the numbers of what is kept.
CREATE TABLE carried_seams (
    account_id uuid NOT NULL,
    seq bigint NOT NULL,
    posted_delta bigint NOT NULL,
    reserved_delta bigint NOT NULL,
    posted_after bigint NOT NULL,
    reserved_after bigint NOT NULL,
    PRIMARY KEY (account_id, seq)
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
CREATE TRIGGER seals_append_only BEFORE UPDATE OR DELETE ON seals
FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER seal_points_append_only BEFORE UPDATE OR DELETE ON seal_points
FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER detached_months_append_only BEFORE UPDATE OR DELETE ON detached_months
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
--
-- Their planner takes every account for a tenth of the month. By the average, an account has so few
-- entries that reading them all by entries_by_seq costs no more than one by its key: right for most
-- accounts, and ruin for the one that has millions.
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
            IF v_parent = 'entries' THEN
                EXECUTE format(
                    'ALTER TABLE %I ALTER COLUMN account_id SET (n_distinct = 10)', v_name
                );
            END IF;
            v_made := v_made + 1;
        END LOOP;
    END LOOP;
    RETURN v_made;
END $$;

-- A proxy with a wrong clock must not make a settlement fail: what fits no month lands here, and
-- `tallygate doctor` says so.
CREATE TABLE entries_default PARTITION OF entries DEFAULT;
CREATE TABLE usage_default PARTITION OF usage DEFAULT;
ALTER TABLE entries_default ALTER COLUMN account_id SET (n_distinct = 10);
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

-- Give live requests more time. Harmless for a hold that has ended. It waits for nobody, because
-- its locks are not sorted: a hold that somebody has locked is left out, and where that was another
-- heartbeat or a settlement that failed, the next heartbeat comes long before the hold is overdue.
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
    duration_ms integer, input_characters bigint, audio_ms bigint, queries bigint,
    service_tier text, rated_picos bigint, answer_id text
);

-- End a batch of holds: capture what each request costs the customer, void, or expire it.
--
-- p_batch is a JSON array of settlements, action being capture, void or expire. Idempotent, and it
-- never refuses a capture that exceeds its hold: what goes beyond is taken from what is available,
-- and beyond that booked as overdraft. Answers a row for each:
--
--   captured, voided, expired   done now
--   captured_late, amended      the hold had expired before; the usage row is put right, and a
--                               capture is posted as an entry of its own. captured_late also where
--                               the request waits for review and the cost comes from the witness
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

-- The rest of settle_batch, under its locks: settlements that found no open hold. Most repeat what
-- is done. One whose hold the sweeper gave up on brings the truth late: it replaces the guess,
-- unless an operator has decided meanwhile. So does the witness's word on a request that ended
-- uncharged because nobody knew its cost.
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

-- Write down what the witness inside LiteLLM saw of requests that have ended; never price or status.
--
-- p_batch is a JSON array of {account_id, request_id, cost_picos, attempts, mismatch}. What is null
-- stays as it is; `mismatch` asks for a review, unless the request has had a reason for one or an
-- operator has decided. Of two notes of one request the later counts. Answers a row for each, in order: noted, or unknown where
-- no request of that name has ended.
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

-- ---------------------------------------------------------------------------------------------
-- Idempotency keys
-- ---------------------------------------------------------------------------------------------

-- Claim a client's idempotency key for a request. Of any number at once, one is told `new`.
--
--   new         carry the request out: the key was not known, its time is over, or the request
--               that had it ended without a charge and never said so. The same request is told so
--               again, after a lost answer
--   replay      it was carried out: here is its answer
--   lost        it was charged, and its answer is not kept
--   in_flight   it is being carried out
--   conflict    the key came with another body before
--
-- request_id is that of the request which holds the key.
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

-- The request was charged: keep its answer, unless it is too large (all of it NULL) or the account
-- keeps too much already. Finishes that run at once may exceed that limit by their own bodies.
-- Answers whether it is kept; NULL where the request does not have the key any more.
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

-- The request was not charged: whoever comes with the key next is the first.
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

-- Forget keys whose time is over, and their answers; says how many.
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
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
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

-- Like `fund`, these find their rows by key at every size: a session may have made its plans while
-- a few accounts fitted on a page.

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
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
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
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
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

-- Change how an account is served; a NULL leaves its option as it is. Takes effect on the next
-- authorization of every replica. False if there is no such account.
CREATE FUNCTION set_account_options(
    p_account_id uuid, p_replay_retries boolean, p_event_id uuid, p_actor text
) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off AS $$
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
--   unknown          no such request has ended
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

-- Keep the result of a reconciliation.
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

-- ---------------------------------------------------------------------------------------------
-- Seals
-- ---------------------------------------------------------------------------------------------

-- The hash of an entry and, where it is a charge, of what was charged for. A later reprice may
-- replace the cost, so the one that was sealed is given.
--
-- Between bars: numbers as they are, NULL as nothing, and texts behind their length, so that no two
-- rows have the same. What only describes the making of the price (rule, markup, rounding) is not
-- in it: the audit makes it anew from what is.
CREATE FUNCTION entry_leaf(p_entry entries, p_usage usage, p_cost_picos bigint) RETURNS bytea
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
        (p_usage).queries
    ),
    'UTF8'
));

-- The hash of what a seal says of all accounts.
CREATE FUNCTION seal_content(p_number integer) RETURNS bytea LANGUAGE sql STABLE
RETURN (
    SELECT sha256(coalesce(
        string_agg(
            sha256(convert_to(
                concat(
                    p.account_id, '|', p.first_seq, '|', p.last_seq, '|', p.posted_after, '|',
                    p.reserved_after, '|', encode(p.digest, 'hex')
                ),
                'UTF8'
            )),
            ''::bytea ORDER BY p.account_id, p.last_seq
        ),
        ''::bytea
    ))
    FROM tallygate.seal_points AS p WHERE p.number = $1
);

-- The root of a seal.
CREATE FUNCTION seal_root(
    p_number integer, p_sealed_at timestamptz, p_accounts bigint, p_entries bigint,
    p_previous bytea, p_content bytea
) RETURNS bytea LANGUAGE sql STABLE
RETURN sha256(convert_to(
    concat(
        p_number, '|', (extract(EPOCH FROM p_sealed_at) * 1000000)::bigint, '|', p_accounts, '|',
        p_entries, '|', encode(p_previous, 'hex'), '|', encode(p_content, 'hex')
    ),
    'UTF8'
));

-- Hash the unsealed entries of the accounts behind p_after for the seal of that number: about
-- p_entries at a time, and so in many short transactions. Says behind which account to go on, and
-- whether that was all. NULL where somebody else has closed this seal meanwhile.
--
-- Whatever an account has written has a lower number than what it will write: nothing is missed
-- where one account is sealed a minute after another.
CREATE FUNCTION seal_page(p_number integer, p_after uuid, p_entries bigint)
RETURNS TABLE (next_after uuid, is_last boolean, sealed bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off
SET enable_mergejoin = off SET enable_material = off SET enable_memoize = off SET jit = off
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    v_accounts constant integer := 1000;
    v_scanned integer;
    v_due bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.seal'));
    PERFORM 1 FROM seals AS s WHERE s.number >= p_number;
    IF FOUND THEN
        RETURN;
    END IF;
    WITH scanned AS MATERIALIZED (
        SELECT
            b.account_id,
            b.seq,
            coalesce(p.last_seq, f.seq, 0) + 1 AS first_seq
        FROM (
            SELECT a.account_id, a.seq FROM balances AS a WHERE a.account_id > p_after
            ORDER BY a.account_id LIMIT v_accounts
        ) AS b
        LEFT JOIN LATERAL (
            SELECT s.last_seq FROM seal_points AS s WHERE s.account_id = b.account_id
            ORDER BY s.last_seq DESC LIMIT 1
        ) AS p ON true
        LEFT JOIN carried_floors AS f ON b.account_id = f.account_id
    ),
    due AS MATERIALIZED (
        SELECT
            s.account_id, s.seq, s.first_seq,
            least(s.seq, s.first_seq + p_entries - 1) AS last_seq,
            sum(s.seq - s.first_seq + 1) OVER (ORDER BY s.account_id)
            - (s.seq - s.first_seq + 1) AS before
        FROM scanned AS s
    ),
    taken AS MATERIALIZED (
        SELECT d.* FROM due AS d WHERE d.before < p_entries
    ),
    leaves AS (
        SELECT
            t.account_id, t.first_seq, t.last_seq, e.seq, e.posted_after, e.reserved_after,
            entry_leaf(e, u, u.cost_picos) AS leaf
        FROM taken AS t
        INNER JOIN entries AS e
            ON t.account_id = e.account_id AND e.seq BETWEEN t.first_seq AND t.last_seq
        LEFT JOIN usage AS u
            ON e.kind IN ('capture', 'late_capture', 'correction')
            AND e.account_id = u.account_id AND e.request_id = u.request_id
        WHERE t.first_seq <= t.last_seq
    ),
    points AS (
        INSERT INTO seal_points
        SELECT
            l.account_id, l.last_seq, l.first_seq, p_number,
            max(l.posted_after) FILTER (WHERE l.seq = l.last_seq),
            max(l.reserved_after) FILTER (WHERE l.seq = l.last_seq),
            sha256(string_agg(l.leaf, ''::bytea ORDER BY l.seq)),
            string_agg(substring(l.leaf FOR 4), ''::bytea ORDER BY l.seq)
        FROM leaves AS l
        GROUP BY l.account_id, l.first_seq, l.last_seq
        RETURNING seal_points.first_seq, seal_points.last_seq
    )
    SELECT
        -- One that did not fit whole comes again.
        coalesce(
            (
                SELECT t.account_id FROM taken AS t WHERE t.last_seq = t.seq
                ORDER BY t.account_id DESC LIMIT 1
            ),
            p_after
        ),
        NOT EXISTS (SELECT 1 FROM taken AS t WHERE t.last_seq < t.seq)
        AND (SELECT count(*) FROM taken) = (SELECT count(*) FROM scanned),
        (SELECT count(*) FROM scanned),
        (SELECT coalesce(sum(greatest(0, t.last_seq - t.first_seq + 1)), 0) FROM taken AS t),
        (SELECT coalesce(sum(p.last_seq - p.first_seq + 1), 0) FROM points AS p)
    INTO next_after, is_last, v_scanned, v_due, sealed;
    -- A gap among them fails the check of `marks`.
    IF sealed <> v_due THEN
        RAISE EXCEPTION 'entries are missing behind account %: run tallygate audit', p_after
            USING ERRCODE = 'data_exception';
    END IF;
    is_last := is_last AND v_scanned < v_accounts;
    RETURN NEXT;
END $$;

-- Make what seal_page has hashed a seal. Answers no row where somebody else has closed it, or where
-- it would not be the next one.
CREATE FUNCTION close_seal(p_number integer) RETURNS SETOF seals
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp
SET enable_seqscan = off SET jit = off
AS $$
DECLARE
    v_previous seals;
    v_seal seals;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.seal'));
    SELECT * INTO v_previous FROM seals AS s ORDER BY s.number DESC LIMIT 1;
    IF p_number <> coalesce(v_previous.number, 0) + 1 THEN
        RETURN;
    END IF;
    v_seal.number := p_number;
    v_seal.sealed_at := clock_timestamp();
    v_seal.previous := coalesce(v_previous.root, ''::bytea);
    SELECT count(DISTINCT p.account_id), coalesce(sum(p.last_seq - p.first_seq + 1), 0)
    INTO v_seal.accounts, v_seal.entries
    FROM seal_points AS p WHERE p.number = p_number;
    v_seal.root := seal_root(
        p_number, v_seal.sealed_at, v_seal.accounts, v_seal.entries, v_seal.previous,
        seal_content(p_number)
    );
    INSERT INTO seals SELECT v_seal.*;
    RETURN NEXT v_seal;
END $$;

-- Write down what an audit found.
CREATE FUNCTION record_audit(
    p_run_id uuid, p_scope text, p_through_seal integer, p_findings bigint, p_entries bigint,
    p_duration_ms integer
) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
    INSERT INTO audit_runs (run_id, scope, through_seal, findings, entries, duration_ms)
    VALUES (p_run_id, p_scope, p_through_seal, p_findings, p_entries, p_duration_ms);
$$;

-- ---------------------------------------------------------------------------------------------
-- Retention
-- ---------------------------------------------------------------------------------------------

-- Why a month can't be detached; NULL where it can.
--
--   unknown_month   it has no partition that is attached
--   too_recent      holds, late captures and stored responses of it may still come
--   not_oldest      an older month goes first
--   open_holds      some request of it has not ended
--   open_reviews    some request of it waits for an operator
--   misplaced_rows  the default partitions have rows: they may be of any month
--   unaudited       no audit has looked, or the newest found something
--   unsealed        some of its entries are not sealed
CREATE FUNCTION retention_obstacle(p_month date) RETURNS text
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
    RETURN NULL;
END $$;

-- Detach a month's partitions and carry their totals over, all or nothing. Answers `detached`, why
-- it can't be (see above), or `busy`: somebody uses the tables, or an operator changed a price of
-- that month in this moment. The tables stay as entries_YYYY_MM and usage_YYYY_MM, to be dumped.
--
-- The totals take as long as reading the month does, and hold up nobody: nothing is written to a
-- month that nothing stands against. Only the last step needs the tables alone.
CREATE FUNCTION detach_month(p_month date, p_event_id uuid, p_actor text) RETURNS text
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
WHERE u.cost_picos > 0 AND NOT u.byok
UNION ALL
-- What detached months add up to, under one transaction an account.
SELECT
    c.account_id, '00000000-0000-0000-0000-000000000000'::uuid, NULL::timestamptz, l.book,
    greatest(l.debit, 0), greatest(-l.debit, 0)
FROM carried_totals AS c
CROSS JOIN LATERAL (
    VALUES
    (
        CASE
            WHEN c.kind = 'deposit' THEN 'cash'
            WHEN c.kind IN ('capture', 'late_capture', 'correction') THEN 'revenue'
            WHEN c.kind = 'refund' THEN 'refunds'
            WHEN c.kind = 'provider_cost' THEN 'provider_cost'
            ELSE 'promotions_and_adjustments'
        END,
        CASE WHEN c.kind = 'provider_cost' THEN c.cost_picos / 1000.0 ELSE c.posted END
    ),
    (
        CASE WHEN c.kind = 'provider_cost' THEN 'provider_payable' ELSE 'customer_liability' END,
        CASE WHEN c.kind = 'provider_cost' THEN -c.cost_picos / 1000.0 ELSE -c.posted END
    )
) AS l (book, debit)
WHERE c.posted <> 0 OR c.cost_picos <> 0;

-- ---------------------------------------------------------------------------------------------
-- Rights: the service reads everything and writes through the functions alone
-- ---------------------------------------------------------------------------------------------

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallygate FROM PUBLIC;
GRANT USAGE ON SCHEMA tallygate TO tallygate_app;
GRANT SELECT ON ALL TABLES IN SCHEMA tallygate TO tallygate_app;
GRANT EXECUTE ON FUNCTION
authorize_batch, settle_batch, extend_holds, expire_holds, fund, create_account, create_key,
revoke_key, publish_price_book, freeze_nanos_per_credit, ensure_partitions, uuid_floor,
period_start, note_witness, set_account_options, idempotency_begin, idempotency_finish,
idempotency_release, purge_idempotency_keys, resolve_review, record_reconciliation,
entry_leaf, seal_content, seal_root, seal_page, close_seal, record_audit, retention_obstacle,
detach_month
TO tallygate_app;

RESET ROLE;
