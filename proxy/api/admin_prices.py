"""Price books, `/admin/v1/price-books` and `/markups`: what was, is and will be in force."""

import asyncio
from typing import Annotated
from uuid import UUID

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from pricing.book_edit import Document, Selectors, with_markup, without_rule
from pricing.errors import InvalidPriceBookError
from proxy.api.answers import Paged, PriceBook
from proxy.api.bodies import Body, Count, Credits, Text, read_body
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_INTEGER, page_by_integer
from proxy.api.paths import ADMIN, uuid_or_none
from proxy.api.price_publication import (
    PRICE_BOOKS,
    Publish,
    Published,
    nothing_published,
    published,
    refused,
    version_or_none,
)
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.errors import ConflictError, InvalidRequestError, NotFoundError
from proxy.operators import Operator
from proxy.price_books import PublishedBook, Row

_VERSION = PRICE_BOOKS + "/{version}"
_MARKUPS = ADMIN + "/markups"
_TAG = "price books"

_Selector = Annotated[Text, Field(min_length=1, max_length=256)]
_SELECTORS = (
    Parameter(
        name="account",
        schema={"type": "string", "format": "uuid"},
        summary="The account that the rule names.",
    ),
    Parameter(name="tier", schema={"type": "string"}, summary="The tier that it names."),
    Parameter(name="model", schema={"type": "string"}, summary="The model or pattern it names."),
    Parameter(
        name="based_on",
        schema={"type": "integer", "minimum": 1},
        summary="The version that has to be in force.",
    ),
)


class Markup(Body):
    """PUT /admin/v1/markups: a factor for exactly these selectors; none is the default rule.

    What is not said of `minimum`, `allow_loss` and `byok_fee_percent` a rule keeps, and a new one
    takes from the default rule.
    """

    account: UUID | None = None
    tier: _Selector | None = None
    model: _Selector | None = None
    factor: Credits
    minimum: Credits | None = None
    byok_fee_percent: Credits | None = None
    allow_loss: bool | None = None
    based_on: Count | None = None


