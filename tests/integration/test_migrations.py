"""A database that was upgraded is one that was freshly made."""

from pathlib import Path

import psycopg
import pytest

from proxy.db import SCHEMA_VERSION, migrate
from proxy.errors import ConfigurationError
from tests.integration.money import Money, capture

SCHEMA_V1 = Path(__file__).parents[1] / "support" / "schema_v1.sql"

# Everything that the catalogs say of a schema, as lines of text without oids. Rights are sorted,
# because the order of grants is no difference.
CATALOG = {
    "relations": """
        SELECT relname, relkind, relpersistence, reloptions, pg_get_userbyid(relowner),
            ARRAY(SELECT acl::text FROM unnest(relacl) AS acl ORDER BY 1),
            pg_get_partkeydef(oid), pg_get_expr(relpartbound, oid)
        FROM pg_class WHERE relnamespace = 'tallygate'::regnamespace
    """,
    "columns": """
        SELECT c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
            a.attnotnull, a.attgenerated, a.attstorage, a.attcollation::regcollation,
            a.attacl::text, pg_get_expr(d.adbin, d.adrelid)
        FROM pg_attribute AS a
        JOIN pg_class AS c ON a.attrelid = c.oid
        LEFT JOIN pg_attrdef AS d ON a.attrelid = d.adrelid AND a.attnum = d.adnum
        WHERE c.relnamespace = 'tallygate'::regnamespace
    """,
    "constraints": """
        SELECT conname, contype, conrelid::regclass, convalidated, conislocal, coninhcount,
            pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'tallygate'::regnamespace
    """,
    "indexes": """
        SELECT i.indexrelid::regclass, i.indisvalid, pg_get_indexdef(i.indexrelid),
            h.inhparent::regclass
        FROM pg_index AS i
        JOIN pg_class AS c ON i.indexrelid = c.oid
        LEFT JOIN pg_inherits AS h ON i.indexrelid = h.inhrelid
        WHERE c.relnamespace = 'tallygate'::regnamespace
    """,
    "functions": """
        SELECT p.oid::regprocedure, pg_get_userbyid(p.proowner),
            CASE WHEN p.prokind = 'a' THEN a.agginitval ELSE pg_get_functiondef(p.oid) END,
            ARRAY(SELECT acl::text FROM unnest(p.proacl) AS acl ORDER BY 1)
        FROM pg_proc AS p LEFT JOIN pg_aggregate AS a ON p.oid = a.aggfnoid
        WHERE p.pronamespace = 'tallygate'::regnamespace
    """,
    "views": """
        SELECT oid::regclass, pg_get_viewdef(oid)
        FROM pg_class WHERE relnamespace = 'tallygate'::regnamespace AND relkind = 'v'
    """,
    "triggers": """
        SELECT pg_get_triggerdef(t.oid), t.tgenabled
        FROM pg_trigger AS t JOIN pg_class AS c ON t.tgrelid = c.oid
        WHERE c.relnamespace = 'tallygate'::regnamespace
    """,
    "types": """
        SELECT typname, typtype, pg_get_userbyid(typowner), typacl::text
        FROM pg_type WHERE typnamespace = 'tallygate'::regnamespace
    """,
    "schema": """
        SELECT pg_get_userbyid(nspowner), nspacl::text
        FROM pg_namespace WHERE nspname = 'tallygate'
    """,
    "meta": "SELECT name, value FROM tallygate.meta",
}


def catalog(url: str) -> dict[str, set[str]]:
    with psycopg.connect(url) as connection:
        return {
            name: {str(row) for row in connection.execute(query.encode())}
            for name, query in CATALOG.items()
        }


@pytest.fixture
def old_database_url(empty_database_url: str) -> str:
    """A database as version 1 of the schema made it."""
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(SCHEMA_V1.read_bytes())
    return empty_database_url


def test_an_upgraded_database_has_exactly_the_schema_of_a_new_one(
    old_database_url: str, database_url: str
) -> None:
    assert migrate(old_database_url) == (1, SCHEMA_VERSION)

    upgraded, fresh = catalog(old_database_url), catalog(database_url)

    for name, lines in fresh.items():
        assert lines, name
        assert upgraded[name] - lines == set(), name
        assert lines - upgraded[name] == set(), name


def test_an_upgrade_keeps_what_there_was_and_old_proxies_go_on(old_database_url: str) -> None:
    money = Money(old_database_url, funds=1000)
    money.settle(capture(money.hold(400), 150))
    pending = money.hold(10)

    migrate(old_database_url)

    assert money.settle(capture(pending, 5)) == ["captured"]
    assert money.usage(pending)["audio_ms"] is None
    assert money.balance() == (845, 0, 0)
    money.connection.close()


def test_an_upgrade_waits_behind_nobody(old_database_url: str) -> None:
    with psycopg.connect(old_database_url) as report:
        report.execute("SELECT count(*) FROM tallygate.usage")
        with pytest.raises(ConfigurationError, match="in use"):
            migrate(old_database_url)
    assert migrate(old_database_url) == (1, SCHEMA_VERSION)
