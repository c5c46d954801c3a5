-- From version 5 to 6: price books that are drafted, published for a time and cancelled before it.
--
-- What each of these is for stands in schema.sql, whose definitions these are. Proxies of the version
-- before follow the versions that begin at once as they did; a cancelled one they would not know.

SET LOCAL ROLE tallygate_owner;
SET LOCAL search_path = tallygate;
SET LOCAL lock_timeout = '3s';

DROP FUNCTION publish_price_book(jsonb, bigint, uuid, text);

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
-- Rights
-- ---------------------------------------------------------------------------------------------

REVOKE ALL ON FUNCTION
price_book_at, publish_price_book, publish_configured_price_book, revalue_price_books,
cancel_price_book, create_price_book_draft, change_price_book_draft, delete_price_book_draft,
publish_price_book_draft
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
price_book_at, publish_price_book, publish_configured_price_book, revalue_price_books,
cancel_price_book, create_price_book_draft, change_price_book_draft, delete_price_book_draft,
publish_price_book_draft
TO tallygate_app;
GRANT SELECT ON price_book_cancellations, price_book_drafts TO tallygate_app;
