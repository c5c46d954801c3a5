"""Credits that expire are used first and expire to the last nano, whatever else happens."""

import ast
import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.audit import audit, audit_increment
from tests.integration.money import Money, capture, void

Item = dict[str, Any]


class Model:
    """An account as a person would keep it: a pile of credits for each grant, and the rest.

    A pile is [when it expires, how much is in it].
    """

    def __init__(self) -> None:
        self.piles: list[list[float]] = []
        self.rest = 0
        self.held: dict[str, int] = {}
        self.expired = 0

    def open(self) -> list[list[float]]:
        return sorted(pile for pile in self.piles if pile[1] > 0)

    def spend(self, amount: int) -> None:
        for pile in self.open():
            taken = min(pile[1], amount)
            pile[1] -= taken
            amount -= int(taken)
        self.rest -= amount

    def grant(self, amount: int, in_s: float) -> None:
        debt = min(amount, max(0, -self.rest))
        self.rest += debt
        self.piles.append([in_s, amount - debt])

    def take_back(self, amount: int) -> None:
        if amount <= self.posted() - sum(self.held.values()):
            beyond = max(0, amount - max(0, self.rest))
            self.rest -= amount - beyond
            self.spend(beyond)

    def expire(self) -> None:
        held = sum(self.held.values())
        for pile in self.open():
            covered = min(pile[1], held)
            held -= int(covered)
            if pile[0] <= 0:
                self.expired += int(pile[1] - covered)
                pile[1] = covered

    def pass_time(self, seconds: float) -> None:
        for pile in self.piles:
            pile[0] -= seconds

    def posted(self) -> int:
        return self.rest + int(sum(pile[1] for pile in self.piles))


AMOUNT = st.integers(1, 100)
NONE = st.just(0)
GRANT = st.tuples(st.just("grant"), AMOUNT, st.integers(1, 5))
STEP = st.one_of(
    GRANT,
    st.tuples(st.just("deposit"), AMOUNT, NONE),
    st.tuples(st.just("spend"), AMOUNT, st.integers(0, 50)),
    st.tuples(st.just("hold"), AMOUNT, NONE),
    st.tuples(st.just("capture"), st.integers(0, 150), st.integers(0, 9)),
    st.tuples(st.just("void"), NONE, st.integers(0, 9)),
    st.tuples(st.just("take_back"), AMOUNT, NONE),
    st.tuples(st.just("pass_time"), st.integers(1, 3), NONE),
    st.tuples(st.just("expire"), st.integers(0, 3), NONE),
)
STEPS = st.tuples(st.lists(GRANT, max_size=3), st.lists(STEP, min_size=8, max_size=30)).map(
    lambda both: [*both[0], *both[1]]
)
# A debt that a grant pays stays paid, whatever comes after.
DEBT = [("deposit", 10, 0), ("spend", 10, 20), ("grant", 50, 1), ("deposit", 30, 0)]
HOUR_S = 3600


class World:
    """The same on PostgreSQL, an hour for each second of the model."""

    def __init__(self, money: Money) -> None:
        self.money = money
        self.model = Model()
        self.holds: list[Item] = []
        self.names = 0

    def step(self, what: str, amount: int, other: int) -> None:
        self.names += 1
        getattr(self, what)(amount, other)

    def grant(self, amount: int, hours: int) -> None:
        # A minute apart, so that no two expire at once: which is first would be the ids' to say.
        in_s = hours * HOUR_S + self.names * 60
        self.money.fund_expiring(amount, str(self.names), in_s)
        self.model.grant(amount, in_s)

    def deposit(self, amount: int, _: int) -> None:
        self.money.fund(amount, str(self.names), "deposit")
        self.model.rest += amount

    def take_back(self, amount: int, _: int) -> None:
        self.money.fund(-amount, str(self.names), "adjustment")
        # An operator sees what is left, and it is written down before anything else is posted.
        self.money.all("SELECT 1 FROM (SELECT allocate_credits(%s)) AS a", self.money.account_id)
        self.model.take_back(amount)

    def hold(self, amount: int, _: int) -> None:
        request = self.money.request(amount)
        available = self.model.posted() - sum(self.model.held.values())
        assert (self.money.authorize(request) == ["held"]) == (amount <= available)
        if amount <= available:
            self.holds.append(request)
            self.model.held[str(request["request_id"])] = amount

    def capture(self, price: int, number: int) -> None:
        if self.holds:
            request = self.holds.pop(number % len(self.holds))
            self.money.settle(capture(request, price))
            del self.model.held[str(request["request_id"])]
            self.model.spend(price)

    def spend(self, amount: int, beyond: int) -> None:
        """A request that costs more than it was thought to cost at most."""
        before = len(self.holds)
        self.hold(amount, 0)
        if len(self.holds) > before:
            self.capture(amount + beyond, before)

    def void(self, _: int, number: int) -> None:
        if self.holds:
            request = self.holds.pop(number % len(self.holds))
            self.money.settle(void(request))
            del self.model.held[str(request["request_id"])]

    def pass_time(self, hours: int, _: int) -> None:
        self.money.connection.execute(
            "UPDATE expiring_credits SET expires_at = expires_at - make_interval(hours => %s),"
            " due_at = expires_at - make_interval(hours => %s) WHERE account_id = %s",
            (hours, hours, self.money.account_id),
        )
        self.model.pass_time(hours * HOUR_S)

    def expire(self, hours: int, _: int) -> None:
        self.pass_time(hours, 0)
        self.money.one("SELECT expire_credits(1000)")
        self.model.expire()

    def check(self) -> None:
        left = self.money.all(
            "SELECT remaining FROM expiring_credits_left(%s) WHERE remaining > 0",
            self.money.account_id,
        )
        assert [row[0] for row in left] == [pile[1] for pile in self.model.open()]
        posted, reserved, _ = self.money.balance()
        assert (posted, reserved) == (self.model.posted(), sum(self.model.held.values()))
        assert self.money.one(
            "SELECT coalesce(sum(expired), 0) FROM expiring_credits WHERE account_id = %s",
            self.money.account_id,
        ) == (self.model.expired,)


@contextmanager
def an_account(url: str) -> Generator[Money]:
    money = Money(url)
    try:
        yield money
    finally:
        money.connection.close()


def test_credits_are_used_and_expire_as_the_model_says(database_url: str) -> None:
    books = '{"default": {"kind": "markup", "factor": "2"}}'
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "SELECT tallygate.publish_price_book(%s, 1000000, gen_random_uuid(), 'test')", (books,)
        )

    @settings(max_examples=80)
    @given(STEPS)
    @example(DEBT)
    def check(steps: list[tuple[str, int, int]]) -> None:
        with an_account(database_url) as money:
            world = World(money)
            for step in steps:
                world.step(*step)
                world.check()
            assert [f for f in audit_increment(database_url).findings if f.violations] == []

    check()
    assert [finding for finding in audit(database_url) if finding.violations] == []


def test_model_can_be_read_at_a_glance() -> None:
    text = inspect.getsource(Model)
    ((*_, body),) = [ast.parse(text).body]
    assert isinstance(body, ast.ClassDef)
    assert len([line for line in text.splitlines() if line.strip()]) <= 60
