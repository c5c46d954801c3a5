"""What a request can cost at most, and by which prices: reckoned before it is sent anywhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pricing.estimate import (
    affordable_output_tokens,
    ceiling_cost,
    ceiling_price,
    possible_classes,
)
from pricing.money import PICOS_PER_NANO, PPM, ceil_div
from pricing.price_book import Rule
from pricing.usage import TokenClass
from proxy.accounts import Principal
from proxy.byok import choose_provider_key
from proxy.catalog import Catalog, Model
from proxy.endpoints import Endpoint
from proxy.errors import (
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UpstreamUnavailableError,
)
from proxy.price_books import PriceBooks, PublishedBook
from proxy.principals import check_model, may_use_endpoint
from proxy.switches import Switches
from proxy.wire.request import Request

# A model of which nobody says how long its answers, or its prompts, can be.
_UNKNOWN_OUTPUT_LIMIT = 16_384
_UNKNOWN_CONTEXT_WINDOW = 1_000_000
_PRICED_APART = frozenset({"flex", "priority"})
# Providers put some hundred tokens of their own into the prompt of a request with tools.
_TOOLS_PROMPT_TOKENS = 1000
# By whether a request has sound, and pictures.
_CLASSES = {
    (audio, images): possible_classes(audio=audio, images=images)
    for audio in (False, True)
    for images in (False, True)
}


@dataclass(frozen=True, slots=True)
class Allowances:
    """The settings of the estimate; tokens, and nano-USD for the hold."""

    default_hold_nanos: int
    tokens_per_image: int
    tokens_per_audio_clip: int
    tokens_per_file: int


@dataclass(slots=True)
class Plan:
    """A request as it would be sent: its ceiling and what that is made of; narrowed in place."""

    principal: Principal
    endpoint: Endpoint
    request: Request
    model: Model
    rule: Rule
    published: PublishedBook
    provider_key: str | None
    # What the request's tokens can be.
    classes: frozenset[TokenClass]
    input_tokens: int
    output_limit: int
    # Of the switches by which the model is on.
    models_version: int
    price_nanos: int = 0
    is_clamped: bool = False

    @property
    def may_be_clamped(self) -> bool:
        """Whether the client left the length of the answer to the model, and we can limit it."""
        request = self.request
        return (
            bool(self.endpoint.output_limits)
            and request.output_limit is None
            and request.output_allowance is None
        )

    @property
    def sent_output_limit(self) -> int | None:
        """The limit to send in place of the client's; a longer one is not covered by the hold."""
        is_beyond = (self.request.output_limit or 0) > self.output_limit
        return self.output_limit if self.is_clamped or is_beyond else None


