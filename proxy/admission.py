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
    PermissionDeniedError,
    RateLimitError,
    RequestTooDearError,
    TallygateError,
)
from proxy.exchange import Exchange
from proxy.ledger import Authorization, HoldRequest, Ledger, Settlement
from proxy.plan import Plan, Planner
from proxy.price_books import PublishedBook
from proxy.principals import Principals, refusal
from proxy.settlement import Settler
from proxy.tiers import offer
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
        self, exchange: Exchange, *, principal: Principal, endpoint: Endpoint, request: Request
    ) -> Admitted:
        """Place a hold for the request or raise the error that says why not.

        `principal` is whose key was sent as far as is known; the ledger decides. A hold that was
        placed is the caller's to settle; where this raises there is none, or its void is under way.
        """
        request_id = exchange.request_id
        try:
            plan = await self._plan(exchange, principal, endpoint, request)
        except (PermissionDeniedError, RequestTooDearError):
            # It may have been allowed since the copies were made.
            await self._planner.refresh()
            principal = await self._principals.authenticate(exchange, fresh=True)
            plan = await self._plan(exchange, principal, endpoint, request)
        authorization = await self._authorize(request_id, plan)
        for _ in range(_STALE_TRIES):
            if authorization.outcome != "stale":
                break
            await self._planner.refresh()
            principal = await self._principals.authenticate(exchange, fresh=True)
            plan = await self._plan(exchange, principal, endpoint, request)
            authorization = await self._authorize(request_id, plan)
        if authorization.outcome in _SHORT_OF_MONEY:
            short = authorization
            await self._narrow(
                plan, _funds(short), lambda affordable: _short_of_money(short, plan, affordable)
            )
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

    async def _plan(
        self, exchange: Exchange, principal: Principal, endpoint: Endpoint, request: Request
    ) -> Plan:
        """Plan the request within what a single one of this account may cost."""
        plan = self._planner.plan(principal, endpoint, request, exchange.header)
        most = principal.terms.max_request_nanos
        if most is not None and plan.price_nanos > most:
            await self._narrow(plan, most, lambda affordable: _too_dear(plan, most, affordable))
        return plan

    async def _authorize(self, request_id: UUID, plan: Plan) -> Authorization:
        principal, request, terms = plan.principal, plan.request, plan.principal.terms
        hold = HoldRequest(
            account_id=principal.account_id,
            request_id=request_id,
            key_id=principal.key_id,
            version=principal.version + plan.models_version,
            amount=plan.price_nanos,
            tokens=plan.input_tokens // BYTES_PER_TOKEN + (request.output_limit or 0) * request.n,
            ttl_s=self._limits.hold_ttl_s,
            endpoint=plan.endpoint.name,
            model=plan.model.name,
            tier=principal.tier,
            streamed=request.stream,
            byok=plan.provider_key is not None,
            price_version=plan.published.version,
            account_requests_per_minute=terms.requests_per_minute,
            account_tokens_per_minute=terms.tokens_per_minute,
            account_max_concurrency=terms.max_concurrency,
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

    async def _narrow(
        self, plan: Plan, funds: int, refused: Callable[[int | None], TallygateError]
    ) -> None:
        """Count the prompt exactly and, if the client set no limit, clamp the output to fit.

        Raises what `refused` makes of the tokens that would be affordable, None if nobody knows.
        """
        if plan.model.prices is None or plan.provider_key is not None:
            raise refused(None)
        plan.input_tokens = await self.count(plan)
        self._planner.set_price(plan)
        if plan.price_nanos <= funds:
            return
        affordable = self._planner.affordable(plan, funds)
        if not self.may_clamp(plan, affordable):
            raise refused(affordable)
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


def _refused(authorization: Authorization, plan: Plan) -> TallygateError:
    outcome = authorization.outcome
    if outcome in _SHORT_OF_MONEY:
        return _short_of_money(authorization, plan, None)
    error = _refused_otherwise(authorization)
    if outcome in _RATE_LIMITS and outcome.startswith("account_"):
        terms = plan.principal.terms
        offer(error, terms.tier_with_more(outcome.removeprefix("account_")))
    return error


def refused_charge(
    authorization: Authorization, price_nanos: int, nanos_per_credit: int
) -> TallygateError:
    """Say why a charge of a known price has no hold."""
    if authorization.outcome not in _SHORT_OF_MONEY:
        return _refused_otherwise(authorization)
    funds = _funds(authorization)
    whose = _BUDGETS.get(authorization.outcome)
    message = (
        f"This charge takes {credits_text(price_nanos, nanos_per_credit)} credits, and "
        f"{'the account has' if whose is None else f'this {whose} budget has'} "
        f"{credits_text(funds, nanos_per_credit)} available. "
        f"{'Add credits.' if whose is None else 'Raise the budget.'}"
    )
    return InsufficientCreditsError(
        message,
        code=None if whose is None else authorization.outcome,
        details={
            "balance": _money(funds, nanos_per_credit),
            "required": _money(price_nanos, nanos_per_credit),
        },
    )


def _refused_otherwise(authorization: Authorization) -> TallygateError:
    outcome = authorization.outcome
    if outcome in _RATE_LIMITS:
        error = RateLimitError(
            _RATE_LIMITS[outcome],
            details={"limit": outcome},
            retry_after_s=1 if outcome.endswith("concurrency") else _seconds_to_next_minute(),
        )
        error.headers = rate_limit_headers(authorization)
        return error
    if outcome == "stale":  # the account changes faster than we can read it
        return unavailable()
    return refusal(outcome)


_BUDGETS = {"budget_exceeded": "key's", "project_budget_exceeded": "project's"}
_SHORT_OF_MONEY = frozenset({"insufficient_credits", *_BUDGETS})
_RATE_LIMITS = {
    f"{prefix}{limit}": f"This {whose} {text}"
    for prefix, whose in (("", "key's"), ("account_", "account's"))
    for limit, text in (
        ("requests_per_minute", "limit of requests per minute is reached. Wait for the next."),
        (
            "tokens_per_minute",
            "limit of tokens per minute does not allow this now. Wait, or ask for a shorter one.",
        ),
        ("max_concurrency", "limit of requests under way at once is reached. Wait for one to end."),
    )
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
    whose = _BUDGETS.get(authorization.outcome)
    what = "the account has" if whose is None else f"this {whose} budget has"
    message = (
        f"This request can cost up to {credits_text(plan.price_nanos, per_credit)} credits, and "
        f"{what} {credits_text(funds, per_credit)} available."
    )
    limit = _output_limit(plan)
    if affordable and plan.endpoint.output_limits:
        more = "add credits" if whose is None else "raise the budget"
        message += f" Set {limit} to at most {affordable}, or {more}."
    else:
        message += " Add credits." if whose is None else " Raise the budget."
    return InsufficientCreditsError(
        message,
        code=None if whose is None else authorization.outcome,
        details={
            "balance": _money(funds, per_credit),
            "required": _money(plan.price_nanos, per_credit),
            "affordable": {limit: affordable or 0},
        },
    )


def _too_dear(plan: Plan, most: int, affordable: int | None) -> RequestTooDearError:
    per_credit = plan.published.nanos_per_credit
    message = (
        f"This request can cost up to {credits_text(plan.price_nanos, per_credit)} credits, and "
        f"one of this account may cost {credits_text(most, per_credit)} at most."
    )
    limit = _output_limit(plan)
    if affordable and plan.endpoint.output_limits:
        message += f" Set {limit} to at most {affordable}."
    error = RequestTooDearError(
        message,
        details={
            "maximum": _money(most, per_credit),
            "required": _money(plan.price_nanos, per_credit),
            "affordable": {limit: affordable or 0},
        },
    )
    offer(error, plan.principal.terms.tier_with_more("max_request_nanos", plan.price_nanos))
    return error


def _output_limit(plan: Plan) -> str:
    return (plan.endpoint.output_limits or ("max_tokens",))[-1]


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
