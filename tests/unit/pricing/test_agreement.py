import pytest

from pricing.agreement import ROUNDING_PICOS, agrees
from pricing.money import MAX_AMOUNT


@pytest.mark.parametrize(
    "one, other, tolerance_ppm, agreed",
    [
        (0, 0, 0, True),
        (10**9, 10**9, 0, True),
        # Rounding noise: a nano, whatever the amounts are.
        (0, 1_000, 0, True),
        (0, 1_001, 0, False),
        (10**12, 10**12 + 1_000, 0, True),
        (10**12, 10**12 + 1_001, 0, False),
        # One percent of the larger one.
        (10**9, 990_000_000, 10_000, True),
        (10**9, 989_999_999, 10_000, False),
        (1_000_000, 1_010_101, 10_000, True),
        (1_000_000, 1_010_102, 10_000, False),
        # Nothing agrees with something, short of every tolerance that is one.
        (0, 10**9, 999_999, False),
        (0, 10**9, 1_000_000, True),
        (MAX_AMOUNT, MAX_AMOUNT - 10**13, 2, True),
        (MAX_AMOUNT, MAX_AMOUNT - 10**13, 1, False),
    ],
)
def test_costs_agree_within_a_share_of_the_larger_one(
    one: int, other: int, tolerance_ppm: int, *, agreed: bool
) -> None:
    assert agrees(one, other, tolerance_ppm) is agreed
    assert agrees(other, one, tolerance_ppm) is agreed


def test_the_noise_is_a_nano() -> None:
    assert ROUNDING_PICOS == 1_000
