"""From what came back to how a request is settled: its cost, where that was read, its price.

The sources of a cost, in order: the provider's as LiteLLM reported it, our own rating of the
reported usage, and otherwise none: then the request needs review. A reported cost of zero says
nothing, because LiteLLM reports it for free and for unpriced models alike; only our own prices
tell the one from the other.
"""

from dataclasses import dataclass, field

from pricing.errors import PricingError
from pricing.markup import Charge, byok_charge, charge
from pricing.money import picos_from_usd
from pricing.price_book import Markup
from pricing.rating import rate
from pricing.usage import Usage
from proxy.admission import Admitted
from proxy.ledger import Settlement

# The usual length of a token, for an answer that was cut before its usage came.
_BYTES_PER_TOKEN = 4


@dataclass(slots=True, kw_only=True)
class Reading:
    """What the relay saw of a request; completed as the answer goes by."""

    # LiteLLM's cost as text, and the name of the place it was read from.
    cost_text: str | None = None
    cost_source: str | None = None
    usage: Usage | None = None
    model_answered: str | None = None
    upstream_status: int | None = None
    error_code: str | None = None
    # Why the answer is not all there, if it is not: then it has no usage of its own.
    incomplete: str | None = None
    delivered_bytes: int = 0
    client_gone: bool = False
    first_byte_ms: int | None = None
    duration_ms: int | None = None


@dataclass(frozen=True, slots=True)
class _Cost:
    picos: int | None
    source: str | None
    problem: str | None = field(default=None)


def void(admitted: Admitted, reading: Reading) -> Settlement:
    """Settle a request that brought nothing: the hold is given back, nobody has to look at it."""
    return _settlement(admitted, reading, _Cost(None, None), None, None)


def settle(admitted: Admitted, reading: Reading, *, charge_incomplete: bool) -> Settlement:
    """Settle a request whose answer was delivered, all of it or a part.

    A part is charged by an estimate if the operator's policy says so; else it is void, for review.
    """
    usage = reading.usage
    if reading.incomplete is not None and usage is None:
        if not charge_incomplete:
            return _settlement(admitted, reading, _Cost(None, None), None, reading.incomplete)
        usage = Usage(
            input_tokens=-(-admitted.prompt_bytes // _BYTES_PER_TOKEN),
            output_tokens=-(-reading.delivered_bytes // _BYTES_PER_TOKEN),
        )
        reading.usage = usage
        reading.cost_source = "estimated"
    cost = _cost(admitted, reading, usage)
    try:
        charged = _charge(admitted, cost.picos, usage)
    except PricingError:
        return _settlement(admitted, reading, cost, None, cost.problem or "price_unknown")
    return _settlement(admitted, reading, cost, charged, None)


def _charge(admitted: Admitted, cost_picos: int | None, usage: Usage | None) -> Charge:
    per_credit = admitted.published.nanos_per_credit
    if admitted.is_byok:
        return byok_charge(admitted.rule, cost_picos=cost_picos, nanos_per_credit=per_credit)
    return charge(admitted.rule, cost_picos=cost_picos, usage=usage, nanos_per_credit=per_credit)


def _cost(admitted: Admitted, reading: Reading, usage: Usage | None) -> _Cost:
    reported = _reported_picos(reading.cost_text)
    if reported:  # neither missing nor zero
        return _Cost(reported, reading.cost_source)
    if usage is None:
        return _Cost(None, None, "usage_missing")
    if admitted.model.prices is None:
        return _Cost(None, None, "price_missing")
    try:
        rated = rate(admitted.model.prices, usage)
    except PricingError:
        return _Cost(None, None, "price_missing")
    source = "estimated" if reading.cost_source == "estimated" else "rated"
    return _Cost(rated, source)


def _reported_picos(text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return picos_from_usd(text)
    except PricingError:
        return None  # as good as not reported: our own rating decides


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
        cost_picos=cost.picos,
        cost_source=cost.source,
        review_reason=review_reason,
        error_code=reading.error_code,
        upstream_status=reading.upstream_status,
        client_gone=reading.client_gone,
        first_byte_ms=reading.first_byte_ms,
        duration_ms=reading.duration_ms,
        **_tokens(reading.usage),
    )


def _storable(name: str | None) -> str | None:
    """A provider's text in a form that PostgreSQL takes, whatever it is."""
    return None if name is None else name.replace("\x00", "")[:256]


def _tokens(usage: Usage | None) -> dict[str, int]:
    if usage is None:
        return {}
    # Zeros are written out: for a request whose usage is known, an absent class is none, not NULL.
    return {name: getattr(usage, name) for name in Usage.__slots__}
