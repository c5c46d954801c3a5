"""openai-node, in Node."""

from collections.abc import Callable
from decimal import Decimal
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

# It has no class for 402.
THROWN = {401: "AuthenticationError", 402: "APIError", 404: "NotFoundError", 429: "RateLimitError"}


@pytest.fixture(scope="module")
def node(start_program: Callable[[str], Program]) -> Program:
    return start_program("openai.mjs")


def test_models(house: House, node: Program) -> None:
    guest = house.customer(allowed_models=["pri*", "free"])
    assert node.do("models", guest) == ["free", "priced"]


def test_chat(guest: Guest, node: Program) -> None:
    answer = node.do("chat", guest)
    assert (answer["text"], answer["usage"]["total_tokens"]) == (TEXT, 15)
    charged(guest)


@pytest.mark.parametrize("include_usage", [True, False, None])
def test_stream(guest: Guest, node: Program, include_usage: bool | None) -> None:  # noqa: FBT001
    options = None if include_usage is None else {"include_usage": include_usage}
    answer = node.do("stream", guest, stream_options=options)
    assert answer["text"] == TEXT
    if include_usage:
        usage = answer["usage"]
        told = (usage["total_tokens"], Decimal(str(usage["cost"])))
        assert told == (15, Decimal("0.00012"))
    else:
        assert answer["usage"] is None
    charged(guest)


def test_tools(guest: Guest, node: Program, tool_call: dict[str, Any]) -> None:
    assert node.do("tools", guest) == [tool_call]
    charged(guest)


def test_streamed_tools(guest: Guest, node: Program, tool_call: dict[str, Any]) -> None:
    (call,) = node.do("streamed_tools", guest)
    assert call["function"]["arguments"] == tool_call["function"]["arguments"]
    charged(guest)


def test_embeddings(guest: Guest, node: Program) -> None:
    assert node.do("embeddings", guest, "embed") == [VECTOR, VECTOR]
    charged(guest, EMBEDDING_NANOS)


def test_responses(guest: Guest, node: Program) -> None:
    answer = node.do("responses", guest)
    assert (answer["text"], answer["usage"]["total_tokens"], answer["found"]) == (TEXT, 15, True)
    charged(guest)


def test_streamed_responses(guest: Guest, node: Program) -> None:
    answer = node.do("streamed_responses", guest)
    assert (answer["text"], answer["last"]) == (TEXT, "response.completed")
    assert answer["usage"]["total_tokens"] == 15
    charged(guest)


def test_errors_are_its_own_and_sent_once(refusal: Refusal, node: Program) -> None:
    # A limit of requests is worth waiting for, and these tests don't wait.
    retries = 0 if refusal.status == 429 else 2
    with pytest.raises(ClientError) as caught:
        refusal.provoke(
            lambda: node.do("chat", refusal.guest, refusal.model, key=refusal.key, retries=retries)
        )
    error = caught.value.said
    assert (error["class"], error["attempts"]) == (THROWN[refusal.status], 1)
    refusal.check(error["status"], error["code"], error["headers"])


def test_abort(guest: Guest, node: Program, standstill: Standstill) -> None:
    assert node.do("abort", guest) == TEXT[:8]
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest, node: Program) -> None:
    assert node.do("parallel", guest) == [TEXT] * 20
    charged(guest, count=20)
