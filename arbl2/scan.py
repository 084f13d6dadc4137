"""The JSON scanner: compiled, and strict to the letter.

It accepts exactly the bytes that the two venues are documented to send for a full-window book - key order, no white space, plain
numbers - and marks every other frame UNREAD for the strict library decoder of the provider. It never guesses, so what both accept
they read alike; a property test holds them together.

Numbers become int64 of 10^-8. Prices must be exact at that scale. Sizes are rounded down, because a displayed size may never be
overstated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.jit import kernel
from arbl2.updates import MAX_LEVELS, Reason, What

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Value = Any  # an int64 of the compiled code; np.int64 when it runs as Python
    Bytes = NDArray[np.uint8]
    Ints = NDArray[np.int64]

_BOOK = np.uint8(What.BOOK)
_DOUBT = np.uint8(What.DOUBT)
_UNREAD = np.uint8(What.UNREAD)
_R_UNSORTED = np.uint8(Reason.UNSORTED)
_R_CROSSED = np.uint8(Reason.CROSSED)
_R_TOTALS = np.uint8(Reason.TOTAL_MISMATCH)
_R_UNKNOWN = np.uint8(Reason.UNKNOWN_INSTRUMENT)
_R_BOOK = np.uint8(Reason.BOOK)

_POW10 = 10 ** np.arange(19, dtype=np.int64)
_FAIL = -1


def _text(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8)


# Upbit, key order as on the wire: DEFAULT spelling, then SIMPLE
_U_HEAD = (_text('{"type":"orderbook","code":"'), _text('{"ty":"orderbook","cd":"'))
_U_TIME = (_text('","timestamp":'), _text('","tms":'))
_U_TAS = (_text(',"total_ask_size":'), _text(',"tas":'))
_U_TBS = (_text(',"total_bid_size":'), _text(',"tbs":'))
_U_UNITS = (_text(',"orderbook_units":['), _text(',"obu":['))
_U_AP = (_text('{"ask_price":'), _text('{"ap":'))
_U_BP = (_text(',"bid_price":'), _text(',"bp":'))
_U_AS = (_text(',"ask_size":'), _text(',"as":'))
_U_BS = (_text(',"bid_size":'), _text(',"bs":'))
_U_STREAM = (_text('],"stream_type":"'), _text('],"st":"'))
_U_LEVEL = (_text(',"level":0}'), _text(',"lv":0}'))
_U_SNAPSHOT = _text('SNAPSHOT"')
_U_REALTIME = _text('REALTIME"')
# Binance combined partial depth
_B_HEAD = _text('{"stream":"')
_B_DEPTH = _text("@depth")
_B_100MS = _text("@100ms")
_B_ID = _text('","data":{"lastUpdateId":')
_B_BIDS = _text(',"bids":[')
_B_ASKS = _text('],"asks":[')
_B_END = _text("]}}")

_QUOTE = 34
_COMMA = 44
_DOT = 46
_ZERO = 48
_NINE = 57
_EXPONENT = 101


@kernel
def _literal(data: Bytes, p: int, end: int, text: Bytes) -> int:
    """Position after ``text`` if it stands at ``p``, else -1."""
    n = len(text)
    if p < 0 or p + n > end:
        return _FAIL
    for k in range(n):
        if data[p + k] != text[k]:
            return _FAIL
    return p + n


@kernel
def _digits(data: Bytes, p: int, end: int) -> tuple[Value, int]:
    """A plain non-negative integer of at most 18 digits: (value, position after it), position -1 if there is none."""
    value = np.int64(0)
    first = p
    while p < end:
        c = np.int64(data[p])
        if c < _ZERO or c > _NINE:
            break
        value = value * 10 + (c - _ZERO)
        p += 1
        if p - first > 18:
            return value, _FAIL
    if p == first or (p - first > 1 and np.int64(data[first]) == _ZERO):
        return value, _FAIL
    return value, p


@kernel
def _number_e8(data: Bytes, p: int, end: int, exact: bool) -> tuple[Value, int]:
    """A non-negative JSON number as int64 of 10^-8: (value, position after it), position -1 if it is not plain enough.

    At most 18 digits and a two-digit exponent; anything else is left to the strict decoder. ``exact`` refuses digits below the
    scale, otherwise they are cut off.
    """
    value = np.int64(0)
    first = p
    while p < end:
        c = np.int64(data[p]) - _ZERO
        if c < 0 or c > 9:
            break
        value = value * 10 + c
        p += 1
    digits = p - first
    if digits == 0 or digits > 18 or (digits > 1 and np.int64(data[first]) == _ZERO):
        return value, _FAIL
    scale = 8
    if p < end and np.int64(data[p]) == _DOT:
        p += 1
        point = p
        while p < end:
            c = np.int64(data[p]) - _ZERO
            if c < 0 or c > 9:
                break
            value = value * 10 + c
            p += 1
        digits += p - point
        if p == point or digits > 18:
            return value, _FAIL
        scale -= p - point
    if p < end and (np.int64(data[p]) | 32) == _EXPONENT:
        exponent, p = _exponent(data, p + 1, end)
        if p < 0:
            return value, _FAIL
        scale += exponent
    if scale == 0 or value == 0:
        return value, p
    if scale > 0:
        if digits + scale > 18:
            return value, _FAIL
        return value * _POW10[scale], p
    if scale < -18:
        return np.int64(0), -1 if exact else p
    unit = _POW10[-scale]
    whole = value // unit
    if exact and whole * unit != value:
        return value, _FAIL
    return whole, p


@kernel
def _exponent(data: Bytes, p: int, end: int) -> tuple[int, int]:
    """The signed exponent of a number, one or two digits: (value, position after it), position -1 if there is none."""
    sign = 1
    if p < end and (np.int64(data[p]) == 43 or np.int64(data[p]) == 45):  # + -
        if np.int64(data[p]) == 45:
            sign = -1
        p += 1
    first = p
    value = 0
    while p < end:
        c = np.int64(data[p]) - _ZERO
        if c < 0 or c > 9:
            break
        value = value * 10 + int(c)
        p += 1
        if p - first > 2:
            return 0, _FAIL
    return sign * value, p if p > first else _FAIL


@kernel
def instrument_hash(data: Bytes, start: int, stop: int) -> Value:
    """Hash of an instrument's name as it stands in the frame, for the lookup table of the provider."""
    h = np.int64(1469598103)
    for p in range(start, stop):
        h = ((h ^ np.int64(data[p])) * np.int64(16777619)) & np.int64(0x7FFFFFFF)
    return h


