"""langchain-openai. It lists no models."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import langchain_openai.chat_models.base as langchain_errors
import openai
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from tests.e2e.conftest import Guest
from tests.e2e.sdk.conftest import (
    EMBEDDING_NANOS,
    TEXT,
    VECTOR,
    Refusal,
    Standstill,
    charged,
)

TOOL: dict[str, Any] = {
    "name": "look",
    "description": "",
    "parameters": {"type": "object", "properties": {}},
}
# It has no class for 402, and leaves openai-python's.
RAISED: dict[int, type[openai.APIStatusError]] = {
    401: langchain_errors.OpenAIAuthenticationError,
    402: openai.APIStatusError,
    404: langchain_errors.OpenAIModelNotFoundError,
    429: langchain_errors.OpenAIRateLimitError,
}


@pytest.fixture(autouse=True)
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("LANGCHAIN_TRACING_V2", "false")


@pytest.fixture
def model(guest: Guest) -> Iterator[Callable[..., ChatOpenAI]]:
    """Make a chat model that speaks for the guest, unless told otherwise."""
    with httpx.Client(timeout=60) as client:

        def make(**options: Any) -> ChatOpenAI:
            defaults: dict[str, Any] = {
                "base_url": f"{guest.house.service.base_url}/v1",
                "api_key": SecretStr(guest.customer.key),
                "model": "priced",
                "max_completion_tokens": 50,
                "max_retries": 0,
                "http_client": client,
            }
            return ChatOpenAI(**(defaults | options))

        yield make


def test_chat(guest: Guest, model: Callable[..., ChatOpenAI]) -> None:
    message = model().invoke("hi")
    assert message.text == TEXT
    assert message.usage_metadata is not None
    assert message.usage_metadata["total_tokens"] == 15
    charged(guest)


@pytest.mark.parametrize("stream_usage", [True, False, None])
def test_stream(
    guest: Guest,
    model: Callable[..., ChatOpenAI],
    stream_usage: bool | None,  # noqa: FBT001
) -> None:
    whole = AIMessageChunk(content="")
    for chunk in model(stream_usage=stream_usage).stream("hi"):
        assert isinstance(chunk, AIMessageChunk)
        whole += chunk
    assert whole.text == TEXT
    # It asks for usage by itself only where it believes to speak with OpenAI.
    if stream_usage:
        assert whole.usage_metadata is not None
        assert whole.usage_metadata["total_tokens"] == 15
    else:
        assert whole.usage_metadata is None
    charged(guest)


@pytest.mark.parametrize("streaming", [True, False])
def test_tools(
    guest: Guest,
    model: Callable[..., ChatOpenAI],
    tool_call: dict[str, Any],
    streaming: bool,  # noqa: FBT001
) -> None:
    chat: Any = model(streaming=streaming)  # what it binds is half typed
    (call,) = chat.bind_tools([TOOL]).invoke("hi").tool_calls
    assert (call["id"], call["name"], call["args"]) == (tool_call["id"], "look", {"at": "it"})
    charged(guest)


def test_embeddings(guest: Guest) -> None:
    with httpx.Client() as client:
        embeddings = OpenAIEmbeddings(
            base_url=f"{guest.house.service.base_url}/v1",
            api_key=SecretStr(guest.customer.key),
            model="embed",
            http_client=client,
            # Else it would count tokens with a vocabulary from the internet, and send numbers.
            check_embedding_ctx_length=False,
        )
        assert embeddings.embed_documents(["a", "b"]) == [VECTOR, VECTOR]
    charged(guest, EMBEDDING_NANOS)


@pytest.mark.parametrize("streaming", [True, False])
def test_responses(guest: Guest, model: Callable[..., ChatOpenAI], streaming: bool) -> None:  # noqa: FBT001
    message = model(use_responses_api=True, streaming=streaming).invoke("hi")
    assert message.text == TEXT
    assert message.usage_metadata is not None
    assert message.usage_metadata["total_tokens"] == 15
    charged(guest)


@pytest.mark.parametrize("streaming", [True, False])
def test_errors_are_its_own(
    refusal: Refusal,
    model: Callable[..., ChatOpenAI],
    streaming: bool,  # noqa: FBT001
) -> None:
    chat = model(
        api_key=SecretStr(refusal.key),
        model=refusal.model,
        streaming=streaming,
        max_retries=0 if refusal.status == 429 else 2,
    )
    with pytest.raises(openai.APIStatusError) as caught:
        refusal.provoke(lambda: chat.invoke("hi"))
    error = caught.value
    assert type(error) is RAISED[refusal.status]
    refusal.check(error.status_code, error.code, error.response.headers)


def test_abort(guest: Guest, model: Callable[..., ChatOpenAI], standstill: Standstill) -> None:
    stream: Any = model().stream("hi")
    assert next(stream).text == TEXT[:8]
    stream.close()
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest, model: Callable[..., ChatOpenAI]) -> None:
    chat = model()

    def stream(_: int) -> str:
        return "".join(chunk.text for chunk in chat.stream("hi"))

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(stream, range(20))) == [TEXT] * 20
    charged(guest, count=20)
