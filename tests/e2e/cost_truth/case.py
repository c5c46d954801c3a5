"""One line of the table of costs: what is asked, what the provider does, what must come of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tests.support.provider import Reply

# The services that the cases are sent to: one as it comes; one that charges parts of answers and
# waits for the rest of them a moment only; one with a LiteLLM that is set up as it should not be.
Place = Literal["default", "charging", "other"]


class Settled(NamedTuple):
    """How a request must be settled; money in US dollars, as texts that a person reckoned.

    `cost` is what the provider takes, `rated` our own rating of it, `price` what the account pays.
    """

    status: str
    source: str | None
    cost: str | None
    rated: str | None
    price: str | None
    review: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request.

    Attributes:
        what: the case, in the words of the table.
        reckoned: how a person gets from the model's prices to the cost.
        settled: what the ledger must say.
        hangs_up: whether the client leaves in the middle of the answer; "drain" where the rest of
            the answer never comes.
        http_status: what the client hears.
        answered: the model that must be kept as the one that answered, if any must.
        place: the service that the request is sent to.
        times: how often it is sent, the last time counts.
        called: what the provider calls the model, where that differs.
    """

    endpoint: str
    what: str
    model: str
    settled: Settled
    reckoned: str = ""
    streamed: bool = False
    reply: Reply = field(default_factory=Reply)
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    hangs_up: bool | Literal["drain"] = False
    http_status: int = 200
    answered: str | None = None
    place: Place = "default"
    times: int = 1
    called: str | None = None

    @property
    def name(self) -> str:
        """What the test is called."""
        return f"{self.endpoint} {'streamed' if self.streamed else 'whole'}: {self.what}"


def billed(
    cost: str, price: str, *, source: str, rated: str | None = None, review: str | None = None
) -> Settled:
    """Expect a charge; our own rating says the same as the cost unless `rated` is given."""
    return Settled("billed", source, cost, cost if rated is None else rated, price, review)


def free() -> Settled:
    """Expect a charge of nothing, by prices that are nothing."""
    return Settled("billed", "rated", "0", "0", "0")


def review(reason: str) -> Settled:
    """Expect no charge, and a person who has to look."""
    return Settled("needs_review", None, None, None, None, reason)


VOID = Settled("void", None, None, None, None)
