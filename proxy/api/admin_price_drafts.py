"""Drafts of price books: written, compared with what is in force, tried on usage, published."""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from pricing.book_diff import BookDiff, RuleChange, diff_books
from pricing.errors import InvalidPriceBookError
from pricing.money import decimal_text
from pricing.price_book import PriceBook, Rule, parse_price_book, rule_document
from proxy.api.answers import Money, Paged
from proxy.api.bodies import Body, Name, read_body
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import uuid_in
from proxy.api.price_publication import (
    MAX_DOCUMENT_BYTES,
    PRICE_BOOKS,
    Publish,
    Published,
    nothing_published,
    published,
    refused,
)
from proxy.api.services import Services
from proxy.api.shapes import Shapes, utc
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, InvalidRequestError, NotFoundError
from proxy.operators import Operator
from proxy.price_drafts import PriceDrafts, Row
from proxy.price_replay import MAX_DAYS, PriceReplays, Replay, Sold

_DRAFTS = PRICE_BOOKS + "/drafts"
_DRAFT = _DRAFTS + "/{draft_id}"
_TAG = "price books"
_FIRST_DAY = datetime(2000, 1, 1, tzinfo=UTC)
_NANOCREDIT_DIGITS = 9


class NewDraft(Body):
    """POST /admin/v1/price-books/drafts. Without a document, the one in force is copied."""

    name: Name
    document: dict[str, Any] | None = None


class DraftBody(Body):
    """PUT …/drafts/{draft_id}. The document is what `config.yaml` has as `price_book`."""

    name: Name
    document: dict[str, Any]


class Period(Body):
    """POST …/replay: the last whole month (UTC) if nothing is said."""

    since: AwareDatetime | None = Field(default=None, alias="from")
    until: AwareDatetime | None = None


class PriceDraft(TypedDict):
    """A price book that nobody is charged by; `published_version` once it was published."""

    id: UUID
    name: str
    based_on: int | None
    created_at: datetime
    created_by: str
    updated_at: datetime
    published_version: int | None
    document: dict[str, Any]


class DefaultDiff(TypedDict):
    """The default rule before and after."""

    before: dict[str, Any]
    after: dict[str, Any]


class RuleDiff(TypedDict):
    """A rule, known by whom it is for, before and after."""

    change: Literal["added", "removed", "changed"]
    account: str | None
    tier: str | None
    model: str | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ActionDiff(TypedDict):
    """The price of an action in credits, before and after."""

    action: str
    before: str | None
    after: str | None


class Difference(TypedDict):
    """What a price book changes of the version in force.

    `reordered`: patterns that may be for the same model are tried in another order than before.
    """

    live_version: int
    unchanged: bool
    default: DefaultDiff | None
    rules: list[RuleDiff]
    actions: list[ActionDiff]
    reordered: bool


class DraftDiff(Difference):
    """What a draft changes of the version in force."""

    draft_id: UUID


class Revenue(TypedDict):
    """What requests brought, what they would have brought under the draft, and the difference."""

    now: Money
    draft: Money
    change: Money


class ModelReplay(TypedDict):
    """The requests of a model; null has those of all beyond the first thousand models."""

    model: str | None
    requests: int
    revenue: Revenue


class TierReplay(TypedDict):
    """The requests of a tier."""

    tier: str | None
    requests: int
    revenue: Revenue


class Unpriced(TypedDict):
    """Requests that would wait for a review, why, and what they brought now."""

    reason: str
    requests: int
    revenue: Money


class Waiting(TypedDict):
    """Requests with no price now; `priced` of them have one under the draft, which is `revenue`."""

    requests: int
    priced: int
    revenue: Money


_Between = TypedDict("_Between", {"from": datetime, "until": datetime})


class DraftReplay(_Between):
    """A period's charged requests, sold once more under the draft."""

    draft_id: UUID
    requests: int
    revenue: Revenue
    models: list[ModelReplay]
    tiers: list[TierReplay]
    unpriced: list[Unpriced]
    set_by_hand: int
    waiting: Waiting


