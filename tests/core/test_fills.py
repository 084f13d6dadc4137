"""Orders against books, episodes, refusals and doubt: every case is a market that can be followed by hand."""

from __future__ import annotations

import json

import pytest

from arbl2.aggregator import SourceStatus
from arbl2.config import PaperConfig, PolicyConfig, RunConfig, loads
from arbl2.engine import Engine
from arbl2.errors import ConfigError, EngineError
from arbl2.events import Direction, FillStatus, Intent, Outcome
from arbl2.frames import ExchangeId, FrameKind
from arbl2.kernels import EATEN_CAP
from arbl2.policy import Ask
from markets import (
    BINANCE,
    E8,
    FREE,
    INSTRUMENTS,
    UPBIT,
    Market,
    Script,
    at_ns,
    buy_binance,
    e8,
    feed,
    play,
    run,
    sell_binance,
    sell_upbit,
    take,
    threshold,
)

BIDS = [(99_990, 10)]
DEAR = [(150_000_000, 10)], [(150_100_000, 10)]  # Upbit with a premium of 7 %
CALM = [(130_000_000, 10)], [(150_100_000, 10)]  # without one
FAIR = [(139_900_000, 10)], [(140_100_000, 10)]


# ---------------------------------------------------------------------------------------- displayed size, and who took it


def window(best, size, levels=20):
    return [(f"{best + 0.01 * k:.2f}", size) for k in range(levels)]


