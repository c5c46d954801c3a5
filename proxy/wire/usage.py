"""The `usage` member of OpenAI's answers as LiteLLM sends it: its tokens, and its cost.

LiteLLM brings every provider's usage into OpenAI's shape and adds Anthropic's names for the
cache; `prompt_tokens` has the cached tokens in it whatever the provider counts.
"""

import re
from collections.abc import Mapping
from typing import Annotated, cast

import msgspec

from pricing.errors import UsageUnknownError
from pricing.usage import Usage
from proxy.wire.fields import UNREADABLE, read_fields, value_of

_JSON_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,40})?([eE][+-]?\d{1,3})?")


Count = Annotated[int, msgspec.Meta(ge=0)] | None


class _Creations(msgspec.Struct):
    ephemeral_1h_input_tokens: Count = None


class _Inputs(msgspec.Struct):
    cached_tokens: Count = None
    cache_creation_tokens: Count = None
    cache_write_tokens: Count = None
    audio_tokens: Count = None
    image_tokens: Count = None
    cache_creation_token_details: _Creations | None = None


class _Outputs(msgspec.Struct):
    reasoning_tokens: Count = None
    audio_tokens: Count = None
    image_tokens: Count = None


class _Report(msgspec.Struct):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)]
    completion_tokens: Annotated[int, msgspec.Meta(ge=0)]
    prompt_tokens_details: _Inputs | None = None
    completion_tokens_details: _Outputs | None = None
    cache_read_input_tokens: Count = None
    cache_creation_input_tokens: Count = None


_decode_report = msgspec.json.Decoder(_Report).decode


def read_usage(raw: bytes) -> Usage | None:
    """Read a usage from its JSON; as `usage_from_openai`, and much faster where it is in order."""
    try:
        report = _decode_report(raw)
    except UNREADABLE:
        return usage_from_openai(value_of(msgspec.Raw(raw)))
    prompt, completion = report.prompt_tokens, report.completion_tokens
    if prompt + completion == 0:
        return None
    parts: dict[str, int] = {}
    if report.cache_read_input_tokens:
        parts["cached_input_tokens"] = min(prompt, report.cache_read_input_tokens)
    if report.cache_creation_input_tokens:
        parts["cache_creation_tokens"] = min(prompt, report.cache_creation_input_tokens)
    if report.prompt_tokens_details is not None:
        _add_inputs(parts, report.prompt_tokens_details, prompt)
    if report.completion_tokens_details is not None:
        _add_outputs(parts, report.completion_tokens_details, completion)
    try:
        return Usage(input_tokens=prompt, output_tokens=completion, **parts)
    except UsageUnknownError:
        return None


def _add_inputs(parts: dict[str, int], inputs: _Inputs, prompt: int) -> None:
    """Add the parts of a prompt; what is told there goes before what is told beside it."""
    if inputs.cached_tokens:
        parts["cached_input_tokens"] = min(prompt, inputs.cached_tokens)
    if created := inputs.cache_creation_tokens or inputs.cache_write_tokens:
        parts["cache_creation_tokens"] = min(prompt, created)
    creations = inputs.cache_creation_token_details
    if creations is not None and creations.ephemeral_1h_input_tokens:
        created = parts.get("cache_creation_tokens", 0)
        parts["cache_creation_1h_tokens"] = min(created, creations.ephemeral_1h_input_tokens)
    if inputs.audio_tokens:
        parts["audio_input_tokens"] = min(prompt, inputs.audio_tokens)
    if inputs.image_tokens:
        parts["image_input_tokens"] = min(prompt, inputs.image_tokens)


def _add_outputs(parts: dict[str, int], outputs: _Outputs, completion: int) -> None:
    if outputs.reasoning_tokens:
        parts["reasoning_tokens"] = min(completion, outputs.reasoning_tokens)
    if outputs.audio_tokens:
        parts["audio_output_tokens"] = min(completion, outputs.audio_tokens)
    if outputs.image_tokens:
        parts["image_output_tokens"] = min(completion, outputs.image_tokens)


def usage_from_openai(raw: object) -> Usage | None:
    """Read a decoded usage; None where it tells nothing.

    No request is without a prompt, so a usage of no tokens at all was never counted: it is None
    too, because taken at its word it would make the request free. A part that is larger than its
    whole is cut down to it, and one that is no count is taken for none.
    """
    members = members_of(raw)
    prompt, completion = _wholes(members)
    if prompt is None or completion is None or prompt + completion == 0:
        return None
    inputs = members_of(members.get("prompt_tokens_details"))
    outputs = members_of(members.get("completion_tokens_details"))
    creations = members_of(inputs.get("cache_creation_token_details"))
    try:
        return Usage.clamped(
            input_tokens=prompt,
            cached_input_tokens=first_count(
                inputs.get("cached_tokens"), members.get("cache_read_input_tokens")
            ),
            cache_creation_tokens=first_count(
                inputs.get("cache_creation_tokens"),
                inputs.get("cache_write_tokens"),
                members.get("cache_creation_input_tokens"),
            ),
            cache_creation_1h_tokens=first_count(creations.get("ephemeral_1h_input_tokens")),
            audio_input_tokens=first_count(inputs.get("audio_tokens")),
            image_input_tokens=first_count(inputs.get("image_tokens")),
            output_tokens=completion,
            reasoning_tokens=first_count(outputs.get("reasoning_tokens")),
            audio_output_tokens=first_count(outputs.get("audio_tokens")),
            image_output_tokens=first_count(outputs.get("image_tokens")),
        )
    except UsageUnknownError:
        return None


def cost_text(usage: msgspec.Raw) -> str | None:
    """Return LiteLLM's `usage.cost` in the digits that it came in; None where it is no number."""
    try:
        text = bytes(read_fields(bytes(usage)).get("cost", b"")).decode()
    except UNREADABLE:
        return None
    return text if _JSON_NUMBER.fullmatch(text) else None


def without_cost(value: object) -> object:
    """Return a decoded usage without any member that is named after a cost, however deep.

    `cost`, `cost_details`, `cost_in_usd_ticks`, `total_cost` …: what the provider takes is not
    the customer's to know.
    """
    if isinstance(value, dict):
        members = cast("dict[str, object]", value)
        return {
            name: without_cost(member)
            for name, member in members.items()
            if "cost" not in name.lower()
        }
    if isinstance(value, list):
        return [without_cost(item) for item in cast("list[object]", value)]
    return value


def members_of(value: object) -> Mapping[str, object]:
    """Return an object's members, none where it is no object."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _wholes(members: Mapping[str, object]) -> tuple[int | None, int | None]:
    """Prompt and completion tokens; one that is missing is what the total leaves."""
    prompt = count_of(members.get("prompt_tokens"))
    completion = count_of(members.get("completion_tokens"))
    total = count_of(members.get("total_tokens"))
    if total is not None:
        if prompt is None and completion is not None:
            prompt = max(total - completion, 0)
        elif completion is None and prompt is not None:
            completion = max(total - prompt, 0)
    return prompt, completion


def first_count(*values: object) -> int:
    """The first count that is not 0: LiteLLM fills in one name of several."""
    return next((count for value in values if (count := count_of(value))), 0)


def count_of(value: object) -> int | None:
    """Return a count, however it is written; None where it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is int and value >= 0:
        return value
    return None