@kernel
def _find_book(data: Bytes, start: int, stop: int, slots: Ints, names: Bytes, name_ends: Ints) -> int:
    """Index of the book whose name stands at ``data[start:stop]``, or -1. ``slots`` is an open-addressing table of index + 1."""
    size = len(slots)
    slot = instrument_hash(data, start, stop) % size
    for _ in range(size):
        entry = slots[slot]
        if entry == 0:
            return -1
        name_start = name_ends[entry - 1]
        name_stop = name_ends[entry]
        if name_stop - name_start == stop - start:
            same = True
            for k in range(stop - start):
                if names[name_start + k] != data[start + k]:
                    same = False
                    break
            if same:
                return int(entry - 1)
        slot = (slot + 1) % size
    return -1


@kernel
def settle(px: Ints, qty: Ints, start: int, n: int, ask_at: int, m: int, totals: Ints) -> tuple[int, int, Value]:
    """Drop empty levels of one book, close the gap between its sides and check it.

    On entry ``n`` bids stand at ``start`` and ``m`` asks at ``ask_at``; on return (n_bid, n_ask, reason) with the asks right
    behind the bids. ``totals`` = (total bid size, total ask size) as the venue states them, or -1 where it states none: they are
    doubles on the venue's side, so they may differ from the sum in the 16th digit.
    """
    n_bid = 0
    sum_bid = 0.0
    for k in range(n):
        p = px[start + k]
        q = qty[start + k]
        sum_bid += q
        if p != 0 and q != 0:
            px[start + n_bid] = p
            qty[start + n_bid] = q
            n_bid += 1
    n_ask = 0
    sum_ask = 0.0
    to = start + n_bid
    for k in range(m):
        p = px[ask_at + k]
        q = qty[ask_at + k]
        sum_ask += q
        if p != 0 and q != 0:
            px[to + n_ask] = p
            qty[to + n_ask] = q
            n_ask += 1
    reason = _R_BOOK
    for k in range(start + 1, start + n_bid):
        if px[k] >= px[k - 1]:
            reason = _R_UNSORTED
    for k in range(to + 1, to + n_ask):
        if px[k] <= px[k - 1]:
            reason = _R_UNSORTED
    if reason == _R_BOOK and n_bid > 0 and n_ask > 0 and px[start] >= px[to]:
        reason = _R_CROSSED
    if reason == _R_BOOK and totals[0] >= 0:
        # float sums of int64 values: relative error far below 1e-14 for 30 levels
        bids_differ = abs(sum_bid - totals[0]) > n + 1 + totals[0] * 1e-14
        if bids_differ or abs(sum_ask - totals[1]) > m + 1 + totals[1] * 1e-14:
            reason = _R_TOTALS
    return n_bid, n_ask, reason


