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
INSERT INTO meta VALUES ('schema_version', '11');

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
    replay_retries boolean NOT NULL DEFAULT true,
    -- What of its tier does not hold for this account: the members of a tier in config.yaml.
    overrides jsonb NOT NULL DEFAULT '{}',
    -- An event tells the operator when less is left: see watch_page. NULL for no such event.
    low_balance_threshold bigint CHECK (low_balance_threshold > 0),
    erased_at timestamptz
);

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
    -- What it is good for: see proxy/principals.py.
    role text NOT NULL DEFAULT 'inference' CHECK (role IN ('inference', 'read-only', 'manage')),
    project_id uuid,
    allowed_endpoints text[],
    allowed_networks cidr[],
    -- The key that is to be used in its place.
    replaced_by uuid,
    PRIMARY KEY (account_id, key_id)
);
CREATE INDEX virtual_keys_by_hash ON virtual_keys (key_hash);

-- What a scope of limits has used in the running minute and budget period: a key, a project, or an
-- account as a whole, each by its id. A row exists for every one of them; it is touched only where
-- there is a limit, and only under the lock of the balance row.
CREATE TABLE scope_counters (
    account_id uuid NOT NULL,
    scope_id uuid NOT NULL,
    minute timestamptz NOT NULL DEFAULT 'epoch',
    requests integer NOT NULL DEFAULT 0,
    tokens bigint NOT NULL DEFAULT 0,
    holds integer NOT NULL DEFAULT 0 CHECK (holds >= 0),
    reserved bigint NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    period timestamptz NOT NULL DEFAULT 'epoch',
    spent bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (account_id, scope_id)
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
    -- The minute whose counters this hold is in; NULL where nothing limited it.
    minute timestamptz,
    expires_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    endpoint text NOT NULL,
    model text NOT NULL,
    tier text NOT NULL,
    streamed boolean NOT NULL,
    byok boolean NOT NULL,
    price_version integer NOT NULL,
    project_id uuid,
    -- Whose counters it is in; NULL where nothing limited it.
    scopes uuid[],
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
            WHEN 'credit_expiry' THEN
                phase = 1 AND amount < 0 AND posted_delta = amount AND reserved_delta = 0
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
    -- The project of its key at that time.
    project_id uuid,
    -- How many of a metered action, which `model` names.
    quantity bigint CHECK (quantity > 0),
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
    -- What it gives back or takes back: the request of a refund, the entry of a reversal.
    subject_id uuid,
    PRIMARY KEY (account_id, source, external_id)
);
CREATE INDEX funding_by_subject ON funding (account_id, subject_id) WHERE subject_id IS NOT NULL;

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

-- One step of the walk: a request is admitted if it fits into what those before it have left, so
-- that one too large does not refuse the ones behind it. NULL for a limit means there is none.
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
    service_tier text, rated_picos bigint, answer_id text, quantity bigint
);

-- Count what was charged without a hold in the budgets that it belongs to, under the lock of the
-- balance. Where p_settled_at is given, in those alone whose running period it lies in.
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

-- Expire holds whose proxy died: the customer is not charged, and the usage row asks for review.
-- A charge's hold that nobody captured in its time is void, and there is nothing to review: nobody
-- was told that it was captured. One sweeper works at a time; the others find the lock taken and
-- leave. Says how many requests expired.
CREATE FUNCTION expire_holds(p_limit integer, p_grace_s integer) RETURNS integer
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
    INSERT INTO scope_counters (account_id, scope_id) VALUES (p_account_id, p_account_id);
    INSERT INTO audit_trail VALUES (
        p_account_id, p_account_id, clock_timestamp(), p_actor, 'account.create',
        jsonb_build_object('name', p_name, 'tier', p_tier, 'credit_limit', p_credit_limit)
    );
    RETURN true;
END $$;

-- p_key is {key_id, name, prefix, role, project_id, expires_at, allowed_models, allowed_endpoints,
-- allowed_networks, requests_per_minute, tokens_per_minute, max_concurrency, budget, budget_period}.
-- False if there is no such open account, or no such project of it that is active.
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
--   refunded         more was refunded than it is to cost: reverse a refund first
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
        (p_usage).queries,
        -- Nothing at all for what is no action: seals of before it know no quantity.
        '|' || (p_usage).quantity
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

