"""Guards of keys and projects: limits hold from the moment they are set, on every replica."""

from tests.mutation.guards import SCHEMA, Guard, Patch

_SQL = "tests/integration/test_keys_sql.py"
_API = "tests/integration/test_key_api.py"
_RACE = f"{_SQL}::test_what_is_charged_while_a_budget_is_counted_is_in_it"
_ALL_REPLICAS = f"{_API}::test_every_limit_acts_on_the_next_request_of_every_replica"

KEY_GUARDS = (
    Guard(
        "a limit that is new counts what is open",
        [
            Patch(
                SCHEMA,
                "    IF v_new.is_limited AND NOT v_old.is_limited THEN\n",
                "    IF false THEN\n",
            )
        ],
        [
            f"{_SQL}::test_a_budget_set_late_counts_what_is_open_and_what_was_spent[key]",
            f"{_SQL}::test_a_limit_set_late_counts_requests_under_way",
        ],
    ),
    Guard(
        "a hold is not counted twice where a limit comes back",
        [
            Patch(
                SCHEMA,
                "            AND (h.scopes IS NULL OR p_scope_id <> ALL(h.scopes))\n",
                "",
            )
        ],
        [f"{_SQL}::test_a_limit_taken_away_and_set_again_counts_everything_between"],
    ),
    Guard(
        "what is charged while a budget is counted is added under the lock",
        [
            Patch(
                SCHEMA,
                "key_line(p_account_id, p_key_id), v_new.budget_period, v_since,\n"
                "            v_through, v_spent\n        ) AS s;\n",
                "'{}', v_new.budget_period, v_since, v_through, v_spent\n        ) AS s;\n",
            )
        ],
        [_RACE],
    ),
    Guard(
        "a late budget counts a correction when its request ended, as an early one does",
        [
            Patch(
                SCHEMA,
                "CASE e.kind WHEN 'correction' THEN u.settled_at ELSE e.at END >= p_since",
                "u.settled_at >= p_since AND e.kind = 'capture'",
            )
        ],
        [
            f"{_SQL}::test_spending_that_comes_late_is_counted_as_if_it_had_been_counted_at_once",
        ],
    ),
    Guard(
        "a rotated key's requests under way count for the new one",
        [
            Patch(
                SCHEMA,
                "    UPDATE open_holds AS h SET scopes = array_append(h.scopes, p_new_key_id)\n"
                "    WHERE h.account_id = p_account_id AND p_key_id = ANY(h.scopes);\n",
                "",
            )
        ],
        [f"{_SQL}::test_a_rotated_key_goes_on_with_what_was_used[0]"],
    ),
    Guard(
        "a project is not archived past a key that is being made",
        [
            Patch(
                SCHEMA,
                "            AND p.status = 'active'\n        FOR SHARE;\n",
                "            AND p.status = 'active';\n",
            )
        ],
        [f"{_SQL}::test_a_key_made_while_its_project_is_archived_is_revoked_with_it"],
    ),
    Guard(
        "a changed key is read again by every replica",
        [
            Patch(
                SCHEMA,
                "budget_period = v_new.budget_period, version = k.version + 1\n",
                "budget_period = v_new.budget_period\n",
            )
        ],
        [_ALL_REPLICAS],
    ),
    Guard(
        "a copy of a key lets nobody past its role and networks",
        [
            Patch(
                "proxy/principals.py",
                "                if is_plain or self._misuse(known, exchange, needs) is None:\n",
                "                if is_plain or known:\n",
            )
        ],
        [_ALL_REPLICAS],
    ),
    Guard(
        "X-Forwarded-For counts from our own proxies alone",
        [
            Patch(
                "proxy/networks.py",
                "            if not is_within(address, self._trusted):\n                break\n",
                "",
            )
        ],
        [f"{_API}::test_networks_are_those_of_the_client_behind_our_own_proxies"],
    ),
    Guard(
        "a project of another account takes no keys",
        [
            Patch(
                SCHEMA,
                "WHERE p.account_id = p_account_id AND p.project_id = v_new.project_id\n",
                "WHERE p.project_id = v_new.project_id\n",
            )
        ],
        [f"{_SQL}::test_a_key_goes_to_no_project_that_is_archived_or_another_accounts"],
    ),
)
