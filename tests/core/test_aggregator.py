"""The aggregator's snapshot: the state of each source, edges only through a fresh KRW-USDT book."""

from __future__ import annotations

import pytest

from arbl2.aggregator import SourceStatus
from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.errors import ConfigError
from arbl2.frames import Anchor, ExchangeId, Frame, FrameBlock, FrameKind, Op
from arbl2.money import Amount, Krw, Usdt
from arbl2_replay.wire import Book, binance_combined, binance_depth, upbit_orderbook

E8 = 10**8
SECOND = 10**9
ANCHOR = Anchor(wall_ns=1_767_312_000_000_000_000, mono_ns=1_000)
BOTH = set(ExchangeId)


class Live:
    """One frame at a time, as live trading feeds it; times are ns after the anchor."""

    def __init__(self):
        self.engine = Engine({"upbit": ["KRW-BTC", "KRW-USDT"], "binance": ["BTCUSDT"]}, RunConfig())
        self.seq = 0

    def add(self, at_ns, venue, payload, kind=FrameKind.MESSAGE, conn=1):
        self.seq += 1
        frame = Frame(self.seq, 0, ANCHOR.mono_ns + at_ns, venue, conn, kind, Op.TEXT, payload)
        self.engine.feed(FrameBlock.from_frames([frame], ANCHOR))
        return self

    def fx(self, at_ns):
        return self.add(at_ns, "upbit", upbit_orderbook("KRW-USDT", _book(1_400, 1_401), 1, units=1))

    def upbit(self, at_ns, *, conn=1):
        return self.add(at_ns, "upbit", upbit_orderbook("KRW-BTC", _book(140_000_000, 140_010_000), 1, units=1), conn=conn)

    def binance(self, at_ns, *, conn=1):
        data = binance_depth(_book(100_000, 100_001), 7, depth=5)
        return self.add(at_ns, "binance", binance_combined("btcusdt@depth5", data), conn=conn)

    def status(self, exchange, at_ns):
        return self.engine.aggregator.snapshot("BTC", ANCHOR.wall_ns + at_ns).source_status[exchange]


def _book(bid, ask):
    return Book([bid * E8], [E8], [ask * E8], [2 * E8])


def test_everything_fresh():
    live = Live().fx(0).upbit(10).binance(20)
    snapshot = live.engine.aggregator.snapshot("BTC")
    assert snapshot.time_ns == ANCHOR.wall_ns + 20
    assert snapshot.source_status == dict.fromkeys(BOTH, SourceStatus.ACTIVE)
    assert snapshot.sell_upbit_bps == pytest.approx((140_000_000 / (100_001 * 1_401) - 1) * 1e4, abs=1e-9)
    assert snapshot.buy_upbit_bps == pytest.approx((100_000 * 1_400 / 140_010_000 - 1) * 1e4, abs=1e-9)
    upbit, binance = snapshot.per_exchange[ExchangeId.UPBIT], snapshot.per_exchange[ExchangeId.BINANCE]
    assert (upbit.currency, upbit.age_ns, upbit.bids, upbit.asks) == (
        Krw,
        10,
        ((140_000_000 * E8, E8),),
        ((140_010_000 * E8, 2 * E8),),
    )
    assert (binance.currency, binance.age_ns) == (Usdt, 0)
    assert (snapshot.fx_ask.rate_e8, snapshot.fx_bid.rate_e8, snapshot.fx_ask.age_ns) == (1_401 * E8, 1_400 * E8, 20)
    assert live.engine.aggregator.best("BTC", ExchangeId.BINANCE, "ask") == Amount(100_001 * E8, Usdt)
    assert live.engine.aggregator.best("BTC", ExchangeId.UPBIT, "bid") == Amount(140_000_000 * E8, Krw)


