"""What a price is made of, before a call and after it."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from tests.e2e.conftest import Guest, House
from tests.support.provider import FakeProvider, Reply

CHAT: dict[str, Any] = {"model": "priced", "messages": [{"role": "user", "content": "hi"}]}
PER_TOKEN = """
price_book:
  default: {kind: markup, factor: "2.0"}
  rules:
    - {model: "priced", kind: per_token, minimum: "0.5",
       credits: {input: "0.1", output: "1"}}
    - {model: "dear", kind: flat, credits: "7", allow_loss: true}
"""


@pytest.fixture(scope="module")
def token_house(make_house: Callable[..., House]) -> House:
    """A service that sells tokens by its own price list."""
    return make_house(config=PER_TOKEN)


def estimate(guest: Guest, body: dict[str, Any], *, path: str = "", status: int = 200) -> Any:
    with guest.house.service.client(guest.customer.key) as client:
        answer = client.post("/api/v1/estimate" + path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def receipt(guest: Guest) -> Any:
    return guest.get(f"/api/v1/usage/{guest.usage()['request_id']}")


def test_receipt_of_a_markup_adds_up_and_tells_no_cost(
    guest: Guest, provider: FakeProvider
) -> None:
    provider.reply("priced", Reply(prompt_tokens=7, completion_tokens=3))
    answer = guest.chat()
    told = receipt(guest)
    # 7 x 1e-6 + 3 x 1e-5 dollars, twice.
    assert told["price"] == {"credits": "0.074", "usd": "0.000074"}
    assert told["captured"] == told["price"]
    assert told["request_id"] == answer.headers["x-request-id"]
    assert (told["rule"], told["price_version"], told["status"]) == ("default", 1, "billed")
    assert told["usage"]["input_tokens"] == 7
    assert [line["label"] for line in told["lines"]] == ["usage", "rounding"]
    assert all(line["quantity"] is None for line in told["lines"])
    assert sum(Decimal(line["usd"]) for line in told["lines"]) == Decimal(told["price"]["usd"])
    assert [entry["kind"] for entry in told["entries"]] == ["hold", "capture"]
    assert told["entries"][0]["amount"] == told["hold"]
    assert told["settled_at"] >= told["created_at"]
    assert "cost" not in str(told)
    assert "0.000037" not in str(told)


def test_receipt_of_a_token_price_has_a_line_for_each_class(
    token_house: House, provider: FakeProvider
) -> None:
    guest = token_house.customer()
    provider.reply("priced", Reply(prompt_tokens=1000, completion_tokens=500))
    guest.chat()
    told = receipt(guest)
    assert [(line["label"], line["quantity"], Decimal(line["usd"])) for line in told["lines"]] == [
        ("input", 1000, Decimal("0.0001")),
        ("output", 500, Decimal("0.0005")),
        # The provider took 0.006 dollars, and this rule may not lose.
        ("least_price", None, Decimal("0.0054")),
        ("rounding", None, Decimal(0)),
    ]
    assert told["price"]["credits"] == "6"


def test_receipt_of_a_flat_price(token_house: House, provider: FakeProvider) -> None:
    guest = token_house.customer()
    provider.reply("dear", Reply(prompt_tokens=1, completion_tokens=1))
    guest.chat(model="dear", max_tokens=1)
    told = receipt(guest)
    assert next((line["label"], line["usd"]) for line in told["lines"]) == ("flat", "0.007")
    assert told["rule"] != "default"


def test_receipt_of_what_was_not_charged_has_no_lines(guest: Guest, provider: FakeProvider) -> None:
    provider.reply("priced", Reply(status=500))
    assert guest.chat().status_code == 502
    told = receipt(guest)
    assert (told["status"], told["lines"], told["price"]) == ("void", None, None)
    assert [entry["kind"] for entry in told["entries"]] == ["hold", "void"]


def test_nobody_elses_receipt_is_shown(guest: Guest, house: House) -> None:
    guest.chat()
    other = house.customer()
    with house.service.client(other.customer.key) as client:
        for wanted in (guest.usage()["request_id"], "nonsense", "..%2fbalance"):
            assert client.get(f"/api/v1/usage/{wanted}").status_code == 404


def test_estimate_is_the_hold_and_the_likely_price_is_near(
    guest: Guest, provider: FakeProvider
) -> None:
    body = {**CHAT, "max_tokens": 100}
    told = estimate(guest, body)
    assert told["admitted"]
    assert told["model"] == "priced"
    assert told["tokens"]["output"] == {"ceiling": 100, "likely": 100}
    assert Decimal(told["likely"]["usd"]) <= Decimal(told["ceiling"]["usd"])
    assert guest.uncharged()
    assert provider.requests == []
    guest.chat(max_tokens=100)
    with guest.house.service.client(guest.customer.key) as client:
        client.post("/v1/chat/completions", json=body)
    held = guest.get(f"/api/v1/usage/{guest.usage(count=2)['request_id']}")["hold"]
    assert held == told["ceiling"]


def test_estimate_learns_how_long_answers_are(guest: Guest, provider: FakeProvider) -> None:
    assert estimate(guest, CHAT)["tokens"]["output"]["likely"] == 500
    provider.reply("priced", Reply(completion_tokens=40))
    guest.chat()
    assert estimate(guest, CHAT)["tokens"]["output"]["likely"] == 40


def test_estimate_says_what_is_affordable(house: House) -> None:
    guest = house.customer(credits="5")
    # 1024 tokens of output would be 20.48 credits: a shorter answer is sent in its place.
    told = estimate(guest, CHAT)
    assert told["admitted"]
    assert 0 < told["clamped_to"] == told["affordable"]["max_tokens"] < 256
    asked = estimate(guest, {**CHAT, "max_tokens": 1000})
    assert not asked["admitted"]
    refused = guest.chat(max_tokens=1000)
    assert refused.status_code == 402
    affordable = refused.json()["error"]["affordable"]["max_tokens"]
    assert asked["affordable"]["max_tokens"] == affordable
    assert estimate(guest, {**CHAT, "max_tokens": affordable})["admitted"]
    assert guest.chat(max_tokens=affordable).status_code == 200


@pytest.mark.parametrize(
    "endpoint, body",
    [
        ("/v1/embeddings", {"model": "embed", "input": "hi"}),
        ("images/generations", {"model": "image", "prompt": "a cat", "n": 2}),
        ("/v1/audio/speech", {"model": "speech", "input": "hello", "voice": "alloy"}),
        ("rerank", {"model": "rerank", "query": "q", "documents": ["a"]}),
        (
            "/v1/messages",
            {**CHAT, "model": "claude", "max_tokens": 9},
        ),
        ("/v1/responses", {"model": "priced", "input": "hi"}),
    ],
)
def test_every_endpoint_has_an_estimate(guest: Guest, endpoint: str, body: dict[str, Any]) -> None:
    told = estimate(guest, body, path=f"?endpoint={endpoint}")
    assert told["admitted"]
    assert Decimal(0) < Decimal(told["likely"]["usd"]) <= Decimal(told["ceiling"]["usd"])
    assert guest.uncharged()


def test_estimate_refuses_what_the_call_would_be_refused_for(guest: Guest) -> None:
    assert estimate(guest, {**CHAT, "model": "nope"}, status=404)["error"]["code"] == (
        "model_not_found"
    )
    assert estimate(guest, {**CHAT, "api_base": "http://x"}, status=400)
    assert estimate(guest, CHAT, path="?endpoint=/v1/nothing", status=400)["error"]["param"] == (
        "endpoint"
    )


def test_estimate_of_a_call_with_ones_own_key_is_free(guest: Guest) -> None:
    with guest.house.service.client(guest.customer.key) as client:
        told = client.post("/api/v1/estimate", json=CHAT, headers={"X-Provider-Key": "mine"}).json()
    assert (told["byok"], told["ceiling"]["credits"], told["likely"]["credits"]) == (True, "0", "0")
