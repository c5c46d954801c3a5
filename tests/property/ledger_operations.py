"""What can be done to the ledger: each operation runs on PostgreSQL, and the model foretells it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import psycopg

from tests.property import ledger_model as model
from tests.property.ledger_model import Item

Connection = psycopg.Connection[tuple[Any, ...]]
Books = dict[str, Item]
Answer = list[tuple[Any, ...]]
# Whoever is not in the books has no keys and no holds.
NOBODY: Item = {"credit_limit": 0, "version": 0, "keys": {}, "funding": {}, "holds": {}}


class Operation(Protocol):
    """Something that is done in one statement."""

    def run(self, connection: Connection) -> Answer:
        """Do it on PostgreSQL."""
        ...

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        """Do it in the model. `expired` are the holds that sweepers chose, in their order."""
        ...


def name(item: Item) -> tuple[str, str]:
    return item["account_id"], item["request_id"]


def hold_of(books: Books, item: Item) -> Item | None:
    return books.get(item["account_id"], NOBODY)["holds"].get(item["request_id"])


def balance(a: Item) -> tuple[int, int, int]:
    """posted, reserved, credit limit."""
    reserved = sum(h["amount"] for h in a["holds"].values() if not h["end"])
    return (model.available(a) - a["credit_limit"] + reserved, reserved, a["credit_limit"])


@dataclass(frozen=True)
class Authorize:
    batch: Sequence[Item]

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT outcome, available, requests_limit, requests_left, tokens_limit, tokens_left,"
            " budget_left FROM authorize_batch(%s)",
            (json.dumps(self.batch),),
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del expired
        names = [name(item) for item in self.batch]
        known = {name(item) for item in self.batch if hold_of(books, item)}
        answer: Answer = []
        for number, item in enumerate(self.batch):
            a = books.get(item["account_id"], NOBODY)
            is_repeat = names[number] in names[:number] and names[number] not in known
            outcome = model.authorize(a, item, now, is_repeat=is_repeat)
            available = None if a is NOBODY else model.available(a)
            answer.append((outcome, available, *self._left(a, item["key_id"], now)))
        return answer

    @staticmethod
    def _left(a: Item, key_id: str, now: datetime) -> list[int | None]:
        if key_id not in a["keys"]:
            return [None] * 5
        used: Item = dict(zip(model.LIMITS, model.used(a, key_id, now), strict=True))
        limits: Item = {limit: a["keys"][key_id].get(limit) for limit in model.LIMITS}
        left = {limit: None if of is None else of - used[limit] for limit, of in limits.items()}
        per_minute = [table[limit] for limit in model.LIMITS[:2] for table in (limits, left)]
        return [*per_minute, left["budget_exceeded"]]


@dataclass(frozen=True)
class Settle:
    batch: Sequence[Item]
    grace_s: int = 0

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT outcome, overdraft FROM settle_batch(%s, %s) ORDER BY ord",
            (json.dumps(self.batch), self.grace_s),
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del expired
        names = [name(item) for item in self.batch]

        # What ends a hold is posted before what only corrects one that has ended.
        def is_late(number: int) -> bool:
            hold = hold_of(books, self.batch[number])
            return names[number] in names[:number] or hold is None or bool(hold["end"])

        answers = {
            number: model.settle(
                books.get(names[number][0], NOBODY), self.batch[number], now, self.grace_s
            )
            for number in sorted(range(len(names)), key=is_late)
        }
        return [answers[number] for number in range(len(names))]


@dataclass(frozen=True)
class Sweep:
    limit: int
    grace_s: int

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT expire_holds(%s, %s)", (self.limit, self.grace_s)
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        """What it chose must have been due; how many it had to choose is the caller's to know."""
        chosen, expired[:] = expired[: self.limit], expired[self.limit :]
        outcomes = Settle(chosen, self.grace_s).foretell(books, now, [])
        return [(outcomes.count(("expired", 0)),)]

    def due(self, books: Books) -> int:
        """How many holds it has to expire, if nothing else happens."""
        holds = [h for a in books.values() for h in a["holds"].values()]
        due = [h for h in holds if not h["end"] and h["ttl_s"] + self.grace_s <= 0]
        return min(self.limit, len(due))


@dataclass(frozen=True)
class Extend:
    batch: Sequence[Item]
    ttl_s: int

    def run(self, connection: Connection) -> Answer:
        accounts, requests = ([*column] for column in zip(*map(name, self.batch), strict=True))
        return connection.execute(
            "SELECT extend_holds(%s::uuid[], %s::uuid[], %s)", (accounts, requests, self.ttl_s)
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del now, expired
        holds = {name(item): hold_of(books, item) for item in self.batch}
        live = [hold for hold in holds.values() if hold is not None and not hold["end"]]
        for hold in live:
            hold["ttl_s"] = self.ttl_s
        return [(len(live),)]


@dataclass(frozen=True)
class Fund:
    account_id: str
    entry_id: str
    kind: str
    amount: int
    reference: str

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT outcome, posted, reserved, credit_limit"
            " FROM fund(%s, %s, %s, %s, 'test', %s, 'why', 'tester')",
            (self.account_id, self.entry_id, self.kind, self.amount, self.reference),
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del now, expired
        a = books.get(self.account_id)
        if a is None:
            return [("unknown_account", None, None, None)]
        outcome = model.fund(a, self.kind, self.amount, self.reference)
        return [(outcome, *balance(a))]


@dataclass(frozen=True)
class Note:
    batch: Sequence[Item]

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT outcome FROM note_witness(%s) ORDER BY ord", (json.dumps(self.batch),)
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del now, expired
        for item in {name(item): item for item in self.batch}.values():  # the later one counts
            hold = hold_of(books, item)
            if hold is not None and hold["end"]:
                model.note(hold, mismatch=item["mismatch"])
        ended = [bool((hold_of(books, item) or {"end": ""})["end"]) for item in self.batch]
        return [("noted" if is_known else "unknown",) for is_known in ended]


@dataclass(frozen=True)
class Revoke:
    account_id: str
    key_id: str
    event_id: str

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT revoke_key(%s, %s, %s, 'tester')", (self.account_id, self.key_id, self.event_id)
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del now, expired
        key = books.get(self.account_id, NOBODY)["keys"].get(self.key_id)
        if key is not None:
            key["refusal"] = "key_revoked"
        return [(key is not None,)]


@dataclass(frozen=True)
class SetOptions:
    account_id: str
    replay_retries: bool
    event_id: str

    def run(self, connection: Connection) -> Answer:
        return connection.execute(
            "SELECT set_account_options(%s, %s, %s, 'tester')",
            (self.account_id, self.replay_retries, self.event_id),
        ).fetchall()

    def foretell(self, books: Books, now: datetime, expired: list[Item]) -> Answer:
        del now, expired
        a = books.get(self.account_id)
        if a is not None:
            a["version"] += a["replay_retries"] != self.replay_retries
            a["replay_retries"] = self.replay_retries
        return [(a is not None,)]
