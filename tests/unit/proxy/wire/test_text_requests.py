"""What bounds the cost of completions, embeddings, moderations and rankings."""

from typing import Any

import msgspec
import pytest

from proxy.errors import InvalidRequestError
from proxy.wire.request import Request
from proxy.wire.text_requests import (
    parse_completion_request,
    parse_embedding_request,
    parse_moderation_request,
    parse_rerank_request,
)


def completion(**members: object) -> Request:
    return parse_completion_request(msgspec.json.encode({"model": "m", "prompt": "x", **members}))


def embedding(**members: object) -> Request:
    return parse_embedding_request(msgspec.json.encode({"model": "m", "input": "x", **members}))


def moderation(**members: object) -> Request:
    return parse_moderation_request(msgspec.json.encode({"model": "m", "input": "x", **members}))


def rerank(**members: object) -> Request:
    body = {"model": "m", "query": "q", "documents": ["a"], **members}
    return parse_rerank_request(msgspec.json.encode(body))


def refused_param(parse: Any, **members: object) -> str | None:
    with pytest.raises(InvalidRequestError) as refused:
        parse(**members)
    return refused.value.param


@pytest.mark.parametrize(
    "members, answers",
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"best_of": 5}, 5),
        ({"n": 3, "best_of": 5}, 5),
        ({"n": 5, "best_of": 3}, 5),
        ({"n": None, "best_of": None}, 1),
        ({"prompt": ["a", "b", "c"]}, 3),
        ({"prompt": ["a", "b", "c"], "n": 2, "best_of": 4}, 12),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"prompt": [[1, 2], "b"], "n": 2}, 4),
        ({"prompt": ["a"]}, 1),
        ({"prompt": ""}, 1),
        ({"prompt": ["a"] * 2048, "n": 128}, 2048 * 128),
    ],
)
def test_every_answer_of_a_completion_that_is_written_counts(
    members: dict[str, Any], answers: int
) -> None:
    assert completion(**members).n == answers


WRONG_PROMPTS: list[Any] = [
    None,
    5,
    True,
    {},
    [],
    [[]] * 2049,
    ["a", 1],
    [1, "a"],
    [1.5],
    [True],
    [[1, True]],
    [[[1]]],
    [{"text": "x"}],
    [None],
]


@pytest.mark.parametrize("prompt", WRONG_PROMPTS)
def test_prompt_whose_answers_can_not_be_counted_is_refused(prompt: object) -> None:
    assert refused_param(completion, prompt=prompt) == "prompt"


@pytest.mark.parametrize("name", ["n", "best_of", "max_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, 10**20, [1]])
def test_number_of_a_completion_that_is_none_is_refused(name: str, value: object) -> None:
    assert refused_param(completion, **{name: value}) == name


def test_completion_is_read() -> None:
    request = completion(max_tokens=7, stream=True, stream_options={"include_usage": True})
    assert (request.output_limit, request.stream, request.include_usage) == (7, True, True)
    assert request.output_allowance is None


def test_tokens_of_a_completion_are_at_most_its_bytes() -> None:
    tokens = list(range(1000))
    assert completion(prompt=tokens).prompt_bytes >= len(tokens)
    assert not completion(prompt=tokens).is_batch
    assert completion(prompt=["a", "b"]).is_batch
    assert completion(prompt="a", suffix="z" * 500).prompt_bytes > 500
    exact = completion(prompt="a").text
    assert exact is not None
    assert msgspec.json.decode(exact) == [{"role": "user", "content": "a"}]
    assert completion(prompt=["a"]).text is None


@pytest.mark.parametrize(
    "given, tokens",
    [
        ("hello", 5),
        (["a", "b", "c"], 3),
        ([1, 2, 3, 50000], 4),
        ([[1, 2], [3, 4, 5]], 5),
        ([{"type": "text", "text": "abc"}], 3),
    ],
)
def test_embedding_is_bounded_by_its_bytes_and_has_no_output(given: object, tokens: int) -> None:
    request = embedding(input=given)
    assert request.prompt_bytes >= tokens
    assert (request.n, request.output_allowance) == (1, 0)
    # Each input of a list may fill the model's context window.
    assert request.is_batch == isinstance(given, list)


@pytest.mark.parametrize("given", [None, "", []])
@pytest.mark.parametrize("parse", [embedding, moderation])
def test_input_is_required(parse: Any, given: object) -> None:
    assert refused_param(parse, input=given) == "input"


def test_media_in_an_embedding_and_a_moderation_are_counted() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    for parse in (embedding, moderation):
        request = parse(input=[picture, {"type": "text", "text": "x"}])
        assert (request.images, request.has_images) == (1, True)
        assert request.prompt_bytes < 5000


@pytest.mark.parametrize(
    "given",
    [
        "gs://bucket/private.png",
        " GS://bucket/private.mp4 ",
        "s3://bucket/a.wav",
        ["a", "s3://bucket/a.wav"],
        [{"image": {"gcsUri": "gs://bucket/private.png"}}],
        [{"type": "image_url", "image_url": {"url": "gs://bucket/private.png"}}],
        [{"type": "file", "file": {"file_id": "file-1"}}],
    ],
)
def test_embedding_of_a_file_in_the_operators_cloud_is_refused(given: object) -> None:
    assert refused_param(embedding, input=given) == "input"


@pytest.mark.parametrize(
    "given", ["how do I copy from gs://bucket?", "https://example.com", "s3", ["gs: //x"]]
)
def test_words_about_clouds_are_words(given: object) -> None:
    assert embedding(input=given).model == "m"


def test_moderation_without_a_model_is_openais_default() -> None:
    assert moderation(model=None).model == "omni-moderation-latest"
    request = parse_moderation_request(b'{"input": "x"}')
    assert msgspec.json.decode(request.fields["model"]) == "omni-moderation-latest"


@pytest.mark.parametrize(
    "documents, queries",
    [
        (["a"], 1),
        (["a"] * 99, 1),
        # The bytes around the documents count as one more piece, in the house's favour.
        (["a"] * 101, 2),
        (["a"] * 1000, 11),
        (["x" * 500 * 100], 2),
        ([{"text": "a"}] * 50, 1),
    ],
)
def test_ranking_is_bounded_by_the_units_that_are_searched(
    documents: list[Any], queries: int
) -> None:
    request = rerank(documents=documents)
    assert request.units == {"queries": queries}
    assert request.output_allowance == 0
    # True search units: a hundred documents each, a document more for each 500 tokens.
    assert queries >= -(-len(documents) // 100)


def test_query_of_a_ranking_counts_once_for_each_document() -> None:
    request = rerank(query="q" * 1000, documents=["a"] * 50)
    assert request.prompt_bytes > 50 * 1000
    # Each document is longer than 500 tokens with it: three pieces instead of one.
    assert request.units["queries"] >= 50 * 3 / 100


@pytest.mark.parametrize(
    "members, param",
    [
        ({"query": None}, "query"),
        ({"query": ["q"]}, "query"),
        ({"query": {"text": "q"}}, "query"),
        ({"documents": None}, "documents"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": {"a": "b"}}, "documents"),
        ({"model": None}, "model"),
        ({"model": "a,b"}, "model"),
    ],
)
def test_ranking_of_a_wrong_kind_is_refused(members: dict[str, Any], param: str) -> None:
    assert refused_param(rerank, **members) == param
