"""What the doctor makes of the archiver's own account."""

import pytest

from proxy.backups import last_archived

SEGMENT = "000000010000000000000007"
FINE = {
    "last_archived_wal": SEGMENT,
    "last_failed_wal": None,
    "failed_count": 0,
    "archived_s": 5.0,
    "failed_s": None,
    "is_failing": False,
    "is_behind": False,
}


@pytest.mark.parametrize(
    "changes, status, found",
    [
        ({}, "ok", "000000010000000000000007, 5 s ago"),
        # Nothing was written since: nothing is late.
        ({"archived_s": 90_000.0}, "ok", "000000010000000000000007, 25 hours ago"),
        ({"archived_s": 300.0, "is_behind": True}, "ok", "000000010000000000000007, 5 minutes ago"),
        ({"archived_s": 700.0, "is_behind": True}, "warn", "…07, 12 minutes ago"),
        ({"archived_s": None, "is_behind": True}, "warn", "nothing yet"),
        ({"failed_count": 3, "failed_s": 200_000.0}, "ok", "…07, 5 s ago; failed 3 times, last 2"),
        (
            {"failed_count": 3, "failed_s": 1.0, "is_failing": True},
            *("fail", "…07, 5 s ago; failed 3 times, last 1 s ago"),
        ),
    ],
)
def test_an_archive_that_does_not_follow_is_found(
    changes: dict[str, object], status: str, found: str
) -> None:
    check = last_archived({**FINE, **changes})
    assert check.status == status
    assert check.found.startswith(found.replace("…07", SEGMENT))
    assert bool(check.remedy) == (status != "ok")
