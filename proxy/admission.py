"""Admission: from whose request it is and what it asks for to a hold that covers its price.

The ceiling of what a request can be sold for is estimated first and one call of the ledger decides.
Only where that ceiling does not fit the balance is the prompt counted exactly, and where the client
set no limit of its own, its answer is limited to what the balance affords.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import msgspec

from pricing.estimate import (
    affordable_output_tokens,
    ceiling_cost,
    ceiling_price,
    possible_classes,
)
from pricing.money import PICOS_PER_NANO, PPM, ceil_div, credits_text, usd_text
from pricing.price_book import Rule
from pricing.usage import TokenClass
from proxy.accounts import Principal
from proxy.byok import choose_provider_key
from proxy.catalog import Catalog, Model
from proxy.control import CONTROL_ERRORS, LiteLLMControl
from proxy.db import unavailable
from proxy.errors import (
    InsufficientCreditsError,
    MeteringUnavailableError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    TallygateError,
    UpstreamUnavailableError,
)
from proxy.ledger import Authorization, HoldRequest, Ledger, Settlement
from proxy.price_books import PriceBooks, PublishedBook
from proxy.principals import Principals, may_use_model, refusal
from proxy.settlement import Settler
from proxy.wire.chat_request import ChatRequest

# A model of which nobody says how long its answers can be.
_UNKNOWN_OUTPUT_LIMIT = 16_384
# Providers put some hundred tokens of their own into the prompt of a request with tools.
_TOOLS_PROMPT_TOKENS = 1000
# How often a copy of account and key is read again that was outdated when the ledger looked.
_STALE_TRIES = 3
# What a typical token takes, for the tokens-per-minute limit; the hold is reckoned with one.
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request with its hold: everything that its settlement needs to know."""

    request_id: UUID
    principal: Principal
    model: Model
    rule: Rule
    published: PublishedBook
    hold_nanos: int
    provider_key: str | None
    # The limit to send in place of the client's: what the balance affords, or the model can say.
    clamped_output: int | None
    prompt_bytes: int
    headers: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def is_byok(self) -> bool:
        """Whether the customer brought the provider's key."""
        return self.provider_key is not None

    def credits_text(self, nanos: int) -> str:
        """An amount of nano-USD as decimal credits."""
        return credits_text(nanos, self.published.nanos_per_credit)


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The settings of the estimate; tokens, and nano-USD for the hold."""

    default_hold_nanos: int
    min_output_tokens: int
    tokens_per_image: int
    tokens_per_audio_clip: int
    tokens_per_file: int
    hold_ttl_s: int


@dataclass(slots=True)
class _Plan:
    """A request as it would be sent: its ceiling and what that is made of; narrowed in place."""

    principal: Principal
    model: Model
    rule: Rule
    published: PublishedBook
    provider_key: str | None
    # What the request's tokens can be.
    classes: frozenset[TokenClass]
    input_tokens: int
    output_limit: int
    price_nanos: int = 0
    is_clamped: bool = False


class Admission:
    """Admits chat requests."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        settler: Settler,
        principals: Principals,
        catalog: Catalog,
        control: LiteLLMControl,
        price_books: PriceBooks,
        limits: AdmissionLimits,
        byok_headers: dict[str, str],
    ) -> None:
        self._ledger = ledger
        self._settler = settler
        self._principals = principals
        self._catalog = catalog
        self._control = control
        self._price_books = price_books
        self._limits = limits
        self._byok_headers = [
            (name, name.lower().encode(), provider) for name, provider in byok_headers.items()
        ]

    async def admit(
        self,
        request_id: UUID,
        virtual_key: str | None,
        principal: Principal,
        request: ChatRequest,
        header: Callable[[bytes], str | None],
    ) -> Admitted:
        """Place a hold for the request or raise the error that says why not.

        `principal` is whose key this is as far as is known; the ledger decides. A hold that was
        placed is the caller's to settle; where this raises there is none, or its void is under way.
        """
        plan = self._plan(principal, request, header)
        authorization = await self._authorize(request_id, plan, request)
        for _ in range(_STALE_TRIES):
            if authorization.outcome != "stale":
                break
            principal = await self._principals.authenticate(virtual_key, fresh=True)
            plan = self._plan(principal, request, header)
            authorization = await self._authorize(request_id, plan, request)
        if authorization.outcome in _SHORT_OF_MONEY:
            await self._narrow(plan, request, authorization)
            authorization = await self._authorize(request_id, plan, request)
        if not authorization.is_held:
            raise self._refused(authorization, plan)
        return _admitted(request_id, plan, request, authorization)

    def _plan(
        self,
        principal: Principal,
        request: ChatRequest,
        header: Callable[[bytes], str | None],
    ) -> _Plan:
        model = self._find_model(principal, request.model)
        provider_key = choose_provider_key(header, self._byok_headers, model.provider)
        published = self._price_books.current
        rule = published.book.select(str(principal.account_id), principal.tier, model.name)
        limits = self._limits
        input_tokens = (
            request.prompt_bytes
            + request.images * limits.tokens_per_image
            + request.audio_clips * limits.tokens_per_audio_clip
            + request.files * limits.tokens_per_file
            + _TOOLS_PROMPT_TOKENS * ("tools" in request.fields)
        )
        if model.max_input_tokens is not None:
            input_tokens = min(input_tokens, model.max_input_tokens)
        plan = _Plan(
            principal=principal,
            model=model,
            rule=rule,
            published=published,
            provider_key=provider_key,
            classes=_classes(request),
            input_tokens=input_tokens,
            output_limit=_output_limit(model, request),
        )
        self._set_price(plan, request)
        return plan

    def _find_model(self, principal: Principal, name: str) -> Model:
        model = self._catalog.get(name)
        if model is None and not self._catalog.is_known:
            msg = "The list of models is not known yet, because the model service is away."
            raise UpstreamUnavailableError(msg, retry_after_s=2)
        if not may_use_model(principal, name):
            msg = f"This API key may not use the model {name!r}. GET /v1/models lists what it may."
            raise PermissionDeniedError(msg, code="model_not_allowed", param="model")
        if model is None:
            msg = f"The model {name!r} does not exist here. GET /v1/models lists those that do."
            raise NotFoundError(msg, code="model_not_found", param="model")
        return model

    def _set_price(self, plan: _Plan, request: ChatRequest) -> None:
        """Reckon the most that the request can be sold for."""
        # Predicted tokens that the model rejects are billed as output, beyond its limit.
        output_tokens = request.n * (plan.output_limit + request.prediction_bytes)
        if plan.provider_key is None:
            plan.price_nanos = ceiling_price(
                plan.rule,
                plan.model.prices,
                plan.input_tokens,
                output_tokens,
                nanos_per_credit=plan.published.nanos_per_credit,
                default_hold_nanos=self._limits.default_hold_nanos,
                classes=plan.classes,
            )
        elif plan.rule.byok_fee_ppm:
            cost_picos = ceiling_cost(
                plan.model.prices, plan.input_tokens, output_tokens, classes=plan.classes
            )
            plan.price_nanos = (
                self._limits.default_hold_nanos
                if cost_picos is None
                else ceil_div(cost_picos * plan.rule.byok_fee_ppm, PICOS_PER_NANO * PPM)
            )

    async def _authorize(
        self, request_id: UUID, plan: _Plan, request: ChatRequest
    ) -> Authorization:
        principal = plan.principal
        hold = HoldRequest(
            account_id=principal.account_id,
            request_id=request_id,
            key_id=principal.key_id,
            version=principal.version,
            amount=plan.price_nanos,
            tokens=plan.input_tokens // _BYTES_PER_TOKEN + (request.output_limit or 0) * request.n,
            ttl_s=self._limits.hold_ttl_s,
            endpoint="chat.completions",
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

    async def _narrow(
        self, plan: _Plan, request: ChatRequest, authorization: Authorization
    ) -> None:
        """Count the prompt exactly and, if the client set no limit, clamp the output to fit."""
        funds = _funds(authorization)
        if plan.model.prices is None or plan.provider_key is not None:
            raise self._refused(authorization, plan)
        plan.input_tokens = await self._count(plan, request)
        self._set_price(plan, request)
        if plan.price_nanos <= funds:
            return
        affordable = self._affordable(plan, request, funds)
        if request.output_limit is not None or affordable < self._limits.min_output_tokens:
            raise self._refused(authorization, plan, affordable)
        plan.output_limit, plan.is_clamped = affordable, True
        self._set_price(plan, request)

    async def _count(self, plan: _Plan, request: ChatRequest) -> int:
        if request.images or request.audio_clips or request.files:
            return plan.input_tokens  # allowances, not text: there is nothing to count exactly
        messages = request.fields["messages"]
        try:
            counted = await self._control.count_tokens(
                plan.model.name, msgspec.json.decode(messages)
            )
        except CONTROL_ERRORS:
            return plan.input_tokens
        # Tools and schemas are tokens as well, and stay bounded by their bytes.
        others = request.prompt_bytes - len(bytes(messages))
        return min(counted + others, plan.input_tokens)

    def _affordable(self, plan: _Plan, request: ChatRequest, funds: int) -> int:
        return affordable_output_tokens(
            plan.rule,
            plan.model.prices,
            plan.input_tokens,
            request.n,
            max(funds, 0),
            plan.published.nanos_per_credit,
            max_output_tokens=plan.output_limit,
            classes=plan.classes,
        )

    def _refused(
        self, authorization: Authorization, plan: _Plan, affordable: int | None = None
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


def _classes(request: ChatRequest) -> frozenset[TokenClass]:
    return possible_classes(
        audio=bool(request.audio_clips) or "audio" in request.modalities,
        images=bool(request.images) or "image" in request.modalities,
    )


def _output_limit(model: Model, request: ChatRequest) -> int:
    """Tokens that each choice may have: the client's limit, within what the model can say."""
    limit = model.max_output_tokens or _UNKNOWN_OUTPUT_LIMIT
    if request.output_limit is None:
        return limit
    if model.max_output_tokens is None:
        return request.output_limit
    return min(request.output_limit, limit)


def _funds(authorization: Authorization) -> int:
    funds = authorization.available_nanos or 0
    if authorization.budget_left_nanos is not None:
        funds = min(funds, authorization.budget_left_nanos)
    return funds


def _short_of_money(
    authorization: Authorization, plan: _Plan, affordable: int | None
) -> InsufficientCreditsError:
    per_credit = plan.published.nanos_per_credit
    funds = _funds(authorization)
    is_budget = authorization.outcome == "budget_exceeded"
    what = "this key's budget has" if is_budget else "the account has"
    message = (
        f"This request can cost up to {credits_text(plan.price_nanos, per_credit)} credits, and "
        f"{what} {credits_text(funds, per_credit)} available."
    )
    if affordable:
        message += f" Set max_tokens to at most {affordable}, or add credits."
    else:
        message += " Raise the budget." if is_budget else " Add credits."
    return InsufficientCreditsError(
        message,
        code="budget_exceeded" if is_budget else None,
        details={
            "balance": _money(funds, per_credit),
            "required": _money(plan.price_nanos, per_credit),
            "affordable": {"max_tokens": affordable or 0},
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


def _admitted(
    request_id: UUID, plan: _Plan, request: ChatRequest, authorization: Authorization
) -> Admitted:
    return Admitted(
        request_id=request_id,
        principal=plan.principal,
        model=plan.model,
        rule=plan.rule,
        published=plan.published,
        hold_nanos=plan.price_nanos,
        provider_key=plan.provider_key,
        # A limit beyond what the model can say is not covered by the hold: it is sent as reckoned.
        clamped_output=plan.output_limit
        if plan.is_clamped or (request.output_limit or 0) > plan.output_limit
        else None,
        prompt_bytes=request.prompt_bytes,
        headers=rate_limit_headers(authorization),
    )
