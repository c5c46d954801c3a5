"""One process of the soak: a database, and one seed after another."""

import traceback

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property.ledger_machine import machine_on
from tests.property.ledger_world import TimeIsUp, World
from tests.soak.tally import Tally

_HISTORIES_A_SEED = 100
_SEEDS_APART = 1_000_000


def soak(url: str, first_seed: int, until: float, *, shrink: bool = True) -> Tally:
    """Try one seed after another until time is up or a history differs.

    `shrink` has the shortest such history looked for, which takes minutes.
    """
    world = World(url, until=until)
    failure: str | None = None
    number = first_seed
    try:
        while failure is None:
            try:
                _try_seed(world, number, shrink=shrink)
            except TimeIsUp:
                break
            except Exception as error:  # noqa: BLE001 - whatever it was, it is what was looked for
                if isinstance(error.__context__, TimeIsUp):
                    break  # Hypothesis wonders why a history ended that went on before
                failure = f"seed {number}\n{traceback.format_exc()}"
            number += _SEEDS_APART
    finally:
        world.close()
    return Tally(world.answers, world.calls, world.raced, world.histories, failure)


def _try_seed(world: World, number: int, *, shrink: bool) -> None:
    machine = machine_on(world)
    seed(number)(machine)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=_HISTORIES_A_SEED,
            stateful_step_count=60,
            phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
