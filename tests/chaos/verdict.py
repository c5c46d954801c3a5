"""The judge: what customers and provider wrote down, held against the ledger row by row.

It shares no code with what it judges, but for the audit: prices are worked out anew from what the
provider says that each answer cost, and balances from what was paid in.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row

from proxy.audit import audit
from tests.chaos.accounts import Account
from tests.chaos.journal import Reader
from tests.chaos.script import answer_id, price_nanos

_CHARGED = frozenset({"billed", "byok"})
# How many of a kind are told one by one.
_EXAMPLES = 5
Row = Mapping[str, Any]

_USAGE: LiteralString = """
SELECT request_id::text, account_id, status, price, review_reason, error_code, overdraft, answer_id
FROM usage
"""
# An admission beyond what was left.
_OVERSPENT: LiteralString = """
SELECT e.request_id, e.amount, e.posted_after - e.reserved_after + b.credit_limit AS left_over
FROM entries AS e INNER JOIN balances AS b USING (account_id)
WHERE e.kind = 'hold' AND e.amount > 0 AND e.posted_after - e.reserved_after + b.credit_limit < 0
"""
# What was taken for a request, in one entry or several, is not what its row says.
_TAKEN: LiteralString = """
SELECT u.request_id, u.price, sum(-e.posted_delta) AS taken
FROM usage AS u INNER JOIN entries AS e USING (account_id, request_id)
GROUP BY u.account_id, u.request_id, u.price
HAVING
    sum(-e.posted_delta) <> coalesce(u.price, 0)
    OR count(*) FILTER (WHERE e.kind IN ('capture', 'late_capture')) > 1
"""


@dataclass
class Verdict:
    """What was found; every list of failings must be empty."""

    acknowledged: int = 0
    # Answers that came whole and have no charge, nor a reason for none.
    lost: list[str] = field(default_factory=list[str])
    # Charges for which there is no answer, or more than one for the same.
    doubled: list[str] = field(default_factory=list[str])
    # Holds or charges beyond what an account had.
    overspent: list[str] = field(default_factory=list[str])
    # Whatever else does not agree.
    wrong: list[str] = field(default_factory=list[str])
    # What became of requests: as customers saw it, and as the ledger has it.
    told: Counter[str] = field(default_factory=Counter[str])
    rows: Counter[str] = field(default_factory=Counter[str])

    @property
    def failings(self) -> list[str]:
        """All of them."""
        return [*self.lost, *self.doubled, *self.overspent, *self.wrong]

    def add(self, other: "Verdict") -> None:
        """Take another's findings in."""
        self.acknowledged += other.acknowledged
        self.lost += other.lost
        self.doubled += other.doubled
        self.overspent += other.overspent
        self.wrong += other.wrong
        self.told += other.told
        self.rows += other.rows


