"""What else a venue says while its book moves: trades, changes of the whole book, the touch.

A market source gives books only. Two books in a row tell the rest: what was displayed at the touch and is gone was traded, what
differs between them is the diff, and every level that slid out of the window is still there until the window comes back to it.
No chance is involved, so the same books always give the same trades and the same changes.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple, Protocol

from arbl2_replay.wire import E8, Book, DepthChange, UpbitTrade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from arbl2_replay.synth import MarketEvent

WINDOW = 20
"""A side that shows fewer levels than this shows all it has."""
MOST_LEVELS = 1_000
"""Levels remembered per side; the farthest are deleted, and the diff says so."""
_MOST_TRADES = 5
_IDS_PER_MS = 10_000  # 17 digits, as Upbit counts
_Level = tuple[int, int]


class Taken(NamedTuple):
    """A trade: price and size in 10^-8, and whether the taker sold."""

    px_e8: int
    size_e8: int
    taker_sells: bool


def taken(before: Book, after: Book) -> list[Taken]:
    """What takers took between two books of one instrument: at most five levels a side, the best first."""
    return [
        *_eaten(before.ask_px_e8, before.ask_size_e8, after.ask_px_e8, after.ask_size_e8, 1),
        *_eaten(before.bid_px_e8, before.bid_size_e8, after.bid_px_e8, after.bid_size_e8, -1),
    ]


def _eaten(px: Sequence[int], size: Sequence[int], px_now: Sequence[int], size_now: Sequence[int], sign: int) -> list[Taken]:
    found: list[Taken] = []
    if not px_now:
        return found
    touch = px_now[0]
    for price, shown in zip(px[:_MOST_TRADES], size, strict=False):
        left = shown
        if price == touch:
            left = shown - size_now[0]
        elif (price - touch) * sign > 0:
            break
        if left > 0:
            found.append(Taken(price, left, sign < 0))
        if price == touch:
            break
    return found


class Moved(NamedTuple):
    """What one event says beside its book. Only Binance tells of the touch and of changes."""

    time_ms: int
    trades: list[Taken]
    first_trade_id: int
    """Of the first trade; those that follow count on."""
    touch: bool = False
    change: DepthChange | None = None
    """Since the last change, for the 100 ms diff stream."""
    slow: DepthChange | None = None
    """Since the last of these, for the 1000 ms diff stream."""


class Flow(Protocol):
    """The flow of one instrument, from the first event that it is given."""

    def advance(self, event: MarketEvent, time_ms: int, *, slow_is_due: bool) -> Moved:
        """Take the next event, at ``time_ms`` of the venue; ``slow_is_due`` ends the second of the 1000 ms stream."""


class UpbitFlow:
    """The trades of one Upbit code. Before the first there was one at the best bid, so that there is always a last trade."""

    def __init__(self, event: MarketEvent, time_ms: int) -> None:
        book = event.book
        self._book = book
        self._closing_px_e8 = px = (book.bid_px_e8 or book.ask_px_e8)[0]
        self.last = UpbitTrade(time_ms, px, E8, True, time_ms * _IDS_PER_MS, px, book)

    def advance(self, event: MarketEvent, time_ms: int, *, slow_is_due: bool) -> Moved:
        """Take the next event."""
        trades, self._book = taken(self._book, event.book), event.book
        first_id = max(self.last.sequential_id + 1, time_ms * _IDS_PER_MS)
        moved = Moved(time_ms, trades, first_id)
        if trades:
            self.last = self.row(event, moved, len(trades) - 1)
        return moved

    def row(self, event: MarketEvent, moved: Moved, number: int) -> UpbitTrade:
        """The trade of a move as Upbit tells it."""
        px, size, sells = moved.trades[number]
        return UpbitTrade(moved.time_ms, px, size, sells, moved.first_trade_id + number, self._closing_px_e8, event.book)


class BinanceFlow:
    """Trades, touch and whole book of one Binance symbol. All ids are those of the source: one space for every stream."""

    def __init__(self, event: MarketEvent) -> None:
        self._book = event.book
        self._trade_id = event.mark // 10
        self.deep = DeepBook(event.book, event.mark)
        self._slow_id = event.mark
        self._slow: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def advance(self, event: MarketEvent, time_ms: int, *, slow_is_due: bool) -> Moved:
        """Take the next event."""
        before, self._book = self._book, event.book
        trades = taken(before, event.book)
        first_id, self._trade_id = self._trade_id + 1, self._trade_id + len(trades)
        touch = _touch(before) != _touch(event.book)
        change = self.deep.advance(event.book, event.mark)
        if change is not None:
            for gathered, levels in zip(self._slow, (change.bids, change.asks), strict=True):
                gathered.update(levels)
        slow = None
        if slow_is_due and self.deep.last_id > self._slow_id:
            bids, asks = self._slow
            slow = DepthChange(self._slow_id + 1, self.deep.last_id, sorted(bids.items(), reverse=True), sorted(asks.items()))
            self._slow_id, self._slow = self.deep.last_id, ({}, {})
        return Moved(time_ms, trades, first_id, touch, change, slow)


def _touch(book: Book) -> tuple[Sequence[int], ...]:
    return tuple(side[:1] for side in book)


class DeepBook:
    """The whole book behind the window of the best levels."""

    def __init__(self, book: Book, last_id: int) -> None:
        self.last_id = last_id
        self._bids = (list(book.bid_px_e8), list(book.bid_size_e8))
        self._asks = (list(book.ask_px_e8), list(book.ask_size_e8))

    def book(self, limit: int) -> Book:
        """At most ``limit`` levels a side."""
        return Book(*(column[:limit] for column in (*self._bids, *self._asks)))

    def advance(self, book: Book, last_id: int) -> DepthChange | None:
        """The absolute sizes that differ now, 0 for a level that is gone; None if the id has not moved."""
        if last_id <= self.last_id:
            return None
        first_id, self.last_id = self.last_id + 1, last_id
        bids = _replace(self._bids, book.bid_px_e8, book.bid_size_e8, -1)
        asks = _replace(self._asks, book.ask_px_e8, book.ask_size_e8, 1)
        return DepthChange(first_id, last_id, bids, asks)


def _replace(side: tuple[list[int], list[int]], px_now: Sequence[int], size_now: Sequence[int], sign: int) -> list[_Level]:
    px, size = side
    covered = len(px)
    if len(px_now) >= WINDOW:
        covered = bisect_right(px, px_now[-1] * sign, key=lambda price: price * sign)
    gone = dict(zip(px[:covered], size[:covered], strict=True))
    changes = [level for level in zip(px_now, size_now, strict=True) if gone.pop(level[0], None) != level[1]]
    px[:covered], size[:covered] = px_now, size_now
    changes += [(price, 0) for price in (*gone, *px[MOST_LEVELS:])]
    del px[MOST_LEVELS:], size[MOST_LEVELS:]
    changes.sort(key=lambda level: level[0] * sign)
    return changes
