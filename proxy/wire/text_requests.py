"""What requests for text completions, embeddings, moderations and rankings ask for."""

from typing import cast

from pricing.usage import MAX_TOKENS
from proxy.errors import InvalidRequestError
from proxy.wire.body import flag, model_of, read_body, whole_number
from proxy.wire.chat_request import MAX_CHOICES, asks_for_usage
from proxy.wire.fields import Fields, is_null, raw, value_of
from proxy.wire.media import count_parts, refuse_private_addresses
from proxy.wire.request import Request, wants_live_cost

# Cohere's search unit: a query with up to 100 documents, and a document is another one for each
# 500 tokens, the query's included (https://cohere.com/pricing); a token is at least one byte.
_DOCUMENTS_PER_QUERY = 100
_BYTES_PER_DOCUMENT = 500
_MAX_PROMPTS = 2048
# OpenAI's default.
_MODERATION_MODEL = "omni-moderation-latest"


def parse_completion_request(body: bytes) -> Request:
    """Read a text completion; each prompt of a list is answered `n` times."""
    fields = read_body(body)
    prompt = value_of(fields.get("prompt"))
    prompts = _prompts(prompt)
    n = whole_number(fields, "n", MAX_CHOICES) or 1
    # The provider writes `best_of` answers, and is paid for all of them.
    best_of = whole_number(fields, "best_of", MAX_CHOICES) or 1
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=len(body),
        stream=flag(fields, "stream"),
        output_limit=whole_number(fields, "max_tokens", MAX_TOKENS),
        n=max(n, best_of) * prompts,
        is_batch=prompts > 1,
        include_usage=asks_for_usage(fields),
        live_cost=wants_live_cost(fields),
        text=raw([{"role": "user", "content": prompt}]) if isinstance(prompt, str) else None,
    )


def parse_embedding_request(body: bytes) -> Request:
    """Read a request for embeddings: nothing but its input is paid."""
    fields = read_body(body)
    inputs = _required(fields, "input")
    refuse_private_addresses(inputs, param="input")
    media = count_parts(fields["input"], param="input")
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=len(body) - media.tokenless_bytes,
        images=media.images,
        audio_clips=media.audio_clips,
        files=media.files,
        has_images=bool(media.images),
        has_audio=bool(media.audio_clips),
        output_allowance=0,
        is_batch=isinstance(inputs, list),
    )


def parse_moderation_request(body: bytes) -> Request:
    """Read a request for a moderation; OpenAI's API lets the model be left out."""
    fields = read_body(body)
    if is_null(fields.get("model")):
        fields["model"] = raw(_MODERATION_MODEL)
    _required(fields, "input")
    media = count_parts(fields["input"], param="input")
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=len(body) - media.tokenless_bytes,
        images=media.images,
        has_images=bool(media.images),
        output_allowance=0,
        is_batch=True,
    )


def parse_rerank_request(body: bytes) -> Request:
    """Read a request for a ranking, which is paid by the query or by the token."""
    fields = read_body(body)
    if not isinstance(_required(fields, "query"), str):
        raise InvalidRequestError("query must be a string.", param="query")
    documents = _required(fields, "documents")
    if not isinstance(documents, list) or not documents:
        raise InvalidRequestError("documents must be a list of texts.", param="documents")
    count = len(cast("list[object]", documents))
    # The query is read with each document, and counts as a part of its length.
    prompt_bytes = len(body) + count * len(bytes(fields["query"]))
    pieces = count + prompt_bytes // _BYTES_PER_DOCUMENT
    return Request(
        fields=fields,
        model=model_of(fields),
        prompt_bytes=prompt_bytes,
        output_allowance=0,
        is_batch=True,
        units={"queries": -(-pieces // _DOCUMENTS_PER_QUERY)},
    )


def _required(fields: Fields, name: str) -> object:
    value = value_of(fields.get(name))
    if value is None or value in ("", []):
        raise InvalidRequestError(f"{name} is required.", param=name)
    return value


def _prompts(prompt: object) -> int:
    """How many prompts there are: a text or a list of tokens is one, a list of those is many."""
    if isinstance(prompt, str):
        return 1
    if isinstance(prompt, list) and prompt:
        items = cast("list[object]", prompt)
        if all(type(item) is int for item in items):
            return 1
        if len(items) <= _MAX_PROMPTS and all(map(_is_prompt, items)):
            return len(items)
    raise InvalidRequestError(
        f"prompt must be a text, or a list of at most {_MAX_PROMPTS} of them.", param="prompt"
    )


def _is_prompt(item: object) -> bool:
    if isinstance(item, list):
        return all(type(token) is int for token in cast("list[object]", item))
    return isinstance(item, str)
