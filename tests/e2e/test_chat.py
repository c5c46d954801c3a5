"""Chat completions through the official SDK: the answer, the price, the ledger."""

from decimal import Decimal
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import CHAT, Guest, House
from tests.support.provider import FakeProvider, Reply
from tests.support.service import ADMIN_KEY

# 10 prompt and 5 completion tokens at 1 and 10 dollars a million: 60 micro-dollars, sold double.
COST_PICOS = 60_000_000
PRICE_NANOS = 120_000
MESSAGES: Any = [{"role": "user", "content": "hi"}]


def test_answer_is_the_providers_and_the_charge_is_its_cost_doubled(
    guest: Guest, provider: FakeProvider
) -> None:
    answer = guest.sdk().chat.completions.with_raw_response.create(
        model="priced", messages=MESSAGES, max_tokens=50
    )
    completion = answer.parse()
    assert completion.choices[0].message.content == "Hello from the provider."
    assert completion.usage is not None
    assert completion.usage.total_tokens == 15
    assert answer.headers["x-tallygate-charge-credits"] == "0.12"
    row = guest.usage()
    assert answer.headers["x-request-id"] == str(row["request_id"])
    assert (row["status"], row["cost_picos"], row["cost_source"], row["price"]) == (
        "billed",
        COST_PICOS,
        "header",
        PRICE_NANOS,
    )
    assert guest.balance() == (1_000_000_000 - PRICE_NANOS, 0)
    assert provider.last().headers["authorization"].endswith("provider-key-of-the-house")


def test_customer_and_admin_see_the_same_request_and_only_the_admin_its_cost(
    guest: Guest, house: House
) -> None:
    guest.chat()
    (own,) = guest.get("/api/v1/usage")["data"]
    path = f"/admin/v1/accounts/{guest.customer.account_id}/usage"
    (admins,) = house.service.admin("GET", path)["data"]
    assert own["price"] == {"credits": "0.12", "usd": "0.00012"}
    assert own["usage"]["input_tokens"] == 10
    assert (own["model"], own["status"]) == ("priced", "billed")
    assert not {"cost", "cost_source", "markup"} & set(own)
    assert admins["request_id"] == own["request_id"]
    assert admins["price"] == own["price"]
    assert Decimal(admins["cost"]["usd"]) * Decimal(admins["markup"]) == Decimal("0.00012")
    assert guest.get("/api/v1/balance")["available"] == {"credits": "999.88", "usd": "0.99988"}


