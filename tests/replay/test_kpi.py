"""Key figures of markets whose profit can be computed by hand."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest

from arbl2.config import PaperConfig, RunConfig, load
from arbl2.events import Direction, FillStatus
from arbl2_replay import replay
from golden.goldens import GOLDEN
from markets import FREE, Market, Script, buy_binance, play, run, sell_binance, sell_upbit, threshold

BIDS = [(99_990, 10)]


def books(market, ms, binance_bid, binance_ask):
    """USDT costs 1,410 KRW and brings 1,390; BTC costs 141 million KRW and brings 140."""
    market.rate(ms, 1_390, 1_410).upbit(ms + 1, [(140_000_000, 10)], [(141_000_000, 10)])
    return market.binance(ms + 2, [(binance_bid, 10)], [(binance_ask, 10)])


def band(outcome):
    values = outcome.kpi["pnl_krw_band"]
    return [Decimal(values[name]) for name in ("pessimistic", "expected", "optimistic")]


# ----------------------------------------------------------------------------------------------------------------- totals


def test_100_usdt_and_nothing_else_is_100_usdt():
    """1 BTC bought for 100,000 USDT and sold for 100,100."""
    market = Market()
    for k in range(3):
        books(market, k * 200, 99_990, 100_000)
    for k in range(3, 6):
        books(market, k * 200, 100_100, 100_110)
    outcome = play(market, {2: buy_binance(1), 602: sell_binance(1)})
    assert outcome.kpi["balance_changes"]["binance"] == {"USDT": "100.00000000", "BTC": "0.00000000"}
    assert outcome.kpi["pnl_usdt"] == "100.0000"
    assert outcome.kpi["pnl_krw"] == "139000.00"  # sold at 1,390
    (btc,) = outcome.kpi["symbols"]
    assert (btc["pnl"]["usdt"], btc["pnl"]["total_usdt"], btc["pnl"]["total_krw"]) == ("100.0000", "100.0000", "139000.00")


def test_a_loss_in_usdt_is_bought_back_at_the_ask():
    market = Market()
    for k in range(3):
        books(market, k * 200, 99_990, 100_000)
    for k in range(3, 6):
        books(market, k * 200, 99_900, 99_910)
    outcome = play(market, {2: buy_binance(1), 602: sell_binance(1)})
    assert (outcome.kpi["pnl_usdt"], outcome.kpi["pnl_krw"]) == ("-100.0000", "-141000.00")


def test_krw_and_nothing_else_is_krw():
    """1 BTC bought for 141,000,000 KRW and sold for 142,000,000: worth 1,000,000 / 1,410 USDT."""
    market = Market()
    for k in range(3):
        books(market, k * 200, 99_990, 100_000)
    for ms in (600, 800, 1_000):
        market.rate(ms, 1_390, 1_410).binance(ms + 1, BIDS, [(100_000, 10)])
        market.upbit(ms + 2, [(142_000_000, 10)], [(143_000_000, 10)])
    outcome = play(market, {2: sell_binance(0, upbit=1), 602: sell_upbit(1)})
    assert (outcome.kpi["pnl_krw"], outcome.kpi["pnl_usdt"]) == ("1000000.00", "709.2199")


class OncePerCoin:
    """Buys 1 BTC for 100,000 USDT and sells 50,000 XRP for 100,000 USDT."""

    def __init__(self):
        self.done = set()

    def decide(self, view):
        if view.symbol in self.done:
            return None
        self.done.add(view.symbol)
        return buy_binance(1) if view.symbol == "BTC" else sell_binance(50_000)


def test_opposite_usdt_flows_net_before_they_are_marked():
    market = Market()
    for ms in range(0, 1_000, 200):
        books(market, ms, 99_990, 100_000)
        market.upbit(ms + 3, [(2_800, 10**6)], [(2_801, 10**6)], "XRP").binance(ms + 4, [(2, 10**6)], [("2.001", 10**6)], "XRP")
    outcome = run(market, RunConfig(symbols=("BTC", "XRP"), paper=FREE), OncePerCoin)
    assert outcome.kpi["balance_changes"]["binance"] == {"USDT": "0.00000000", "BTC": "1.00000000", "XRP": "-50000.00000000"}
    assert outcome.kpi["pnl_krw"] == "-50000.00"  # 1 BTC at the bid of 140,000,000, 50,000 XRP short at the ask of 2,801
    assert outcome.kpi["pnl_usdt"] == "-35.9712"  # met by selling USDT at 1,390
    btc, xrp = (row["pnl"] for row in outcome.kpi["symbols"])
    # each coin alone has to buy or sell 100,000 USDT: 20 KRW apart, 2,000,000 KRW that the account never pays
    assert (btc["usdt"], xrp["usdt"]) == ("-100000.0000", "100000.0000")
    assert (btc["total_krw"], xrp["total_krw"]) == ("-1000000.00", "-1050000.00")


def test_without_a_rate_there_is_no_total_that_needs_one():
    market = Market().rate(0, 1_390, 1_410).upbit(1, [(140_000_000, 10)], [(141_000_000, 10)]).binance(2, BIDS, [(100_000, 10)])
    for ms in (100, 200):
        market.upbit(ms, [], [], "USDT").upbit(ms + 1, [(140_000_000, 10)], [(141_000_000, 10)])
        market.binance(ms + 2, BIDS, [(100_000, 10)])
    outcome = play(market, {2: buy_binance(1)})
    assert (outcome.kpi["pnl_krw"], outcome.kpi["pnl_usdt"], outcome.kpi["pnl_krw_band"]) == (None, None, None)
    assert outcome.kpi["balance_changes"]["binance"]["USDT"] == "-100000.00000000"


# ------------------------------------------------------------------------------------------------------------------- band


def sale(*, fee_bps=0.0, after_bids, after_ms=42):
    """1 BTC is sold on Upbit at 2 ms for 150,000,000 (mid 150,100,000) and arrives at 22 ms; B+ comes at ``after_ms``."""
    asks = [(150_200_000, 10)]
    market = Market().rate(0, 1_390, 1_410).binance(1, BIDS, [(100_000, 10)]).upbit(2, [(150_000_000, 1)], asks)
    market.upbit(after_ms, after_bids, asks)
    return play(market, {2: sell_upbit(1)}, PaperConfig(upbit_fee_bps=fee_bps, upbit_coins={"BTC": "1"}))


def test_the_band_by_hand():
    """B+ fills 0.4 only: 0.6 BTC stay, worth 60,000 KRW more at the mid than at the bid, and 45,000 KRW of fee are saved.

    The order arrives half-way between B- (2 ms) and B+ (42 ms).
    """
    outcome = sale(fee_bps=5.0, after_bids=[(150_000_000, "0.4"), (149_000_000, 9)])
    assert outcome.kpi["pnl_krw"] == "-275000.00"  # 75,000 of fee, and 1 BTC bought back at 150,200,000
    assert band(outcome) == [-275_000, -275_000 + 52_500, -275_000 + 105_000]


def test_the_band_weighs_by_the_time_of_arrival():
    """20 of the 160 ms between the books: one eighth of 60,000 KRW."""
    outcome = sale(after_bids=[(150_000_000, "0.4")], after_ms=162)
    assert band(outcome) == [-200_000, -200_000 + 7_500, -200_000 + 60_000]


def test_a_worse_book_after_the_arrival_is_the_pessimistic_end():
    """0.5 BTC are bought on Binance for 50,000 USDT in B-, for 1 USDT less in B+; then the other way round.

    It arrives at 62 ms, between the books at 2 and 82 ms; the fee is 10 bp, USDT are 1,390 / 1,410 KRW.
    """

    def purchase(before, after):
        market = Market().rate(0, 1_390, 1_410).upbit(1, [(140_000_000, 10)], [(140_000_001, 10)])
        market.binance(1, BIDS, [(100_000, 10)]).binance(2, BIDS, [(before, 10)])
        market.binance(82, BIDS, [(after, 10)])
        return play(market, {1: buy_binance("0.5")}, PaperConfig(binance_fee_bps=10.0, binance_latency_ms=61.0))

    better = purchase(100_000, 99_998)
    total = Decimal(better.kpi["pnl_krw"])
    gain = Decimal("1.001") * 1_390  # less paid, and less fee on it
    arrived = Decimal(3) / 4
    assert band(better) == [total, (total + gain * arrived).quantize(Decimal("0.01")), total + gain.quantize(Decimal("0.01"))]
    worse = purchase(99_998, 100_000)
    total = Decimal(worse.kpi["pnl_krw"])
    loss = Decimal("1.001") * 1_410
    assert band(worse) == [total - loss.quantize(Decimal("0.01")), (total - loss * arrived).quantize(Decimal("0.01")), total]


def test_equal_books_make_the_band_a_point():
    outcome = sale(fee_bps=5.0, after_bids=[(150_000_000, 1)])
    assert outcome.fills["resolved"].tolist() == [1]
    assert band(outcome) == [Decimal(outcome.kpi["pnl_krw"])] * 3


def test_an_unresolved_leg_stands_at_its_fill():
    market = Market().rate(0, 1_390, 1_410).binance(1, BIDS, [(100_000, 10)]).upbit(2, [(150_000_000, 1)], [(150_200_000, 10)])
    outcome = play(market.rate(60), {2: sell_upbit(1)}, PaperConfig(upbit_fee_bps=0.0, upbit_coins={"BTC": "1"}))
    assert band(outcome) == [Decimal(outcome.kpi["pnl_krw"])] * 3
    assert (outcome.kpi["legs"], outcome.kpi["legs_unresolved"]) == (1, 1)


def test_better_and_worse_legs_do_not_cancel_in_the_ends_of_the_band():
    """Two sales: B+ is 60,000 KRW better for the first and 60,000 KRW worse for the second."""
    asks = [(150_200_000, 10)]
    market = Market().rate(0, 1_390, 1_410).binance(1, BIDS, [(100_000, 10)]).upbit(2, [(150_000_000, 1)], asks)
    market.upbit(42, [(150_000_000, "0.4")], asks).upbit(44, [], asks)  # forgets what was taken
    market.upbit(100, [(150_000_000, 1)], asks).upbit(115, [(150_000_000, "0.4")], asks).upbit(125, [(150_000_000, 1)], asks)
    outcome = play(market, {2: sell_upbit(1), 100: sell_upbit(1)}, PaperConfig(upbit_fee_bps=0.0, upbit_coins={"BTC": "3"}))
    assert outcome.fills["filled_e8"].tolist() == [10**8, 4 * 10**7]
    assert outcome.fills["after_filled_e8"].tolist() == [4 * 10**7, 10**8]
    total = Decimal(outcome.kpi["pnl_krw"])
    # the first arrives half-way; the second at 120 ms, between 115 and 125 ms, too
    assert band(outcome) == [total - 60_000, total, total + 60_000]


def wandering(seed):
    """20 s of books around parity with sizes and prices that jump, so that most fills differ between B- and B+."""
    rng = random.Random(seed)
    market = Market()
    for ms in range(0, 20_000, 100):
        if ms % 1_000 == 0:
            market.rate(ms, 1_390 + rng.randrange(10), 1_400 + rng.randrange(10))
        upbit, binance = 140_000_000 + 1_000 * rng.randrange(-1_500, 1_500), 100_000 + rng.randrange(-300, 300)
        levels = range(5)
        market.upbit(
            ms + rng.randrange(1, 40),
            [(upbit - 1_000 * (k + 1), f"0.00{rng.randrange(1, 99):02d}") for k in levels],
            [(upbit + 1_000 * k, f"0.00{rng.randrange(1, 99):02d}") for k in levels],
        )
        market.binance(
            ms + rng.randrange(40, 99),
            [(binance - (k + 1), f"0.00{rng.randrange(1, 99):02d}") for k in levels],
            [(binance + k, f"0.00{rng.randrange(1, 99):02d}") for k in levels],
        )
    return market


@pytest.mark.parametrize("seed", range(12))
def test_pessimistic_expected_and_optimistic_are_in_this_order(seed):
    outcome = run(wandering(seed), threshold(entry_bps=10.0, tp_bps=30.0))
    pessimistic, expected, optimistic = band(outcome)
    assert pessimistic < expected < optimistic
    assert pessimistic <= Decimal(outcome.kpi["pnl_krw"]) <= optimistic
    assert set(outcome.fills["status"].tolist()) >= {FillStatus.FILLED, FillStatus.PARTIAL}


def test_the_band_of_a_golden_tape_is_in_order():
    kpi = replay(GOLDEN / "two-venue-60s" / "tape", load(GOLDEN / "two-venue-60s" / "config.toml")).kpi
    pessimistic, expected, optimistic = (Decimal(kpi["pnl_krw_band"][name]) for name in ("pessimistic", "expected", "optimistic"))
    assert pessimistic <= expected <= optimistic
    assert kpi["legs"] > 0


# --------------------------------------------------------------------------------------------------------------- slippage


def test_slippage_is_measured_from_the_mid_of_the_decision():
    outcome = sale(after_bids=[(150_000_000, 1)])
    (row,) = outcome.kpi["symbols"]
    assert row["venues"]["upbit"]["slippage_bps"] == pytest.approx(100_000 / 150_100_000 * 10_000)
    assert (row["venues"]["upbit"]["unpriced"], row["venues"]["upbit"]["resolved"]) == (0, 1)


@pytest.mark.parametrize("direction", list(Direction))
def test_a_book_with_one_side_prices_nothing(direction):
    """Upbit shows the side that is taken only; there is no mid to measure from."""
    sells = direction is Direction.SELL_UPBIT
    shown, none = [(140_000_000, 1)], []
    market = Market().rate(0).binance(1, BIDS, [(100_000, 10)])
    for ms in (2, 42, 82):
        market.upbit(ms, *((shown, none) if sells else (none, shown)))
    market.upbit(100, [(139_000_000, 1)], [(141_000_000, 1)])
    ask = sell_upbit("0.5") if sells else sell_binance(0, upbit="0.5")
    outcome = run(market, RunConfig(symbols=("BTC",), paper=FREE), lambda: Script({2: ask}))
    (row,) = outcome.kpi["symbols"]
    venue = row["venues"]["upbit"]
    assert (venue["legs"], venue["filled"], venue["unpriced"], venue["resolved"]) == (1, 1, 1, 0)
    assert venue["slippage_bps"] is None
    assert band(outcome) == [Decimal(outcome.kpi["pnl_krw"])] * 3


def test_unpriced_legs_do_not_water_down_the_slippage_of_the_others():
    asks = [(150_200_000, 10)]
    market = Market().rate(0).binance(1, BIDS, [(100_000, 10)]).upbit(2, [(150_000_000, 1)], asks)
    market.upbit(42, [(150_000_000, 1)], asks).upbit(60, [], asks).upbit(100, [(150_000_000, 1)], [])
    market.upbit(140, [(150_000_000, 1)], asks)
    outcome = play(market, {2: sell_upbit(1), 100: sell_upbit(1)}, PaperConfig(upbit_fee_bps=0.0, upbit_coins={"BTC": "3"}))
    venue = outcome.kpi["symbols"][0]["venues"]["upbit"]
    assert (venue["filled"], venue["unpriced"], venue["fill_ratio"]) == (2, 1, 1.0)
    assert venue["slippage_bps"] == pytest.approx(100_000 / 150_100_000 * 10_000)
