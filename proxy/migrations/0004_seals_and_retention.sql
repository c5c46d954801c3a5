-- From version 3 to 4: seals, runs of the audit, and months that are detached with their totals
-- carried over.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Everything is new but
-- a view, how five functions are planned and how months are made, so proxies of version 3 go on
-- working, and nobody is held up.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

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

CREATE TRIGGER seals_append_only BEFORE UPDATE OR DELETE ON seals
FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER seal_points_append_only BEFORE UPDATE OR DELETE ON seal_points
FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER detached_months_append_only BEFORE UPDATE OR DELETE ON detached_months
FOR EACH ROW EXECUTE FUNCTION refuse_change();

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

CREATE OR REPLACE VIEW double_entry AS
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

-- Found by key at every size: a session may have made its plans while a few accounts fitted on a page.
ALTER FUNCTION fund(uuid, uuid, text, bigint, text, text, text, text) SET enable_seqscan = off;
ALTER FUNCTION create_key(uuid, bytea, jsonb, text) SET enable_seqscan = off;
ALTER FUNCTION revoke_key(uuid, uuid, uuid, text) SET enable_seqscan = off;
ALTER FUNCTION set_account_options(uuid, boolean, uuid, text) SET enable_seqscan = off;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallygate FROM PUBLIC;
GRANT SELECT ON
audit_runs, seals, seal_points, detached_months, carried_totals, carried_floors, carried_seams
TO tallygate_app;
GRANT EXECUTE ON FUNCTION
entry_leaf, seal_content, seal_root, seal_page, close_seal, record_audit, retention_obstacle,
detach_month
TO tallygate_app;

RESET ROLE;

-- Make the partitions of the month of p_from and p_months more; says how many it made.
--
-- Their planner takes every account for a tenth of the month. By the average, an account has so few
-- entries that reading them all by entries_by_seq costs no more than one by its key: right for most
-- accounts, and ruin for the one that has millions.
CREATE OR REPLACE FUNCTION ensure_partitions(p_from timestamptz, p_months integer) RETURNS integer
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

-- It counts from each month's next ANALYZE on.
DO $$
DECLARE
    v_name regclass;
BEGIN
    FOR v_name IN SELECT i.inhrelid FROM pg_inherits AS i WHERE i.inhparent = 'entries'::regclass LOOP
        EXECUTE format('ALTER TABLE %s ALTER COLUMN account_id SET (n_distinct = 10)', v_name);
    END LOOP;
END $$;
