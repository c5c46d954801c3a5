"""What pricing can refuse.

    PricingError(ValueError)
      InvalidAmountError       a text or number that is no amount of money that we can hold exactly
      InvalidPriceBookError    a price book that can't be sold by; names the member and the remedy
      CostUnknownError         the provider's cost is not known, and the price depends on it
      UsageUnknownError        the tokens are not known (or contradict themselves), and they matter

The last two are states of a bill, not bugs: the caller turns them into `needs_review`, never
into a price of zero.
"""


class PricingError(ValueError):
    """The root of everything that this package raises for its input."""


class InvalidAmountError(PricingError):
    """Not an amount: malformed, negative, not finite, too precise or out of range."""


class InvalidPriceBookError(PricingError):
    """A price book document that can't be used; `path` is where, `problem` what to do."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class CostUnknownError(PricingError):
    """The price can't be computed without the provider's cost; `reason` is a short slug."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the provider's cost is unknown: {reason}")
        self.reason = reason


class UsageUnknownError(PricingError):
    """The price can't be computed without a usage that makes sense."""
