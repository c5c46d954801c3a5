"""Pages that are written by hand, but for sections that the runs write themselves."""

from pathlib import Path


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the page's comments `name: begin` and `name: end`; ValueError without."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, has_begin, rest = path.read_text().partition(begin)
    _, has_end, tail = rest.partition(end)
    if not has_begin or not has_end:
        msg = f"{path} lacks {begin} or {end}"
        raise ValueError(msg)
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def read_section(path: Path, name: str) -> str:
    """What was put there last; empty where nothing was."""
    _, _, rest = path.read_text().partition(f"<!-- {name}: begin -->\n")
    return rest.partition(f"<!-- {name}: end -->")[0].strip()
