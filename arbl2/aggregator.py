"""The multi-exchange aggregator: per symbol, in one currency, with the state of every source.

A pair's edges exist only through the recorded KRW-USDT book, side by side: selling on Upbit pays for USDT at the ask, buying on
Upbit sells USDT at the bid. Best prices stay in their own currency (``Amount[Krw]``, ``Amount[Usdt]``); nothing here compares
them raw. The numbers are those of the compiled loop (``kernels.look``): this is the face it shows to people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, NamedTuple

from arbl2 import kernels
from arbl2.book import best_px_e8, ladder, window
from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId
from arbl2.money import Amount, FxQuote, Krw, Usdt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from arbl2.book import State, Universe
    from arbl2.money import Currency


class SourceStatus(StrEnum):
    """State of one source of one symbol."""

    ACTIVE = "active"  # connected, trusted, fresh
    STALE = "stale"  # its last book is too old, or in doubt until the next good frame
    DISCONNECTED = "disconnected"  # never spoke, or its connection closed and no book has come since


class LevelFrom(IntEnum):
    """How a level of a book is known."""

    WINDOW = 0  # of a message that holds the whole displayed window
    SNAPSHOT = int(kernels.FROM_SNAPSHOT)
    CHANGE = int(kernels.FROM_CHANGE)  # of a depth change, within the range of the snapshot
    BEYOND = int(kernels.BEYOND)  # of a depth change beyond it: levels between may be missing, so nothing is traded there


class Level(NamedTuple):
    """One level of a full book, 10^-8 of the quote currency and of the coin."""

    px_e8: int
    size_e8: int
    origin: LevelFrom


@dataclass(frozen=True, slots=True)
class BookTop:
    """One venue's book of a symbol: levels are (price_e8, size_e8), best first."""

    exchange: ExchangeId
    currency: type[Currency]
    status: SourceStatus
    age_ns: int
    bids: tuple[tuple[int, int], ...]
    asks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class MultiExchangeL2Snapshot:
    """Both venues of one symbol at one instant.

    ``sell_upbit_bps``/``buy_upbit_bps``: gross edges in basis points after FX, None where a source is not ACTIVE or a side is
    empty.
    """

    symbol: str
    time_ns: int
    per_exchange: dict[ExchangeId, BookTop]
    sell_upbit_bps: float | None
    buy_upbit_bps: float | None
    fx_ask: FxQuote[Usdt, Krw] | None
    fx_bid: FxQuote[Usdt, Krw] | None

    @property
    def source_status(self) -> dict[ExchangeId, SourceStatus]:
        """Status by venue."""
        return {exchange: top.status for exchange, top in self.per_exchange.items()}


_CURRENCY: dict[ExchangeId, type[Currency]] = {ExchangeId.UPBIT: Krw, ExchangeId.BINANCE: Usdt}


class MultiExchangeL2Aggregator:
    """Reads the state of a run; ``time_ns`` defaults to the time of the last frame."""

    def __init__(self, universe: Universe, state: State) -> None:
        self._universe = universe
        self._state = state

    @property
    def time_ns(self) -> int:
        """Engine time of the last frame."""
        return int(self._state.counters[0]["time_ns"])

    def status(self, book: int, time_ns: int | None = None, *, stale_ns: int | None = None) -> SourceStatus:
        """Status of a book by its index."""
        row = self._state.books[book]
        if not row["connected"]:
            return SourceStatus.DISCONNECTED
        at = self.time_ns if time_ns is None else time_ns
        limit = int(self._state.config[0]["stale_ns"]) if stale_ns is None else stale_ns
        return SourceStatus.ACTIVE if kernels.is_active(self._state.records, book, at, limit) else SourceStatus.STALE

    def fx(self, side: str, time_ns: int | None = None) -> FxQuote[Usdt, Krw] | None:
        """The executable rate of Upbit's KRW-USDT book: "ask" to get USDT, "bid" to sell it. None while it is not ACTIVE."""
        book = self._universe.fx_book
        at = self.time_ns if time_ns is None else time_ns
        if book < 0 or self.status(book, at, stale_ns=int(self._state.config[0]["fx_stale_ns"])) is not SourceStatus.ACTIVE:
            return None
        index = 0 if side == "bid" else 1
        rate = best_px_e8(self._state, book, index)
        if rate == 0:
            return None
        return FxQuote(Usdt, Krw, rate, side, "upbit KRW-USDT", at - int(self._state.books[book]["last_ns"]))

    def best(self, symbol: str, exchange: ExchangeId, side: str) -> Amount[Krw] | Amount[Usdt] | None:
        """Best displayed bid or ask of a venue in its own currency; None if the side is empty."""
        book = self._book(symbol, exchange)
        index = 0 if side == "bid" else 1
        price = best_px_e8(self._state, book, index)
        if price == 0:
            return None
        return Amount(price, Krw) if exchange == ExchangeId.UPBIT else Amount(price, Usdt)

    def snapshot(self, symbol: str, time_ns: int | None = None) -> MultiExchangeL2Snapshot:
        """Both books of a symbol, their status and the edges between them. Raises ConfigError for an unknown symbol."""
        at = self.time_ns if time_ns is None else time_ns
        view = self._state.seen[0]
        tops = {exchange: self._top(symbol, exchange, at) for exchange in ExchangeId}
        usable = kernels.look(self._state.records, self._pair(symbol), at, 0)
        edges = [float(view[name]) if usable else math.nan for name in ("sell_upbit_bps", "buy_upbit_bps")]
        sell, buy = (None if math.isnan(edge) else edge for edge in edges)
        return MultiExchangeL2Snapshot(symbol, at, tops, sell, buy, self.fx("ask", at), self.fx("bid", at))

    def full_book(self, symbol: str, exchange: ExchangeId) -> tuple[tuple[Level, ...], tuple[Level, ...]]:
        """Every known level (bids, asks), best first. A book of whole windows has no more than its window."""
        book = self._book(symbol, exchange)
        if self._state.books[book]["windowed"] or not self._state.books[book]["rungs"].any():
            return tuple(  # type: ignore[return-value]
                tuple(Level(*level, LevelFrom.WINDOW) for level in _levels(*window(self._state, book, side))) for side in (0, 1)
            )
        return tuple(  # type: ignore[return-value]
            tuple(Level(px, qty, LevelFrom(origin)) for px, qty, origin in zip(*(a.tolist() for a in rungs), strict=True))
            for rungs in (ladder(self._state, book, side) for side in (0, 1))
        )

    def _pair(self, symbol: str) -> int:
        if symbol not in self._universe.symbols:
            raise ConfigError(f"{symbol} is not traded in this run; it has {', '.join(self._universe.symbols) or 'no pair'}.")
        return self._universe.symbols.index(symbol)

    def _book(self, symbol: str, exchange: ExchangeId) -> int:
        pair = self._pair(symbol)
        books = self._universe.upbit_books if exchange == ExchangeId.UPBIT else self._universe.binance_books
        return books[pair]

    def _top(self, symbol: str, exchange: ExchangeId, at: int) -> BookTop:
        book = self._book(symbol, exchange)
        row = self._state.books[book]
        bids, asks = (_levels(*window(self._state, book, side)) for side in (0, 1))
        age_ns = at - int(row["last_ns"])
        return BookTop(exchange, _CURRENCY[exchange], self.status(book, at), age_ns, bids, asks)


def _levels(px: NDArray[np.int64], qty: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(px.tolist(), qty.tolist(), strict=True))
