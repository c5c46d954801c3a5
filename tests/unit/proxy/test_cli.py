"""The command line: what it takes, what it refuses, and how it says so."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.cli import main
from proxy.up import Trace, kept_secret

Run = Callable[..., tuple[int, str, str]]
ID = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an environment of its own; returns exit code, output and errors."""
    for name in list(os.environ):
        if name.startswith("TALLYGATE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TALLYGATE_DATA_DIR", str(tmp_path / "data"))

    def call(*argv: str, **environ: str) -> tuple[int, str, str]:
        for name, value in environ.items():
            monkeypatch.setenv(f"TALLYGATE_{name.upper()}", value)
        with pytest.raises(SystemExit) as ended:
            main(argv)
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, output.out, output.err

    return call


@pytest.mark.parametrize(
    "words", ["", "up", "serve", "migrate", "audit", "doctor", "key", "account"]
)
def test_every_command_explains_itself(words: str, run: Run) -> None:
    code, output, _ = run(*words.split(), "--help")
    assert code == 0
    assert output.startswith("usage: tallygate")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "fly",
        "key",
        "account grant not-a-uuid 5",
        f"key create {ID} name --rpm 0",
        f"key create {ID} name --rpm many",
        f"key create {ID} name --expires-in soon",
        f"key create {ID} name --expires-in 0d",
        f"key create {ID} name --budget-period week",
        f"key create {ID} name --models ,",
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_done(command: str, run: Run) -> None:
    code, output, errors = run(*command.split())
    assert (code, output) == (2, "")
    assert "usage: tallygate" in errors


def test_serve_names_every_setting_that_it_misses(run: Run) -> None:
    code, _, errors = run("serve")
    assert code == 2
    assert "set TALLYGATE_DATABASE_URL and TALLYGATE_LITELLM_URL" in errors
    assert "tallygate up" in errors


def test_serve_names_the_one_setting_that_it_misses(run: Run) -> None:
    code, _, errors = run("serve", database_url="postgresql://nowhere/x")
    assert code == 2
    assert "set TALLYGATE_LITELLM_URL:" in errors


@pytest.mark.parametrize(
    "command", ["migrate", "audit", "account list", f"key list {ID}", f"key revoke {ID} {ID}"]
)
def test_without_a_database_the_way_to_one_is_named(command: str, run: Run) -> None:
    code, output, errors = run(*command.split())
    assert (code, output) == (2, "")
    assert "start `tallygate up`, or set TALLYGATE_DATABASE_URL" in errors


def test_a_database_url_that_is_none_is_not_repeated(run: Run) -> None:
    code, _, errors = run("audit", database_url="user:hunter2@host/db")
    assert code == 2
    assert "must look like postgresql://" in errors
    assert "hunter2" not in errors


def test_a_wrong_setting_is_named(run: Run) -> None:
    code, _, errors = run("audit", port="high")
    assert code == 2
    assert "port: Input should be a valid integer" in errors


def test_options_of_serve_reach_its_workers_as_settings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOST", "PORT", "WORKERS"):
        monkeypatch.setenv(f"TALLYGATE_{name}", "1")  # so that it is restored afterwards
    run("serve", "--host", "::1", "--port", "4100", "--workers", "3")
    assert os.environ["TALLYGATE_HOST"] == "::1"
    assert os.environ["TALLYGATE_PORT"] == "4100"
    assert os.environ["TALLYGATE_WORKERS"] == "3"


def test_a_secret_is_made_once_and_for_our_eyes_only(tmp_path: Path) -> None:
    path = tmp_path / "admin.key"
    secret = kept_secret(path)
    assert len(secret) > 40
    assert kept_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_trace_of_a_running_service_is_found_if_it_can_be_read(tmp_path: Path) -> None:
    assert Trace.read(tmp_path) is None
    Trace.path(tmp_path).write_text("torn {")
    assert Trace.read(tmp_path) is None
    Trace.path(tmp_path).write_text('{"pid": 1, "base_url": "a", "litellm_url": "b"}')
    assert Trace.read(tmp_path) == Trace(1, "a", "b")
