"""Admission: from whose request it is and what it asks for to a hold that covers its price.

The ceiling of what a request can be sold for is reckoned first and one call of the ledger decides.
Only where that ceiling does not fit the balance is the prompt counted exactly, and where the client
set no limit of its own, its answer is limited to what the balance affords.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import msgspec

from pricing.money import credits_text, usd_text
from pricing.price_book import Rule
from proxy.accounts import Principal
from proxy.catalog import Model
from proxy.control import CONTROL_ERRORS, LiteLLMControl
from proxy.db import unavailable
from proxy.endpoints import Endpoint
from proxy.errors import (
    InsufficientCreditsError,
    MeteringUnavailableError,
    RateLimitError,
    TallygateError,
)
from proxy.ledger import Authorization, HoldRequest, Ledger, Settlement
from proxy.plan import Plan, Planner
from proxy.price_books import PublishedBook
from proxy.principals import Principals, refusal
from proxy.settlement import Settler
from proxy.wire.request import Request

# How often a copy of account and key is read again that was outdated when the ledger looked.
_STALE_TRIES = 3
# What a typical token takes, for the tokens-per-minute limit; the hold is reckoned with one.
BYTES_PER_TOKEN = 4


class Admitted(msgspec.Struct, frozen=True):
    """A request with its hold: everything that its settlement needs to know."""

    request_id: UUID
    principal: Principal
    endpoint: Endpoint
    request: Request
    model: Model
    rule: Rule
    published: PublishedBook
    provider_key: str | None
    # The limit to send in place of the client's: what the balance affords, or the model can say.
    output_limit: int | None
    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])

    @property
    def is_byok(self) -> bool:
        """Whether the customer brought the provider's key."""
        return self.provider_key is not None

    def credits_text(self, nanos: int) -> str:
        """An amount of nano-USD as decimal credits."""
        return credits_text(nanos, self.published.nanos_per_credit)


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The settings of admission: tokens and seconds."""

    min_output_tokens: int
    hold_ttl_s: int


class Admission:
    """Admits requests."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        settler: Settler,
        principals: Principals,
        control: LiteLLMControl,
        planner: Planner,
        limits: AdmissionLimits,
    ) -> None:
        self._ledger = ledger
        self._settler = settler
        self._principals = principals
        self._control = control
        self._planner = planner
        self._limits = limits

    async def admit(
        self,
        request_id: UUID,
        *,
        virtual_key: str | None,
        principal: Principal,
        endpoint: Endpoint,
        request: Request,
        header: Callable[[bytes], str | None],
    ) -> Admitted:
        """Place a hold for the request or raise the error that says why not.

        `principal` is whose key this is as far as is known; the ledger decides. A hold that was
        placed is the caller's to settle; where this raises there is none, or its void is under way.
        """
        plan = self._planner.plan(principal, endpoint, request, header)
        authorization = await self._authorize(request_id, plan)
        for _ in range(_STALE_TRIES):
            if authorization.outcome != "stale":
                break
            principal = await self._principals.authenticate(virtual_key, fresh=True)
            plan = self._planner.plan(principal, endpoint, request, header)
            authorization = await self._authorize(request_id, plan)
        if authorization.outcome in _SHORT_OF_MONEY:
            await self._narrow(plan, authorization)
            authorization = await self._authorize(request_id, plan)
        if not authorization.is_held:
            raise _refused(authorization, plan)
        return Admitted(
            request_id=request_id,
            principal=plan.principal,
            endpoint=endpoint,
            request=request,
            model=plan.model,
            rule=plan.rule,
            published=plan.published,
            provider_key=plan.provider_key,
            output_limit=plan.sent_output_limit,
            headers=rate_limit_headers(authorization),
        )

    async def _authorize(self, request_id: UUID, plan: Plan) -> Authorization:
        principal, request = plan.principal, plan.request
        hold = HoldRequest(
            account_id=principal.account_id,
            request_id=request_id,
            key_id=principal.key_id,
            version=principal.version,
            amount=plan.price_nanos,
            tokens=plan.input_tokens // BYTES_PER_TOKEN + (request.output_limit or 0) * request.n,
            ttl_s=self._limits.hold_ttl_s,
            endpoint=plan.endpoint.name,
            model=plan.model.name,
            tier=principal.tier,
            streamed=request.stream,
            byok=plan.provider_key is not None,
            price_version=plan.published.version,
        )
        try:
            return await self._ledger.authorize(hold)
        except MeteringUnavailableError as error:
            if error.is_in_doubt:
                # The hold may stand although its answer was lost: have it voided, via the spool.
                await self._settler.settle(
                    Settlement(
                        account_id=principal.account_id,
                        request_id=request_id,
                        action="void",
                        status="void",
                        error_code=error.code,
                    )
                )
            raise

    async def _narrow(self, plan: Plan, authorization: Authorization) -> None:
        """Count the prompt exactly and, if the client set no limit, clamp the output to fit."""
        funds = _funds(authorization)
        if plan.model.prices is None or plan.provider_key is not None:
            raise _refused(authorization, plan)
        plan.input_tokens = await self.count(plan)
        self._planner.set_price(plan)
        if plan.price_nanos <= funds:
            return
        affordable = self._planner.affordable(plan, funds)
        if not self.may_clamp(plan, affordable):
            raise _refused(authorization, plan, affordable)
        plan.output_limit, plan.is_clamped = affordable, True
        self._planner.set_price(plan)

    def may_clamp(self, plan: Plan, affordable: int) -> bool:
        """Whether an answer of so many tokens is worth sending in the place of a longer one."""
        return plan.may_be_clamped and affordable >= self._limits.min_output_tokens

    async def count(self, plan: Plan) -> int:
        """Return the prompt's tokens, counted exactly where that can be done, else their bound."""
        request = plan.request
        if request.text is None or request.images or request.audio_clips or request.files:
            return plan.input_tokens  # allowances, not text: there is nothing to count exactly
        try:
            counted = await self._control.count_tokens(
                plan.model.name, msgspec.json.decode(request.text)
            )
        except CONTROL_ERRORS:
            return plan.input_tokens
        # Tools and schemas are tokens as well, and stay bounded by their bytes.
        others = max(request.prompt_bytes - len(bytes(request.text)), 0)
        return min(counted + others, plan.input_tokens)


