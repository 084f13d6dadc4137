"""The rule that every engine runs, and the plain version of it that the engines are held against.

At each message: if no order is in flight and no book is stale, trade the direction whose edge reaches ``ENTRY_BPS``, both legs
IOC at the best price. This is arbl2's threshold policy where opening and closing take the same edge (tp = 2 x entry) and the
largest position is out of reach: what is held then never changes whether or which way it trades, so the rule needs no fills and
every engine can run it on its own books. Orders are small (``SIZE_KRW``), because arbl2 remembers what it took from a level and
the others do not; an order that empties the touch would let it alone see another price. Runs in any environment: NumPy only.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from benchmarks.peers.books import BookFeed

UPBIT, BINANCE, FX = range(3)
"""The books: KRW-BTC and BTCUSDT are traded, KRW-USDT is the rate. Their assets and instruments have these numbers everywhere."""
SELL_UPBIT, BUY_UPBIT = 1, -1

ENTRY_BPS = 58.0
"""Rare: an order costs nautilus some 350 us, and messages are what is compared."""
LATENCY_NS = 40_000_000
"""Decision to arrival, the same on both venues, so that it does not matter which legs are sent."""
STALE_NS = 2_000_000_000
FX_STALE_NS = 10_000_000_000
SIZE_KRW = 10_000
LOT = 1e-5
FEES = (0.0005, 0.001)
"""Taker fees of Upbit and Binance."""

WARM_UP_MESSAGES = 2_000
"""Length of the tape on which what runs on tapes warms up."""

Decisions = list[tuple[int, int]]
"""(engine time in ns, direction), in order."""


def checksum(decisions: Iterable[tuple[int, int]]) -> str:
    """16 hexadecimal digits over all time stamps and directions, in order."""
    rows = np.array(list(decisions), "<i8")
    return hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()


def decide(feeds: Mapping[int, BookFeed], entry_bps: float = ENTRY_BPS) -> Decisions:
    """The rule, one message at a time, on nothing but best prices and their age."""
    arrivals = sorted((int(t), book, row) for book, feed in feeds.items() for row, t in enumerate(feed.time_ns))
    best: dict[int, tuple[float, float]] = {}
    last_ns: dict[int, int] = {}
    in_flight_until = -1
    found: Decisions = []
    for now, book, row in arrivals:
        best[book] = float(feeds[book].bids[row, 0, 0]), float(feeds[book].asks[row, 0, 0])
        last_ns[book] = now
        # an order that arrives at the very instant of a message is still in flight
        if now <= in_flight_until or len(best) < 3:
            continue
        if now - last_ns[UPBIT] > STALE_NS or now - last_ns[BINANCE] > STALE_NS or now - last_ns[FX] > FX_STALE_NS:
            continue
        (upbit_bid, upbit_ask), (binance_bid, binance_ask), (fx_bid, fx_ask) = best[UPBIT], best[BINANCE], best[FX]
        if (upbit_bid / (binance_ask * fx_ask) - 1.0) * 10_000.0 >= entry_bps:
            found.append((now, SELL_UPBIT))
        elif (binance_bid * fx_bid / upbit_ask - 1.0) * 10_000.0 >= entry_bps:
            found.append((now, BUY_UPBIT))
        else:
            continue
        in_flight_until = now + LATENCY_NS
    return found
