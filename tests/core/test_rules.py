"""Dated venue rules: tick tiers and their edges, lots, smallest orders, recorded filters, fees."""

from __future__ import annotations

import contextlib
from datetime import date
from decimal import Decimal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arbl2.errors import ConfigError, TapeError
from arbl2.rules import (
    BinanceRules,
    PairRules,
    RuleOverride,
    binance_lot_e8,
    binance_rules,
    binance_rules_from_exchange_info,
    pair_rules,
    upbit_date,
    upbit_tick_e8,
)

NOW = date(2026, 11, 21)


def e8(text: str) -> int:
    return int(Decimal(text) * 10**8)


@pytest.mark.parametrize(
    ("price", "tick"),
    [
        ("163000000", "1000"),
        ("2000000", "1000"),
        ("1000000", "1000"),
        ("999500", "500"),
        ("500000", "500"),
        ("499900", "100"),
        ("100000", "100"),
        ("99950", "50"),
        ("50000", "50"),
        ("49990", "10"),
        ("10000", "10"),
        ("9995", "5"),
        ("5000", "5"),
        ("4999", "1"),
        ("1000", "1"),
        ("999", "1"),
        ("100", "1"),
        ("99.9", "0.1"),
        ("10", "0.1"),
        ("9.99", "0.01"),
        ("1", "0.01"),
        ("0.999", "0.001"),
        ("0.1", "0.001"),
        ("0.0999", "0.0001"),
        ("0.01", "0.0001"),
        ("0.00999", "0.00001"),
        ("0.001", "0.00001"),
        ("0.000999", "0.000001"),
        ("0.0001", "0.000001"),
        ("0.0000999", "0.0000001"),
        ("0.00001", "0.0000001"),
        ("0.00000999", "0.00000001"),
        ("0.00000001", "0.00000001"),
    ],
)
def test_upbit_tick_of_each_band_and_its_inclusive_lower_bound(price: str, tick: str) -> None:
    assert upbit_tick_e8("KRW-BTC", e8(price), NOW) == e8(tick)


@pytest.mark.parametrize(
    ("below", "edge"),
    [("99.9", "100"), ("999", "1000"), ("4999", "5000"), ("9995", "10000"), ("999500", "1000000")],
)
def test_one_tick_up_from_below_an_edge_is_the_edge_and_one_tick_down_is_back(below: str, edge: str) -> None:
    up = e8(below) + upbit_tick_e8("KRW-XRP", e8(below), NOW)
    assert up == e8(edge)
    assert e8(edge) - upbit_tick_e8("KRW-XRP", e8(edge) - 1, NOW) == e8(below)


