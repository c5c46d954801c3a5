"""The guides are true: every command in them runs, in order, against a real service.

The blocks of a page run in one bash and one directory, from the first to the last. One that can't
run here stands behind `<!-- not run: why -->`, and one that another test runs behind
`<!-- run elsewhere: test_… -->`.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import Guest, House
from tests.support.service import ADMIN_KEY, ROOT

DOCS = ROOT / "docs"
PAGES = (
    "customers.md", "selling.md", "webhooks.md", "operations.md", "reviews.md", "backups.md",
    "reconciliation.md", "scaling.md",
)  # fmt: skip
# What says something, and what does something.
SHOWN, RUN = {"json", "yaml", "sql", "text"}, {"sh", "python"}
NOT_RUN = Counter(
    {
        ("customers.md", "needs a provider's key"): 1,
        ("operations.md", "there is no month to dump that ended so long ago"): 1,
        ("reviews.md", "needs jq, which not every machine has"): 1,
        ("backups.md", "needs a server whose log is archived; test_backups.py has one"): 1,
        ("reconciliation.md", "needs a provider's account; test_reconciliation.py has several"): 1,
        ("scaling.md", "asks for a password; test_pooler.py runs the file"): 1,
    }
)
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?(?P<indent> *)```(?P<language>\S*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
# As one who pastes a command sees a failure: curl's own success is that an answer came.
STRICT = """
set -euo pipefail
curl() { command curl --silent --show-error --fail-with-body --write-out '\\n' "$@"; }
"""


@dataclass(frozen=True)
class Block:
    """A block of a page, and what is said of running it."""

    page: str
    line: int
    language: str
    text: str
    mark: str | None

    @property
    def runs(self) -> bool:
        """Whether it is run here."""
        return self.language in RUN and self.mark is None


def blocks_of(page: str) -> list[Block]:
    text = (DOCS / page).read_text()
    found = [
        Block(
            page,
            text.count("\n", 0, match.start("text")) + 1,
            match["language"],
            re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
            match["mark"],
        )
        for match in BLOCK.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^ *```", text, re.MULTILINE)), page
    return found


BLOCKS = {page: blocks_of(page) for page in PAGES}


def test_what_is_not_run_is_known_and_what_runs_elsewhere_is_there() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    not_run: Counter[tuple[str, str]] = Counter()
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        place = f"{block.page}:{block.line}"
        assert block.language in SHOWN | RUN, f"{place} does not say what it is"
        if block.mark is None:
            continue
        kind, _, what = block.mark.partition(": ")
        assert block.language in RUN, place
        assert kind in {"not run", "run elsewhere"}, place
        if kind == "not run":
            not_run[block.page, what] += 1
        else:
            assert f"def {what}(" in tests, f"{place}: no such test"
    assert not_run == NOT_RUN


@pytest.fixture(scope="module")
def sold(make_house: Callable[..., House]) -> House:
    """A service with the configuration of the repository and the tiers of the README."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    del config["litellm"]
    readme = (ROOT / "README.md").read_text()
    (tiers,) = re.findall(r"```yaml\n(default_tier:.*?)```", readme, re.DOTALL)
    return make_house(config=yaml.safe_dump(config | yaml.safe_load(tiers)))


def on_tier_pro(sold: House) -> Guest:
    """A customer who may use every model, with a key that may manage."""
    guest = Guest(sold, sold.service.new_key(role="manage"))
    path = f"/admin/v1/accounts/{guest.customer.account_id}/tier"
    sold.service.admin("PUT", path, {"tier": "pro"})
    return guest


def script_of(page: str) -> str:
    """Put the commands of a page together; each block says where it stands before it begins."""
    blocks = [block for block in BLOCKS[page] if block.runs and block.language == "sh"]
    return STRICT + "".join(f"echo '--- {page}:{block.line}'\n{block.text}" for block in blocks)


@pytest.mark.parametrize(
    "page", [page for page, blocks in BLOCKS.items() if any(block.runs for block in blocks)]
)
def test_commands_of_the_guide_run(sold: House, tmp_path: Path, page: str) -> None:
    guest = on_tier_pro(sold)
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "URL": sold.service.base_url,
        "KEY": guest.customer.key,
        "ADMIN": ADMIN_KEY,
        "ACCOUNT": guest.customer.account_id,
        "ELSEWHERE": str(tmp_path),
        "LITELLM_DIR": str(tmp_path),
    }
    if page == "reviews.md":
        assert guest.chat(model="unpriced").is_success
        guest.wait_settled()
        variables["REQUEST"] = str(guest.usage()["request_id"])
    done = subprocess.run(
        ["bash", "-c", script_of(page)],  # noqa: S607 - whichever the machine has
        env={**sold.service.environ, **variables},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    # The last place that it names is the block that failed.
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "block",
    [
        block
        for blocks in BLOCKS.values()
        for block in blocks
        if block.runs and block.language == "python"
    ],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_python_of_the_guide_runs(
    sold: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], block: Block
) -> None:
    monkeypatch.setenv("URL", sold.service.base_url)
    monkeypatch.setenv("KEY", on_tier_pro(sold).customer.key)
    names: dict[str, Any] = {}
    # In this process, which has the SDKs already: each takes a second to be imported.
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)  # noqa: S102
    names["client"].close()
    assert "A mocked answer." in capsys.readouterr().out
