"""Usages that are not shaped like a chat completion's: Responses, pictures, sound, Messages.

Each reader takes the decoded `usage` and returns None where it tells nothing, as
`usage_from_openai` does.
"""

from collections.abc import Mapping

from pricing.errors import UsageUnknownError
from pricing.usage import Usage
from proxy.wire.usage import count_of, first_count, members_of


def usage_from_responses(value: object) -> Usage | None:
    """Read `input_tokens` and `output_tokens` with their details: Responses, pictures, sound."""
    members = members_of(value)
    given, made = count_of(members.get("input_tokens")), count_of(members.get("output_tokens"))
    if given is None or made is None or given + made == 0:
        return None
    inputs = members_of(members.get("input_tokens_details") or members.get("input_token_details"))
    outputs = members_of(
        members.get("output_tokens_details") or members.get("output_token_details")
    )
    return _usage(
        input_tokens=given,
        cached_input_tokens=first_count(inputs.get("cached_tokens")),
        cache_creation_tokens=first_count(
            inputs.get("cache_creation_tokens"), inputs.get("cache_write_tokens")
        ),
        audio_input_tokens=first_count(inputs.get("audio_tokens")),
        image_input_tokens=first_count(inputs.get("image_tokens")),
        output_tokens=made,
        reasoning_tokens=first_count(outputs.get("reasoning_tokens")),
        audio_output_tokens=first_count(outputs.get("audio_tokens")),
        image_output_tokens=first_count(outputs.get("image_tokens")),
    )


def usage_from_pictures(value: object) -> Usage | None:
    """Read the usage of an answer with pictures: what has no details of its own is all pictures."""
    usage = usage_from_responses(value)
    if usage is None or members_of(value).get("output_tokens_details") is not None:
        return usage
    counts = {**usage.as_dict(), "image_output_tokens": usage.output_tokens}
    return Usage.clamped(**counts)


def usage_from_messages(*reports: object) -> Usage | None:
    """Read Anthropic's usage, where the cached tokens stand beside `input_tokens`, not in them.

    A stream reports in parts: of each count the last part that tells it holds, and a later 0 does
    not take back what an earlier part had counted.
    """
    counts: dict[str, int] = {}
    for report in reports:
        members = members_of(report)
        created = members_of(members.get("cache_creation"))
        told = {**{name: members.get(name) for name in _MESSAGES}, **_one_hour(created)}
        for name, value in told.items():
            if count := count_of(value):
                counts[name] = count
            elif count == 0:
                counts.setdefault(name, 0)
    if counts.get("input_tokens") is None or counts.get("output_tokens") is None:
        return None
    read = counts.get("cache_read_input_tokens", 0)
    written = counts.get("cache_creation_input_tokens", 0)
    whole = counts["input_tokens"] + read + written
    if whole + counts["output_tokens"] == 0:
        return None
    return _usage(
        input_tokens=whole,
        cached_input_tokens=read,
        cache_creation_tokens=written,
        cache_creation_1h_tokens=counts.get("ephemeral_1h_input_tokens", 0),
        output_tokens=counts["output_tokens"],
    )


_MESSAGES = (
    "input_tokens",
    "output_tokens",
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
)


def _one_hour(created: Mapping[str, object]) -> Mapping[str, object]:
    name = "ephemeral_1h_input_tokens"
    return {name: created[name]} if name in created else {}


def usage_from_sound(value: object, seconds: object) -> Usage | None:
    """Read a transcription's usage: tokens, or seconds in it or beside it."""
    members = members_of(value)
    usage = usage_from_responses(value)
    if usage is not None:
        plain = members_of(members.get("input_token_details"))
        if not plain and "input_tokens_details" not in members:
            # Sound is all that there is to listen to.
            return Usage.clamped(**{**usage.as_dict(), "audio_input_tokens": usage.input_tokens})
        return usage
    length = _milliseconds(members.get("seconds"))
    length = _milliseconds(seconds) if length is None else length
    return None if not length else Usage(audio_ms=length)


def usage_from_ranking(meta: object) -> Usage | None:
    """Read the `meta` of a ranking: search units, or tokens, as the provider bills them."""
    billed = members_of(members_of(meta).get("billed_units"))
    queries = count_of(billed.get("search_units"))
    tokens = count_of(billed.get("total_tokens")) or count_of(billed.get("input_tokens"))
    if not queries and not tokens:
        return None
    return Usage(queries=queries or 0, input_tokens=tokens or 0)


def _milliseconds(value: object) -> int | None:
    """Seconds, whole or not, as milliseconds rounded up; providers write them as text too."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 10**7:
        return None
    # To a tenth of a millisecond first, so that 8.470000267 s are not one millisecond more.
    return -(-round(value * 10_000) // 10)


def _usage(**counts: int) -> Usage | None:
    try:
        return Usage.clamped(**counts)
    except UsageUnknownError:
        return None


def read_text(value: object) -> str | None:
    """Return a text that is one, and not empty."""
    return value if isinstance(value, str) and value else None
