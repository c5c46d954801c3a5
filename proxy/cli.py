"""The `tallygate` command.

Exit codes: 0 done; 1 it was looked into and is not well, or there is no such thing; 2 it can't be
done as it is set up or asked for, with the reason on standard error.
"""

# ruff: noqa: PLC0415 - prometheus_client decides at its import where values are kept, and `serve`
# says so before; and no command pays for the imports of the others.

import argparse
import asyncio
import os
import re
import shlex
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
from pydantic import SecretStr

from pricing.errors import PricingError
from proxy.commands_audit import add_audit
from proxy.commands_keys import add_key
from proxy.commands_price_books import add_price_book
from proxy.commands_reconcile import add_reconcile
from proxy.commands_rejected import add_rejected
from proxy.commands_reviews import add_review
from proxy.db import CONNECTION_ERRORS, migrate
from proxy.embedded.postgres import EmbeddedPostgres
from proxy.errors import ConfigurationError
from proxy.settings import Settings, load_settings

if TYPE_CHECKING:
    from proxy.administration import Administration
    from proxy.doctor import Check
    from proxy.up import Announcement

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace, Settings], int] = arguments.run
    try:
        _override(arguments)
        code = run(arguments, load_settings())
    except (ConfigurationError, PricingError) as error:
        code = _complain(str(error), 2)
    except CONNECTION_ERRORS as error:
        code = _complain(f"PostgreSQL can't be reached: {error}", 2)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # Whoever read what was printed has seen enough, as `head` has; nothing more is written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


def _complain(text: str, code: int) -> int:
    print(f"tallygate: {text}", file=sys.stderr)
    return code


def _override(arguments: argparse.Namespace) -> None:
    """Hand options on as settings: through the environment, so that workers see them too."""
    for name in ("host", "port", "workers"):
        value = getattr(arguments, name, None)
        if value is not None:
            os.environ[f"TALLYGATE_{name.upper()}"] = str(value)  # noqa: TID251


def _show(arguments: argparse.Namespace, document: object, lines: Iterable[str]) -> None:
    if arguments.json:
        print(msgspec.json.encode(document).decode(), flush=True)
    else:
        print("\n".join(lines), flush=True)


def _table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay rows out in columns; nothing stands behind the last one."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in texts]


# -------------------------------------------------------------------------------------------------
# Processes
# -------------------------------------------------------------------------------------------------


def _up(arguments: argparse.Namespace, settings: Settings) -> int:
    from proxy.up import UpOptions, up

    def announce(ready: "Announcement") -> None:
        _show(arguments, _announcement(ready), _welcome(ready, settings))

    database_url = _secret(settings.database_url)
    options = UpOptions(
        data_dir=settings.data_dir,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        database_url=None if database_url is None else _checked_url(database_url),
        litellm_url=settings.litellm_url,
        litellm_key=_secret(settings.litellm_key),
        litellm=settings.litellm,
        admin_key=_secret(settings.admin_key),
        witness_token=_secret(settings.witness_token),
        starter_credits=settings.starter_credits,
        nanos_per_credit=settings.nanos_per_credit,
        tier=settings.default_tier,
        shutdown_timeout_s=settings.shutdown_timeout_s,
    )
    if not arguments.json:
        print("Starting PostgreSQL, LiteLLM and Tallygate …", file=sys.stderr, flush=True)
    up(options, announce)
    return 0


def _curl(ready: "Announcement") -> str:
    body = {"model": ready.model, "messages": [{"role": "user", "content": "Hello"}]}
    return (
        f"curl {ready.base_url}/v1/chat/completions"
        f" -H 'Authorization: Bearer {ready.key}' -H 'Content-Type: application/json'"
        f" -d {shlex.quote(msgspec.json.encode(body).decode())}"
    )


def _announcement(ready: "Announcement") -> dict[str, object]:
    return {
        "base_url": ready.base_url,
        "key": ready.key,
        "account_id": ready.account_id,
        "model": ready.model,
        "curl": _curl(ready),
        "admin_key_file": ready.admin_key_file and str(ready.admin_key_file),
        "logs": str(ready.data_dir / "logs"),
        "pid": ready.pid,
    }


def _welcome(ready: "Announcement", settings: Settings) -> list[str]:
    return [
        f"Tallygate is ready at {ready.base_url}; for an OpenAI SDK: base_url={ready.base_url}/v1",
        "",
        f"A fresh virtual key of the account that starts with {settings.starter_credits} credits:",
        f"  {ready.key}",
        "",
        "Try it:",
        f"  {_curl(ready)}",
        "",
        f"Admin key:  {ready.admin_key_file or 'as in TALLYGATE_ADMIN_KEY'}",
        f"Logs:       {ready.data_dir / 'logs'}",
        f"To stop:    Ctrl-C, or kill {ready.pid}",
    ]


