"""Windows as one stream of levels, and back: the compiled part of the decoded store.

A window is both sides of a book, best level first, asks behind bids. Those of one book, one behind the other, are a stream in
which most is as it was a window ago. So it is kept as *changes*, as Lempel and Ziv did it: copy some levels from the window
before; skip those that are gone and add one that is new, or none - or keep the next one with another size. ``shrink`` makes the
changes of a block of updates, ``expand`` makes the updates again. A change copies at most ``MOST_COPIED`` levels: that is a
move of fixed length, and no processor can guess the length of a loop (that was a third of the time).

On disk all of a change but the size is one code of 32 bits: three bits for the levels to copy, five for those that are gone (1
for one that is kept with another size). The rest is 0 if no level is added, 1 if one is kept, or two more than the distance of
a new level from the new level before it, in units of its part and folded so that small ones are small numbers. Where that is
not enough for all of a part, the rest is 2 for a new level; the low halves of the prices stand behind the codes and the high
halves behind those. Sizes are in lots, those of levels that are added or kept, one behind the other. Levels of depth changes
and of snapshots are all new; they are parts of their own, with codes that are the rest alone.
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
WINDOW = 2 * MAX_LEVELS
"""Levels that a window has room for."""
_WINDOW: Any = np.int64(WINDOW)
COPY_BITS, GONE_BITS = 3, 5
REST_AT = COPY_BITS + GONE_BITS
MOST_COPIED = (1 << COPY_BITS) - 1
_MOST_GONE = (1 << GONE_BITS) - 1
_MOVED: Any = np.int64(MOST_COPIED + 1)
"""Levels that are moved at once: those to copy, and one that may be kept."""
_NOWHERE: Any = _MOVED
_AREA_END: Any = _NOWHERE + 1
"""Room behind the windows of a book. A move may end in it, and in its last place stands what is written so that nothing has to be
guessed: the price of a change whose level has one already."""
NO_LEVEL, SAME_PRICE = -1, -2
"""What stands for the price where a change adds no level, or keeps one."""
_SAME, _NEW = 1, 2
i8: Any = np.int64
u8: Any = np.uint64
"""Of an index: numba looks at the sign of every other one, which kept four levels from being one move."""
_1, _2, _3, _4, _5, _6, _7 = (np.uint64(k) for k in range(1, 8))
_LOW: Any = np.int64(2**32 - 1)
DAMAGED = -1
"""What ``expand`` returns for columns that ``shrink`` never makes."""
COLUMNS = ("sort", "exchange_ms", "first_id", "update_id", "check", "changes", "asks")
WHAT, REASON, BOOK, RUN_BOOK, N_BID, N_ASK, SORT = range(7)
"""Columns of the table of sorts, and how many: what rows of a sort do, to which book of the tape and of the run."""
AT, END, SIZE_AT, UNIT, LOT, BEFORE, FAR, PART = range(8)
"""Columns of the table of parts, and how many: next change and end of the changes, next size, the units of prices and sizes, the
latest price of a new level, how far behind the codes the halves of prices stand (0: there are none). Row 2 x book + 2 is of the
windows of a book, the row behind it of its other levels, which have a size each; the first two are of none."""
MS, ID, LATEST = range(3)
"""Columns of the table of books (that of none first), and how many: the venue's time and the id of the latest row."""
LEVELS, CHANGES, BEGIN, LAST, TO, STAND = range(6)
"""Columns of the table of stands, and how many, for one block: levels of the windows of a book (-1: it has no row), their
changes, where the window before the first of them begins, where the latest one does, and where the next one will."""


@part
def _add(kept: Any, at: int, copied: int, gone: int, px: int, qty: int) -> int:
    """Write a change; returns the position after it."""
    copies, gones, prices, sizes = kept
    copies[at], gones[at], prices[at], sizes[at] = copied, gone, px, qty
    return at + 1


