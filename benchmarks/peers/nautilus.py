"""The rule on nautilus_trader: ``python -m benchmarks.peers.nautilus deltas|depth10 FOLDER``, in its own environment.

Spot pairs on two simulated venues with cash accounts. Logging is bypassed: once it is initialised, at whatever level, the
matching engine formats every message before it finds out that nobody wants to read it. The risk engine and the analysis after the
run are off. An order meets its venue's book when the first message after its arrival has changed that book, so that fills differ
from arbl2's; decisions do not depend on them.
"""

from __future__ import annotations

import gc
import sys
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from nautilus_trader.backtest.engine import BacktestEngine
from nautilus_trader.backtest.models import LatencyModel
from nautilus_trader.config import BacktestEngineConfig, LoggingConfig, RiskEngineConfig
from nautilus_trader.model.currencies import BTC, KRW, USDT
from nautilus_trader.model.data import BookOrder, OrderBookDelta, OrderBookDeltas, OrderBookDepth10
from nautilus_trader.model.enums import AccountType, BookAction, BookType, OmsType, OrderSide, RecordFlag, TimeInForce
from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
from nautilus_trader.model.instruments import CurrencyPair
from nautilus_trader.model.objects import FIXED_PRECISION, Money, Price, Quantity
from nautilus_trader.trading.strategy import Strategy

from benchmarks.peers import books
from benchmarks.peers.decisions import (
    BINANCE,
    BUY_UPBIT,
    ENTRY_BPS,
    FEES,
    FX,
    FX_STALE_NS,
    LATENCY_NS,
    LOT,
    SELL_UPBIT,
    SIZE_KRW,
    STALE_NS,
    UPBIT,
    Decisions,
    checksum,
)
from benchmarks.peers.probe import Probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

NAMES = {
    UPBIT: ("BTCKRW.UPBIT", BTC, KRW, FEES[0]),
    BINANCE: ("BTCUSDT.BINANCE", BTC, USDT, FEES[1]),
    FX: ("USDTKRW.UPBIT", USDT, KRW, FEES[0]),
}
IDS = {book: InstrumentId.from_str(name) for book, (name, *_) in NAMES.items()}
# more USDT than this, and the cash account of this version stops at a fill: total - locked != free
BALANCES = {"UPBIT": [Money(10_000_000_000, KRW), Money(1_000, BTC)], "BINANCE": [Money(1_000_000, USDT), Money(1_000, BTC)]}
SIZE_PLACES = 8
RAW = 10 ** (FIXED_PRECISION - 8)
"""From 10^-8 to nautilus's own fixed point."""


