"""The guards, what removes each, and the tests that must fail then.

A patch is the file, a text that stands in it exactly once, and what stands there instead. Where a
guard can't be taken away without anything in its place, what comes is what one would write who did
not know of the danger.
"""

from collections.abc import Sequence
from typing import NamedTuple

SCHEMA = "schema.sql"
AUTHORIZE = "tests/integration/test_authorize.py"
OPERATORS = "tests/integration/test_operators_api.py"
HOLDS = "tests/integration/test_holds_and_time.py"
IDEMPOTENCY = "tests/integration/test_idempotency.py"
WITNESS = "tests/integration/test_witness_sql.py"
SETTLE = "tests/integration/test_settle.py"
MODEL = "tests/property/test_ledger_model.py::test_ledger_does_what_the_model_foretells"
# A test of each of the three functions that move money.
_AFTER = "test_whoever_waited_sees_what_was_committed_meanwhile"


class Patch(NamedTuple):
    """One change of a text."""

    path: str
    old: str
    new: str


class Guard(NamedTuple):
    """Something that holds a promise, and who is to notice when it is gone."""

    name: str
    patches: Sequence[Patch]
    tests: Sequence[str]


_AUTHORIZE_LOCK = """\
    PERFORM 1 FROM balances AS b WHERE b.account_id = ANY(v_accounts)
    ORDER BY b.account_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    v_minute := date_trunc('minute', v_now);

    RETURN QUERY
    WITH asked AS MATERIALIZED ("""
_AUTHORIZE_REST = _AUTHORIZE_LOCK[_AUTHORIZE_LOCK.index("    v_now") :]
_SETTLE_LOCK = """\
    PERFORM 1 FROM balances AS b
    WHERE b.account_id = ANY(
        ARRAY(SELECT r.account_id FROM json_to_recordset(p_batch) AS r(account_id uuid))
    )
    ORDER BY b.account_id FOR NO KEY UPDATE;
    v_now := clock_timestamp();
    v_minute := date_trunc('minute', v_now);

    WITH ended AS ("""
_SETTLE_REST = _SETTLE_LOCK[_SETTLE_LOCK.index("    v_now") :]
# One after the other as they come. (Without ORDER BY alone the index would still sort them.)
_IN_ARRIVAL_ORDER = """\
    DECLARE
        v_account uuid;
    BEGIN
        FOR v_account IN
            SELECT r.account_id FROM json_to_recordset(p_batch) AS r(account_id uuid)
        LOOP
            PERFORM 1 FROM balances AS b WHERE b.account_id = v_account FOR NO KEY UPDATE;
        END LOOP;
    END;
"""

