"""The schema's way into a database, and from one version to the next."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from proxy import db
from proxy.db import SCHEMA_VERSION, Session, migrate, require_schema
from proxy.errors import ConfigurationError


def run(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def test_empty_database_gets_the_whole_schema_and_a_second_run_changes_nothing(
    empty_database_url: str,
) -> None:
    with pytest.raises(ConfigurationError, match="tallygate migrate"):
        require_schema(empty_database_url)
    assert migrate(empty_database_url) == (None, SCHEMA_VERSION)
    assert migrate(empty_database_url) == (SCHEMA_VERSION, SCHEMA_VERSION)
    require_schema(empty_database_url)


def test_several_migrate_at_once_and_one_does_it(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(migrate, [empty_database_url] * 4))
    assert sorted(before or 0 for before, _ in results) == [0] + [SCHEMA_VERSION] * 3


def test_newer_migrations_are_applied_in_order_and_all_or_nothing(
    database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "1003_second.sql").write_text("INSERT INTO tallygate.meta VALUES ('b', '3')")
    (tmp_path / "1002_first.sql").write_text("INSERT INTO tallygate.meta VALUES ('a', '2')")
    (tmp_path / "0001_initial.sql").write_text("SELECT 1/0")
    (tmp_path / "notes.sql").write_text("SELECT 1/0")
    assert migrate(database_url, migrations=tmp_path) == (SCHEMA_VERSION, 1003)
    with pytest.raises(ConfigurationError, match="schema version 1003"):
        require_schema(database_url)
    (tmp_path / "1004_broken.sql").write_text(
        "INSERT INTO tallygate.meta VALUES ('c', '4'); SELECT 1/0"
    )
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate(database_url, migrations=tmp_path)
    with psycopg.connect(database_url) as connection:
        names = connection.execute("SELECT name FROM tallygate.meta ORDER BY name").fetchall()
    assert [name for (name,) in names] == ["a", "b", "models_version", "schema_version"]


def test_database_of_a_newer_release_is_refused(database_url: str) -> None:
    run(database_url, "UPDATE tallygate.meta SET value = '99' WHERE name = 'schema_version'")
    with pytest.raises(ConfigurationError, match="newer release"):
        migrate(database_url)


def test_login_without_rights_is_told_so(empty_database_url: str) -> None:
    run(
        empty_database_url,
        "DO $$ BEGIN CREATE ROLE nobody_special LOGIN; EXCEPTION WHEN duplicate_object THEN END $$",
    )
    with pytest.raises(ConfigurationError, match="may not migrate"):
        migrate(
            empty_database_url.replace("postgres@", "nobody_special@").replace(
                "user=postgres", "user=nobody_special"
            )
        )


def test_database_that_is_away_is_told_so() -> None:
    with pytest.raises(ConfigurationError, match="can't be reached"):
        require_schema("postgresql://postgres@127.0.0.1:1/none")


@pytest.mark.anyio
async def test_session_reports_what_the_server_refuses_and_goes_on(database_url: str) -> None:
    session = Session(database_url, timeout_s=5)
    with pytest.raises(psycopg.errors.DivisionByZero):
        await session.fetch("SELECT 1 / $1::integer", ("0",))
    assert await session.fetch("SELECT $1::integer + 1, NULL", ("1",)) == [(b"2", None)]
    await session.close()


@pytest.mark.anyio
async def test_session_sends_more_than_the_socket_takes_at_once(database_url: str) -> None:
    session = Session(database_url, timeout_s=30)
    text = "x" * 20_000_000
    assert await session.fetch("SELECT length($1)", (text,)) == [(b"20000000",)]
    await session.close()


@pytest.mark.anyio
async def test_session_gives_up_on_a_silent_server_and_starts_anew(database_url: str) -> None:
    session = Session(database_url, timeout_s=0.3)
    with pytest.raises(db.CONNECTION_ERRORS):
        await session.fetch("SELECT pg_sleep($1::float8)", ("5",))
    assert session.is_in_doubt
    assert await session.fetch("SELECT $1::text", ("again",)) == [(b"again",)]
    await session.close()


@pytest.mark.anyio
async def test_connections_work_as_the_unprivileged_role(database_url: str) -> None:
    session = Session(database_url, timeout_s=5)
    assert await session.fetch("SELECT current_user", ()) == [(b"tallygate_app",)]
    await session.close()
    pool = db.make_pool(database_url)
    await pool.open()
    async with pool.connection() as connection:
        cursor = await connection.execute("SELECT current_user")
        assert await cursor.fetchone() == ("tallygate_app",)
    await pool.close()


@pytest.mark.anyio
async def test_statement_that_was_given_up_is_not_carried_out_later(database_url: str) -> None:
    run(database_url, "CREATE TABLE public.t (n integer); GRANT ALL ON public.t TO tallygate_app")
    session = Session(database_url, timeout_s=0.5)
    with psycopg.connect(database_url) as blocker:
        blocker.execute("LOCK TABLE public.t IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(db.CONNECTION_ERRORS):
            await session.fetch("INSERT INTO public.t VALUES (1) RETURNING n", ())
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM public.t").fetchone() == (0,)
    await session.close()


@pytest.mark.anyio
async def test_session_serves_several_callers_one_after_the_other(database_url: str) -> None:
    session = Session(database_url, timeout_s=5)
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(session.fetch("SELECT $1::integer, pg_sleep(0.01)", (str(n),)))
            for n in range(10)
        ]
    assert [int(task.result()[0][0] or -1) for task in tasks] == list(range(10))
    await session.close()


def test_partitions_wait_behind_nobody(database_url: str) -> None:
    with psycopg.connect(database_url) as reader, psycopg.connect(database_url) as service:
        reader.execute("SELECT count(*) FROM tallygate.entries")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            service.execute("SELECT tallygate.ensure_partitions(now(), 12)")