def test_a_falling_market_fills_every_order_whose_book_has_the_size():
    """The ask falls by 1 USDT a second, so each level we took is out of the 20-level window by the next buy."""
    market = Market()
    for k in range(400):
        market.rate(k * 1_000).upbit(k * 1_000 + 1, *DEAR)
        for ms in (2, 200):
            market.binance(k * 1_000 + ms, [], window(100_000 - k, "0.01"))
    asks = {k * 1_000 + 2: buy_binance("0.006") for k in range(400)}
    fills = play(market, asks, FREE).fills
    assert len(fills) == 400
    assert (fills["status"] == FillStatus.FILLED).all()
    assert (fills["filled_e8"] == e8("0.006")).all()
    assert (fills["quote_e8"] == fills["limit_px_e8"] * 6 // 1_000).all()


def test_a_falling_market_fills_every_order_of_the_compiled_policy():
    market = Market()
    for k in range(400):
        ms, asks = k * 1_000, window(100_000 - k, "0.01")
        market.rate(ms).upbit(ms + 1, *CALM).binance(ms + 2, [], asks)
        market.upbit(ms + 3, *DEAR).upbit(ms + 20, *CALM).binance(ms + 100, [], asks)
    fills = run(market, threshold()).fills
    fills = fills[fills["venue"] == BINANCE]
    assert len(fills) == 400
    assert (fills["status"] == FillStatus.FILLED).all()


def taken_then(steps):
    """Buy the whole ask of 1.0 at 100,000, then show ``steps`` of (ms, Binance asks): the best ask seen at the last."""
    market = Market().rate(0).upbit(1, *DEAR)
    market.binance(2, [], [(100_000, 1)]).binance(100, [], [(100_000, 1)])
    for ms, asks in steps:
        market.rate(ms).upbit(ms, *DEAR).binance(ms, [], asks)
    outcome = play(market, {2: buy_binance(1)})
    assert outcome.filled(BINANCE) == [E8]
    assert outcome.engine.reasons()["binance"] == {"book": 2 + len(steps)}
    return outcome.views[steps[-1][0]].binance_ask_e8


BELOW = [(99_000 + k, 1) for k in range(20)]
BACK = [(100_000, 1), (100_005, 1)]


@pytest.mark.parametrize(("last_ms", "best"), [(60_100, 100_005), (60_101, 100_000)])
def test_a_take_out_of_sight_is_remembered_for_a_minute(last_ms, best):
    """The level is last displayed at 100 ms and then lies beyond the window until ``last_ms``."""
    steps = [(ms, BELOW) for ms in range(1_100, 60_100, 1_000)] + [(last_ms, BELOW), (last_ms + 1, BACK)]
    assert taken_then(steps) == e8(best)


@pytest.mark.parametrize(
    ("between", "best"),
    [
        ([(100_000, 1)], 100_005),  # displayed all the time: taken all the time
        ([(99_999, 1)], 100_005),  # beyond the displayed window: not known to be gone
        ([(100_001, 1)], 100_000),  # the window begins behind it: gone, so it is new when it comes back
        ([(99_999, 1), (100_001, 1)], 100_000),  # it vanished inside the window
        ([], 100_000),  # nothing is left of the side
    ],
)
def test_a_level_that_vanishes_inside_the_window_is_forgotten(between, best):
    assert taken_then([(200, between), (300, BACK)]) == e8(best)


@pytest.mark.parametrize(("shown", "free"), [("0.4", "0.6"), ("1", "0"), ("3", "0")])
def test_a_take_is_cut_to_what_is_displayed(shown, free):
    """After 1.0 was taken, ``shown`` is displayed, then 1.0 again: what came on top of the smaller size is free."""
    market = Market().rate(0).upbit(1, *DEAR)
    for ms, size in ((2, 1), (100, 1), (200, shown), (300, 1), (400, 1)):
        market.binance(ms, BIDS, [(100_000, size), (100_005, 5)])
    outcome = play(market, {2: buy_binance(1), 300: buy_binance(1)})
    first, second = outcome.fills
    assert first["filled_e8"] == E8
    taken_at_limit = e8(free) if second["limit_px_e8"] == e8(100_000) else 0
    assert taken_at_limit == e8(free)
    assert second["filled_e8"] == (e8(free) or E8)


def test_ten_orders_share_one_displayed_level():
    market = Market().rate(0).upbit(1, *DEAR)
    for k in range(11):
        market.binance(2 + 100 * k, BIDS, [(100_000, 1)])
    outcome = play(market, {2 + 100 * k: buy_binance("0.15") for k in range(10)})
    assert outcome.filled(BINANCE) == [e8("0.15")] * 6 + [e8("0.1")]
    assert sum(outcome.filled(BINANCE)) == E8
    assert outcome.engine.refusals() == {"min_notional": 3}  # nothing is left at any price


def test_an_order_takes_several_levels_and_the_next_one_none_of_them():
    market = Market().rate(0).upbit(1, *DEAR).binance(2, BIDS, [(100_000, 3)])
    market.binance(10, BIDS, [(99_998, 1), (99_999, 1), (100_000, 3)])
    for ms in (100, 200, 300):
        market.binance(ms, BIDS, [(99_998, 1), (99_999, 1), (100_000, 3)])
    first, second = play(market, {2: buy_binance("2.5"), 100: buy_binance(3)}).fills
    assert (first["levels"], first["filled_e8"], first["quote_e8"]) == (3, e8("2.5"), e8(99_998 + 99_999 + 50_000))
    assert (second["levels"], second["filled_e8"], second["quote_e8"]) == (1, e8("2.5"), e8(250_000))


@pytest.mark.parametrize(("ago", "free"), [(0, True), (9, True), (10, False), (129, False)])
def test_a_full_table_of_takes_forgets_the_farthest(ago, free):
    """130 levels are taken within 13 s, each below the one before; the highest ten are too many to remember."""
    assert EATEN_CAP == 120
    market = Market().rate(0).upbit(1, *DEAR)
    for k in range(130):
        market.rate(k * 100).upbit(k * 100 + 1, *DEAR).binance(k * 100 + 2, [], window(100_000 - k, "0.01"))
    price = 100_000 - ago
    market.rate(13_000).upbit(13_001, *DEAR).binance(13_002, [], [(price, "0.01"), (f"{price}.5", 1)])
    outcome = play(market, {k * 100 + 2: buy_binance("0.01") for k in range(130)})
    assert outcome.filled(BINANCE) == [e8("0.01")] * 130
    assert outcome.views[13_002].binance_ask_e8 == e8(price if free else f"{price}.5")


@pytest.mark.parametrize(("ago", "free"), [(9, True), (10, False)])
def test_a_full_table_of_takes_forgets_the_farthest_bid(ago, free):
    market = Market().rate(0).binance(1, BIDS, [(100_000, 10)])
    for k in range(130):
        bids = [(150_000_000 + 1_000_000 * k - 1_000 * j, "0.01") for j in range(30)]
        market.rate(k * 100).binance(k * 100 + 1, BIDS, [(100_000, 10)]).upbit(k * 100 + 2, bids, [])
    price = 150_000_000 + 1_000_000 * ago
    market.rate(13_000).binance(13_001, BIDS, [(100_000, 10)])
    market.upbit(13_002, [(price, "0.01"), (price - 1_000, 1)], [])
    outcome = play(market, {k * 100 + 2: sell_upbit("0.01") for k in range(130)}, paper(upbit_coins={"BTC": "10"}))
    assert outcome.filled(UPBIT) == [e8("0.01")] * 130
    assert outcome.views[13_002].upbit_bid_e8 == e8(price if free else price - 1_000)


# --------------------------------------------------------------------------------------------------------------- overflow


def paper(**fields):
    return PaperConfig(**{"upbit_fee_bps": 0.0, "binance_fee_bps": 0.0, **fields})


def absurd(bids, *, last_ms=60):
    """XRP bids 20 KRW when an order to sell 30,000 on Upbit is sent at 2 ms, and ``bids`` when it arrives at 22 ms."""
    market = Market().rate(0).binance(1, [("0.009", 10**9)], [("0.01", 10**9)], "XRP")
    market.upbit(2, [(20, 10**6)], [(21, 10**6)], "XRP").upbit(15, bids, [(9_000_000, 1)], "XRP")
    return market.rate(last_ms)


ONE_LEVEL = [(4_000_000, 30_000)]  # 1.2 x 10^11 KRW
TWO_LEVELS = [(4_000_000, 15_000), (3_000_000, 15_000)]  # 6.0 + 4.5 x 10^10 KRW
TOO_RICH = [(2_000_000, 30_000)]  # 6 x 10^10 KRW, on top of 4 x 10^10


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("bids", "krw", "last_ms"),
    [
        (ONE_LEVEL, "0", 60),
        (TWO_LEVELS, "0", 60),
        (TOO_RICH, "40000000000", 60),
        (ONE_LEVEL, "0", 22),  # it arrives with the last frame: the end of the tape executes it
        (TOO_RICH, "40000000000", 22),
    ],
)
def test_an_absurd_price_stops_the_run_and_names_the_order(bids, krw, last_ms, step):
    config = RunConfig(symbols=("XRP",), paper=paper(upbit_krw=krw))
    market = absurd(bids, last_ms=last_ms)
    engine = Engine(INSTRUMENTS, config, policy=Script({2: sell_upbit(30_000)}, "XRP"))
    with pytest.raises(EngineError, match=r"order 1 moves an amount that does not fit.*absurd prices"):
        take(engine, market, step)
    opening = engine.ledger.balances(opening=True)
    assert engine.ledger.balances() == opening
    assert opening["upbit"]["KRW"] == e8(krw)


