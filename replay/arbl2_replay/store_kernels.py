"""Windows as changes against the window before, and back: the compiled part of the decoded store.

A window is a side of a book, best level first. A change of one is two numbers as well, in the order of the levels: (price, size)
is a new level and (-1 - place, 0) says that the level that stands there by then is gone; behind those (-1 - place, size) is
another size of a level. What fell out at the far end is not said: the number of levels cuts it off. ``shrink`` makes the changes
of a block of updates, ``expand`` makes the updates again.

On disk prices are codes: below ``PLACES`` a place, otherwise the distance of a new level from the new level before it, in units
of their part and folded so that small ones are small numbers; sizes are in lots. Where distances might not fit, the unit is 0 and
the code of a price is -1 - price. ``unfold`` makes changes of codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.jit import kernel
from arbl2.updates import MAX_LEVELS, What

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Updates = Any  # a record of ``arbl2.updates.UPDATES``

_BOOK = int(What.BOOK)
_CHANGE = int(What.CHANGE)
_SNAPSHOT = int(What.SNAPSHOT)
_MAX_LEVELS: Any = np.int64(MAX_LEVELS)
PLACES = 32
"""Codes of levels below this are places in the window; new levels have the others."""
i8: Any = np.int64
u8: Any = np.uint64
"""Of an index: numba looks at the sign of every other one, which kept four levels from being one move."""
# Typed constants: a plain True is a type of its own to numba, and would compile the kernel that it is passed to once more.
_BIDS: Any = np.bool_(False)
_ASKS: Any = np.bool_(True)
_WIDE = 4
_1, _2, _3, _4 = (np.uint64(k) for k in (1, 2, 3, 4))
DAMAGED = -1
"""What ``expand`` returns for columns that ``shrink`` never makes."""


@kernel
def _note_changes(
    u: Updates, start: int, n: int, w_px: Ints, w_qty: Ints, home: int, was: int, asks: bool, px: Ints, qty: Ints, at: int
) -> int:
    """Write what turns the window at ``home`` (``was`` levels) into ``n`` levels of ``u``; returns the position after it."""
    for resized in range(2):
        i = i8(0)
        k = i8(0)
        while k < n:
            p = u.px_e8[start + k]
            q = u.qty_e8[start + k]
            if i < was and w_px[home + i] == p:
                if resized and w_qty[home + i] != q:
                    px[at] = -1 - k
                    qty[at] = q
                    at += 1
                i += 1
                k += 1
            elif i < was and (w_px[home + i] < p if asks else w_px[home + i] > p):
                if not resized:
                    px[at] = -1 - k
                    qty[at] = 0
                    at += 1
                i += 1
            else:
                if not resized:
                    px[at] = p
                    qty[at] = q
                    at += 1
                k += 1
    return at


@kernel
def shrink(updates: Updates, n: int, windows: Any, counts: NDArray[np.int16], px: Ints, qty: Ints, at: int) -> int:
    """Write the levels to keep of rows 0 to ``n`` from ``at`` on; returns the position after them.

    ``windows`` (prices, sizes, counts; those of side 2 x book + side, ``MAX_LEVELS`` apart) are those before and become those
    after; ``counts[row, side]`` gets the levels kept of each row.
    """
    u = updates[0]
    w_px, w_qty, w_n = windows
    for r in range(n):
        counts[r, 0] = 0
        counts[r, 1] = 0
        what = u.what[r]
        at_level = i8(u.start[r])
        for side in range(2):
            levels = i8(u.n_bid[r]) if side == 0 else i8(u.n_ask[r])
            before = at
            if what == _BOOK:
                b = i8(u.book[r]) * 2 + side
                home = b * _MAX_LEVELS
                at = _note_changes(u, at_level, levels, w_px, w_qty, home, w_n[b], side == 1, px, qty, at)
                for k in range(levels):
                    w_px[home + k] = u.px_e8[at_level + k]
                    w_qty[home + k] = u.qty_e8[at_level + k]
                w_n[b] = levels
            elif what == _CHANGE or what == _SNAPSHOT:  # noqa: SIM109
                for k in range(levels):
                    px[at] = u.px_e8[at_level + k]
                    qty[at] = u.qty_e8[at_level + k]
                    at += 1
            counts[r, side] = at - before
            at_level += levels
    return at


@kernel
def _copy(u: Updates, old: int, to: int, n: int) -> None:
    """``n`` levels, and up to three more: four at a time is one wide move."""
    i = np.uint64(old)
    k = np.uint64(to)
    end = np.uint64(to + n)
    while k < end:
        a, b, c, d = u.px_e8[i], u.px_e8[i + _1], u.px_e8[i + _2], u.px_e8[i + _3]
        u.px_e8[k], u.px_e8[k + _1], u.px_e8[k + _2], u.px_e8[k + _3] = a, b, c, d
        a, b, c, d = u.qty_e8[i], u.qty_e8[i + _1], u.qty_e8[i + _2], u.qty_e8[i + _3]
        u.qty_e8[k], u.qty_e8[k + _1], u.qty_e8[k + _2], u.qty_e8[k + _3] = a, b, c, d
        i += _4
        k += _4


@kernel
def unfold(codes: Ints, sizes: Ints, first: int, last: int, unit: int, lot: int, px: Ints, qty: Ints) -> None:
    """Changes ``first`` to ``last`` of one book as ``shrink`` wrote them, from codes and sizes in units of their part."""
    before = i8(0)
    for k in range(first, last):
        code = codes[k]
        if 0 <= code < PLACES or unit == 0:
            px[k] = -1 - code
        else:
            folded = u8(code) - u8(PLACES)
            half = i8(folded >> u8(1))
            before += (half if folded & u8(1) == u8(0) else ~half) * unit
            px[k] = before
        qty[k] = sizes[k] * lot


@kernel
def _merge(u: Updates, old: int, was: int, to: int, n: int, px: Ints, qty: Ints, at: int, stop: int, asks: bool) -> bool:
    """Write the window of ``n`` levels at ``to``: that at ``old`` with the changes at ``at``. False if they do not make ``n``."""
    old_end = old + was
    end = to + n
    k = to
    c = at
    while c < stop:
        p = px[u8(c)]
        q = qty[u8(c)]
        if p < 0:
            if q != 0:
                break
            more = to - 1 - p - k
            if more < 0 or more >= old_end - old or k + more >= end:
                return False
            _copy(u, old, k, more)
            old += more + 1
            k += more
        else:
            left = old_end - old
            if left > 0 and k + left < end and (u.px_e8[u8(old_end - 1)] < p if asks else u.px_e8[u8(old_end - 1)] > p):
                _copy(u, old, k, left)
                old += left
                k += left
            while old < old_end and k < end and (u.px_e8[u8(old)] < p if asks else u.px_e8[u8(old)] > p):
                u.px_e8[u8(k)] = u.px_e8[u8(old)]
                u.qty_e8[u8(k)] = u.qty_e8[u8(old)]
                old += 1
                k += 1
            if k >= end:
                return False
            u.px_e8[u8(k)] = p
            u.qty_e8[u8(k)] = q
            k += 1
        c += 1
    if end - k > old_end - old:
        return False
    _copy(u, old, k, end - k)
    while c < stop:
        place = to - 1 - px[u8(c)]
        if place < to or place >= end:
            return False
        u.qty_e8[u8(place)] = qty[u8(c)]
        c += 1
    return True


@kernel
def _settle(u: Updates, windows: Any, stands: Ints) -> None:
    """Keep the windows as they stand in ``u`` by now."""
    w_px, w_qty, w_n = windows
    for k in range(len(stands)):
        at = stands[k]
        if at < 0:
            continue
        for side in range(2):
            home = (2 * k + side) * MAX_LEVELS
            for j in range(w_n[2 * k + side]):
                w_px[home + j] = u.px_e8[at + j]
                w_qty[home + j] = u.qty_e8[at + j]
            at += w_n[2 * k + side]


@kernel
def _lay_out(u: Updates, windows: Any, k: int, to: int) -> int:
    """Copy both windows of book ``k`` to ``to``; returns the position after them."""
    w_px, w_qty, w_n = windows
    for side in range(2):
        home = (2 * k + side) * MAX_LEVELS
        for j in range(w_n[2 * k + side]):
            u.px_e8[to] = w_px[home + j]
            u.qty_e8[to] = w_qty[home + j]
            to += 1
    return to


@kernel
def expand(
    rows: Any, first: int, last: int, px: Ints, qty: Ints, at: Ints, ends: Ints, windows: Any, stands: Ints, updates: Updates
) -> int:
    """Write the levels of rows ``first`` to ``last`` into rows 0 and on of ``u``, as far as there is room; returns how many rows.

    ``rows`` are the columns what, book, n_bid, n_ask, bid_changes, ask_changes, with values that ``SliceUpdates`` has checked.
    Changes of book k stand in ``px``, ``qty`` from ``at[k + 1]``, which moves on, to ``ends[k + 1]``; those of none at place 0.
    ``windows`` (prices, sizes, counts) are those before the first row and become those after the last. ``stands`` is
    room of one number a book. Returns ``DAMAGED`` where it does not fit together: nothing is ever touched outside the arrays.
    """
    u = updates[0]
    what, book, n_bid, n_ask, bid_changes, ask_changes = rows
    w_n = windows[2]
    for k in range(len(stands)):
        stands[k] = -1
    to = i8(u.cursor[0])
    room = i8(len(u.px_e8)) - 2 * MAX_LEVELS - _WIDE
    done = i8(last - first)
    for r in range(done):
        i = u8(first + r)
        u.start[u8(r)] = to
        kind = what[i]
        if kind != _BOOK and kind != _CHANGE and kind != _SNAPSHOT:
            continue
        n = i8(n_bid[i])
        m = i8(n_ask[i])
        a = at[book[i] + 1]
        b = a + bid_changes[i]
        c = b + ask_changes[i]
        if c > ends[book[i] + 1]:
            return DAMAGED
        if to + n + m > room:
            done = i8(r)
            break
        if kind == _BOOK:
            k = i8(book[i])
            if k < 0 or n > MAX_LEVELS or m > MAX_LEVELS:
                return DAMAGED
            bids = w_n[2 * k]
            asks = w_n[2 * k + 1]
            old = stands[k]
            if old >= 0 and a == c and n == bids and m == asks:
                u.start[u8(r)] = old
                continue
            if old < 0:
                old = to
                to = i8(_lay_out(u, windows, k, to))
                u.start[u8(r)] = to
            if not _merge(u, old, bids, to, n, px, qty, a, b, _BIDS):
                return DAMAGED
            if not _merge(u, old + bids, asks, to + n, m, px, qty, b, c, _ASKS):
                return DAMAGED
            stands[k] = to
            w_n[2 * k] = n
            w_n[2 * k + 1] = m
        else:
            if n != b - a or m != c - b:
                return DAMAGED
            for j in range(n + m):
                u.px_e8[to + j] = px[a + j]
                u.qty_e8[to + j] = qty[a + j]
        at[book[i] + 1] = c
        to += n + m
    _settle(u, windows, stands)
    u.cursor[0] = to
    return int(done)
