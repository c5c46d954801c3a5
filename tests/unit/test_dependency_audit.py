"""The audit of dependencies never passes for what it is not: it says what it did not look at."""

import json
import sys

import pytest

from tests.dependency_audit import main

SOUND: dict[str, object] = {"name": "a", "version": "1", "vulns": []}
VULNERABLE: dict[str, object] = {
    "name": "b",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}],
}
UNKNOWN: dict[str, object] = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


def _said(text: str, error: str = "", code: int = 0) -> list[str]:
    """A program that says this, in the place of pip-audit."""
    script = f"import sys; print({text!r}); print({error!r}, file=sys.stderr); sys.exit({code})"
    return [sys.executable, "-c", script]


@pytest.mark.parametrize(
    "packages, code, words",
    [
        ([SOUND], 0, ["No vulnerability is known in 1 packages."]),
        ([SOUND, VULNERABLE], 1, ["b 2: PYSEC-1", "fixed in ['3']"]),
        ([SOUND, UNKNOWN], 0, ["in 1 packages", "SKIPPED", "knows nothing of 1 packages: c"]),
        ([UNKNOWN, VULNERABLE], 1, ["PYSEC-1", "SKIPPED"]),
    ],
)
def test_findings_and_gaps_are_told(
    packages: list[object], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_said(json.dumps({"dependencies": packages}))) == code
    told = capsys.readouterr().out
    assert [word for word in words if word not in told] == []
    assert ("SKIPPED" in told) is (UNKNOWN in packages)


def test_service_that_is_away_is_a_printed_skip(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_said("", "Tried to connect to PyPI", 1)) == 0
    assert main([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.1) == 0
    assert capsys.readouterr().out.count("SKIPPED") == 2


def test_failure_of_the_audit_itself_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_said("", "no such option", 2)) == 1
    assert "no such option" in capsys.readouterr().out
