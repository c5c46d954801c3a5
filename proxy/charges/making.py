"""Makes charges, and ends those that are held.

What is asked is noted first, then the ledger places the hold, then it is captured. Whoever was
broken off between the steps and comes again with the same Idempotency-Key goes on where it was,
under the same id, so that a charge is made once. An answer leaves only when PostgreSQL has what it
says: unlike a request's, an answer that can't be recorded need not be given.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal
from uuid import UUID

import msgspec

from pricing.errors import InvalidAmountError
from pricing.markup import Charge, action_charge
from pricing.price_book import PriceBook
from proxy.accounts import Principal
from proxy.admission import refused_charge
from proxy.charges.store import Begun, ChargeStore, Row
from proxy.db import unavailable
from proxy.errors import (
    ConflictError,
    InvalidRequestError,
    MeteringUnavailableError,
    NotFoundError,
    PermissionDeniedError,
    TallygateError,
)
from proxy.ids import uuid7
from proxy.ledger import Authorization, HoldRequest, Ledger, Settlement
from proxy.price_books import PriceBooks
from proxy.settlement import Settler
from proxy.tiers import NO_TERMS, Tier

ENDPOINT = "charges"

# How long the hold of a charge that is captured at once may stand, if its process dies.
_HOLD_TTL_S = 60
_STALE_TRIES = 3
# A billion dollars, as everywhere.
_MAX_PRICE_NANOS = 10**18
_MAX_KEY_CHARACTERS = 255

Status = Literal["held", "captured", "voided", "expired", "refunded"]


@dataclass(frozen=True, slots=True)
class Payer:
    """Who pays: an account by one of its keys, or by itself, which then stands in the key's place.

    `version` is as authorize_batch wants it.
    """

    account_id: UUID
    key_id: UUID
    version: int
    tier: str
    terms: Tier = NO_TERMS


ReadPayer = Callable[[], Awaitable[Payer]]


def payer_of(principal: Principal) -> Payer:
    """The account of a key, which pays within the key's limits."""
    return Payer(
        principal.account_id,
        principal.key_id,
        principal.version,
        principal.tier,
        principal.terms,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is asked for; `hold_s` is for how long it is held, None to capture it at once.

    `operator` made it and alone may end it; None for the account's own key. `key` is the client's
    Idempotency-Key.
    """

    action: str
    quantity: int
    hold_s: int | None = None
    description: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    key: str | None = None
    operator: str | None = None
    recurring_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a hold is to end: captured, all of it or `quantity`, or void. `operator` as in Order."""

    kind: Literal["capture", "void"]
    quantity: int | None = None
    operator: str | None = None


def status_of(row: Mapping[str, Any]) -> Status:
    """What has become of a charge."""
    if row["status"] == "pending":
        return "held"
    if row["price"] is None:
        return "expired" if row["error_code"] == "hold_expired" else "voided"
    return "refunded" if row["price"] and row["refunded"] >= row["price"] else "captured"


def price_of(book: PriceBook, action: str, quantity: int, nanos_per_credit: int) -> Charge:
    """Price an action; NotFoundError where there is none, InvalidRequestError for far too many."""
    try:
        charged = action_charge(book, action, quantity=quantity, nanos_per_credit=nanos_per_credit)
    except KeyError:
        message = f"There is no action {action[:64]!r}. GET /api/v1/actions lists them."
        raise NotFoundError(message, code="action_not_found", param="action") from None
    except InvalidAmountError:
        charged = None
    if charged is None or charged.price_nanos > _MAX_PRICE_NANOS:
        message = "So many cost more than a billion US dollars. Charge fewer."
        raise InvalidRequestError(message, param="quantity")
    return charged


def key_hash_of(order_key: str | None, operator: str | None) -> bytes | None:
    """The SHA-256 of an Idempotency-Key; operators' are others than customers'."""
    if order_key is None:
        return None
    if not order_key.strip() or len(order_key) > _MAX_KEY_CHARACTERS:
        message = f"An Idempotency-Key has 1 to {_MAX_KEY_CHARACTERS} characters."
        raise InvalidRequestError(message, code="invalid_idempotency_key")
    plane = "customer" if operator is None else "operator"
    return sha256(f"{plane}:{order_key}".encode()).digest()


class Charges:
    """Makes and ends charges. All raise TallygateErrors that say what to do."""

    def __init__(
        self, store: ChargeStore, ledger: Ledger, settler: Settler, price_books: PriceBooks
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._settler = settler
        self._price_books = price_books

    async def account_payer(self, account_id: UUID) -> Payer:
        """The account itself: no key, and no limits but its money."""
        terms = await self._store.terms(account_id)
        return Payer(account_id, account_id, terms.version, terms.tier)

    async def make(
        self, order: Order, payer: Payer, reread: ReadPayer, *, request_id: UUID | None = None
    ) -> tuple[Row, bool]:
        """Make a charge, or find the one that was made; returns it, and whether it is new.

        `reread` reads the payer anew, should it have changed meanwhile. A charge that was made
        before is as it has become since.
        """
        begun = await self._begin(order, payer, request_id or uuid7())
        authorization = await self._hold(order, payer, reread, begun)
        if authorization.outcome == "already_settled":
            return await self._row(payer.account_id, begun.request_id), False
        if not authorization.is_held:
            await self._store.forget(payer.account_id, begun.request_id, authorization.outcome)
            per_credit = self._price_books.current.nanos_per_credit
            raise refused_charge(authorization, begun.price, per_credit)
        if order.hold_s is None:
            await self._capture_at_once(order, payer.account_id, begun)
        return await self._row(payer.account_id, begun.request_id), begun.outcome == "new"

    async def _begin(self, order: Order, payer: Payer, request_id: UUID) -> Begun:
        published = self._price_books.current
        key_hash = key_hash_of(order.key, order.operator)
        charged = price_of(published.book, order.action, order.quantity, published.nanos_per_credit)
        metadata = dict(sorted(order.metadata.items()))
        asked = (order.action, order.quantity, order.hold_s, order.description, metadata)
        begun = await self._store.begin(
            {
                "account_id": str(payer.account_id),
                "request_id": str(request_id),
                "key_hash": None if key_hash is None else f"\\x{key_hash.hex()}",
                "body_hash": f"\\x{sha256(msgspec.json.encode(asked)).hexdigest()}",
                "action": order.action,
                "quantity": order.quantity,
                "price": charged.price_nanos,
                "rounding_attos": charged.rounding_attos,
                "price_version": published.version,
                "is_hold": order.hold_s is not None,
                "ttl_s": order.hold_s or _HOLD_TTL_S,
                "operator": order.operator,
                "recurring_id": None if order.recurring_id is None else str(order.recurring_id),
                "description": order.description,
                "metadata": metadata,
            }
        )
        if begun.outcome == "conflict":
            message = "This Idempotency-Key came with another charge before. Use a new key."
            raise ConflictError(message, code="idempotency_key_reused")
        return begun

    async def _hold(
        self, order: Order, payer: Payer, reread: ReadPayer, begun: Begun
    ) -> Authorization:
        authorization = await self._authorize(order, payer, begun)
        for _ in range(_STALE_TRIES):
            if authorization.outcome == "stale":
                payer = await reread()
            elif authorization.outcome != "duplicate":
                break
            # A duplicate stood in one batch with the first of its key, whose hold is there by now.
            authorization = await self._authorize(order, payer, begun)
        return authorization

    async def _authorize(self, order: Order, payer: Payer, begun: Begun) -> Authorization:
        terms = payer.terms
        hold = HoldRequest(
            account_id=payer.account_id,
            request_id=begun.request_id,
            key_id=payer.key_id,
            version=payer.version,
            amount=begun.price,
            tokens=0,
            ttl_s=order.hold_s or _HOLD_TTL_S,
            endpoint=ENDPOINT,
            model=order.action,
            tier=payer.tier,
            streamed=False,
            byok=False,
            price_version=begun.price_version,
            account_requests_per_minute=terms.requests_per_minute,
            account_tokens_per_minute=terms.tokens_per_minute,
            account_max_concurrency=terms.max_concurrency,
        )
        try:
            return await self._ledger.authorize(hold)
        except MeteringUnavailableError as error:
            if error.is_in_doubt and order.key is None and order.recurring_id is None:
                # Nobody can ask for it again: the hold may stand, so have it voided.
                await self._settler.settle(_void(payer.account_id, begun.request_id))
            raise

    async def _capture_at_once(self, order: Order, account_id: UUID, begun: Begun) -> None:
        settlement = _capture(
            account_id,
            begun.request_id,
            action=order.action,
            quantity=order.quantity,
            price=begun.price,
            rounding_attos=begun.rounding_attos,
        )
        outcome = await self._end(settlement, operator=None)
        if outcome not in {"captured", "already_captured"}:
            # Its hold was over before it came here, or it was refused to another of the same key.
            raise unavailable()

    async def end(self, account_id: UUID, charge_id: UUID, ending: Ending) -> Row:
        """Capture or void a charge that is held; the same again answers the same."""
        row = await self.charge(account_id, charge_id)
        if row["operator"] is not None and ending.operator is None:
            message = "This charge was made by the operator, who alone may capture or void it."
            raise PermissionDeniedError(message)
        quantity = row["asked_quantity"] if ending.quantity is None else ending.quantity
        if quantity > row["asked_quantity"]:
            message = f"Only {row['asked_quantity']} are held. Capture at most so many."
            raise InvalidRequestError(message, param="quantity")
        if status_of(row) == "held":
            settlement = (
                _void(account_id, charge_id)
                if ending.kind == "void"
                else await self._capture_of(row, quantity)
            )
            if await self._end(settlement, operator=ending.operator) == "too_late":
                raise _ended("expired")
            row = await self.charge(account_id, charge_id)
        is_captured = row["price"] is not None
        if is_captured != (ending.kind == "capture") or (
            is_captured and row["quantity"] != quantity
        ):
            raise _ended(status_of(row), row["quantity"])
        return row

    async def _capture_of(self, row: Row, quantity: int) -> Settlement:
        price, rounding_attos = row["asked_price"], row["rounding_attos"]
        if quantity != row["asked_quantity"]:
            # By the prices that it was held under, whatever they are today.
            version = await self._store.book(row["price_version"])
            charged = price_of(version.book, row["action"], quantity, version.nanos_per_credit)
            price, rounding_attos = charged.price_nanos, charged.rounding_attos
        return _capture(
            row["account_id"],
            row["request_id"],
            action=row["action"],
            quantity=quantity,
            price=price,
            rounding_attos=rounding_attos,
        )

    async def _end(self, settlement: Settlement, *, operator: str | None) -> str:
        settled = await self._store.end(settlement, operator=operator)
        self._settler.observe([settlement], [settled])
        return settled.outcome

    async def charge(self, account_id: UUID, charge_id: UUID) -> Row:
        """Read a charge, as the store does; NotFoundError."""
        row = await self._store.charge(account_id, charge_id)
        if row is None:
            raise NotFoundError("This account has no charge with that id.")
        return row

    async def _row(self, account_id: UUID, request_id: UUID) -> Row:
        row = await self._store.charge(account_id, request_id)
        if row is None:  # pragma: no cover - it has a hold, and rows with holds stay
            raise unavailable()
        return row


def _capture(
    account_id: UUID,
    request_id: UUID,
    *,
    action: str,
    quantity: int,
    price: int,
    rounding_attos: int,
) -> Settlement:
    return Settlement(
        account_id=account_id,
        request_id=request_id,
        action="capture",
        status="billed",
        price=price,
        rounding_attos=rounding_attos,
        rule=f"actions.{action}",
        # No provider takes anything for it, which is known and no guess.
        cost_picos=0,
        cost_source="action",
        quantity=quantity,
    )


def _void(account_id: UUID, request_id: UUID) -> Settlement:
    return Settlement(account_id=account_id, request_id=request_id, action="void", status="void")


def _ended(status: Status, quantity: int | None = None) -> TallygateError:
    if status == "expired":
        message = "This charge was not captured in time: its hold is over. Make a new one."
        return ConflictError(message, code="charge_expired")
    if status == "voided":
        return ConflictError("This charge is void. Make a new one.", code="charge_voided")
    message = f"This charge is captured already, with a quantity of {quantity}."
    return ConflictError(message, code="charge_captured")