class Planner:
    """Reckons what requests can cost."""

    def __init__(
        self,
        catalog: Catalog,
        switches: Switches,
        price_books: PriceBooks,
        allowances: Allowances,
        byok_headers: Mapping[str, str],
    ) -> None:
        self._catalog = catalog
        self._switches = switches
        self._price_books = price_books
        self._allowances = allowances
        self._byok_headers = [
            (name, name.lower().encode(), provider) for name, provider in byok_headers.items()
        ]

    def plan(
        self,
        principal: Principal,
        endpoint: Endpoint,
        request: Request,
        header: Callable[[bytes], str | None],
    ) -> Plan:
        """Find model, rule and ceiling; raises what the customer hears where that can't be."""
        if principal.allowed_endpoints is not None:
            check_endpoint(principal, endpoint)
        model = self._find_model(principal, request.model)
        switched = self._switches.current
        if switched.switches:
            switched.check(model.name, model.providers)
        provider_key = choose_provider_key(header, self._byok_headers, model.provider)
        if provider_key is not None and not endpoint.takes_provider_key:
            raise InvalidRequestError(
                f"A provider's key can't be used for {endpoint.path}: leave its header out, and "
                "the call is paid with credits.",
                code="provider_key_not_supported",
            )
        _check_tier(model, request.service_tier)
        published = self._price_books.current
        plan = Plan(
            principal=principal,
            endpoint=endpoint,
            request=request,
            model=model,
            rule=published.book.select(principal.account_text, principal.tier, model.name),
            published=published,
            provider_key=provider_key,
            classes=_CLASSES[request.has_audio, request.has_images],
            input_tokens=self._input_tokens(model, request),
            output_limit=_output_limit(model, request),
            models_version=switched.version,
        )
        self.set_price(plan)
        return plan

    async def refresh(self) -> None:
        """Learn which models are off; MeteringUnavailableError where the database is away."""
        await self._switches.refresh()

    def set_price(self, plan: Plan) -> None:
        """Reckon the most that the request can be sold for."""
        request = plan.request
        # Predicted tokens that the model rejects are billed as output, beyond its limit.
        output_tokens = request.n * (plan.output_limit + request.prediction_bytes)
        if plan.provider_key is None:
            plan.price_nanos = ceiling_price(
                plan.rule,
                plan.model.prices,
                plan.input_tokens,
                output_tokens,
                nanos_per_credit=plan.published.nanos_per_credit,
                default_hold_nanos=self._allowances.default_hold_nanos,
                classes=plan.classes,
                units=request.units,
                service_tier=request.service_tier,
            )
        elif plan.rule.byok_fee_ppm:
            cost_picos = ceiling_cost(
                plan.model.prices,
                plan.input_tokens,
                output_tokens,
                classes=plan.classes,
                units=request.units,
                service_tier=request.service_tier,
            )
            plan.price_nanos = (
                self._allowances.default_hold_nanos
                if cost_picos is None
                else ceil_div(cost_picos * plan.rule.byok_fee_ppm, PICOS_PER_NANO * PPM)
            )

    def affordable(self, plan: Plan, funds: int) -> int:
        """Return the most tokens that each answer may have for the price to be at most `funds`."""
        return affordable_output_tokens(
            plan.rule,
            plan.model.prices,
            plan.input_tokens,
            plan.request.n,
            max(funds, 0),
            plan.published.nanos_per_credit,
            max_output_tokens=plan.output_limit,
            classes=plan.classes,
            units=plan.request.units,
            service_tier=plan.request.service_tier,
        )

    def _find_model(self, principal: Principal, name: str) -> Model:
        model = self._catalog.get(name)
        if model is None and not self._catalog.is_known:
            msg = "The list of models is not known yet, because the model service is away."
            raise UpstreamUnavailableError(msg, retry_after_s=2)
        if principal.allowed_models is not None or principal.terms.allowed_models is not None:
            check_model(principal, name, is_known=model is not None)
        if model is None:
            msg = f"The model {name!r} does not exist here. GET /v1/models lists those that do."
            raise NotFoundError(msg, code="model_not_found", param="model")
        return model

    def _input_tokens(self, model: Model, request: Request) -> int:
        if request.continues is not None:
            # What was said before counts again, and nothing here tells how much that was.
            return model.max_input_tokens or _UNKNOWN_CONTEXT_WINDOW
        allowances = self._allowances
        tokens = (
            request.prompt_bytes
            + request.images * allowances.tokens_per_image
            + request.audio_clips * allowances.tokens_per_audio_clip
            + request.files * allowances.tokens_per_file
            + _TOOLS_PROMPT_TOKENS * ("tools" in request.fields)
        )
        if model.max_input_tokens is not None and not request.is_batch:
            tokens = min(tokens, model.max_input_tokens)
        return tokens


def check_endpoint(principal: Principal, endpoint: Endpoint) -> None:
    """Refuse what the key may not be used for: PermissionDeniedError."""
    if not may_use_endpoint(principal, endpoint.name):
        msg = (
            f"This API key may not be used for {endpoint.path}. Use another key, or add "
            f"{endpoint.name!r} to its allowed_endpoints."
        )
        raise PermissionDeniedError(msg, code="endpoint_not_allowed")


def _check_tier(model: Model, service_tier: str | None) -> None:
    """Refuse a tier whose prices are not known: its ceiling would be another tier's."""
    if service_tier in _PRICED_APART and (
        model.prices is None or service_tier not in model.prices.service_tiers
    ):
        raise InvalidRequestError(
            f"The model {model.name!r} is not offered in the service tier {service_tier!r}.",
            code="unsupported_parameter",
            param="service_tier",
        )


def _output_limit(model: Model, request: Request) -> int:
    """Tokens that each answer may have: the client's limit, within what the model can say."""
    if request.output_allowance is not None:
        return request.output_allowance
    limit = model.max_output_tokens or _UNKNOWN_OUTPUT_LIMIT
    if request.output_limit is None:
        return limit
    if model.max_output_tokens is None:
        return request.output_limit
    return min(request.output_limit, limit)
