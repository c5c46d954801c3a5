"""Receivers of webhooks, `/admin/v1/webhooks`: made, changed, tried, and what they were sent."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import AwareDatetime, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from proxy.api.answers import Paged
from proxy.api.bodies import Body, Text, read_body
from proxy.api.operations import Operation, Parameter
from proxy.api.pages import PAGED_BY_UUID, page_by_uuid
from proxy.api.paths import ADMIN, uuid_in
from proxy.api.services import Services
from proxy.api.shapes import utc
from proxy.api.web import answer, exchange_of
from proxy.errors import InvalidRequestError, NotFoundError
from proxy.operators import Operator
from proxy.webhooks import EVENT_TYPES, WebhookAddressError, check_url, new_secret

_WEBHOOKS = ADMIN + "/webhooks"
_ONE = _WEBHOOKS + "/{webhook_id}"
_STATUSES = ("pending", "delivered", "failed")
_STATUS = Parameter(
    name="status",
    schema={"type": "string", "enum": list(_STATUSES)},
    summary="Only deliveries of this status.",
)
# Whatever is older was forgotten long ago.
_LONGEST_REPLAY = timedelta(days=3650)

_Url = Annotated[Text, Field(min_length=1, max_length=2000)]
_Description = Annotated[
    str, Field(max_length=200, pattern=r"^[^\x00]*$", description="A note for operators.")
]
_EventType = Literal[
    "balance.low", "balance.exhausted", "key.over_budget", "review.opened", "audit.failed"
]
_EventTypes = Annotated[list[_EventType], Field(min_length=1, max_length=len(EVENT_TYPES))]


class NewWebhookBody(Body):
    """POST /admin/v1/webhooks. Without event types it takes all, those of later releases too."""

    url: _Url
    description: _Description = ""
    event_types: _EventTypes | None = None


class ChangedWebhook(Body):
    """PATCH …/{webhook_id}: what is left out stays as it is. Event types that are null are all."""

    url: _Url | None = None
    description: _Description | None = None
    event_types: _EventTypes | None = None
    status: Literal["active", "paused"] | None = None


class Rotation(Body):
    """POST …/rotate. The secret before signs as well for so long; 0 ends it at once."""

    overlap_s: Annotated[int, Field(ge=0, le=30 * 86_400)] = 86_400


class Replay(Body):
    """POST …/replay: one event, or all that the receiver takes since a time."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"since": "2026-01-01T00:00:00Z"}]})

    event_id: UUID | None = None
    since: AwareDatetime | None = None


class Webhook(TypedDict):
    """A receiver. `gone` says that it was paused because it answered 410."""

    id: UUID
    url: str
    description: str
    event_types: list[str] | None
    status: Literal["active", "paused"]
    gone: bool
    old_secret_until: datetime | None
    created_at: datetime


class SignedWebhook(Webhook):
    """A receiver with a new secret, which is shown this once."""

    secret: str


class WebhookDelivery(TypedDict):
    """An event for a receiver, and what came of it.

    `next_attempt_at` is null where it waits for an older event of its account, or for nothing.
    """

    event_id: UUID
    type: str
    account_id: UUID | None
    created_at: datetime
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    queued_at: datetime
    last_attempt_at: datetime | None
    last_status: int | None
    last_error: str | None
    next_attempt_at: datetime | None


class TestedWebhook(TypedDict):
    """The event that is under way."""

    event_id: UUID


class Replayed(TypedDict):
    """How many events are under way."""

    queued: int