-- Write down what an audit found, and tell receivers of webhooks where that was anything.
CREATE FUNCTION record_audit(
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
--   not_rolled_up   summaries still need its rows of usage
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
    IF (SELECT s.rolled_until FROM usage_rollup_state AS s) < p_month + interval '1 month' THEN
        RETURN 'not_rolled_up';
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

-- ---------------------------------------------------------------------------------------------
-- Price books: drafted, published for a time, cancelled before it
-- ---------------------------------------------------------------------------------------------

-- To publish is to say: from this time on these prices, whatever was said of that time before. So
-- of the versions whose time has come the one that was published last is in force, and one that
-- was to begin later than a version published after it never does: it is overtaken.

-- Versions that were called off before their time.
CREATE TABLE price_book_cancellations (
    version integer PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor text NOT NULL
);
CREATE TRIGGER price_book_cancellations_append_only
BEFORE UPDATE OR DELETE ON price_book_cancellations
FOR EACH ROW EXECUTE FUNCTION refuse_change();

CREATE TABLE price_book_drafts (
    draft_id uuid PRIMARY KEY,
    name text NOT NULL CHECK (length(name) BETWEEN 1 AND 200),
    document jsonb NOT NULL,
    -- The version that was in force when it was begun; NULL where there was none.
    based_on integer,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_by text NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- What it was published as, once; it is not changed after that.
    published_version integer
);

-- The version in force at a time, by what was said so far; NULL before the first.
CREATE FUNCTION price_book_at(p_at timestamptz) RETURNS integer LANGUAGE sql STABLE
RETURN (
    SELECT p.version FROM price_books AS p
    WHERE p.valid_from <= $1
        AND NOT EXISTS (SELECT 1 FROM price_book_cancellations AS c WHERE c.version = p.version)
    ORDER BY p.version DESC LIMIT 1
);

-- Publish a price book as a new version that is valid from a time on: now, where that is NULL or
-- past. Outcomes:
--
--   published   as `version`; `overtaken` are versions that now never come into force
--   unchanged   `version` says the same for that time already, and nothing was published after it
--   stale       `version` would be in force then, and not p_based_on; nothing was done
--
-- p_based_on NULL is not compared. p_detail goes to the audit trail.
CREATE FUNCTION publish_price_book(
    p_document jsonb, p_nanos_per_credit bigint, p_event_id uuid, p_actor text,
    p_valid_from timestamptz DEFAULT NULL, p_based_on integer DEFAULT NULL,
    p_detail jsonb DEFAULT '{}'
) RETURNS TABLE (outcome text, version integer, overtaken integer[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_now timestamptz;
    v_from timestamptz;
    v_before price_books;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.publish_price_book'));
    v_now := clock_timestamp();
    v_from := greatest(v_now, p_valid_from);
    SELECT p.* INTO v_before FROM price_books AS p WHERE p.version = price_book_at(v_from);
    version := v_before.version;
    overtaken := '{}';
    IF v_before.document = p_document AND v_before.nanos_per_credit = p_nanos_per_credit
        -- Nothing was published after it, for whatever time.
        AND v_before.version = price_book_at('infinity')
        -- What the configuration says is written down even so: see publish_configured_price_book.
        AND (v_before.published_by = 'config' OR p_actor <> 'config')
    THEN
        outcome := 'unchanged';
        RETURN NEXT;
        RETURN;
    END IF;
    IF v_before.version <> p_based_on THEN
        outcome := 'stale';
        RETURN NEXT;
        RETURN;
    END IF;
    outcome := 'published';
    overtaken := ARRAY(
        SELECT p.version FROM price_books AS p
        WHERE p.valid_from > v_now AND p.valid_from >= v_from
            AND price_book_at(p.valid_from) = p.version
        ORDER BY p.version
    );
    version := coalesce((SELECT max(p.version) FROM price_books AS p), 0) + 1;
    INSERT INTO price_books VALUES (
        publish_price_book.version, v_from, p_document, p_nanos_per_credit, p_actor
    );
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, v_now, p_actor,
        'price_book.publish', p_detail || jsonb_build_object(
            'version', publish_price_book.version, 'valid_from', v_from, 'overtaken', overtaken
        )
    );
    RETURN NEXT;
END $$;

-- Publish what the configuration says, unless that is what it said last: what operators have
-- published since stands until the configuration says something else. Outcomes are those of
-- publish_price_book, and `kept`, with the version in force.
CREATE FUNCTION publish_configured_price_book(
    p_document jsonb, p_nanos_per_credit bigint, p_event_id uuid
) RETURNS TABLE (outcome text, version integer, overtaken integer[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.publish_price_book'));
    IF p_document = (
        SELECT p.document FROM price_books AS p
        WHERE p.published_by = 'config' ORDER BY p.version DESC LIMIT 1
    ) THEN
        outcome := 'kept';
        version := price_book_at(clock_timestamp());
        overtaken := '{}';
        RETURN NEXT;
    ELSE
        RETURN QUERY SELECT b.outcome, b.version, b.overtaken
        FROM publish_price_book(p_document, p_nanos_per_credit, p_event_id, 'config') AS b;
    END IF;
END $$;

-- Publish what is in force or scheduled once more, each for its time, where a credit is worth
-- something else in it than p_nanos_per_credit. Answers how many versions that made.
CREATE FUNCTION revalue_price_books(p_nanos_per_credit bigint, p_event_id uuid) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_now timestamptz;
    v_valid integer[];
    v_newest integer;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.publish_price_book'));
    v_now := clock_timestamp();
    v_valid := ARRAY(
        SELECT p.version FROM price_books AS p
        WHERE p.version = price_book_at(greatest(p.valid_from, v_now))
    );
    IF NOT EXISTS (
        SELECT 1 FROM price_books AS p
        WHERE p.version = ANY(v_valid) AND p.nanos_per_credit <> p_nanos_per_credit
    ) THEN
        RETURN 0;
    END IF;
    SELECT max(p.version) INTO v_newest FROM price_books AS p;
    -- All of them, in their order: a new one would overtake those that are left as they are.
    INSERT INTO price_books
    SELECT
        v_newest + row_number() OVER (ORDER BY p.version), greatest(p.valid_from, v_now),
        p.document, p_nanos_per_credit, p.published_by
    FROM price_books AS p WHERE p.version = ANY(v_valid);
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, v_now, 'config',
        'price_book.revalue', jsonb_build_object(
            'versions', v_valid, 'first_version', v_newest + 1,
            'nanos_per_credit', p_nanos_per_credit
        )
    );
    RETURN cardinality(v_valid);
END $$;

-- Call a version off before its time; whatever was said of that time before it, holds again.
-- Answers `cancelled`, `exists` if it was cancelled before, `begun` if its time has come or is
-- about to (a replica may charge by it in this moment), `unknown`.
CREATE FUNCTION cancel_price_book(p_version integer, p_event_id uuid, p_actor text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_now timestamptz;
    v_from timestamptz;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tallygate.publish_price_book'));
    v_now := clock_timestamp();
    SELECT p.valid_from INTO v_from FROM price_books AS p WHERE p.version = p_version;
    IF NOT FOUND THEN
        RETURN 'unknown';
    ELSIF EXISTS (SELECT 1 FROM price_book_cancellations AS c WHERE c.version = p_version) THEN
        RETURN 'exists';
    ELSIF v_from < v_now + interval '5 seconds' THEN
        RETURN 'begun';
    END IF;
    INSERT INTO price_book_cancellations VALUES (p_version, v_now, p_actor);
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, v_now, p_actor,
        'price_book.cancel', jsonb_build_object('version', p_version, 'valid_from', v_from)
    );
    RETURN 'cancelled';
END $$;

CREATE FUNCTION create_price_book_draft(
    p_draft_id uuid, p_name text, p_document jsonb, p_event_id uuid, p_actor text
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    INSERT INTO price_book_drafts (draft_id, name, document, based_on, created_by)
    VALUES (p_draft_id, p_name, p_document, price_book_at(clock_timestamp()), p_actor);
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'price_book_draft.create', jsonb_build_object('draft_id', p_draft_id, 'name', p_name)
    );
END $$;

-- Give a draft another name and document. Answers `changed`, `published` (it stays as it was
-- published), `unknown`.
CREATE FUNCTION change_price_book_draft(
    p_draft_id uuid, p_name text, p_document jsonb, p_event_id uuid, p_actor text
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
BEGIN
    UPDATE price_book_drafts AS d
    SET name = p_name, document = p_document, updated_at = clock_timestamp()
    WHERE d.draft_id = p_draft_id AND d.published_version IS NULL;
    IF NOT FOUND THEN
        RETURN CASE
            WHEN EXISTS (SELECT 1 FROM price_book_drafts AS d WHERE d.draft_id = p_draft_id)
            THEN 'published' ELSE 'unknown'
        END;
    END IF;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'price_book_draft.change', jsonb_build_object('draft_id', p_draft_id, 'name', p_name)
    );
    RETURN 'changed';
END $$;

-- Throw a draft away; what it was published as stays. Says whether there was one.
CREATE FUNCTION delete_price_book_draft(p_draft_id uuid, p_event_id uuid, p_actor text)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_name text;
BEGIN
    DELETE FROM price_book_drafts AS d WHERE d.draft_id = p_draft_id RETURNING d.name INTO v_name;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO audit_trail VALUES (
        '00000000-0000-0000-0000-000000000000', p_event_id, clock_timestamp(), p_actor,
        'price_book_draft.delete', jsonb_build_object('draft_id', p_draft_id, 'name', v_name)
    );
    RETURN true;
END $$;

-- Publish a draft, once. Outcomes are those of publish_price_book, `exists` with the version that
-- it was published as before, and `unknown`. p_based_on NULL is the draft's own.
CREATE FUNCTION publish_price_book_draft(
    p_draft_id uuid, p_nanos_per_credit bigint, p_event_id uuid, p_actor text,
    p_valid_from timestamptz, p_based_on integer
) RETURNS TABLE (outcome text, version integer, overtaken integer[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = tallygate, pg_temp AS $$
DECLARE
    v_draft price_book_drafts;
BEGIN
    overtaken := '{}';
    SELECT d.* INTO v_draft FROM price_book_drafts AS d WHERE d.draft_id = p_draft_id FOR UPDATE;
    IF NOT FOUND OR v_draft.published_version IS NOT NULL THEN
        outcome := CASE WHEN v_draft.draft_id IS NULL THEN 'unknown' ELSE 'exists' END;
        version := v_draft.published_version;
        RETURN NEXT;
        RETURN;
    END IF;
    SELECT b.outcome, b.version, b.overtaken
    INTO publish_price_book_draft.outcome, publish_price_book_draft.version,
        publish_price_book_draft.overtaken
    FROM publish_price_book(
        v_draft.document, p_nanos_per_credit, p_event_id, p_actor, p_valid_from,
        coalesce(p_based_on, v_draft.based_on), jsonb_build_object('draft_id', p_draft_id)
    ) AS b;
    IF outcome <> 'stale' THEN
        UPDATE price_book_drafts AS d SET published_version = publish_price_book_draft.version
        WHERE d.draft_id = p_draft_id;
    END IF;
    RETURN NEXT;
END $$;

-- ---------------------------------------------------------------------------------------------
-- Webhooks
-- ---------------------------------------------------------------------------------------------

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

-- ---------------------------------------------------------------------------------------------
-- Erasure
-- ---------------------------------------------------------------------------------------------

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

-- ---------------------------------------------------------------------------------------------
-- Tiers: expiring credits, those of each month, and the terms of an account
-- ---------------------------------------------------------------------------------------------

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

-- ---------------------------------------------------------------------------------------------
-- Usage by the hour
-- ---------------------------------------------------------------------------------------------

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
INSERT INTO usage_rollup_state (frozen_until, rolled_until)
VALUES ('epoch', date_trunc('hour', now(), 'UTC') - interval '2 hours');

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
-- Keys and projects
-- ---------------------------------------------------------------------------------------------

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

-- ---------------------------------------------------------------------------------------------
-- Operators: their keys, the standing of accounts, models that are off
-- ---------------------------------------------------------------------------------------------

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
revoke_key, publish_price_book, publish_configured_price_book,
revalue_price_books, price_book_at, cancel_price_book, create_price_book_draft,
change_price_book_draft, delete_price_book_draft, publish_price_book_draft,
freeze_nanos_per_credit, ensure_partitions, uuid_floor,
period_start, note_witness, set_account_options, idempotency_begin, idempotency_finish,
idempotency_release, purge_idempotency_keys, resolve_review, record_reconciliation,
entry_leaf, seal_content, seal_root, seal_page, close_seal, record_audit, retention_obstacle,
detach_month,
update_key, rotate_key, note_key_uses, create_project, update_project, archive_project,
watch_page, claim_webhooks, finish_webhook, create_webhook, change_webhook, rotate_webhook_secret,
delete_webhook, test_webhook, replay_webhooks, purge_webhook_events, erase_account,
expiring_credits_left, fund_expiring, expire_credits, grant_month, grant_monthly_credits,
open_account, set_account_tier, set_account_overrides,
usage_hour, roll_up_usage, refresh_rollups, entry_before, set_low_balance,
begin_charge, forget_charge, end_charge, recurring_period, create_recurring_charge,
change_recurring_charge, claim_recurring_charges, finish_recurring_charge, refunded, refund,
reverse_funding, set_credit_limit, credit_limit_at,
create_admin_key, revoke_admin_key, use_admin_key, set_account_status, rename_account,
switch_models_off, switch_models_on, name_trigrams
TO tallygate_app;

RESET ROLE;
