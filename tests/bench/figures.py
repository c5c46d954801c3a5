"""From measurements to what is said of them: medians over the rounds, ratios."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.bench.names import DIRECT, METERED, SMALL, WORKERS
from tests.bench.results import Flood, LedgerLoad, Results, Streams, WholeAnswers

Figure = Callable[[WholeAnswers], float]
# A batch that reaches this much of the most is full: larger ones bring little.
_FULL = 0.9


@dataclass(frozen=True)
class Pace:
    """So many streams at so many events a second."""

    streams: int
    events_per_s: int


@dataclass(frozen=True)
class Whole:
    """Measurements of whole answers."""

    runs: Sequence[WholeAnswers]

    def connections(self) -> list[int]:
        """Return the numbers of connections, ascending."""
        return sorted({run.connections for run in self.runs})

    def contenders(self, connections: int, body: str = SMALL) -> list[str]:
        """Return who took part, in order."""
        found = (r for r in self.runs if (r.connections, r.body) == (connections, body))
        return list(dict.fromkeys(run.contender for run in found))

    def of(self, contender: str, connections: int, body: str = SMALL) -> list[WholeAnswers]:
        """Return a contender's rounds, in order."""
        wanted = (contender, connections, body)
        found = [r for r in self.runs if (r.contender, r.connections, r.body) == wanted]
        return sorted(found, key=lambda run: run.round)

    def compare(
        self,
        one: Sequence[WholeAnswers],
        two: Sequence[WholeAnswers],
        how: Callable[[WholeAnswers, WholeAnswers], float],
    ) -> float | None:
        """Return the median of a comparison, each round with itself; None if there is none.

        A machine that is slower for some seconds is so for both.
        """
        by_round = {run.round: run for run in two}
        compared = [how(run, by_round[run.round]) for run in one if run.round in by_round]
        return median(compared) if compared else None

    def ratio(self, contender: str, other: str, connections: int) -> float | None:
        """Return the ratio of throughputs."""
        return self.compare(
            self.of(contender, connections), self.of(other, connections), _ratio_of_throughputs
        )

    def added_ms(self, contender: str, connections: int, figure: Figure) -> float | None:
        """Return what a contender adds to the upstream's own time."""
        return self.compare(
            self.of(contender, connections),
            self.of(DIRECT, connections),
            lambda one, two: figure(one) - figure(two),
        )

    def larger_body(self, contender: str, body: str) -> float | None:
        """Return throughput with this body, as a share of that with a small one."""
        found = [run.connections for run in self.runs if run.body == body]
        if not found:
            return None
        return self.compare(
            self.of(contender, found[0], body),
            self.of(contender, found[0], SMALL),
            _ratio_of_throughputs,
        )

    def two_workers(self, connections: int) -> float | None:
        """Return what two workers do, by one worker."""
        return self.ratio(WORKERS, METERED, connections)

    def two_workers_elsewhere(self, connections: int) -> float | None:
        """Return the same by processor time: as if each worker had a core to itself.

        A worker alone on a core does one request in the time that a request takes of it. Of two
        workers the busier one sets the pace, by what it uses for each request of both.
        """
        return self.compare(
            self.of(METERED, connections),
            self.of(WORKERS, connections),
            lambda one, two: one.busiest_us / two.busiest_us,
        )


def _ratio_of_throughputs(one: WholeAnswers, two: WholeAnswers) -> float:
    return one.requests_per_s / two.requests_per_s


def paces(runs: Sequence[Streams]) -> list[Pace]:
    """Return at which numbers and paces streams were measured."""
    found = {(run.streams, run.events_per_s) for run in runs}
    return [Pace(*pace) for pace in sorted(found)]


def at_pace(runs: Sequence[Streams], contender: str, pace: Pace) -> list[Streams]:
    """Return a contender's rounds, in order."""
    wanted = (contender, pace.streams, pace.events_per_s)
    found = [run for run in runs if (run.contender, run.streams, run.events_per_s) == wanted]
    return sorted(found, key=lambda run: run.round)


def longer_percent(runs: Sequence[Streams], pace: Pace) -> float | None:
    """Return by how much streams last longer through Tallygate than direct."""
    pairs = zip(at_pace(runs, METERED, pace), at_pace(runs, DIRECT, pace), strict=False)
    longer = [(one.mean_s / two.mean_s - 1) * 100 for one, two in pairs]
    return median(longer) if longer else None


def core_percent(run: Streams) -> float:
    """Return what such streams take of a core where as many begin as end, all the time.

    So many are open then for as long as one lasts, and in that time each is begun and settled once.
    """
    return run.proxy_s / run.seconds * 100


def failed(runs: Sequence[Streams | Flood]) -> int:
    """Return how many streams did not come to their end whole."""
    return sum(run.streams - run.whole for run in runs)


def first_byte_added_ms(results: Results) -> float | None:
    """Return what Tallygate adds to the time of a stream's first event."""
    direct = {run.round: run for run in results.first_byte if run.contender == DIRECT}
    added = [
        run.p50_ms - direct[run.round].p50_ms
        for run in results.first_byte
        if run.contender == METERED and run.round in direct
    ]
    return median(added) if added else None


def full_batch(loads: Sequence[LedgerLoad], accounts: int, lanes: int) -> LedgerLoad | None:
    """Return the smallest batch of holds that is as good as full."""
    found = [load for load in loads if (load.accounts, load.lanes) == (accounts, lanes)]
    if not found:
        return None
    most = max(load.holds_per_s for load in found)
    full = [load for load in found if load.holds_per_s >= _FULL * most]
    return min(full, key=lambda load: load.batch)