@part
def _note_changes(u: Updates, start: int, n_bid: int, n_ask: int, windows: Any, book: int, kept: Any, at: int) -> int:
    """Write what turns the window of ``book`` into the levels of ``u`` at ``start``; returns the position after it."""
    w_px, w_qty, w_n = windows
    first = at
    differs = False
    copied = i8(0)
    gone = i8(0)
    i = book * _WINDOW
    k = i8(start)
    for side in range(2):
        old_end = i + w_n[2 * book + side]
        end = k + (n_ask if side else n_bid)
        while k < end or i < old_end:
            p = u.px_e8[k] if k < end else 0
            q = u.qty_e8[k] if k < end else 0
            is_gone = i < old_end and (k == end or (w_px[i] < p if side else w_px[i] > p))
            stays = i < old_end and not is_gone and w_px[i] == p
            is_same = stays and w_qty[i] == q
            if (gone and stays) or (is_same and copied == MOST_COPIED) or (is_gone and gone == _MOST_GONE):
                at = _add(kept, at, copied, gone, NO_LEVEL, 0)
                copied = gone = 0
            if is_same:
                copied += 1
            elif is_gone:
                gone += 1
            else:
                at = _add(kept, at, copied, 1 if stays else gone, SAME_PRICE if stays else p, q)
                copied = gone = 0
            differs |= not is_same
            i += is_gone or stays
            k += not is_gone
        i = book * _WINDOW + w_n[2 * book]
    if not differs:
        return first
    return _add(kept, at, copied, gone, NO_LEVEL, 0) if copied or gone else at


@kernel
def shrink(updates: Updates, n: int, windows: Any, counts: NDArray[np.int16], kept: Any, at: int) -> int:
    """Write the changes of rows 0 to ``n`` into ``kept`` (copied, gone, prices, sizes) from ``at`` on; returns the end.

    ``windows`` (prices, sizes; those of a book ``WINDOW`` apart; how many on side 2 x book + side) are those before and become
    those after; ``counts[row]`` gets how many changes each row has, and how many of them are asks that are no window.
    """
    u = updates[0]
    w_px, w_qty, w_n = windows
    for r in range(n):
        counts[r, 0] = 0
        counts[r, 1] = 0
        what = u.what[r]
        start = i8(u.start[r])
        n_bid = i8(u.n_bid[r])
        n_ask = i8(u.n_ask[r])
        before = at
        if what == _BOOK:
            b = i8(u.book[r])
            at = _note_changes(u, start, n_bid, n_ask, windows, b, kept, at)
            for k in range(n_bid + n_ask):
                w_px[b * _WINDOW + k] = u.px_e8[start + k]
                w_qty[b * _WINDOW + k] = u.qty_e8[start + k]
            w_n[2 * b] = n_bid
            w_n[2 * b + 1] = n_ask
        elif what == _CHANGE or what == _SNAPSHOT:  # noqa: SIM109
            for k in range(n_bid + n_ask):
                at = _add(kept, at, 0, 0, u.px_e8[start + k], u.qty_e8[start + k])
            counts[r, 1] = n_ask
        counts[r, 0] = at - before
    return at


@part
def _step(rest: int) -> Any:
    """How far a new level is from the new level before it, given the rest of its code."""
    return ((rest - _NEW) >> 1) ^ -((rest - _NEW) & 1)


@part
def _whole_price(codes: Codes, c: int, far: int) -> Any:
    """The price of the new level of code ``c`` where halves of prices stand behind the codes."""
    return (i8(codes[u8(c + far)]) & _LOW) | i8(codes[u8(c + 2 * far)]) << 32


