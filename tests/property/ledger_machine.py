"""The state machine: what Hypothesis may do to a ledger, and how it draws it."""

from collections.abc import Sequence
from math import prod
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.property.ledger_model import Item
from tests.property.ledger_operations import (
    Authorize,
    Extend,
    Fund,
    Note,
    Operation,
    Revoke,
    SetOptions,
    Settle,
    Sweep,
    hold_of,
)
from tests.property.ledger_world import World

_EXPIRED = {"expires_at": "2020-01-01"}
# What each account may owe, and the limits of its keys.
_ACCOUNTS: Sequence[tuple[int, Sequence[Item]]] = (
    (0, ({}, {"requests_per_minute": 3, "max_concurrency": 2}, _EXPIRED)),
    (150, ({"tokens_per_minute": 60}, {"budget": 700, "budget_period": "day"}, _EXPIRED)),
    (0, ({"budget": 900, "max_concurrency": 3}, {"budget": 500, "budget_period": "month"}, {})),
)
_PLAIN: Item = {
    "amount": 1,
    "tokens": 1,
    "ttl_s": 7200,
    "endpoint": "chat.completions",
    "model": "m",
    "tier": "default",
    "streamed": False,
    "byok": False,
    "price_version": 1,
}
# Hours, so that nothing comes due, or ceases to be, while a test runs.
_TTLS = (7200, 7200, 7200, 0, -7200)
_GRACES = st.sampled_from([0, 0, 3600])
_PRIME = 15_485_863
_RARELY = (*[False] * 8, True)
# How far back among the holds that are open, those that were ever placed, all requests.
_BACK = (*range(10), *range(20, 25), *range(30, 32))
# The last of each is nobody's.
_ACCOUNT = (*[0, 1, 2] * 5, 3)
_KEY = (*[0, 1] * 7, 2, 3)


def _one_of_each(**choices: Sequence[Any]) -> st.SearchStrategy[Item]:
    """Draw one number for all: a draw for each would be the slowest part of the test."""
    combinations = prod(map(len, choices.values()))

    def decode(number: int) -> Item:
        # Hypothesis likes small numbers: a large prime spreads them over all the choices.
        number = number * _PRIME % combinations
        item: Item = {}
        for name, values in choices.items():
            number, index = divmod(number, len(values))
            item[name] = values[index]
        return item

    return st.integers(0, combinations - 1).map(decode)


_NEW = _one_of_each(
    amount=(100, 40, 1, 0, 100, 250, 170, 600),
    account=_ACCOUNT,
    key=_KEY,
    ttl_s=_TTLS,
    tokens=(10, 1, 10, 25),
    byok=_RARELY,
    is_stale=_RARELY,
    months_ago=(0, 0, 1),
)
_AGAIN = _one_of_each(back=_BACK, more=(0, 0, 0, 1))
_CAPTURE = _one_of_each(
    back=_BACK,
    price=(30, 100, 1, 0, 120, 250, 900),
    cost_source=("header", "witness"),
    review_reason=(None, None, "cost_mismatch"),
    output_tokens=(4, 0, 40),
)
_VOID = _one_of_each(back=_BACK, is_unknown=(False, True))
_FUNDING = _one_of_each(
    account=_ACCOUNT,
    reference=[f"r{number}" for number in range(20)],
    money=(
        *(("deposit", 500), ("grant", 50), ("refund", 100), ("deposit", 250)),
        *(("adjustment", -700), ("adjustment", 80), ("reversal", -1), ("reversal", -60)),
    ),
)
_BACKS = st.lists(st.sampled_from(_BACK), min_size=1, max_size=5)
_TTL = st.sampled_from(_TTLS)
_Draws = dict[str, tuple[int, st.SearchStrategy[Any]]]
# What may be done, how often in proportion, and how it is drawn.
_ANYTIME: _Draws = {
    "sweep": (2, st.tuples(st.sampled_from([1, 2, 200]), _GRACES)),
    "expire": (1, st.tuples(_BACKS, _GRACES)),
    "fund": (3, _FUNDING),
    "note": (1, st.lists(_one_of_each(back=_BACK, mismatch=(False, True)), min_size=1, max_size=5)),
    "revoke": (1, _one_of_each(account=(0, 1, 2), number=(0, 1))),
    "options": (1, _one_of_each(account=_ACCOUNT, replay_retries=(False, True))),
}
_ALONE: _Draws = {
    "authorize": (8, st.lists(_NEW | _NEW | _NEW | _AGAIN, min_size=1, max_size=8)),
    "settle": (7, st.lists(_CAPTURE | _CAPTURE | _VOID, min_size=1, max_size=8)),
    "extend": (1, st.tuples(_BACKS, _TTL)),
    "replay": (5, st.integers(0, 30)),
    "minute": (1, st.none()),
    "month": (1, st.none()),
    **_ANYTIME,
}
# Several accounts in each batch, so that the batches meet.
_AT_ONCE: _Draws = {
    "authorize": (9, st.lists(_NEW | _NEW | _NEW | _AGAIN, min_size=3, max_size=8)),
    "settle": (9, st.lists(_CAPTURE | _CAPTURE | _VOID, min_size=3, max_size=8)),
    # One, because it leaves out those that are being settled in the moment, each by itself.
    "extend": (1, st.tuples(st.lists(st.sampled_from(_BACK), min_size=1, max_size=1), _TTL)),
    **_ANYTIME,
}


