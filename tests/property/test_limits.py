"""Limits of keys, projects and accounts, whenever they are set, against every request counted."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from proxy.ids import uuid7
from tests.integration.money import Money, capture, void

FUNDS = 5000
ACCOUNT_LIMITS = {
    "account_requests_per_minute": 14,
    "account_tokens_per_minute": 180,
    "account_max_concurrency": 8,
}
COUNTERS_BUT_HOLDS = """
    SELECT scope_id, c.holds, c.reserved, h.holds, h.amount
    FROM scope_counters AS c FULL JOIN (
        SELECT s.scope_id, count(*) AS holds, sum(o.amount) AS amount
        FROM open_holds AS o CROSS JOIN unnest(o.scopes) AS s (scope_id)
        WHERE o.account_id = %(account_id)s GROUP BY 1
    ) AS h USING (scope_id)
    WHERE c.account_id = %(account_id)s
        AND (c.holds, c.reserved) IS DISTINCT FROM (coalesce(h.holds, 0), coalesce(h.amount, 0))
"""


@dataclass
class Hold:
    """A request that was admitted, and whose limits it counts in."""

    request: dict[str, Any]
    keys: set[str]
    project: str | None
    amount: int
    tokens: int
    price: int = 0
    is_open: bool = True

    @property
    def taken(self) -> int:
        """What it takes of a budget."""
        return self.amount if self.is_open else self.price


@dataclass
class House:
    """An account in the database, and everything that ever happened to it."""

    money: Money
    has_account_limits: bool
    keys: list[str] = field(default_factory=list[str])
    limits: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    project_of: dict[str, str | None] = field(default_factory=dict[str, str | None])
    budgets: dict[str, int | None] = field(default_factory=dict[str, int | None])
    holds: list[Hold] = field(default_factory=list[Hold])

    def one(self, query: str, *parameters: object) -> Any:
        return self.money.one(query, *parameters)[0]

    def minute(self) -> Any:
        return self.one("SELECT date_trunc('minute', clock_timestamp())")

    def add_key(self) -> None:
        key_id = str(uuid7())
        key = json.dumps({"key_id": key_id, "name": "k", "prefix": "sk-"})
        args = (self.money.account_id, os.urandom(32), key)
        assert self.one("SELECT create_key(%s, %s, %s, 'test')", *args)
        self.keys.append(key_id)
        self.limits[key_id], self.project_of[key_id] = {}, None

    def add_project(self) -> None:
        project_id = str(uuid7())
        args = (self.money.account_id, project_id, json.dumps({"name": "p"}))
        assert self.one("SELECT create_project(%s, %s, %s, 'test')", *args)
        self.budgets[project_id] = None

    # --- what is done ---

    def authorize(self, asked: list[tuple[int, int, int]]) -> None:
        batch: list[dict[str, Any]] = []
        for number, amount, tokens in asked:
            key_id = self.keys[number % len(self.keys)]
            version = self.one("SELECT 1 + version FROM virtual_keys WHERE key_id = %s", key_id)
            account = ACCOUNT_LIMITS if self.has_account_limits else {}
            batch.append(
                self.money.request(amount, key_id=key_id, version=version, tokens=tokens, **account)
            )
        answers = self.money.all(
            "SELECT outcome, available, budget_left FROM authorize_batch(%s)", json.dumps(batch)
        )
        assert answers == [self.foretell(request) for request in batch]

    def settle(self, back: int, price: int | None) -> None:
        live = [hold for hold in self.holds if hold.is_open]
        if not live:
            return
        hold = live[back % len(live)]
        if price is None:
            self.money.settle(void(hold.request))
        else:
            self.money.settle(capture(hold.request, price))
            hold.tokens = 7
        hold.is_open, hold.price = False, price or 0

    def limit_key(self, number: int, changes: dict[str, Any]) -> None:
        key_id = self.keys[number % len(self.keys)]
        self._change("update_key", key_id, changes)
        self.limits[key_id] |= changes

    def limit_project(self, number: int, budget: int | None) -> None:
        project_id = list(self.budgets)[number]
        self._change("update_project", project_id, {"budget": budget})
        self.budgets[project_id] = budget

    def move(self, number: int, to: int | None) -> None:
        key_id = self.keys[number % len(self.keys)]
        project_id = None if to is None else list(self.budgets)[to]
        self._change("update_key", key_id, {"project_id": project_id})
        self.project_of[key_id] = project_id

    def rotate(self, number: int) -> None:
        number %= len(self.keys)
        old, new = self.keys[number], str(uuid7())
        outcome = self.one(
            "SELECT rotate_key(%s, %s, %s, %s, 'sk-', 0, 'test')",
            *(self.money.account_id, old, new, os.urandom(32)),
        )
        assert outcome == "rotated"
        self.keys[number] = new
        self.limits[new], self.project_of[new] = dict(self.limits[old]), self.project_of[old]
        for hold in self.holds:
            if old in hold.keys:
                hold.keys.add(new)

    def _change(self, function: str, its_id: str, changes: dict[str, Any]) -> None:
        outcome = self.one(
            f"SELECT {function}(%s, %s, %s, %s, 'test')",
            *(self.money.account_id, its_id, json.dumps(changes), uuid7()),
        )
        assert outcome == "changed"

    # --- what must come of it ---

    def foretell(self, request: dict[str, Any]) -> tuple[str, int, int | None]:
        """Decide one request by counting all that were ever admitted; the answer's row."""
        key_id, amount, tokens = request["key_id"], request["amount"], request["tokens"]
        project_id, limits = self.project_of[key_id], self.limits[key_id]
        mine = [hold for hold in self.holds if key_id in hold.keys]
        ours = [hold for hold in self.holds if hold.project == project_id]
        budget = limits.get("budget")
        project_budget = None if project_id is None else self.budgets[project_id]

        def is_over(limit: int | None, used: int, more: int) -> bool:
            return limit is not None and used + more > limit

        def left() -> int | None:
            among = [
                limit - sum(hold.taken for hold in holds)
                for limit, holds in ((budget, mine), (project_budget, ours))
                if limit is not None
            ]
            return min(among) if among else None

        account = ACCOUNT_LIMITS if self.has_account_limits else dict.fromkeys(ACCOUNT_LIMITS)
        per_minute, tokens_per_minute, at_once = account.values()
        open_of = [hold for hold in mine if hold.is_open]
        checks = {
            "max_concurrency": is_over(limits.get("max_concurrency"), len(open_of), 1),
            "account_requests_per_minute": is_over(per_minute, len(self.holds), 1),
            "account_tokens_per_minute": is_over(
                tokens_per_minute, sum(hold.tokens for hold in self.holds), tokens
            ),
            "account_max_concurrency": is_over(
                at_once, sum(hold.is_open for hold in self.holds), 1
            ),
            "budget_exceeded": is_over(budget, sum(hold.taken for hold in mine), amount),
            "project_budget_exceeded": is_over(
                project_budget, sum(hold.taken for hold in ours), amount
            ),
            "insufficient_credits": is_over(FUNDS, sum(hold.taken for hold in self.holds), amount),
        }
        outcome = next((name for name, is_so in checks.items() if is_so), "held")
        if outcome == "held":
            hold = Hold(request, {key_id}, project_id, amount, tokens)
            for holds in (self.holds, mine, ours):
                holds.append(hold)
        available = FUNDS - sum(hold.taken for hold in self.holds)
        return outcome, available, left()


