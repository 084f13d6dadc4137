"""Windows as changes against the window before, and back: the compiled part of the decoded store.

A window is a side of a book, best level first. A change of one is a place in the new window, a price and a size. In the order of
places come first (place, price, size), a new level, and (place, none, 0), the level that stands there by then is gone; behind
those (place, none, size), another size of a level. What fell out at the far end is not said: the number of levels cuts it off.
``shrink`` makes the changes of a block of updates, ``expand`` makes the updates again.

On disk place and price are one code of 32 bits: the place, and ``PLACES`` times one more than the distance of a new level from
the new level before it, in units of their part and folded so that small ones are small numbers. Where that is not enough for all
of a part, a code is the place, and ``PLACES`` more if it is a new level; the low halves of the prices stand behind the codes and
the high halves behind those. Sizes are in lots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.jit import kernel, part
from arbl2.updates import MAX_LEVELS, What

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Codes = NDArray[np.int32]
    Updates = Any  # a record of ``arbl2.updates.UPDATES``

_BOOK = int(What.BOOK)
_CHANGE = int(What.CHANGE)
_SNAPSHOT = int(What.SNAPSHOT)
_MAX_LEVELS: Any = np.int64(MAX_LEVELS)
_SHIFT = 5
PLACES = 1 << _SHIFT
"""More than the places of a window."""
NO_PRICE = -1
i8: Any = np.int64
u8: Any = np.uint64
"""Of an index: numba looks at the sign of every other one, which kept four levels from being one move."""
_SLACK = 4  # copies may end later than a window
_1, _2, _3, _4 = (np.uint64(k) for k in (1, 2, 3, 4))
_LOW: Any = np.int64(2**32 - 1)
DAMAGED = -1
"""What ``expand`` returns for columns that ``shrink`` never makes."""
COLUMNS = ("sort", "exchange_ms", "first_id", "update_id", "check", "bid_changes", "ask_changes")
WHAT, REASON, BOOK, RUN_BOOK, N_BID, N_ASK, SORT = range(7)
"""Columns of the table of sorts, and how many: what rows of a sort do, to which book of the tape and of the run."""
AT, END, UNIT, LOT, BEFORE, FAR, MS, ID, PART = range(9)
"""Columns of the table of parts, and how many: next change and end of the changes of a book, the units of its prices and sizes,
the latest price of a new level, how far behind the codes the halves of prices stand (0: there are none); of the latest row the
venue's time and the id."""


@part
def _note_changes(
    u: Updates, start: int, n: int, w_px: Ints, w_qty: Ints, home: int, was: int, asks: bool, kept: Any, at: int
) -> int:
    """Write what turns the window at ``home`` (``was`` levels) into ``n`` levels of ``u``; returns the position after it."""
    place, px, qty = kept
    for resized in range(2):
        i = i8(0)
        k = i8(0)
        while k < n:
            p = u.px_e8[start + k]
            q = u.qty_e8[start + k]
            stays = i < was and w_px[home + i] == p
            goes = i < was and (w_px[home + i] < p if asks else w_px[home + i] > p)
            if (stays and w_qty[home + i] != q) if resized else not stays:
                place[at] = k
                px[at] = NO_PRICE if stays or goes else p
                qty[at] = 0 if goes else q
                at += 1
            if stays or goes:
                i += 1
            if not goes:
                k += 1
    return at


@kernel
def shrink(updates: Updates, n: int, windows: Any, counts: NDArray[np.int16], kept: Any, at: int) -> int:
    """Write the levels to keep of rows 0 to ``n`` into ``kept`` (places, prices, sizes) from ``at`` on; returns the end.

    ``windows`` (prices, sizes, counts; those of side 2 x book + side, ``MAX_LEVELS`` apart) are those before and become those
    after; ``counts[row, side]`` gets the levels kept of each row.
    """
    u = updates[0]
    w_px, w_qty, w_n = windows
    place, px, qty = kept
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
                at = _note_changes(u, at_level, levels, w_px, w_qty, home, w_n[b], side == 1, kept, at)
                for k in range(levels):
                    w_px[home + k] = u.px_e8[at_level + k]
                    w_qty[home + k] = u.qty_e8[at_level + k]
                w_n[b] = levels
            elif what == _CHANGE or what == _SNAPSHOT:  # noqa: SIM109
                for k in range(levels):
                    place[at] = 0
                    px[at] = u.px_e8[at_level + k]
                    qty[at] = u.qty_e8[at_level + k]
                    at += 1
            counts[r, side] = at - before
            at_level += levels
    return at


@part
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


@part
def _price(codes: Codes, c: int, before: int, unit: int, far: int) -> Any:
    """The price of the new level of code ``c``, given that of the new level before."""
    if far != 0:
        return (i8(codes[u8(c + far)]) & _LOW) | i8(codes[u8(c + 2 * far)]) << 32
    folded = (i8(codes[u8(c)]) >> _SHIFT) - 1
    return before + ((folded >> 1) ^ -(folded & 1)) * unit


