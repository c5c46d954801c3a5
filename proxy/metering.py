"""From what came back to how a request is settled: its cost, where that was read, its price.

The sources of a cost, in order: the provider's as LiteLLM reported it, our own rating of the
reported usage, and otherwise none: then the request needs review. A reported cost of zero says
nothing, because LiteLLM reports it for free and for unpriced models alike; only our own prices
tell the one from the other. Where there are both, they are compared: the reported one is charged,
and a difference beyond the tolerance is put up for review.

Two endpoints differ, because LiteLLM's cost is not made of what the provider says there: of speech
that is sold by the token it leaves out the sound, so it is no cost; of a transcription it measures
the customer's own file, so our rating of what the provider says goes first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from pricing.agreement import agrees
from pricing.errors import PricingError
from pricing.markup import Charge, byok_charge, charge
from pricing.money import PICOS_PER_USD, ceil_div, picos_from_float_text
from pricing.price_book import Markup
from pricing.rating import ModelPrices, is_free, rate
from pricing.usage import OUTPUT_CLASSES, Usage
from proxy.admission import BYTES_PER_TOKEN, Admitted
from proxy.ledger import Settlement
from proxy.metrics import COST_MISMATCHES

# Providers of transcriptions sell whole seconds, and say so many.
_SECOND_MS = 1000


@dataclass(slots=True, kw_only=True)
class Reading:
    """What the relay saw of a request; completed as the answer goes by."""

    # LiteLLM's cost as text, a margin of LiteLLM's own in it, and the place it was read from.
    cost_text: str | None = None
    margin_text: str | None = None
    # The margin as a part of the cost, which streams tell too.
    margin_share_text: str | None = None
    cost_source: str | None = None
    # Which of the deployments behind the name answered.
    deployment_id: str | None = None
    usage: Usage | None = None
    model_answered: str | None = None
    answer_id: str | None = None
    service_tier: str | None = None
    is_cache_hit: bool = False
    upstream_status: int | None = None
    error_code: str | None = None
    # Why the answer is not all there, if it is not: then it has no usage of its own.
    incomplete: str | None = None
    delivered_bytes: int = 0
    client_gone: bool = False
    first_byte_ms: int | None = None
    duration_ms: int | None = None


@dataclass(frozen=True, slots=True)
class MeteringPolicy:
    """The operator's settings.

    `charge_incomplete` is whether a part of an answer is charged by an estimate, else it is void
    and for review; `cost_tolerance_ppm` is how far a reported cost may be from our own rating.
    """

    charge_incomplete: bool
    cost_tolerance_ppm: int


class _Cost(NamedTuple):
    """A cost in picos, where it was read, our own rating of it, and what is wrong with it."""

    picos: int | None = None
    source: str | None = None
    rated_picos: int | None = None
    problem: str | None = None


def read_cost_headers(reading: Reading, headers: Mapping[str, str]) -> None:
    """Take LiteLLM's cost from an answer's headers; a stream has none there, and a decoy."""
    reading.cost_text = headers.get("x-litellm-response-cost")
    reading.margin_text = headers.get("x-litellm-response-cost-margin-amount")
    reading.margin_share_text = headers.get("x-litellm-response-cost-margin-percent")
    reading.cost_source = "header"
    reading.deployment_id = headers.get("x-litellm-model-id")
    # LiteLLM reports a hit in its own cache at the full price, and nobody was paid. Of messages and
    # embeddings it names no key: the cost is missing and its parts are there.
    reading.is_cache_hit = "x-litellm-cache-key" in headers or (
        reading.cost_text is None and bool(_picos(headers.get("x-litellm-response-cost-original")))
    )


def void(admitted: Admitted, reading: Reading) -> Settlement:
    """Settle a request that brought nothing: the hold is given back, nobody has to look at it."""
    return _settlement(admitted, reading, _Cost(), None, None)


def settle(admitted: Admitted, reading: Reading, policy: MeteringPolicy) -> Settlement:
    """Settle a request whose answer was delivered, all of it or a part.

    A part is charged by an estimate if the operator's policy says so; else it is void, for review.
    """
    usage = reading.usage
    if reading.incomplete is not None and usage is None:
        if not policy.charge_incomplete:
            return _settlement(admitted, reading, _Cost(), None, reading.incomplete)
        usage = Usage(
            input_tokens=-(-admitted.request.prompt_bytes // BYTES_PER_TOKEN),
            output_tokens=-(-reading.delivered_bytes // BYTES_PER_TOKEN),
        )
        reading.usage = usage
        reading.cost_source = "estimated"
    if reading.usage is None:
        usage = reading.usage = admitted.endpoint.known_usage(admitted.request)
    cost = _cost(admitted, reading, usage, policy)
    if cost.problem is not None and cost.picos is not None:
        COST_MISMATCHES.labels(admitted.endpoint.name, admitted.model.name).inc()
    try:
        charged = charge_for(admitted, cost.picos, usage)
    except PricingError:
        return _settlement(admitted, reading, cost, None, cost.problem or "price_unknown")
    return _settlement(admitted, reading, cost, charged, cost.problem)


def charge_for(admitted: Admitted, cost_picos: int | None, usage: Usage | None) -> Charge:
    """Price a request; raises PricingError where that takes a cost or a usage that is unknown."""
    per_credit = admitted.published.nanos_per_credit
    if admitted.is_byok:
        return byok_charge(admitted.rule, cost_picos=cost_picos, nanos_per_credit=per_credit)
    return charge(admitted.rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=per_credit)


def _cost(
    admitted: Admitted, reading: Reading, usage: Usage | None, policy: MeteringPolicy
) -> _Cost:
    if reading.is_cache_hit:
        return _Cost(problem="litellm_cache_hit")
    deployment_id = reading.deployment_id
    rated = rated_picos(admitted, reading.service_tier, usage, deployment_id)
    prices = admitted.model.prices_of(deployment_id)
    is_partial = admitted.endpoint.reports_input_cost_only and _sells_output(prices)
    reported = None if is_partial else _reported_picos(reading)
    if reported:  # neither missing nor zero
        # Of a deployment that is not known, our own prices are the dearest of several.
        is_wrong = (
            rated is not None
            and admitted.model.is_priced_exactly(deployment_id)
            and not agrees(reported, rated, policy.cost_tolerance_ppm)
        )
        if is_wrong and admitted.endpoint.reports_measured_cost:
            is_rounded_up = _is_rounded_up(reported, admitted, reading)
            return _Cost(rated, "rated", rated, None if is_rounded_up else "cost_mismatch")
        return _Cost(reported, reading.cost_source, rated, "cost_mismatch" if is_wrong else None)
    if rated is not None:
        source = "estimated" if reading.cost_source == "estimated" else "rated"
        return _Cost(rated, source, rated)
    if is_partial:
        return _Cost(problem="cost_incomplete")
    return _Cost(problem="usage_missing" if usage is None and prices else "price_missing")


def rated_picos(
    admitted: Admitted,
    service_tier: str | None,
    usage: Usage | None,
    deployment_id: str | None = None,
) -> int | None:
    """Rate a usage by LiteLLM's price map; None where usage or a price is missing."""
    prices = admitted.model.prices_of(deployment_id)
    if prices is None:
        return None
    service_tier = service_tier or admitted.request.service_tier
    if usage is None:
        # Whatever it used was free: a moderation tells no usage at all.
        return 0 if is_free(prices) else None
    try:
        return rate(prices.for_service_tier(service_tier), usage)
    except PricingError:
        return None


