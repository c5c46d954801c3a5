"""One PostgreSQL database and the model of it: every operation is done in both, and compared."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import permutations, product
from math import inf
from typing import Any
from uuid import UUID

import psycopg

from proxy.audit import audit
from proxy.ids import uuid7
from tests.property.ledger_model import Item
from tests.property.ledger_operations import (
    Answer,
    Books,
    Connection,
    Operation,
    Sweep,
    balance,
    hold_of,
)

# Twice the cost; a tenth of it where the customer brings a key.
PRICE_BOOK = {"default": {"kind": "markup", "factor": "2.0", "byok_fee_percent": "10"}}
# How the model knows whether two instants are of one budget period.
PERIODS = {"day": "%F", "month": "%Y-%m", "total": "always"}
State = dict[str, Any]


class TimeIsUp(BaseException):
    """The history ends here. Not an Exception: it is no finding that Hypothesis should explain."""


class World:
    """Connections to a database, which is emptied for each run of the machine."""

    def __init__(self, url: str, *, until: float = inf) -> None:
        self.url = url
        self.books: Books = {}
        # How often which operation had which outcome, an item of a batch each.
        self.answers = Counter[tuple[str, str]]()
        self.calls = self.raced = self.histories = 0
        # Where no difference was found until this time of the wall's clock, it is enough.
        self._until = until
        self._is_untouched = True
        self._ids = 0
        self._threads = ThreadPoolExecutor(2)
        self._admin = _connect(url)
        # Holds locks for a moment, so that what is done at once piles up behind them.
        self._gate = _connect(url)
        self._lanes = [_connect(url) for _ in range(2)]
        self._pids = [lane.info.backend_pid for lane in self._lanes]
        self._admin.execute(
            "SELECT publish_price_book(%s, 1000000, %s, 'test')", (json.dumps(PRICE_BOOK), uuid7())
        )
        for lane in self._lanes:
            lane.execute("SET ROLE tallygate_app")

    def close(self) -> None:
        self._threads.shutdown()
        for connection in (self._admin, self._gate, *self._lanes):
            connection.close()

    # ---------------------------------------------------------------------------------------------
    # What the operations find
    # ---------------------------------------------------------------------------------------------

    def empty(self) -> None:
        """Forget every account."""
        # Whoever may switch the triggers off may delete; TRUNCATE takes thirty times as long.
        self._admin.execute("SET session_replication_role = replica")
        self._admin.execute(
            "DELETE FROM entries; DELETE FROM usage; DELETE FROM open_holds; DELETE FROM balances;"
            " DELETE FROM accounts; DELETE FROM virtual_keys; DELETE FROM scope_counters;"
            " DELETE FROM funding; DELETE FROM audit_trail"
        )
        self._admin.execute("RESET session_replication_role")
        self.books, self._ids, self._is_untouched = {}, 0, True

    def new_id(self, *, months_ago: int = 0) -> str:
        """Make a uuidv7 of this month, or of an earlier one: the same one in each run."""
        self._ids += 1
        at = datetime.now(UTC).replace(day=2, hour=0, minute=0, second=0, microsecond=0)
        milliseconds = int((at - timedelta(days=28 * months_ago)).timestamp() * 1000)
        return str(UUID(int=milliseconds << 80 | 0x7 << 76 | 0x2 << 62 | self._ids))

    def make_account(self, credit_limit: int) -> str:
        account_id = self.new_id()
        self._admin.execute(
            "SELECT create_account(%s, 'a', 'default', %s, 'test')", (account_id, credit_limit)
        )
        self.books[account_id] = {
            "credit_limit": credit_limit,
            # The key's is counted in: it changes only when the key is revoked, and refused anyway.
            "version": 2,
            "replay_retries": True,
            "keys": {},
            "funding": {},
            "holds": {},
        }
        return account_id

    def make_key(self, account_id: str, limits: Item) -> str:
        key_id = self.new_id()
        key = {"key_id": key_id, "name": "k", "prefix": "sk-", **limits}
        self._admin.execute(
            "SELECT create_key(%s, %s, %s, 'test')",
            (account_id, sha256(key_id.encode()).digest(), json.dumps(key)),
        )
        known = {"budget_exceeded" if name == "budget" else name: limits[name] for name in limits}
        self.books[account_id]["keys"][key_id] = {
            **known,
            "refusal": "key_expired" if "expires_at" in limits else None,
            "period": PERIODS[limits.get("budget_period", "total")],
        }
        return key_id

    def pass_a_minute(self) -> None:
        """Make everything a minute older, as far as limits of a minute go."""
        self._admin.execute("UPDATE scope_counters SET minute = minute - interval '1 minute'")
        self._admin.execute("UPDATE open_holds SET minute = minute - interval '1 minute'")
        for hold in self._holds():
            hold["at"] -= timedelta(minutes=1)

    def pass_a_month(self) -> None:
        """Make everything a month older, as far as budgets go."""
        self._admin.execute(
            "UPDATE scope_counters AS c SET period = c.period - interval '1 month'"
            " FROM virtual_keys AS k WHERE c.scope_id = k.key_id AND k.budget_period <> 'total'"
        )
        for hold in self._holds():
            hold["settled"] -= timedelta(days=31)

    def _holds(self) -> Iterable[Item]:
        return (hold for a in self.books.values() for hold in a["holds"].values())

    # ---------------------------------------------------------------------------------------------
    # Doing and comparing
    # ---------------------------------------------------------------------------------------------

    def step(self, *operations: Operation, gated: bool = False) -> None:
        """Do one operation, or two at once, and hold that some order of them explains all of it.

        `gated` lets both begin before either can lock anything.
        """
        if time.time() > self._until:
            raise TimeIsUp
        self._is_untouched = False
        due = [one.due(self.books) for one in operations if isinstance(one, Sweep)]
        began = datetime.now(UTC)
        answers = self._run(operations, gated=gated)
        moments = {f"{now:%F %R}": now for now in (began, datetime.now(UTC))}.values()
        found = self._state()
        if len(operations) == 1 and due:
            assert answers == [[(due[0],)]], f"{due[0]} holds were due, not {answers[0]}"
        explanations = [
            self._foretell(operations, order, times, found)
            for order in permutations(range(len(operations)))
            # Where the clock struck meanwhile, either minute may be meant.
            for times in product(moments, repeat=len(operations))
        ]
        for books, foretold in explanations:
            if foretold == answers and _expected(books) == found:
                self.books = books
                break
        else:
            self._until = inf
            raise AssertionError(_difference(operations, answers, found, *explanations[0]))
        for operation, answer in zip(operations, answers, strict=True):
            self.answers.update((type(operation).__name__, str(row[0])) for row in answer)
        self.calls += len(operations)
        self.raced += len(operations) if len(operations) > 1 else 0

    def _run(self, operations: Sequence[Operation], *, gated: bool) -> list[Answer]:
        if len(operations) == 1:
            return [operations[0].run(self._lanes[0])]
        running: list[Future[Answer]] = []
        with self._gate.transaction() if gated else nullcontext():
            if gated:
                self._gate.execute("SELECT FROM balances ORDER BY account_id FOR NO KEY UPDATE")
            for operation, lane in zip(operations, self._lanes, strict=True):
                running.append(self._threads.submit(operation.run, lane))
                while gated and self._waiting() < sum(not one.done() for one in running):
                    pass
        return [one.result() for one in running]

    def _waiting(self) -> int:
        ((waiting,),) = self._admin.execute(
            "SELECT count(*) FROM unnest(%s::integer[]) AS l (pid)"
            " WHERE cardinality(pg_blocking_pids(l.pid)) > 0",
            (self._pids,),
        ).fetchall()
        return waiting

    def _foretell(
        self,
        operations: Sequence[Operation],
        order: Sequence[int],
        times: Sequence[datetime],
        found: State,
    ) -> tuple[Books, list[Answer]]:
        books = _copy(self.books)
        chosen = [
            {"account_id": account_id, "request_id": request_id, "action": "expire"}
            for account_id, kind, request_id, *_ in found["entries"]
            if kind == "expire"
        ]
        new = [item for item in chosen if not (hold_of(books, item) or {"end": ""})["end"]]
        answers = {n: operations[n].foretell(books, times[n], new) for n in order}
        return books, [answers[n] for n in range(len(operations))]

    def _state(self) -> State:
        """What the database says, with nothing in it that the model does not know."""
        all_of = self._admin.execute
        entries = all_of(
            "SELECT account_id::text, kind, coalesce(reference, request_id::text), seq,"
            " posted_delta, reserved_delta, posted_after, reserved_after"
            " FROM entries ORDER BY account_id, seq"
        ).fetchall()
        _assert_chain(entries)
        return {
            "balances": {
                row[0]: row[1:]
                for row in all_of(
                    "SELECT account_id::text, posted, reserved, credit_limit, overdraft, seq"
                    " FROM balances"
                )
            },
            "holds": {
                row[0]: row[1:]
                for row in all_of(
                    "SELECT (account_id::text, request_id::text), key_id::text, amount, tokens"
                    " FROM open_holds"
                )
            },
            "entries": sorted((*row[:3], *row[4:6]) for row in entries),
            "usage": {
                row[0]: row[1:]
                for row in all_of(
                    "SELECT (account_id::text, request_id::text), status, review_reason, price,"
                    " overdraft FROM usage"
                )
            },
        }

    def audit(self) -> None:
        """Hold that the audit finds nothing in what was done since the last time."""
        if self._is_untouched:
            return
        self.histories += 1
        findings = [found for found in audit(self.url) if found.violations]
        assert not findings, findings


def _connect(url: str) -> Connection:
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("SET search_path = tallygate, pg_temp")
    return connection


def _copy(books: Books) -> Books:
    return {
        account_id: a
        | {name: {key: dict(one) for key, one in a[name].items()} for name in ("keys", "holds")}
        | {"funding": dict(a["funding"])}
        for account_id, a in books.items()
    }


def _assert_chain(entries: Iterable[tuple[Any, ...]]) -> None:
    """Hold that each account's entries are numbered 1, 2, 3 … and add up one by one."""
    after: dict[str, tuple[int, int, int]] = {}
    for account_id, _, _, seq, posted, reserved, posted_after, reserved_after in entries:
        number, was_posted, was_reserved = after.get(account_id, (0, 0, 0))
        assert (seq, posted_after, reserved_after) == (
            number + 1,
            was_posted + posted,
            was_reserved + reserved,
        ), (account_id, seq)
        after[account_id] = (seq, posted_after, reserved_after)


