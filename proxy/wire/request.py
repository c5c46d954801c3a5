"""What a request asks for, as far as metering it goes, whichever endpoint it came to.

Only what decides about money is decoded; the rest stays the bytes that came. The upstream body is
written anew from the parsed members, so that it has no name twice and nothing that another parser
could read in another way.
"""

from collections.abc import Mapping

import msgspec

from proxy.byok import members_with_key
from proxy.wire.body import decoded
from proxy.wire.fields import Fields, is_null, raw
from proxy.wire.form import Form


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds of a request's cost, and what its answer has to look like.

    `fields` are all its top-level members. `prompt_bytes` is at least as many as the tokens that
    the request's text can become; pictures, audio clips and files come on top.

    Attributes:
        output_limit: the client's own limit of tokens for each of `n` answers.
        output_allowance: the most tokens of an answer that no limit of the client's bounds, where
            the endpoint says it; 0 where an answer is not paid by its tokens.
        prediction_bytes: bounds the predicted tokens that are charged as output without being part
            of the answer.
        units: the most of what is not bought by the token: images, input_characters, audio_ms,
            queries.
        is_batch: whether the prompt is many inputs, each within the model's context window.
        continues: the id of a stored answer that the prompt goes on from.
        text: messages whose tokens LiteLLM can count exactly.
        form: the body, where it is no JSON.
        is_text: whether the answer is to be plain text.
    """

    fields: Fields
    model: str
    prompt_bytes: int
    stream: bool = False
    output_limit: int | None = None
    output_allowance: int | None = None
    n: int = 1
    include_usage: bool = False
    live_cost: bool = False
    images: int = 0
    audio_clips: int = 0
    files: int = 0
    prediction_bytes: int = 0
    has_audio: bool = False
    has_images: bool = False
    service_tier: str | None = None
    units: Mapping[str, int] = msgspec.field(default_factory=dict[str, int])
    is_batch: bool = False
    continues: str | None = None
    text: msgspec.Raw | None = None
    form: Form | None = None
    is_text: bool = False


def upstream_body(
    request: Request,
    *,
    fields: Mapping[str, msgspec.Raw],
    output_limit: int | None,
    api_key: str | None,
    output_limits: tuple[str, ...],
    reports_usage: bool,
) -> bytes:
    """Write the body for LiteLLM from the members that may pass.

    With `reports_usage` a stream is told to report its usage, whatever the client asked.
    `output_limit` caps each answer: in the members of `output_limits` that the client used, or in
    the last of them. `api_key` is the customer's own.
    """
    members: dict[str, object] = dict(fields)
    if request.stream:
        options = decoded(request.fields, "stream_options", Fields, "an object") or {}
        options.pop("tallygate", None)
        if reports_usage:
            members["stream_options"] = {**options, "include_usage": raw(value=True)}
        elif "stream_options" in members:
            members["stream_options"] = options
    if output_limit is not None and output_limits:
        used = [name for name in output_limits if not is_null(fields.get(name))]
        members |= dict.fromkeys(used or [output_limits[-1]], output_limit)
    if api_key is not None:
        members |= members_with_key(api_key)
    return msgspec.json.encode(members)


def wants_live_cost(fields: Fields) -> bool:
    """Whether `stream_options` asks for running costs: {"tallygate": {"live_cost": true}}."""
    options = decoded(fields, "stream_options", Fields, "an object") or {}
    ours = decoded(options, "tallygate", dict[str, object], "an object") or {}
    return ours.get("live_cost") is True
