"""PostgreSQL: connections that act as the unprivileged role, and the schema's version.

Whatever login the service is given, its connections work as `tallygate_app`, which may read, and
write only through the functions of `schema.sql`.

A transaction pooler such as PgBouncer gives each transaction whichever backend is free: what a
session sets is lost to it and found by somebody else. Behind one nothing is set and no statement
gets a name; the login must be one that brings everything along (`deploy/service_login.sql`).
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString, cast

import psycopg
from psycopg import AsyncConnection, sql
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus
from psycopg.pq.abc import PGconn, PGresult
from psycopg.rows import TupleRow, tuple_row
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from proxy.errors import ConfigurationError, MeteringUnavailableError

SCHEMA_VERSION = 11

_CONNECT_OPTIONS: dict[str, Any] = {
    "autocommit": True,
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
    "application_name": "tallygate",
}

# What a lost or refusing server looks like; anything else is an error of ours.
CONNECTION_ERRORS = (psycopg.OperationalError, psycopg.InterfaceError, PoolTimeout, TimeoutError)


def is_bad_data(error: psycopg.Error) -> bool:
    """Whether the statement's own data is at fault, so that no server would take it."""
    # SQLSTATE classes 22, data exception, and 23, integrity constraint violation.
    return (error.sqlstate or "")[:2] in {"22", "23"}


# PostgreSQL tells its process number when a connection opens. A pooler answers for it, before it
# has chosen a backend, and makes a number up.
_LOGIN: LiteralString = (
    "SELECT pg_backend_pid(), coalesce(current_schema() = 'tallygate', false),"
    " has_table_privilege('tallygate.entries', 'UPDATE')"
    " OR has_table_privilege('tallygate.balances', 'UPDATE')"
)


@dataclass(frozen=True, slots=True)
class Login:
    """What a connection works as, before anything is set."""

    # Whether a pooler may give the next transaction to another backend.
    is_pooled: bool
    # Whether its statements find the tables.
    has_path: bool
    # Whether it may do what the service must not.
    may_write: bool

    def refusal(self) -> str | None:
        """Say why the service can't work over this connection; None if it can."""
        if not self.is_pooled or (self.has_path and not self.may_write):
            return None
        return (
            "TALLYGATE_DATABASE_URL leads through a pooler, which keeps no settings of a session: "
            "give the service a login that brings them, as deploy/service_login.sql makes it"
        )


