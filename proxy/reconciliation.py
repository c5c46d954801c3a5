"""What a provider says that a period cost, compared with what our usage says; nothing is changed.

Where the export names requests they are matched by id: LiteLLM's call id is our request id, the
provider's is the id of the answer. What is matched counts under our day and model on both sides,
so that neither midnight nor an alias makes a difference of it. Everything else, and all of an
export that is summed up already, is compared by model and UTC day.

The export's requests wait in a temporary file and our rows are streamed past them: memory holds one
sum for each model and day, and no more.
"""

import fnmatch
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal, LiteralString
from uuid import UUID

import psycopg
from psycopg import IsolationLevel
from psycopg.rows import DictRow, dict_row
from psycopg.types.json import Jsonb

from pricing.money import PPM
from proxy.exports import ExportError, Line
from proxy.ids import uuid7

# A request is in the provider's books a little before or after it is in ours.
_MARGIN = timedelta(hours=2)
_STREAMED_ROWS = 2000
_MAX_GROUPS = 200_000
_ACTOR = "cli"
_SUFFIX = re.compile(r"[-@](?:20\d{2}-\d{2}-\d{2}|20\d{6})$")

Key = tuple[date, str | None]

# A failed request is in it where it cost something, or where its id is on the other side.
_OURS: LiteralString = """
    SELECT
        account_id, request_id, answer_id, created_at, model, model_answered, byok,
        status <> 'void' OR resolution IS NOT NULL OR cost_picos > 0 OR witness_picos > 0 AS counts,
        input_tokens, output_tokens, coalesce(cost_picos, witness_picos) AS cost_picos
    FROM usage
    WHERE request_id >= uuid_floor(%s) AND request_id < uuid_floor(%s)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared, and how far apart both sides may be.

    `models` are patterns of names on our side, none being all; `renamed` says what we call a model
    of theirs. A difference counts beyond `tolerance_picos` and `tolerance_ppm` of the larger side.
    """

    first_day: date | None = None
    last_day: date | None = None
    models: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict[str, str])
    # Requests on the customers' own keys stand in LiteLLM's logs, and on no invoice of ours.
    with_byok: bool = False
    # LiteLLM's logs have the name that was asked for, an invoice the one that answered.
    by_asked_model: bool = False
    tolerance_ppm: int = 10_000
    tolerance_picos: int = 10_000_000_000


@dataclass(slots=True)
class Side:
    """What one side says of a model on a day."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_picos: int = 0
    # Requests of ours whose cost nobody knows.
    unknown_costs: int = 0

    def add(self, other: "Side") -> None:
        """Add another one up."""
        self.requests += other.requests
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cost_picos += other.cost_picos
        self.unknown_costs += other.unknown_costs


@dataclass(slots=True)
class Group:
    """Both sides of a model on a day."""

    ours: Side = field(default_factory=Side)
    theirs: Side = field(default_factory=Side)


@dataclass(frozen=True, slots=True)
class Difference:
    """A request that both sides know and price differently, or that one does not know."""

    request_id: str
    day: date
    model: str | None
    ours_picos: int | None
    theirs_picos: int | None


Kind = Literal["differs", "only_ours", "only_theirs"]
Note = Callable[[Kind, Difference], None]


@dataclass(slots=True)
class Told:
    """What an export has at all."""

    costs: bool = False
    tokens: bool = False
    requests: bool = False
    models: bool = False
    ids: bool = False

    def note(self, line: Line) -> None:
        """Look at a line."""
        self.costs |= line.cost_picos is not None
        self.tokens |= (line.input_tokens, line.output_tokens) != (None, None)
        self.requests |= line.requests is not None
        self.models |= line.model is not None
        self.ids |= line.request_id is not None


@dataclass(slots=True)
class Result:
    """What a comparison found. `only_ours` and `only_theirs` are counts of ids."""

    first_day: date
    last_day: date
    told: Told
    lines: int
    outside_period: int
    groups: dict[Key, Group]
    matched: int = 0
    differing: int = 0
    differing_picos: int = 0
    only_ours: int = 0
    only_theirs: int = 0

    @property
    def total(self) -> Group:
        """Everything summed up."""
        total = Group()
        for group in self.groups.values():
            total.ours.add(group.ours)
            total.theirs.add(group.theirs)
        return total

    @property
    def drift_picos(self) -> int | None:
        """Their cost less ours; None where they told none."""
        total = self.total
        return total.theirs.cost_picos - total.ours.cost_picos if self.told.costs else None

    def is_group_within(self, group: Group, comparison: Comparison) -> bool:
        """Whether both sides of a group say the same, by their best measure."""
        ours, theirs = group.ours, group.theirs
        if self.told.costs:
            return _is_within(ours.cost_picos, theirs.cost_picos, comparison)
        floorless = replace(comparison, tolerance_picos=0)
        if self.told.tokens:
            return _is_within(
                ours.input_tokens + ours.output_tokens,
                theirs.input_tokens + theirs.output_tokens,
                floorless,
            )
        return _is_within(ours.requests, theirs.requests, floorless)

    def is_within(self, comparison: Comparison) -> bool:
        """Whether nothing is beyond the tolerance: no group, nor the matched requests together.

        Differences of opposite signs add up here, which a group's sum does not show.
        """
        theirs = self.total.theirs.cost_picos
        allowed = max(comparison.tolerance_picos, abs(theirs) * comparison.tolerance_ppm // PPM)
        return self.differing_picos <= allowed and all(
            self.is_group_within(group, comparison) for group in self.groups.values()
        )


def _is_within(ours: int, theirs: int, comparison: Comparison) -> bool:
    difference, larger = abs(theirs - ours), max(abs(theirs), abs(ours))
    return (
        difference <= comparison.tolerance_picos
        or difference * PPM <= comparison.tolerance_ppm * larger
    )


def plain_model(model: str | None) -> str | None:
    """A model's name without its provider and its date, in small letters."""
    if model is None:
        return None
    return _SUFFIX.sub("", model.lower().rpartition("/")[2])