def _refused(
    authorization: Authorization, plan: Plan, affordable: int | None = None
) -> TallygateError:
    outcome = authorization.outcome
    if outcome in _SHORT_OF_MONEY:
        return _short_of_money(authorization, plan, affordable)
    if outcome in _RATE_LIMITS:
        error = RateLimitError(
            _RATE_LIMITS[outcome],
            details={"limit": outcome},
            retry_after_s=1 if outcome == "max_concurrency" else _seconds_to_next_minute(),
        )
        error.headers = rate_limit_headers(authorization)
        return error
    if outcome == "stale":  # the account changes faster than we can read it
        return unavailable()
    return refusal(outcome)


_SHORT_OF_MONEY = frozenset({"insufficient_credits", "budget_exceeded"})
_RATE_LIMITS = {
    "requests_per_minute": "This key's limit of requests per minute is reached.",
    "tokens_per_minute": "This key's limit of tokens per minute does not allow this request now.",
    "max_concurrency": "This key has as many requests under way as it may have at once.",
}


def _funds(authorization: Authorization) -> int:
    funds = authorization.available_nanos or 0
    if authorization.budget_left_nanos is not None:
        funds = min(funds, authorization.budget_left_nanos)
    return funds


def _short_of_money(
    authorization: Authorization, plan: Plan, affordable: int | None
) -> InsufficientCreditsError:
    per_credit = plan.published.nanos_per_credit
    funds = _funds(authorization)
    is_budget = authorization.outcome == "budget_exceeded"
    what = "this key's budget has" if is_budget else "the account has"
    message = (
        f"This request can cost up to {credits_text(plan.price_nanos, per_credit)} credits, and "
        f"{what} {credits_text(funds, per_credit)} available."
    )
    limit = (plan.endpoint.output_limits or ("max_tokens",))[-1]
    if affordable and plan.endpoint.output_limits:
        message += f" Set {limit} to at most {affordable}, or add credits."
    else:
        message += " Raise the budget." if is_budget else " Add credits."
    return InsufficientCreditsError(
        message,
        code="budget_exceeded" if is_budget else None,
        details={
            "balance": _money(funds, per_credit),
            "required": _money(plan.price_nanos, per_credit),
            "affordable": {limit: affordable or 0},
        },
    )


def _money(nanos: int, nanos_per_credit: int) -> dict[str, str]:
    return {"credits": credits_text(nanos, nanos_per_credit), "usd": usd_text(nanos)}


def _seconds_to_next_minute() -> int:
    return 60 - int(time.time()) % 60


def rate_limit_headers(authorization: Authorization) -> dict[str, str]:
    """Return OpenAI's `x-ratelimit-…` headers for the limits that the key has."""
    headers: dict[str, str] = {}
    for what, limit, left in (
        ("requests", authorization.requests_limit, authorization.requests_left),
        ("tokens", authorization.tokens_limit, authorization.tokens_left),
    ):
        if limit is not None:
            headers[f"x-ratelimit-limit-{what}"] = str(limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(left or 0, 0))
            headers[f"x-ratelimit-reset-{what}"] = f"{_seconds_to_next_minute()}s"
    return headers