def _any_of(draws: _Draws) -> st.SearchStrategy[tuple[str, Any]]:
    kinds = [kind for kind, (weight, _) in draws.items() for _ in range(weight)]
    return st.sampled_from(kinds).flatmap(lambda kind: st.tuples(st.just(kind), draws[kind][1]))


class LedgerMachine(RuleBasedStateMachine):
    """Does what it is told to a ledger, in PostgreSQL and in the model, and compares."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        world.empty()
        self._accounts = [world.make_account(credit_limit) for credit_limit, _ in _ACCOUNTS]
        self._keys = [
            [world.make_key(account_id, limits) for limits in keys]
            for account_id, (_, keys) in zip(self._accounts, _ACCOUNTS, strict=True)
        ]
        self._nobody = world.new_id()
        # Every request that was ever asked for, as it was first, and every operation but races.
        self._asked: list[Item] = []
        self._done: list[Operation] = []

    def teardown(self) -> None:
        self._world.audit()

    @initialize(amount=st.sampled_from([300, 700, 2000]))
    def pay_in(self, amount: int) -> None:
        for account_id in self._accounts:
            self._world.step(Fund(account_id, self._world.new_id(), "deposit", amount, "first"))

    @rule(draw=_any_of(_ALONE))
    def act(self, draw: tuple[str, Any]) -> None:
        match draw:
            case "minute", _:
                self._world.pass_a_minute()
            case "month", _:
                self._world.pass_a_month()
            case "replay", back:
                if self._done:
                    self._world.step(self._done[-1 - int(back) % len(self._done)])
            case kind, how:
                operation = self._make(kind, how)
                self._world.step(operation)
                self._done.append(operation)

    @rule(first=_any_of(_AT_ONCE), second=_any_of(_AT_ONCE) | st.none(), gated=st.booleans())
    def race(self, first: tuple[str, Any], second: tuple[str, Any] | None, *, gated: bool) -> None:
        """Do two things at once; without a second the first of them twice."""
        kinds = {first[0], (second or first)[0]}
        if kinds == {"sweep", "expire"}:
            return  # nobody could say which of them expired a hold
        if kinds == {"extend"}:
            return  # the second leaves out what the first has locked, and need not count it
        one = self._make(*first)
        other = one if second is None else self._make(*second)
        self._world.step(one, other, gated=gated)

    def _make(self, kind: str, draw: Any) -> Operation:  # noqa: PLR0911 - a table of kinds
        world = self._world
        match kind:
            case "authorize":
                return Authorize([self._request(one) for one in draw])
            case "settle":
                return Settle([self._settlement(one) for one in draw])
            case "sweep":
                return Sweep(*draw)
            case "expire":
                backs, grace_s = draw
                return Settle([self._name(back) | {"action": "expire"} for back in backs], grace_s)
            case "fund":
                account_id, (what, amount) = self._account(draw["account"]), draw["money"]
                return Fund(account_id, world.new_id(), what, amount, draw["reference"])
            case "note":
                noted = {"cost_picos": 7, "attempts": 1}
                return Note([self._name(one["back"]) | noted | one for one in draw])
            case "extend":
                backs, ttl_s = draw
                return Extend([self._name(back) for back in backs], ttl_s)
            case "revoke":
                account: int = draw["account"]
                number: int = draw["number"]
                key_id = self._keys[account][number]
                # The next one has the same limits, so that there is always one to go on with.
                limits = _ACCOUNTS[account][1][number]
                self._keys[account][number] = world.make_key(self._accounts[account], limits)
                return Revoke(self._accounts[account], key_id, world.new_id())
            case _:
                account_id = self._account(draw["account"])
                return SetOptions(account_id, draw["replay_retries"], world.new_id())

    def _account(self, number: int) -> str:
        return [*self._accounts, self._nobody][number]

    def _request(self, draw: Item) -> Item:
        if "back" in draw:
            before = self._back(draw["back"])
            return before | {"amount": before["amount"] + draw["more"]}
        item = self._new(**draw)
        self._asked.append(item)
        return item

    def _new(
        self,
        *,
        account: int,
        key: int = 0,
        is_stale: bool = False,
        months_ago: int = 0,
        **asked: object,
    ) -> Item:
        account_id = self._account(account)
        keys = [*self._keys[account], self._nobody] if account < len(self._keys) else [account_id]
        version = self._world.books.get(account_id, {"version": 2})["version"]
        item = {
            "account_id": account_id,
            "request_id": self._world.new_id(months_ago=months_ago),
            "key_id": keys[key % len(keys)],
            "version": version - is_stale,
        }
        return item | _PLAIN | asked

    def _back(self, back: int) -> Item:
        """One of the requests before, whatever came of it; where there is none, one of nobody's."""
        return self._asked[-1 - back % len(self._asked)] if self._asked else self._new(account=3)

    def _held(self, back: int) -> Item:
        """Most often one that has its hold, sometimes one that had, rarely one that got none."""
        holds = {id(item): hold_of(self._world.books, item) for item in self._asked}
        held = [item for item in self._asked if holds[id(item)]]
        live = [item for item in held if not (holds[id(item)] or {})["end"]]
        among = live if back < 20 else held if back < 30 else []
        return among[-1 - back % len(among)] if among else self._back(back)

    def _name(self, back: int) -> Item:
        item = self._held(back)
        return {"account_id": item["account_id"], "request_id": item["request_id"]}

    def _settlement(self, draw: Item) -> Item:
        item = self._held(draw["back"])
        named = {"account_id": item["account_id"], "request_id": item["request_id"]}
        if "price" not in draw:
            reason = "cost_unknown" if draw["is_unknown"] else None
            status = "needs_review" if draw["is_unknown"] else "void"
            return named | {"action": "void", "status": status, "review_reason": reason}
        # What the audit finds that the price book makes of it.
        priced: Item = {"status": "billed", "markup_ppm": 2_000_000, "cost_picos": 500}
        if item["byok"]:
            priced = {"status": "byok", "markup_ppm": None, "cost_picos": 10_000}
        priced["cost_picos"] *= draw["price"]
        known = {"action": "capture", "input_tokens": 3, "rounding_attos": 0, "rule": "default"}
        return named | known | priced | draw


def machine_on(world: World) -> type[LedgerMachine]:
    """Make the machine that Hypothesis starts anew for every history."""

    class Machine(LedgerMachine):
        def __init__(self) -> None:
            super().__init__(world)

    return Machine