class AdminPrices:
    """Endpoints for whoever sets prices."""

    def __init__(self, services: Services) -> None:
        self._books = services.price_books
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint; those of drafts have to be routed before them."""
        return [*self._of_versions(), *self._of_markups()]

    def _of_versions(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="GET",
                path=PRICE_BOOKS,
                handler=self._list,
                needs="read",
                tag=_TAG,
                summary="List the versions of the price book",
                answers=Paged[PriceBook],
                query=PAGED_BY_INTEGER,
            ),
            Operation(
                method="GET",
                path=_VERSION,
                handler=self._one,
                needs="read",
                tag=_TAG,
                summary="Show a version of the price book",
                answers=PriceBook,
            ),
            Operation(
                method="DELETE",
                path=_VERSION,
                handler=self._cancel,
                needs="finance",
                tag=_TAG,
                summary="Call a version off before its time",
                status=204,
            ),
            Operation(
                method="POST",
                path=_VERSION + "/publish",
                handler=self._publish_again,
                needs="finance",
                tag=_TAG,
                summary="Roll back: publish what a version says as a new version",
                answers=Published,
                body=Publish,
            ),
        ]

    def _of_markups(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="PUT",
                path=_MARKUPS,
                handler=self._set_markup,
                needs="finance",
                tag=_TAG,
                summary="Publish the price book in force with one markup set",
                answers=Published,
                body=Markup,
            ),
            Operation(
                method="DELETE",
                path=_MARKUPS,
                handler=self._remove_rule,
                needs="finance",
                tag=_TAG,
                summary="Publish the price book in force without one rule",
                answers=Published,
                query=_SELECTORS,
                refuses=(404,),
            ),
        ]

    # --- versions ---

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_integer(request)
        rows = await self._books.versions(before=page.before, limit=page.limit)
        return answer(page.show(rows, "version", self._shapes.price_book))

    async def _one(self, request: Request, _operator: Operator) -> Response:
        return answer(self._shapes.price_book(await self._version(request)))

    async def _cancel(self, request: Request, operator: Operator) -> Response:
        version: int = (await self._version(request))["version"]
        if await self._books.cancel(version, actor=operator.name) == "begun":
            message = (
                f"The time of version {version} has come, or is about to. Publish another version "
                f"in its place: POST {PRICE_BOOKS}/{{version}}/publish."
            )
            raise ConflictError(message)
        return Response(status_code=204)

    async def _publish_again(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), Publish)
        row = await self._version(request)
        try:
            done = await self._books.publish(
                row["document"],
                nanos_per_credit=self._nanos_per_credit,
                actor=operator.name,
                valid_from=body.at,
                based_on=body.based_on,
                detail={"of_version": row["version"]},
            )
        except InvalidPriceBookError as error:
            raise refused(error, "version") from None
        return await published(self._books, self._shapes, done)

    async def _version(self, request: Request) -> Row:
        text = request.path_params["version"]
        version = version_or_none(text)
        row = None if version is None else await self._books.version(version)
        if row is None:
            raise NotFoundError(f"There is no version {text[:64]!r}. GET {PRICE_BOOKS} lists them.")
        return row

    # --- markups ---

    async def _set_markup(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), Markup)
        members = {
            name: value
            for name in ("factor", "minimum", "byok_fee_percent", "allow_loss")
            if (value := getattr(body, name)) is not None
        }
        selectors = _selectors(body.account, body.tier, body.model)
        live = await self._live(body.based_on)
        try:
            document = await asyncio.to_thread(with_markup, live.book, selectors, members)
        except InvalidPriceBookError as error:
            raise refused(error, error.path.rpartition(".")[2]) from None
        return await self._publish(live, document, selectors, operator)

    async def _remove_rule(self, request: Request, operator: Operator) -> Response:
        asked = request.query_params
        account, based_on = asked.get("account"), asked.get("based_on")
        account_id = None if account is None else uuid_or_none(account)
        if account is not None and account_id is None:
            raise InvalidRequestError("account must be the id of an account.", param="account")
        version = None if based_on is None else version_or_none(based_on)
        if based_on is not None and version is None:
            raise InvalidRequestError("based_on must be a version's number.", param="based_on")
        selectors = _selectors(account_id, asked.get("tier"), asked.get("model"))
        if not selectors:
            message = "Name the rule's account, tier or model. The default rule can't be removed."
            raise InvalidRequestError(message, param="model")
        live = await self._live(version)
        document = await asyncio.to_thread(without_rule, live.book, selectors)
        if document is None:
            message = f"Version {live.version}, which is in force, has no rule for exactly these."
            raise NotFoundError(message)
        return await self._publish(live, document, selectors, operator)

    async def _live(self, based_on: int | None) -> PublishedBook:
        """Return the version to change; ConflictError if it is another, or not to stay."""
        live = await self._books.in_force()
        if live is None:
            raise nothing_published()
        if based_on is not None and based_on != live.version:
            message = (
                f"Version {live.version} is in force by now, not {based_on}. Look at it again."
            )
            raise ConflictError(message, param="based_on", details={"version": live.version})
        coming = await self._books.next_scheduled()
        if coming is not None:
            message = (
                f"Version {coming} is scheduled, and would be overtaken by a change of what is in "
                f"force. Cancel it, DELETE {PRICE_BOOKS}/{coming}, or publish a draft instead."
            )
            raise ConflictError(message, details={"version": coming})
        return live

    async def _publish(
        self, live: PublishedBook, document: Document, selectors: Selectors, operator: Operator
    ) -> Response:
        done = await self._books.publish(
            document,
            nanos_per_credit=self._nanos_per_credit,
            actor=operator.name,
            based_on=live.version,
            detail={"of_version": live.version, "rule": dict(selectors)},
        )
        return await published(self._books, self._shapes, done)


def _selectors(account_id: UUID | None, tier: str | None, model: str | None) -> Selectors:
    named: Selectors = {}
    if account_id is not None:
        named = {**named, "account": str(account_id)}
    if tier is not None:
        named = {**named, "tier": tier}
    return named if model is None else {**named, "model": model}