def test_an_account_that_just_fits_goes_on():
    outcome = run(absurd(TOO_RICH), RunConfig(symbols=("XRP",), paper=paper()), lambda: Script({2: sell_upbit(30_000)}, "XRP"))
    assert outcome.fills["quote_e8"].tolist() == [e8(60_000_000_000)]
    assert outcome.engine.ledger.balances()["upbit"]["KRW"] == e8(60_000_000_000 + 100_000_000)


def test_the_compiled_policy_is_stopped_too():
    config = RunConfig(symbols=("XRP",), policy=PolicyConfig(entry_bps=20.0, tp_bps=40.0, size_krw="1000000"))
    for step in (0, 1):
        with pytest.raises(EngineError, match="order 1 moves"):
            feed(absurd([(4_000_000, 50_000)]), config, step=step)


def test_the_other_leg_is_named_when_it_is_the_one():
    market = Market().rate(0).upbit(1, [(20, 10**6)], [(21, 10**6)], "XRP")
    market.binance(2, [("0.009", 10**9)], [("0.01", 10**9)], "XRP").upbit(21, [(20, 10**6)], [(21, 10**6)], "XRP")
    market.binance(30, [(9_000_000, 30_000)], [(9_000_001, 1)], "XRP").rate(100)
    both = {2: sell_binance(30_000, 30_000)}  # order 1 buys on Upbit, order 2 sells on Binance
    with pytest.raises(EngineError, match="order 2 moves"):
        feed(market, RunConfig(symbols=("XRP",)), Script(both, "XRP"))