_LOCKS = [
    Guard(
        "authorize_batch locks in sorted order",
        [Patch(SCHEMA, _AUTHORIZE_LOCK, _IN_ARRIVAL_ORDER + _AUTHORIZE_REST)],
        [
            f"{SETTLE}::test_batches_lock_balances_in_one_order[authorize_batch]",
            f"{AUTHORIZE}::test_concurrent_batches_never_hold_more_than_there_is",
        ],
    ),
    Guard(
        "settle_batch locks in sorted order",
        [Patch(SCHEMA, _SETTLE_LOCK, _IN_ARRIVAL_ORDER + _SETTLE_REST)],
        [f"{SETTLE}::test_batches_lock_balances_in_one_order[settle_batch]"],
    ),
    Guard(
        "authorize_batch decides in a snapshot taken after its locks",
        [
            Patch(
                SCHEMA,
                _AUTHORIZE_LOCK,
                _AUTHORIZE_REST.replace(
                    "WITH asked",
                    "WITH locked AS MATERIALIZED (SELECT * FROM balances AS b"
                    " WHERE b.account_id = ANY(v_accounts)"
                    " ORDER BY b.account_id FOR NO KEY UPDATE), asked",
                ),
            ),
            Patch(
                SCHEMA,
                "        LEFT JOIN balances AS b ON a.account_id = b.account_id\n"
                "        LEFT JOIN accounts",
                "        LEFT JOIN locked AS b ON a.account_id = b.account_id\n"
                "        LEFT JOIN accounts",
            ),
        ],
        [f"{SETTLE}::{_AFTER}[authorize_batch]", MODEL],
    ),
    Guard(
        "settle_batch locks before it reads",
        [Patch(SCHEMA, _SETTLE_LOCK, _SETTLE_REST)],
        [f"{SETTLE}::{_AFTER}[settle_batch]", MODEL],
    ),
    Guard(
        "fund locks the balance",
        [
            Patch(
                SCHEMA,
                "    SELECT * INTO v_balance FROM balances AS b\n"
                "    WHERE b.account_id = p_account_id FOR NO KEY UPDATE;\n    IF NOT FOUND",
                "    SELECT * INTO v_balance FROM balances AS b\n"
                "    WHERE b.account_id = p_account_id;\n    IF NOT FOUND",
            )
        ],
        [f"{SETTLE}::{_AFTER}[fund]", MODEL],
    ),
    Guard(
        "late settlements lock usage rows in sorted order",
        [
            Patch(
                SCHEMA,
                "    WHERE r.ord <> ALL(p_done)\n"
                "    ORDER BY u.account_id, u.request_id FOR NO KEY UPDATE OF u;",
                "    WHERE r.ord <> ALL(p_done) FOR NO KEY UPDATE OF u;",
            )
        ],
        [
            f"{WITNESS}::test_notes_and_late_settlements_lock_rows_in_one_order[settle_batch]",
        ],
    ),
    Guard(
        "note_witness locks usage rows in sorted order",
        [
            Patch(
                SCHEMA,
                "        AND u.request_id BETWEEN v_requests[1]"
                " AND v_requests[cardinality(v_requests)]\n"
                "    ORDER BY u.account_id, u.request_id FOR NO KEY UPDATE OF u;",
                "        AND u.request_id BETWEEN v_requests[1]"
                " AND v_requests[cardinality(v_requests)]\n"
                "    ORDER BY u.account_id, u.request_id DESC FOR NO KEY UPDATE OF u;",
            )
        ],
        [
            f"{WITNESS}::test_notes_and_late_settlements_lock_rows_in_one_order[note_witness]",
        ],
    ),
    Guard(
        "extend_holds waits for nobody",
        [Patch(SCHEMA, "        FOR UPDATE OF h SKIP LOCKED\n", "        FOR UPDATE OF h\n")],
        [f"{HOLDS}::test_heartbeat_waits_for_nobody_and_makes_up_for_it_the_next_time"],
    ),
    Guard(
        "one sweeper works at a time",
        [
            Patch(
                SCHEMA,
                "IF NOT pg_try_advisory_xact_lock(hashtext('tallygate.expire_holds')) THEN",
                "IF false THEN",
            )
        ],
        [f"{HOLDS}::test_sweeper_does_not_queue_up_behind_another"],
    ),
    Guard(
        "idempotency_begin locks the key before it decides",
        [
            Patch(
                SCHEMA,
                "AND k.key_hash = p_key_hash FOR NO KEY UPDATE;",
                "AND k.key_hash = p_key_hash;",
            )
        ],
        [f"{IDEMPOTENCY}::test_of_many_that_take_over_at_once_one_is_carried_out"],
    ),
]

