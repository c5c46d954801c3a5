"""uuidv7: a version, a variant, and the time in front."""

import time
from uuid import UUID

from proxy.ids import uuid7


def test_ids_are_uuids_of_version_7_made_now() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid7()
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert before <= made.int >> 80 <= after


def test_ids_sort_by_time_within_a_millisecond_and_are_never_equal() -> None:
    made: list[UUID] = []
    for _ in range(2000):
        made.append(uuid7())
        start = time.perf_counter_ns()
        while time.perf_counter_ns() - start < 1000:
            pass  # a microsecond: four steps of the fraction
    assert made == sorted(made)
    assert len(set(made)) == len(made)
