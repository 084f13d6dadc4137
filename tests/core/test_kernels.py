"""The arithmetic of the loop against fractions, and its edges at the limits of 64 bits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arbl2 import kernels
from arbl2.kernels import edge_buy_upbit_bps, edge_sell_upbit_bps, exit_size_e8, fee_e8, notional_e8, size_for_e8
from properties.effort import examples

E8 = 10**8
INT64_MAX = 2**63 - 1
CALM = int(8.99e18)
"""Up to here an amount must be computed; between here and the end of int64 it may be refused."""

# as many small numbers as large ones: most of the range is one digit count
int64s = st.integers(0, 63).flatmap(lambda bits: st.integers(0, 2**bits - 1 if bits else 0))
fees = st.integers(0, 100_000)


@given(px=int64s, qty=int64s, up=st.booleans())
@example(px=INT64_MAX, qty=INT64_MAX, up=True)
@example(px=INT64_MAX, qty=1, up=True)
@example(px=1, qty=INT64_MAX, up=False)
@example(px=INT64_MAX, qty=97_000_000, up=True)
@example(px=3_037_000_499_97610188, qty=3_037_000_499_97610188, up=True)
@examples(500)
def test_notional(px, qty, up):
    exact = Fraction(px * qty, E8)
    expected = -(-exact.numerator // exact.denominator) if up else exact.numerator // exact.denominator
    value = notional_e8(px, qty, up)
    if value == -1:
        assert expected > CALM
    else:
        assert value == expected <= INT64_MAX


@given(amount=int64s, ppm=fees)
@example(amount=INT64_MAX, ppm=100_000)
@examples(300)
def test_fee(amount, ppm):
    assert fee_e8(amount, ppm) == -(-amount * ppm // 1_000_000)


@given(amount=int64s, px=int64s)
@example(amount=INT64_MAX, px=1)
@example(amount=INT64_MAX, px=E8)
@example(amount=INT64_MAX, px=2**62 // 10)
@example(amount=INT64_MAX, px=2**62 // 10 + 1)
@examples(500)
def test_size_for(amount, px):
    size = size_for_e8(amount, px)
    if size == -1:
        assert px == 0 or px > 2**62 // 10 or amount * E8 // px > CALM
    else:
        assert size == amount * E8 // px <= INT64_MAX


@example(held=10, size=5, lot=1, px=E8, least=0)
@example(held=7, size=5, lot=1, px=E8, least=7)
@given(held=int64s, size=int64s.map(lambda size: size // 4), lot=st.integers(1, 10**12), px=int64s, least=int64s)
@examples(300)
def test_exit_size(held, size, lot, px, least):
    part = held if held < 2 * size else size
    part -= part % lot
    exact = px * part // E8
    found = exit_size_e8(held, size, lot, px, least)
    if held == 0 or px == 0:
        assert found == 0
    elif exact <= CALM:
        assert found == (part if exact >= least else 0)
    else:  # too much to compute is surely more than the smallest order
        assert found == part or exact < least


@given(
    upbit=st.integers(1, 10**18),
    binance=st.integers(1, 10**15),
    fx=st.integers(500 * E8, 3_000 * E8),
)
@examples(300)
def test_edges(upbit, binance, fx):
    """Doubles within their last digits of the exact value, in its sign's favour nowhere."""
    sell = (Fraction(upbit) / (Fraction(binance * fx, E8)) - 1) * 10_000
    buy = (Fraction(binance * fx, E8) / upbit - 1) * 10_000
    for found, exact in ((edge_sell_upbit_bps(upbit, binance, fx), sell), (edge_buy_upbit_bps(upbit, binance, fx), buy)):
        assert abs(Fraction(float(found)) - exact) <= (abs(exact) + 10_000) * Fraction(1, 10**14)


def test_at_parity_each_way_costs_the_spreads():
    sell = edge_sell_upbit_bps(140_000_000 * E8, 100_010 * E8, 1_401 * E8)
    buy = edge_buy_upbit_bps(140_010_000 * E8, 100_000 * E8, 1_400 * E8)
    assert sell < 0
    assert buy < 0


@pytest.mark.skipif(not hasattr(kernels.run, "py_func"), reason="without the JIT there is one form only")
def test_kernels_are_the_same_uncompiled():
    rng = np.random.default_rng(5)
    for _ in range(200):
        px, qty = (int(rng.integers(0, 2 ** int(rng.integers(1, 62)))) for _ in range(2))
        for kernel, arguments in (
            (notional_e8, (px, qty, True)),
            (notional_e8, (px, qty, False)),
            (size_for_e8, (px, qty)),
            (fee_e8, (px, qty % 100_001)),
        ):
            assert kernel(*arguments) == kernel.py_func(*arguments)
