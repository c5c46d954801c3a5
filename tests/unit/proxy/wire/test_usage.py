from typing import Any

import msgspec
import pytest

from pricing.usage import MAX_TOKENS, Usage
from proxy.wire.usage import cost_text, usage_from_openai, without_cost


def test_openai_usage_with_all_details_is_read() -> None:
    usage = usage_from_openai(
        {
            "prompt_tokens": 100,
            "completion_tokens": 50,
            "total_tokens": 150,
            "prompt_tokens_details": {"cached_tokens": 40, "audio_tokens": 3, "image_tokens": 2},
            "completion_tokens_details": {
                "reasoning_tokens": 20,
                "audio_tokens": 5,
                "image_tokens": 4,
                "text_tokens": 21,
            },
        }
    )
    assert usage == Usage(
        input_tokens=100,
        cached_input_tokens=40,
        audio_input_tokens=3,
        image_input_tokens=2,
        output_tokens=50,
        reasoning_tokens=20,
        audio_output_tokens=5,
        image_output_tokens=4,
    )


def test_anthropic_names_of_the_cache_count_too() -> None:
    usage = usage_from_openai(
        {
            "prompt_tokens": 100,
            "completion_tokens": 1,
            "cache_creation_input_tokens": 30,
            "cache_read_input_tokens": 60,
            "prompt_tokens_details": {
                "cached_tokens": 0,
                "cache_creation_token_details": {"ephemeral_1h_input_tokens": 10},
            },
        }
    )
    assert usage == Usage(
        input_tokens=100,
        cached_input_tokens=60,
        cache_creation_tokens=30,
        cache_creation_1h_tokens=10,
        output_tokens=1,
    )


@pytest.mark.parametrize("name", ["cache_creation_tokens", "cache_write_tokens"])
def test_either_name_of_cache_creation_is_read(name: str) -> None:
    usage = usage_from_openai(
        {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {name: 5}}
    )
    assert usage is not None
    assert usage.cache_creation_tokens == 5


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "usage",
        {},
        {"prompt_tokens": 5},
        {"completion_tokens": 5},
        {"prompt_tokens": None, "completion_tokens": None, "total_tokens": 7},
        {"prompt_tokens": -1, "completion_tokens": 5},
        {"prompt_tokens": "5", "completion_tokens": 5},
        {"prompt_tokens": True, "completion_tokens": 5},
        {"prompt_tokens": 1.5, "completion_tokens": 5},
        {"prompt_tokens": float("inf"), "completion_tokens": 5},
        {"prompt_tokens": MAX_TOKENS + 1, "completion_tokens": 5},
    ],
)
def test_garbage_is_no_usage(raw: object) -> None:
    assert usage_from_openai(raw) is None


def test_usage_without_any_token_is_no_usage() -> None:
    # LiteLLM sends this where the provider told nothing; it would make the request free.
    zeros = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert usage_from_openai(zeros) is None


@pytest.mark.parametrize(
    "raw, tokens",
    [
        ({"prompt_tokens": 5, "total_tokens": 9}, (5, 4)),
        ({"completion_tokens": 5, "total_tokens": 9}, (4, 5)),
        ({"prompt_tokens": 5, "total_tokens": 2}, (5, 0)),
        ({"prompt_tokens": 5.0, "completion_tokens": 2, "total_tokens": 99}, (5, 2)),
    ],
)
def test_a_missing_whole_is_what_the_total_leaves(
    raw: dict[str, Any], tokens: tuple[int, int]
) -> None:
    usage = usage_from_openai(raw)
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == tokens


def test_parts_that_are_impossible_are_cut_or_ignored() -> None:
    usage = usage_from_openai(
        {
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "prompt_tokens_details": {"cached_tokens": 11, "audio_tokens": "many"},
            "completion_tokens_details": [{"reasoning_tokens": 1}],
        }
    )
    assert usage == Usage(input_tokens=10, cached_input_tokens=10, output_tokens=2)


@pytest.mark.parametrize(
    "usage, text",
    [
        (b'{"cost":0.00026000000000000003}', "0.00026000000000000003"),
        (b'{"cost": 1.35e-05 }', "1.35e-05"),
        (b'{"cost":0}', "0"),
        (b'{"cost":null}', None),
        (b'{"cost":"0.1"}', None),
        (b'{"cost":{"total_cost":0.1}}', None),
        (b'{"cost":1' + b"0" * 99 + b"}", None),
        (b"{}", None),
        (b"null", None),
        (b"[1]", None),
        (b'{"cost":"\xff"}', None),
    ],
)
def test_cost_is_kept_in_its_digits(usage: bytes, text: str | None) -> None:
    assert cost_text(msgspec.Raw(usage)) == text


def test_no_member_that_names_a_cost_is_left() -> None:
    usage = {
        "prompt_tokens": 1,
        "cost": 0.1,
        "cost_details": {"upstream_inference_cost": 0.1},
        "COST_IN_USD_TICKS": 5,
        "prompt_tokens_details": {"cached_tokens": 1, "cache_cost": 2},
        "iterations": [{"total_cost": 1, "tokens": 2}],
    }
    assert without_cost(usage) == {
        "prompt_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 1},
        "iterations": [{"tokens": 2}],
    }
