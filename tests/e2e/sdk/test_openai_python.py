"""openai-python: sync and async."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import Guest, House
from tests.e2e.sdk.conftest import (
    EMBEDDING_NANOS,
    TEXT,
    VECTOR,
    Refusal,
    Standstill,
    charged,
)
from tests.support.provider import FakeProvider

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
}
# It has no class for 402.
RAISED: dict[int, type[openai.APIStatusError]] = {
    401: openai.AuthenticationError,
    402: openai.APIStatusError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
}


def test_models(house: House) -> None:
    guest = house.customer(allowed_models=["pri*", "free"])
    assert [model.id for model in guest.sdk().models.list()] == ["free", "priced"]


def test_chat(guest: Guest) -> None:
    completion = guest.sdk().chat.completions.create(
        model="priced", messages=MESSAGES, max_tokens=50
    )
    assert completion.choices[0].message.content == TEXT
    charged(guest)


@pytest.mark.parametrize("include_usage", [True, False, None])
def test_stream(guest: Guest, include_usage: bool | None) -> None:  # noqa: FBT001
    options: Any = openai.omit if include_usage is None else {"include_usage": include_usage}
    stream = guest.sdk().chat.completions.create(
        model="priced", messages=MESSAGES, max_tokens=50, stream=True, stream_options=options
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == TEXT
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    told = [(usage.total_tokens, (usage.model_extra or {}).get("cost")) for usage in usages]
    # Its `usage` keeps the cost, which is what the customer was charged in dollars.
    assert [(total, Decimal(str(cost))) for total, cost in told] == (
        [(15, Decimal("0.00012"))] if include_usage else []
    )
    charged(guest)


def test_tools(guest: Guest, tool_call: dict[str, Any]) -> None:
    completion = guest.sdk().chat.completions.create(
        model="priced", messages=MESSAGES, tools=[TOOL], max_tokens=50
    )
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.model_dump() == tool_call
    charged(guest)


def test_streamed_tools(guest: Guest, tool_call: dict[str, Any]) -> None:
    with guest.sdk().chat.completions.stream(
        model="priced", messages=MESSAGES, tools=[TOOL], max_tokens=50
    ) as stream:
        completion = stream.get_final_completion()
    (call,) = completion.choices[0].message.tool_calls or []
    assert call.function.arguments == tool_call["function"]["arguments"]
    charged(guest)


# It asks for base64 on its own and decodes what comes.
@pytest.mark.parametrize("encoding", [None, "float"])
def test_embeddings(guest: Guest, encoding: Any) -> None:
    made = guest.sdk().embeddings.create(
        model="embed", input=["a", "b"], encoding_format=encoding or openai.omit
    )
    assert [item.embedding for item in made.data] == [VECTOR, VECTOR]
    charged(guest, EMBEDDING_NANOS)


def test_responses(guest: Guest, provider: FakeProvider) -> None:
    client = guest.sdk()
    made = client.responses.create(model="priced", input="hi", max_output_tokens=50)
    assert made.output_text == TEXT
    assert made.usage is not None
    assert made.usage.total_tokens == 15
    found = client.responses.retrieve(made.id)
    assert (found.id, found.output_text) == (made.id, TEXT)
    client.responses.delete(made.id)
    assert provider.last().method == "DELETE"
    charged(guest)


def test_streamed_responses(guest: Guest) -> None:
    with guest.sdk().responses.stream(model="priced", input="hi", max_output_tokens=50) as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
        final = stream.get_final_response()
    assert (text, final.output_text) == (TEXT, TEXT)
    assert final.usage is not None
    assert final.usage.total_tokens == 15
    charged(guest)


def test_responses_of_others_are_not_found(house: House) -> None:
    made = house.customer().sdk().responses.create(model="priced", input="hi")
    stranger = house.customer().sdk()
    with pytest.raises(openai.NotFoundError):
        stranger.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        stranger.responses.delete(made.id)


def test_errors_are_its_own_and_sent_once(refusal: Refusal) -> None:
    answers: list[httpx.Response] = []
    # A limit of requests is worth waiting for, and these tests don't wait.
    retries = 0 if refusal.status == 429 else openai.DEFAULT_MAX_RETRIES
    client = openai.OpenAI(
        base_url=f"{refusal.guest.house.service.base_url}/v1",
        api_key=refusal.key,
        max_retries=retries,
        http_client=httpx.Client(event_hooks={"response": [answers.append]}),
    )
    with client, pytest.raises(RAISED[refusal.status]) as caught:
        refusal.provoke(
            lambda: client.chat.completions.create(
                model=refusal.model, messages=MESSAGES, max_tokens=50
            )
        )
    assert type(caught.value) is RAISED[refusal.status]
    refusal.check(caught.value.status_code, caught.value.code, caught.value.response.headers)
    assert [answer.status_code for answer in answers].count(refusal.status) == 1


def test_abort(guest: Guest, standstill: Standstill) -> None:
    stream = guest.sdk().chat.completions.create(
        model="priced", messages=MESSAGES, max_tokens=50, stream=True
    )
    assert next(iter(stream)).choices[0].delta.content == TEXT[:8]
    stream.close()
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest) -> None:
    client = guest.sdk()

    def stream(_: int) -> str:
        chunks = client.chat.completions.create(
            model="priced", messages=MESSAGES, max_tokens=50, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(stream, range(20))) == [TEXT] * 20
    charged(guest, count=20)


async def _twenty_at_once(client: openai.AsyncOpenAI) -> list[str]:
    async def stream() -> str:
        chunks = await client.chat.completions.create(
            model="priced", messages=MESSAGES, max_tokens=50, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async with client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(stream()) for _ in range(20)]
    return [task.result() for task in tasks]


def test_twenty_parallel_streams_of_the_async_client(guest: Guest) -> None:
    client = openai.AsyncOpenAI(
        base_url=f"{guest.house.service.base_url}/v1", api_key=guest.customer.key, max_retries=0
    )
    assert asyncio.run(_twenty_at_once(client)) == [TEXT] * 20
    charged(guest, count=20)
