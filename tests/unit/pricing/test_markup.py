import pytest

from pricing.errors import CostUnknownError, InvalidAmountError, UsageUnknownError
from pricing.markup import Charge, ChargeLine, action_charge, byok_charge, charge
from pricing.money import MAX_AMOUNT
from pricing.price_book import Flat, Markup, PerToken, Rule, parse_price_book
from pricing.usage import UNIT_COUNTS, TokenClass, Usage

CREDIT = 1_000_000  # nano-USD: a credit is $0.001
USAGE = Usage(input_tokens=1000, output_tokens=500)

TWICE = Rule(name="default", terms=Markup(2_000_000))
FLAT = Rule(name="rules[0]", terms=Flat(5 * 10**9))
PER_TOKEN = Rule(
    name="rules[1]",
    terms=PerToken({TokenClass.INPUT: 10**9, TokenClass.OUTPUT: 4 * 10**9}, 3_000_000),
)


def loss(rule: Rule) -> Rule:
    return Rule(name=rule.name, terms=rule.terms, allow_loss=True)


def test_a_markup_multiplies_the_cost_and_rounds_up_once() -> None:
    assert charge(TWICE, cost_picos=13_500_000, usage=None, nanos_per_credit=CREDIT) == Charge(
        price_nanos=27_000,
        rounding_attos=0,
        rule="default",
        kind="markup",
        lines=(ChargeLine("cost", 13_500_000, 27_000 * 10**9),),
    )
    rounded = charge(TWICE, cost_picos=13_500_001, usage=None, nanos_per_credit=CREDIT)
    assert (rounded.price_nanos, rounded.rounding_attos) == (27_001, 998_000_000)


def test_a_free_model_is_free_and_not_unknown() -> None:
    assert charge(TWICE, cost_picos=0, usage=USAGE, nanos_per_credit=CREDIT).price_nanos == 0


def test_a_flat_rule_takes_its_credits() -> None:
    flat = charge(FLAT, cost_picos=1, usage=None, nanos_per_credit=CREDIT)
    assert (flat.price_nanos, flat.kind, flat.rule) == (5 * CREDIT, "flat", "rules[0]")


def test_tokens_are_priced_by_class_with_the_multiplier() -> None:
    sold = charge(PER_TOKEN, cost_picos=0, usage=USAGE, nanos_per_credit=CREDIT)
    assert sold.price_nanos == 9 * CREDIT
    assert sold.lines == (
        ChargeLine("input", 1000, 3 * CREDIT * 10**9),
        ChargeLine("output", 500, 6 * CREDIT * 10**9),
    )


# A speech, a reranking, pictures: nothing that a rule by the token has a price for.
SPEECH = Usage(input_characters=777)


def test_what_is_not_bought_by_the_token_is_sold_at_cost_by_a_rule_for_tokens() -> None:
    sold = charge(PER_TOKEN, cost_picos=11_655_000_001, usage=SPEECH, nanos_per_credit=CREDIT)
    assert sold.price_nanos == 11_655_001
    assert sold.lines == (ChargeLine("cost_floor", 1, 11_655_000_001 * 10**6),)


@pytest.mark.parametrize("unit", UNIT_COUNTS)
@pytest.mark.parametrize("cost_picos", [1, None])
def test_a_rule_for_tokens_that_may_lose_gives_nothing_else_away(
    unit: str, cost_picos: int | None
) -> None:
    usage = Usage(**{unit: 1})
    with pytest.raises(UsageUnknownError):
        charge(loss(PER_TOKEN), cost_picos=cost_picos, usage=usage, nanos_per_credit=CREDIT)
    least = Rule(name="r", terms=PER_TOKEN.terms, allow_loss=True, minimum_nanocredits=3 * 10**9)
    sold = charge(least, cost_picos=cost_picos, usage=usage, nanos_per_credit=CREDIT)
    assert sold.price_nanos == 3 * CREDIT
    counted = Usage(**{unit: 1}, input_tokens=1000)
    sold = charge(loss(PER_TOKEN), cost_picos=cost_picos, usage=counted, nanos_per_credit=CREDIT)
    assert sold.price_nanos == 3 * CREDIT


def test_a_rule_that_sells_tokens_for_nothing_sells_what_came_with_them_for_nothing() -> None:
    free = Rule(
        name="r",
        terms=PerToken({TokenClass.INPUT: 0, TokenClass.OUTPUT: 0}),
        allow_loss=True,
    )
    usage = Usage(images=1, output_tokens=1290)
    assert charge(free, cost_picos=9, usage=usage, nanos_per_credit=CREDIT).price_nanos == 0


def test_what_costs_nothing_may_be_sold_for_nothing() -> None:
    for rule in (PER_TOKEN, loss(PER_TOKEN)):
        assert charge(rule, cost_picos=0, usage=SPEECH, nanos_per_credit=CREDIT).price_nanos == 0
        empty = charge(rule, cost_picos=0, usage=Usage(), nanos_per_credit=CREDIT)
        assert empty.price_nanos == 0


def test_fractions_of_an_atto_are_rounded_in_the_sum_and_not_line_by_line() -> None:
    # Each class costs half an atto: together they are one, not two.
    rule = Rule(
        name="r",
        terms=PerToken({TokenClass.INPUT: 1, TokenClass.OUTPUT: 1}, 500_000),
        allow_loss=True,
    )
    usage = Usage(input_tokens=1, output_tokens=1)
    sold = charge(rule, cost_picos=None, usage=usage, nanos_per_credit=1000)
    assert [line.attos for line in sold.lines] == [1, 0]
    assert (sold.price_nanos, sold.rounding_attos) == (1, 10**9 - 1)


