"""Neutral arrays to the events that hftbacktest reads, compiled: what changed from message to message, or whole windows.

All rows of a message carry one time stamp, by which hftbacktest applies them together before it wakes the strategy. A level that
leaves the displayed window is deleted, so that every engine sees the window and nothing else.

Differences: deletions before additions (the other way round is slower), and deletions from the far end inwards, so that the next
best price is searched for once. A message that changes nothing repeats its best bid: it is news that the book is fresh.

Windows: both sides are cleared up to the worst price shown before, the narrowest clearing that there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from benchmarks.peers.books import ASK, AT_EXCHANGE, BID, CLEAR, DEPTH, EVENT, LOCAL, SNAPSHOT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.peers.books import BookFeed

CLOSING_NS = 3_600_000_000_000
"""A last row this long after the last message: hftbacktest does not wake the strategy for its very last event."""


@numba.njit(cache=True)
def _put(events: Any, n: int, ev: int, time_ns: int, px: float, qty: float) -> int:
    row = events[n]
    row["ev"] = ev
    row["exch_ts"] = time_ns
    row["local_ts"] = time_ns
    row["px"] = px
    row["qty"] = qty
    row["order_id"] = 0
    row["ival"] = 0
    row["fval"] = 0.0
    return n + 1


@numba.njit(cache=True)
def _delete(events: Any, n: int, ev: int, t: int, old: Any, new: Any, sign: float) -> int:
    """Levels of ``old`` whose price is not in ``new``, worst first. ``sign`` turns both sides into rising prices."""
    j = len(new) - 1
    for i in range(len(old) - 1, -1, -1):
        while j >= 0 and sign * new[j, 0] > sign * old[i, 0]:
            j -= 1
        if j < 0 or new[j, 0] != old[i, 0]:
            n = _put(events, n, ev, t, old[i, 0], 0.0)
    return n


@numba.njit(cache=True)
def _write(events: Any, n: int, ev: int, t: int, old: Any, new: Any, sign: float) -> int:
    """Levels of ``new`` whose price or size is not in ``old``, best first."""
    i = 0
    for j in range(len(new)):
        while i < len(old) and sign * old[i, 0] < sign * new[j, 0]:
            i += 1
        known = i < len(old) and old[i, 0] == new[j, 0]
        if not known or old[i, 1] != new[j, 1]:
            n = _put(events, n, ev, t, new[j, 0], new[j, 1])
    return n


@numba.njit(cache=True)
def _differences(events: Any, times: Any, bids: Any, asks: Any, places: int) -> int:
    n = 0
    bid, ask = DEPTH | places | BID, DEPTH | places | ASK
    for k in range(len(times)):
        t = times[k]
        old_bids, old_asks = (bids[k - 1], asks[k - 1]) if k else (bids[0, :0], asks[0, :0])
        first = n
        n = _delete(events, n, bid, t, old_bids, bids[k], -1.0)
        n = _delete(events, n, ask, t, old_asks, asks[k], 1.0)
        n = _write(events, n, bid, t, old_bids, bids[k], -1.0)
        n = _write(events, n, ask, t, old_asks, asks[k], 1.0)
        if n == first:
            n = _put(events, n, bid, t, bids[k, 0, 0], bids[k, 0, 1])
    return _put(events, n, bid, times[-1] + CLOSING_NS, bids[-1, 0, 0], bids[-1, 0, 1])


@numba.njit(cache=True)
def _windows(events: Any, times: Any, bids: Any, asks: Any, places: int) -> int:
    n = 0
    last = bids.shape[1] - 1
    for k in range(len(times)):
        t = times[k]
        if k:
            n = _put(events, n, CLEAR | places | BID, t, bids[k - 1, last, 0], 0.0)
            n = _put(events, n, CLEAR | places | ASK, t, asks[k - 1, last, 0], 0.0)
        for j in range(last + 1):
            n = _put(events, n, SNAPSHOT | places | BID, t, bids[k, j, 0], bids[k, j, 1])
        for j in range(last + 1):
            n = _put(events, n, SNAPSHOT | places | ASK, t, asks[k, j, 0], asks[k, j, 1])
    return _put(events, n, DEPTH | places | BID, times[-1] + CLOSING_NS, bids[-1, 0, 0], bids[-1, 0, 1])


def differences(feed: BookFeed, *, traded: bool) -> NDArray[Any]:
    """What each message changed. Where nothing is ``traded``, only the local side gets the rows, which spares the engine work."""
    return _events(_differences, feed, 4, traded=traded)


def windows(feed: BookFeed, *, traded: bool) -> NDArray[Any]:
    """Every message whole."""
    return _events(_windows, feed, 2, traded=traded)


def _events(kernel: Any, feed: BookFeed, rows_a_level: int, *, traded: bool) -> NDArray[Any]:
    room = np.empty(len(feed.time_ns) * (rows_a_level * feed.bids.shape[1] + 2) + 1, EVENT)  # pages not written cost nothing
    return room[: kernel(room, *feed, LOCAL | (AT_EXCHANGE if traded else 0))]