@given(st.integers(1, 2**63 - 1))
def test_every_price_has_a_tick_of_at_most_one_percent(
    price_e8: int,
) -> None:
    tick = upbit_tick_e8("KRW-BTC", price_e8, NOW)
    assert 1 <= tick <= max(1, price_e8 // 100)


@pytest.mark.parametrize(
    ("instrument", "price", "on", "tick"),
    [
        ("KRW-USDT", "1400.5", date(2025, 3, 21), "0.5"),
        ("KRW-USDT", "1400", date(2025, 7, 30), "0.5"),
        ("KRW-USDT", "1400", date(2025, 7, 31), "1"),
        ("KRW-USDC", "1400", date(2025, 6, 1), "0.5"),
        ("KRW-ADA", "500", date(2024, 10, 14), "1"),
        ("KRW-ADA", "500", date(2025, 7, 31), "1"),
        ("KRW-BTC", "150000000", date(2025, 7, 31), "1000"),
    ],
)
def test_upbit_tick_of_its_day(instrument: str, price: str, on: date, tick: str) -> None:
    assert upbit_tick_e8(instrument, e8(price), on) == e8(tick)


@pytest.mark.parametrize(
    ("instrument", "price", "on"),
    [
        ("KRW-USDT", "1400", date(2025, 3, 20)),
        ("KRW-USDT", "999", date(2025, 6, 1)),
        ("KRW-USDT", "10000", date(2025, 6, 1)),
        ("KRW-ADA", "1200", date(2025, 1, 1)),
        ("KRW-ADA", "500", date(2024, 10, 13)),
        ("KRW-BTC", "100000000", date(2025, 7, 30)),
        ("KRW-BTC", "70000000", date(2021, 4, 17)),
    ],
)
def test_a_tick_that_is_not_known_for_the_day_is_an_error(instrument: str, price: str, on: date) -> None:
    with pytest.raises(ConfigError, match=rf"{instrument}.* on {on} is not known.*since|begins"):
        upbit_tick_e8(instrument, e8(price), on)


@pytest.mark.parametrize("instrument", ["USDT-BTC", "BTC-ETH", "BTCUSDT", "KRW-", ""])
def test_ticks_of_other_markets_are_not_guessed(instrument: str) -> None:
    with pytest.raises(ConfigError, match="KRW market"):
        upbit_tick_e8(instrument, e8("1"), NOW)


@pytest.mark.parametrize("price_e8", [0, -1])
def test_a_price_that_is_not_positive_has_no_tick(price_e8: int) -> None:
    with pytest.raises(ConfigError, match="above zero"):
        upbit_tick_e8("KRW-BTC", price_e8, NOW)


def test_upbit_date_changes_at_midnight_in_korea() -> None:
    midnight_ns = 1_753_887_600 * 10**9  # 2025-07-30T15:00Z
    assert upbit_date(midnight_ns) == date(2025, 7, 31)
    assert upbit_date(midnight_ns - 1) == date(2025, 7, 30)


@pytest.mark.parametrize(
    ("instrument", "tick", "lot"),
    [
        ("BTCUSDT", "0.01", "0.00001"),
        ("ETHUSDT", "0.01", "0.0001"),
        ("XRPUSDT", "0.0001", "0.1"),
        ("SOLUSDT", "0.01", "0.001"),
        ("DOGEUSDT", "0.00001", "1"),
    ],
)
def test_built_in_binance_filters(instrument: str, tick: str, lot: str) -> None:
    assert binance_rules(instrument) == BinanceRules(e8(tick), e8(lot), e8("5"))
    assert binance_lot_e8(instrument) == e8(lot)


def test_an_unknown_binance_symbol_has_no_built_in_lot() -> None:
    assert binance_lot_e8("ADAUSDT") is None


def test_pair_rules_take_the_coarser_lot_and_both_smallest_orders() -> None:
    assert pair_rules("XRP", {}) == PairRules("XRP", e8("0.1"), e8("5000"), e8("5"))


def test_an_unknown_coin_says_what_to_add_to_the_config() -> None:
    with pytest.raises(ConfigError, match=r'Add \[rules\.ADA\] with lot = "0\.1"'):
        pair_rules("ADA", {"XRP": RuleOverride(lot="1")})


def test_what_the_error_asks_for_is_enough() -> None:
    assert pair_rules("ADA", {"ADA": RuleOverride(lot="0.1")}) == PairRules("ADA", e8("0.1"), e8("5000"), e8("5"))


def test_the_config_wins_over_the_tape_and_the_tape_over_the_table() -> None:
    recorded = {"BTCUSDT": BinanceRules(e8("0.1"), e8("0.001"), e8("10"))}
    assert pair_rules("BTC", {}, recorded) == PairRules("BTC", e8("0.001"), e8("5000"), e8("10"))
    override = RuleOverride(lot="0.01", upbit_min_notional="1000", binance_min_notional="20")
    assert pair_rules("BTC", {"BTC": override}, recorded) == PairRules("BTC", e8("0.01"), e8("1000"), e8("20"))
    assert pair_rules("ETH", {}, recorded).lot_e8 == e8("0.0001")


@pytest.mark.parametrize("text", ["0", "-1", "", "abc", "1e99", "0.000000001", "99999999999999999999", "NaN"])
@pytest.mark.parametrize("key", ["lot", "upbit_min_notional", "binance_min_notional"])
def test_a_bad_override_is_named(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[rules\.BTC\] {key}"):
        pair_rules("BTC", {"BTC": RuleOverride(**{key: text})})


def exchange_info(*filters: dict[str, object], symbol: str = "BTCUSDT") -> bytes:
    return msgspec.json.encode({"timezone": "UTC", "symbols": [{"symbol": symbol, "filters": list(filters)}]})


PRICE = {"filterType": "PRICE_FILTER", "minPrice": "0.01000000", "tickSize": "0.01000000"}
LOT = {"filterType": "LOT_SIZE", "minQty": "0.00001000", "stepSize": "0.00001000"}
MARKET_LOT = {"filterType": "MARKET_LOT_SIZE", "stepSize": "0.00000000"}
NOTIONAL = {"filterType": "NOTIONAL", "minNotional": "5.00000000", "applyMinToMarket": True}


def test_rules_from_a_recorded_exchange_info() -> None:
    body = exchange_info(PRICE, LOT, {"filterType": "ICEBERG_PARTS", "limit": 10}, MARKET_LOT, NOTIONAL)
    assert binance_rules_from_exchange_info(body) == {"BTCUSDT": BinanceRules(e8("0.01"), e8("0.00001"), e8("5"))}


def test_the_older_name_of_the_notional_filter_is_read() -> None:
    body = exchange_info(PRICE, LOT, {"filterType": "MIN_NOTIONAL", "minNotional": "10.0"})
    assert binance_rules_from_exchange_info(body)["BTCUSDT"].min_notional_e8 == e8("10")


@pytest.mark.parametrize("left", [[PRICE, LOT], [PRICE, NOTIONAL], [LOT, NOTIONAL], [PRICE, MARKET_LOT, NOTIONAL]])
def test_a_symbol_without_a_filter_is_left_out(left: list[dict[str, object]]) -> None:
    assert binance_rules_from_exchange_info(exchange_info(*left)) == {}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"symbols":{}}',
        b'{"symbols":[{"symbol":"A"}]}',
        b'{"symbols":[{"symbol":"\xff","filters":[]}]}',
        exchange_info(PRICE, LOT, NOTIONAL)[:-3],
        exchange_info(PRICE, LOT | {"stepSize": 0.1}, NOTIONAL),
        exchange_info(PRICE, LOT | {"stepSize": "1e-99"}, NOTIONAL),
        exchange_info(PRICE, LOT | {"stepSize": "-1"}, NOTIONAL),
        b'{"symbols":[{"symbol":"A","filters":[{"filterType":"LOT_SIZE","stepSize":"\\ud800"}]}]}',
        b"[" * 100_000,
        b'{"symbols":' + b"[" * 100_000,
    ],
)
def test_a_body_that_is_no_exchange_info_is_a_tape_error(body: bytes) -> None:
    with pytest.raises(TapeError, match="exchangeInfo cannot be read"):
        binance_rules_from_exchange_info(body)


@given(st.binary(max_size=200))
def test_no_bytes_escape_as_another_error(body: bytes) -> None:
    with contextlib.suppress(TapeError):
        binance_rules_from_exchange_info(body)