def _upbit_grammar(spelling: int) -> Callable[..., tuple[int, int, Value]]:
    """The kernel for one of Upbit's two spellings. Its words are constants of the compiled code: compared eight bytes at a time,
    a third faster than words chosen at run time.
    """
    head, time, ask_total, bid_total, units_at = (w[spelling] for w in (_U_HEAD, _U_TIME, _U_TAS, _U_TBS, _U_UNITS))
    ask_price, bid_price, ask_size, bid_size = (w[spelling] for w in (_U_AP, _U_BP, _U_AS, _U_BS))
    stream, level = _U_STREAM[spelling], _U_LEVEL[spelling]

    @kernel
    def frame(
        data: Bytes,
        s: int,
        end: int,
        slots: Ints,
        names: Bytes,
        name_ends: Ints,
        px: Ints,
        qty: Ints,
        at: int,
        totals: Ints,
    ) -> tuple[int, int, int]:
        """One Upbit order book: (units, book, exchange_ms), units -1 if it is not of the exact grammar.

        Bids are written at ``at``, asks at ``at + MAX_LEVELS``.
        """
        p = _literal(data, s, end, head)
        if p < 0:
            return _FAIL, -1, 0
        name = p
        while p < end and p - name < 24:
            c = np.int64(data[p])
            if not (65 <= c <= 90 or _ZERO <= c <= _NINE or c == 45):  # A-Z 0-9 -
                break
            p += 1
        book = _find_book(data, name, p, slots, names, name_ends)
        p = _literal(data, p, end, time)
        if p < 0:
            return _FAIL, -1, 0
        exchange_ms, p = _digits(data, p, end)
        p = _literal(data, p, end, ask_total)
        if p < 0:
            return _FAIL, -1, 0
        totals[1], p = _number_e8(data, p, end, False)
        p = _literal(data, p, end, bid_total)
        if p < 0:
            return _FAIL, -1, 0
        totals[0], p = _number_e8(data, p, end, False)
        p = _literal(data, p, end, units_at)
        if p < 0:
            return _FAIL, -1, 0
        units = 0
        more = True
        while more:
            if units == MAX_LEVELS:
                return _FAIL, -1, 0
            p = _literal(data, p, end, ask_price)
            if p < 0:
                return _FAIL, -1, 0
            px[at + MAX_LEVELS + units], p = _number_e8(data, p, end, True)
            p = _literal(data, p, end, bid_price)
            if p < 0:
                return _FAIL, -1, 0
            px[at + units], p = _number_e8(data, p, end, True)
            p = _literal(data, p, end, ask_size)
            if p < 0:
                return _FAIL, -1, 0
            qty[at + MAX_LEVELS + units], p = _number_e8(data, p, end, False)
            p = _literal(data, p, end, bid_size)
            if p < 0:
                return _FAIL, -1, 0
            qty[at + units], p = _number_e8(data, p, end, False)
            if p < 0 or p + 1 >= end or np.int64(data[p]) != 125:  # }
                return _FAIL, -1, 0
            p += 1
            units += 1
            more = np.int64(data[p]) == _COMMA
            if more:
                p += 1
        p = _literal(data, p, end, stream)
        if p < 0:
            return _FAIL, -1, 0
        after = _literal(data, p, end, _U_REALTIME)
        if after < 0:
            after = _literal(data, p, end, _U_SNAPSHOT)
        if after < 0:
            return _FAIL, -1, 0
        # "level" was added in 2024; older recordings end here
        if after + 1 == end and np.int64(data[after]) == 125:
            return units, book, exchange_ms
        if _literal(data, after, end, level) == end:
            return units, book, exchange_ms
        return _FAIL, -1, 0

    return frame


