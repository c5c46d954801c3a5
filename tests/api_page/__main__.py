"""Write the page: `python -m tests.api_page docs/api.md`."""

import sys
from pathlib import Path

from tests.api_page.page import render
from tests.support.document import document

Path(sys.argv[1]).write_text(render(document()))
