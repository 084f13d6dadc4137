"""Book updates as columns: what providers make of a FrameBlock and what the compiled loop consumes.

Row i belongs to frame i of the block. Levels of a row stand in ``px_e8``/``qty_e8``: ``n_bid`` bids (best first) from ``start``,
then ``n_ask`` asks (best first). Prices and sizes are int64 of 10^-8 of the quote currency and of the coin.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_LEVELS = 30
"""Levels a side that a full-window book can have (Upbit shows 30, Binance partial depth 20)."""


class What(IntEnum):
    """What a row does to the books."""

    NOTHING = 0  # no book; ``reason`` says what the frame was
    BOOK = 1  # the levels replace book ``book``
    DOUBT = 2  # the frame concerns ``book`` but cannot be trusted: the book makes no decisions until a good frame heals it
    CLOSED = 3  # the connection ended: books it fed are DISCONNECTED
    LOST = 4  # the recorder had to drop messages of the connection: its books are in doubt until their next frame
    UNREAD = 255  # not of the scanner's exact grammar: the strict decoder has to read it


class Reason(IntEnum):
    """What a frame was, for the counters. Everything is kept on the tape whatever its reason."""

    BOOK = 0
    # kinds of frame that are no message
    SENT = 1
    OPENED = 2
    CLOSED = 3
    REQUEST = 4
    REST = 5
    CLOCK = 6
    ALARM = 7
    CONTROL = 8
    # messages that are no full-window book
    TRADE = 10
    TICKER = 11
    BOOK_TICKER = 12
    DIFF = 13
    ACK = 14
    UP = 15
    VENUE_ERROR = 16
    SHUTDOWN = 17
    OTHER_MESSAGE = 18
    # a book of an instrument that the run does not know
    UNKNOWN_INSTRUMENT = 20
    GROUPED_BOOK = 21  # Upbit level > 0: grouped prices cannot be traded
    # bad input, counted and refused
    NOT_JSON = 30
    WRONG_SHAPE = 31  # JSON, but not of a form this venue sends
    BAD_NUMBER = 32  # NaN, infinite, or not a number
    NEGATIVE = 33
    TOO_LARGE = 34  # does not fit in int64 of 10^-8
    OFF_SCALE = 35  # a price with digits below 10^-8
    TOO_MANY_LEVELS = 36
    UNSORTED = 37
    CROSSED = 38
    TOTAL_MISMATCH = 39  # level sizes do not add up to the totals that the venue states
    ID_REGRESS = 40  # Binance lastUpdateId went back within a connection
    BAD_RULES = 41  # an exchangeInfo body that cannot be read: the rules known before stay

    @property
    def label(self) -> str:
        """The name in tables and files."""
        return self.name.lower()

    @property
    def is_refusal(self) -> bool:
        """True for bad input."""
        return self >= Reason.NOT_JSON


@dataclass(frozen=True, slots=True)
class UpdateBlock:
    """Columns of ``capacity`` rows and room for their levels; buffers are reused from block to block.

    ``what``, ``reason``: uint8; ``book``: int32 (index of the book, -1 = none); ``exchange_ms``: int64, the venue's own time or
    0; ``update_id``: int64, Binance lastUpdateId or 0; ``start``: int32; ``n_bid``, ``n_ask``: int16; ``cursor``: int64[1],
    levels used so far.
    """

    what: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    book: NDArray[np.int32]
    exchange_ms: NDArray[np.int64]
    update_id: NDArray[np.int64]
    start: NDArray[np.int32]
    n_bid: NDArray[np.int16]
    n_ask: NDArray[np.int16]
    px_e8: NDArray[np.int64]
    qty_e8: NDArray[np.int64]
    cursor: NDArray[np.int64]

    @classmethod
    def allocate(cls, capacity: int) -> UpdateBlock:
        """Room for ``capacity`` frames, each with two full sides."""
        levels = (capacity + 1) * 2 * MAX_LEVELS
        return cls(
            what=np.zeros(capacity, np.uint8),
            reason=np.zeros(capacity, np.uint8),
            book=np.full(capacity, -1, np.int32),
            exchange_ms=np.zeros(capacity, np.int64),
            update_id=np.zeros(capacity, np.int64),
            start=np.zeros(capacity, np.int32),
            n_bid=np.zeros(capacity, np.int16),
            n_ask=np.zeros(capacity, np.int16),
            px_e8=np.zeros(levels, np.int64),
            qty_e8=np.zeros(levels, np.int64),
            cursor=np.zeros(1, np.int64),
        )

    @property
    def capacity(self) -> int:
        """Frames that fit."""
        return len(self.what)
