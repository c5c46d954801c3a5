"""Whoever meets a reason for a review finds in the runbook what to do about it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def reasons_given() -> set[str]:
    """Read the reasons off the places that give them."""
    metering = (ROOT / "proxy" / "metering.py").read_text()
    relays = "".join((ROOT / "proxy" / name).read_text() for name in ("relay.py", "streaming.py"))
    schema = (ROOT / "schema.sql").read_text()
    found = set(re.findall(r'problem="([a-z_]+)"', metering))
    found |= set(re.findall(r'problem="[a-z_]+" if .* else "([a-z_]+)"', metering))
    found |= set(re.findall(r'cost\.problem or "([a-z_]+)"', metering))
    found |= set(re.findall(r'"([a-z_]+)" if is_wrong', metering))
    for line in re.findall(r"incomplete = (.*)", relays):
        found |= set(re.findall(r'"([a-z_]+)"', line))
    aside = (ROOT / "proxy" / "set_aside.py").read_text()
    found |= set(re.findall(r'^REASON = "([a-z_]+)"', aside, re.MULTILINE))
    found |= set(re.findall(r"review_reason, '([a-z_]+)'\)", schema))
    found |= set(re.findall(r"WHEN p\.action = 'expire' THEN '([a-z_]+)'\n *WHEN p\.over", schema))
    return found


def test_every_reason_that_is_given_stands_in_the_runbook() -> None:
    rows = re.findall(
        r"^\| `([a-z_]+)` \|", (ROOT / "docs" / "reviews.md").read_text(), re.MULTILINE
    )
    decisions = {"charge", "waive", "reprice"}
    assert sorted(set(rows) - decisions) == sorted(reasons_given())