class Reconciler:
    """Takes an export in, then compares it; to be closed."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._names = {plain_model(k): plain_model(v) for k, v in comparison.renamed.items()}
        # A file without a name: it is on disk as far as it does not fit the cache, and gone after.
        self._waiting = sqlite3.connect("", isolation_level=None)
        self._waiting.execute("PRAGMA journal_mode = OFF")
        self._waiting.execute("PRAGMA synchronous = OFF")
        self._waiting.execute(
            "CREATE TABLE theirs (id TEXT PRIMARY KEY, day INTEGER NOT NULL, model TEXT,"
            " requests INTEGER NOT NULL, input INTEGER NOT NULL, output INTEGER NOT NULL,"
            " cost INTEGER, is_matched INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID"
        )
        self._groups: dict[Key, Group] = {}
        self._days: tuple[date, date] | None = None
        self._lines = self._outside = 0
        self._told = Told()

    def close(self) -> None:
        """Forget everything."""
        self._waiting.close()

    # --- their side ---

    def take(self, lines: Iterable[Line]) -> None:
        """Take an export in. Raises ExportError where it is too much for a comparison by day."""
        self._waiting.execute("BEGIN")
        for line in lines:
            self._lines += 1
            first, last = self.comparison.first_day, self.comparison.last_day
            if (first is not None and line.day < first) or (last is not None and line.day > last):
                self._outside += 1
                continue
            self._take(line)
        self._waiting.execute("COMMIT")

    def _take(self, line: Line) -> None:
        earliest, latest = self._days or (line.day, line.day)
        self._days = (min(earliest, line.day), max(latest, line.day))
        self._told.note(line)
        model = plain_model(line.model)
        model = self._names.get(model, model)
        if not self._is_wanted(model):
            return
        side = Side(
            line.requests or 0,
            line.input_tokens or 0,
            line.output_tokens or 0,
            line.cost_picos or 0,
        )
        if line.request_id is None:
            self._group((line.day, model)).theirs.add(side)
            return
        # LiteLLM logs each attempt of a request: together they are what it cost.
        self._waiting.execute(
            "INSERT INTO theirs (id, day, model, requests, input, output, cost)"
            " VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " requests = max(requests, excluded.requests), input = input + excluded.input,"
            " output = output + excluded.output,"
            " cost = coalesce(cost + excluded.cost, cost, excluded.cost)",
            (
                line.request_id,
                line.day.toordinal(),
                model,
                *(side.requests, side.input_tokens, side.output_tokens),
                line.cost_picos,
            ),
        )

    def _is_wanted(self, model: str | None) -> bool:
        patterns = self.comparison.models
        return (
            not patterns
            or model is None
            or any(fnmatch.fnmatchcase(model, pattern.lower()) for pattern in patterns)
        )

    def _group(self, key: Key) -> Group:
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= _MAX_GROUPS:
                msg = f"more than {_MAX_GROUPS} models and days: is the model's column right?"
                raise ExportError(msg)
            group = self._groups[key] = Group()
        return group

    # --- our side ---

    def compare(self, url: str, note: Note) -> Result:
        """Compare with the usage in one snapshot; requests that differ are handed to `note`.

        Raises ExportError where no period is known, psycopg's errors where the database is away.
        """
        first, last = self._period()
        result = Result(first, last, self._told, self._lines, self._outside, self._groups)
        self._waiting.execute("BEGIN")
        for row in _ours(url, first, last):
            self._compare(row, result, note)
        self._waiting.execute("COMMIT")
        self._add_unmatched(result, note)
        return result

    def _period(self) -> tuple[date, date]:
        first, last = self.comparison.first_day, self.comparison.last_day
        if self._days is not None:
            first, last = first or self._days[0], last or self._days[1]
        if first is None or last is None:
            raise ExportError("the file has no line of the period: say its days, or look at it")
        return first, last

    def _compare(self, row: DictRow, result: Result, note: Note) -> None:
        day: date = row["created_at"].astimezone(UTC).date()
        name = row["model"] if self.comparison.by_asked_model else row["model_answered"]
        model = plain_model(name or row["model"])
        cost: int | None = row["cost_picos"]
        ours = Side(
            1,
            row["input_tokens"] or 0,
            row["output_tokens"] or 0,
            cost or 0,
            int(cost is None),
        )
        match = self._match(row) if self._told.ids else None
        if match is not None:
            theirs_day, theirs, told = match
            in_period = result.first_day <= day <= result.last_day
            group = self._group((day if in_period else theirs_day, self._key(model)))
            group.ours.add(ours)
            group.theirs.add(theirs)
            result.matched += 1
            if told is not None and told != (cost or 0):
                result.differing_picos += abs(told - (cost or 0))
                if not _is_within(cost or 0, told, replace(self.comparison, tolerance_picos=0)):
                    result.differing += 1
                    request_id = str(row["request_id"])
                    note("differs", Difference(request_id, day, model, cost, told))
            return
        is_ours = row["counts"] and (self.comparison.with_byok or not row["byok"])
        if not (is_ours and result.first_day <= day <= result.last_day and self._is_wanted(model)):
            return
        self._group((day, self._key(model))).ours.add(ours)
        if self._told.ids:
            result.only_ours += 1
            note("only_ours", Difference(str(row["request_id"]), day, model, cost, None))

    def _key(self, model: str | None) -> str | None:
        """The name to sum up under: none at all where the export has no names."""
        return model if self._told.models else None

    def _match(self, row: DictRow) -> tuple[date, Side, int | None] | None:
        for id_ in (str(row["request_id"]), row["answer_id"]):
            if id_ is None:
                continue
            found = self._waiting.execute(
                "UPDATE theirs SET is_matched = 1 WHERE id = ? AND NOT is_matched"
                " RETURNING day, requests, input, output, cost",
                (id_,),
            ).fetchall()
            for day, requests, input_, output, cost in found:
                return date.fromordinal(day), Side(requests, input_, output, cost or 0), cost
        return None

    def _add_unmatched(self, result: Result, note: Note) -> None:
        rows = self._waiting.execute(
            "SELECT id, day, model, requests, input, output, cost FROM theirs WHERE NOT is_matched"
        )
        for id_, ordinal, model, requests, input_, output, cost in rows:
            day = date.fromordinal(ordinal)
            side = Side(requests, input_, output, cost or 0)
            self._group((day, self._key(model))).theirs.add(side)
            result.only_theirs += 1
            note("only_theirs", Difference(id_, day, model, None, cost))


def _ours(url: str, first: date, last: date) -> Iterator[DictRow]:
    start = datetime.combine(first, time(), UTC) - _MARGIN
    end = datetime.combine(last, time(), UTC) + timedelta(days=1) + _MARGIN
    name = "tallygate reconcile"
    with psycopg.connect(url, connect_timeout=10, application_name=name) as connection:
        connection.isolation_level = IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        connection.execute("SET LOCAL search_path = tallygate, pg_temp")
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        connection.execute("SET LOCAL statement_timeout = 0")
        with connection.cursor("reconcile", row_factory=dict_row) as cursor:
            cursor.itersize = _STREAMED_ROWS
            cursor.execute(_OURS, (start, end))
            yield from cursor


def record(
    url: str, result: Result, *, source: str, is_within: bool, summary: Mapping[str, object]
) -> UUID:
    """Keep a result under the name of whose account it was; the newest of each is a metric."""
    id_ = uuid7()
    with psycopg.connect(url, connect_timeout=10, autocommit=True) as connection:
        connection.execute(
            "SELECT tallygate.record_reconciliation(%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                id_,
                source,
                result.first_day,
                result.last_day,
                result.drift_picos,
                is_within,
                Jsonb(summary),
                _ACTOR,
            ),
        )
    return id_
