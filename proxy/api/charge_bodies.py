"""The bodies of charges, and the header that makes them safe to send again."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from proxy.api.bodies import Body, Text, TimeToCome
from proxy.api.operations import Parameter

# Seven days.
MAX_HOLD_S = 7 * 86_400
_DEFAULT_HOLD_S = 3600
_MAX_QUANTITY = 10**12

IDEMPOTENCY_KEY = Parameter(
    name="Idempotency-Key",
    schema={"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    summary="Any text of your own, such as an order number: the same again is not done again.",
)

Action = Annotated[Text, Field(min_length=1, max_length=64)]
Quantity = Annotated[int, Field(ge=1, le=_MAX_QUANTITY)]
Description = Annotated[Text, Field(min_length=1, max_length=500)]
Metadata = Annotated[
    dict[
        Annotated[Text, Field(min_length=1, max_length=64)],
        Annotated[Text, Field(min_length=1, max_length=500)],
    ],
    Field(max_length=16),
]


class NewCharge(Body):
    """POST …/charges: charged at once, or held for `ttl_s` seconds until it is captured."""

    action: Action
    quantity: Quantity = 1
    description: Description | None = None
    metadata: Metadata = Field(default_factory=dict)
    hold: bool = False
    ttl_s: Annotated[int, Field(ge=1, le=MAX_HOLD_S)] | None = None

    @model_validator(mode="after")
    def _only_holds_end(self) -> Self:
        if self.ttl_s is not None and not self.hold:
            msg = "ttl_s is how long a hold stands: send hold as well, or leave it out"
            raise ValueError(msg)
        return self

    @property
    def hold_s(self) -> int | None:
        """For how long it is held; None to capture it at once."""
        return (self.ttl_s or _DEFAULT_HOLD_S) if self.hold else None


class Capture(Body):
    """POST …/capture: all that is held, or less; the rest is given back."""

    quantity: Quantity | None = None


class NewRecurringCharge(Body):
    """POST …/recurring-charges: from `starts_at` (now) on, each period before `ends_at`."""

    action: Action
    quantity: Quantity = 1
    every: Literal["hour", "day", "week", "month"]
    starts_at: TimeToCome | None = None
    ends_at: TimeToCome | None = None
    description: Description | None = None
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> Self:
        if self.starts_at and self.ends_at and self.ends_at <= self.starts_at:
            msg = "ends_at must be later than starts_at"
            raise ValueError(msg)
        return self