class AdminWebhooks:
    """Endpoints on receivers."""

    def __init__(self, services: Services) -> None:
        self._store = services.webhooks
        self._reach = services.webhook_reach

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [*self._on_receivers(), *self._on_events()]

    def _on_receivers(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="GET",
                path=_WEBHOOKS,
                handler=self._list,
                needs="read",
                tag="webhooks",
                summary="List the receivers",
                answers=Paged[Webhook],
                query=PAGED_BY_UUID,
            ),
            Operation(
                method="POST",
                path=_WEBHOOKS,
                handler=self._create,
                needs="own",
                tag="webhooks",
                summary="Add a receiver; its secret is in the answer, and is not shown again",
                body=NewWebhookBody,
                answers=SignedWebhook,
                status=201,
            ),
            Operation(
                method="GET",
                path=_ONE,
                handler=self._one,
                needs="read",
                tag="webhooks",
                summary="Read a receiver",
                answers=Webhook,
            ),
            Operation(
                method="PATCH",
                path=_ONE,
                handler=self._change,
                needs="own",
                tag="webhooks",
                summary="Change, pause or resume a receiver",
                body=ChangedWebhook,
                answers=Webhook,
            ),
            Operation(
                method="DELETE",
                path=_ONE,
                handler=self._delete,
                needs="own",
                tag="webhooks",
                summary="Delete a receiver and what is under way to it",
                status=204,
            ),
            Operation(
                method="POST",
                path=_ONE + "/rotate",
                handler=self._rotate,
                needs="own",
                tag="webhooks",
                summary="Give a receiver a new secret; the old one signs as well for a while",
                body=Rotation,
                answers=SignedWebhook,
            ),
        ]

    def _on_events(self) -> list[Operation[Operator]]:
        return [
            Operation(
                method="POST",
                path=_ONE + "/test",
                handler=self._test,
                needs="own",
                tag="webhooks",
                summary="Send a receiver an event that tells nothing",
                answers=TestedWebhook,
                status=202,
            ),
            Operation(
                method="GET",
                path=_ONE + "/deliveries",
                handler=self._deliveries,
                needs="read",
                tag="webhooks",
                summary="List what a receiver was sent, or is to be",
                answers=Paged[WebhookDelivery],
                query=(*PAGED_BY_UUID, _STATUS),
            ),
            Operation(
                method="POST",
                path=_ONE + "/replay",
                handler=self._replay,
                needs="own",
                tag="webhooks",
                summary="Send one event, or all since a time, again",
                body=Replay,
                answers=Replayed,
                status=202,
            ),
        ]

    async def _list(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        rows = await self._store.receivers(before=page.before, limit=page.limit)
        return answer(page.show(rows, "receiver_id", _shape))

    async def _create(self, request: Request, operator: Operator) -> Response:
        body = await read_body(exchange_of(request), NewWebhookBody)
        self._check(body.url)
        secret = new_secret()
        receiver_id = await self._store.create(
            url=body.url,
            description=body.description,
            event_types=_sorted(body.event_types),
            secret=secret,
            actor=operator.name,
        )
        return answer({**_shape(await self._row(receiver_id)), "secret": secret}, 201)

    async def _one(self, request: Request, _operator: Operator) -> Response:
        return answer(_shape(await self._row(_id(request))))

    async def _change(self, request: Request, operator: Operator) -> Response:
        receiver_id = _id(request)
        body = await read_body(exchange_of(request), ChangedWebhook)
        change: dict[str, Any] = body.model_dump(exclude_none=True)
        if body.url is not None:
            self._check(body.url)
        if "event_types" in body.model_fields_set:
            change["event_types"] = _sorted(body.event_types)
        await self._store.change(receiver_id, change, actor=operator.name)
        return answer(_shape(await self._row(receiver_id)))

    async def _delete(self, request: Request, operator: Operator) -> Response:
        if not await self._store.delete(_id(request), actor=operator.name):
            raise _no_webhook(request.path_params["webhook_id"])
        return Response(status_code=204)

    async def _rotate(self, request: Request, operator: Operator) -> Response:
        receiver_id = _id(request)
        body = await read_body(exchange_of(request), Rotation)
        secret = new_secret()
        await self._store.rotate(receiver_id, secret, overlap_s=body.overlap_s, actor=operator.name)
        return answer({**_shape(await self._row(receiver_id)), "secret": secret})

    async def _test(self, request: Request, operator: Operator) -> Response:
        event_id = await self._store.test(_id(request), actor=operator.name)
        if event_id is None:
            raise _no_webhook(request.path_params["webhook_id"])
        queued: TestedWebhook = {"event_id": event_id}
        return answer(queued, 202)

    async def _deliveries(self, request: Request, _operator: Operator) -> Response:
        page = page_by_uuid(request)
        status = request.query_params.get("status")
        if status is not None and status not in _STATUSES:
            message = f"status must be one of {', '.join(_STATUSES)}."
            raise InvalidRequestError(message, param="status")
        receiver_id: UUID = (await self._row(_id(request)))["receiver_id"]
        rows = await self._store.deliveries(
            receiver_id, status=status, before=page.before, limit=page.limit
        )
        return answer(page.show(rows, "event_id", _delivery))

    async def _replay(self, request: Request, operator: Operator) -> Response:
        receiver_id = _id(request)
        body = await read_body(exchange_of(request), Replay)
        if (body.event_id is None) == (body.since is None):
            message = "Name either an event_id, or a time since when all events are sent again."
            raise InvalidRequestError(message, param="event_id")
        oldest = datetime.now(UTC) - _LONGEST_REPLAY
        queued = await self._store.replay(
            receiver_id,
            event_id=body.event_id,
            since=None if body.since is None else max(body.since, oldest),
            actor=operator.name,
        )
        if queued is None:
            raise _no_webhook(request.path_params["webhook_id"])
        if body.event_id is not None and not queued:
            raise NotFoundError("There is no such event any more, or it is not for this receiver.")
        replayed: Replayed = {"queued": queued}
        return answer(replayed, 202)

    def _check(self, url: str) -> None:
        try:
            check_url(url, self._reach)
        except WebhookAddressError as error:
            raise InvalidRequestError(f"url: {error}.", param="url") from None

    async def _row(self, receiver_id: UUID) -> dict[str, Any]:
        row = await self._store.receiver(receiver_id)
        if row is None:
            raise _no_webhook(str(receiver_id))
        return row


def _id(request: Request) -> UUID:
    receiver_id = uuid_in(request, "webhook_id")
    if receiver_id is None:
        raise _no_webhook(request.path_params["webhook_id"])
    return receiver_id


def _no_webhook(text: str) -> NotFoundError:
    return NotFoundError(f"There is no receiver {text[:64]!r}. GET {_WEBHOOKS} lists them.")


def _sorted(event_types: list[_EventType] | None) -> list[str] | None:
    return None if event_types is None else sorted(set(event_types))


def _shape(row: Any) -> Webhook:  # noqa: ANN401 - a row of whatever was selected
    return {
        "id": row["receiver_id"],
        "url": row["url"],
        "description": row["description"],
        "event_types": row["event_types"],
        "status": row["status"],
        "gone": row["is_gone"],
        "old_secret_until": utc(row["old_secret_until"]),
        "created_at": utc(row["created_at"]),
    }


def _delivery(row: Any) -> WebhookDelivery:  # noqa: ANN401 - a row of whatever was selected
    account_id: UUID = row["account_id"]
    return {
        "event_id": row["event_id"],
        "type": row["type"],
        "account_id": account_id if account_id.int else None,
        "created_at": utc(row["at"]),
        "status": row["status"],
        "attempts": row["attempts"],
        "queued_at": utc(row["queued_at"]),
        "last_attempt_at": utc(row["last_attempt_at"]),
        "last_status": row["last_status"],
        "last_error": row["last_error"],
        "next_attempt_at": utc(row["next_attempt_at"]),
    }
