"""The other half of `Program` in tests/e2e/sdk/conftest.py: a JSON job a line in, a line out."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

Job = dict[str, Any]


def serve(
    cases: Mapping[str, Callable[[Job], Any]], describe: Callable[[Exception], dict[str, Any]]
) -> None:
    """Do what each job's `case` says, until there are no more; `describe` reads an SDK's error."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what an SDK prints is no answer
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer: dict[str, Any] = {"result": cases[job["case"]](job)}
        except Exception as error:  # noqa: BLE001 - whatever an SDK raises is what the test asks for
            answer = {
                "error": {"class": type(error).__name__, "text": str(error), **describe(error)}
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
