"""The ledger is what sixty lines of Python say that it is, whatever is done to it and at once."""

import ast
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.property import ledger_model
from tests.property.ledger_machine import machine_on
from tests.property.ledger_world import World

BOUNDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    # A history that differs is shown as it was: `make soak` has the time to find its shortest form.
    phases=[Phase.generate],
    max_examples=60,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.timeout(300)
def test_ledger_does_what_the_model_foretells(database_url: str) -> None:
    world = World(database_url)
    try:
        run_state_machine_as_test(machine_on(world), settings=BOUNDED)
    finally:
        world.close()


def test_model_can_be_read_at_a_glance() -> None:
    text = Path(ledger_model.__file__).read_text()
    (docstring, *_) = ast.parse(text).body
    code = [line for line in text.splitlines()[docstring.end_lineno :] if line.strip()]
    assert len(code) <= 60
