"""What was promised beside what came out."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from tests.bench import figures
from tests.bench.figures import Pace, Whole
from tests.bench.names import BARE, LARGE, LITELLM, METERED, PORTKEY
from tests.bench.results import Results, Start


@dataclass(frozen=True)
class Target:
    """One promise; `measured` is None where it was not measured."""

    name: str
    limit: float
    unit: str
    at_least: bool
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the promise holds; None where nobody knows."""
        if self.measured is None:
            return None
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def row(self) -> list[str]:
        """Return the line of a table."""
        bound = "at least" if self.at_least else "at most"
        digits = 0 if self.limit == 0 else 1 if self.limit >= 4 else 2
        measured = f"{self.measured:.{digits}f}{self.unit}" if self.measured is not None else ""
        met = {True: "yes", False: "**no**", None: "not measured"}[self.is_met]
        return [self.name, f"{bound} {self.limit:g}{self.unit}", measured, met]


def targets(results: Results) -> list[Target]:
    """Compare everything that was promised, measured or not."""
    whole = Whole(results.whole)
    thousand = Pace(1000, 20)
    many = figures.at_pace(results.streams, METERED, thousand)
    start = results.start

    def least(name: str, limit: float, measured: float | None, unit: str = "x") -> Target:
        return Target(name, limit, unit, at_least=True, measured=measured)

    def most(name: str, limit: float, unit: str, measured: float | None) -> Target:
        return Target(name, limit, unit, at_least=False, measured=measured)

    return [
        least(
            "metered / bare relay on the same stack, 32 connections",
            0.75, whole.ratio(METERED, BARE, 32),
        ),
        least(
            "metered / bare relay on the same stack, 128 connections",
            0.9, whole.ratio(METERED, BARE, 128),
        ),
        least(
            "metered / LiteLLM's proxy without a database", 35, whole.ratio(METERED, LITELLM, 32)
        ),
        least(
            "metered / Portkey gateway without metering", 4, whole.ratio(METERED, PORTKEY, 32)
        ),
        most(
            "added latency at one connection, median",
            1.8, " ms", whole.added_ms(METERED, 1, lambda run: run.p50_ms),
        ),
        most(
            "added latency at one connection, p99",
            6, " ms", whole.added_ms(METERED, 1, lambda run: run.p99_ms),
        ),
        most(
            "added to first byte of a stream, median (the hold only)",
            1.2, " ms", figures.first_byte_added_ms(results),
        ),
        most(
            "1,000 streams x 20 events/s, failed", 0, "", figures.failed(many) if many else None
        ),
        most(
            "1,000 streams x 20 events/s, longer than direct",
            3, "%", figures.longer_percent(results.streams, thousand),
        ),
        most(
            "1,000 streams x 20 events/s, of a core",
            70, "%", median(map(figures.core_percent, many)) if many else None,
        ),
        least(
            "2 workers on 2 cores with everything else elsewhere / 1 worker",
            1.7, whole.two_workers_elsewhere(128),
        ),
        least(
            "100 KB prompt / 0.3 KB prompt throughput",
            0.6, Whole(results.bodies).larger_body(METERED, LARGE),
        ),
        most(
            "`serve` ready after its start",
            2, " s", _of_start(start, lambda found: median(found.ready_s)),
        ),
        most("RSS of a worker, idle", 110, " MB", _of_start(start, lambda found: found.idle_mb)),
        most(
            "RSS of a worker at 1,000 open streams",
            300, " MB", max(run.peak_mb for run in many) if many else None,
        ),
        most(
            "the thin install on disk",
            60, " MB", _of_start(start, lambda found: found.installed_mb),
        ),
    ]  # fmt: skip


def _of_start(start: Start | None, figure: Callable[[Start], float | None]) -> float | None:
    return None if start is None else figure(start)
