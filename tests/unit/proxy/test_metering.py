"""From a reading to a settlement: which source counts, and what is wrong with it."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from pricing.price_book import parse_price_book
from pricing.usage import Usage
from proxy.accounts import Principal
from proxy.admission import Admitted
from proxy.catalog import read_models
from proxy.endpoints import ENDPOINTS
from proxy.ledger import Settlement
from proxy.metering import MeteringPolicy, Reading, read_cost_headers, settle, void
from proxy.price_books import PublishedBook
from proxy.wire.request import Request

PRICES = {"input_cost_per_token": 1e-06, "output_cost_per_token": 1e-05}
DEAR = {"input_cost_per_token": 2e-06, "output_cost_per_token": 2e-05}
FREE = {"input_cost_per_token": 0, "output_cost_per_token": 0}
SECONDS = {"input_cost_per_second": 0.0001}
# 10 x 0.000001 + 5 x 0.00001 dollars.
USAGE = Usage(input_tokens=10, output_tokens=5)
COST, PRICE = 60_000_000, 120_000

REVIEWED = MeteringPolicy(charge_incomplete=False, cost_tolerance_ppm=10_000)
CHARGED = MeteringPolicy(charge_incomplete=True, cost_tolerance_ppm=10_000)

BILLED = ("billed", "header", COST, PRICE, None)
RATED = ("billed", "rated", COST, PRICE, None)
VOID = ("void", None, None, None, None)

CHAT = "/v1/chat/completions"
SPEECH = "/v1/audio/speech"
TRANSCRIPTIONS = "/v1/audio/transcriptions"


def admitted(
    *deployments: Mapping[str, Any],
    path: str = CHAT,
    own_key: str | None = None,
    **rule: object,
) -> Admitted:
    rows = [
        {"model_name": "m", "model_info": {"id": f"id-{n}", **info}}
        for n, info in enumerate(deployments or (PRICES,))
    ]
    book = parse_price_book({"default": rule or {"kind": "markup", "factor": "2.0"}})
    return Admitted(
        request_id=UUID(int=3),
        principal=Principal(
            account_id=UUID(int=2),
            key_id=UUID(int=1),
            tier="default",
            version=1,
            allowed_models=None,
            key_status="active",
            account_status="active",
            expires_at=None,
            is_expired=False,
            replay_retries=True,
        ),
        endpoint=ENDPOINTS[path],
        request=Request(fields={}, model="m", prompt_bytes=40, units={"input_characters": 5}),
        model=read_models(rows, ["m"])["m"],
        rule=book.default,
        published=PublishedBook(1, book, 1_000_000),
        provider_key=own_key,
        output_limit=None,
    )


def reading(*, usage: Usage | None = USAGE, **headers: str) -> Reading:
    """Read headers of LiteLLM, named without what all of them begin with."""
    made = Reading(usage=usage)
    read_cost_headers(
        made, {f"x-litellm-{name.replace('_', '-')}": text for name, text in headers.items()}
    )
    return made


def told(settlement: Settlement) -> tuple[object, ...]:
    return (
        settlement.status,
        settlement.cost_source,
        settlement.cost_picos,
        settlement.price,
        settlement.review_reason,
    )


def review(reason: str) -> tuple[object, ...]:
    return ("needs_review", None, None, None, reason)


def mismatches(path: str = CHAT) -> float:
    labels = {"endpoint": ENDPOINTS[path].name, "model": "m"}
    return REGISTRY.get_sample_value("tallygate_cost_mismatches_total", labels) or 0


@pytest.mark.parametrize(
    "headers, expected",
    [
        ({"response_cost": "6e-05"}, BILLED),
        # The digits of a float, and nothing of them is charged.
        ({"response_cost": "5.9999999999999995e-05"}, BILLED),
        ({}, RATED),
        ({"response_cost": "0.0"}, RATED),
        ({"response_cost": "nan"}, RATED),
        ({"response_cost": "-6e-05"}, RATED),
        ({"response_cost": ""}, RATED),
        # A margin of LiteLLM's is nobody's cost: whole answers tell its amount, streams its share.
        ({"response_cost": "6.6e-05", "response_cost_margin_amount": "6e-06"}, BILLED),
        ({"response_cost": "6.6e-05", "response_cost_margin_percent": "0.1"}, BILLED),
        (
            {
                "response_cost": "6.7e-05",
                "response_cost_margin_amount": "7e-06",
                "response_cost_margin_percent": "0.1",
            },
            BILLED,
        ),
        ({"response_cost": "6e-05", "response_cost_margin_amount": "?"}, BILLED),
        ({"response_cost": "6e-05", "cache_key": "a"}, review("litellm_cache_hit")),
        ({"response_cost_original": "6e-05"}, review("litellm_cache_hit")),
        ({"response_cost_original": "0.0"}, RATED),
    ],
)
def test_cost_is_read_from_the_headers(
    headers: dict[str, str], expected: tuple[object, ...]
) -> None:
    assert told(settle(admitted(), reading(usage=USAGE, **headers), REVIEWED)) == expected


def test_cost_that_differs_from_our_own_rating_is_charged_marked_and_counted() -> None:
    before = mismatches()
    within = settle(admitted(), reading(response_cost="6.06e-05"), REVIEWED)
    assert within.review_reason is None
    assert mismatches() == before
    beyond = settle(admitted(), reading(response_cost="6.07e-05"), REVIEWED)
    assert told(beyond) == ("billed", "header", 60_700_000, 121_400, "cost_mismatch")
    assert beyond.rated_picos == COST
    assert mismatches() == before + 1


@pytest.mark.parametrize(
    "deployment, expected",
    [
        ("id-0", RATED),
        ("id-1", ("billed", "rated", 2 * COST, 2 * PRICE, None)),
        ("id-2", review("price_missing")),
        # Nobody knows which it was, and one of them has no price.
        ("id-9", review("price_missing")),
    ],
)
def test_usage_is_rated_by_the_prices_of_the_deployment_that_answered(
    deployment: str, expected: tuple[object, ...]
) -> None:
    behind = admitted(PRICES, DEAR, {"mode": "chat"})
    assert told(settle(behind, reading(model_id=deployment), REVIEWED)) == expected


def test_cost_is_compared_with_the_prices_of_the_deployment_that_answered() -> None:
    behind = admitted(PRICES, DEAR)
    for deployment, reason in (("id-0", None), ("id-1", "cost_mismatch"), ("id-9", None)):
        answer = reading(response_cost="6e-05", model_id=deployment)
        assert settle(behind, answer, REVIEWED).review_reason == reason


@pytest.mark.parametrize(
    "prices, usage, expected",
    [
        (FREE, USAGE, ("billed", "rated", 0, 0, None)),
        (FREE, None, ("billed", "rated", 0, 0, None)),
        ({}, USAGE, review("price_missing")),
        # A price would not have been enough either, but it is what the operator can give.
        ({}, None, review("price_missing")),
        (PRICES, None, review("usage_missing")),
    ],
)
def test_nothing_is_free_but_what_has_a_price_of_nothing(
    prices: dict[str, Any], usage: Usage | None, expected: tuple[object, ...]
) -> None:
    assert told(settle(admitted(prices), reading(usage=usage), REVIEWED)) == expected


def test_rule_that_needs_no_cost_charges_without_one_and_says_that_it_is_unknown() -> None:
    flat = admitted({}, kind="flat", credits="1", allow_loss=True)
    settlement = settle(flat, reading(), REVIEWED)
    assert told(settlement) == ("billed", None, None, 1_000_000, "price_missing")
    assert settlement.markup_ppm is None


def test_own_key_costs_nothing_whatever_is_known() -> None:
    for prices, cost in (({}, None), (PRICES, COST)):
        settlement = settle(admitted(prices, own_key="sk"), reading(), REVIEWED)
        assert (settlement.status, settlement.price, settlement.cost_picos) == ("byok", 0, cost)


@pytest.mark.parametrize("reason", ["stream_cut", "client_gone"])
def test_part_of_an_answer_is_for_review_or_charged_by_its_bytes(reason: str) -> None:
    part = reading(usage=None)
    part.incomplete, part.delivered_bytes = reason, 18
    assert told(settle(admitted(), part, REVIEWED)) == review(reason)
    # Four bytes a token: 10 of the prompt, 5 of the answer.
    settlement = settle(admitted(), part, CHARGED)
    assert told(settlement) == ("billed", "estimated", COST, PRICE, None)
    assert (settlement.input_tokens, settlement.output_tokens) == (10, 5)


def test_what_brought_nothing_is_void() -> None:
    settlement = void(admitted(), reading(usage=None, response_cost="0"))
    assert (settlement.action, *told(settlement)) == ("void", *VOID)


SPEECH_BY_TOKEN = {**PRICES, "output_cost_per_audio_token": 1e-05}


@pytest.mark.parametrize(
    "prices, header, expected",
    [
        # LiteLLM's cost has the text and not the sound.
        (SPEECH_BY_TOKEN, "5e-06", review("cost_incomplete")),
        (
            {**SPEECH_BY_TOKEN, "input_cost_per_character": 1.5e-05},
            "5e-06",
            ("billed", "rated", 75_000_000, 150_000, None),
        ),
        (
            {"input_cost_per_character": 1.5e-05},
            "7.5e-05",
            ("billed", "header", 75_000_000, 150_000, None),
        ),
    ],
)
def test_speech_by_the_token_is_never_charged_for_its_text_alone(
    prices: dict[str, Any], header: str, expected: tuple[object, ...]
) -> None:
    answer = reading(usage=None, response_cost=header)
    assert told(settle(admitted(prices, path=SPEECH), answer, REVIEWED)) == expected


@pytest.mark.parametrize(
    "header, audio_ms, expected",
    [
        ("0.00075", 7_500, ("billed", "header", 750_000_000, 1_500_000, None)),
        # What LiteLLM measured is what the file claims.
        ("0.00001", 7_500, ("billed", "rated", 750_000_000, 1_500_000, "cost_mismatch")),
        ("0.0015", 7_500, ("billed", "rated", 750_000_000, 1_500_000, "cost_mismatch")),
        # Whole seconds: the provider rounded up what LiteLLM measured.
        ("0.00075", 8_000, ("billed", "rated", 800_000_000, 1_600_000, None)),
        ("0.0007", 8_000, ("billed", "rated", 800_000_000, 1_600_000, "cost_mismatch")),
    ],
)
def test_providers_length_of_a_recording_goes_before_the_one_that_litellm_measured(
    header: str, audio_ms: int, expected: tuple[object, ...]
) -> None:
    before = mismatches(TRANSCRIPTIONS)
    answer = reading(usage=Usage(audio_ms=audio_ms), response_cost=header)
    settlement = settle(admitted(SECONDS, path=TRANSCRIPTIONS), answer, REVIEWED)
    assert told(settlement) == expected
    assert mismatches(TRANSCRIPTIONS) - before == (expected[-1] == "cost_mismatch")


def test_measured_cost_of_tokens_is_compared_as_any_other() -> None:
    answer = reading(response_cost="1e-05")
    settlement = settle(admitted(PRICES, path=TRANSCRIPTIONS), answer, REVIEWED)
    assert told(settlement) == ("billed", "rated", COST, PRICE, "cost_mismatch")


def test_names_of_the_provider_are_made_storable() -> None:
    answer = reading()
    answer.model_answered, answer.answer_id = "a\x00" + "b" * 300, "c" * 2000
    settlement = settle(admitted(), answer, REVIEWED)
    assert settlement.model_answered == "a" + "b" * 255
    assert settlement.answer_id == "c" * 1024