class AdminPriceDrafts:
    """Endpoints for whoever prepares prices."""

    def __init__(self, services: Services) -> None:
        self._books = services.price_books
        self._drafts = PriceDrafts(services.pool)
        self._replays = PriceReplays(services.pool)
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [*self._of_drafts(), *self._of_decisions()]

    def _of_drafts(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="GET",
                path=_DRAFTS,
                handler=self._list,
                needs="read",
                tag=_TAG,
                summary="List the drafts",
                answers=Paged[PriceDraft],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="POST",
                path=_DRAFTS,
                handler=self._create,
                needs="finance",
                tag=_TAG,
                summary="Begin a draft",
                answers=PriceDraft,
                status=201,
                body=NewDraft,
            ),
            Operation(
                method="GET",
                path=_DRAFT,
                handler=self._one,
                needs="read",
                tag=_TAG,
                summary="Show a draft",
                answers=PriceDraft,
            ),
            Operation(
                method="PUT",
                path=_DRAFT,
                handler=self._change,
                needs="finance",
                tag=_TAG,
                summary="Replace a draft that is not published",
                answers=PriceDraft,
                body=DraftBody,
            ),
            Operation(
                method="DELETE",
                path=_DRAFT,
                handler=self._delete,
                needs="finance",
                tag=_TAG,
                summary="Throw a draft away; what it was published as stays",
                status=204,
            ),
        ]

    def _of_decisions(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="GET",
                path=_DRAFT + "/diff",
                handler=self._diff,
                needs="read",
                tag=_TAG,
                summary="Show what a draft changes of the version in force",
                answers=DraftDiff,
            ),
            Operation(
                method="POST",
                path=_DRAFT + "/replay",
                handler=self._replay,
                needs="finance",
                tag=_TAG,
                summary="Sell a past period's requests once more, under a draft; only reads",
                answers=DraftReplay,
                body=Period,
            ),
            Operation(
                method="POST",
                path=_DRAFT + "/publish",
                handler=self._publish,
                needs="finance",
                tag=_TAG,
                summary="Publish a draft, once, now or for a time to come",
                answers=Published,
                body=Publish,
            ),
        ]

    # --- drafts ---

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        rows = await self._drafts.drafts(before=page.before, limit=page.limit)
        return answer(page.show(rows, "draft_id", _draft))

    async def _create(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), NewDraft, max_bytes=MAX_DOCUMENT_BYTES)
        if body.document is not None:
            book = await _parsed(body.document)
        else:
            live = await self._books.in_force()
            if live is None:
                raise nothing_published()
            book = live.book
        draft_id = await self._drafts.create(
            body.name, book.canonical_document(), actor=operator.name
        )
        return answer(_draft(await self._row(draft_id)), 201)

    async def _one(self, request: Request, _operator: Operator) -> Response:
        return answer(_draft(await self._of(request)))

    async def _change(self, request: Request, operator: Operator) -> Response:
        draft_id: UUID = (await self._of(request))["draft_id"]
        body = await read_body(exchange_of(request), DraftBody, max_bytes=MAX_DOCUMENT_BYTES)
        book = await _parsed(body.document)
        outcome = await self._drafts.change(
            draft_id, body.name, book.canonical_document(), actor=operator.name
        )
        if outcome == "published":
            raise ConflictError("This draft was published, and stays as it is. Begin another.")
        return answer(_draft(await self._row(draft_id)))

    async def _delete(self, request: Request, operator: Operator) -> Response:
        draft_id: UUID = (await self._of(request))["draft_id"]
        await self._drafts.delete(draft_id, actor=operator.name)
        return Response(status_code=204)

    # --- what becomes of them ---

    async def _diff(self, request: Request, _operator: Operator) -> Response:
        row = await self._of(request)
        live = await self._books.in_force()
        if live is None:
            raise nothing_published()
        book = await _parsed(row["document"])
        found = await asyncio.to_thread(diff_books, live.book, book)
        shape: DraftDiff = {"draft_id": row["draft_id"], **difference(live.version, found)}
        return answer(shape)

    async def _replay(self, request: Request, _operator: Operator) -> Response:
        row = await self._of(request)
        period = await read_body(exchange_of(request), Period)
        since, until = _between(period, datetime.now(UTC))
        found = await self._replays.replay(
            await _parsed(row["document"]), self._nanos_per_credit, since=since, until=until
        )
        return answer(
            {
                "draft_id": row["draft_id"],
                "from": since,
                "until": until,
                **self._replayed(found),
            }
        )

    async def _publish(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), Publish)
        row = await self._of(request)
        done = await self._drafts.publish(
            row["draft_id"],
            nanos_per_credit=self._nanos_per_credit,
            actor=operator.name,
            valid_from=body.at,
            based_on=body.based_on,
        )
        if done.outcome == "unknown":  # thrown away in this moment
            raise _no_draft()
        return await published(self._books, self._shapes, done)

    async def _of(self, request: Request) -> Row:
        """Read the draft of the path; NotFoundError."""
        draft_id = uuid_in(request, "draft_id")
        if draft_id is None:
            raise _no_draft()
        return await self._row(draft_id)

    async def _row(self, draft_id: UUID) -> Row:
        row = await self._drafts.draft(draft_id)
        if row is None:
            raise _no_draft()
        return row

    def _replayed(self, found: Replay) -> dict[str, object]:
        unpriced = sorted(found.unpriced.items())
        return {
            "requests": found.total.requests,
            "revenue": self._revenue(found.total),
            "models": self._named("model", found.models),
            "tiers": self._named("tier", found.tiers),
            "unpriced": [
                {
                    "reason": reason,
                    "requests": sold.requests,
                    "revenue": self._shapes.money(sold.now_nanos),
                }
                for reason, sold in unpriced
            ],
            "set_by_hand": found.set_by_hand,
            "waiting": {
                "requests": found.waiting,
                "priced": found.waiting_priced.requests,
                "revenue": self._shapes.money(found.waiting_priced.draft_nanos),
            },
        }

    def _named(self, member: str, sold: dict[str | None, Sold]) -> list[dict[str, object]]:
        """The largest changes first."""
        ordered = sorted(sold.items(), key=lambda item: (-abs(item[1].change_nanos), item[0] or ""))
        return [
            {member: name, "requests": each.requests, "revenue": self._revenue(each)}
            for name, each in ordered
        ]

    def _revenue(self, sold: Sold) -> Revenue:
        return {
            "now": self._shapes.money(sold.now_nanos),
            "draft": self._shapes.money(sold.draft_nanos),
            "change": self._shapes.money(sold.change_nanos),
        }


