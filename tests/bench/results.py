"""What was measured, as it is kept in docs/benchmarks.json, from which the page is made."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import msgspec


@dataclass(frozen=True, kw_only=True)
class WholeAnswers:
    """Requests one after another on each of so many connections."""

    contender: str
    body: str
    round: int
    connections: int
    requests: int
    failures: int
    requests_per_s: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    proxy_us: float
    # Of the process that had most to do, where several share the requests.
    busiest_us: float
    peak_mb: float
    postgres_us: float | None
    # Call of the ledger -> mean number of requests in it.
    batches: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Streams:
    """So many streams at once, each as long as its source makes it."""

    contender: str
    round: int
    streams: int
    events_per_s: int
    seconds: float
    whole: int
    events: int
    mean_s: float
    p50_s: float
    p99_s: float
    max_s: float
    proxy_s: float
    peak_mb: float
    postgres_us_per_stream: float | None
    batches: dict[str, float] | None


@dataclass(frozen=True, kw_only=True)
class FirstByte:
    """Streams one after another: from the request's last byte to the first of an event."""

    contender: str
    round: int
    streams: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class Flood:
    """Streams whose source sends as fast as it is let."""

    contender: str
    round: int
    streams: int
    whole: int
    events: int
    longest_s: float
    proxy_us_per_event: float
    peak_mb: float


@dataclass(frozen=True, kw_only=True)
class Stalled:
    """Floods whose clients take nothing for a while."""

    streams: int
    seconds: float
    stream_mb: float
    # What the source got rid of in that time, of each stream; kernel buffers are in it.
    sent_mb: float
    grown_mb: float
    whole: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """Starting, doing nothing, and lying on a disk."""

    ready_s: list[float]
    idle_mb: float
    # None where nothing could be installed.
    installed_mb: float | None
    installed_without_bytecode_mb: float | None


@dataclass(frozen=True, kw_only=True)
class LedgerLoad:
    """Calls of the ledger's functions alone, from so many connections at once."""

    accounts: int
    lanes: int
    batch: int
    holds_per_s: float
    hold_call_ms: float
    settlements_per_s: float
    settlement_call_ms: float
    # Of a hold and its settlement together.
    postgres_us: float


@dataclass(frozen=True, kw_only=True)
class Booked:
    """What the ledger has of the requests of a group, and what an audit says of it."""

    answered: int = 0
    billed: int = 0
    byok: int = 0
    other: int = 0
    held: int = 0
    broken: int = 0

    def __add__(self, other: "Booked") -> "Booked":
        mine, theirs = asdict(self), asdict(other)
        return Booked(**{name: count + theirs[name] for name, count in mine.items()})

    def __sub__(self, other: "Booked") -> "Booked":
        mine, theirs = asdict(self), asdict(other)
        return Booked(**{name: count - theirs[name] for name, count in mine.items()})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """When and how a group was measured."""

    at: str
    rounds: int
    seconds: int
    took_s: float
    load: float
    stolen_percent: float
    booked: Booked


@dataclass(kw_only=True)
class Results:
    """Everything; a group that was measured again replaces what there was of it."""

    machine: dict[str, str] = field(default_factory=dict[str, str])
    versions: dict[str, str] = field(default_factory=dict[str, str])
    # Group -> how it was measured.
    measured: dict[str, Measured] = field(default_factory=dict[str, Measured])
    # Contender -> why it did not take part.
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    whole: list[WholeAnswers] = field(default_factory=list[WholeAnswers])
    bodies: list[WholeAnswers] = field(default_factory=list[WholeAnswers])
    streams: list[Streams] = field(default_factory=list[Streams])
    first_byte: list[FirstByte] = field(default_factory=list[FirstByte])
    flood: list[Flood] = field(default_factory=list[Flood])
    stalled: Stalled | None = None
    start: Start | None = None
    ledger: list[LedgerLoad] = field(default_factory=list[LedgerLoad])

    @property
    def booked(self) -> Booked:
        """What the ledger has of all groups."""
        return sum((group.booked for group in self.measured.values()), Booked())


def load(path: Path) -> Results:
    """Read what was measured before; nothing, if there is nothing or it is of an older shape."""
    if not path.exists():
        return Results()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.ValidationError:
        return Results()


def save(results: Results, path: Path, **more: object) -> None:
    """Write it down; `more` is for readers and not read again."""
    document = _rounded({**asdict(results), **more})
    path.write_text(json.dumps(document, indent=1) + "\n")


def _rounded(value: object) -> object:
    """Return a document without the digits that mean nothing."""
    match value:
        case float():
            return round(value, 4)
        case dict():
            items = cast("dict[str, object]", value).items()
            return {name: _rounded(member) for name, member in items}
        case list():
            return [_rounded(member) for member in cast("list[object]", value)]
        case _:
            return value
