"""What a request used: tokens by class, and what is not bought by the token.

Providers report wholes (`input_tokens`, `output_tokens`) and parts of them (cached, reasoning,
audio …) that may overlap: a cached token can be an audio token too. `Usage` keeps what was
reported; `by_class` cuts it into classes that do not overlap and add up to the wholes, and both
the cost and the price are computed from those.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from types import MappingProxyType
from typing import Self

from pricing.errors import UsageUnknownError

# No model reads or writes two billion tokens in a request: such a report is garbage.
MAX_TOKENS = 2**31 - 1


class TokenClass(StrEnum):
    """The classes that tokens are priced by; the names are those of the price book."""

    INPUT = "input"
    CACHED_INPUT = "cached_input"
    CACHE_CREATION = "cache_creation"
    CACHE_CREATION_1H = "cache_creation_1h"
    AUDIO_INPUT = "audio_input"
    IMAGE_INPUT = "image_input"
    OUTPUT = "output"
    REASONING = "reasoning"
    AUDIO_OUTPUT = "audio_output"
    IMAGE_OUTPUT = "image_output"

    # Enum's own is a Python function, and every table of prices is looked up by these.
    __hash__ = str.__hash__


OUTPUT_CLASSES = frozenset(
    {
        TokenClass.OUTPUT,
        TokenClass.REASONING,
        TokenClass.AUDIO_OUTPUT,
        TokenClass.IMAGE_OUTPUT,
    }
)
INPUT_CLASSES = frozenset(TokenClass) - OUTPUT_CLASSES

# A class without a price of its own is priced as this one: an unnamed kind of input token is an
# input token. LiteLLM resolves its price map the same way.
FALLBACK_CLASS: Mapping[TokenClass, TokenClass] = MappingProxyType(
    {
        TokenClass.CACHED_INPUT: TokenClass.INPUT,
        TokenClass.CACHE_CREATION: TokenClass.INPUT,
        TokenClass.CACHE_CREATION_1H: TokenClass.CACHE_CREATION,
        TokenClass.AUDIO_INPUT: TokenClass.INPUT,
        TokenClass.IMAGE_INPUT: TokenClass.INPUT,
        TokenClass.REASONING: TokenClass.OUTPUT,
        TokenClass.AUDIO_OUTPUT: TokenClass.OUTPUT,
        TokenClass.IMAGE_OUTPUT: TokenClass.OUTPUT,
    }
)

# The counts of what is bought by the piece, the character, the second or the query.
UNIT_COUNTS = ("images", "input_characters", "audio_ms", "queries")

_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "cached_input_tokens": "input_tokens",
        "cache_creation_tokens": "input_tokens",
        "cache_creation_1h_tokens": "cache_creation_tokens",
        "audio_input_tokens": "input_tokens",
        "image_input_tokens": "input_tokens",
        "reasoning_tokens": "output_tokens",
        "audio_output_tokens": "output_tokens",
        "image_output_tokens": "output_tokens",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one request used; every count is at least 0 and no part exceeds its whole.

    `input_tokens` are all prompt tokens, with the cached, cache-creating, audio and image ones
    in it; `cache_creation_tokens` has the one-hour ones in it; `output_tokens` are all completion
    tokens, with the reasoning, audio and image ones in it.

    The units stand beside the tokens, and often for the same thing: `images` counts generated
    pictures, `input_characters` the text that is to be spoken, `audio_ms` the length of sound
    that was heard or made, in milliseconds, `queries` the search units of a reranking.
    """

    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_creation_tokens: int = 0
    cache_creation_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    image_output_tokens: int = 0
    images: int = 0
    input_characters: int = 0
    audio_ms: int = 0
    queries: int = 0

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, with UsageUnknownError."""
        counts = _all_counts(self)
        # At a glance first: this is made for every answer. `type` because True is no number here.
        if set(map(type, counts)) != _INTEGERS or min(counts) < 0 or max(counts) > MAX_TOKENS:
            named = zip(Usage.__slots__, counts, strict=True)
            wrong = [n for n, c in named if type(c) is not int or not 0 <= c <= MAX_TOKENS]
            raise UsageUnknownError(f"{wrong[0]} must be an integer between 0 and {MAX_TOKENS}")
        if any(_all_parts(self)):
            for name, whole in _PARTS.items():
                count, most = getattr(self, name), getattr(self, whole)
                if count > most:
                    raise UsageUnknownError(f"{name} is {count}, more than the {most} {whole}")

    @classmethod
    def checked(cls, **counts: object) -> Self:
        """Build from values of any type; UsageUnknownError where one can't be a count."""
        return cls.from_dict(counts)

    @classmethod
    def clamped(cls, **counts: int) -> Self:
        """Build from a provider's report, cutting every part down to its whole."""
        kept = dict(counts)
        for part, whole in _PARTS.items():
            if part in kept:
                kept[part] = min(kept[part], kept.get(whole, 0))
        return cls.from_dict(kept)

    @classmethod
    def from_dict(cls, document: Mapping[str, object]) -> Self:
        """Read what `as_dict` wrote; UsageUnknownError for unknown names or impossible counts."""
        unknown = sorted(document.keys() - set(cls.__slots__))
        if unknown:
            raise UsageUnknownError(f"unknown usage fields: {', '.join(unknown)}")
        # The type of each value is checked on construction, with the same error.
        return cls(**document)  # pyright: ignore[reportArgumentType]

    def as_dict(self) -> dict[str, int]:
        """Return the counts that are not 0, and always the two wholes; JSON-able."""
        wholes = ("input_tokens", "output_tokens")
        return {name: n for name, n in self.counts().items() if n or name in wholes}

    @property
    def has_units(self) -> bool:
        """Whether anything was used that may be bought otherwise than by the token."""
        return bool(self.images or self.input_characters or self.audio_ms or self.queries)

    @property
    def total_tokens(self) -> int:
        """All tokens, in and out."""
        return self.input_tokens + self.output_tokens

    def by_class(self) -> dict[TokenClass, int]:
        """Cut the tokens into classes that do not overlap; classes without tokens are left out.

        Where parts overlap a token counts once, in the class that comes first below: cache
        creation, which is dearest, before cache reads; the cache before the modality, as
        LiteLLM does. What no part claims is plain input or plain output.
        """
        if not any(_all_parts(self)):
            plain = ((TokenClass.INPUT, self.input_tokens), (TokenClass.OUTPUT, self.output_tokens))
            return {token_class: count for token_class, count in plain if count}
        tokens = _cut(
            self.input_tokens,
            (
                (TokenClass.CACHE_CREATION_1H, self.cache_creation_1h_tokens),
                (
                    TokenClass.CACHE_CREATION,
                    self.cache_creation_tokens - self.cache_creation_1h_tokens,
                ),
                (TokenClass.CACHED_INPUT, self.cached_input_tokens),
                (TokenClass.AUDIO_INPUT, self.audio_input_tokens),
                (TokenClass.IMAGE_INPUT, self.image_input_tokens),
                (TokenClass.INPUT, self.input_tokens),
            ),
        )
        return tokens | _cut(
            self.output_tokens,
            (
                (TokenClass.AUDIO_OUTPUT, self.audio_output_tokens),
                (TokenClass.IMAGE_OUTPUT, self.image_output_tokens),
                (TokenClass.REASONING, self.reasoning_tokens),
                (TokenClass.OUTPUT, self.output_tokens),
            ),
        )

    def counts(self) -> dict[str, int]:
        """Return every count by its name, those that are 0 as well."""
        return dict(zip(Usage.__slots__, _all_counts(self), strict=True))


_INTEGERS = {int}
_all_counts: Callable[[Usage], tuple[int, ...]] = attrgetter(*Usage.__slots__)
_all_parts: Callable[[Usage], tuple[int, ...]] = attrgetter(*_PARTS)


def _cut(whole: int, parts: tuple[tuple[TokenClass, int], ...]) -> dict[TokenClass, int]:
    """Give each part what is left of the whole, in order."""
    tokens: dict[TokenClass, int] = {}
    for token_class, count in parts:
        taken = min(count, whole)
        if taken:
            tokens[token_class] = taken
            whole -= taken
    return tokens
