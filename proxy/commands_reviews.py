"""`tallygate review`: what waits for an operator, and what is decided of it, from a shell."""

import argparse
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from proxy.reports import ReviewFilter

if TYPE_CHECKING:
    from proxy.administration import Administration

Document = dict[str, Any]
Act = Callable[["Administration", argparse.Namespace], Coroutine[Any, Any, Document]]
Run = Callable[..., int]


def add_review(
    commands: Any,  # noqa: ANN401 - argparse has no public name for it
    add: Callable[..., argparse.ArgumentParser],
    administer: Callable[[Act], Run],
    *,
    duration: Callable[[str], timedelta],
    positive: Callable[[str], int],
) -> None:
    """Register the commands; the rest is how `cli` makes one."""
    group = commands.add_parser("review", help="the review queue").add_subparsers(
        required=True, metavar="COMMAND"
    )
    listing = add(group, "list", administer(_list), "list what waits for a decision, newest first")
    listing.add_argument("--reason", help="such as usage_missing")
    listing.add_argument("--account", type=UUID, help="of this account")
    listing.add_argument("--model", help="of this model")
    listing.add_argument("--older-than", type=duration, help="a duration such as 12h or 30d")
    listing.add_argument("--limit", type=positive, default=100, help="at most so many (100)")
    add(group, "summary", administer(_summary), "count what waits, by reason")
    resolve = add(group, "resolve", administer(_resolve), "decide, once")
    resolve.add_argument("account_id", type=UUID)
    resolve.add_argument("request_id", type=UUID)
    resolve.add_argument("decision", choices=("charge", "waive", "reprice"))
    price = resolve.add_mutually_exclusive_group()
    price.add_argument("--credits", help="the price")
    price.add_argument("--cost-usd", help="what it cost; priced by the rule it was sold under")
    resolve.add_argument("--reason", required=True, help="for the audit trail")


async def _list(on: "Administration", arguments: argparse.Namespace) -> Document:
    wanted = ReviewFilter(
        reason=arguments.reason,
        account_id=arguments.account,
        model=arguments.model,
        older_than=arguments.older_than,
    )
    return await on.list_reviews(wanted, limit=arguments.limit)


async def _summary(on: "Administration", _arguments: argparse.Namespace) -> Document:
    return await on.review_counts()


async def _resolve(on: "Administration", arguments: argparse.Namespace) -> Document:
    return await on.resolve_review(
        arguments.account_id,
        arguments.request_id,
        arguments.decision,
        credits_=arguments.credits,
        cost_usd=arguments.cost_usd,
        reason=arguments.reason,
    )
