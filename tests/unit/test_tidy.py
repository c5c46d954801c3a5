"""The house is in order: sizes, names, and pages that say what the code does."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from pricing.price_book import parse_price_book
from proxy import metrics
from proxy.settings import Settings

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "pricing").rglob("*.py"), *(ROOT / "proxy").rglob("*.py")])
PAGES = "\n".join(
    path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)


def settings_of(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from settings_of(inner, f"{prefix}{name.upper()}__")
        elif name not in {"litellm", "price_book"}:  # sections of config.yaml, described there
            yield prefix + name.upper()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_can_be_read_in_one_sitting(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 500
    long = [
        f"{node.name} {node.end_lineno - node.lineno + 1}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 70
        and path.name != "app.py"  # the composition root is one list of what there is
    ]
    assert not long


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name", list(settings_of(Settings, "")))
def test_setting_is_documented(name: str) -> None:
    section, _, member = name.partition("__")
    wanted = rf"TALLYGATE_{section}__…`.*`{member}`" if member else rf"TALLYGATE_{name}\b"
    assert re.search(wanted, PAGES), f"{name} is described nowhere"


@pytest.mark.parametrize(
    "name",
    [
        *metrics.SCRAPED_GAUGES,
        *(
            metric._name  # noqa: SLF001
            for metric in vars(metrics).values()
            if hasattr(metric, "_documentation")
        ),
    ],
)
def test_metric_is_documented(name: str) -> None:
    assert re.search(rf"`{name}(_total)?`", PAGES), f"{name} is described nowhere"


def test_guarantees_name_tests_that_exist() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_[a-z0-9_]+)(?:…)?`", design):
        assert f"def {name}" in tests, name


def headings_of(page: Path) -> set[str]:
    """What a page's headings are called in links."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_between_pages_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    headings = {page: headings_of(page) for page in pages}
    for page in pages:
        for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            other = (page.parent / target).resolve() if target else page
            assert other.exists(), f"{page.name}: {target}"
            if heading:
                assert heading in headings[other], f"{page.name}: {target}#{heading}"


def test_no_file_names_a_registry_or_a_place_on_a_machine() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"],  # noqa: S607 - whichever git made the checkout
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    words = ["files.python" + "hosted", "registry." + "npmjs", "pypi." + "org/simple"]
    found = [
        f"{name}: {word}"
        for name in tracked
        if (ROOT / name).is_file()
        for word in words
        if word in (ROOT / name).read_text(errors="ignore")
    ]
    assert not found


def test_price_book_of_the_readme_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(price_book:.*?)```", PAGES, re.DOTALL)
    book = parse_price_book(yaml.safe_load(example)["price_book"])
    assert len(book.rules) == 4