def _between(period: Period, now: datetime) -> tuple[datetime, datetime]:
    """Return the period in UTC; InvalidRequestError where it is none, or too long."""
    since, until = period.since, period.until
    if since is None and until is None:
        first = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return (first - timedelta(days=1)).replace(day=1), first
    if since is None or until is None:
        message = "Give both from and until, or neither for the last whole month."
        raise InvalidRequestError(message, param="from" if since is None else "until")
    until = min(until, now)
    if not _FIRST_DAY <= since < until or until - since > timedelta(days=MAX_DAYS):
        message = f"from must be before until and before now, by at most {MAX_DAYS} days."
        raise InvalidRequestError(message, param="from")
    return since.astimezone(UTC), until.astimezone(UTC)


async def _parsed(document: dict[str, Any]) -> PriceBook:
    """Read a document; in a thread, because one of thousands of rules takes seconds."""
    try:
        return await asyncio.to_thread(parse_price_book, document)
    except InvalidPriceBookError as error:
        raise refused(error, "document") from None


def _draft(row: Mapping[str, Any]) -> PriceDraft:
    return {
        "id": row["draft_id"],
        "name": row["name"],
        "based_on": row["based_on"],
        "created_at": utc(row["created_at"]),
        "created_by": row["created_by"],
        "updated_at": utc(row["updated_at"]),
        "published_version": row["published_version"],
        "document": row["document"],
    }


def difference(live_version: int, found: BookDiff) -> Difference:
    """Render what changes of a version."""
    return {
        "live_version": live_version,
        "unchanged": found.is_empty,
        "default": None
        if found.default is None
        else {"before": rule_document(found.default[0]), "after": rule_document(found.default[1])},
        "rules": [_rule_diff(change) for change in found.rules],
        "actions": [
            {
                "action": change.name,
                "before": _credits(change.before),
                "after": _credits(change.after),
            }
            for change in found.actions
        ],
        "reordered": found.is_reordered,
    }


def _rule_diff(change: RuleChange) -> RuleDiff:
    account, tier, model = change.selectors
    return {
        "change": change.kind,
        "account": account,
        "tier": tier,
        "model": model,
        "before": _document(change.before),
        "after": _document(change.after),
    }


def _document(rule: Rule | None) -> dict[str, object] | None:
    return None if rule is None else rule_document(rule)


def _credits(nanocredits: int | None) -> str | None:
    return None if nanocredits is None else decimal_text(nanocredits, _NANOCREDIT_DIGITS)


def _no_draft() -> NotFoundError:
    return NotFoundError(f"There is no such draft. GET {_DRAFTS} lists them.")
