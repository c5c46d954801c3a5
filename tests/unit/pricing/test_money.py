from decimal import Decimal

import pytest

from pricing.errors import InvalidAmountError
from pricing.money import (
    MAX_AMOUNT,
    ceil_div,
    credits_text,
    decimal_text,
    nanos_from_credits,
    nanos_from_usd,
    picos_from_float_text,
    picos_from_usd,
    usd_text,
    usd_text_from_picos,
)


@pytest.mark.parametrize(
    "text, picos",
    [
        ("0", 0),
        ("0.0", 0),
        ("-0.0", 0),
        ("1.35e-05", 13_500_000),
        ("+1.35E-05", 13_500_000),
        ("0.00045", 450_000_000),
        ("1", 10**12),
        ("1e3", 10**15),
        # A float's noise and its smallest value go up to the next pico, once.
        ("1.3500000000000001e-05", 13_500_001),
        ("5e-324", 1),
        ("0.0000000000001", 1),
        ("9223372.036854775807", MAX_AMOUNT),
        (3, 3 * 10**12),
        (Decimal("1.35e-05"), 13_500_000),
        (Decimal("0E-7"), 0),
        # More digits than Decimal's default context keeps: arithmetic in it would lose the last.
        (Decimal("1.0000000000000000000000000000000000001"), 10**12 + 1),
        ("1.0000000000000000000000000000000000001", 10**12 + 1),
    ],
)
def test_a_cost_is_rounded_up_to_a_pico_once(text: str | int | Decimal, picos: int) -> None:
    assert picos_from_usd(text) == picos


@pytest.mark.parametrize(
    "value",
    [
        "",
        " 1",
        "1 ",
        "1_000",
        "1,5",
        ".5",
        "5.",
        "0x10",
        "--1",
        "\u0661",
        "1\n",
        "nan",
        "NaN",
        "inf",
        "-Infinity",
        "-1",
        "-1e-300",
        "1e999999999",
        "1e-999999999",
        "0e999999999",
        "1e401",
        "1e-401",
        "1e400",
        "1" * 65,
        pytest.param("9" * 1_000_000, id="a million digits"),
        "9223372.036854775808",
        -1,
        10**18,
        pytest.param(10**100_000, id="an endless integer"),
        True,
        False,
        None,
        1.5,
        b"1",
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        Decimal("-0.01"),
        Decimal("1e999999"),
        Decimal("1e-999999"),
        Decimal("1" * 100),
    ],
)
def test_what_is_no_sane_amount_is_refused(value: object) -> None:
    with pytest.raises(InvalidAmountError):
        picos_from_usd(value)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidAmountError):
        nanos_from_credits(value, 10**12)  # pyright: ignore[reportArgumentType]


def test_dollars_become_nanos_only_where_that_is_exact() -> None:
    assert nanos_from_usd("0.000000001") == 1
    assert nanos_from_usd("1e-9") == 1
    assert nanos_from_usd("0.0010") == 1_000_000
    assert nanos_from_usd("9223372036.854775807") == MAX_AMOUNT
    for text in ("0.0000000001", "1e-10", "9223372036.854775808"):
        with pytest.raises(InvalidAmountError):
            nanos_from_usd(text)


def test_credits_become_nanos_only_where_that_is_exact() -> None:
    assert nanos_from_credits("1000", 1_000_000) == 10**9
    assert nanos_from_credits("0.000001", 1_000_000) == 1
    assert nanos_from_credits("0.5", 2) == 1
    for text, worth in (("0.0000001", 1_000_000), ("0.5", 1), ("1e13", 1_000_000)):
        with pytest.raises(InvalidAmountError):
            nanos_from_credits(text, worth)


@pytest.mark.parametrize("worth", [0, -1, True, 1.0, None])
def test_a_credit_is_worth_a_positive_number_of_nanos(worth: int) -> None:
    with pytest.raises(InvalidAmountError, match="nanos_per_credit"):
        nanos_from_credits("1", worth)
    with pytest.raises(InvalidAmountError, match="nanos_per_credit"):
        credits_text(1, worth)


@pytest.mark.parametrize(
    "nanos, text",
    [
        (0, "0"),
        (450_000, "0.00045"),
        (1, "0.000000001"),
        (10**9, "1"),
        (1_500_000_000, "1.5"),
        (-1, "-0.000000001"),
        (-(10**9), "-1"),
        (MAX_AMOUNT, "9223372036.854775807"),
    ],
)
def test_dollars_are_written_exactly_and_plainly(nanos: int, text: str) -> None:
    assert usd_text(nanos) == text


def test_picos_are_written_as_dollars() -> None:
    assert usd_text_from_picos(13_500_001) == "0.000013500001"


def test_text_without_places_has_no_point() -> None:
    assert decimal_text(100, 0) == "100"


@pytest.mark.parametrize(
    "nanos, worth, text",
    [
        (450_000, 1_000_000, "0.45"),
        (1, 1_000_000, "0.000001"),
        (10**9, 10**9, "1"),
        (7, 1, "7"),
        (1, 2**20, "0.00000095367431640625"),
        # A third of a credit: rounded down, also below zero.
        (1_000_000, 3_000_000, "0.333333333333"),
        (-1_000_000, 3_000_000, "-0.333333333334"),
        (-1_500_000, 1_000_000, "-1.5"),
    ],
)
def test_credits_are_exact_where_they_can_be(nanos: int, worth: int, text: str) -> None:
    assert credits_text(nanos, worth) == text


def test_ceil_div_rounds_up() -> None:
    assert [ceil_div(n, 3) for n in (-4, -3, 0, 1, 3, 4)] == [-1, -1, 0, 1, 1, 2]


@pytest.mark.parametrize(
    "text, picos",
    [
        # Sums of floats, as LiteLLM writes them.
        ("3.7000000000000005e-05", 37_000_000),
        ("0.00022500000000000002", 225_000_000),
        ("9.999999999999999e-05", 100_000_000),
        ("0.00009999999999999999", 100_000_000),
        ("1.35e-05", 13_500_000),
        ("0.123456789012345", 123_456_789_013),
        ("0.0000000000001", 1),
        ("0", 0),
        ("12345678.9012345", None),
    ],
)
def test_digits_of_a_float_beyond_what_it_means_are_no_money(text: str, picos: int | None) -> None:
    if picos is None:  # more than the ledger holds
        with pytest.raises(InvalidAmountError):
            picos_from_float_text(text)
    else:
        assert picos_from_float_text(text) == picos


@pytest.mark.parametrize("text", ["", "NaN", "-1e-5", "1e999", "inf", "1_0"])
def test_what_is_no_float_is_refused(text: str) -> None:
    with pytest.raises(InvalidAmountError):
        picos_from_float_text(text)