@part
def _copy(u: Updates, old: int, to: int) -> None:
    """``MOST_COPIED`` levels and one more."""
    i = u8(old)
    k = u8(to)
    a, b, c, d = u.px_e8[i], u.px_e8[i + _1], u.px_e8[i + _2], u.px_e8[i + _3]
    u.px_e8[k], u.px_e8[k + _1], u.px_e8[k + _2], u.px_e8[k + _3] = a, b, c, d
    a, b, c, d = u.px_e8[i + _4], u.px_e8[i + _5], u.px_e8[i + _6], u.px_e8[i + _7]
    u.px_e8[k + _4], u.px_e8[k + _5], u.px_e8[k + _6], u.px_e8[k + _7] = a, b, c, d
    a, b, c, d = u.qty_e8[i], u.qty_e8[i + _1], u.qty_e8[i + _2], u.qty_e8[i + _3]
    u.qty_e8[k], u.qty_e8[k + _1], u.qty_e8[k + _2], u.qty_e8[k + _3] = a, b, c, d
    a, b, c, d = u.qty_e8[i + _4], u.qty_e8[i + _5], u.qty_e8[i + _6], u.qty_e8[i + _7]
    u.qty_e8[k + _4], u.qty_e8[k + _5], u.qty_e8[k + _6], u.qty_e8[k + _7] = a, b, c, d


@part
def _unroll(u: Updates, codes: Codes, sizes: Ints, stand: Ints, of: Ints) -> bool:
    """Write the windows of a book, as its row of the stands says. False if its changes make others."""
    lot, unit, before, far = of[LOT], of[UNIT], of[BEFORE], of[FAR]
    first = of[AT]
    last = first + stand[CHANGES]
    if last > of[END]:
        return False
    old = stand[BEGIN]
    end = stand[TO]
    to = end - stand[LEVELS]
    size = of[SIZE_AT]
    nowhere = end + _NOWHERE
    for c in range(first, last):
        code = i8(codes[u8(c)])
        copied = code & MOST_COPIED
        gone = (code >> COPY_BITS) & _MOST_GONE
        rest = code >> REST_AT
        if to + copied > end or old + copied + max(gone, i8(rest == _SAME)) > to:
            return False
        _copy(u, old, to)
        old += copied + gone
        to += copied
        if far == 0:
            before += _step(max(rest, _NEW)) * unit
        elif rest == _NEW:
            before = _whole_price(codes, c, far)
        # Written even where no level is added: what comes next is written over it. The price of one that is kept is there.
        u.px_e8[u8(nowhere if rest == _SAME else to)] = before
        u.qty_e8[u8(to)] = sizes[u8(size)] * lot
        adds = i8(rest != 0)
        to += adds
        size += adds
    of[AT] = last
    of[SIZE_AT] = size
    of[BEFORE] = before
    return bool(to == end and old == stand[LAST])


@part
def _rows_with_room(u: Updates, columns: Any, sorts: Any, first: int, last: int, stands: Any) -> int:
    """How many rows there is room for; ``stands`` gets the levels of their windows."""
    sort, _, _, _, _, changes, _ = columns
    for k in range(len(stands)):
        stands[k, LEVELS] = -1
    room = i8(len(u.px_e8)) - u.cursor[0]
    for j in range(last - first):
        i = u8(first + j)
        s = u8(sort[i])
        kind = sorts[s, WHAT]
        n = i8(changes[i])
        if kind == _BOOK:
            k = sorts[s, BOOK]
            n = sorts[s, N_BID] + sorts[s, N_ASK] if n != 0 else 0
            room -= n if stands[k, LEVELS] >= 0 else n + WINDOW + _AREA_END
            if room < 0:
                return j
            stands[k, LEVELS] = max(stands[k, LEVELS], 0) + n
        elif kind == _CHANGE or kind == _SNAPSHOT:  # noqa: SIM109
            room -= n
            if room < 0:
                return j
    return last - first


@part
def _lay_out(u: Updates, windows: Any, stands: Any, to: int) -> int:
    """Put the window of every book that has rows before the room for its next ones; returns the position after these."""
    w_px, w_qty, w_n = windows
    for k in range(len(stands)):
        if stands[k, LEVELS] < 0:
            continue
        stands[k, CHANGES] = 0
        stands[k, BEGIN] = stands[k, LAST] = to
        for j in range(w_n[2 * k] + w_n[2 * k + 1]):
            u.px_e8[to] = w_px[k * _WINDOW + j]
            u.qty_e8[to] = w_qty[k * _WINDOW + j]
            to += 1
        stands[k, TO] = to
        to += stands[k, LEVELS] + _AREA_END
    return to