_DECISIONS = [
    Guard(
        "a hold that stands is known again (replays)",
        [
            Patch(
                SCHEMA,
                "                WHEN e.amount IS NOT NULL THEN CASE\n"
                "                    WHEN e.amount <> a.amount THEN 'conflict'\n"
                "                    WHEN h.request_id IS NOT NULL THEN 'exists'\n"
                "                    ELSE 'already_settled'\n"
                "                END\n",
                "",
            )
        ],
        [
            f"{AUTHORIZE}::test_replay_answers_exists_and_holds_once",
            f"{AUTHORIZE}::test_replay_after_settlement_does_not_hold_again",
            MODEL,
        ],
    ),
    Guard(
        "a request counts once in a batch",
        [Patch(SCHEMA, "                WHEN a.nth > 1 THEN 'duplicate'\n", "")],
        [f"{AUTHORIZE}::test_duplicate_within_a_batch_holds_once", MODEL],
    ),
    Guard(
        "the greedy sum: what is held before counts",
        [Patch(SCHEMA, "AND p_state.held + p_amount > p_available", "AND p_amount > p_available")],
        [f"{AUTHORIZE}::test_concurrent_batches_never_hold_more_than_there_is", MODEL],
    ),
    Guard(
        "the greedy sum: what is refused does not count",
        [
            Patch(
                SCHEMA,
                "        p_state.outcome := 'insufficient_credits';\n",
                "        p_state.outcome := 'insufficient_credits';\n"
                "        p_state.held := p_state.held + p_amount;\n",
            )
        ],
        [f"{AUTHORIZE}::test_an_oversized_request_does_not_refuse_those_behind_it", MODEL],
    ),
    Guard(
        "a revoked key is refused in the same call",
        [Patch(SCHEMA, "                WHEN k.status = 'revoked' THEN 'key_revoked'\n", "")],
        [f"{AUTHORIZE}::test_revoked_key_is_refused_on_the_next_request", MODEL],
    ),
    Guard(
        "an outdated copy of account or key is found out (stale)",
        [
            Patch(
                SCHEMA,
                " <> a.version THEN 'stale'\n",
                " <> a.version AND false THEN 'stale'\n",
            )
        ],
        [f"{AUTHORIZE}::test_key_and_account_are_judged_in_the_same_call", MODEL],
    ),
    Guard(
        "an outdated copy of the switches of models is found out (stale)",
        [
            Patch(
                SCHEMA,
                "WHEN 'charges' THEN 0 ELSE v_models END",
                "WHEN 'charges' THEN 0 ELSE 0 END",
            )
        ],
        [f"{OPERATORS}::test_copy_of_the_switches_that_is_outdated_is_found_out_by_the_ledger"],
    ),
    Guard(
        "of two settlements of a request in a batch the first counts",
        [
            Patch(
                SCHEMA,
                "            ORDER BY r.account_id, r.request_id, r.ordinality\n",
                "            ORDER BY r.account_id, r.request_id, r.ordinality DESC\n",
            )
        ],
        [f"{SETTLE}::test_a_batch_that_settles_one_request_twice_settles_it_once"],
    ),
    Guard(
        "an expiry that lost against a heartbeat does nothing",
        [
            Patch(
                SCHEMA,
                "                a.action <> 'expire'\n"
                "                OR h.expires_at <= v_now - make_interval(secs => p_grace_s)\n",
                "                true\n",
            )
        ],
        [f"{SETTLE}::test_heartbeat_saves_a_hold_that_the_sweeper_has_chosen", MODEL],
    ),
    Guard(
        "late truth is posted once",
        [
            Patch(
                SCHEMA,
                "v_usage.status = 'needs_review' AND v_usage.resolved_at IS NULL AND CASE",
                "v_usage.resolved_at IS NULL AND CASE",
            )
        ],
        [f"{SETTLE}::test_late_capture_is_charged_once_after_expiry", MODEL],
    ),
    Guard(
        "late truth does not overrule an operator",
        [
            Patch(
                SCHEMA,
                "v_usage.status = 'needs_review' AND v_usage.resolved_at IS NULL AND CASE",
                "v_usage.status = 'needs_review' AND CASE",
            )
        ],
        [f"{SETTLE}::test_late_capture_does_not_overrule_an_operator"],
    ),
    Guard(
        "a deposit counts once",
        [
            Patch(
                SCHEMA,
                "AND f.source = p_source AND f.external_id = p_external_id;",
                "AND f.source = p_source AND f.external_id = p_external_id AND false;",
            )
        ],
        [f"{SETTLE}::test_fund_is_idempotent_by_source_and_reference", MODEL],
    ),
]

_CONSTRAINTS = [
    Guard(
        "CHECK balances_no_overspend",
        [
            Patch(
                SCHEMA,
                "CHECK (posted - reserved + credit_limit + overdraft >= 0)",
                "CHECK (true)",
            )
        ],
        [f"{AUTHORIZE}::test_check_constraint_stops_what_the_function_would_let_through"],
    ),
    Guard(
        "CHECK usage_billed_has_price: unknown is a state",
        [
            Patch(
                SCHEMA,
                "CHECK ((status IN ('billed', 'byok')) = (price IS NOT NULL))",
                "CHECK (true)",
            )
        ],
        [f"{SETTLE}::test_unknown_cost_is_a_state_and_never_a_price_of_zero"],
    ),
    Guard(
        "the service's role may change no table",
        [
            Patch(
                SCHEMA,
                "GRANT SELECT ON ALL TABLES IN SCHEMA tallygate TO tallygate_app;",
                "GRANT SELECT, UPDATE ON ALL TABLES IN SCHEMA tallygate TO tallygate_app;",
            )
        ],
        [
            f"{SETTLE}::test_the_services_role_can_not_touch_the_books",
            "tests/integration/test_audit.py::test_the_service_has_the_rights_that_it_takes",
        ],
    ),
    Guard(
        "functions are nobody's but the service's",
        [
            Patch(
                SCHEMA,
                "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallygate FROM PUBLIC;\n",
                "",
            )
        ],
        [f"{SETTLE}::test_functions_can_be_called_by_nobody_but_whom_they_were_granted"],
    ),
    Guard(
        "the journal is append-only for its owner too",
        [
            Patch(
                SCHEMA,
                "CREATE TRIGGER entries_append_only BEFORE UPDATE OR DELETE ON entries\n"
                "FOR EACH ROW EXECUTE FUNCTION refuse_change();\n",
                "",
            )
        ],
        [
            f"{SETTLE}::test_entries_are_append_only_for_their_owner_too",
            "tests/integration/test_audit.py::test_a_ledger_in_which_everything_happened_is_clean",
        ],
    ),
]

