"""What accounts of a tier may do and are given, and what single accounts have otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from pricing.errors import InvalidAmountError
from pricing.money import nanos_from_credits
from proxy.errors import ConfigurationError, InvalidRequestError, TallygateError

# Members that are written in credits and kept in nano-USD under a name of their own.
_AMOUNTS = {
    "monthly_credits": "monthly_nanos",
    "starter_credits": "starter_nanos",
    "max_request_credits": "max_request_nanos",
}


@dataclass(frozen=True, slots=True)
class Tier:
    """The terms of an account, which hold for all of its keys together; None for no limit."""

    allowed_models: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    # The most that a single request may cost.
    max_request_nanos: int | None = None
    # What an account gets each month, to use in it, and once when it is made.
    monthly_nanos: int = 0
    starter_nanos: int = 0
    # The factor of the price book's rule for the tier; it has its effect there.
    markup: str | None = None
    # All tiers in the order of the configuration, from which one that allows more is told.
    offered: Mapping[str, "Tier"] = field(
        default_factory=dict[str, "Tier"], repr=False, compare=False
    )
    # What the account has otherwise: another tier would not change that.
    overridden: frozenset[str] = frozenset()

    def has_model(self, model: str) -> bool:
        """Whether the tier has this model; its patterns are such as gpt-*."""
        patterns = self.allowed_models
        return patterns is None or any(fnmatchcase(model, pattern) for pattern in patterns)

    def tier_with_model(self, model: str) -> str | None:
        """Return the first tier that has this model."""
        return self._first("allowed_models", lambda tier: tier.has_model(model))

    def tier_with_more(self, limit: str, needed: int | None = None) -> str | None:
        """Return the first tier whose limit of this name is higher, and at least `needed`."""
        least = max(getattr(self, limit) + 1, needed or 0)

        def allows(tier: Tier) -> bool:
            allowed = getattr(tier, limit)
            return allowed is None or allowed >= least

        return self._first(limit, allows)

    def _first(self, member: str, allows: Callable[["Tier"], bool]) -> str | None:
        if member in self.overridden:
            return None
        return next((name for name, tier in self.offered.items() if allows(tier)), None)


NO_TERMS = Tier()


class Tiers:
    """The tiers of the configuration, by their names and in its order: the cheapest first."""

    def __init__(
        self,
        documents: Mapping[str, Mapping[str, Any]],
        *,
        default: str,
        nanos_per_credit: int,
    ) -> None:
        """Read tiers as the configuration has them; ConfigurationError names a wrong amount."""
        # What an account has that is made without one; the configuration may say nothing of it.
        self.default = default
        self._nanos_per_credit = nanos_per_credit
        self._tiers: dict[str, Tier] = {}
        for name, document in documents.items():
            try:
                terms = Tier(**self._members(document))
            except InvalidAmountError as error:
                msg = f"tiers.{name} in the configuration is wrong: {error}"
                raise ConfigurationError(msg) from None
            self._tiers[name] = replace(terms, offered=self._tiers)

    @property
    def by_name(self) -> Mapping[str, Tier]:
        """Every tier, in the order of the configuration."""
        return self._tiers

    @property
    def monthly_nanos(self) -> dict[str, int]:
        """What the accounts of each tier get a month, where that is anything."""
        return {
            name: tier.monthly_nanos for name, tier in self._tiers.items() if tier.monthly_nanos
        }

    def of(self, name: str, overrides: Mapping[str, Any]) -> Tier:
        """Return the terms of an account of this tier; a tier that is not known sets none.

        Raises InvalidAmountError for an amount of the overrides that is not a whole number of
        nano-USD.
        """
        tier = self._tiers.get(name) or Tier(offered=self._tiers)
        if not overrides:
            return tier
        members = self._members(overrides)
        return replace(tier, **members, overridden=frozenset(members))

    def check(self, name: str) -> None:
        """Refuse a tier that accounts can't be given: InvalidRequestError.

        Where tiers are configured, a misspelt one would set no limits at all.
        """
        if self._tiers and name not in self._tiers and name != self.default:
            message = f"There is no tier {name!r}. Use one of {', '.join(self._tiers)}."
            raise InvalidRequestError(message, param="tier")

    def _members(self, document: Mapping[str, Any]) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for name, value in document.items():
            if value is None:
                continue
            if name in _AMOUNTS:
                members[_AMOUNTS[name]] = nanos_from_credits(value, self._nanos_per_credit)
            else:
                members[name] = tuple(value) if name == "allowed_models" else value
        return members


def offer(error: TallygateError, tier: str | None) -> None:
    """Say in an error which tier allows what was refused, if there is one."""
    if tier is not None:
        error.message += f" The tier {tier!r} allows it."
        error.details["upgrade"] = {"tier": tier}