def _sells_output(prices: ModelPrices | None) -> bool:
    """Whether what is made is sold by the token: LiteLLM never counts the tokens of sound."""
    return prices is not None and bool(prices.dearest(OUTPUT_CLASSES, 0))


def _is_rounded_up(reported: int, admitted: Admitted, reading: Reading) -> bool:
    """Whether the provider's seconds are those of the measured cost, rounded up."""
    usage = reading.usage
    if usage is None or usage.audio_ms % _SECOND_MS or not usage.audio_ms:
        return False
    tier, deployment_id = reading.service_tier, reading.deployment_id
    less = replace(usage, audio_ms=usage.audio_ms - _SECOND_MS)
    least = rated_picos(admitted, tier, less, deployment_id)
    most = rated_picos(admitted, tier, usage, deployment_id)
    return least is not None and most is not None and least < reported < most


def _reported_picos(reading: Reading) -> int | None:
    """LiteLLM's cost, without the margin that it may be set to add: that is nobody's cost."""
    cost = _picos(reading.cost_text)
    if cost is None or reading.margin_text is not None:
        return None if cost is None else max(cost - (_picos(reading.margin_text) or 0), 0)
    share = _picos(reading.margin_share_text) or 0
    return ceil_div(cost * PICOS_PER_USD, PICOS_PER_USD + share)


def _picos(usd: str | None) -> int | None:
    """Read an amount of LiteLLM's; one that is none is as good as not reported."""
    try:
        return None if usd is None else picos_from_float_text(usd)
    except PricingError:
        return None


def _settlement(
    admitted: Admitted,
    reading: Reading,
    cost: _Cost,
    charged: Charge | None,
    review_reason: str | None,
) -> Settlement:
    terms = admitted.rule.terms
    is_markup = isinstance(terms, Markup) and not admitted.is_byok
    if charged is not None:
        status = "byok" if admitted.is_byok else "billed"
    else:
        status = "needs_review" if review_reason is not None else "void"
    return Settlement(
        account_id=admitted.principal.account_id,
        request_id=admitted.request_id,
        action="void" if charged is None else "capture",
        status=status,
        price=None if charged is None else charged.price_nanos,
        rounding_attos=None if charged is None else charged.rounding_attos,
        rule=None if charged is None else charged.rule,
        markup_ppm=terms.factor_ppm if is_markup and isinstance(terms, Markup) else None,
        model_answered=_storable(reading.model_answered),
        answer_id=_storable(reading.answer_id, most=1024),
        service_tier=_storable(reading.service_tier),
        cost_picos=cost.picos,
        rated_picos=cost.rated_picos,
        cost_source=cost.source,
        review_reason=review_reason,
        error_code=reading.error_code,
        upstream_status=reading.upstream_status,
        client_gone=reading.client_gone,
        first_byte_ms=reading.first_byte_ms,
        duration_ms=reading.duration_ms,
        **_tokens(reading.usage),
    )


def _storable(name: str | None, *, most: int = 256) -> str | None:
    """A provider's text in a form that PostgreSQL takes, whatever it is."""
    return None if name is None else name.replace("\x00", "")[:most]


def _tokens(usage: Usage | None) -> dict[str, int]:
    if usage is None:
        return {}
    # Zeros are written out: for a request whose usage is known, an absent class is none, not NULL.
    return usage.counts()
