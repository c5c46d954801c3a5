"""What is measured, group by group: each can be repeated alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.bench import measure, sockets
from tests.bench.contenders import Contender, Stage
from tests.bench.figures import Pace
from tests.bench.footprint import footprint
from tests.bench.ledger_load import ledger_load
from tests.bench.names import (
    BODIES,
    BODIES_TAKEN_BY,
    FIRST_BYTE,
    FLOOD,
    LEDGER,
    PROMPT_BYTES,
    START,
    STREAMS,
    WHOLE,
    takes_part,
)
from tests.bench.results import Results, WholeAnswers

_Who = TypeVar("_Who")
_BODIES_CONNECTIONS = 32
_FLOODS = 16


@dataclass(frozen=True)
class StreamPlan:
    """So many streams at such a pace, how long, and how often."""

    pace: Pace
    seconds: int
    rounds: int


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int
    seconds: int
    body_seconds: int
    streams: Sequence[StreamPlan]
    connections: Sequence[int] = (1, 32, 128, 256)
    first_bytes: int = 300
    flood_events: int = 5000
    starts: int = 3
    load_requests: int = 12_000
    accounts: int = 1000


THOROUGH = Plan(
    rounds=3,
    seconds=3,
    body_seconds=2,
    streams=(
        StreamPlan(Pace(200, 20), seconds=5, rounds=2),
        StreamPlan(Pace(200, 50), seconds=5, rounds=2),
        # Long enough for all of them to be open at once.
        StreamPlan(Pace(1000, 20), seconds=10, rounds=2),
        # More than a core can do: what happens then is what is shown.
        StreamPlan(Pace(1000, 50), seconds=5, rounds=1),
    ),
)
QUICK = Plan(
    rounds=1,
    seconds=1,
    body_seconds=1,
    streams=(StreamPlan(Pace(200, 50), seconds=3, rounds=1),),
    connections=(1, 32),
    first_bytes=100,
    flood_events=2000,
    starts=1,
    load_requests=2000,
    accounts=100,
)


def run(group: str, stage: Stage, plan: Plan, results: Results) -> None:
    """Measure a group; what there was of it before is replaced."""
    _GROUPS[group](stage, plan, results)


def rounds_and_seconds(group: str, plan: Plan) -> tuple[int, int]:
    """Return a group's rounds and the length of its longest run; 0 where that is no setting."""
    if group == WHOLE:
        return plan.rounds, plan.seconds
    if group == BODIES:
        return plan.rounds, plan.body_seconds
    if group == STREAMS:
        return max(each.rounds for each in plan.streams), max(each.seconds for each in plan.streams)
    return (plan.rounds if group in {FIRST_BYTE, FLOOD} else 1), 0


def _whole(stage: Stage, plan: Plan, results: Results) -> None:
    results.left_out = stage.left_out
    results.whole = []
    _warm_up(stage, list(stage.contenders.values()))
    for connections in plan.connections:
        contenders = [
            contender
            for contender in stage.contenders.values()
            if contender.name in takes_part(connections)
        ]

        def one(contender: Contender, number: int, connections: int = connections) -> str:
            found = measure.whole_answers(
                stage, contender, connections=connections, seconds=plan.seconds, number=number
            )
            results.whole.append(found)
            return f"{connections:>4} connections  {_told(contender, found)}"

        _in_turns(contenders, plan.rounds, one)


def _bodies(stage: Stage, plan: Plan, results: Results) -> None:
    results.bodies = []
    contenders = [stage.contenders[name] for name in BODIES_TAKEN_BY if name in stage.contenders]
    _warm_up(stage, contenders)
    # The sizes of one contender follow each other, because they are what is compared.
    pairs = [(contender, body) for contender in contenders for body in PROMPT_BYTES]

    def one(pair: tuple[Contender, str], number: int) -> str:
        contender, body = pair
        found = measure.whole_answers(
            stage,
            contender,
            connections=_BODIES_CONNECTIONS,
            seconds=plan.body_seconds,
            number=number,
            body=body,
        )
        results.bodies.append(found)
        return f"{body:>6}  {_told(contender, found)}"

    _in_turns(pairs, plan.rounds, one)