def test_coins_beyond_64_bits_stop_the_run():
    """4 x 10^10 coins held, twice 3 x 10^10 bought for 10^-8 USDT each."""
    market = Market().rate(0).upbit(1, [(1, 1)], [(2, 1)], "XRP")
    for ms in (2, 100, 200):
        market.binance(ms, [], [("0.00000001", 30_000_000_000 * (1 + ms // 100))], "XRP")
    config = RunConfig(symbols=("XRP",), paper=paper(binance_coins={"XRP": "40000000000"}))
    asks = {2: buy_binance(30_000_000_000), 100: buy_binance(30_000_000_000)}
    with pytest.raises(EngineError, match="order 2 moves"):
        feed(market, config, Script(asks, "XRP"))


def test_an_absurd_book_after_the_arrival_leaves_the_leg_unresolved():
    """B+ would fill at 4,000,000 KRW; that sum does not fit, so it is no bracket of a band."""
    market = Market().rate(0).binance(1, [("0.009", 10**9)], [("0.01", 10**9)], "XRP")
    market.upbit(2, [(20, 10**6)], [(21, 10**6)], "XRP").upbit(60, ONE_LEVEL, [(9_000_000, 1)], "XRP")
    outcome = run(market, RunConfig(symbols=("XRP",), paper=paper()), lambda: Script({2: sell_upbit(30_000)}, "XRP"))
    (fill,) = outcome.fills
    assert (fill["status"], fill["filled_e8"], fill["resolved"]) == (FillStatus.FILLED, e8(30_000), 0)
    assert outcome.kpi["legs_unresolved"] == 1
    assert len(set(outcome.kpi["pnl_krw_band"].values())) == 1


@pytest.mark.parametrize("amount", ["40000000000.00000001", "40000000001", "92233720368", "99999999999999999999"])
@pytest.mark.parametrize("name", ["upbit_krw", "binance_usdt", "upbit_coins.BTC", "binance_coins.BTC"])
def test_an_opening_balance_above_40_billion_is_refused(name, amount):
    with pytest.raises(ConfigError, match=rf"paper\.{name} .*40 billion"):
        loads(f'paper.{name} = "{amount}"')
    table, _, coin = name.partition(".")
    config = RunConfig(symbols=("BTC",), paper=PaperConfig(**{table: {coin: amount} if coin else amount}))
    with pytest.raises(ConfigError, match="40 billion"):
        Engine(INSTRUMENTS, config)


def test_an_opening_balance_of_40_billion_is_taken():
    config = loads('paper.upbit_krw = "40000000000"')
    assert Engine(INSTRUMENTS, config).ledger.balances()["upbit"]["KRW"] == e8(40_000_000_000)


# --------------------------------------------------------------------------------------------------------------- episodes


def episodes(market, config=None):
    """(ms, first in episode) of every accepted decision."""
    decisions = run(market, config or threshold()).decisions
    assert (decisions["outcome"] == Outcome.ACCEPTED).all()
    return [((int(row["time_ns"]) - at_ns(0)) // 10**6, int(row["first_in_episode"])) for row in decisions]


def test_our_own_takes_do_not_end_an_episode():
    """The bid with the premium is displayed throughout and grows a little; each time we take all of it."""
    market = Market()
    for k in range(12):
        ms, bids = k * 200, [(141_000_000, f"0.{4 + k:03d}"), (139_900_000, 10)]
        market.rate(ms).binance(ms + 1, BIDS, [(100_000, 10)])
        market.upbit(ms + 2, bids, [(141_010_000, 10)]).upbit(ms + 100, bids, [(141_010_000, 10)])
    found = episodes(market)
    assert len(found) >= 6
    assert [first for _, first in found] == [1] + [0] * (len(found) - 1)


def edges(*prices):
    """Upbit bids one price after the other; every book is shown each time."""
    market = Market()
    for k, price in enumerate(prices):
        ms = k * 500
        market.rate(ms).binance(ms + 1, BIDS, [(100_000, 10)])
        market.upbit(ms + 2, [(price, 10)], [(price + 200_000, 10)])
    return market


ABOVE, BETWEEN, UNDER = 140_420_000, 140_210_000, 140_070_000  # +30, +15 and +5 bps


@pytest.mark.parametrize(
    ("tp_bps", "prices", "firsts"),
    [
        (4_000.0, (ABOVE, ABOVE, ABOVE), [0]),
        (4_000.0, (ABOVE, UNDER, ABOVE, ABOVE), [0, 2]),
        (4_000.0, (ABOVE, BETWEEN, ABOVE, BETWEEN), [0, 2]),  # to enter takes 20, to close takes more
        (30.0, (ABOVE, BETWEEN, ABOVE, UNDER, ABOVE), [0, 4]),  # to close takes 10 only: the lower threshold
        (30.0, (BETWEEN, ABOVE, ABOVE), [1]),  # the first accepted one, though the edge rose before
    ],
)
def test_an_episode_ends_when_the_edge_falls_below_the_lower_threshold(tp_bps, prices, firsts):
    found = episodes(edges(*prices), threshold(tp_bps=tp_bps))
    assert [ms for ms, first in found if first] == [500 * k + 2 for k in firsts]
    assert len(found) > len(firsts)


def test_a_stale_pair_ends_the_episode():
    market = Market().premium(0)
    for ms in (500, 1_000, 1_500, 2_000, 2_500):
        market.rate(ms).binance(ms + 2, BIDS, [(100_000, 10)])  # Upbit is silent
    market.premium(3_000).premium(3_500)
    found = episodes(market)
    assert [ms for ms, first in found if first] == [2, 3_001]


@pytest.mark.parametrize("venue", ["upbit", "binance"])
def test_a_disconnected_pair_ends_the_episode(venue):
    market = Market().premium(0).premium(500).add(600, venue, FrameKind.CLOSED, b"{}")
    market.rate(700)  # Upbit's FX book is on the connection that comes back, too
    if venue == "upbit":
        market.binance(800, BIDS, [(100_000, 10)])
    else:
        market.upbit(800, *DEAR)
    market.premium(1_000).premium(1_500)
    found = episodes(market)
    assert [ms for ms, first in found if first] == [2, 1_001 if venue == "upbit" else 1_002]


def test_a_pair_in_doubt_ends_the_episode():
    market = Market().premium(0).premium(500).upbit(600, [(150_000_000, 1)], [(140_000_000, 1)])  # crossed: refused
    market.binance(700, BIDS, [(100_000, 10)]).premium(1_000)
    assert [ms for ms, first in episodes(market) if first] == [2, 1_001]


# ----------------------------------------------------------------------------------------------------- asks of a policy


@pytest.mark.parametrize(
    ("upbit", "binance"),
    [
        (0, 0),
        (-1_000, 1_000),
        (1_000, -1_000),
        (-1_000, 0),
        (1_234_567, 1_234_567),  # part of a lot of 0.00001
        (1_000, 1_001),
        (2**63, 1_000),
        (1_000, 2**64),
        (10**30, 10**30),
        (-(10**30), 1_000),
    ],
)
@pytest.mark.parametrize("direction", list(Direction))
def test_an_ask_that_makes_no_sense_is_refused(upbit, binance, direction):
    market = Market().premium(0).premium(500)
    ask = Ask(direction, Intent.ENTRY, upbit, binance)
    outcome = play(market, {2: ask, 500: ask})
    assert outcome.engine.refusals() == {"bad_ask": 2}
    # counted each time, and written once an episode: only the first of the two directions has an edge
    assert outcome.decisions["outcome"].tolist() == [Outcome.BAD_ASK] * (1 if direction is Direction.SELL_UPBIT else 2)
    assert not outcome.decisions["upbit_order_id"].any()
    assert not outcome.decisions["binance_order_id"].any()
    assert len(outcome.fills) == 0
    assert not any(change for row in outcome.engine.ledger.changes().values() for change in row.values())


def test_the_largest_size_that_fits_is_refused_for_its_amount():
    whole_lots = (2**63 - 1) // 1_000 * 1_000
    outcome = play(Market().premium(0), {2: Ask(Direction.SELL_UPBIT, Intent.ENTRY, 0, whole_lots)})
    assert outcome.engine.refusals() == {"overflow": 1}


# ------------------------------------------------------------------------------------------------ rules that the tape brings

ADA = {"upbit": ["KRW-ADA", "KRW-USDT"], "binance": ["ADAUSDT"]}


def exchange_info(symbol="ADAUSDT", lot="0.1", **symbol_fields):
    filters = [
        {"filterType": "PRICE_FILTER", "tickSize": "0.0001"},
        {"filterType": "LOT_SIZE", "stepSize": lot},
        {"filterType": "NOTIONAL", "minNotional": "5.0"},
    ]
    return json.dumps({"symbols": [{"symbol": symbol, "filters": filters, **symbol_fields}]}).encode()


def ada(ms_of_rules=None, kind=FrameKind.RESPONSE, body=None):
    """ADA with a premium of 43 % every 500 ms for 3 s."""
    market = Market()
    for ms in range(0, 3_000, 500):
        market.rate(ms).upbit(ms + 1, [(1_000, 10**5)], [(1_001, 10**5)], "ADA")
        market.binance(ms + 2, [("0.499", 10**5)], [("0.5", 10**5)], "ADA")
        if ms == ms_of_rules:
            market.add(ms + 100, "binance", kind, exchange_info() if body is None else body)
    return market


def ada_run(market, step=0, policy=None):
    paper_ada = PaperConfig(upbit_coins={"ADA": "100000"}, binance_coins={"ADA": "100000"})
    engine = Engine(ADA, RunConfig(paper=paper_ada), policy=policy)
    take(engine, market, step)
    return engine, engine.drain()


def test_a_coin_without_rules_is_not_traded():
    asks = {ms + 2: buy_binance(100) for ms in range(0, 3_000, 500)}
    engine, events = ada_run(ada(), policy=Script(asks, "ADA"))
    assert engine.refusals() == {"no_rules": 6}
    assert len(events.fills) == 0
    engine, events = ada_run(ada())
    assert len(events.decisions) == 0


@pytest.mark.parametrize("scripted", [False, True])
def test_trading_starts_when_the_rules_have_passed(scripted):
    digests = set()
    for step in (0, 1, 2, 5, 7):
        asks = {ms + 2: buy_binance(100) for ms in range(0, 3_000, 500)}
        engine, events = ada_run(ada(1_000), step, Script(asks, "ADA") if scripted else None)
        accepted = events.decisions[events.decisions["outcome"] == Outcome.ACCEPTED]
        # at 1,002 ms they are not known yet; the compiled policy looks at every book from 1,100 ms on
        assert accepted["time_ns"][0] == at_ns(1_502 if scripted else 1_500)
        assert engine.refusals() == ({"no_rules": 3} if scripted else {})
        assert int(engine.state.pairs["lot_e8"][0]) == e8("0.1")
        digests.add(engine.digest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FrameKind.RESPONSE, exchange_info("XRPUSDT")),  # of another symbol
        (FrameKind.RESPONSE, exchange_info(lot="0")),  # switched off
        (FrameKind.MESSAGE, exchange_info()),  # no REST body
        (FrameKind.SENT, exchange_info()),
    ],
)
def test_what_is_not_the_rules_of_the_coin_starts_nothing(kind, body):
    engine, events = ada_run(ada(1_000, kind, body))
    assert len(events.decisions) == 0
    assert "bad_rules" not in engine.reasons()["binance"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"symbols":',
        b'{"symbols":[{"symbol":"ADAUSDT"}]}',
        b'{"symbols":"none"}',
        b'"symbols"',
        exchange_info(lot="x"),
        exchange_info(lot="-1"),
        exchange_info(lot="1e999999999999"),
        b'{"symbols":' + b"[" * 100_000,
        b'{"symbols":[{"symbol":"\xff","filters":[]}]}',
    ],
)
def test_a_malformed_exchange_info_is_counted_and_starts_nothing(body):
    for step in (0, 1):
        engine, events = ada_run(ada(1_000, body=body), step)
        assert engine.reasons()["binance"]["bad_rules"] == 1
        assert len(events.decisions) == 0


def test_a_malformed_exchange_info_leaves_the_rules_known_before():
    market = ada(1_000)
    market.frames.insert(-3, Market().add(2_400, "binance", FrameKind.RESPONSE, b'{"symbols":[{}]}').frames[0])
    engine, events = ada_run(market)
    assert engine.reasons()["binance"]["bad_rules"] == 1
    assert engine.reasons()["binance"]["rest"] == 1
    assert events.decisions["time_ns"].max() > at_ns(2_400)


# -------------------------------------------------------------------------------------------------------------- integrity


def status(market, exchange=ExchangeId.BINANCE, coin="BTC"):
    engine = Engine(INSTRUMENTS, RunConfig(symbols=("BTC", "XRP")))
    engine.feed(market.block())
    return engine.aggregator.snapshot(coin).source_status[exchange], engine.reasons()


@pytest.mark.parametrize(
    ("ids", "trusted", "regressed"),
    [
        ((1000,), True, 0),
        ((1000, 1000), True, 0),  # a refresh may repeat the id
        ((1000, 500), False, 1),
        ((1000, 500, 501), False, 2),
        ((1000, 500, 501, 999), False, 3),
        ((1000, 500, 501, 1000), True, 2),
        ((1000, 500, 501, 1001), True, 2),
    ],
)
def test_an_update_id_that_goes_back_is_doubted_until_it_passes_the_highest(ids, trusted, regressed):
    market = Market().rate(0).upbit(1, *DEAR)
    for k, update_id in enumerate(ids):
        market.binance(2 + k, BIDS, [(100_000 - k, 1)], update_id=update_id)
    found, reasons = status(market)
    assert found is (SourceStatus.ACTIVE if trusted else SourceStatus.STALE)
    assert reasons["binance"].get("id_regress", 0) == regressed
    assert reasons["binance"]["book"] == len(ids) - regressed


def test_books_in_doubt_do_not_decide():
    market = Market().rate(0).upbit(1, *FAIR).binance(2, BIDS, [(100_000, 10)], update_id=1_000)
    market.upbit(3, *DEAR[:1], [(150_100_000, 10)])
    before = len(run(market, threshold()).decisions)
    market = Market().rate(0).upbit(1, *FAIR).binance(2, BIDS, [(100_000, 10)], update_id=1_000)
    market.binance(3, BIDS, [(90_000, 10)], update_id=500).upbit(4, *DEAR).binance(5, BIDS, [(90_000, 10)], update_id=501)
    doubted = run(market, threshold())
    market.binance(6, BIDS, [(100_000, 10)], update_id=1_001)
    healed = run(market, threshold())
    assert (before, len(doubted.decisions), healed.decisions["time_ns"].tolist()) == (1, 0, [at_ns(6)])
    assert healed.decisions["binance_px_e8"].tolist() == [e8(100_000)]  # the doubted levels were never the book


def test_a_new_connection_counts_its_ids_anew():
    market = Market().rate(0).upbit(1, *DEAR).binance(2, BIDS, [(100_000, 1)], update_id=1_000)
    market.add(3, "binance", FrameKind.CLOSED, b"{}").binance(4, BIDS, [(100_000, 1)], update_id=7, conn=5)
    assert status(market) == (SourceStatus.ACTIVE, {"upbit": {"book": 2}, "binance": {"book": 2, "closed": 1}})
    assert status(market.binance(5, BIDS, [(100_000, 1)], update_id=6, conn=5))[0] is SourceStatus.STALE
    assert status(market.binance(6, BIDS, [(100_000, 1)], update_id=8, conn=5))[0] is SourceStatus.ACTIVE


def dropped(market, ms, venue, conn=0):
    return market.add(ms, venue, FrameKind.ALARM, b'{"alarm":"dropped","frames":30}', conn)


def test_lost_messages_put_every_book_of_the_connection_in_doubt():
    def market():
        return Market().premium(0).upbit(3, [(20, 1)], [(21, 1)], "XRP").binance(4, [(1, 1)], [(2, 1)], "XRP")

    stale, active = SourceStatus.STALE, SourceStatus.ACTIVE
    lost = dropped(market(), 5, "binance")
    assert [status(lost, coin=coin)[0] for coin in ("BTC", "XRP")] == [stale, stale]
    assert [status(lost, ExchangeId.UPBIT, coin)[0] for coin in ("BTC", "XRP")] == [active, active]
    lost.binance(6, BIDS, [(100_000, 1)])
    assert [status(lost, coin=coin)[0] for coin in ("BTC", "XRP")] == [active, stale]
    assert status(dropped(market(), 5, "binance", conn=9))[0] is active
    assert status(dropped(market(), 5, "upbit", conn=2))[0] is active
    other = market().add(5, "binance", FrameKind.ALARM, b'{"alarm":"silent","code":"BTCUSDT"}')
    assert status(other)[0] is active


def test_lost_messages_of_upbit_take_the_rate_away():
    market = dropped(Market().premium(0), 3, "upbit").binance(4, BIDS, [(100_000, 1)])
    engine = Engine(INSTRUMENTS, RunConfig(symbols=("BTC",)))
    engine.feed(market.block())
    assert engine.aggregator.fx("ask") is None
    assert engine.aggregator.snapshot("BTC").sell_upbit_bps is None


@pytest.mark.parametrize("lost", ["upbit", "binance"])
def test_lost_messages_leave_waiting_legs_unresolved(lost):
    """Both legs have arrived by 62 ms, the alarm comes at 400 ms, the next books at 900 ms."""
    market = Market().premium(0).rate(300)
    market = dropped(market, 400, lost).premium(900)
    outcome = play(market, {2: buy_binance("0.5", upbit="0.5")}, paper(upbit_coins={"BTC": "1"}))
    assert outcome.fills["filled_e8"].tolist() == [e8("0.5")] * 2
    resolved = dict(zip(outcome.fills["venue"].tolist(), outcome.fills["resolved"].tolist(), strict=True))
    after = dict(zip(outcome.fills["venue"].tolist(), outcome.fills["after_ns"].tolist(), strict=True))
    code = {"upbit": UPBIT, "binance": BINANCE}[lost]
    assert (resolved[code], after[code]) == (0, 0)
    assert (resolved[3 - code], after[3 - code]) == (1, at_ns(901 if code == BINANCE else 902))
    assert outcome.kpi["legs_unresolved"] == 1


def test_lost_messages_before_the_arrival_mean_no_fill():
    market = dropped(Market().premium(0), 10, "binance").rate(100)
    (fill,) = play(market, {2: buy_binance("0.5")}).fills
    assert (fill["status"], fill["filled_e8"], fill["before_ns"]) == (FillStatus.NO_BOOK, 0, 0)


@pytest.mark.parametrize(("conn", "venue", "closes"), [(2, "binance", True), (9, "binance", False), (2, "upbit", False)])
def test_only_the_connection_that_fed_a_book_can_close_it(conn, venue, closes):
    market = Market().premium(0).rate(70).add(80, venue, FrameKind.CLOSED, b"{}", conn)
    assert status(market)[0] is (SourceStatus.DISCONNECTED if closes else SourceStatus.ACTIVE)
    (fill,) = play(market.binance(100, BIDS, [(100_000, 10)]), {2: buy_binance("0.5")}).fills
    assert (fill["resolved"], fill["after_ns"]) == ((0, 0) if closes else (1, at_ns(100)))


def test_an_old_connection_that_closes_late_changes_nothing():
    market = Market().premium(0).binance(10, BIDS, [(100_000, 1)], update_id=5, conn=7)
    market.add(20, "binance", FrameKind.CLOSED, b"{}", 2)
    assert status(market)[0] is SourceStatus.ACTIVE


@pytest.mark.parametrize(
    ("bids", "asks", "sell", "buy"),
    [
        (BIDS, [(100_000, 1)], True, True),
        ([], [(100_000, 1)], True, False),
        (BIDS, [], False, True),
        ([], [], False, False),
        (BIDS, [(100_000, 0)], False, True),  # a level of size 0 is none
    ],
)
def test_a_side_that_is_missing_has_no_edge(bids, asks, sell, buy):
    market = Market().rate(0).upbit(1, *DEAR).binance(2, bids, asks)
    engine = Engine(INSTRUMENTS, RunConfig(symbols=("BTC",)))
    engine.feed(market.block())
    found = engine.aggregator.snapshot("BTC")
    assert (found.sell_upbit_bps is not None, found.buy_upbit_bps is not None) == (sell, buy)
    assert len(run(market, threshold()).decisions) == int(sell)


@pytest.mark.parametrize("number", ['"NaN"', '"Infinity"', '"-1"', '""', "1e5"])
def test_a_book_with_a_number_that_is_none_has_no_edge(number):
    market = Market().premium(0)
    payload = b'{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":9,"bids":[],"asks":[[%s,"1"]]}}' % number.encode()
    market.add(3, "binance", FrameKind.MESSAGE, payload)
    engine = Engine(INSTRUMENTS, threshold())
    engine.feed(market.block())
    assert engine.aggregator.snapshot("BTC").source_status[ExchangeId.BINANCE] is SourceStatus.STALE
    assert engine.aggregator.snapshot("BTC").sell_upbit_bps is None
    assert sum(n for reason, n in engine.reasons()["binance"].items() if reason != "book") == 1


# ---------------------------------------------------------------------------------------- the books around an arrival


@pytest.mark.parametrize(
    ("book_ms", "filled", "before_ms", "after_ms"), [(61, "0.3", 61, 100), (62, "0.3", 62, 100), (63, "1", 2, 63)]
)
def test_an_order_meets_the_book_received_by_its_arrival(book_ms, filled, before_ms, after_ms):
    """Sent at 2 ms, it arrives at 62 ms; from ``book_ms`` on only 0.3 is displayed."""
    market = Market().rate(0).upbit(1, *DEAR).binance(2, BIDS, [(100_000, 1)])
    market.binance(book_ms, BIDS, [(100_000, "0.3")]).binance(100, BIDS, [(100_000, "0.6")])
    (fill,) = play(market, {2: buy_binance(1)}).fills
    assert fill["arrive_ns"] == at_ns(62)
    assert fill["decision_book_ns"] == at_ns(2)
    assert (fill["filled_e8"], fill["before_ns"], fill["after_ns"]) == (e8(filled), at_ns(before_ms), at_ns(after_ms))
    assert fill["before_e8"] == e8(filled)


def test_of_two_books_at_the_instant_of_arrival_the_last_one_counts():
    market = Market().rate(0).upbit(1, *DEAR).binance(2, BIDS, [(100_000, 1)])
    market.binance(62, BIDS, [(100_000, "0.3")]).binance(62, BIDS, [(100_000, "0.2")]).binance(100, BIDS, [(100_000, 1)])
    (fill,) = play(market, {2: buy_binance(1)}).fills
    assert (fill["filled_e8"], fill["before_ns"], fill["after_ns"]) == (e8("0.2"), at_ns(62), at_ns(100))
    assert (fill["status"], fill["visible_e8"], fill["after_filled_e8"]) == (FillStatus.PARTIAL, e8(1), e8(1))


def test_both_books_around_two_orders_that_share_a_level():
    """Order 1 takes 0.4 of 1.0 at 62 ms, order 2 takes 0.5 of the rest at 130 ms; B+ of both shows 0.7 at 200 ms."""
    market = Market().rate(0).upbit(1, *DEAR).binance(2, BIDS, [(100_000, 1), (100_010, 5)])
    market.rate(70).rate(150).binance(200, BIDS, [(99_995, "0.05"), (100_000, "0.7"), (100_010, 5)])
    first, second = play(market, {2: buy_binance("0.4"), 70: buy_binance("0.5")}).fills
    for fill, size, arrive_ms in ((first, "0.4", 62), (second, "0.5", 130)):
        assert fill["limit_px_e8"] == e8(100_000)
        assert fill["arrive_ns"] == at_ns(arrive_ms)
        assert fill["decision_book_ns"] == at_ns(2)
        assert fill["depth_e8"] == e8(1)  # what is displayed: our own takes are not subtracted
        assert fill["visible_e8"] == fill["before_e8"] == fill["after_e8"] == fill["filled_e8"] == e8(size)
        assert fill["visible_quote_e8"] == fill["quote_e8"] == e8(size) * 100_000
        assert (fill["before_ns"], fill["after_ns"], fill["resolved"]) == (at_ns(2), at_ns(200), 1)
    # 0.05 at 99,995, and of the 0.7 what the other order left: 0.7 - 0.5, and 0.7 - 0.4
    assert first["after_filled_e8"] == e8("0.25")
    assert first["after_quote_e8"] == e8("4999.75") + e8("20000")
    assert second["after_filled_e8"] == e8("0.35")
    assert second["after_quote_e8"] == e8("4999.75") + e8("30000")


def test_a_wanted_size_beyond_the_displayed_one():
    """2.0 wanted, 1.0 displayed at decision, 0.8 in B-, 1.6 in B+: x is 1.0 throughout, the fill in B+ may be more."""
    market = Market().rate(0).upbit(1, *DEAR).binance(2, BIDS, [(99_999, "0.25"), (100_000, "0.75")])
    market.binance(50, BIDS, [(100_000, "0.8"), (100_001, 9)]).binance(90, BIDS, [(99_998, 1), (100_000, "0.6"), (100_001, 9)])
    (fill,) = play(market, {2: buy_binance(2)}).fills
    assert (fill["limit_px_e8"], fill["depth_e8"], fill["visible_e8"]) == (e8(99_999), e8("0.25"), e8("0.25"))
    assert (fill["status"], fill["filled_e8"], fill["before_e8"], fill["levels"]) == (FillStatus.UNFILLED, 0, 0, 0)
    assert (fill["after_e8"], fill["after_filled_e8"], fill["after_quote_e8"]) == (e8("0.25"), e8(1), e8(99_998))


def test_a_sell_is_the_mirror_image():
    """Sent at 2 ms at 150,000,000, arrives at 22 ms."""
    market = Market().rate(0).binance(1, BIDS, [(100_000, 1)]).upbit(2, [(150_000_000, "0.5")], [(150_100_000, 1)])
    market.upbit(22, [(150_001_000, "0.1"), (150_000_000, "0.2"), (149_999_000, 9)], [(150_100_000, 1)])
    market.upbit(42, [(150_000_000, "0.45"), (149_999_000, 9)], [(150_100_000, 1)])
    (fill,) = play(market, {2: sell_upbit("0.4")}).fills
    assert (fill["filled_e8"], fill["levels"], fill["status"]) == (e8("0.3"), 2, FillStatus.PARTIAL)
    assert fill["quote_e8"] == e8(15_000_100 + 30_000_000)
    assert (fill["visible_e8"], fill["before_e8"], fill["after_e8"]) == (e8("0.4"), e8("0.3"), e8("0.4"))
    assert (fill["before_ns"], fill["after_ns"]) == (at_ns(22), at_ns(42))
    assert (fill["after_filled_e8"], fill["after_quote_e8"]) == (e8("0.4"), e8(60_000_000))
