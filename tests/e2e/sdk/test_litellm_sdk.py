"""The litellm SDK as a customer's client, in a process of its own."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import Guest, House
from tests.e2e.sdk.conftest import (
    EMBEDDING_NANOS,
    TEXT,
    VECTOR,
    ClientError,
    Program,
    Refusal,
    Standstill,
    charged,
)

# Its import takes seconds, which one worker spends.

# It has no class for 402.
RAISED = {401: "AuthenticationError", 402: "APIError", 404: "NotFoundError", 429: "RateLimitError"}


@pytest.fixture(scope="module")
def sdk(start_program: Callable[[str], Program]) -> Program:
    return start_program("litellm_sdk.py")


def test_models(house: House, sdk: Program) -> None:
    guest = house.customer(allowed_models=["pri*", "free"])
    assert sdk.do("models", guest) == ["litellm_proxy/free", "litellm_proxy/priced"]


def test_chat(guest: Guest, sdk: Program) -> None:
    answer = sdk.do("chat", guest)
    assert (answer["text"], answer["usage"]["total_tokens"]) == (TEXT, 15)
    charged(guest)


@pytest.mark.parametrize("include_usage", [True, False])
def test_stream(guest: Guest, sdk: Program, include_usage: bool) -> None:  # noqa: FBT001
    answer = sdk.do(
        "stream", guest, stream_options={"include_usage": True} if include_usage else None
    )
    assert answer["text"] == TEXT
    charged(guest)


def test_tools(guest: Guest, sdk: Program, tool_call: dict[str, Any]) -> None:
    (call,) = sdk.do("tools", guest)
    assert (call["id"], call["function"]) == (tool_call["id"], tool_call["function"])
    charged(guest)


def test_embeddings(guest: Guest, sdk: Program) -> None:
    assert sdk.do("embeddings", guest, "embed") == [VECTOR, VECTOR]
    charged(guest, EMBEDDING_NANOS)


def test_responses(guest: Guest, sdk: Program) -> None:
    answer = sdk.do("responses", guest)
    assert (answer["text"], answer["usage"]["total_tokens"]) == (TEXT, 15)
    charged(guest)


def test_streamed_responses(guest: Guest, sdk: Program) -> None:
    assert sdk.do("streamed_responses", guest) == TEXT
    charged(guest)


def test_errors_are_its_own(refusal: Refusal, sdk: Program) -> None:
    with pytest.raises(ClientError) as caught:
        refusal.provoke(lambda: sdk.do("chat", refusal.guest, refusal.model, key=refusal.key))
    error = caught.value.said
    assert error["class"] == RAISED[refusal.status]
    # It keeps an error's text and headers, and of some errors no code.
    assert error["code"] in {refusal.code, None}
    refusal.check(error["status"], refusal.code, error["headers"])


def test_abort(guest: Guest, sdk: Program, standstill: Standstill) -> None:
    assert sdk.do("abort", guest) == TEXT[:8]
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest, sdk: Program) -> None:
    assert sdk.do("parallel", guest) == [TEXT] * 20
    charged(guest, count=20)