@part
def _merge(u: Updates, old: int, was: int, to: int, n: int, codes: Codes, sizes: Ints, first: int, stop: int, of: Ints) -> bool:
    """Write the window of ``n`` levels at ``to``: that at ``old`` with the changes from ``first``. False if they make another."""
    lot, unit, before, far = of[LOT], of[UNIT], of[BEFORE], of[FAR]
    left = was
    k = i8(0)
    c = first
    while c < stop:
        code = i8(codes[u8(c)])
        place = code & (PLACES - 1)
        size = sizes[u8(c)] * lot
        is_new = code >= PLACES
        if not is_new and size != 0:
            break
        more = place - k
        left -= more if is_new else more + 1
        if place >= n or more < 0 or left < 0:
            return False
        _copy(u, old, to + k, more)
        old += more if is_new else more + 1
        k = place
        if is_new:
            before = _price(codes, c, before, unit, far)
            u.px_e8[u8(to + k)] = before
            u.qty_e8[u8(to + k)] = size
            k += 1
        c += 1
    of[BEFORE] = before
    if n - k > left:
        return False
    _copy(u, old, to + k, n - k)
    while c < stop:
        place = i8(codes[u8(c)])
        if place < 0 or place >= n:
            return False
        u.qty_e8[u8(to + place)] = sizes[u8(c)] * lot
        c += 1
    return True


@part
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


@part
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
    columns: Any,
    sorts: Any,
    first: int,
    last: int,
    codes: Codes,
    sizes: Ints,
    parts: Any,
    windows: Any,
    stands: Ints,
    updates: Updates,
) -> int:
    """Fill rows 0 and on of ``u`` from rows ``first`` to ``last`` of the columns, as far as there is room; returns how many rows.

    ``columns`` are those of ``COLUMNS``, ``sorts`` is a table of ``SORT``, with values that ``store_read`` has checked. ``parts``
    has a row of ``PART`` for every book (that of none first); AT and what is of the latest row move on. ``windows`` (prices,
    sizes, counts) are those before the first row and become those after the last. ``stands`` is room of one number a book.
    Returns ``DAMAGED`` where it does not fit together: nothing is ever touched outside the arrays.
    """
    u = updates[0]
    sort, exchange_ms, first_id, update_id, check, bid_changes, ask_changes = columns
    w_n = windows[2]
    for k in range(len(stands)):
        stands[k] = -1
    to = i8(u.cursor[0])
    room = i8(len(u.px_e8)) - 2 * MAX_LEVELS - _SLACK
    done = i8(last - first)
    for j in range(done):
        i = u8(first + j)
        r = u8(j)
        s = u8(sort[i])
        kind = sorts[s, WHAT]
        u.start[r] = to
        u.what[r] = kind
        u.reason[r] = sorts[s, REASON]
        u.book[r] = sorts[s, RUN_BOOK]
        if kind != _BOOK and kind != _CHANGE and kind != _SNAPSHOT:
            continue
        k = sorts[s, BOOK]
        of = parts[u8(k + 1)]
        a = of[AT]
        b = a + bid_changes[i]
        c = b + ask_changes[i]
        if c > of[END]:
            return DAMAGED
        n = sorts[s, N_BID] if kind == _BOOK else b - a
        m = sorts[s, N_ASK] if kind == _BOOK else c - b
        if to + n + m > room:
            done = i8(j)
            break
        u.n_bid[r] = n
        u.n_ask[r] = m
        u.first_id[r] = first_id[i] + (of[ID] if kind == _CHANGE else 0)
        of[ID] += update_id[i]
        of[MS] += exchange_ms[i]
        u.update_id[r] = of[ID]
        u.exchange_ms[r] = of[MS]
        u.check[r] = check[i]
        if kind == _BOOK:
            bids = w_n[2 * k]
            asks = w_n[2 * k + 1]
            old = stands[k]
            if old >= 0 and a == c and n == bids and m == asks:
                u.start[r] = old
                continue
            if old < 0:
                old = to
                to = i8(_lay_out(u, windows, k, to))
                u.start[r] = to
            if not _merge(u, old, bids, to, n, codes, sizes, a, b, of):
                return DAMAGED
            if not _merge(u, old + bids, asks, to + n, m, codes, sizes, b, c, of):
                return DAMAGED
            stands[k] = to
            w_n[2 * k] = n
            w_n[2 * k + 1] = m
        else:
            for x in range(n + m):
                of[BEFORE] = _price(codes, a + x, of[BEFORE], of[UNIT], of[FAR])
                u.px_e8[to + x] = of[BEFORE]
                u.qty_e8[to + x] = sizes[a + x] * of[LOT]
        of[AT] = c
        to += n + m
    _settle(u, windows, stands)
    u.cursor[0] = to
    return int(done)