def read_login(connection: psycopg.Connection[Any]) -> Login:
    """Look at a connection to a database that has the schema."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        ((pid, has_path, may_write),) = cursor.execute(_LOGIN).fetchall()
    return Login(pid != connection.info.backend_pid, has_path, may_write)


def set_local(connection: psycopg.Connection[Any], settings: Mapping[str, str]) -> None:
    """Change settings for the transaction under way, which a pooler does not take apart."""
    connection.execute(
        "SELECT set_config(s.name, s.value, true) FROM unnest(%s::text[], %s::text[]) AS s"
        " (name, value)",
        (list(settings), list(settings.values())),
    )


async def _configure(connection: AsyncConnection[TupleRow]) -> None:
    await _set_up(connection)


async def _set_up(connection: AsyncConnection[TupleRow]) -> bool:
    """Have a new connection work as it must; returns whether it may keep settings of its own."""
    cursor = await connection.execute(_LOGIN)
    ((pid, has_path, may_write),) = await cursor.fetchall()
    login = Login(pid != connection.info.backend_pid, has_path, may_write)
    if login.is_pooled:
        if refusal := login.refusal():
            raise psycopg.OperationalError(refusal)
        connection.prepare_threshold = None
        return False
    await connection.execute("SET search_path = tallygate, pg_temp")
    await connection.execute("SET idle_in_transaction_session_timeout = '30s'")
    if login.may_write:
        await connection.execute("SET ROLE tallygate_app")
    return True


def make_pool(url: str, *, max_size: int = 8) -> AsyncConnectionPool[AsyncConnection[TupleRow]]:
    """A closed pool for reads and rare writes; a broken connection is never handed out."""
    return AsyncConnectionPool(
        url,
        min_size=1,
        max_size=max_size,
        timeout=5,
        max_idle=300,
        reconnect_timeout=60,
        open=False,
        kwargs=_CONNECT_OPTIONS,
        configure=_configure,
        check=AsyncConnectionPool.check_connection,
        name="tallygate",
    )


Pool = AsyncConnectionPool[AsyncConnection[TupleRow]]


class Session:
    """One connection that opens when it is first needed, and again after it broke.

    For callers that issue one statement at a time and can repeat it, on the path of every request:
    it drives libpq itself, with one reader that stays registered, which takes a third of the time
    of a cursor. Statements have no name, so that a transaction pooler can stand in between.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._connection: AsyncConnection[TupleRow] | None = None
        self._lock = asyncio.Lock()
        self._socket: int | None = None
        self._ready: asyncio.Future[None] | None = None
        # Whether the last failed statement may have been carried out all the same.
        self.is_in_doubt = False

    async def fetch(
        self, query: LiteralString, parameters: Sequence[str]
    ) -> list[tuple[bytes | None, ...]]:
        """Run one statement in a transaction of its own; values are in text format both ways.

        Raises one of CONNECTION_ERRORS where the server is away, silent for `timeout_s` or in no
        state to serve, and another psycopg.Error where the data is at fault.
        """
        async with self._lock:
            self.is_in_doubt = False
            try:
                async with asyncio.timeout(self._timeout_s):
                    connection = self._connection or await self._connect()
                    self.is_in_doubt = True
                    return await self._run(connection.pgconn, query, parameters)
            except (*CONNECTION_ERRORS, asyncio.CancelledError):
                # The state of the connection is unknown: a late answer must not be read as the
                # next one's.
                await self.close()
                raise
            except psycopg.Error as error:
                if is_bad_data(error):
                    raise
                # Read-only after a failover, damaged, in the middle of a migration: this server
                # can't serve us, and the next connection may find one that can.
                await self.close()
                raise psycopg.OperationalError(str(error)) from error

    async def _run(
        self, pgconn: PGconn, query: LiteralString, parameters: Sequence[str]
    ) -> list[tuple[bytes | None, ...]]:
        loop = asyncio.get_running_loop()
        pgconn.send_query_params(query.encode(), [value.encode() for value in parameters])
        while pgconn.flush():  # the socket's buffer is full
            await self._writable(loop)
        results: list[PGresult] = []
        while True:
            # Between the rows and the end of the transaction lies its commit: get_result would
            # wait for that with the whole process.
            while pgconn.is_busy():
                self._ready = loop.create_future()
                await self._ready
            result = pgconn.get_result()
            if result is None:
                break
            results.append(result)
        if pgconn.status != ConnStatus.OK:  # it broke while the answer was on its way
            raise psycopg.OperationalError(pgconn.get_error_message())
        (result,) = results
        if result.status != ExecStatus.TUPLES_OK:
            raise error_from_result(result)
        return [
            tuple([result.get_value(row, column) for column in range(result.nfields)])
            for row in range(result.ntuples)
        ]

    async def _writable(self, loop: asyncio.AbstractEventLoop) -> None:
        ready = self._ready = loop.create_future()
        socket = self._socket
        if socket is None:
            raise psycopg.OperationalError("the connection is lost")
        loop.add_writer(socket, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            if self._socket is not None:  # else libpq has closed it, and its number may be reused
                loop.remove_writer(socket)

    def _on_readable(self, pgconn: PGconn) -> None:
        waiting = self._ready
        try:
            pgconn.consume_input()
            is_busy = pgconn.is_busy()
        except psycopg.Error as error:
            # libpq has closed the socket; whoever waits, or comes next, closes the rest.
            self._stop_reading()
            if waiting is not None and not waiting.done():
                waiting.set_exception(error)
            return
        if not is_busy and waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def _connect(self) -> AsyncConnection[TupleRow]:
        connection = await AsyncConnection.connect(self._url, **_CONNECT_OPTIONS)
        try:
            if await _set_up(connection):
                # A statement that we gave up must not go on waiting for a lock and then be carried
                # out, nor keep its backend.
                milliseconds = int(self._timeout_s * 900)
                await connection.execute(sql.SQL("SET statement_timeout = {}").format(milliseconds))
                await connection.execute("SET client_connection_check_interval = '2s'")
        except BaseException:
            await connection.close()
            raise
        pgconn = connection.pgconn
        pgconn.nonblocking = 1
        # Kept, because libpq forgets the number as soon as the connection breaks.
        self._socket = pgconn.socket
        asyncio.get_running_loop().add_reader(self._socket, self._on_readable, pgconn)
        self._connection = connection
        return connection

    async def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        self._stop_reading()
        if connection is not None:
            await connection.close()

    def _stop_reading(self) -> None:
        socket, self._socket = self._socket, None
        if socket is not None:
            asyncio.get_running_loop().remove_reader(socket)


def unavailable(*, is_in_doubt: bool = False) -> MeteringUnavailableError:
    """What a customer hears while PostgreSQL is away."""
    error = MeteringUnavailableError(
        "The ledger can't be reached, so nothing can be metered or charged now. "
        "Nothing was charged; try again shortly.",
        retry_after_s=2,
    )
    error.is_in_doubt = is_in_doubt
    return error


# -------------------------------------------------------------------------------------------------
# The schema
# -------------------------------------------------------------------------------------------------


def _schema_file(name: str) -> Path:
    """Find a file that the wheel holds beside this module and the repository one level up."""
    here = Path(__file__).parent
    packaged = here / name
    return packaged if packaged.exists() else here.parent / name


def schema_version(connection: psycopg.Connection[Any]) -> int | None:
    """Version of the schema in this database; None where there is none."""
    row = connection.execute("SELECT to_regclass('tallygate.meta')").fetchone()
    if row is None or row[0] is None:
        return None
    row = connection.execute(
        "SELECT value::integer FROM tallygate.meta WHERE name = 'schema_version'"
    ).fetchone()
    return None if row is None else int(row[0])


def pending_migrations(directory: Path, version: int) -> list[tuple[int, Path]]:
    """Migrations above `version`, in order; their names begin with the version they lead to."""
    found = [
        (int(match.group(1)), path)
        for path in directory.glob("*.sql")
        if (match := re.match(r"(\d{4})_", path.name))
    ]
    return sorted(item for item in found if item[0] > version)


def migrate(url: str, *, migrations: Path | None = None) -> tuple[int | None, int]:
    """Bring the database to this version's schema, all or nothing; returns (before, after).

    Loads `schema.sql` into an empty database, applies the migrations above its version to any
    other. Safe to run from several places at once. Raises ConfigurationError where the database is
    newer than this program, the login lacks the rights, or somebody reads a table for long.
    """
    directory = migrations or Path(__file__).parent / "migrations"
    try:
        return _migrate(url, directory, must_be_current=migrations is None)
    except psycopg.errors.InsufficientPrivilege as error:
        msg = (
            f"this login may not migrate: {error.diag.message_primary}. Use one that may create "
            "roles and a schema, and give the service another that is a member of tallygate_app"
        )
        raise ConfigurationError(msg) from None
    except psycopg.errors.LockNotAvailable:
        msg = (
            "the database is in use by a long report or a dump, and nothing was changed: migrate "
            "again when that is over"
        )
        raise ConfigurationError(msg) from None


def _migrate(url: str, directory: Path, *, must_be_current: bool) -> tuple[int | None, int]:
    with psycopg.connect(url, connect_timeout=10) as connection:
        # An application-wide number: two migrations of one database must not interleave.
        connection.execute("SELECT pg_advisory_xact_lock(7411209)")
        before = schema_version(connection)
        if before is None:
            _run_script(connection, _schema_file("schema.sql"))
            return None, SCHEMA_VERSION
        steps = pending_migrations(directory, before)
        for version, path in steps:
            _run_script(connection, path)
            connection.execute(
                "UPDATE tallygate.meta SET value = %s WHERE name = 'schema_version'",
                (str(version),),
            )
        after = steps[-1][0] if steps else before
        if must_be_current and after != SCHEMA_VERSION:
            msg = (
                f"the database has schema version {after}, this program needs {SCHEMA_VERSION}: "
                "install the newer release"
            )
            raise ConfigurationError(msg)
        return before, after


def _run_script(connection: psycopg.Connection[Any], path: Path) -> None:
    # The text is our own file, which is as trusted as this code.
    script = sql.SQL(cast("LiteralString", path.read_text("utf-8")))
    connection.execute(script)


def require_schema(url: str) -> None:
    """Raise ConfigurationError unless the database has exactly this program's schema.

    So it does where a pooler stands before the database and the login is not made for one.
    """
    refusal: str | None = None
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            found = schema_version(connection)
            if found == SCHEMA_VERSION:
                refusal = read_login(connection).refusal()
    except psycopg.OperationalError as error:
        msg = f"PostgreSQL at TALLYGATE_DATABASE_URL can't be reached: {str(error).strip()}"
        raise ConfigurationError(msg) from None
    if found != SCHEMA_VERSION:
        has = "no Tallygate schema" if found is None else f"schema version {found}"
        msg = (
            f"the database has {has}, this program needs {SCHEMA_VERSION}: run `tallygate migrate`"
        )
        raise ConfigurationError(msg)
    if refusal:
        raise ConfigurationError(refusal)