_upbit_default = _upbit_grammar(0)
_upbit_simple = _upbit_grammar(1)


@kernel
def _side(data: Bytes, p: int, end: int, px: Ints, qty: Ints, at: int) -> tuple[int, int]:
    """Binance levels ``["price","size"],...``: (levels, position after the last), levels -1 if not of the exact grammar."""
    n = 0
    if p < end and np.int64(data[p]) == 93:  # ] : an empty side
        return 0, p
    while True:
        if n == MAX_LEVELS or p + 2 > end or np.int64(data[p]) != 91 or np.int64(data[p + 1]) != _QUOTE:  # [ "
            return _FAIL, p
        px[at + n], p = _number_e8(data, p + 2, end, True)
        if p < 0 or p + 3 > end:
            return _FAIL, p
        if np.int64(data[p]) != _QUOTE or np.int64(data[p + 1]) != _COMMA or np.int64(data[p + 2]) != _QUOTE:
            return _FAIL, p
        qty[at + n], p = _number_e8(data, p + 3, end, False)
        if p < 0 or p + 3 > end or np.int64(data[p]) != _QUOTE or np.int64(data[p + 1]) != 93:
            return _FAIL, p
        n += 1
        p += 2
        if np.int64(data[p]) != _COMMA:
            return n, p
        p += 1


@kernel
def _binance_frame(
    data: Bytes, s: int, end: int, slots: Ints, names: Bytes, name_ends: Ints, px: Ints, qty: Ints, at: int
) -> tuple[int, int, int, int]:
    """One combined partial depth: (bids, asks, book, lastUpdateId), bids -1 if it is not of the exact grammar.

    Bids are written at ``at``, asks at ``at + MAX_LEVELS``.
    """
    p = _literal(data, s, end, _B_HEAD)
    if p < 0:
        return _FAIL, 0, -1, 0
    name = p
    while p < end and p - name < 24:
        c = np.int64(data[p])
        if not (97 <= c <= 122 or _ZERO <= c <= _NINE):  # a-z 0-9
            break
        p += 1
    if p == name:
        return _FAIL, 0, -1, 0
    book = _find_book(data, name, p, slots, names, name_ends)
    p = _literal(data, p, end, _B_DEPTH)
    if p < 0:
        return _FAIL, 0, -1, 0
    depth, p = _digits(data, p, end)
    if p < 0 or not (depth == 5 or depth == 10 or depth == 20):
        return _FAIL, 0, -1, 0
    after = _literal(data, p, end, _B_100MS)
    if after >= 0:
        p = after
    p = _literal(data, p, end, _B_ID)
    if p < 0:
        return _FAIL, 0, -1, 0
    update_id, p = _digits(data, p, end)
    p = _literal(data, p, end, _B_BIDS)
    if p < 0:
        return _FAIL, 0, -1, 0
    bids, p = _side(data, p, end, px, qty, at)
    if bids < 0:
        return _FAIL, 0, -1, 0
    p = _literal(data, p, end, _B_ASKS)
    if p < 0:
        return _FAIL, 0, -1, 0
    asks, p = _side(data, p, end, px, qty, at + MAX_LEVELS)
    if asks < 0 or _literal(data, p, end, _B_END) != end:
        return _FAIL, 0, -1, 0
    return bids, asks, book, update_id


