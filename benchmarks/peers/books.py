"""Neutral arrays of one book, their way to disk and back, and the row of an event. Runs in any environment: NumPy only."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


EVENT = np.dtype(
    [
        ("ev", "u8"), ("exch_ts", "i8"), ("local_ts", "i8"), ("px", "f8"), ("qty", "f8"),
        ("order_id", "u8"), ("ival", "i8"), ("fval", "f8"),
    ],
    align=True,
)  # fmt: skip
"""The row of hftbacktest 2.4; ``hft.py`` checks that the installed package agrees."""

DEPTH, CLEAR, SNAPSHOT = 1, 3, 4
AT_EXCHANGE, LOCAL, BID, ASK = 1 << 31, 1 << 30, 1 << 29, 1 << 28


class BookFeed(NamedTuple):
    """Every message of one book: ``time_ns`` int64[n]; ``bids``, ``asks`` float64[n, levels, 2], price and size, best first."""

    time_ns: NDArray[np.int64]
    bids: NDArray[np.float64]
    asks: NDArray[np.float64]


def save(folder: Path, book: int, feed: BookFeed) -> None:
    """One file an array."""
    for name, array in feed._asdict().items():
        np.save(folder / f"book-{book}-{name}.npy", array)


def load(folder: Path, book: int) -> BookFeed:
    """What ``save`` wrote."""
    return BookFeed(*(np.load(folder / f"book-{book}-{name}.npy") for name in BookFeed._fields))


def tick_e8(prices: NDArray[np.float64]) -> int:
    """The widest step that every price is a multiple of, in 10^-8: the tick of the book as recorded."""
    return int(np.gcd.reduce(np.rint(np.unique(prices) * 1e8).astype(np.int64)))