def _serve(_arguments: argparse.Namespace, settings: Settings) -> int:
    from proxy.log import configure_logging
    from proxy.serving import serve

    missing = [
        f"TALLYGATE_{name.upper()}"
        for name in ("database_url", "litellm_url")
        if getattr(settings, name) is None
    ]
    if settings.database_url is None or missing:
        msg = (
            f"set {' and '.join(missing)}: `tallygate serve` works with a PostgreSQL and a LiteLLM "
            "that run already; `tallygate up` starts both"
        )
        raise ConfigurationError(msg)
    configure_logging(settings.log_level)
    serve(
        database_url=_checked_url(settings.database_url.get_secret_value()),
        nanos_per_credit=settings.nanos_per_credit,
        price_book=settings.whole_price_book,
        is_price_book_packaged=settings.is_packaged,
        data_dir=settings.data_dir,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        shutdown_timeout_s=settings.shutdown_timeout_s,
    )
    return 0


def _migrate(arguments: argparse.Namespace, settings: Settings) -> int:
    before, after = migrate(_database_url(settings))
    text = "no schema" if before is None else f"version {before}"
    _show(arguments, {"before": before, "after": after}, [f"{text} -> version {after}"])
    return 0


def _secret(value: SecretStr | None) -> str | None:
    return None if value is None else value.get_secret_value()


def _checked_url(url: str) -> str:
    """Refuse what is no address; libpq's own error would repeat it, password and all."""
    if not url.startswith(("postgresql://", "postgres://")):
        msg = "TALLYGATE_DATABASE_URL must look like postgresql://user@host:5432/database"
        raise ConfigurationError(msg)
    return url


def _database_url(settings: Settings) -> str:
    """Return the URL of the settings, else the one of the embedded PostgreSQL if it runs."""
    if settings.database_url is not None:
        return _checked_url(settings.database_url.get_secret_value())
    postgres = EmbeddedPostgres(settings.data_dir)
    if not postgres.is_running():
        msg = (
            f"no PostgreSQL runs in {settings.data_dir}: start `tallygate up`, or set "
            "TALLYGATE_DATABASE_URL or TALLYGATE_DATA_DIR"
        )
        raise ConfigurationError(msg)
    return postgres.url()


# -------------------------------------------------------------------------------------------------
# Checks
# -------------------------------------------------------------------------------------------------


def _doctor(arguments: argparse.Namespace, settings: Settings) -> int:
    checks = (
        _backup_checks(arguments.kept, settings) if arguments.backup else _service_checks(settings)
    )
    lines = _table([(check.status.upper(), check.name, check.found) for check in checks])
    lines = [
        text
        for line, check in zip(lines, checks, strict=True)
        for text in (line, f"      -> {check.remedy}")[: 2 if check.remedy else 1]
    ]
    is_failing = any(check.status == "fail" for check in checks)
    _show(arguments, {"ok": not is_failing, "checks": checks}, lines)
    return 1 if is_failing else 0


def _backup_checks(kept: Path | None, settings: Settings) -> list["Check"]:
    from proxy.backups import check_backup
    from proxy.seals import read_kept

    seals = None if kept is None else read_kept(kept)
    return check_backup(_database_url(settings), settings.data_dir, seals)


def _service_checks(settings: Settings) -> list["Check"]:
    from proxy import doctor
    from proxy.up import Trace, admin_key_path, litellm_key_path

    checks: list[doctor.Check] = []
    expected = doctor.LedgerExpectations(
        nanos_per_credit=settings.nanos_per_credit,
        price_book=settings.whole_price_book,
        sweep_grace_s=settings.holds.sweep_grace_s,
    )
    try:
        checks += doctor.check_database(_database_url(settings), expected)
    except ConfigurationError as error:
        checks.append(doctor.Check("postgresql", "fail", "not running", str(error)))
    trace = Trace.read(settings.data_dir)
    litellm_url = settings.litellm_url or (trace.litellm_url if trace else None)
    if litellm_url is None:
        remedy = "start `tallygate up`, or set TALLYGATE_LITELLM_URL and TALLYGATE_LITELLM_KEY"
        checks.append(doctor.Check("litellm", "fail", "not set", remedy))
    else:
        key = _secret(settings.litellm_key) or _content(litellm_key_path(settings.data_dir)) or ""
        checks += asyncio.run(doctor.check_litellm(litellm_url, key, settings.free_models))
    checks += doctor.check_spool(settings.data_dir)
    admin_key = _secret(settings.admin_key) or _content(admin_key_path(settings.data_dir))
    checks.append(doctor.check_admin_key(admin_key))
    return checks


