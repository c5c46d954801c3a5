"""`tallygate price-book`: what is, was and will be in force, and publishing, from a shell."""

# ruff: noqa: PLC0415 - no command pays for the imports of the others.

import argparse
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from proxy.administration import Administration
    from proxy.price_books import Row

Document = dict[str, Any]
Act = Callable[["Administration", argparse.Namespace], Coroutine[Any, Any, Document]]
Lines = Callable[[Document], list[str]]

_MAX_VERSION = 2**31 - 1
_NEWEST = 100


def add_price_book(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    add: Callable[..., argparse.ArgumentParser],
    administer: Callable[[Act, Lines], Callable[..., int]],
) -> None:
    """Register the commands; the rest is how `cli` makes one."""
    group = commands.add_parser("price-book", help="prices, by version").add_subparsers(
        required=True, metavar="COMMAND"
    )
    add(group, "list", administer(_list, _listed), f"list the newest {_NEWEST} versions")
    one = add(group, "show", administer(_show, _rules), "show the version in force, or another")
    one.add_argument("version", type=_version, nargs="?")
    diff = add(
        group, "diff", administer(_diff, _changes), "what a file changes of what is in force"
    )
    diff.add_argument("file", type=Path, help="a config.yaml, or its price_book alone")
    publish = add(group, "publish", administer(_publish, _published), "publish a file or a version")
    what = publish.add_mutually_exclusive_group(required=True)
    what.add_argument("file", type=Path, nargs="?", help="as for diff")
    what.add_argument("--version", type=_version, help="roll back: publish this one anew")
    publish.add_argument("--at", type=_to_come, help="a time to come, such as 2030-01-01T00:00Z")
    publish.add_argument(
        "--based-on", type=_version, help="refuse where another version would be in force then"
    )
    cancel = add(group, "cancel", administer(_cancel, _published), "call one off before its time")
    cancel.add_argument("version", type=_version)


async def _list(on: "Administration", _arguments: argparse.Namespace) -> Document:
    rows = await on.price_books.versions(before=None, limit=_NEWEST)
    return {"data": [_shape(row) for row in rows]}


async def _show(on: "Administration", arguments: argparse.Namespace) -> Document:
    from pricing.price_book import parse_price_book

    version: int | None = arguments.version
    if version is None:
        live = await on.price_books.in_force()
        version = 0 if live is None else live.version
    row = await _row(on, version)
    # As pricing writes it: PostgreSQL keeps members in an order of its own.
    document = parse_price_book(row["document"]).canonical_document()
    return {**_shape(row), "document": document}


async def _diff(on: "Administration", arguments: argparse.Namespace) -> Document:
    from pricing.book_diff import diff_books
    from pricing.price_book import parse_price_book
    from proxy.administration import NotDoneError
    from proxy.api.price_answers import difference

    book = parse_price_book(_read(arguments.file))
    live = await on.price_books.in_force()
    if live is None:
        raise NotDoneError("no price book was published yet: start the service once")
    return {**difference(live.version, diff_books(live.book, book))}


async def _publish(on: "Administration", arguments: argparse.Namespace) -> Document:
    from proxy.administration import ACTOR, NotDoneError

    of_version: int | None = arguments.version
    if of_version is None:
        document, detail = _read(arguments.file), {}
    else:
        document = (await _row(on, of_version))["document"]
        detail = {"of_version": of_version}
    done = await on.price_books.publish(
        document,
        nanos_per_credit=on.nanos_per_credit,
        actor=ACTOR,
        valid_from=arguments.at,
        based_on=arguments.based_on,
        detail=detail,
    )
    if done.outcome == "stale" or done.version is None:
        raise NotDoneError(f"version {done.version} would be in force then: look at it again")
    shape = _shape(await _row(on, done.version))
    return {**shape, "outcome": done.outcome, "overtaken": done.overtaken}


async def _cancel(on: "Administration", arguments: argparse.Namespace) -> Document:
    from proxy.administration import ACTOR, NotDoneError

    row = await _row(on, arguments.version)
    if await on.price_books.cancel(row["version"], actor=ACTOR) == "begun":
        message = f"the time of version {row['version']} has come: publish another in its place"
        raise NotDoneError(message)
    return _shape(await _row(on, row["version"]))


async def _row(on: "Administration", version: int) -> "Row":
    from proxy.administration import NotDoneError

    row = await on.price_books.version(version)
    if row is None:
        raise NotDoneError("there is no such version: see `tallygate price-book list`")
    return row


def _read(path: Path) -> Document:
    """Read a price book of YAML or JSON; ConfigurationError."""
    import yaml

    from proxy.errors import ConfigurationError

    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} can't be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} holds no price book: it must be an object")
    document = cast("Document", found)
    if "price_book" not in document:
        return document
    if document.get("tiers"):
        message = (
            f"{path} has tiers, whose markups belong to its price book: restart the service on it, "
            "or give a file with the price book alone"
        )
        raise ConfigurationError(message)
    return document["price_book"]


def _shape(row: "Row") -> Document:
    return {
        "version": row["version"],
        "state": row["state"],
        "valid_from": row["valid_from"].astimezone(UTC),
        "published_by": row["published_by"],
    }


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:11]) <= _MAX_VERSION):
        raise argparse.ArgumentTypeError("not the number of a version")
    return int(text)


def _to_come(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError("not a time such as 2030-01-01T00:00Z") from None
    if moment.tzinfo is None or moment <= datetime.now(UTC):
        raise argparse.ArgumentTypeError("not a time to come, with its zone")
    return moment


def _listed(document: Document) -> list[str]:
    return [_line(row) for row in document["data"]] or ["none"]


def _published(document: Document) -> list[str]:
    overtaken = [f"version {version} is overtaken" for version in document.get("overtaken", ())]
    return [_line(document), *overtaken]


def _rules(document: Document) -> list[str]:
    book: Document = document["document"]
    return [
        _line(document),
        f"default: {_members(book['default'])}",
        *(_members(rule) for rule in book["rules"]),
        *(f"action {name}: {credits_}" for name, credits_ in book["actions"].items()),
    ]


def _changes(document: Document) -> list[str]:
    default = document["default"]
    changed: list[Document] = [] if default is None else [{"change": "default", **default}]
    lines: list[str] = []
    for change in [*changed, *document["rules"]]:
        lines.append(f"{change['change']}:")
        for sign, rule in (("-", change["before"]), ("+", change["after"])):
            if rule is not None:
                lines.append(f"  {sign} {_members(rule)}")
    for action in document["actions"]:
        before, after = (action[name] or "none" for name in ("before", "after"))
        lines.append(f"action {action['action']}: {before} -> {after}")
    if document["reordered"]:
        lines.append("patterns that may be for the same model are tried in another order")
    return lines or [f"nothing: it is what version {document['live_version']} says"]


def _line(row: Document) -> str:
    moment = f"{row['valid_from']:%Y-%m-%dT%H:%MZ}"
    return f"{row['version']:>6}  {row['state']:<10}  {moment}  {row['published_by']}"


def _members(rule: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in rule.items())