@dataclass
class Judge:
    """Judges a ledger again and again; each failing is reported once."""

    database: str
    accounts: Sequence[Account]
    provider: Path
    spools: Sequence[Path]

    def __post_init__(self) -> None:
        self._provider = Reader(self.provider)
        self._usage: dict[str, Row] = {}
        # What the provider says: of each answer its cost, and which requests reached it.
        self._cost_of_answer: dict[str, int] = {}
        self._reached: set[str] = set()
        self._reported: set[str] = set()

    def judge(self, journals: Iterable[Path]) -> Verdict:
        """Judge what is in these journals of customers, with no hold open and nothing spooled."""
        verdict = Verdict()
        with (
            psycopg.connect(self.database) as connection,
            connection.cursor(row_factory=dict_row) as cursor,
        ):
            cursor.execute("SET search_path = tallygate")
            new = self._read(cursor)
            for path in journals:
                for told in Reader(path):
                    self._judge_told(told, verdict)
            for row in new:
                self._judge_row(row, verdict)
            self._judge_answers(verdict)
            self._judge_books(cursor, verdict)
        self._judge_spools(verdict)
        for failings in (verdict.lost, verdict.doubled, verdict.overspent, verdict.wrong):
            failings[:] = [each for each in failings if each not in self._reported]
            self._reported |= set(failings)
        return verdict

    def _read(self, cursor: psycopg.Cursor[dict[str, Any]]) -> Sequence[Row]:
        """Read everything; returns the rows that are new or were completed since the last look."""
        for record in self._provider:
            if record["event"] == "begun":
                self._cost_of_answer[answer_id(record["nonce"])] = record["cost"]
                if record["id"]:
                    self._reached.add(record["id"])
        rows = cursor.execute(_USAGE).fetchall()
        # By no column of time: clocks are among what goes wrong.
        new = [row for row in rows if self._usage.get(row["request_id"]) != row]
        self._usage = {row["request_id"]: row for row in rows}
        return new

    def _judge_told(self, told: Row, verdict: Verdict) -> None:
        """Hold what one customer was told against the ledger."""
        request_id = told["replay_of"] or told["id"]
        row = self._usage.get(request_id or "")
        name = f"{told['kind']} {told['nonce']} as {request_id}"
        verdict.told[_ending(told)] += 1
        if not told["whole"]:
            if told["status"] not in {None, 200} and row is not None and row["status"] in _CHARGED:
                verdict.doubled.append(f"{name}: refused with {told['status']}, and charged")
            return
        verdict.acknowledged += 1
        if row is None:
            verdict.lost.append(f"{name}: answered, and there is no row of it")
        elif row["status"] not in _CHARGED:
            # The answer to an Idempotency-Key is kept before it is charged. If the charge was then
            # lost with its process, whoever comes again gets the answer, and somebody has to look.
            if told["replay_of"] is None or row["review_reason"] != "orphaned":
                reason = row["review_reason"] or row["error_code"]
                verdict.lost.append(f"{name}: answered, and {row['status']} ({reason})")
        elif (told["kind"] == "byok") != (row["status"] == "byok"):
            verdict.wrong.append(f"{name}: answered, and {row['status']}")
        elif told["charge"] not in {None, row["price"]}:
            verdict.wrong.append(f"{name}: told {told['charge']}, charged {row['price']}")

    def _judge_row(self, row: Row, verdict: Verdict) -> None:
        """Hold one row of usage against what the provider says."""
        request_id, status = row["request_id"], row["status"]
        reason = row["review_reason"] or row["error_code"]
        verdict.rows[f"{status}, {reason}" if reason else status] += 1
        if status not in _CHARGED:
            if reason is None:
                verdict.lost.append(f"{request_id}: {status} without a reason")
            return
        cost = self._cost_of_answer.get(row["answer_id"])
        if cost is None:
            verdict.doubled.append(f"{request_id}: {status}, and the provider knows nothing of it")
        elif row["price"] != (0 if status == "byok" else price_nanos(cost)):
            verdict.wrong.append(f"{request_id}: cost {cost} picos, charged {row['price']}")

    def _judge_answers(self, verdict: Verdict) -> None:
        """Look at all of what the provider was asked."""
        charged: dict[str, list[str]] = defaultdict(list)
        for row in self._usage.values():
            if row["status"] in _CHARGED:
                charged[row["answer_id"]].append(row["request_id"])
        # A customer asks for each answer once, or several times under one Idempotency-Key.
        verdict.doubled += [
            f"{answer}: charged as {' and '.join(sorted(requests))}"
            for answer, requests in charged.items()
            if len(requests) > 1
        ]
        verdict.lost += [
            f"{request_id}: reached the provider, and there is no row of it"
            for request_id in self._reached - self._usage.keys()
        ]

    def _judge_books(self, cursor: psycopg.Cursor[dict[str, Any]], verdict: Verdict) -> None:
        """Look at the ledger by itself."""
        verdict.wrong += [
            f"audit: {finding.name}: {finding.violations}, such as {finding.rows[:_EXAMPLES]}"
            for finding in audit(self.database)
            if finding.violations
        ]
        verdict.overspent += [
            f"{row['request_id']}: held {row['amount']}, which left {row['left_over']}"
            for row in cursor.execute(_OVERSPENT)
        ]
        verdict.doubled += [
            f"{row['request_id']}: taken {row['taken']}, its row says {row['price']}"
            for row in cursor.execute(_TAKEN)
        ]
        for row in cursor.execute("SELECT request_id FROM open_holds"):
            verdict.wrong.append(f"{row['request_id']}: its hold is left")
        accounts = {account.account_id: account for account in self.accounts}
        for row in cursor.execute("SELECT * FROM balances"):
            self._judge_balance(row, accounts[row["account_id"]], verdict)

    def _judge_balance(self, balance: Row, account: Account, verdict: Verdict) -> None:
        own = [row for row in self._usage.values() if row["account_id"] == account.account_id]
        left = account.funded - sum(row["price"] or 0 for row in own)
        name = f"account {account.name}"
        if balance["posted"] != left:
            verdict.wrong.append(f"{name}: has {balance['posted']}, must have {left}")
        if balance["reserved"] != 0:
            verdict.wrong.append(f"{name}: {balance['reserved']} are held for nobody")
        below = -(balance["posted"] - balance["reserved"] + account.credit_limit)
        # Only an answer whose hold had been given up may take what is not there, and says so.
        if below > sum(row["overdraft"] for row in own):
            verdict.overspent.append(f"{name}: {below} below its limit")

    def _judge_spools(self, verdict: Verdict) -> None:
        for spool in self.spools:
            for left in (*spool.glob("rejected.jsonl"), *spool.glob("*.corrupt")):
                verdict.wrong.append(f"{left}: set aside")


def _ending(told: Row) -> str:
    if told["whole"]:
        return "answered again" if told["replay_of"] else "answered"
    if told["status"] is None:
        return "no answer"
    if told["error"] == "aborted":
        return "hung up"
    return "answer cut" if told["status"] == 200 else f"refused with {told['status']}"