class Rule(Strategy):  # type: ignore[misc]
    """The rule on the books that the data engine keeps for the strategy."""

    def __init__(self, subscribe: str) -> None:
        super().__init__()
        self.subscribe = subscribe
        self.in_flight_until = -1
        self.decisions: Decisions = []

    def on_start(self) -> None:
        """Subscribe to all three books and hold on to them."""
        for instrument_id in IDS.values():
            getattr(self, self.subscribe)(instrument_id, BookType.L2_MBP)
        self.books = [self.cache.order_book(IDS[book]) for book in (UPBIT, BINANCE, FX)]

    def on_order_book_deltas(self, deltas: OrderBookDeltas) -> None:
        """A message, as differences."""
        self.look(deltas.ts_init)

    def on_order_book_depth(self, depth: OrderBookDepth10) -> None:
        """A message, as ten levels a side."""
        self.look(depth.ts_init)

    def look(self, now: int) -> None:
        """Edges first, because they are cheaper to look at than ages."""
        if now <= self.in_flight_until:
            return
        upbit, binance, fx = self.books
        upbit_bid, upbit_ask = upbit.best_bid_price(), upbit.best_ask_price()
        binance_bid, binance_ask = binance.best_bid_price(), binance.best_ask_price()
        fx_bid, fx_ask = fx.best_bid_price(), fx.best_ask_price()
        if not (upbit_bid and binance_bid and fx_bid):
            return
        cost = binance_ask.as_double() * fx_ask.as_double()
        proceeds = binance_bid.as_double() * fx_bid.as_double()
        sells = (upbit_bid.as_double() / cost - 1.0) * 10_000.0 >= ENTRY_BPS
        if not sells and not (proceeds / upbit_ask.as_double() - 1.0) * 10_000.0 >= ENTRY_BPS:
            return
        if now - upbit.ts_last > STALE_NS or now - binance.ts_last > STALE_NS or now - fx.ts_last > FX_STALE_NS:
            return
        size = Quantity(SIZE_KRW / upbit_ask.as_double() // LOT * LOT, SIZE_PLACES)
        if sells:
            self.send(UPBIT, OrderSide.SELL, size, upbit_bid)
            self.send(BINANCE, OrderSide.BUY, size, binance_ask)
        else:
            self.send(UPBIT, OrderSide.BUY, size, upbit_ask)
            self.send(BINANCE, OrderSide.SELL, size, binance_bid)
        self.decisions.append((now, SELL_UPBIT if sells else BUY_UPBIT))
        self.in_flight_until = now + LATENCY_NS

    def send(self, book: int, side: OrderSide, size: Quantity, price: Price) -> None:
        """One leg, IOC."""
        self.submit_order(self.order_factory.limit(IDS[book], side, size, price, time_in_force=TimeInForce.IOC))


def places(feed: books.BookFeed) -> int:
    """Decimal places of a book's prices."""
    step = books.tick_e8(np.concatenate((feed.bids[:, :, 0], feed.asks[:, :, 0]), axis=1))
    return next(count for count in range(9) if step % 10 ** (8 - count) == 0)


def raws(values: NDArray[np.float64]) -> list[int]:
    """Floats to nautilus's fixed point, exactly."""
    return [value * RAW for value in np.rint(values * 1e8).astype(np.int64).tolist()]


def deltas(book: int, digits: int, rows: NDArray[Any]) -> Iterator[OrderBookDeltas]:
    """The same rows that hftbacktest gets, without its closing one, a message at a time."""
    rows = rows[:-1]
    instrument, make = IDS[book], OrderBookDelta.from_raw
    sides = np.where(rows["ev"] & books.BID, int(OrderSide.BUY), int(OrderSide.SELL)).tolist()
    last = np.append(rows["local_ts"][1:] != rows["local_ts"][:-1], [True])
    flags = np.where(last, int(RecordFlag.F_LAST), 0).tolist()
    actions = np.where(rows["qty"] > 0, int(BookAction.UPDATE), int(BookAction.DELETE)).tolist()  # it updates or adds
    columns = (actions, sides, raws(rows["px"]), raws(rows["qty"]), flags, rows["local_ts"].tolist())
    pending = []
    for action, side, px, qty, flag, t in zip(*columns, strict=True):
        pending.append(make(instrument, action, side, px, digits, qty, SIZE_PLACES, 0, flag, 0, t, t))
        if flag:
            yield OrderBookDeltas(instrument, pending)
            pending = []


def depths(book: int, digits: int, feed: books.BookFeed) -> Iterator[OrderBookDepth10]:
    """The best ten levels of every message; this type holds no more."""
    instrument, make, counts = IDS[book], BookOrder.from_raw, [1] * 10
    sides = ((OrderSide.BUY, feed.bids), (OrderSide.SELL, feed.asks))
    for row, t in enumerate(feed.time_ns.tolist()):
        both = [
            [
                make(side, px, digits, qty, SIZE_PLACES, 0)
                for px, qty in zip(raws(levels[row, :10, 0]), raws(levels[row, :10, 1]), strict=True)
            ]
            for side, levels in sides
        ]
        yield OrderBookDepth10(instrument, both[0], both[1], counts, counts, 0, 0, t, t)


def engine_for(digits: dict[int, int]) -> BacktestEngine:
    """Two venues, three pairs, logging bypassed."""
    engine = BacktestEngine(
        BacktestEngineConfig(
            logging=LoggingConfig(bypass_logging=True), risk_engine=RiskEngineConfig(bypass=True), run_analysis=False
        )
    )
    for venue, balances in BALANCES.items():
        engine.add_venue(
            venue=Venue(venue),
            oms_type=OmsType.NETTING,
            account_type=AccountType.CASH,
            starting_balances=balances,
            book_type=BookType.L2_MBP,
            latency_model=LatencyModel(base_latency_nanos=LATENCY_NS),
        )
    for book, (name, base, quote, fee) in NAMES.items():
        engine.add_instrument(
            CurrencyPair(
                instrument_id=IDS[book],
                raw_symbol=Symbol(name),
                base_currency=base,
                quote_currency=quote,
                price_precision=digits[book],
                size_precision=SIZE_PLACES,
                price_increment=Price(10.0 ** -digits[book], digits[book]),
                size_increment=Quantity(1e-8, SIZE_PLACES),
                maker_fee=Decimal(str(fee)),
                taker_fee=Decimal(str(fee)),
                ts_event=0,
                ts_init=0,
            )
        )
    return engine


def main(way: str, folder: Path) -> None:
    """Build the objects (timed as conversion), run once timed."""
    probe = Probe()
    feeds = {book: books.load(folder, book) for book in NAMES}
    digits = {book: places(feed) for book, feed in feeds.items()}
    with probe.timed("objects"):
        data: list[Any] = []
        for book, feed in feeds.items():
            data += (
                deltas(book, digits[book], np.load(folder / f"diff-{book}.npy"))
                if way == "deltas"
                else depths(book, digits[book], feed)
            )
        data.sort(key=lambda one: one.ts_init)
    engine = engine_for(digits)
    rule = Rule("subscribe_order_book_deltas" if way == "deltas" else "subscribe_order_book_depth")
    engine.add_strategy(rule)
    engine.add_data(data, sort=False)
    gc.collect()
    gc.freeze()  # the collector need not walk the messages again and again
    with probe.timed():
        engine.run()
    probe.tell(
        decisions=len(rule.decisions),
        checksum=checksum(rule.decisions),
        filled=sum(float(order.filled_qty) for order in engine.cache.orders()),
        versions={name: version(name) for name in ("nautilus_trader", "numpy")},
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