def _expected(books: Books) -> State:
    """What the database must say if the model is right."""
    every = [(name, a, hold) for name, a in books.items() for hold in a["holds"].values()]
    entries: list[tuple[Any, ...]] = []
    for account_id, _, hold in every:
        of, amount, end = hold["request_id"], hold["amount"], hold["end"]
        entries.append((account_id, "hold", of, 0, amount))
        if end:
            charged = 0 if hold["late"] else -hold["price"]
            entries.append((account_id, end, of, charged, -amount))
            if hold["late"]:
                entries.append((account_id, "late_capture", of, -hold["price"], 0))
    for account_id, a in books.items():
        for reference, (kind, amount) in a["funding"].items():
            entries.append((account_id, kind, reference, amount, 0))
    numbers = Counter(entry[0] for entry in entries)
    return {
        "balances": {
            account_id: (*balance(a), max(0, -_available(a)), numbers[account_id])
            for account_id, a in books.items()
        },
        "holds": {
            (account_id, hold["request_id"]): (hold["key_id"], hold["amount"], hold["tokens"])
            for account_id, _, hold in every
            if not hold["end"]
        },
        "entries": sorted(entries),
        "usage": {
            (account_id, hold["request_id"]): (
                hold["status"],
                hold["reason"],
                hold["price"] if hold["late"] or hold["end"] == "capture" else None,
                hold["overdraft"],
            )
            for account_id, _, hold in every
            if hold["end"]
        },
    }


def _available(a: Item) -> int:
    posted, reserved, credit_limit = balance(a)
    return posted - reserved + credit_limit


def _difference(
    operations: Sequence[Operation],
    answers: Sequence[Answer],
    found: State,
    books: Books,
    foretold: Sequence[Answer],
) -> str:
    """What a person needs to see where PostgreSQL and the model part."""
    lines = ["PostgreSQL and the model differ."]
    for operation, answer, wanted in zip(operations, answers, foretold, strict=True):
        lines += [f"did        {operation}", f"PostgreSQL {answer}", f"model      {wanted}"]
    for part, wanted in _expected(books).items():
        if found[part] != wanted:
            lines += [f"{part} in PostgreSQL {found[part]}", f"{part} in the model {wanted}"]
    return "\n".join(lines)
