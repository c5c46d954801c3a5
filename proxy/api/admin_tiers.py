"""Tiers as operators see them, and the terms of single accounts."""

from typing import Annotated, Any, cast
from uuid import UUID

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from pricing.money import credits_text
from proxy.accounts import Accounts
from proxy.api.answers import Money, Paged
from proxy.api.bodies import Body, Count, Credits, Text, nanos_of, read_body
from proxy.api.operations import Operation
from proxy.api.paths import ADMIN, ADMIN_ACCOUNT, account_in, no_account
from proxy.api.services import Services
from proxy.api.shapes import Shapes
from proxy.api.web import answer, exchange_of
from proxy.operators import Operator
from proxy.tiers import Tier

_MAX_INT64 = 2**63 - 1


class TierChange(Body):
    """PUT …/tier: one of the configuration's."""

    tier: Annotated[Text, Field(min_length=1, max_length=64)]


class OverridesBody(Body):
    """PUT …/overrides: all that the account has otherwise than its tier; {} for nothing."""

    allowed_models: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=256)]],
        Field(min_length=1, max_length=200),
    ] = Field(default_factory=list[str])
    requests_per_minute: Count = Field(default_factory=int)
    tokens_per_minute: Annotated[int, Field(ge=1, le=_MAX_INT64)] = Field(default_factory=int)
    max_concurrency: Count = Field(default_factory=int)
    monthly_credits: Credits = Field(default_factory=str)
    max_request_credits: Credits = Field(default_factory=str)

    def members(self, nanos_per_credit: int) -> dict[str, Any]:
        """What was sent; InvalidRequestError for credits that are no amount."""
        sent: dict[str, Any] = self.model_dump(exclude_unset=True)
        for name, minimum in (("monthly_credits", 0), ("max_request_credits", 1)):
            if name in sent:
                nanos = nanos_of(sent[name], nanos_per_credit, param=name, minimum=minimum)
                # As the database reads it, whichever way it was written.
                sent[name] = credits_text(nanos, nanos_per_credit)
        return sent


class TermsShape(TypedDict):
    """What accounts may do and get; null is no limit."""

    allowed_models: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    max_concurrency: int | None
    max_request: Money | None
    monthly: Money


class TierShape(TermsShape):
    """A tier of the configuration. `markup` is its rule's factor in the price book."""

    name: str
    starter: Money
    markup: str | None


class OverridesShape(TypedDict, total=False):
    """What an account has otherwise than its tier."""

    allowed_models: list[str]
    requests_per_minute: int
    tokens_per_minute: int
    max_concurrency: int
    monthly_credits: str
    max_request_credits: str


class AccountTerms(TypedDict):
    """An account's tier, its overrides, and the terms that come of both."""

    tier: str
    overrides: OverridesShape
    terms: TermsShape


class AdminTiers:
    """Endpoints on tiers and terms."""

    def __init__(self, services: Services) -> None:
        self._accounts: Accounts = services.accounts
        self._credits = services.expiring_credits
        self._tiers = services.tiers
        self._shapes = Shapes(services.nanos_per_credit)
        self._nanos_per_credit = services.nanos_per_credit

    def operations(self) -> list[Operation[Operator]]:
        """Every endpoint."""
        return [
            Operation(
                method="GET",
                path=ADMIN + "/tiers",
                handler=self._list,
                needs="read",
                tag="tiers",
                summary="List the tiers of the configuration, in its order",
                answers=Paged[TierShape],
            ),
            Operation(
                method="GET",
                path=ADMIN_ACCOUNT + "/terms",
                handler=self._show,
                needs="read",
                tag="tiers",
                summary="Read what an account may do and gets",
                answers=AccountTerms,
            ),
            Operation(
                method="PUT",
                path=ADMIN_ACCOUNT + "/tier",
                handler=self._set_tier,
                needs="support",
                tag="tiers",
                summary="Change an account's tier",
                body=TierChange,
                answers=AccountTerms,
            ),
            Operation(
                method="PUT",
                path=ADMIN_ACCOUNT + "/overrides",
                handler=self._set_overrides,
                needs="finance",
                tag="tiers",
                summary="Say what an account has otherwise than its tier",
                body=OverridesBody,
                answers=AccountTerms,
            ),
        ]

    async def _list(self, _request: Request, _operator: Operator) -> Response:
        shown = [self._tier(name, tier) for name, tier in self._tiers.by_name.items()]
        return answer({"data": shown, "next_cursor": None})

    async def _show(self, request: Request, _operator: Operator) -> Response:
        account_id = await self._account_in(request)
        return answer(await self._account_terms(account_id))

    async def _set_tier(self, request: Request, operator: Operator) -> Response:
        account_id = await self._account_in(request)
        body = await read_body(exchange_of(request), TierChange)
        self._tiers.check(body.tier)
        await self._accounts.set_tier(account_id, body.tier, actor=operator.name)
        return answer(await self._changed(account_id))

    async def _set_overrides(self, request: Request, operator: Operator) -> Response:
        account_id = await self._account_in(request)
        body = await read_body(exchange_of(request), OverridesBody)
        overrides = body.members(self._nanos_per_credit)
        await self._accounts.set_overrides(account_id, overrides, actor=operator.name)
        return answer(await self._changed(account_id))

    async def _changed(self, account_id: UUID) -> AccountTerms:
        # What it gets more of this month than it had before, it gets now.
        await self._credits.grant_month(account_id, self._tiers.monthly_nanos)
        return await self._account_terms(account_id)

    async def _account_terms(self, account_id: UUID) -> AccountTerms:
        found = await self._accounts.terms(account_id)
        if found is None:  # pragma: no cover - accounts are never deleted
            raise no_account(str(account_id))
        tier, overrides = found
        terms = self._tiers.of(tier, overrides)
        shown = cast("OverridesShape", overrides)
        return {"tier": tier, "overrides": shown, "terms": self._terms(terms)}

    async def _account_in(self, request: Request) -> UUID:
        account_id: UUID = (await account_in(request, self._accounts))["account_id"]
        return account_id

    def _tier(self, name: str, tier: Tier) -> TierShape:
        return {
            **self._terms(tier),
            "name": name,
            "starter": self._shapes.money(tier.starter_nanos),
            "markup": tier.markup,
        }

    def _terms(self, tier: Tier) -> TermsShape:
        most = tier.max_request_nanos
        models = tier.allowed_models
        return {
            "allowed_models": None if models is None else list(models),
            "requests_per_minute": tier.requests_per_minute,
            "tokens_per_minute": tier.tokens_per_minute,
            "max_concurrency": tier.max_concurrency,
            "max_request": None if most is None else self._shapes.money(most),
            "monthly": self._shapes.money(tier.monthly_nanos),
        }
