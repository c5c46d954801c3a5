"""From measurements to what is said of them: medians over the rounds, ratios, targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.contenders import BARE, DIRECT, LITELLM, METERED, UNLEDGERED
from tests.bench.measure import Streams, WholeAnswers

Figure = Callable[[WholeAnswers], float]


@dataclass(frozen=True)
class Target:
    """What was promised, and what came out."""

    name: str
    limit: float
    measured: float
    unit: str
    at_least: bool

    @property
    def is_met(self) -> bool:
        """Whether the promise holds."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def row(self) -> list[str]:
        """Return the line of a table."""
        bound = "at least" if self.at_least else "at most"
        digits = 0 if self.limit in {0, 20} else 2
        return [
            self.name,
            f"{bound} {self.limit:g}{self.unit}",
            f"{self.measured:.{digits}f}{self.unit}",
            "yes" if self.is_met else "**no**",
        ]


@dataclass(frozen=True)
class Figures:
    """Everything that one run measured."""

    whole: Sequence[WholeAnswers]
    streams: Sequence[Streams]

    def connections(self) -> list[int]:
        """Return the numbers of connections, ascending."""
        return sorted({run.connections for run in self.whole})

    def runs(self, contender: str, connections: int) -> list[WholeAnswers]:
        """Return a contender's rounds, in order."""
        found = [r for r in self.whole if (r.contender, r.connections) == (contender, connections)]
        return sorted(found, key=lambda run: run.round)

    def middle(self, contender: str, connections: int, figure: Figure) -> float:
        """Return the median of a contender's rounds."""
        return median(figure(run) for run in self.runs(contender, connections))

    def ratio(self, contender: str, other: str, connections: int) -> float:
        """Return the median ratio of throughputs, each round compared with itself.

        A machine that is slower for some seconds is so for both.
        """
        pairs = zip(self.runs(contender, connections), self.runs(other, connections), strict=True)
        return median(one.requests_per_s / two.requests_per_s for one, two in pairs)

    def added_ms(self, contender: str, connections: int, figure: Figure) -> float:
        """Return the median of what a contender adds to the upstream's own time."""
        pairs = zip(self.runs(contender, connections), self.runs(DIRECT, connections), strict=True)
        return median(figure(one) - figure(two) for one, two in pairs)

    def stream_runs(self, contender: str) -> list[Streams]:
        """Return the rounds of streams, in order."""
        return sorted(
            (run for run in self.streams if run.contender == contender), key=lambda run: run.round
        )

    def streams_longer_percent(self) -> float:
        """Return by how much streams last longer through Tallygate, at the median of the rounds."""
        pairs = zip(self.stream_runs(METERED), self.stream_runs(DIRECT), strict=True)
        return median((one.mean_s / two.mean_s - 1) * 100 for one, two in pairs)

    def streams_failed(self) -> int:
        """Return how many streams through Tallygate did not come to their end whole."""
        return sum(run.streams - run.whole for run in self.stream_runs(METERED))

    def targets(self) -> list[Target]:
        """Compare with what was promised, as far as it was measured."""
        told: list[Target] = []
        if 32 in self.connections():
            told += [
                Target(
                    "throughput, metered : the same stack without its ledger, 32 connections",
                    0.55, self.ratio(METERED, UNLEDGERED, 32), "x", at_least=True,
                ),
                Target(
                    "throughput, metered : bare relay, 32 connections",
                    0.55, self.ratio(METERED, BARE, 32), "x", at_least=True,
                ),
                Target(
                    "throughput, metered : LiteLLM's proxy, 32 connections",
                    20, self.ratio(METERED, LITELLM, 32), "x", at_least=True,
                ),
            ]  # fmt: skip
        if 1 in self.connections():
            added = self.added_ms(METERED, 1, lambda run: run.p50_ms)
            told.append(
                Target("added to the median, one connection", 3, added, " ms", at_least=False)
            )
        count = self.streams[0].streams
        return [
            *told,
            Target(
                f"{count} streams at once, longer than direct",
                5, self.streams_longer_percent(), "%", at_least=False,
            ),
            Target(
                f"{count} streams at once, failed", 0, self.streams_failed(), "", at_least=False
            ),
        ]  # fmt: skip
