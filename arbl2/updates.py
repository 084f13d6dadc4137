"""Book updates as columns: what providers make of a FrameBlock and what the compiled loop consumes.

Row i belongs to frame i of the block. Levels of a row stand in ``px_e8``/``qty_e8``: ``n_bid`` bids from ``start``, then
``n_ask`` asks; best first where they are a book. Prices and sizes are int64 of 10^-8 of the quote currency and of the coin.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.jit import as_records, zeros

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_LEVELS = 30
"""Levels a side that a full-window book can have (Upbit shows 30, Binance partial depth 20)."""
MAX_CHANGES = 10_000
"""Levels a side that a depth change or a snapshot can have; Binance's largest snapshot has 5,000."""
MAX_BLOCK = 4_096
"""Frames taken through the loop at once: their levels stay in the processor's cache."""
MAX_BLOCK_BYTES = 4 * 2**20
"""Payload bytes taken through the loop at once, unless one frame alone has more."""
_SHORTEST_LEVEL = 8
"""A level takes more bytes than this in a message of either venue."""
LEVEL_ROOM = MAX_BLOCK_BYTES // _SHORTEST_LEVEL + 2 * MAX_CHANGES + 2 * MAX_LEVELS


class What(IntEnum):
    """What a row does to the books."""

    NOTHING = 0  # no book; ``reason`` says what the frame was
    BOOK = 1  # the levels replace book ``book``
    DOUBT = 2  # the frame concerns ``book`` but cannot be trusted: the book makes no decisions until a good frame heals it
    CLOSED = 3  # the connection ended: books it fed are DISCONNECTED
    LOST = 4  # the recorder had to drop messages of the connection: its books are in doubt until their next frame
    CHANGE = 5  # the levels change book ``book``: sizes of 0 remove; ids ``first_id`` to ``update_id``
    ASKED = 6  # a REST request of the venue: for a snapshot of book ``book``, or for something else (-1)
    SNAPSHOT = 7  # the levels are the snapshot that the venue was last asked for, as of ``update_id``
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
    COPY = 22  # of another session: the book has been told this, or something newer, by the session that feeds it
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
    SEQUENCE_GAP = 42  # depth changes are missing before this one: the book waits for a snapshot
    FUTURES = 43  # a depth change with ``pu``: Binance futures chain their ids by other rules and are not read

    @property
    def label(self) -> str:
        """The name in tables and files."""
        return self.name.lower()

    @property
    def is_refusal(self) -> bool:
        """True for bad input."""
        return self >= Reason.NOT_JSON


MAX_BOOKS = 1_024
HOME_LEVELS = MAX_BOOKS * 2 * MAX_LEVELS
"""Levels at the head of the level arrays that are the windows of the books: 30 bids and 30 asks each."""

UPDATES = np.dtype(
    [
        ("seq", "<i8", (MAX_BLOCK,)),
        ("time_ns", "<i8", (MAX_BLOCK,)),
        ("exchange_ms", "<i8", (MAX_BLOCK,)),  # the venue's own time or 0
        ("first_id", "<i8", (MAX_BLOCK,)),  # ids of Binance or 0
        ("update_id", "<i8", (MAX_BLOCK,)),
        ("check", "<i8", (MAX_BLOCK,)),  # scan.level_check of the levels
        ("offsets", "<i8", (MAX_BLOCK + 1,)),  # of the payloads
        ("book", "<i4", (MAX_BLOCK,)),  # -1: none
        ("conn", "<i4", (MAX_BLOCK,)),
        ("start", "<i4", (MAX_BLOCK,)),
        ("n_bid", "<i4", (MAX_BLOCK,)),
        ("n_ask", "<i4", (MAX_BLOCK,)),
        ("venue", "u1", (MAX_BLOCK,)),
        ("what", "u1", (MAX_BLOCK,)),
        ("reason", "u1", (MAX_BLOCK,)),
        ("pad", "u1", (2 * MAX_BLOCK,)),
        ("cursor", "<i8", (1,)),  # levels used so far, homes included
        ("px_e8", "<i8", (HOME_LEVELS + LEVEL_ROOM,)),
        ("qty_e8", "<i8", (HOME_LEVELS + LEVEL_ROOM,)),
    ]
)


class UpdateBlock:
    """Columns of up to ``MAX_BLOCK`` rows and room for their levels, as views of one record of ``UPDATES``.

    Kernels get ``records``; without the compiler this object stands in for them. Buffers are reused from block to block.
    """

    def __init__(self, records: NDArray[Any] | None = None) -> None:
        records = zeros(UPDATES) if records is None else records
        self.records: Any = as_records(records, self)
        for name in UPDATES.names or ():
            setattr(self, name, records[name][0])
        self.cursor[0] = HOME_LEVELS

    seq: NDArray[np.int64]
    time_ns: NDArray[np.int64]
    exchange_ms: NDArray[np.int64]
    first_id: NDArray[np.int64]
    update_id: NDArray[np.int64]
    check: NDArray[np.int64]
    offsets: NDArray[np.int64]
    book: NDArray[np.int32]
    conn: NDArray[np.int32]
    start: NDArray[np.int32]
    n_bid: NDArray[np.int32]
    n_ask: NDArray[np.int32]
    venue: NDArray[np.uint8]
    what: NDArray[np.uint8]
    reason: NDArray[np.uint8]
    cursor: NDArray[np.int64]
    px_e8: NDArray[np.int64]
    qty_e8: NDArray[np.int64]
