"""`tallygate doctor`: is everything in place to meter and to bill? If not, what to do.

Each check looks at one thing from outside, as the service would, and changes nothing. A `warn` is
worth a look, a `fail` costs money or keeps the service from working.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, LiteralString

import psycopg

from pricing.errors import PricingError
from pricing.price_book import parse_price_book
from proxy.catalog import read_models
from proxy.control import CONTROL_ERRORS, LiteLLMControl, describe
from proxy.db import SCHEMA_VERSION, Login, read_login, schema_version
from proxy.spool import Spool

Status = Literal["ok", "warn", "fail"]

POSTGRES_MAJORS = range(15, 19)
LITELLM_TESTED = ("1.106.2",)
# BYOK keys leaked between users up to the first; the others are backdoored on PyPI.
LITELLM_UNSAFE_UP_TO = (1, 102, 0)
LITELLM_BACKDOORED = ((1, 82, 7), (1, 82, 8))
MAX_CLOCK_DIFFERENCE_S = 2.0
MIN_ADMIN_KEY_LENGTH = 16
# The sweeper comes by every few seconds: a hold that waits longer than this has none.
SWEEPER_LATE_S = 120
_NAMES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `remedy` says what to do unless it is ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    @classmethod
    def of(cls, name: str, found: str, *, remedy: str = "", bad: Status | None = None) -> "Check":
        """Make a check that is ok, or `bad` with its remedy."""
        return cls(name, bad, found, remedy) if bad else cls(name, "ok", found)


# -------------------------------------------------------------------------------------------------
# PostgreSQL
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LedgerExpectations:
    """What the configuration says that the database should agree with."""

    nanos_per_credit: int
    price_book: Mapping[str, object]
    sweep_grace_s: int


def check_database(url: str, expected: LedgerExpectations) -> list[Check]:
    """Look at the server and, if the schema is there, at what is in it."""
    try:
        connection = psycopg.connect(
            url, autocommit=True, connect_timeout=5, application_name="tallygate doctor"
        )
    except psycopg.Error as error:
        remedy = "start it, or put its address into TALLYGATE_DATABASE_URL"
        return [Check.of("postgresql", str(error).strip(), remedy=remedy, bad="fail")]
    with connection:
        try:
            checks = [*_server(connection), _schema(connection)]
            if checks[-1].status == "ok":
                checks.append(_pooler(read_login(connection)))
            if checks[-1].status == "ok":
                # What a pooler lets through has this path, and so nothing is changed there.
                connection.execute("SET search_path = tallygate, pg_temp")
                checks += [
                    _roles(connection),
                    *_partitions(connection),
                    _price_book(connection, expected.price_book),
                    _credit(connection, expected.nanos_per_credit),
                    _overdue_holds(connection, expected.sweep_grace_s),
                ]
        except psycopg.Error as error:
            remedy = "give the login of TALLYGATE_DATABASE_URL the role tallygate_app"
            return [Check.of("postgresql", str(error).strip(), remedy=remedy, bad="fail")]
    return checks


def _value(connection: psycopg.Connection[Any], query: LiteralString, *parameters: object) -> Any:  # noqa: ANN401 - whatever the column holds
    ((value,),) = connection.execute(query, parameters).fetchall()
    return value


def _server(connection: psycopg.Connection[Any]) -> Iterator[Check]:
    yield Check.of("postgresql", "reachable")
    version: str = _value(connection, "SHOW server_version")
    supported = connection.info.server_version // 10_000 in POSTGRES_MAJORS
    yield Check.of(
        "postgresql_version",
        version,
        remedy=f"use PostgreSQL {POSTGRES_MAJORS[0]} to {POSTGRES_MAJORS[-1]}",
        bad=None if supported else "fail",
    )
    settings = {
        name: _value(connection, "SELECT current_setting(%s)", name)
        for name in ("fsync", "synchronous_commit", "full_page_writes")
    }
    off = sorted(name for name, value in settings.items() if value == "off")
    yield Check.of(
        "durability",
        ", ".join(f"{name} {value}" for name, value in settings.items()),
        remedy=f"turn on {', '.join(off)}: a power cut would lose settled requests",
        bad="fail" if off else None,
    )
    before = time.time()
    clock = float(_value(connection, "SELECT extract(EPOCH FROM clock_timestamp())"))
    difference_s = clock - (before + time.time()) / 2
    yield Check.of(
        "clock",
        f"the database's is {abs(difference_s):.3f} s {'ahead' if difference_s > 0 else 'behind'}",
        remedy="run NTP on both machines: ids and partitions follow this one, holds the database's",
        bad="fail" if abs(difference_s) >= MAX_CLOCK_DIFFERENCE_S else None,
    )


def _pooler(login: Login) -> Check:
    refusal = login.refusal()
    return Check.of(
        "pooler",
        "in between" if login.is_pooled else "none",
        remedy=refusal or "",
        bad="fail" if refusal else None,
    )


def _schema(connection: psycopg.Connection[Any]) -> Check:
    version = schema_version(connection)
    return Check.of(
        "schema",
        "none" if version is None else f"version {version}",
        remedy=f"this program needs version {SCHEMA_VERSION}: run `tallygate migrate`",
        bad=None if version == SCHEMA_VERSION else "fail",
    )


def _roles(connection: psycopg.Connection[Any]) -> Check:
    can_write = _value(
        connection,
        "SELECT bool_or(has_table_privilege('tallygate_app', c.oid, p.privilege))"
        " FROM pg_class AS c, unnest(ARRAY['INSERT', 'UPDATE', 'DELETE', 'TRUNCATE'])"
        " AS p (privilege)"
        " WHERE c.relnamespace = 'tallygate'::regnamespace AND c.relkind IN ('r', 'p')",
    )
    if can_write:
        return Check.of(
            "roles",
            "tallygate_app can write to tables",
            remedy="REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA tallygate"
            " FROM tallygate_app, PUBLIC; then run `tallygate audit`",
            bad="fail",
        )
    may_act = _value(connection, "SELECT pg_has_role(current_user, 'tallygate_app', 'MEMBER')")
    login = _value(connection, "SELECT current_user::text")
    return Check.of(
        "roles",
        f"tallygate_app only reads and calls functions; the login is {login}",
        remedy=f"GRANT tallygate_app TO {login}",
        bad=None if may_act else "fail",
    )


def _partitions(connection: psycopg.Connection[Any]) -> Iterator[Check]:
    now = datetime.now(UTC)
    following = (now.replace(day=1) + timedelta(days=32)).replace(day=1)
    missing = [
        name
        for parent in ("entries", "usage")
        for name in (f"{parent}_{month:%Y_%m}" for month in (now, following))
        if _value(connection, "SELECT to_regclass(%s)::text", name) is None
    ]
    yield Check.of(
        "partitions",
        f"missing: {', '.join(missing)}" if missing else f"there until {following:%Y-%m}",
        remedy="the service makes them ahead: start one, or SELECT tallygate.ensure_partitions"
        "(now(), 3)",
        bad="warn" if missing else None,
    )
    stray = _value(
        connection,
        "SELECT (SELECT count(*) FROM entries_default) + (SELECT count(*) FROM usage_default)",
    )
    yield Check.of(
        "default_partitions",
        f"{stray} rows" if stray else "empty",
        remedy="a proxy had a wrong clock: set it right, and move the rows of entries_default and"
        " usage_default into partitions of their own",
        bad="warn" if stray else None,
    )


def _price_book(connection: psycopg.Connection[Any], configured: Mapping[str, object]) -> Check:
    rows = connection.execute(
        "SELECT p.version, p.published_by, p.document, (SELECT c.document FROM price_books AS c"
        " WHERE c.published_by = 'config' ORDER BY c.version DESC LIMIT 1) AS configured"
        " FROM price_books AS p WHERE p.version = (SELECT price_book_at(clock_timestamp()))"
    ).fetchall()
    if not rows:
        remedy = "start the service once: it publishes the one of config.yaml"
        return Check.of("price_book", "none", remedy=remedy, bad="fail")
    version, publisher, *documents = rows[0]
    try:
        wanted = parse_price_book(configured).canonical_document()
    except PricingError as error:
        remedy = "correct price_book in config.yaml: the service would not start"
        return Check.of("price_book", str(error), remedy=remedy, bad="fail")
    found = f"version {version}, published by {publisher}"
    # What operators published since the configuration was last published stands.
    is_same = any(
        document is not None and parse_price_book(document).canonical_document() == wanted
        for document in documents
    )
    return Check.of(
        "price_book",
        found if is_same else f"{found}; config.yaml has changed since it was last published",
        remedy="the next start publishes the one of config.yaml",
        bad=None if is_same else "warn",
    )


def _credit(connection: psycopg.Connection[Any], nanos_per_credit: int) -> Check:
    rows = connection.execute("SELECT value FROM meta WHERE name = 'nanos_per_credit'").fetchall()
    if not rows:
        remedy = "the first start of the service fixes it"
        return Check.of("credit_usd", "not fixed yet", remedy=remedy, bad="warn")
    frozen = int(rows[0][0])
    return Check.of(
        "credit_usd",
        f"fixed at {frozen} nano-USD",
        remedy=f"the configuration says {nanos_per_credit} nano-USD, and the service will not"
        " start: set credit_usd back to what is fixed",
        bad=None if frozen == nanos_per_credit else "fail",
    )


def _overdue_holds(connection: psycopg.Connection[Any], grace_s: int) -> Check:
    overdue = _value(
        connection,
        "SELECT count(*) FROM open_holds"
        " WHERE expires_at < clock_timestamp() - make_interval(secs => %s)",
        grace_s + SWEEPER_LATE_S,
    )
    return Check.of(
        "holds",
        f"{overdue} overdue" if overdue else "none overdue",
        remedy="no service sweeps: start one, it expires them within seconds",
        bad="warn" if overdue else None,
    )


# -------------------------------------------------------------------------------------------------
# LiteLLM
# -------------------------------------------------------------------------------------------------


async def check_litellm(url: str, key: str, free_models: Sequence[str] = ()) -> list[Check]:
    """Look at LiteLLM, with the key that the service has for it."""
    control = LiteLLMControl(url, key)
    try:
        if not await control.is_alive():
            remedy = "start it, or put its address into TALLYGATE_LITELLM_URL"
            return [Check.of("litellm", f"no answer from {url}", remedy=remedy, bad="fail")]
        try:
            models = read_models(await control.models(), free_models)
        except CONTROL_ERRORS as error:
            remedy = "put LiteLLM's master key into TALLYGATE_LITELLM_KEY"
            return [Check.of("litellm", describe(error), remedy=remedy, bad="fail")]
        details: Mapping[str, Any] = {}
        with contextlib.suppress(*CONTROL_ERRORS):  # where it does not tell, we say so below
            details = await control.details()
    finally:
        await control.close()
    unpriced = sorted(name for name, model in models.items() if model.prices is None)
    priced = len(models) - len(unpriced)
    return [
        Check.of("litellm", f"answers at {url} and takes the key"),
        _litellm_version(details.get("litellm_version")),
        Check.of(
            "litellm_cache",
            "off" if details.get("cache") is None else f"on: {details['cache']}",
            remedy="set litellm_settings.cache to false: a hit is reported at its full price",
            bad=None if details.get("cache") is None else "warn",
        ),
        Check.of(
            "models",
            f"{priced} priced" + (f", unpriced: {_shown(unpriced)}" if unpriced else ""),
            remedy="give them input_cost_per_token and output_cost_per_token in model_info, or name"
            " them in free_models if they are free: each of their calls goes to review"
            if models
            else "add models to LiteLLM's model_list",
            bad="warn" if unpriced or not models else None,
        ),
    ]


def _litellm_version(version: str | None) -> Check:
    tested = " or ".join(LITELLM_TESTED)
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    if version is None or match is None:
        remedy = f"make sure that it is {tested}"
        return Check.of("litellm_version", version or "not told", remedy=remedy, bad="warn")
    numbers = tuple(map(int, match.groups()))
    if numbers <= LITELLM_UNSAFE_UP_TO or numbers in LITELLM_BACKDOORED:
        problem = (
            "it is backdoored: rotate every key it has seen"
            if numbers in LITELLM_BACKDOORED
            else "it leaks customers' provider keys to each other"
        )
        remedy = f"{problem}, and install {tested}"
        return Check.of("litellm_version", version, remedy=remedy, bad="fail")
    return Check.of(
        "litellm_version",
        version,
        remedy=f"costs were verified with {tested}: run the test-suite before relying on another",
        bad=None if version in LITELLM_TESTED else "warn",
    )


def _shown(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


# -------------------------------------------------------------------------------------------------
# This machine
# -------------------------------------------------------------------------------------------------


def check_spool(data_dir: Path) -> list[Check]:
    """Look for settlements that are not in the ledger."""
    directory = data_dir / "spool"
    waiting = rejected = 0
    if directory.is_dir():
        spool = Spool(directory)
        waiting, rejected = spool.depth(), spool.rejected()
    return [
        Check.of(
            "spool",
            f"{waiting} bytes wait in {directory}" if waiting else "empty",
            remedy="the service posts them as soon as PostgreSQL is back: start it",
            bad="warn" if waiting else None,
        ),
        Check.of(
            "rejected_settlements",
            f"{rejected} in {directory / 'rejected.jsonl'}" if rejected else "none",
            remedy="the ledger did not take them: `tallygate rejected list`, then `post`",
            bad="fail" if rejected else None,
        ),
    ]


def check_admin_key(key: str | None) -> Check:
    """Look at the admin key's length, never at the key."""
    if not key:
        remedy = "set TALLYGATE_ADMIN_KEY: without it the admin API is closed"
        return Check.of("admin_key", "not set", remedy=remedy, bad="warn")
    return Check.of(
        "admin_key",
        f"set, {len(key)} characters",
        remedy=f"make it at least {MIN_ADMIN_KEY_LENGTH} characters: openssl rand -hex 32",
        bad="fail" if len(key) < MIN_ADMIN_KEY_LENGTH else None,
    )