def test_stream_brings_every_piece_and_the_price_where_it_was_asked_for(guest: Guest) -> None:
    stream = guest.sdk().chat.completions.create(
        model="priced",
        messages=MESSAGES,
        max_tokens=50,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "Hello from the provider."
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == 15
    assert Decimal(str(usage.model_extra["cost"])) == Decimal("0.00012")  # type: ignore[index]
    row = guest.usage()
    assert (row["status"], row["cost_picos"], row["cost_source"], row["price"]) == (
        "billed",
        COST_PICOS,
        "stream",
        PRICE_NANOS,
    )


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_stream_hides_the_usage_from_a_client_that_did_not_ask(
    guest: Guest, options: dict[str, Any]
) -> None:
    answer = guest.chat(stream=True, **options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert '"usage"' not in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert guest.usage()["price"] == PRICE_NANOS


def test_providers_cost_reaches_no_customer(guest: Guest) -> None:
    plain = guest.chat()
    stream = guest.chat(stream=True, stream_options={"include_usage": True})
    assert "6e-05" not in plain.text + stream.text
    for answer in (plain, stream):
        names = {name.lower() for name in answer.headers}
        assert not {name for name in names if name.startswith(("x-litellm", "llm_provider"))}


def test_tools_go_through_both_ways(guest: Guest, provider: FakeProvider) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    provider.reply("priced", Reply(tool_calls=(call,), finish_reason="tool_calls"))
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    completion = guest.sdk().chat.completions.create(
        model="priced", messages=MESSAGES, tools=[tool], max_tokens=50
    )
    assert completion.choices[0].message.tool_calls is not None
    assert provider.last().json()["tools"] == [tool]


@pytest.mark.parametrize(
    "url", ["https://example.com/cat.png", "data:image/png;base64," + "A" * 400_000]
)
def test_images_go_through_and_their_bytes_are_no_tokens(
    guest: Guest, provider: FakeProvider, url: str
) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    answer = guest.chat(messages=[{"role": "user", "content": content}])
    assert answer.status_code == 200, answer.text
    (part, _) = provider.last().json()["messages"][0]["content"]
    assert part["image_url"]["url"] == url
    # 4096 tokens for the image, not 400,000 for its bytes; the model takes 8192 at most.
    assert guest.usage()["hold"] < 5000 * 5_000 + 50 * 20_000


def test_unknown_provider_parameter_passes(guest: Guest, provider: FakeProvider) -> None:
    assert guest.chat(top_k=7, safe_prompt=True).status_code == 200
    assert provider.last().json()["top_k"] == 7


def test_free_model_costs_nothing_and_is_billed_so(guest: Guest) -> None:
    assert guest.chat(model="free").status_code == 200
    row = guest.usage()
    assert (row["status"], row["price"], row["cost_picos"]) == ("billed", 0, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_unpriced_model_answers_and_asks_for_review(guest: Guest, stream: bool) -> None:  # noqa: FBT001
    answer = guest.chat(model="unpriced", stream=stream)
    assert (answer.status_code, "Hello" in answer.text) == (200, True)
    row = guest.usage()
    assert (row["status"], row["price"], row["review_reason"]) == (
        "needs_review",
        None,
        "price_missing",
    )
    assert guest.uncharged()


def test_cached_tokens_are_counted_apart(guest: Guest, provider: FakeProvider) -> None:
    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 10,
        "total_tokens": 110,
        "prompt_tokens_details": {"cached_tokens": 60},
    }
    provider.reply("cached", Reply(usage=usage))
    guest.chat(model="cached")
    row = guest.usage()
    assert (row["input_tokens"], row["cached_input_tokens"]) == (100, 60)
    # 40 x 1 + 60 x 0.1 + 10 x 10 dollars a million
    assert row["cost_picos"] == 146_000_000


def test_prices_below_a_nano_a_token_are_kept_exactly(guest: Guest) -> None:
    guest.chat(model="odd-cents")
    row = guest.usage()
    assert row["cost_picos"] == 10 * 18_750 + 5 * 75_000
    assert row["price"] == -(-row["cost_picos"] * 2 // 1000)


def test_models_are_listed_for_the_key_that_asks(house: House) -> None:
    guest = house.customer(allowed_models=["pri*", "free"])
    assert [model.id for model in guest.sdk().models.list()] == ["free", "priced"]
    assert guest.sdk().models.retrieve("priced").id == "priced"


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", CHAT),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1/"),
        ("GET", "/v1/../model/info"),
        ("POST", "/v1/%63hat/completion"),
    ],
)
def test_every_other_path_is_unsupported(
    guest: Guest, provider: FakeProvider, method: str, path: str
) -> None:
    with guest.house.service.client(guest.customer.key) as client:
        answer = client.request(method, path, json={"model": "priced", "input": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in {"unsupported_endpoint", "not_found"}
    assert not provider.requests


def test_ledger_tells_the_story_of_a_request(guest: Guest) -> None:
    guest.chat()
    kinds = [entry["kind"] for entry in guest.get("/api/v1/ledger")["data"]]
    assert kinds == ["capture", "hold", "grant"]


def test_admin_key_opens_no_data_plane(house: House) -> None:
    with house.service.client(ADMIN_KEY) as client:
        answer: httpx.Response = client.get("/v1/models")
    assert answer.status_code == 401
