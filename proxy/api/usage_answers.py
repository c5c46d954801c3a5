"""What the endpoints on sums answer: summaries, statistics, statements and forecasts."""

from datetime import date, datetime
from typing import NotRequired
from uuid import UUID

from typing_extensions import TypedDict

from proxy.api.answers import Balance, Cost, Counts, ExpiringCredits, Money


class Sums(TypedDict):
    """What requests add up to; `failed` are those that ended with an error."""

    requests: int
    failed: int
    usage: Counts
    price: Money


class Group(Sums):
    """The same of a group, with what it was asked to be grouped by."""

    model: NotRequired[str]
    day: NotRequired[date]
    hour: NotRequired[datetime]
    key_id: NotRequired[UUID]
    project_id: NotRequired[UUID | None]
    tier: NotRequired[str]
    endpoint: NotRequired[str]


class AdminSums(Sums):
    """With both sides of the money; BYOK requests cost us nothing. The margin may be negative."""

    cost: Cost
    margin: Cost


class AdminGroup(Group):
    """A group with both sides of the money."""

    cost: Cost
    margin: Cost


class Summary(TypedDict):
    """Groups, the newest first and then the dearest, and their total.

    Requests belong to the hour in which they began; pending ones count when they end.
    """

    since: datetime
    until: datetime
    data: list[Group]
    total: Sums


class AdminSummary(TypedDict):
    """The same with both sides of the money."""

    since: datetime
    until: datetime
    data: list[AdminGroup]
    total: AdminSums


class Business(TypedDict):
    """What requests came to: revenue is what customers were charged."""

    requests: int
    failed: int
    input_tokens: int
    output_tokens: int
    revenue: Money
    cost: Cost
    margin: Cost


class DayBusiness(Business):
    """Of a day of UTC."""

    day: date


class ModelBusiness(Business):
    """Of a model."""

    model: str


class TierBusiness(Business):
    """Of a tier, as it was at the time."""

    tier: str


class FailedCalls(TypedDict):
    """How many calls of an endpoint ended with an error."""

    endpoint: str
    error_code: str
    requests: int


class TierAccounts(TypedDict):
    """Accounts of a tier now: all, those neither suspended nor closed, those with requests."""

    tier: str
    accounts: int
    open: int
    active: int


class HouseStats(TypedDict):
    """The whole house in some days of UTC, both of them included."""

    first_day: date
    last_day: date
    accounts: list[TierAccounts]
    total: Business
    by_day: list[DayBusiness]
    by_model: list[ModelBusiness]
    by_tier: list[TierBusiness]
    failed: list[FailedCalls]


class StatementMonth(TypedDict):
    """A month that has a statement, such as `2026-11`."""

    month: str


class StatementMonths(TypedDict):
    """Months in which something was posted, newest first."""

    data: list[StatementMonth]


class StatementMovement(TypedDict):
    """What entries of a kind came to; what was taken is negative."""

    kind: str
    model: str | None
    entries: int
    amount: Money


class AccountStatement(TypedDict):
    """A month of an account: opening and movements add up to the closing.

    It is `final` when the month is over. Where it is `carried_over`, entries of its beginning are
    of a month that was detached, and are in the opening.
    """

    month: str
    opening: Money
    movements: list[StatementMovement]
    closing: Money
    final: bool
    carried_over: bool


class Pace(TypedDict):
    """What was spent in the last days, and how long that is affordable; null without spending."""

    days: int
    spent: Money
    per_day: Money
    days_left: int | None


class Forecast(TypedDict):
    """How long the available balance lasts at the pace of the last 7 and 30 days."""

    available: Money
    last_7_days: Pace
    last_30_days: Pace


class LowBalance(TypedDict):
    """Below `threshold` the balance is low; null is no threshold. Holds do not count."""

    threshold: Money | None
    is_low: bool


class OwnBalance(Balance):
    """The balance as its customer sees it; `expiring` is what of it expires, the first first."""

    expiring: list[ExpiringCredits]
    low_balance: LowBalance
