"""Amounts carry their currency, numbers are read to the last digit."""

from __future__ import annotations

import re
import subprocess
import sys
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arbl2.money import INT64_MAX, Amount, CurrencyMismatchError, FxQuote, Krw, NumberRefusedError, Usdt, format_e8, parse_e8
from properties.effort import examples

ROOT = Path(__file__).resolve().parents[2]
E8 = 10**8

number_texts = st.from_regex(r"-?(0|[1-9][0-9]{0,24})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
exact_context = Context(prec=2_000, Emax=10**6, Emin=-(10**6))


def _reference(text, *, exact):
    """By decimals: the integer, or why there is none."""
    value = exact_context.create_decimal(text)
    if value < 0:
        return "negative"
    scaled = value.scaleb(8, exact_context)
    if scaled and scaled.adjusted() > 20:
        return "large"
    whole = scaled.to_integral_value(ROUND_DOWN)
    if exact and whole != scaled:
        return "scale" if whole <= INT64_MAX else "large or scale"
    return int(whole) if whole <= INT64_MAX else "large"


def _parsed(text, *, exact):
    try:
        return parse_e8(text, exact=exact)
    except NumberRefusedError as error:
        return str(error)


@given(text=number_texts, exact=st.booleans())
@example(text="1e0", exact=True)
@example(text="-0", exact=True)
@example(text="-0.0e5", exact=True)
@example(text="0e999", exact=True)
@example(text="92233720368.54775807", exact=True)
@example(text="92233720368.54775808", exact=True)
@example(text="92233720368.547758079", exact=False)
@example(text="0.000000010", exact=True)
@example(text="0.000000019", exact=False)
@example(text="1e-999", exact=False)
@example(text="10000000000000000000000e-14", exact=True)
@examples(600)
def test_numbers_to_the_last_digit(text, exact):
    expected, found = _reference(text, exact=exact), _parsed(text.encode(), exact=exact)
    assert found == expected or (expected == "large or scale" and found in ("large", "scale"))


def test_leading_zeros_of_an_exponent():
    assert parse_e8(b"1e000000000000", exact=True) == E8


@given(st.binary(max_size=40))
@examples(300)
def test_any_bytes_are_a_number_or_refused(text):
    value = _parsed(text, exact=False)
    if isinstance(value, int):
        assert 0 <= value <= INT64_MAX
    else:
        assert not re.fullmatch(rb"(0|[1-9][0-9]{0,9})(\.[0-9]{1,8})?", text)


@pytest.mark.parametrize("text", [b"9" * 10**6, b"1e" + b"9" * 10**6, b"0." + b"9" * 10**6, b"1e-" + b"9" * 10**6])
def test_a_million_digits_cost_nothing(text):
    assert _parsed(text, exact=False) in (0, "large", "number")


@given(value=st.integers(-INT64_MAX, INT64_MAX), decimals=st.integers(0, 8))
@examples(300)
def test_format_rounds_half_to_even(value, decimals):
    expected = Decimal(value).scaleb(-8).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN)
    text = format_e8(value, decimals)
    assert Decimal(text.replace(",", "")) == expected
    assert not text.startswith("-") or expected != 0
    if value >= 0:
        assert parse_e8(format_e8(value).replace(",", "").encode(), exact=True) == value


def test_won_and_tether_do_not_add():
    won, tether = Amount(5 * E8, Krw), Amount(5 * E8, Usdt)
    for operation in (lambda: won + tether, lambda: won - tether, lambda: won < tether, lambda: won >= tether):
        with pytest.raises(CurrencyMismatchError, match="FxQuote"):
            operation()
    with pytest.raises(CurrencyMismatchError):
        won + 5
    assert won != tether
    assert won + won == Amount(10 * E8, Krw)
    assert (won - won) < won
    assert (won - won) - won == -won
    assert str(won) == "5.00000000 KRW"


@given(usdt=st.integers(-(10**18), 10**18), rate=st.integers(1, 10**13))
@examples(200)
def test_conversion_never_rounds_in_our_favour(usdt, rate):
    quote = FxQuote(Usdt, Krw, rate, "bid", "upbit KRW-USDT", 1_500_000_000)
    converted = quote.convert(Amount(usdt, Usdt))
    assert converted.currency is Krw
    assert 0 <= Fraction(usdt * rate, E8) - converted.value_e8 < 1
    with pytest.raises(CurrencyMismatchError):
        quote.convert(Amount(usdt, Krw))
    assert "upbit KRW-USDT bid, 1.5 s old" in str(quote)


_SNIPPET = """
from arbl2.money import Amount, FxQuote, Krw, Usdt

won, tether = Amount(1, Krw), Amount(1, Usdt)
quote = FxQuote(Usdt, Krw, 140_000_000_000, "ask", "book", 0)
fine: Amount[Krw] = won + quote.convert(tether)
won + tether  # bad
won < tether  # bad
quote.convert(won)  # bad
also: Amount[Usdt] = quote.convert(tether)  # bad
"""


def test_the_type_checker_keeps_currencies_apart(tmp_path):
    snippet = tmp_path / "snippet.py"
    snippet.write_text(_SNIPPET)
    out = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir", str(tmp_path), str(snippet)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    bad = {number for number, line in enumerate(_SNIPPET.splitlines(), start=1) if line.endswith("# bad")}
    found = {int(number) for number in re.findall(r"snippet\.py:(\d+): error:", out.stdout)}
    assert found == bad, out.stdout + out.stderr
