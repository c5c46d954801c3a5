"""What an invariant is."""

from dataclasses import dataclass
from typing import LiteralString


@dataclass(frozen=True, slots=True)
class Invariant:
    """`checked` counts the rows that it speaks of; `broken` selects those that break it."""

    name: str
    promise: str
    checked: LiteralString
    broken: LiteralString