@pytest.mark.parametrize("rule", [FLAT, PER_TOKEN])
def test_a_price_is_raised_to_the_cost(rule: Rule) -> None:
    cost_picos = 10 * CREDIT * 1000 + 1
    raised = charge(rule, cost_picos=cost_picos, usage=USAGE, nanos_per_credit=CREDIT)
    assert raised.price_nanos == 10 * CREDIT + 1
    assert raised.lines[-1].label == "cost_floor"
    below = charge(loss(rule), cost_picos=cost_picos, usage=USAGE, nanos_per_credit=CREDIT)
    assert below.price_nanos < 10 * CREDIT


def test_a_rule_may_sell_below_cost_if_it_says_so() -> None:
    half = Rule(name="r", terms=Markup(500_000), allow_loss=True)
    assert charge(half, cost_picos=3000, usage=None, nanos_per_credit=CREDIT).price_nanos == 2


def test_the_minimum_is_reached_and_shown() -> None:
    rule = Rule(name="r", terms=Markup(2_000_000), minimum_nanocredits=10**9)
    small = charge(rule, cost_picos=1000, usage=None, nanos_per_credit=CREDIT)
    assert small.price_nanos == CREDIT
    assert small.lines[1] == ChargeLine("minimum", 1, (CREDIT - 2) * 10**9)
    large = charge(rule, cost_picos=10**12, usage=None, nanos_per_credit=CREDIT)
    assert len(large.lines) == 1


@pytest.mark.parametrize(
    "rule, reason",
    [
        (TWICE, "no_cost_to_mark_up"),
        (loss(TWICE), "no_cost_to_mark_up"),
        (FLAT, "no_cost_and_no_loss_allowed"),
        (PER_TOKEN, "no_cost_and_no_loss_allowed"),
    ],
)
def test_an_unknown_cost_is_never_a_zero(rule: Rule, reason: str) -> None:
    with pytest.raises(CostUnknownError) as caught:
        charge(rule, cost_picos=None, usage=USAGE, nanos_per_credit=CREDIT)
    assert caught.value.reason == reason


def test_an_unknown_cost_does_not_matter_to_a_rule_that_may_lose() -> None:
    flat = charge(loss(FLAT), cost_picos=None, usage=None, nanos_per_credit=CREDIT)
    assert flat.price_nanos == 5 * CREDIT
    tokens = charge(loss(PER_TOKEN), cost_picos=None, usage=USAGE, nanos_per_credit=CREDIT)
    assert tokens.price_nanos == 9 * CREDIT


def test_an_unknown_usage_is_never_a_zero() -> None:
    with pytest.raises(UsageUnknownError):
        charge(PER_TOKEN, cost_picos=1, usage=None, nanos_per_credit=CREDIT)


@pytest.mark.parametrize("cost", [-1, True, 1.0, "1", MAX_AMOUNT + 1])
def test_a_cost_is_an_integer_that_the_ledger_can_hold(cost: int) -> None:
    with pytest.raises(InvalidAmountError):
        charge(TWICE, cost_picos=cost, usage=None, nanos_per_credit=CREDIT)
    with pytest.raises(InvalidAmountError):
        byok_charge(TWICE, cost_picos=cost, nanos_per_credit=CREDIT)


def test_a_price_beyond_the_ledger_is_refused() -> None:
    rule = Rule(name="r", terms=Markup(1_000_000_000))
    at_most = charge(rule, cost_picos=MAX_AMOUNT, usage=None, nanos_per_credit=CREDIT)
    assert at_most.price_nanos == MAX_AMOUNT
    with pytest.raises(InvalidAmountError, match="too large"):
        charge(FLAT, cost_picos=0, usage=None, nanos_per_credit=10**19)


@pytest.mark.parametrize("worth", [0, -1, True])
def test_the_worth_of_a_credit_is_checked(worth: int) -> None:
    book = parse_price_book({"actions": {"message": "1"}})
    with pytest.raises(InvalidAmountError):
        charge(TWICE, cost_picos=1, usage=None, nanos_per_credit=worth)
    with pytest.raises(InvalidAmountError):
        byok_charge(TWICE, cost_picos=1, nanos_per_credit=worth)
    with pytest.raises(InvalidAmountError):
        action_charge(book, "message", nanos_per_credit=worth)


def test_byok_is_free_or_a_fee_of_the_cost() -> None:
    free = byok_charge(TWICE, cost_picos=None, nanos_per_credit=CREDIT)
    assert free == Charge(0, 0, "default", "byok", ())
    five_percent = Rule(name="r", terms=Markup(2_000_000), byok_fee_ppm=50_000)
    fee = byok_charge(five_percent, cost_picos=1_000_001, nanos_per_credit=CREDIT)
    assert (fee.price_nanos, fee.kind) == (51, "byok")
    assert fee.lines == (ChargeLine("byok_fee", 1_000_001, 50_000_050_000),)
    with pytest.raises(CostUnknownError) as caught:
        byok_charge(five_percent, cost_picos=None, nanos_per_credit=CREDIT)
    assert caught.value.reason == "no_cost_for_byok_fee"


def test_actions_have_a_price_list() -> None:
    book = parse_price_book({"actions": {"message": "0.25"}})
    sold = action_charge(book, "message", quantity=3, nanos_per_credit=CREDIT)
    assert (sold.price_nanos, sold.kind, sold.rule) == (750_000, "action", "actions.message")
    assert action_charge(book, "message", quantity=0, nanos_per_credit=1).price_nanos == 0
    with pytest.raises(KeyError):
        action_charge(book, "unknown", nanos_per_credit=CREDIT)
    with pytest.raises(InvalidAmountError, match="quantity"):
        action_charge(book, "message", quantity=-1, nanos_per_credit=CREDIT)
