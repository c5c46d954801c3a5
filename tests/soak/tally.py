"""What was tried, and what came of it, in words that a page can hold."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

# In the words of the functions of schema.sql; everything else that it answers is a refusal.
_DONE = frozenset(
    {
        *("held", "exists", "duplicate", "already_settled"),
        *("captured", "voided", "expired", "captured_late", "amended"),
        *("already_captured", "already_voided", "already_expired", "not_due"),
        *("posted", "noted", "True"),
    }
)
_FUNCTIONS = {
    "Authorize": "authorize_batch",
    "Settle": "settle_batch",
    "Fund": "fund",
    "Sweep": "expire_holds",
    "Extend": "extend_holds",
    "Note": "note_witness",
    "Revoke": "revoke_key",
    "SetOptions": "set_account_options",
}


@dataclass
class Tally:
    """Counts of one process, or of several together."""

    # How often which function answered what, an item of a batch each.
    answers: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    calls: int = 0
    # Calls that ran at the same time as another one.
    raced: int = 0
    # Each began with empty accounts and ended with an audit.
    histories: int = 0
    failure: str | None = None

    @property
    def items(self) -> int:
        """How many operations: each item of a batch is one."""
        return self.answers.total()

    def rows(self) -> list[tuple[str, int, int, str]]:
        """For each function: its name, operations, refusals, and what it answered how often."""
        rows: list[tuple[str, int, int, str]] = []
        for operation, function in _FUNCTIONS.items():
            found = Counter(
                {said: count for (of, said), count in self.answers.items() if of == operation}
            )
            if operation in {"Sweep", "Extend"}:  # they answer a number: how many holds it was
                holds = sum(int(said) * count for said, count in found.items())
                rows.append((function, found.total(), 0, f"{holds:,} holds"))
                continue
            refused = sum(count for said, count in found.items() if said not in _DONE)
            told = ", ".join(f"{_word(said)} {count:,}" for said, count in found.most_common())
            rows.append((function, found.total(), refused, told))
        return rows


def together(tallies: Iterable[Tally]) -> Tally:
    """Add tallies up; the first failure stands for all."""
    whole = Tally()
    for one in tallies:
        whole.answers.update(one.answers)
        whole.calls += one.calls
        whole.raced += one.raced
        whole.histories += one.histories
        whole.failure = whole.failure or one.failure
    return whole


def sentence(tally: Tally, *, seconds: int, seed: int) -> str:
    """The whole run in a line."""
    found = "0 differences" if tally.failure is None else "A DIFFERENCE"
    return (
        f"soak: {seconds} s, seed {seed}: {tally.items:,} operations in {tally.calls:,} calls "
        f"({tally.items / seconds:,.0f} a second), {tally.raced:,} of them two at once, "
        f"{tally.histories:,} histories audited, {found}"
    )


def page(tally: Tally, *, seconds: int, seed: int) -> str:
    """The same, with the table, for a page."""
    lines = [
        f"Run of {datetime.now(UTC):%Y-%m-%d}. **{sentence(tally, seconds=seconds, seed=seed)}.**",
        "",
        "| function | operations | refused | what it answered |",
        "|---|--:|--:|---|",
        *(
            f"| `{function}` | {tried:,} | {refused:,} | {told} |"
            for function, tried, refused, told in tally.rows()
        ),
    ]
    return "\n".join(lines)


def _word(said: str) -> str:
    return {"True": "done", "False": "unknown"}.get(said, said)
