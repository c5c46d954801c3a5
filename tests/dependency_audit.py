"""`python -m tests.dependency_audit`: known vulnerabilities in what the lock has.

pip-audit asks PyPI for them. Where that can't be reached, or does not answer for a package, this
says SKIPPED, and of what: nothing that was not looked at passes for sound. Exits with 1 where a
vulnerability is known, or where pip-audit itself fails.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300
_COMMAND = (
    Path(sys.executable).with_name("pip-audit"),
    "--requirement",
    ROOT / "requirements.lock",
    "--require-hashes",
    "--disable-pip",
    "--progress-spinner=off",
    "--timeout=10",
    "--format=json",
)
# What pip-audit says of a service that it can't talk to.
_UNREACHABLE = ("Tried to connect", "Connection", "Max retries", "timed out", "Could not connect")


def main(command: Sequence[str | Path] = _COMMAND, timeout_s: float = TIMEOUT_S) -> int:
    """Run pip-audit and say what came of it; returns the exit code."""
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return _skipped(f"PyPI did not answer within {timeout_s:.0f} s.")
    try:
        packages = json.loads(finished.stdout)["dependencies"]
    except (ValueError, KeyError):
        if any(words in finished.stderr for words in _UNREACHABLE):
            return _skipped("PyPI can't be reached.")
        print(finished.stderr[-2000:])
        return 1
    found = [
        f"{package['name']} {package['version']}: {each['id']}, fixed in {each['fix_versions']}"
        for package in packages
        for each in package.get("vulns", [])
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    looked_at = len(packages) - len(unknown)
    print("\n".join(found) or f"No vulnerability is known in {looked_at} packages.")
    if unknown:
        _skipped(f"PyPI knows nothing of {len(unknown)} packages: {', '.join(unknown[:5])} …")
    return 1 if found else 0


def _skipped(why: str) -> int:
    print(f"SKIPPED: dependencies were not audited. {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
