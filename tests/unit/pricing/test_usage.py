import pytest

from pricing.errors import UsageUnknownError
from pricing.usage import MAX_TOKENS, UNIT_COUNTS, TokenClass, Usage


def test_classes_do_not_overlap_and_add_up_to_the_wholes() -> None:
    usage = Usage(
        input_tokens=100,
        cached_input_tokens=20,
        cache_creation_tokens=30,
        cache_creation_1h_tokens=10,
        audio_input_tokens=5,
        image_input_tokens=6,
        output_tokens=50,
        reasoning_tokens=7,
        audio_output_tokens=8,
        image_output_tokens=9,
    )
    assert usage.by_class() == {
        TokenClass.CACHE_CREATION_1H: 10,
        TokenClass.CACHE_CREATION: 20,
        TokenClass.CACHED_INPUT: 20,
        TokenClass.AUDIO_INPUT: 5,
        TokenClass.IMAGE_INPUT: 6,
        TokenClass.INPUT: 39,
        TokenClass.AUDIO_OUTPUT: 8,
        TokenClass.IMAGE_OUTPUT: 9,
        TokenClass.REASONING: 7,
        TokenClass.OUTPUT: 26,
    }
    assert usage.total_tokens == 150


def test_a_cached_audio_token_counts_once() -> None:
    usage = Usage(input_tokens=10, cached_input_tokens=8, audio_input_tokens=6)
    assert usage.by_class() == {TokenClass.CACHED_INPUT: 8, TokenClass.AUDIO_INPUT: 2}


@pytest.mark.parametrize(
    "counts",
    [
        {"input_tokens": -1},
        {"input_tokens": True},
        {"output_tokens": 1.0},
        {"output_tokens": "1"},
        {"output_tokens": None},
        {"output_tokens": MAX_TOKENS + 1},
        {"input_tokens": 1, "cached_input_tokens": 2},
        {"input_tokens": 1, "cache_creation_1h_tokens": 1},
        {"output_tokens": 1, "reasoning_tokens": 2},
        {"audio_ms": -1},
        {"input_characters": 1.5},
        {"queries": MAX_TOKENS + 1},
        {"audio_tokens": 1},
    ],
)
def test_impossible_counts_are_refused(counts: dict[str, object]) -> None:
    with pytest.raises(UsageUnknownError):
        Usage.checked(**counts)
    with pytest.raises(UsageUnknownError):
        Usage.from_dict(counts)


@pytest.mark.parametrize("name", UNIT_COUNTS)
def test_units_stand_beside_the_tokens(name: str) -> None:
    usage = Usage.clamped(**{name: 3})
    assert usage.has_units
    assert usage.by_class() == {}
    assert usage.total_tokens == 0
    assert usage.as_dict() == {"input_tokens": 0, "output_tokens": 0, name: 3}
    assert Usage.from_dict(usage.as_dict()) == usage
    assert not Usage(input_tokens=3).has_units


def test_clamping_cuts_parts_down_to_their_wholes() -> None:
    usage = Usage.clamped(
        input_tokens=10,
        cached_input_tokens=12,
        cache_creation_tokens=11,
        cache_creation_1h_tokens=99,
        output_tokens=3,
        reasoning_tokens=2,
        images=1,
    )
    assert usage == Usage(
        input_tokens=10,
        cached_input_tokens=10,
        cache_creation_tokens=10,
        cache_creation_1h_tokens=10,
        output_tokens=3,
        reasoning_tokens=2,
        images=1,
    )
    assert Usage.clamped(reasoning_tokens=5) == Usage()


def test_the_dict_names_the_wholes_and_what_is_not_zero() -> None:
    assert Usage().as_dict() == {"input_tokens": 0, "output_tokens": 0}
    usage = Usage(input_tokens=3, cached_input_tokens=1, images=2)
    assert usage.as_dict() == {
        "input_tokens": 3,
        "cached_input_tokens": 1,
        "output_tokens": 0,
        "images": 2,
    }
    assert Usage.from_dict(usage.as_dict()) == usage
