"""docs/api.md says what the code says."""

from pathlib import Path

from tests.api_page.page import render
from tests.support.document import document

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == render(document()), "docs/api.md is outdated: run `make api-docs`"