def _content(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() else None


# -------------------------------------------------------------------------------------------------
# Accounts and keys
# -------------------------------------------------------------------------------------------------


def _administer(
    act: Callable[["Administration", argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]],
    lines: Callable[[dict[str, Any]], list[str]] | None = None,
) -> Callable[[argparse.Namespace, Settings], int]:
    """Make a command of something that `Administration` does, shown by `lines` or as a table."""

    def run(arguments: argparse.Namespace, settings: Settings) -> int:
        from proxy.administration import NotDoneError, administration

        async def work() -> dict[str, Any]:
            url = _database_url(settings)
            async with administration(url, settings.nanos_per_credit, settings.terms) as opened:
                return await act(opened, arguments)

        if getattr(arguments, "tier", "") is None:
            arguments.tier = settings.default_tier
        try:
            document = asyncio.run(work())
        except NotDoneError as error:
            return _complain(str(error), 1)
        _show(arguments, document, (lines or _lines)(document))
        return 0

    return run


def _lines(document: Mapping[str, Any]) -> list[str]:
    """Show a list as a table, and anything else as a name and a value a line."""
    if "data" not in document:
        return _table(list(_flat(document).items()))
    rows = [_flat(row) for row in document["data"]]
    if not rows:
        return ["none"]
    return _table([list(rows[0]), *(list(row.values()) for row in rows)])


def _flat(document: Mapping[str, Any]) -> dict[str, object]:
    """Draw amounts up into their parent, and of those only the credits."""
    flat: dict[str, object] = {}
    for name, value in document.items():
        if name == "balance":
            flat |= {part: amount["credits"] for part, amount in value.items()}
        elif isinstance(value, datetime):
            flat[name] = f"{value.astimezone(UTC):%Y-%m-%dT%H:%MZ}"
        elif isinstance(value, list):
            flat[name] = ",".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[name] = value
    return flat


# -------------------------------------------------------------------------------------------------
# The command line
# -------------------------------------------------------------------------------------------------


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"([1-9]\d{0,5})([smhdw])", text)
    if match is None:
        msg = f"{text!r} is no duration: write 90m, 12h, 30d or 4w"
        raise argparse.ArgumentTypeError(msg)
    return timedelta(**{_UNITS[match[2]]: int(match[1])})


def _positive(text: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d{0,8}", text):
        msg = f"{text!r} is no whole number above 0"
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON document")
    listening = argparse.ArgumentParser(add_help=False)
    listening.add_argument("--host", help="address to listen on (TALLYGATE_HOST)")
    listening.add_argument("--port", type=int, help="port to listen on (TALLYGATE_PORT)")
    listening.add_argument("--workers", type=_positive, help="processes (TALLYGATE_WORKERS)")

    parser = argparse.ArgumentParser(
        prog="tallygate", description="A metering reverse proxy before LiteLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        group: Any,  # noqa: ANN401 - argparse has no public name for it
        name: str,
        run: Callable[[argparse.Namespace, Settings], int],
        text: str,
        *parents: argparse.ArgumentParser,
    ) -> argparse.ArgumentParser:
        command = group.add_parser(name, help=text, description=text, parents=[shared, *parents])
        command.set_defaults(run=run)
        return command

    add(commands, "up", _up, "start PostgreSQL, LiteLLM and the service", listening)
    add(commands, "serve", _serve, "serve, with a PostgreSQL and a LiteLLM that run", listening)
    add(commands, "migrate", _migrate, "load or upgrade the database's schema")
    add_audit(
        commands,
        add,
        database_url=_database_url,
        show=_show,
        table=_table,
        complain=_complain,
    )
    doctor = add(commands, "doctor", _doctor, "check what the service depends on")
    doctor.add_argument(
        "--backup", action="store_true", help="check what a restore would depend on, instead"
    )
    doctor.add_argument("--kept", type=Path, metavar="FILE", help="the seals that you keep")
    _add_account(commands, add)
    add_key(commands, add, _administer, duration=_duration, positive=_positive)
    add_review(commands, add, _administer, duration=_duration, positive=_positive)
    add_reconcile(commands, add, database_url=_database_url, show=_show, complain=_complain)
    add_price_book(commands, add, _administer)
    add_rejected(
        commands, add, database_url=_database_url, show=_show, lines=_lines, complain=_complain
    )
    return parser


def _add_account(commands: Any, add: Callable[..., argparse.ArgumentParser]) -> None:  # noqa: ANN401
    group = commands.add_parser("account", help="accounts").add_subparsers(
        required=True, metavar="COMMAND"
    )
    create = add(
        group,
        "create",
        _administer(lambda on, a: on.create_account(a.name, tier=a.tier, credits_=a.credits)),
        "make an account",
    )
    create.add_argument("name")
    create.add_argument("--tier", help="one of the configuration's (default_tier)")
    create.add_argument("--credits", help="grant these at once")
    add(group, "list", _administer(lambda on, _: on.list_accounts()), "list all accounts")
    grant = add(
        group,
        "grant",
        _administer(
            lambda on, a: on.grant(a.account_id, a.credits, reason=a.reason, reference=a.reference)
        ),
        "grant credits",
    )
    grant.add_argument("account_id", type=UUID)
    grant.add_argument("credits")
    grant.add_argument("--reason", default="granted from the command line")
    grant.add_argument("--reference", help="a name under which it is granted only once")


if __name__ == "__main__":
    main()