_AMOUNT = st.sampled_from([1, 40, 100, 250, 900])
_NUMBER = st.integers(0, 2)
_LIMITS: dict[str, st.SearchStrategy[int | None]] = {
    "budget": st.sampled_from([None, 300, 1000]),
    "max_concurrency": st.sampled_from([None, 2, 4]),
}
_STEPS: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    "authorize": st.tuples(
        st.lists(st.tuples(_NUMBER, _AMOUNT, st.sampled_from([1, 10, 30])), min_size=1, max_size=5)
    ),
    "settle": st.tuples(st.integers(0, 9), st.sampled_from([None, 0, 30, 100, 400])),
    "limit_key": st.tuples(_NUMBER, st.fixed_dictionaries({}, optional=_LIMITS)),
    "limit_project": st.tuples(st.integers(0, 1), st.sampled_from([None, 200, 700])),
    "move": st.tuples(_NUMBER, st.sampled_from([None, 0, 1])),
    "rotate": st.tuples(_NUMBER),
}
_OFTEN = ("authorize", "authorize", "settle", "settle", *_STEPS)
_STEP = st.sampled_from(_OFTEN).flatmap(lambda name: st.tuples(st.just(name), _STEPS[name]))


@pytest.fixture
def new_house(database_url: str) -> Iterator[Callable[[bool], House]]:
    """Make accounts on one connection, two keys and two projects each."""
    money = Money(database_url)

    def make(has_account_limits: bool) -> House:  # noqa: FBT001
        money.account_id = uuid7()
        args = (money.account_id,)
        money.one("SELECT create_account(%s, 'a', 'default', 0, 'test')", *args)
        money.fund(FUNDS)
        house = House(money, has_account_limits)
        for _ in range(2):
            house.add_key()
            house.add_project()
        return house

    yield make
    money.connection.close()


@settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(has_account_limits=st.booleans(), steps=st.lists(_STEP, min_size=3, max_size=14))
def test_limits_hold_from_the_moment_they_are_set(
    new_house: Callable[[bool], House],
    has_account_limits: bool,  # noqa: FBT001
    steps: list[tuple[str, tuple[Any, ...]]],
) -> None:
    house = new_house(has_account_limits)
    minute = house.minute()
    for name, arguments in steps:
        note(f"{name} {arguments}")
        try:
            getattr(house, name)(*arguments)
        except AssertionError:
            # The minute has ended, and with it what its limits had counted.
            if has_account_limits and house.minute() != minute:
                return
            raise
        differences = house.money.connection.execute(
            COUNTERS_BUT_HOLDS.encode(), {"account_id": house.money.account_id}
        ).fetchall()
        assert differences == [], name
