"""Drafts of price books: written, compared with what is in force, tried on usage, published."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import AwareDatetime, Field
from starlette.requests import Request
from starlette.responses import Response

from pricing.book_diff import diff_books
from pricing.errors import InvalidPriceBookError
from pricing.price_book import PriceBook, parse_price_book
from proxy.api.answers import Paged
from proxy.api.bodies import Body, Name, read_body
from proxy.api.operations import Operation
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import uuid_in
from proxy.api.price_answers import (
    DraftDiff,
    DraftReplay,
    PriceDraft,
    difference,
    draft_shape,
    replayed,
)
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
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, InvalidRequestError, NotFoundError
from proxy.operators import Operator
from proxy.price_drafts import PriceDrafts, Row
from proxy.price_replay import MAX_DAYS, PriceReplays

_DRAFTS = PRICE_BOOKS + "/drafts"
_DRAFT = _DRAFTS + "/{draft_id}"
_TAG = "price books"
_FIRST_DAY = datetime(2000, 1, 1, tzinfo=UTC)


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
        return answer(page.show(rows, "draft_id", draft_shape))

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
        return answer(draft_shape(await self._row(draft_id)), 201)

    async def _one(self, request: Request, _operator: Operator) -> Response:
        return answer(draft_shape(await self._of(request)))

    async def _change(self, request: Request, operator: Operator) -> Response:
        draft_id: UUID = (await self._of(request))["draft_id"]
        body = await read_body(exchange_of(request), DraftBody, max_bytes=MAX_DOCUMENT_BYTES)
        book = await _parsed(body.document)
        outcome = await self._drafts.change(
            draft_id, body.name, book.canonical_document(), actor=operator.name
        )
        if outcome == "published":
            raise ConflictError("This draft was published, and stays as it is. Begin another.")
        return answer(draft_shape(await self._row(draft_id)))

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
                **replayed(self._shapes, found),
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


def _no_draft() -> NotFoundError:
    return NotFoundError(f"There is no such draft. GET {_DRAFTS} lists them.")