@part
def _settle(u: Updates, windows: Any, stands: Any) -> None:
    """Keep the windows as they stand in ``u`` by now."""
    w_px, w_qty, w_n = windows
    for k in range(len(stands)):
        if stands[k, LEVELS] < 0:
            continue
        at = stands[k, LAST]
        for j in range(w_n[2 * k] + w_n[2 * k + 1]):
            w_px[k * _WINDOW + j] = u.px_e8[at + j]
            w_qty[k * _WINDOW + j] = u.qty_e8[at + j]


@kernel
def expand(
    columns: Any,
    sorts: Any,
    first: int,
    last: int,
    codes: Codes,
    sizes: Ints,
    parts: Any,
    latest: Any,
    windows: Any,
    stands: Any,
    updates: Updates,
) -> int:
    """Fill rows 0 and on of ``u`` from rows ``first`` to ``last`` of the columns, as far as there is room; returns how many rows.

    ``columns`` are those of ``COLUMNS``, ``sorts`` is a table of ``SORT``, with values that ``store_read`` has checked. ``parts``
    (``PART``) and ``latest`` (``LATEST``) move on. ``windows`` (as in ``shrink``) are those before the first row and become those
    after the last. ``stands`` (``STAND``) is room. Returns ``DAMAGED`` where it does not fit together: nothing is ever touched
    outside the arrays.
    """
    u = updates[0]
    sort, exchange_ms, first_id, update_id, check, changes, asks = columns
    w_n = windows[2]
    done = _rows_with_room(u, columns, sorts, first, last, stands)
    to = i8(_lay_out(u, windows, stands, u.cursor[0]))
    for j in range(done):
        i = u8(first + j)
        r = u8(j)
        s = u8(sort[i])
        kind = sorts[s, WHAT]
        u.what[r] = kind
        u.reason[r] = sorts[s, REASON]
        u.book[r] = sorts[s, RUN_BOOK]
        u.start[r] = to
        if kind != _BOOK and kind != _CHANGE and kind != _SNAPSHOT:
            continue
        k = sorts[s, BOOK]
        now = latest[u8(k + 1)]
        u.first_id[r] = first_id[i] + (now[ID] if kind == _CHANGE else 0)
        now[ID] += update_id[i]
        now[MS] += exchange_ms[i]
        u.update_id[r] = now[ID]
        u.exchange_ms[r] = now[MS]
        u.check[r] = check[i]
        count = i8(changes[i])
        if kind == _BOOK:
            n = sorts[s, N_BID]
            m = sorts[s, N_ASK]
            if count == 0:
                if n != w_n[2 * k] or m != w_n[2 * k + 1]:
                    return DAMAGED
            else:
                at = stands[k, TO]
                stands[k, LAST] = at
                stands[k, TO] = at + n + m
                stands[k, CHANGES] += count
                w_n[2 * k] = n
                w_n[2 * k + 1] = m
            u.start[r] = stands[k, LAST]
        else:
            m = i8(asks[i])
            n = count - m
            of = parts[u8(2 * k + 3)]
            if count > of[END] - of[AT]:
                return DAMAGED
            for c in range(of[AT], of[AT] + count):
                of[BEFORE] = _whole_price(codes, c, of[FAR]) if of[FAR] else of[BEFORE] + _step(i8(codes[u8(c)])) * of[UNIT]
                u.px_e8[to] = of[BEFORE]
                u.qty_e8[to] = sizes[u8(c)] * of[LOT]
                to += 1
            of[AT] += count
        u.n_bid[r] = n
        u.n_ask[r] = m
    for k in range(len(stands)):
        if stands[k, LEVELS] >= 0 and not _unroll(u, codes, sizes, stands[k], parts[u8(2 * k + 2)]):
            return DAMAGED
    _settle(u, windows, stands)
    u.cursor[0] = to
    return int(done)
