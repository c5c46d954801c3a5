"""Which provider key a call goes out with, of those that a customer sent."""

from collections.abc import Callable, Mapping

import pytest

from proxy.byok import choose_provider_key
from proxy.errors import InvalidRequestError

NAMES = [
    ("X-Provider-Key", b"x-provider-key", "*"),
    ("X-OpenAI-Key", b"x-openai-key", "openai"),
    ("X-Anthropic-Key", b"x-anthropic-key", "anthropic"),
]


def sent(headers: Mapping[bytes, str]) -> Callable[[bytes], str | None]:
    return headers.get


@pytest.mark.parametrize(
    "headers, chosen",
    [
        ({}, None),
        ({b"x-openai-key": " sk-o "}, "sk-o"),
        ({b"x-anthropic-key": "sk-a"}, None),
        ({b"x-provider-key": "sk-p"}, "sk-p"),
        ({b"x-provider-key": "sk-p", b"x-openai-key": "sk-o"}, "sk-o"),
        ({b"x-provider-key": "sk-p", b"x-anthropic-key": "sk-a"}, "sk-p"),
    ],
)
def test_key_for_the_models_provider_goes_before_one_for_any(
    headers: Mapping[bytes, str], chosen: str | None
) -> None:
    assert choose_provider_key(sent(headers), NAMES, "openai") == chosen


@pytest.mark.parametrize("blank", ["", " ", "\t"])
@pytest.mark.parametrize("header", [b"x-provider-key", b"x-openai-key", b"x-anthropic-key"])
def test_blank_key_is_refused_whomever_it_is_for(header: bytes, blank: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        choose_provider_key(sent({header: blank}), NAMES, "openai")
    assert caught.value.code == "blank_provider_key"
