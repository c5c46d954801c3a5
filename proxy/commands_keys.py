"""`tallygate key`: an account's virtual keys, from a shell."""

import argparse
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any
from uuid import UUID

from proxy.accounts import ROLES
from proxy.keys import KeySettings

if TYPE_CHECKING:
    from proxy.administration import Administration

Document = dict[str, Any]
Act = Callable[["Administration", argparse.Namespace], Coroutine[Any, Any, Document]]
Run = Callable[..., int]

_MAX_OVERLAP = timedelta(days=7)


def add_key(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    add: Callable[..., argparse.ArgumentParser],
    administer: Callable[[Act], Run],
    *,
    duration: Callable[[str], timedelta],
    positive: Callable[[str], int],
) -> None:
    """Register the commands; the rest is how `cli` makes one."""

    def overlap(text: str) -> timedelta:
        value = duration(text)
        if value > _MAX_OVERLAP:
            msg = "an overlap is 7d at most"
            raise argparse.ArgumentTypeError(msg)
        return value

    group = commands.add_parser("key", help="virtual keys").add_subparsers(
        required=True, metavar="COMMAND"
    )
    create = add(group, "create", administer(_create), "make a key and show it, this once")
    create.add_argument("account_id", type=UUID)
    create.add_argument("name")
    create.add_argument("--role", choices=tuple(ROLES), default="inference", help="(inference)")
    create.add_argument("--project", type=UUID, metavar="PROJECT_ID", help="whose key it is")
    create.add_argument("--budget-credits", help="what it may spend in a budget period")
    create.add_argument("--budget-period", choices=("day", "month", "total"), default="total")
    create.add_argument("--rpm", type=positive, help="requests a minute")
    create.add_argument("--tpm", type=positive, help="tokens a minute")
    create.add_argument("--max-concurrency", type=positive, help="requests at a time")
    create.add_argument("--models", type=_names, help="the only models it may use: a,b")
    create.add_argument("--endpoints", type=_names, help="the only endpoints: embeddings,audio.*")
    create.add_argument("--networks", type=_networks, help="where it may come from: 192.0.2.0/24")
    create.add_argument("--expires-in", type=duration, help="a duration such as 12h or 30d")
    listing = add(group, "list", administer(_list), "list its keys")
    listing.add_argument("account_id", type=UUID)
    revoke = add(group, "revoke", administer(_revoke), "revoke a key, at once")
    rotate = add(group, "rotate", administer(_rotate), "put a new key in a key's place")
    for command in (revoke, rotate):
        command.add_argument("account_id", type=UUID)
        command.add_argument("key_id", type=UUID)
    rotate.add_argument(
        "--overlap",
        type=overlap,
        default=timedelta(0),
        help="how long the old key works beside the new one, such as 1h (it ends at once)",
    )


async def _create(on: "Administration", arguments: argparse.Namespace) -> Document:
    expires_in: timedelta | None = arguments.expires_in
    settings = KeySettings(
        role=arguments.role,
        project_id=arguments.project,
        expires_at=None if expires_in is None else datetime.now(UTC) + expires_in,
        allowed_models=arguments.models,
        allowed_endpoints=arguments.endpoints,
        allowed_networks=arguments.networks,
        requests_per_minute=arguments.rpm,
        tokens_per_minute=arguments.tpm,
        max_concurrency=arguments.max_concurrency,
        budget_period=arguments.budget_period,
    )
    return await on.create_key(
        arguments.account_id, arguments.name, settings, budget_credits=arguments.budget_credits
    )


async def _list(on: "Administration", arguments: argparse.Namespace) -> Document:
    return await on.list_keys(arguments.account_id)


async def _revoke(on: "Administration", arguments: argparse.Namespace) -> Document:
    return await on.revoke_key(arguments.account_id, arguments.key_id)


async def _rotate(on: "Administration", arguments: argparse.Namespace) -> Document:
    overlap_s = int(arguments.overlap.total_seconds())
    return await on.rotate_key(arguments.account_id, arguments.key_id, overlap_s=overlap_s)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        msg = "name at least one, or leave it out for all of them"
        raise argparse.ArgumentTypeError(msg)
    return names


def _networks(text: str) -> list[str]:
    try:
        return [str(ip_network(name)) for name in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
