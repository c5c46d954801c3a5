"""anthropic (Python), on /v1/messages. Its key is the virtual key, as bearer or as x-api-key."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import pytest

from tests.e2e.conftest import Guest, House
from tests.e2e.sdk.conftest import TEXT, Refusal, Standstill, charged

MESSAGES: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
RAISED: dict[int, type[anthropic.APIStatusError]] = {
    401: anthropic.AuthenticationError,
    402: anthropic.PaymentRequiredError,
    404: anthropic.NotFoundError,
    429: anthropic.RateLimitError,
}
TYPES = {
    401: "authentication_error",
    402: "billing_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def client_of(guest: Guest, **options: Any) -> anthropic.Anthropic:
    """A client without retries, so that a test sees each answer; close it."""
    defaults: dict[str, Any] = {
        "base_url": guest.house.service.base_url,
        "api_key": guest.customer.key,
        "max_retries": 0,
        "timeout": 30,
    }
    return anthropic.Anthropic(**(defaults | options))


@pytest.fixture
def client(guest: Guest) -> Iterator[anthropic.Anthropic]:
    """A client of the guest."""
    with client_of(guest) as made:
        yield made


def test_models(house: House) -> None:
    guest = house.customer(allowed_models=["pri*", "free"])
    with client_of(guest) as client:
        assert [model.id for model in client.models.list()] == ["free", "priced"]


def test_messages(guest: Guest, client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="claude", messages=MESSAGES, max_tokens=50)
    assert [block.type == "text" and block.text for block in message.content] == [TEXT]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (10, 5)
    charged(guest)


def test_key_in_the_header_that_others_send(guest: Guest) -> None:
    headers = {"x-api-key": guest.customer.key, "authorization": anthropic.omit}
    with client_of(guest, default_headers=headers) as client:
        client.messages.create(model="claude", messages=MESSAGES, max_tokens=50)
    charged(guest)


def test_stream(guest: Guest, client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="claude", messages=MESSAGES, max_tokens=50) as stream:
        assert "".join(stream.text_stream) == TEXT
        usage = stream.get_final_message().usage
    assert (usage.input_tokens, usage.output_tokens) == (10, 5)
    charged(guest)


def test_tools(guest: Guest, client: anthropic.Anthropic, tool_call: dict[str, Any]) -> None:
    message = client.messages.create(model="claude", messages=MESSAGES, tools=[TOOL], max_tokens=50)
    (block,) = [block for block in message.content if block.type == "tool_use"]
    assert (block.id, block.name, block.input) == (tool_call["id"], "look", {"at": "it"})
    charged(guest)


def test_streamed_tools(
    guest: Guest, client: anthropic.Anthropic, tool_call: dict[str, Any]
) -> None:
    with client.messages.stream(
        model="claude", messages=MESSAGES, tools=[TOOL], max_tokens=50
    ) as stream:
        content = stream.get_final_message().content
    (block,) = [block for block in content if block.type == "tool_use"]
    assert (block.id, block.input) == (tool_call["id"], {"at": "it"})
    charged(guest)


def test_counting_tokens_is_free(guest: Guest, client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="claude", messages=MESSAGES).input_tokens > 0
    assert guest.uncharged()


@pytest.mark.parametrize("streamed", [True, False])
def test_errors_are_its_own(refusal: Refusal, streamed: bool) -> None:  # noqa: FBT001
    model = "claude" if refusal.model == "priced" else refusal.model
    retries = 0 if refusal.status == 429 else anthropic.DEFAULT_MAX_RETRIES
    with (
        client_of(refusal.guest, api_key=refusal.key, max_retries=retries) as client,
        pytest.raises(RAISED[refusal.status]) as caught,
    ):
        refusal.provoke(
            lambda: client.messages.create(
                model=model, messages=MESSAGES, max_tokens=50, stream=streamed
            )
        )
    error: Any = caught.value.body
    assert (error["type"], error["error"]["type"]) == ("error", TYPES[refusal.status])
    refusal.check(caught.value.status_code, error["error"]["code"], caught.value.response.headers)


def test_abort(guest: Guest, client: anthropic.Anthropic, standstill: Standstill) -> None:
    # The message's beginning, the block's and a ping come before the first words.
    standstill.expect("claude", after_chunks=4)
    with client.messages.stream(model="claude", messages=MESSAGES, max_tokens=50) as stream:
        assert next(iter(stream.text_stream)) == TEXT[:8]
    standstill.charges_what_was_generated(guest)


def test_twenty_parallel_streams(guest: Guest, client: anthropic.Anthropic) -> None:
    def stream(_: int) -> str:
        with client.messages.stream(model="claude", messages=MESSAGES, max_tokens=50) as stream:
            return stream.get_final_text()

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(stream, range(20))) == [TEXT] * 20
    charged(guest, count=20)
