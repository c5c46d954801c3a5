"""Exact money: decimal text to integers and back, with no float and no Decimal arithmetic.

Decimal *arithmetic* rounds silently at the context's 28 digits, so a text is taken apart into an
integer coefficient and an exponent, and everything after that is integer arithmetic. Length and
exponent are bounded before any power is computed: `1e999999999` is refused, not evaluated.
"""

import re
from decimal import Decimal
from functools import lru_cache

from pricing.errors import InvalidAmountError

NANOS_PER_USD = 10**9
PICOS_PER_USD = 10**12
PICOS_PER_NANO = 10**3
ATTOS_PER_PICO = 10**6
ATTOS_PER_NANO = 10**9
PPM = 10**6

# The largest BIGINT: $9.2 billion in nanos, $9.2 million in picos. Whatever passes here fits into
# the ledger's columns.
MAX_AMOUNT = 2**63 - 1

# The longest repr of a float has 24 characters; the smallest float is 5e-324.
_MAX_TEXT_LENGTH = 64
_MAX_EXPONENT = 400
_DECIMAL = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+))?(?:[eE]([+-]?[0-9]{1,3}))?")

# Decimal digits that every binary double keeps.
_FLOAT_DIGITS = 15
_FLOAT_UNITS = 10**_FLOAT_DIGITS
# Places shown where credits have no finite decimal form (a credit worth $0.003, say).
_ROUNDED_CREDIT_PLACES = 12


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide integers and round up, towards positive infinity; `divisor` is positive."""
    return -(-dividend // divisor)


def picos_from_usd(value: str | int | Decimal) -> int:
    """Turn dollars into pico-USD, rounded up once where the text goes finer than a pico.

    Floats are not accepted: pass `repr(number)`, which is what LiteLLM's header holds too.
    Raises InvalidAmountError for anything negative, not finite, malformed or above MAX_AMOUNT.
    """
    quotient, remainder = _multiply(value, PICOS_PER_USD)
    return _bounded(quotient + bool(remainder))


def picos_from_float_text(text: str) -> int:
    """Turn the digits of a binary float in dollars into pico-USD, rounded up once.

    LiteLLM adds costs up as floats: 7 x 1e-6 + 3 x 1e-5 comes out as 3.7000000000000005e-05. A
    float means no more than its first 15 digits, so they are taken first; rounding the rest up
    would charge a nano more for nothing. Raises as `picos_from_usd`.
    """
    coefficient, exponent = _parse(text)
    if coefficient >= _FLOAT_UNITS:
        excess = len(str(coefficient)) - _FLOAT_DIGITS
        unit = 10**excess
        coefficient, exponent = (coefficient + unit // 2) // unit, exponent + excess
    quotient, remainder = _scaled(coefficient, exponent, PICOS_PER_USD)
    return _bounded(quotient + bool(remainder))


def nanos_from_usd(value: str | int | Decimal) -> int:
    """Turn dollars into nano-USD; InvalidAmountError where that is not exact."""
    return scale_exactly(value, NANOS_PER_USD)


def nanos_from_credits(value: str | int | Decimal, nanos_per_credit: int) -> int:
    """Turn credits into nano-USD; InvalidAmountError where that is not exact."""
    return scale_exactly(value, checked_nanos_per_credit(nanos_per_credit))


def scale_exactly(value: object, factor: int) -> int:
    """Return `value` x `factor` as an integer of at most MAX_AMOUNT, or InvalidAmountError."""
    quotient, remainder = _multiply(value, factor)
    if remainder:
        raise InvalidAmountError(f"{value!r} has more decimal places than can be kept exactly")
    return _bounded(quotient)


def checked_nanos_per_credit(nanos_per_credit: int) -> int:
    """Return the worth of a credit, which must be a positive integer of nano-USD."""
    if type(nanos_per_credit) is not int or nanos_per_credit <= 0:
        raise InvalidAmountError("nanos_per_credit must be a positive integer")
    return nanos_per_credit


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 0; True and False are not numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def usd_text(nanos: int) -> str:
    """Write nano-USD as dollars: exact, without exponent or trailing zeros ("0.00045")."""
    return decimal_text(nanos, 9)


def usd_text_from_picos(picos: int) -> str:
    """Write pico-USD as dollars, exactly."""
    return decimal_text(picos, 12)


def credits_text(nanos: int, nanos_per_credit: int) -> str:
    """Write nano-USD as credits.

    Exact wherever the amount has a finite decimal form, which is always where a credit is worth
    a power of ten. Otherwise it is rounded down to 12 places, so that nobody is shown more than
    they have.
    """
    places = _finite_places(checked_nanos_per_credit(nanos_per_credit))
    return decimal_text(nanos * 10**places // nanos_per_credit, places)


def decimal_text(value: int, places: int) -> str:
    """Write `value` / 10**`places` exactly, without exponent or trailing zeros."""
    whole, fraction = divmod(abs(value), 10**places)
    sign = "-" if value < 0 else ""
    decimals = f"{fraction:0{places}d}".rstrip("0") if places else ""
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


@lru_cache
def _finite_places(divisor: int) -> int:
    """Return how many decimal places every multiple of 1/`divisor` needs at most."""
    rest, powers = divisor, {2: 0, 5: 0}
    for prime in powers:
        while rest % prime == 0:
            rest //= prime
            powers[prime] += 1
    return max(powers.values()) if rest == 1 else _ROUNDED_CREDIT_PLACES


def _multiply(value: object, factor: int) -> tuple[int, int]:
    """Return the whole part of `value` x `factor` and a remainder that is 0 where it is exact."""
    coefficient, exponent = _parse(_text_of(value))
    return _scaled(coefficient, exponent, factor)


def _scaled(coefficient: int, exponent: int, factor: int) -> tuple[int, int]:
    if exponent >= 0:
        return coefficient * 10**exponent * factor, 0
    return divmod(coefficient * factor, 10**-exponent)


def _text_of(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Decimal):
        return str(value)
    # Bounded before str(), which refuses integers of more than 4300 digits in its own way.
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_AMOUNT:
        return str(value)
    raise InvalidAmountError(
        f"an amount must be a decimal text or an integer in range, not {type(value).__name__}"
    )


def _parse(text: str) -> tuple[int, int]:
    """Take a decimal text apart: its value is coefficient x 10**exponent."""
    match = _DECIMAL.fullmatch(text) if len(text) <= _MAX_TEXT_LENGTH else None
    if match is None:
        raise InvalidAmountError(
            f"{text[:_MAX_TEXT_LENGTH]!r} is not a decimal number of reasonable size"
        )
    sign, whole, fraction, power = match.groups(default="")
    coefficient = int(whole + fraction)
    if sign == "-" and coefficient:
        raise InvalidAmountError(f"{text!r} is negative: it must be at least 0")
    exponent = int(power or "0")
    if abs(exponent) > _MAX_EXPONENT:
        raise InvalidAmountError(f"{text!r} is out of range")
    return coefficient, exponent - len(fraction)


def _bounded(amount: int) -> int:
    if amount > MAX_AMOUNT:
        raise InvalidAmountError("the amount is too large to be held")
    return amount
