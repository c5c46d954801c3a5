"""What a call would cost, before it is made: the ceiling that it is admitted by, and a guess.

An estimate takes the very body of a call and refuses what the call would be refused for. Nothing
is sent, held or charged.
"""

from dataclasses import dataclass
from uuid import UUID

from pricing.estimate import likely_price
from pricing.usage import Usage
from proxy.accounts import Principal
from proxy.admission import BYTES_PER_TOKEN, Admission
from proxy.endpoints import Endpoint
from proxy.exchange import Exchange
from proxy.intake import Intake
from proxy.ledger import Ledger
from proxy.plan import Plan, Planner
from proxy.reports import Reports

# An answer of a model that this account never called before.
_USUAL_OUTPUT_TOKENS = 500
# Sound is bounded by the leanest codec there is; usual ones take eight times as many bytes.
_USUAL_SOUND_SHARE = 8


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call would cost; nano-USD and tokens.

    `likely_nanos` is None where a price is missing. `output_limit` is the most tokens that each
    answer may have; `clamped_to` what it would be limited to, where the balance does not cover the
    ceiling but a shorter answer; `affordable_tokens` the longest that the balance covers.
    """

    plan: Plan
    is_admitted: bool
    is_byok: bool
    ceiling_nanos: int
    likely_nanos: int | None
    available_nanos: int
    budget_left_nanos: int | None
    input_tokens: int
    likely_input_tokens: int
    output_limit: int
    likely_output_tokens: int
    affordable_tokens: int | None
    clamped_to: int | None


class Estimator:
    """Makes estimates."""

    def __init__(
        self,
        *,
        intake: Intake,
        planner: Planner,
        admission: Admission,
        ledger: Ledger,
        reports: Reports,
    ) -> None:
        self._intake = intake
        self._planner = planner
        self._admission = admission
        self._ledger = ledger
        self._reports = reports

    async def estimate(
        self, exchange: Exchange, principal: Principal, endpoint: Endpoint
    ) -> Estimate:
        """Read a call's body and say what it would cost; raises what the call would raise."""
        asked = await self._intake.read(exchange, endpoint)
        try:
            # No authorization follows that would find an old copy out.
            await self._planner.refresh()
            plan = self._planner.plan(principal, endpoint, asked.request, exchange.header)
        finally:
            asked.close()
        balance = await self._ledger.balance(principal.account_id)
        available = 0 if balance is None else balance.available
        budget_left = await self._reports.budget_left(principal.account_id, principal.key_id)
        funds = available if budget_left is None else min(available, budget_left)
        if principal.terms.max_request_nanos is not None:
            funds = min(funds, principal.terms.max_request_nanos)
        ceiling_nanos, input_tokens = plan.price_nanos, plan.input_tokens
        counted = await self._admission.count(plan)
        affordable = None
        if endpoint.output_limits and plan.provider_key is None and plan.model.prices is not None:
            plan.input_tokens = counted
            affordable = self._planner.affordable(plan, funds)
        likely = await self._likely(principal.account_id, plan, counted)
        fits = ceiling_nanos <= funds
        clamped_to = None
        if not fits and affordable is not None:
            self._planner.set_price(plan)
            fits = plan.price_nanos <= funds
            if not fits and self._admission.may_clamp(plan, affordable):
                fits, clamped_to = True, affordable
        return Estimate(
            plan=plan,
            is_admitted=fits,
            is_byok=plan.provider_key is not None,
            ceiling_nanos=ceiling_nanos,
            likely_nanos=self._price(plan, likely),
            available_nanos=available,
            budget_left_nanos=budget_left,
            input_tokens=input_tokens,
            likely_input_tokens=likely.input_tokens,
            output_limit=plan.output_limit,
            likely_output_tokens=likely.output_tokens,
            affordable_tokens=affordable,
            clamped_to=clamped_to,
        )

    async def _likely(self, account_id: UUID, plan: Plan, counted: int) -> Usage:
        """Guess what a call uses: its prompt, and an answer as this account usually gets them."""
        request = plan.request
        is_exact = counted < plan.request.prompt_bytes
        usual = await self._reports.recent_output_tokens(account_id, plan.model.name)
        wanted = _USUAL_OUTPUT_TOKENS if usual is None else usual
        units = dict(request.units)
        if "audio_ms" in units:
            units["audio_ms"] //= _USUAL_SOUND_SHARE
        return Usage(
            input_tokens=counted if is_exact else -(-counted // BYTES_PER_TOKEN),
            output_tokens=request.n * min(wanted, plan.output_limit),
            **units,
        )

    def _price(self, plan: Plan, usage: Usage) -> int | None:
        if plan.provider_key is not None and not plan.rule.byok_fee_ppm:
            return 0
        return likely_price(
            plan.rule,
            plan.model.prices,
            usage,
            nanos_per_credit=plan.published.nanos_per_credit,
            service_tier=plan.request.service_tier,
        )