_SPOOL = "tests/unit/proxy/test_spool.py"
_SETTLER = "tests/integration/test_settler.py"
_DURABILITY = [
    Guard(
        "the spool is on disk before it says so (fsync)",
        [
            Patch(
                "proxy/spool.py",
                "                os.fsync(file)\n            except OSError:",
                "            except OSError:",
            )
        ],
        [f"{_SPOOL}::test_what_is_written_is_on_disk_before_it_returns_and_so_is_its_name"],
    ),
    Guard(
        "the name of a spool's file is on disk (fsync of the directory)",
        [Patch("proxy/spool.py", "os.fsync(directory)", "pass")],
        [f"{_SPOOL}::test_what_is_written_is_on_disk_before_it_returns_and_so_is_its_name"],
    ),
    Guard(
        "half a batch does not stay in the spool",
        [Patch("proxy/spool.py", "                os.ftruncate(file, end)\n", "")],
        [f"{_SPOOL}::test_half_written_batch_is_taken_back"],
    ),
    Guard(
        "a spool that is replayed in vain is kept",
        [Patch("proxy/settlement.py", "file.release()", "file.remove()")],
        [f"{_SETTLER}::test_spool_survives_a_replay_that_fails"],
    ),
    Guard(
        "a charge that the ledger does not know is kept for a human",
        [Patch("proxy/settlement.py", 'settled.outcome == "unknown"', 'settled.outcome == ""')],
        [f"{_SETTLER}::test_capture_of_a_hold_that_never_was_is_kept_for_a_human"],
    ),
    Guard(
        "an authorization in doubt is voided",
        [Patch("proxy/admission.py", "if error.is_in_doubt:", "if False:")],
        ["tests/e2e/test_doubt.py"],
    ),
    Guard(
        "a whole answer waits for its settlement",
        [
            Patch(
                "proxy/relay.py",
                "        await self._settler.settle(settlement)\n"
                "        call.repeat.charged()\n"
                "        await call.exchange.respond(_OK, body, headers)\n",
                "        await call.exchange.respond(_OK, body, headers)\n"
                "        await self._settler.settle(settlement)\n"
                "        call.repeat.charged()\n",
            )
        ],
        ["tests/e2e/test_last_byte.py"],
    ),
    Guard(
        "the end of a stream waits for its settlement",
        [
            Patch(
                "proxy/streaming.py",
                "        await self._settler.settle(settlement)\n",
                "        settling = asyncio.ensure_future(self._settler.settle(settlement))\n",
            ),
            Patch(
                "proxy/streaming.py",
                "        await exchange.finish(tail)\n",
                "        await exchange.finish(tail)\n        await settling\n",
            ),
        ],
        ["tests/e2e/test_last_byte.py"],
    ),
]

_DOORS = [
    Guard(
        "a body may not say where LiteLLM calls (custom_llm_provider)",
        [Patch("proxy/firewall.py", "    custom_llm_provider models engine", "    models engine")],
        ["tests/unit/proxy/test_firewall.py"],
    ),
    Guard(
        "a blank key of a customer's own is refused",
        [Patch("proxy/byok.py", "        if not key:\n", "        if False:\n")],
        ["tests/unit/proxy/test_byok.py"],
    ),
]

GUARDS = (*_LOCKS, *_DECISIONS, *_CONSTRAINTS, *_DURABILITY, *_DOORS)
