"""The schema can be distributed by account: what Citus needs is so, and stays so.

No Citus takes part: the catalog is read, and the part of deploy/citus.sql that is plain SQL is run.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from proxy.audit import audit
from proxy.ids import uuid7
from tests.integration.money import Money, capture
from tests.support.distribution import (
    DISTRIBUTED,
    LOCAL,
    OVER_ALL_ACCOUNTS,
    REFERENCE,
    breaches,
)
from tests.support.service import ROOT

SCRIPT = (ROOT / "deploy" / "citus.sql").read_text()

_LOOKING_TRIGGER = """
CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER t BEFORE INSERT ON usage FOR EACH ROW EXECUTE FUNCTION look()
"""
_LOOKING_REFUSAL = """
CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql
AS 'BEGIN PERFORM 1 FROM balances; RETURN NEW; END'
"""
_TOTAL = """
CREATE FUNCTION total() RETURNS bigint LANGUAGE sql AS 'SELECT sum(posted)::bigint FROM balances'
"""
_JOINED = """
CREATE FUNCTION joined(p_account_id uuid) RETURNS bigint LANGUAGE sql AS '
    SELECT count(*) FROM entries AS e INNER JOIN usage AS u ON e.account_id = u.account_id
    WHERE e.account_id = p_account_id
'
"""


def narrow(connection: psycopg.Connection[Any]) -> None:
    """Have the functions take one account at a time, as on Citus."""
    connection.execute(SCRIPT[SCRIPT.index("-- narrow:") :].encode())


@pytest.fixture
def schema(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection whose changes are undone."""
    with psycopg.connect(database_url) as connection:
        narrow(connection)
        connection.execute("SET search_path = tallygate")
        yield connection
        connection.rollback()


def test_every_table_and_function_can_be_distributed(schema: psycopg.Connection[Any]) -> None:
    assert breaches(schema) == []


def test_without_the_script_batches_of_several_accounts_would_be_refused(
    database_url: str,
) -> None:
    with psycopg.connect(database_url) as connection:
        found = breaches(connection)
    named = {re.match(r"\w+", breach).group() for breach in found}  # type: ignore[union-attr]
    assert named == {
        "authorize_batch", "extend_holds", "note_witness", "settle_batch", "settle_without_hold",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, breach",
    [
        ("CREATE TABLE more (id uuid)", "more is a table that nobody has decided about"),
        ("ALTER TABLE funding RENAME account_id TO customer", "funding has no account_id"),
        ("CREATE UNIQUE INDEX u ON funding (entry_id)", "funding: u has a key"),
        ("ALTER TABLE open_holds ADD UNIQUE (request_id, account_id)", "open_holds: open_holds"),
        (
            "ALTER TABLE open_holds ADD EXCLUDE USING btree (request_id WITH =)",
            "open_holds: open_holds_request_id_excl has a key",
        ),
        (
            "ALTER TABLE open_holds ADD FOREIGN KEY (account_id) REFERENCES balances",
            "open_holds: open_holds_account_id_fkey refers",
        ),
        ("CREATE SEQUENCE numbers", "numbers counts with a sequence"),
        (
            "ALTER TABLE balances ADD n bigint GENERATED ALWAYS AS IDENTITY",
            "balances_n_seq counts with a sequence",
        ),
        (_LOOKING_TRIGGER, "usage: t has a trigger"),
        (_LOOKING_REFUSAL, "entries: entries_append_only has a trigger"),
        (_TOTAL, "total does not say which account of balances"),
        (_JOINED, "joined does not say which account of usage"),
    ],
)
def test_what_citus_could_not_distribute_is_noticed(
    schema: psycopg.Connection[Any], change: str, breach: str
) -> None:
    schema.execute(change.encode())
    assert any(found.startswith(breach) for found in breaches(schema)), breaches(schema)


def test_script_distributes_what_is_said_to_be_distributed(
    schema: psycopg.Connection[Any],
) -> None:
    distributing = r"^SELECT (create_\w+_table)\('tallygate\.(\w+)'(.*)\);$"
    made = re.findall(distributing, SCRIPT, re.MULTILINE)
    distributed = {name: rest for made_by, name, rest in made if "distributed" in made_by}
    assert distributed.keys() == DISTRIBUTED
    assert {name for made_by, name, _ in made if "reference" in made_by} == REFERENCE.keys()
    # All on one node for one account.
    first, *others = distributed.values()
    assert first == ", 'account_id'"
    assert set(others) == {f"{first}, colocate_with := 'tallygate.balances'"}
    functions = schema.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'tallygate'::regnamespace"
    ).fetchall()
    assert OVER_ALL_ACCOUNTS.keys() <= {name for (name,) in functions}
    assert not DISTRIBUTED & (REFERENCE.keys() | LOCAL.keys())


def test_batches_of_several_accounts_are_decided_as_ever(
    database_url: str, request: pytest.FixtureRequest
) -> None:
    with psycopg.connect(database_url) as connection:
        narrow(connection)
    rich, poor, limited = (Money(database_url, funds=1_000) for _ in range(3))
    for account in (rich, poor, limited):
        request.addfinalizer(account.connection.close)
    limited.connection.execute(
        "UPDATE virtual_keys SET max_concurrency = 1 WHERE key_id = %s", (limited.key_id,)
    )
    requests = [
        rich.request(600), poor.request(1_001), limited.request(10), rich.request(600),
        poor.request(1_000), limited.request(10),
    ]  # fmt: skip
    authorize = "SELECT ord, outcome, available FROM authorize_batch(%s)"
    asked = rich.all(authorize, json.dumps([*requests, requests[0]]))
    assert [row[0] for row in asked] == [1, 2, 3, 4, 5, 6, 7]
    assert [row[1] for row in asked] == [
        "held", "insufficient_credits", "held", "insufficient_credits", "held", "max_concurrency",
        "duplicate",
    ]  # fmt: skip
    held = [requests[number] for number in (0, 2, 4)]
    settlements = json.dumps([capture(each, 5) for each in held])
    settle = "SELECT ord, outcome FROM settle_batch(%s)"
    assert rich.all(settle, settlements) == [(n, "captured") for n in (1, 2, 3)]
    assert rich.all(settle, settlements) == [(n, "already_captured") for n in (1, 2, 3)]
    assert rich.all("SELECT sum(posted), sum(reserved) FROM balances") == [(2_985, 0)]
    late = rich.request(10)
    rich.all(authorize, json.dumps([{**late, "ttl_s": -1}]))
    extend = "SELECT extend_holds(ARRAY[%s::uuid], ARRAY[%s::uuid], -1)"
    assert rich.one(extend, rich.account_id, late["request_id"]) == (1,)
    assert rich.one(extend, rich.account_id, uuid7()) == (0,)
    assert rich.one("SELECT expire_holds(10, 0)") == (1,)
    assert rich.all(settle, json.dumps([capture(late, 3)])) == [(1, "captured_late")]
    note = {"cost_picos": 1, "attempts": 1, "mismatch": False}
    notes = [{**note, "account_id": r["account_id"], "request_id": r["request_id"]} for r in held]
    assert rich.all("SELECT * FROM note_witness(%s)", json.dumps(notes)) == [
        (n, "noted") for n in (1, 2, 3)
    ]
    for finding in audit(database_url):
        assert finding.violations == 0 or finding.name == "charges_recompute", finding