def _streams(stage: Stage, plan: Plan, results: Results) -> None:
    results.streams = []
    _check_streams(stage)
    for each in plan.streams:

        def one(contender: Contender, number: int, each: StreamPlan = each) -> str:
            found = measure.streams(
                stage,
                contender,
                count=each.pace.streams,
                events_per_s=each.pace.events_per_s,
                seconds=each.seconds,
                number=number,
            )
            results.streams.append(found)
            return (
                f"{found.streams:>4} streams x {found.events_per_s}/s  {contender.name:<8}"
                f"  mean {found.mean_s:.3f} s  whole {found.whole}"
            )

        _in_turns(stage.streamed, each.rounds, one)


def _first_byte(stage: Stage, plan: Plan, results: Results) -> None:
    results.first_byte = []
    _check_streams(stage)

    def one(contender: Contender, number: int) -> str:
        found = sockets.first_byte(stage, contender, count=plan.first_bytes, number=number)
        results.first_byte.append(found)
        return f"first event  {contender.name:<8}  p50 {found.p50_ms:.2f} ms"

    _in_turns(stage.streamed, plan.rounds, one)


def _flood(stage: Stage, plan: Plan, results: Results) -> None:
    results.flood = []
    _check_streams(stage)

    def one(contender: Contender, number: int) -> str:
        found = measure.flood(
            stage, contender, count=_FLOODS, events=plan.flood_events, number=number
        )
        results.flood.append(found)
        return (
            f"{_FLOODS} floods  {contender.name:<8}  {found.events / found.longest_s:>9,.0f} "
            f"events/s  {found.proxy_us_per_event:.1f} µs an event"
        )

    _in_turns(stage.streamed, plan.rounds, one)
    results.stalled = sockets.stalled(stage, stage.streamed[1])


def _start(stage: Stage, plan: Plan, results: Results) -> None:
    results.start = footprint(stage, starts=plan.starts)
    _say(f"ready after {results.start.ready_s} s, idle {results.start.idle_mb:.0f} MB")


def _ledger(stage: Stage, plan: Plan, results: Results) -> None:
    results.ledger = ledger_load(stage, requests=plan.load_requests, progress=_say)


_GROUPS: dict[str, Callable[[Stage, Plan, Results], None]] = {
    WHOLE: _whole,
    BODIES: _bodies,
    STREAMS: _streams,
    FIRST_BYTE: _first_byte,
    FLOOD: _flood,
    START: _start,
    LEDGER: _ledger,
}


def _in_turns(who: Sequence[_Who], rounds: int, one: Callable[[_Who, int], str]) -> None:
    for number in range(rounds):
        # Alternating, so that nobody always comes after the same neighbour.
        for somebody in who[:: 1 if number % 2 == 0 else -1]:
            _say(f"round {number + 1}/{rounds}  {one(somebody, number)}")


def _warm_up(stage: Stage, contenders: Sequence[Contender]) -> None:
    """Open connections and fill caches; what comes out counts for the ledger alone."""
    for contender in contenders:
        measure.check(contender, stream=False)
        measure.whole_answers(stage, contender, connections=32, seconds=1, number=0)
        stage.answered += contender.uses_ledger


def _check_streams(stage: Stage) -> None:
    measure.set_pace(stage.streamed[0], 0, 5)
    for contender in stage.streamed:
        measure.check(contender, stream=True)
        stage.answered += contender.uses_ledger


def _told(contender: Contender, found: WholeAnswers) -> str:
    return f"{contender.name:<10}  {found.requests_per_s:>8,.0f}/s  p50 {found.p50_ms:.2f} ms"


def _say(what: str) -> None:
    print(what, flush=True)
