"""Whether a cost that was reported and our own rating of the same usage say the same."""

from pricing.money import PPM

# A nano-USD. LiteLLM adds floats, whose last digits are noise, and we round prices finer than a
# pico up, a pico at most for each token: for a thousand tokens that is less than any ledger shows.
# Where prices are so low, or requests so small, that this is more than the tolerance, two ways of
# rounding are all that the difference is.
ROUNDING_PICOS = 1_000


def agrees(reported_picos: int, rated_picos: int, tolerance_ppm: int) -> bool:
    """Tell whether two costs differ by at most so many millionths of the larger one.

    Relative to the larger, so that the answer does not depend on which of the two is wrong, and
    in exact integers, so that it is the same whenever an auditor asks again. A difference of up
    to ROUNDING_PICOS is always agreement: it is what two ways of rounding the same price leave.
    """
    difference = abs(reported_picos - rated_picos)
    if difference <= ROUNDING_PICOS:
        return True
    return difference * PPM <= tolerance_ppm * max(reported_picos, rated_picos)
