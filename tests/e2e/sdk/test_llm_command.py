"""The `llm` command line: `llm openai endpoint` for an address, `llm embed` by its environment.

It tells no classes of errors: it prints the text and exits with 1.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Guest, House
from tests.e2e.sdk.conftest import (
    EMBEDDING_NANOS,
    PRICE_NANOS,
    SILENCE,
    TEXT,
    TOOL_CALL,
    VECTOR,
    Program,
    Refusal,
    Standstill,
    charged,
)
from tests.support.provider import FakeProvider, Reply

# Its import takes seconds, which one worker spends.

FUNCTION = "def look(at: str) -> str:\n    return 'seen ' + at\n"
# For a name that it does not know, `llm` needs a plugin.
PLUGIN = """\
import llm
from llm.default_plugins.openai_models import OpenAIEmbeddingModel

@llm.hookimpl
def register_embedding_models(register):
    register(OpenAIEmbeddingModel("embed", "embed"))
"""
TOOL_REPLY = Reply(content="", tool_calls=(TOOL_CALL,), finish_reason="tool_calls")
REFUSED = {401: "API key", 402: "Add credits", 404: "does not exist"}


@pytest.fixture(scope="module")
def llm(start_program: Callable[[str], Program]) -> Program:
    return start_program("llm_command.py")


def endpoint(guest: Guest, *arguments: str, key: str | None = None, model: str = "priced") -> Any:
    """Return the arguments that ask a model of ours."""
    url = f"{guest.house.service.base_url}/v1"
    credential = key or guest.customer.key
    return ["openai", "endpoint", url, "-m", model, "--key", credential, *arguments]


def test_models(house: House, llm: Program) -> None:
    guest = house.customer(allowed_models=["pri*", "free"])
    run = llm.do("run", guest, arguments=endpoint(guest, "--models"))
    assert (run["text"].split(), run["exit_code"]) == (["free", "priced"], 0)


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_chat(guest: Guest, llm: Program, options: list[str]) -> None:
    run = llm.do("run", guest, arguments=endpoint(guest, "hi", "-o", "max_tokens", "50", *options))
    assert run == {"text": TEXT, "exit_code": 0}
    charged(guest)


def test_tools(guest: Guest, llm: Program, provider: FakeProvider) -> None:
    provider.reply_once("priced", TOOL_REPLY)
    run = llm.do("run", guest, arguments=endpoint(guest, "hi", "--functions", FUNCTION))
    assert (run["text"], run["exit_code"]) == (TEXT, 0)
    assert "seen it" in provider.last().body.decode()
    charged(guest, PRICE_NANOS, count=2)


def test_embeddings_through_the_installed_command(
    guest: Guest, house: House, tmp_path: Path
) -> None:
    entry = tmp_path / "llm_embed-1.dist-info"
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-embed\nVersion: 1\n")
    (entry / "entry_points.txt").write_text("[llm]\nembed = llm_embed\n")
    (tmp_path / "llm_embed.py").write_text(PLUGIN)
    run = subprocess.run(
        [Path(sys.executable).with_name("llm"), "embed", "-m", "embed", "-c", "hi"],
        env={
            **os.environ,
            **SILENCE,
            "HOME": str(tmp_path),
            "LLM_USER_PATH": str(tmp_path),
            "PYTHONPATH": str(tmp_path),
            "OPENAI_BASE_URL": f"{house.service.base_url}/v1",
            "OPENAI_API_KEY": guest.customer.key,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.strip() == str(VECTOR), run.stderr
    charged(guest, EMBEDDING_NANOS)


@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_responses(guest: Guest, llm: Program, options: list[str]) -> None:
    run = llm.do("run", guest, arguments=endpoint(guest, "hi", "--responses", *options))
    assert run == {"text": TEXT, "exit_code": 0}
    charged(guest)


@pytest.mark.parametrize("refusal", [401, 402, 404], indirect=True)
def test_errors_are_told_and_fail_the_command(refusal: Refusal, llm: Program) -> None:
    arguments = endpoint(refusal.guest, "hi", key=refusal.key, model=refusal.model)
    run = llm.do("run", refusal.guest, arguments=arguments)
    assert run["exit_code"] == 1
    assert REFUSED[refusal.status] in run["text"]
    refusal.check_money()


def test_limit_is_waited_for_as_long_as_the_answer_says(
    house: House, llm: Program, standstill: Standstill
) -> None:
    guest = house.customer(max_concurrency=1)
    # The only call that the key may have at once stands still; its limit says to wait a second.
    stream = guest.sdk().chat.completions.create(
        model="priced", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    started = time.monotonic()
    run = llm.do("run", guest, arguments=endpoint(guest, "hi"))
    assert run["exit_code"] == 1
    assert "requests under way" in run["text"]
    assert time.monotonic() - started >= 2, "it tried three times"
    stream.close()
    standstill.charges_what_was_generated(guest)


def test_abort(guest: Guest, llm: Program, standstill: Standstill) -> None:
    run = llm.do("abort", guest, arguments=endpoint(guest, "hi"))
    assert run["exit_code"] == 1
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest, llm: Program) -> None:
    runs = llm.do("parallel", guest, arguments=endpoint(guest, "hi"))
    assert [run["text"] for run in runs] == [TEXT] * 20
    charged(guest, count=20)
