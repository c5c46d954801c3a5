"""The true cost of everything: each request through a real LiteLLM, each sum done by hand."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path

import httpx
import pytest

from pricing.money import usd_text, usd_text_from_picos
from tests.e2e.conftest import Guest, House
from tests.e2e.cost_truth import media_cases, other_cases, page, text_cases, typed_cases
from tests.e2e.cost_truth.calls import Outcome, Patron
from tests.e2e.cost_truth.case import Case, Settled
from tests.e2e.cost_truth.page import Line
from tests.support.litellm import MASTER_KEY
from tests.support.provider import FakeProvider

PAGE = Path(__file__).parents[2] / "docs" / "cost-truth.md"
WRITE_PAGE = "TALLYGATE_WRITE_DOCS"

CASES: list[Case] = [
    *text_cases.chat_cases(),
    *typed_cases.bridged_cases(),
    *text_cases.completion_cases(),
    *typed_cases.responses_cases(),
    *typed_cases.messages_cases(),
    *media_cases.embedding_cases(),
    *media_cases.moderation_cases(),
    *media_cases.rerank_cases(),
    *media_cases.image_cases(),
    *media_cases.speech_cases(),
    *media_cases.transcription_cases(),
    *other_cases.other_cases(),
]
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module")
def patrons(
    house: House,
    make_house: Callable[..., House],
    provider_server: FakeProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Mapping[str, Patron]]:
    """A customer at each of the services."""
    litellm = other_cases.OtherLiteLLM(provider_server, tmp_path_factory.mktemp("other"))
    litellm.start()
    try:
        houses = {
            "default": house,
            "charging": make_house(environ={"TALLYGATE_CHARGE_CUT_STREAMS": "true"}),
            "other": make_house(
                litellm_url=litellm.url,
                environ={
                    "TALLYGATE_LITELLM_KEY": MASTER_KEY,
                    "TALLYGATE_UPSTREAM__DRAIN_TIMEOUT_S": "0.3",
                },
            ),
        }
        made = {place: Patron.of(each) for place, each in houses.items()}
        yield made
        for patron in made.values():
            patron.close()
    finally:
        litellm.stop()


def settled(outcome: Outcome) -> Settled:
    row = outcome.row
    cost, rated = (
        None if row[name] is None else usd_text_from_picos(row[name])
        for name in ("cost_picos", "rated_picos")
    )
    price = None if row["price"] is None else usd_text(row["price"])
    return Settled(row["status"], row["cost_source"], cost, rated, price, row["review_reason"])


def assert_tells_no_cost(case: Case, outcome: Outcome) -> None:
    """Neither headers nor body may tell what the provider took, or that LiteLLM is there."""
    headers = " ".join(f"{name}: {text}" for name, text in outcome.headers.items()).lower()
    assert "litellm" not in headers
    assert "llm_provider" not in headers
    body = outcome.body.decode(errors="replace")
    if not case.body.get("stream_options", {}).get("include_usage"):
        assert '"cost' not in body
    cost = case.settled.cost
    if cost is None or Decimal(cost) == 0:
        return
    for text in {cost, repr(float(cost)), f"{float(cost):e}"}:
        assert not re.search(rf"(?<![\d.]){re.escape(text)}(?!\d)", headers + body), text


def assert_settled(case: Case, outcome: Outcome) -> None:
    assert settled(outcome) == case.settled
    assert_tells_no_cost(case, outcome)
    assert outcome.row["model"] == case.model
    assert case.answered in {None, outcome.row["model_answered"]}
    if outcome.row["price"] == 0:
        is_meant_to_be_free = case.model == "moderate" or case.model.endswith("free")
        assert is_meant_to_be_free or outcome.row["status"] == "byok", "free by accident"
    if "stream_options" in case.body:
        asked = case.body["stream_options"]["include_usage"]
        price = (case.settled.price or "").encode()
        assert (b'"cost":%b}' % price in outcome.body) == asked


def assert_mismatches_are_counted(patron: Patron) -> None:
    marked = Counter(
        (row["endpoint"], row["model"])
        for row in patron.rows()
        if row["review_reason"] == "cost_mismatch"
    )
    metrics = httpx.get(f"{patron.house.service.base_url}/metrics").text
    counted = re.findall(
        r'^tallygate_cost_mismatches_total\{endpoint="(.+?)",model="(.+?)"\} (\d+)',
        metrics,
        re.MULTILINE,
    )
    assert {(endpoint, model): int(n) for endpoint, model, n in counted} == marked


# Two LiteLLMs and three services start, and hundreds of requests are made. All of it is one test,
# because the table is made of what one process saw.
@pytest.mark.timeout(400)
def test_requests_are_settled_as_a_person_reckons_and_the_page_says_so(
    patrons: Mapping[str, Patron], provider: FakeProvider, subtests: pytest.Subtests
) -> None:
    seen: dict[str, Line] = {}
    for case in CASES:
        with subtests.test(case.name):
            outcome = patrons[case.place].carry_out(provider, case)
            seen[case.name] = Line(case, settled(outcome))
            assert_settled(case, outcome)
    for place, patron in patrons.items():
        with subtests.test(f"mismatches at {place} are counted"):
            assert_mismatches_are_counted(patron)
    text = page.render(seen)
    if os.environ.get(WRITE_PAGE):
        PAGE.write_text(text)
    how = f"{WRITE_PAGE}=1 make test PYTEST_ARGS='-k cost_truth'"
    assert PAGE.read_text() == text, f"docs/cost-truth.md is out of date: {how}"


def test_names_of_cases_are_unique_and_those_that_show_a_fact_exist() -> None:
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    shown = {name for fact in page.FACTS for name in fact.shown_by}
    assert sorted(shown - set(NAMES)) == []


def test_embeddings_in_base64_reach_provider_and_client_as_such(
    guest: Guest, provider: FakeProvider
) -> None:
    # openai-node asks for it always, and can't read anything else.
    vector = guest.sdk().embeddings.with_raw_response.create(
        model="embed", input="hi", encoding_format="base64"
    )
    assert provider.last().json()["encoding_format"] == "base64"
    assert isinstance(vector.http_response.json()["data"][0]["embedding"], str)


def test_reading_a_stored_response_again_costs_nothing(guest: Guest) -> None:
    with guest.house.service.client(guest.customer.key) as client:
        body = {"model": "priced", "input": "hi", "max_output_tokens": 20}
        first = client.post("/v1/responses", json=body).json()
        before = guest.balance()
        assert client.get(f"/v1/responses/{first['id']}").status_code == 200
    assert (guest.usage()["price"], guest.balance()) == (120_000, before)
