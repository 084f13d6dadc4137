"""The rule on hftbacktest: ``python -m benchmarks.peers.hft roivec|hashmap diff|snap FOLDER``, in its own environment.

One asset a book, each with its own tick and lot. Feed latency is nil, because arbl2 decides on the book as received and lets an
order meet the book as received by then. Orders are submitted and simulated (partial fills, queue model irrelevant to IOC).
"""

from __future__ import annotations

import math
import sys
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from hftbacktest import (
    ALL_ASSETS,
    LIMIT,
    BacktestAsset,
    HashMapMarketDepthBacktest,
    ROIVectorMarketDepthBacktest,
)
from hftbacktest.order import IOC
from hftbacktest.types import event_dtype
from numba import njit

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
    checksum,
)
from benchmarks.peers.probe import Probe

FEED = 2
FOREVER = 2**62
BUILDERS = {"roivec": ROIVectorMarketDepthBacktest, "hashmap": HashMapMarketDepthBacktest}


@njit
def fresh(hbt: Any, asset: int, limit_ns: int) -> bool:
    seen = hbt.feed_latency(asset)
    if seen is None:
        return False
    _, local_ns = seen
    return bool(hbt.current_timestamp - local_ns <= limit_ns)


@njit
def run(hbt: Any, times: Any, directions: Any) -> int:
    """The rule; returns how often it traded. Edges first, because they are cheaper to look at than ages."""
    upbit, binance, fx = hbt.depth(UPBIT), hbt.depth(BINANCE), hbt.depth(FX)
    count = 0
    in_flight_until = -1
    while hbt.wait_next_feed(False, FOREVER) == FEED:
        now = hbt.current_timestamp
        if now <= in_flight_until:
            continue
        # the order of operations is that of every engine; a missing side is NaN and trades nothing
        sells = (upbit.best_bid / (binance.best_ask * fx.best_ask) - 1.0) * 10_000.0 >= ENTRY_BPS
        if not sells and not (binance.best_bid * fx.best_bid / upbit.best_ask - 1.0) * 10_000.0 >= ENTRY_BPS:
            continue
        if not (fresh(hbt, UPBIT, STALE_NS) and fresh(hbt, BINANCE, STALE_NS) and fresh(hbt, FX, FX_STALE_NS)):
            continue
        hbt.clear_inactive_orders(ALL_ASSETS)
        size = math.floor(SIZE_KRW / upbit.best_ask / LOT) * LOT
        if sells:
            hbt.submit_sell_order(UPBIT, count, upbit.best_bid, size, IOC, LIMIT, False)
            hbt.submit_buy_order(BINANCE, count, binance.best_ask, size, IOC, LIMIT, False)
        else:
            hbt.submit_buy_order(UPBIT, count, upbit.best_ask, size, IOC, LIMIT, False)
            hbt.submit_sell_order(BINANCE, count, binance.best_bid, size, IOC, LIMIT, False)
        times[count] = now
        directions[count] = SELL_UPBIT if sells else BUY_UPBIT
        count += 1
        in_flight_until = now + LATENCY_NS
    return count


def asset(rows: Any, feed: books.BookFeed, fee: float) -> BacktestAsset:
    """One book. The range of the vector is that of the prices, and the tick is the widest that holds them all."""
    prices = np.concatenate((feed.bids[:, :, 0], feed.asks[:, :, 0]), axis=1)
    return (
        BacktestAsset()
        .data(rows)
        .linear_asset(1.0)
        .constant_order_latency(LATENCY_NS, 0)
        .risk_adverse_queue_model()
        .partial_fill_exchange()
        .trading_value_fee_model(fee, fee)
        .tick_size(books.tick_e8(prices) / 1e8)
        .lot_size(1e-8)
        .roi_lb(float(prices.min()))
        .roi_ub(float(prices.max()))
    )


def main(depth: str, way: str, folder: Path) -> None:
    """Load, compile on the first messages, run timed."""
    probe = Probe()
    feeds = {book: books.load(folder, book) for book in (UPBIT, BINANCE, FX)}
    with probe.timed("load"):
        rows = {book: np.load(folder / f"{way}-{book}.npy") for book in feeds}  # hftbacktest keeps no reference to them
    assert rows[UPBIT].dtype == event_dtype
    if depth == "hashmap" and way == "snap":
        for events in rows.values():  # its map empties at once, but walks tick by tick up to a price
            events["px"][events["ev"] & 0xFF == books.CLEAR] = np.inf
    fees = {UPBIT: FEES[0], BINANCE: FEES[1], FX: 0.0}
    decided = sum(len(feed.time_ns) for feed in feeds.values())
    times, directions = np.zeros(decided, np.int64), np.zeros(decided, np.int64)
    first = {book: events[:500].copy() for book, events in rows.items()}
    for name in chain(["warm"], probe.turns()):
        part = first if name == "warm" else rows
        hbt = BUILDERS[depth]([asset(part[book], feeds[book], fees[book]) for book in feeds])
        with probe.timed(name):
            count = run(hbt, times, directions)
        filled = sum(hbt.state_values(book).trading_volume for book in (UPBIT, BINANCE))
        hbt.close()
    probe.tell(
        decisions=count,
        checksum=checksum(zip(times[:count].tolist(), directions[:count].tolist(), strict=True)),
        filled=filled,
        versions={name: version(name) for name in ("hftbacktest", "numba", "numpy")},
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
