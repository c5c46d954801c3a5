"""What a tier does not allow is refused, and the tier that allows it is named."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import Guest, House
from tests.support.provider import FakeProvider

CONFIG = """
tiers:
  free:
    allowed_models: [priced]
    requests_per_minute: 2
    max_request_credits: "2"
    starter_credits: "100"
    markup: "3"
  small: {allowed_models: [priced, cached], requests_per_minute: 2, max_request_credits: "2.5"}
  pro: {requests_per_minute: 600}
"""


@pytest.fixture(scope="module")
def tiered(make_house: Callable[..., House]) -> House:
    return make_house(config=CONFIG)


@pytest.fixture
def guest(tiered: House, provider: FakeProvider) -> Guest:
    """An account of the cheapest tier, with what that gives it."""
    del provider
    customer = tiered.customer(credits="0")
    set_tier(customer, "free")
    grant = {"credits": "1000", "reason": "test", "reference": "start"}
    path = f"/admin/v1/accounts/{customer.customer.account_id}/grants"
    tiered.service.admin("POST", path, grant)
    return customer


def set_tier(guest: Guest, tier: str) -> None:
    path = f"/admin/v1/accounts/{guest.customer.account_id}/tier"
    guest.house.service.admin("PUT", path, {"tier": tier})


def refused(guest: Guest, status: int, **body: Any) -> dict[str, Any]:
    answer = guest.chat(**body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_a_model_of_another_tier_is_refused_until_the_account_has_it(guest: Guest) -> None:
    error = refused(guest, 403, model="cached")
    assert (error["code"], error["upgrade"]) == ("model_not_allowed", {"tier": "small"})
    assert "'small'" in error["message"]
    # Nobody has a model that there is not.
    assert "upgrade" not in refused(guest, 403, model="no-such-model")
    listed = [model["id"] for model in guest.get("/v1/models")["data"]]
    assert listed == ["priced"]

    set_tier(guest, "small")

    assert guest.chat(model="cached").status_code == 200


def test_a_tier_has_its_own_markup(guest: Guest) -> None:
    assert guest.chat().status_code == 200
    set_tier(guest, "pro")
    assert guest.chat().status_code == 200

    rows = guest.house.rows(
        "SELECT tier, markup_ppm FROM usage WHERE account_id = %s ORDER BY request_id",
        guest.customer.account_id,
    )
    assert [(row["tier"], row["markup_ppm"]) for row in rows] == [
        ("free", 3_000_000),
        ("pro", 2_000_000),
    ]


def test_the_limit_of_an_account_names_the_tier_with_more(guest: Guest) -> None:
    path = f"/admin/v1/accounts/{guest.customer.account_id}/overrides"
    guest.house.service.admin("PUT", path, {"max_concurrency": 1000})
    # A minute may end between two requests: of five, three are in one.
    answers = [guest.chat() for _ in range(5)]

    error = next(a for a in answers if a.status_code == 429).json()["error"]
    assert (error["limit"], error["upgrade"]) == ("account_requests_per_minute", {"tier": "pro"})
    assert "'pro'" in error["message"]


def test_a_request_that_is_too_dear_for_the_tier_is_refused_or_shortened(guest: Guest) -> None:
    error = refused(guest, 400, max_tokens=4000)
    assert (error["code"], error["upgrade"]) == ("max_request_credits", {"tier": "pro"})
    assert error["maximum"]["credits"] == "2"
    affordable = error["affordable"]["max_tokens"]
    assert f"at most {affordable}" in error["message"]
    assert guest.chat(max_tokens=affordable).status_code == 200
    assert guest.usage()["hold"] <= 2_000_000
    # Whoever sets no limit gets as long an answer as the tier affords.
    assert guest.chat(max_tokens=None).status_code == 200
    assert guest.usage(count=2)["hold"] <= 2_000_000