def test_two_seconds_are_active_and_one_nanosecond_more_is_stale():
    live = Live().fx(0).upbit(0).binance(0)
    for exchange in ExchangeId:
        assert live.status(exchange, 2 * SECOND) is SourceStatus.ACTIVE
        assert live.status(exchange, 2 * SECOND + 1) is SourceStatus.STALE
    at = ANCHOR.wall_ns + 2 * SECOND
    assert live.engine.aggregator.snapshot("BTC", at).sell_upbit_bps is not None
    later = live.engine.aggregator.snapshot("BTC", at + 1)
    assert (later.sell_upbit_bps, later.buy_upbit_bps) == (None, None)


@pytest.mark.parametrize("exchange", list(ExchangeId))
def test_disconnected_until_a_new_book(exchange):
    live = Live()
    assert live.status(exchange, 0) is SourceStatus.DISCONNECTED
    live.fx(0).upbit(0).binance(0)
    live.add(5, str(exchange), b"{}", kind=FrameKind.CLOSED)
    other = (BOTH - {exchange}).pop()
    assert live.status(exchange, 5) is SourceStatus.DISCONNECTED
    assert live.status(other, 5) is SourceStatus.ACTIVE
    live.add(6, str(exchange), b"{}", kind=FrameKind.OPENED, conn=2)
    assert live.status(exchange, 6) is SourceStatus.DISCONNECTED
    (live.upbit if exchange == ExchangeId.UPBIT else live.binance)(7, conn=2)
    assert live.status(exchange, 7) is SourceStatus.ACTIVE
    live.add(8, str(exchange), b"{}", kind=FrameKind.CLOSED, conn=1)  # the old connection's end comes late
    assert live.status(exchange, 8) is SourceStatus.ACTIVE


def test_a_book_in_doubt_is_stale_until_the_next_good_one():
    live = Live().fx(0).upbit(0).binance(0)
    live.add(1, "upbit", upbit_orderbook("KRW-BTC", _book(140_010_000, 140_000_000), 1, units=1))
    assert live.status(ExchangeId.UPBIT, 1) is SourceStatus.STALE
    assert live.engine.aggregator.snapshot("BTC").sell_upbit_bps is None
    live.upbit(2)
    assert live.status(ExchangeId.UPBIT, 2) is SourceStatus.ACTIVE


@pytest.mark.parametrize("exchange", list(ExchangeId))
def test_books_of_which_messages_were_lost_are_stale(exchange):
    live = Live().fx(0).upbit(0).binance(0)
    live.add(1, str(exchange), b'{"alarm":"dropped"}', kind=FrameKind.ALARM)
    assert live.status(exchange, 1) is SourceStatus.STALE
    assert live.engine.aggregator.snapshot("BTC").buy_upbit_bps is None


def test_no_edges_without_a_fresh_rate():
    live = Live().upbit(0).binance(0)
    snapshot = live.engine.aggregator.snapshot("BTC")
    assert snapshot.source_status == dict.fromkeys(BOTH, SourceStatus.ACTIVE)
    assert (snapshot.sell_upbit_bps, snapshot.buy_upbit_bps, snapshot.fx_ask, snapshot.fx_bid) == (None,) * 4
    live.fx(1)
    for at_ns, fresh in ((1 + 10 * SECOND, True), (2 + 10 * SECOND, False)):
        live.upbit(at_ns - 1).binance(at_ns - 1)
        late = live.engine.aggregator.snapshot("BTC", ANCHOR.wall_ns + at_ns)
        assert (late.sell_upbit_bps is not None) == fresh
        assert (late.fx_bid is not None) == fresh


def test_a_side_that_is_empty_has_no_edge():
    live = Live().fx(0).binance(0)
    empty_asks = Book([140_000_000 * E8], [E8], [], [])
    live.add(1, "upbit", upbit_orderbook("KRW-BTC", empty_asks, 1, units=1))
    snapshot = live.engine.aggregator.snapshot("BTC")
    assert snapshot.sell_upbit_bps is not None
    assert snapshot.buy_upbit_bps is None
    assert live.engine.aggregator.best("BTC", ExchangeId.UPBIT, "ask") is None


def test_an_unknown_symbol_is_named():
    with pytest.raises(ConfigError, match="DOGE is not traded"):
        Live().engine.aggregator.snapshot("DOGE")