@kernel
def _write_row(
    i: int, known: int, n: int, m: int, ms: int, last_id: int, at: int, totals: Ints,
    book_ids: NDArray[np.int32], what: NDArray[np.uint8], reason: NDArray[np.uint8], book: NDArray[np.int32],
    exchange_ms: Ints, update_id: Ints, start: NDArray[np.int32], n_bid: NDArray[np.int16], n_ask: NDArray[np.int16],
    px: Ints, qty: Ints,
) -> int:  # fmt: skip
    """Settle the levels of one scanned frame and fill its row; returns where the next frame's levels go."""
    bids, asks, why = settle(px, qty, at, n, at + MAX_LEVELS, m, totals)
    if known < 0:
        what[i] = 0
        reason[i] = _R_UNKNOWN
        return at
    what[i] = _BOOK if why == _R_BOOK else _DOUBT
    reason[i] = why
    book[i] = book_ids[known]
    exchange_ms[i] = ms
    update_id[i] = last_id
    start[i] = at
    n_bid[i] = bids
    n_ask[i] = asks
    return at + bids + asks


@kernel
def scan_upbit(
    data: Bytes,
    offsets: NDArray[np.int32],
    rows: NDArray[np.int64],
    slots: Ints,
    names: Bytes,
    name_ends: Ints,
    book_ids: NDArray[np.int32],
    what: NDArray[np.uint8],
    reason: NDArray[np.uint8],
    book: NDArray[np.int32],
    exchange_ms: Ints,
    update_id: Ints,
    start: NDArray[np.int32],
    n_bid: NDArray[np.int16],
    n_ask: NDArray[np.int16],
    px: Ints,
    qty: Ints,
    cursor: Ints,
    totals: Ints,
) -> None:
    """Scan the frames ``rows`` of a block into update columns; rows of another grammar become UNREAD."""
    at = cursor[0]
    for r in range(len(rows)):
        i = rows[r]
        s = int(offsets[i])
        end = int(offsets[i + 1])
        # {"type": and {"ty": differ in their fifth byte
        if end - s > 4 and np.int64(data[s + 4]) == _QUOTE:
            units, known, ms = _upbit_simple(data, s, end, slots, names, name_ends, px, qty, at, totals)
        else:
            units, known, ms = _upbit_default(data, s, end, slots, names, name_ends, px, qty, at, totals)
        if units < 0:
            what[i] = _UNREAD
            continue
        at = _write_row(
            i, known, units, units, ms, 0, at, totals,
            book_ids, what, reason, book, exchange_ms, update_id, start, n_bid, n_ask, px, qty,
        )  # fmt: skip
    cursor[0] = at


@kernel
def scan_binance(
    data: Bytes,
    offsets: NDArray[np.int32],
    rows: NDArray[np.int64],
    slots: Ints,
    names: Bytes,
    name_ends: Ints,
    book_ids: NDArray[np.int32],
    what: NDArray[np.uint8],
    reason: NDArray[np.uint8],
    book: NDArray[np.int32],
    exchange_ms: Ints,
    update_id: Ints,
    start: NDArray[np.int32],
    n_bid: NDArray[np.int16],
    n_ask: NDArray[np.int16],
    px: Ints,
    qty: Ints,
    cursor: Ints,
    totals: Ints,
) -> None:
    """Scan the frames ``rows`` of a block into update columns; rows of another grammar become UNREAD."""
    at = cursor[0]
    for r in range(len(rows)):
        i = rows[r]
        bids, asks, known, last_id = _binance_frame(
            data, int(offsets[i]), int(offsets[i + 1]), slots, names, name_ends, px, qty, at
        )
        if bids < 0:
            what[i] = _UNREAD
            continue
        at = _write_row(
            i, known, bids, asks, 0, last_id, at, totals,
            book_ids, what, reason, book, exchange_ms, update_id, start, n_bid, n_ask, px, qty,
        )  # fmt: skip
    cursor[0] = at
