"""Tiers of the configuration: what they say, whom they are for, and which one allows more."""

import pytest

from pricing.price_book import parse_price_book
from proxy.errors import ConfigurationError, InvalidRequestError, PermissionDeniedError
from proxy.settings import load_settings
from proxy.tiers import Tiers, offer

LADDER = {
    "free": {"allowed_models": ["demo"], "requests_per_minute": 3, "max_request_credits": "2"},
    "small": {"allowed_models": ["gpt-*"], "requests_per_minute": 3, "max_request_credits": "5"},
    "pro": {"requests_per_minute": 60},
}


def tiers() -> Tiers:
    return Tiers(LADDER, default="default", nanos_per_credit=1000)


def test_the_first_tier_that_allows_it_is_told() -> None:
    free = tiers().of("free", {})
    assert free.tier_with_model("gpt-5") == "small"
    assert free.tier_with_model("claude") == "pro"
    assert free.tier_with_more("requests_per_minute") == "pro"
    assert free.tier_with_more("max_request_nanos", 4000) == "small"
    assert free.tier_with_more("max_request_nanos", 6000) == "pro"
    assert tiers().of("pro", {}).tier_with_more("requests_per_minute") is None


def test_a_tier_that_would_change_nothing_is_not_told() -> None:
    overridden = tiers().of("free", {"allowed_models": ["demo"], "max_request_credits": "1"})
    assert overridden.tier_with_model("gpt-5") is None
    assert overridden.tier_with_more("max_request_nanos", 4000) is None
    assert overridden.tier_with_more("requests_per_minute") == "pro"
    error = PermissionDeniedError("No.")
    offer(error, None)
    assert (error.message, error.details) == ("No.", {})


def test_overrides_replace_what_the_tier_says_and_nothing_else() -> None:
    terms = tiers().of("free", {"requests_per_minute": 9, "max_request_credits": "4"})
    assert (terms.requests_per_minute, terms.max_request_nanos) == (9, 4000)
    assert terms.allowed_models == ("demo",)


def test_a_tier_that_is_not_known_sets_no_limits() -> None:
    terms = tiers().of("gold", {"max_concurrency": 2})
    assert (terms.has_model("x"), terms.requests_per_minute, terms.max_concurrency) == (
        True,
        None,
        2,
    )


def test_accounts_are_given_known_tiers_and_the_default() -> None:
    known = tiers()
    known.check("pro")
    known.check("default")
    with pytest.raises(InvalidRequestError, match="free, small, pro"):
        known.check("gold")
    Tiers({}, default="default", nanos_per_credit=1000).check("gold")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"tiers": {"a": {"markup": "0.5"}}}, "at least 1"),
        ({"tiers": {"a": {"rpm": 1}}}, "tiers.a.rpm"),
        ({"tiers": {"a": {"monthly_credits": "0.0000001"}}}, "tiers.a"),
        ({"tiers": {"a": {"allowed_models": []}}}, "tiers.a.allowed_models"),
        ({"tiers": {"": {}}}, "tiers"),
        (
            {
                "tiers": {"a": {"markup": "2"}},
                "price_book": {"rules": [{"tier": "a", "kind": "flat", "credits": "1"}]},
            },
            r"tiers.a.markup and price_book.rules\[0\]",
        ),
    ],
)
def test_a_mistake_in_the_configuration_is_named(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        load_settings({}, **settings)


def test_a_markup_becomes_the_rule_of_its_tier() -> None:
    narrow = {"tier": "pro", "model": "gpt-*", "kind": "flat", "credits": "1"}
    settings = load_settings(
        {},
        tiers={"free": {}, "pro": {"markup": "1.5"}},
        price_book={"rules": [narrow, {"account": None, "model": "x", **_FLAT}]},
    )
    book = parse_price_book(settings.whole_price_book)
    account = "01900000-0000-7000-8000-000000000001"
    assert book.select(account, "pro", "claude").name == "rules[2]"
    assert book.select(account, "pro", "gpt-5").name == "rules[0]"
    assert book.select(account, "free", "claude").name == "default"
    untouched = load_settings({}, tiers={"free": {}})
    assert untouched.whole_price_book == untouched.price_book


_FLAT = {"kind": "flat", "credits": "1"}
