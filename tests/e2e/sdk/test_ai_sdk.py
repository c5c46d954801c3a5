"""Vercel's AI SDK, in Node: `@ai-sdk/openai`, and `@ai-sdk/openai-compatible` where they differ.

It lists no models. It heeds no x-should-retry: a status alone says whether it tries again.
"""

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


@pytest.fixture(scope="module")
def node(start_program: Callable[[str], Program]) -> Program:
    return start_program("ai_sdk.mjs")


@pytest.mark.parametrize("case", ["chat", "compatible_chat"])
def test_chat(guest: Guest, node: Program, case: str) -> None:
    answer = node.do(case, guest)
    assert (answer["text"], answer["usage"]["totalTokens"]) == (TEXT, 15)
    charged(guest)


@pytest.mark.parametrize(
    "case, include_usage",
    [("stream", True), ("compatible_stream", True), ("compatible_stream", False)],
)
def test_stream(guest: Guest, node: Program, case: str, include_usage: bool) -> None:  # noqa: FBT001
    answer = node.do(case, guest, include_usage=include_usage)
    assert answer["text"] == TEXT
    assert answer["usage"].get("totalTokens") == (15 if include_usage else None)
    charged(guest)


def test_tools(guest: Guest, node: Program, tool_call: dict[str, Any]) -> None:
    (call,) = node.do("tools", guest)["calls"]
    assert (call["toolCallId"], call["toolName"]) == (tool_call["id"], "look")
    assert call["input"] == {"at": "it"}
    charged(guest)


def test_embeddings(guest: Guest, node: Program) -> None:
    assert node.do("embeddings", guest, "embed") == [VECTOR, VECTOR]
    charged(guest, EMBEDDING_NANOS)


@pytest.mark.parametrize("case", ["responses", "streamed_responses"])
def test_responses(guest: Guest, node: Program, case: str) -> None:
    answer = node.do(case, guest)
    assert (answer["text"], answer["usage"]["totalTokens"]) == (TEXT, 15)
    charged(guest)


@pytest.mark.parametrize("case", ["chat", "stream", "compatible_chat"])
def test_errors_are_its_own(refusal: Refusal, node: Program, case: str) -> None:
    with pytest.raises(ClientError) as caught:
        refusal.provoke(lambda: node.do(case, refusal.guest, refusal.model, key=refusal.key))
    error = caught.value.said
    # One class for all; what is worth another attempt is told apart.
    assert (error["class"], error["retryable"]) == ("AI_APICallError", refusal.status == 429)
    refusal.check(error["status"], error["code"], error["headers"])


def test_short_of_credits_is_no_reason_to_try_again(house: House, node: Program) -> None:
    guest = house.customer(credits="0")
    with pytest.raises(ClientError) as caught:
        node.do("retried", guest)
    # An AI_RetryError would tell of several attempts.
    assert (caught.value.said["class"], caught.value.said["status"]) == ("AI_APICallError", 402)


def test_abort(guest: Guest, node: Program, standstill: Standstill) -> None:
    assert node.do("abort", guest) == TEXT[:8]
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest, node: Program) -> None:
    assert node.do("parallel", guest) == [TEXT] * 20
    charged(guest, count=20)
