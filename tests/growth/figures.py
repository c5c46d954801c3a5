"""What was measured, what it should have been, and the text that tells both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from tests.growth.queries import Read
from tests.growth.traffic import Round

# Of throughput and of the 99th percentile of admission, against an empty ledger.
_TOLERANCE = 0.10
_READ_MS = 10.0
_INCREMENT_S = 10.0
# What the account API shows; operators have more time.
_CUSTOMERS = ("balance", "newest page of usage")


@dataclass(frozen=True)
class Timing:
    """How long something took, and for how many entries."""

    seconds: float
    entries: int

    @property
    def per_second(self) -> float:
        """Entries in a second."""
        return self.entries / self.seconds


@dataclass
class Grown:
    """The large ledger."""

    entries: int
    accounts: int
    bytes: int = 0
    seal_bytes: int = 0
    longest_snapshot_s: float = 0.0
    detached: list[str] = field(default_factory=list[str])
    timings: dict[str, Timing] = field(default_factory=dict[str, Timing])


@dataclass
class Side:
    """Traffic and reads on one of the two ledgers."""

    rounds: list[Round] = field(default_factory=list[Round])
    reads: list[Read] = field(default_factory=list[Read])

    @property
    def per_second(self) -> float:
        """The middle round's requests in a second."""
        return median(one.per_second for one in self.rounds)

    @property
    def server_us(self) -> float:
        """The middle round's processor time in PostgreSQL for a request."""
        return median(1e6 * one.server_s / one.requests for one in self.rounds)

    @property
    def own_us(self) -> float:
        """The same outside of it."""
        return median(1e6 * one.own_s / one.requests for one in self.rounds)

    def admission_ms(self, percent: float) -> float:
        """The middle round's percentile."""
        return median(_percentile(one.admissions_ms, percent) for one in self.rounds)

    def settlement_ms(self, percent: float) -> float:
        """The middle round's percentile."""
        return median(_percentile(one.settlements_ms, percent) for one in self.rounds)


@dataclass
class Figures:
    """Everything of a run."""

    grown: Grown
    sides: dict[str, Side]
    machine: Mapping[str, str]
    in_flight: int

    @property
    def targets(self) -> list[tuple[str, str, bool]]:
        """Each target in words, what was measured, and whether it is met."""
        empty, grown = self.sides["empty"], self.sides["grown"]
        throughput = grown.per_second / empty.per_second
        p99 = grown.admission_ms(99) / empty.admission_ms(99)
        processors = (grown.server_us + grown.own_us) / (empty.server_us + empty.own_us)
        increment = self.grown.timings.get("increment")
        reads = {read.name: read for read in grown.reads}
        return [
            (
                "throughput within 10% of an empty ledger",
                f"{(throughput - 1) * 100:+.1f}%",
                throughput >= 1 - _TOLERANCE,
            ),
            (
                "p99 of admission within 10% of an empty ledger",
                f"{(p99 - 1) * 100:+.1f}%",
                p99 <= 1 + _TOLERANCE,
            ),
            (
                "processor time of a request within 10% of an empty ledger",
                f"{(processors - 1) * 100:+.1f}%",
                processors <= 1 + _TOLERANCE,
            ),
            *(
                (
                    f"{name}, p99, under 10 ms",
                    f"{reads[name].p99_ms:.2f} ms",
                    reads[name].p99_ms < _READ_MS,
                )
                for name in _CUSTOMERS
            ),
            *(
                []
                if increment is None
                else [
                    (
                        f"audit of a day's increment ({increment.entries:,} entries) under 10 s",
                        f"{increment.seconds:.1f} s",
                        increment.seconds < _INCREMENT_S,
                    )
                ]
            ),
        ]

    @property
    def is_met(self) -> bool:
        """Whether every target is."""
        return all(is_met for _, _, is_met in self.targets)


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def page(figures: Figures) -> str:
    """Tell it all, in Markdown."""
    grown = figures.grown
    intro = (
        f"{grown.entries:,} entries, half as many rows of usage, {grown.accounts:,} accounts:"
        f" {grown.bytes / 2**30:.1f} GiB, of which the seals are"
        f" {grown.seal_bytes / 2**20:.0f} MiB. Beside it, in the same PostgreSQL and by turns, a"
        f" ledger with the same accounts and nothing else; {figures.in_flight} requests in flight."
    )
    parts = [
        intro,
        _table(
            ("target", "measured", ""),
            [
                (name, told, "met" if is_met else "**missed**")
                for name, told, is_met in figures.targets
            ],
        ),
        _traffic(figures),
        _reads(figures),
        *([_work(grown)] if grown.timings else []),
        "; ".join(f"{name}: {told}" for name, told in figures.machine.items()) + ".",
    ]
    return "\n\n".join(parts)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _traffic(figures: Figures) -> str:
    sides = figures.sides
    rows = [
        ("requests/s (hold and capture)", *(f"{side.per_second:,.0f}" for side in sides.values())),
        *(
            (
                f"admission p{percent}",
                *(f"{side.admission_ms(percent):.2f} ms" for side in sides.values()),
            )
            for percent in (50, 99)
        ),
        *(
            (
                f"settlement p{percent}",
                *(f"{side.settlement_ms(percent):.2f} ms" for side in sides.values()),
            )
            for percent in (50, 99)
        ),
        (
            "processor time of a request, PostgreSQL's",
            *(f"{side.server_us:.0f} µs" for side in sides.values()),
        ),
        (
            "processor time of a request, ours",
            *(f"{side.own_us:.0f} µs" for side in sides.values()),
        ),
    ]
    return _table(("", *sides), rows)


def _reads(figures: Figures) -> str:
    empty = {read.name: read for read in figures.sides["empty"].reads}
    return _table(
        (
            "read",
            "empty p50",
            "grown p50",
            "grown p99",
            "grown max",
            "of it PostgreSQL's processor",
        ),
        [
            (
                read.name,
                *(
                    f"{value:.2f} ms"
                    for value in (empty[read.name].p50_ms, read.p50_ms, read.p99_ms, read.max_ms)
                ),
                "" if read.server_ms is None else f"{read.server_ms:.2f} ms",
            )
            for read in figures.sides["grown"].reads
        ],
    )


def _work(grown: Grown) -> str:
    names = {
        "increment": "incremental audit of a day",
        "full": "full audit, one snapshot",
        "seal_of_a_day": "sealing a day",
        "seal": "sealing everything before",
        "check_seals": "checking every seal against its rows",
    }
    rows = [
        (
            name,
            f"{grown.timings[key].entries:,}",
            f"{grown.timings[key].seconds:.1f} s",
            f"{grown.timings[key].per_second:,.0f}",
        )
        for key, name in names.items()
    ]
    text = _table(("", "entries", "took", "entries/s"), rows)
    text += f"\n\nThe longest snapshot of the incremental audit: {grown.longest_snapshot_s:.2f} s."
    if grown.detached:
        took = grown.timings["detach"].seconds
        text += f" Detaching {' and '.join(grown.detached)} took {took:.1f} s."
    return text
