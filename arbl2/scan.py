"""The JSON scanner: compiled, and strict to the letter.

It accepts exactly the bytes that the two venues are documented to send for a book or a change of one - key order, no white
space, plain numbers - and what is plainly a trade or a ticker, and marks every other frame UNREAD for the strict library decoder
of the provider. It never guesses, so what both accept they read alike; a property test holds them together.

Numbers become int64 of 10^-8. Prices must be exact at that scale. Sizes are rounded down, because a displayed size may never be
overstated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from arbl2.jit import kernel, part
from arbl2.updates import MAX_CHANGES, MAX_LEVELS, Reason, What

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Value = Any  # an int64 of the compiled code; np.int64 when it runs as Python
    Bytes = NDArray[np.uint8]
    Ints = NDArray[np.int64]

_BOOK: Any = np.uint8(What.BOOK)
_DOUBT: Any = np.uint8(What.DOUBT)
_UNREAD: Any = np.uint8(What.UNREAD)
_R_UNSORTED: Any = np.uint8(Reason.UNSORTED)
_R_CROSSED: Any = np.uint8(Reason.CROSSED)
_R_TOTALS: Any = np.uint8(Reason.TOTAL_MISMATCH)
_R_UNKNOWN: Any = np.uint8(Reason.UNKNOWN_INSTRUMENT)
_R_BOOK: Any = np.uint8(Reason.BOOK)
_R_BOOK_TICKER: Any = np.uint8(Reason.BOOK_TICKER)
_R_TRADE: Any = np.uint8(Reason.TRADE)
_R_TICKER: Any = np.uint8(Reason.TICKER)
_R_REST: Any = np.uint8(Reason.REST)
_R_DIFF: Any = np.uint8(Reason.DIFF)
_CHANGE: Any = np.uint8(What.CHANGE)
_SNAPSHOT: Any = np.uint8(What.SNAPSHOT)
# Typed constants: a plain 0 or True is a type of its own to numba, and would compile every kernel it is passed to once more.
_EXACT: Any = np.bool_(True)
_CUT: Any = np.bool_(False)
_NONE: Any = np.int64(0)
_WINDOW: Any = np.int64(MAX_LEVELS)
_CHANGES: Any = np.int64(MAX_CHANGES)

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
# Upbit messages that are no books: their first member, in both spellings
_U_TRADE = (_text('{"type":"trade"'), _text('{"ty":"trade"'))
_U_TICKER = (_text('{"type":"ticker"'), _text('{"ty":"ticker"'))
_U_KEYS = (_text('type"'), _text('ty"'), _text('error"'), _text('status"'), _text('method"'), _text('mthd"'))
"""Members that say what a message is; one of them after the first may say something else."""
# Binance combined partial depth
_B_HEAD = _text('{"stream":"')
_B_DEPTH = _text("@depth")
_B_100MS = _text("@100ms")
_B_ID = _text('","data":{"lastUpdateId":')
_B_BIDS = _text(',"bids":[')
_B_ASKS = _text('],"asks":[')
_B_END = _text("]}}")
_B_EVENT = _text('","data":{"e":"depthUpdate","E":')
_B_SYMBOL = _text(',"s":"')
_B_FIRST = _text('","U":')
_B_LAST = _text(',"u":')
_B_B = _text(',"b":[')
_B_A = _text('],"a":[')
# Messages that are no books: # stands for an integer, $ for a plain word or number within quotes, ? for true or false
_B_BOOK_TICKER = _text('@bookTicker","data":{"u":#,"s":"$","b":"$","B":"$","a":"$","A":"$"}}')
_B_TRADE = _text('@trade","data":{"e":"trade","E":#,"s":"$","t":#,"p":"$","q":"$","T":#,"m":?,"M":?}}')
_S_HEAD = _text('{"lastUpdateId":')
_S_END = _text("]}")
_TRUE = _text("true")
_FALSE = _text("false")
_NULL = _text("null")

_QUOTE = 34
_COMMA = 44
_COLON = 58
_BRACE = 125
_DOT = 46
_ZERO = 48
_NINE = 57
_EXPONENT = 101


class Names(NamedTuple):
    """The instruments of a provider: an open-addressing table of index + 1, names end to end, their ends, and their books."""

    slots: Ints
    text: Bytes
    ends: Ints
    books: NDArray[np.int32]


@part
def _literal(data: Bytes, p: int, end: int, text: Bytes) -> int:
    """Position after ``text`` if it stands at ``p``, else -1."""
    n = len(text)
    if p < 0 or p + n > end:
        return _FAIL
    for k in range(n):
        if data[p + k] != text[k]:
            return _FAIL
    return p + n


@part
def _digits(data: Bytes, p: int, end: int) -> tuple[Value, int]:
    """A plain non-negative integer of at most 18 digits: (value, position after it), position -1 if there is none."""
    value = np.int64(0)
    first = p
    while 0 <= p < end:
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


@part
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


@part
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


@part
def _find_book(data: Bytes, start: int, stop: int, names: Names) -> int:
    """The book whose name stands at ``data[start:stop]``, or -1."""
    size = len(names.slots)
    slot = instrument_hash(data, start, stop) % size
    for _ in range(size):
        entry = names.slots[slot]
        if entry == 0:
            return -1
        name_start = names.ends[entry - 1]
        name_stop = names.ends[entry]
        if name_stop - name_start == stop - start:
            same = True
            for k in range(stop - start):
                if names.text[name_start + k] != data[start + k]:
                    same = False
                    break
            if same:
                return int(names.books[entry - 1])
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

    @part
    def frame(
        data: Bytes,
        s: int,
        end: int,
        names: Names,
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
        book = _find_book(data, name, p, names)
        p = _literal(data, p, end, time)
        if p < 0:
            return _FAIL, -1, 0
        exchange_ms, p = _digits(data, p, end)
        p = _literal(data, p, end, ask_total)
        if p < 0:
            return _FAIL, -1, 0
        totals[1], p = _number_e8(data, p, end, _CUT)
        p = _literal(data, p, end, bid_total)
        if p < 0:
            return _FAIL, -1, 0
        totals[0], p = _number_e8(data, p, end, _CUT)
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
            px[at + MAX_LEVELS + units], p = _number_e8(data, p, end, _EXACT)
            p = _literal(data, p, end, bid_price)
            if p < 0:
                return _FAIL, -1, 0
            px[at + units], p = _number_e8(data, p, end, _EXACT)
            p = _literal(data, p, end, ask_size)
            if p < 0:
                return _FAIL, -1, 0
            qty[at + MAX_LEVELS + units], p = _number_e8(data, p, end, _CUT)
            p = _literal(data, p, end, bid_size)
            if p < 0:
                return _FAIL, -1, 0
            qty[at + units], p = _number_e8(data, p, end, _CUT)
            if p < 0 or p + 1 >= end or np.int64(data[p]) != _BRACE:
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
        if after + 1 == end and np.int64(data[after]) == _BRACE:
            return units, book, exchange_ms
        if _literal(data, after, end, level) == end:
            return units, book, exchange_ms
        return _FAIL, -1, 0

    return frame


_upbit_default = _upbit_grammar(0)
_upbit_simple = _upbit_grammar(1)


@part
def _upbit_told(data: Bytes, s: int, end: int) -> Value:
    """What an Upbit message that is no book tells, as a reason; 0 if it is not a flat object of plain members."""
    p, reason = _literal(data, s, end, _U_TRADE[0]), _R_TRADE
    if p < 0:
        p = _literal(data, s, end, _U_TRADE[1])
    if p < 0:
        p, reason = _literal(data, s, end, _U_TICKER[0]), _R_TICKER
    if p < 0:
        p = _literal(data, s, end, _U_TICKER[1])
    while 0 <= p < end and np.int64(data[p]) == _COMMA:
        p = _member(data, p + 1, end)
    if p >= 0 and p + 1 == end and np.int64(data[p]) == _BRACE:
        return reason
    return np.uint8(0)


@part
def _member(data: Bytes, p: int, end: int) -> int:
    """Position after ``"name":value``, -1 if it is not plain: nothing nested, ASCII without escapes, a name that says no kind."""
    if p >= end or np.int64(data[p]) != _QUOTE:
        return _FAIL
    for k in range(len(_U_KEYS)):
        if _literal(data, p + 1, end, _U_KEYS[k]) >= 0:
            return _FAIL
    p = _string(data, p, end)
    if p < 0 or p + 1 >= end or np.int64(data[p]) != _COLON:
        return _FAIL
    p += 1
    c = np.int64(data[p])
    if c == _QUOTE:
        return _string(data, p, end)
    if c == 110:  # n
        return _literal(data, p, end, _NULL)
    if c == 116:  # t
        return _literal(data, p, end, _TRUE)
    if c == 102:  # f
        return _literal(data, p, end, _FALSE)
    return _number(data, p, end)


@part
def _number(data: Bytes, p: int, end: int) -> int:
    """Position after a JSON number, -1 if there is none."""
    if np.int64(data[p]) == 45:  # -
        p += 1
    first = p
    p = _after_digits(data, p, end)
    if p == first or (p - first > 1 and np.int64(data[first]) == _ZERO):
        return _FAIL
    if p < end and np.int64(data[p]) == _DOT:
        point = p + 1
        p = _after_digits(data, point, end)
        if p == point:
            return _FAIL
    if p < end and (np.int64(data[p]) | 32) == _EXPONENT:
        _, p = _exponent(data, p + 1, end)
    return p


@part
def _after_digits(data: Bytes, p: int, end: int) -> int:
    while p < end and np.int64(data[p]) >= _ZERO and np.int64(data[p]) <= _NINE:
        p += 1
    return p


@part
def _string(data: Bytes, p: int, end: int) -> int:
    """Position after the string that begins at ``p``, -1 if it is not plain ASCII."""
    p += 1
    while p < end:
        c = np.int64(data[p])
        if c == _QUOTE:
            return p + 1
        if c < 32 or c > 126 or c == 92:  # a backslash
            return _FAIL
        p += 1
    return _FAIL


@part
def _side(data: Bytes, p: int, end: int, px: Ints, qty: Ints, at: int, most: int) -> tuple[int, int]:
    """Binance levels ``["price","size"],...``: (levels, position after the last), levels -1 if not of the exact grammar."""
    n = 0
    if p < end and np.int64(data[p]) == 93:  # ] : an empty side
        return 0, p
    while True:
        if n == most or p + 2 > end or np.int64(data[p]) != 91 or np.int64(data[p + 1]) != _QUOTE:  # [ "
            return _FAIL, p
        px[at + n], p = _number_e8(data, p + 2, end, _EXACT)
        if p < 0 or p + 3 > end:
            return _FAIL, p
        if np.int64(data[p]) != _QUOTE or np.int64(data[p + 1]) != _COMMA or np.int64(data[p + 2]) != _QUOTE:
            return _FAIL, p
        qty[at + n], p = _number_e8(data, p + 3, end, _CUT)
        if p < 0 or p + 3 > end or np.int64(data[p]) != _QUOTE or np.int64(data[p + 1]) != 93:
            return _FAIL, p
        n += 1
        p += 2
        if np.int64(data[p]) != _COMMA:
            return n, p
        p += 1


@part
def _is_form(data: Bytes, p: int, end: int, form: Bytes) -> bool:
    """Whether the bytes from ``p`` to the end are of a form (see ``_B_TRADE``)."""
    for k in range(len(form)):
        wanted = np.int64(form[k])
        first = p
        if wanted == 35:  # #
            while p < end and np.int64(data[p]) >= _ZERO and np.int64(data[p]) <= _NINE:
                p += 1
            if p == first or (p - first > 1 and np.int64(data[first]) == _ZERO):
                return False
        elif wanted == 36:  # $
            while p < end:
                c = np.int64(data[p])
                if not (_ZERO <= c <= _NINE or c == _DOT or 65 <= c <= 90):
                    break
                p += 1
            if p == first:
                return False
        elif wanted == 63:  # ?
            p = _literal(data, p, end, _TRUE)
            if p < 0:
                p = _literal(data, first, end, _FALSE)
            if p < 0:
                return False
        elif p < end and np.int64(data[p]) == wanted:
            p += 1
        else:
            return False
    return bool(p == end)


@part
def _name_end(data: Bytes, p: int, end: int) -> int:
    """Position after the lower-case name of a stream, -1 if there is none."""
    name = p
    while p < end and p - name < 24:
        c = np.int64(data[p])
        if not (97 <= c <= 122 or _ZERO <= c <= _NINE):  # a-z 0-9
            break
        p += 1
    return p if p > name else _FAIL


@part
def _binance_window(data: Bytes, p: int, end: int, px: Ints, qty: Ints, at: int) -> tuple[int, int, int]:
    """The rest of a combined partial depth, from its depth on: (bids, asks, lastUpdateId), bids -1 if of another grammar.

    Bids are written at ``at``, asks at ``at + MAX_LEVELS``.
    """
    depth, p = _digits(data, p, end)
    if p < 0 or not (depth == 5 or depth == 10 or depth == 20):
        return _FAIL, 0, 0
    after = _literal(data, p, end, _B_100MS)
    if after >= 0:
        p = after
    p = _literal(data, p, end, _B_ID)
    if p < 0:
        return _FAIL, 0, 0
    update_id, p = _digits(data, p, end)
    p = _literal(data, p, end, _B_BIDS)
    if p < 0:
        return _FAIL, 0, 0
    bids, p = _side(data, p, end, px, qty, at, _WINDOW)
    if bids < 0:
        return _FAIL, 0, 0
    p = _literal(data, p, end, _B_ASKS)
    if p < 0:
        return _FAIL, 0, 0
    asks, p = _side(data, p, end, px, qty, at + MAX_LEVELS, _WINDOW)
    if asks < 0 or _literal(data, p, end, _B_END) != end:
        return _FAIL, 0, 0
    return bids, asks, update_id


@part
def _binance_change(
    data: Bytes, p: int, end: int, name: int, name_stop: int, px: Ints, qty: Ints, at: int
) -> tuple[int, int, int, int, int]:
    """The rest of a combined depth change: (bids, asks, E, U, u), bids -1 if of another grammar. Asks follow the bids."""
    after = _literal(data, p, end, _B_100MS)
    if after >= 0:
        p = after
    p = _literal(data, p, end, _B_EVENT)
    if p < 0:
        return _FAIL, 0, 0, 0, 0
    event_ms, p = _digits(data, p, end)
    p = _literal(data, p, end, _B_SYMBOL)
    if p < 0 or p + name_stop - name > end:
        return _FAIL, 0, 0, 0, 0
    for k in range(name_stop - name):
        c = np.int64(data[name + k])
        upper = c - 32 if c >= 97 else c
        if np.int64(data[p + k]) != upper:
            return _FAIL, 0, 0, 0, 0
    p = _literal(data, p + name_stop - name, end, _B_FIRST)
    if p < 0:
        return _FAIL, 0, 0, 0, 0
    first_id, p = _digits(data, p, end)
    p = _literal(data, p, end, _B_LAST)
    if p < 0:
        return _FAIL, 0, 0, 0, 0
    last_id, p = _digits(data, p, end)
    p = _literal(data, p, end, _B_B)
    if p < 0:
        return _FAIL, 0, 0, 0, 0
    bids, p = _side(data, p, end, px, qty, at, _CHANGES)
    if bids < 0:
        return _FAIL, 0, 0, 0, 0
    p = _literal(data, p, end, _B_A)
    if p < 0:
        return _FAIL, 0, 0, 0, 0
    asks, p = _side(data, p, end, px, qty, at + bids, _CHANGES)
    if asks < 0 or _literal(data, p, end, _B_END) != end:
        return _FAIL, 0, 0, 0, 0
    return bids, asks, event_ms, first_id, last_id


@part
def level_check(px: Ints, qty: Ints, at: int, n_bid: int, n_ask: int) -> Value:
    """A checksum of the levels of one row, for the digest.

    Sums wrap on purpose. Factors are odd, so that a change of any one level changes the sum, and differ by level, so that order
    counts; a sum of independent products took half the time of a chain of hashes.
    """
    total = np.int64(n_bid) * 0x9E3779B1 + n_ask
    for j in range(n_bid + n_ask):
        total += (px[at + j] * 0x100000001B3 + qty[at + j] * 0x1B873593) * (2 * j + 1)
    return total


@part
def _write_levels(u: Value, i: int, book: int, what: int, reason: int, at: int, n_bid: int, n_ask: int) -> None:
    """Fill the row of a frame whose levels stand at ``at``, and keep them."""
    u.what[i] = what
    u.reason[i] = reason
    u.book[i] = book
    u.start[i] = at
    u.n_bid[i] = n_bid
    u.n_ask[i] = n_ask
    u.check[i] = level_check(u.px_e8, u.qty_e8, at, n_bid, n_ask)
    u.cursor[0] = at + n_bid + n_ask


@part
def _write_book(u: Value, i: int, book: int, at: int, n: int, m: int, totals: Ints) -> None:
    """Settle a full window (``n`` bids at ``at``, ``m`` asks at ``at + MAX_LEVELS``) and fill its row."""
    bids, asks, why = settle(u.px_e8, u.qty_e8, at, n, at + _WINDOW, m, totals)
    if book < 0:
        u.what[i] = 0
        u.reason[i] = _R_UNKNOWN
        return
    _write_levels(u, i, book, _BOOK if why == _R_BOOK else _DOUBT, why, at, bids, asks)


@part
def _unread(u: Value, rows: NDArray[np.int64]) -> int:
    unread = 0
    for r in range(len(rows)):
        unread += u.what[rows[r]] == _UNREAD
    return unread


@kernel
def scan_upbit(data: Bytes, rows: NDArray[np.int64], names: Names, updates: Value, totals: Ints) -> int:
    """Scan the frames ``rows`` of a block into update columns; rows of another grammar become UNREAD. Returns how many did."""
    u = updates[0]
    for r in range(len(rows)):
        i = rows[r]
        s = u.offsets[i]
        end = u.offsets[i + 1]
        at = u.cursor[0]
        # {"type": and {"ty": differ in their fifth byte
        if end - s > 4 and np.int64(data[s + 4]) == _QUOTE:
            units, book, ms = _upbit_simple(data, s, end, names, u.px_e8, u.qty_e8, at, totals)
        else:
            units, book, ms = _upbit_default(data, s, end, names, u.px_e8, u.qty_e8, at, totals)
        if units < 0:
            told = _upbit_told(data, s, end)
            u.what[i] = 0 if told else _UNREAD
            if told:
                u.reason[i] = told
            continue
        u.exchange_ms[i] = ms
        u.first_id[i] = 0
        u.update_id[i] = 0
        _write_book(u, i, book, at, units, units, totals)
    return _unread(u, rows)


@kernel
def scan_binance(data: Bytes, rows: NDArray[np.int64], names: Names, updates: Value, totals: Ints) -> int:
    """Scan the frames ``rows`` of a block into update columns; rows of another grammar become UNREAD. Returns how many did."""
    u = updates[0]
    for r in range(len(rows)):
        i = rows[r]
        s = u.offsets[i]
        end = u.offsets[i + 1]
        at = u.cursor[0]
        u.what[i] = _UNREAD
        name = _literal(data, s, end, _B_HEAD)
        if name < 0:
            continue
        name_stop = _name_end(data, name, end)
        p = _literal(data, name_stop, end, _B_DEPTH)
        if p < 0 or p >= end:
            if name_stop > 0 and _is_form(data, name_stop, end, _B_BOOK_TICKER):
                u.what[i] = 0
                u.reason[i] = _R_BOOK_TICKER
            elif name_stop > 0 and _is_form(data, name_stop, end, _B_TRADE):
                u.what[i] = 0
                u.reason[i] = _R_TRADE
            continue
        book = _find_book(data, name, name_stop, names)
        if np.int64(data[p]) > _ZERO and np.int64(data[p]) <= _NINE:
            bids, asks, last_id = _binance_window(data, p, end, u.px_e8, u.qty_e8, at)
            if bids >= 0:
                u.exchange_ms[i] = 0
                u.first_id[i] = 0
                u.update_id[i] = last_id
                _write_book(u, i, book, at, bids, asks, totals)
            continue
        bids, asks, event_ms, first_id, last_id = _binance_change(data, p, end, name, name_stop, u.px_e8, u.qty_e8, at)
        if bids < 0 or first_id > last_id:
            continue
        u.exchange_ms[i] = event_ms
        u.first_id[i] = first_id
        u.update_id[i] = last_id
        if book < 0:
            u.what[i] = 0
            u.reason[i] = _R_UNKNOWN
        else:
            _write_levels(u, i, book, _CHANGE, _R_DIFF, at, bids, asks)
    return _unread(u, rows)


@part
def _is_book(px: Ints, qty: Ints, at: int, n: int, m: int) -> bool:
    """Whether ``n`` bids and ``m`` asks from ``at`` on are a book: nothing empty, best first, not crossed."""
    for k in range(at, at + n + m):
        if px[k] == 0 or qty[k] == 0:
            return False
        if (k > at and k < at + n and px[k] >= px[k - 1]) or (k > at + n and px[k] <= px[k - 1]):
            return False
    return bool(n == 0 or m == 0 or px[at] < px[at + n])


@kernel
def scan_snapshot(data: Bytes, i: int, updates: Value) -> None:
    """Scan a body of Binance's ``GET /api/v3/depth`` in frame ``i``; one of another grammar, or no sound book, becomes UNREAD."""
    u = updates[0]
    u.what[i] = _UNREAD
    end = u.offsets[i + 1]
    at = u.cursor[0]
    last_id, p = _digits(data, _literal(data, u.offsets[i], end, _S_HEAD), end)
    p = _literal(data, p, end, _B_BIDS)
    if p < 0 or last_id == 0:
        return
    bids, p = _side(data, p, end, u.px_e8, u.qty_e8, at, _CHANGES)
    if bids < 0:
        return
    p = _literal(data, p, end, _B_ASKS)
    if p < 0:
        return
    asks, p = _side(data, p, end, u.px_e8, u.qty_e8, at + bids, _CHANGES)
    if asks < 0 or _literal(data, p, end, _S_END) != end or not _is_book(u.px_e8, u.qty_e8, at, bids, asks):
        return
    u.exchange_ms[i] = 0
    u.first_id[i] = 0
    u.update_id[i] = last_id
    _write_levels(u, i, -1, _SNAPSHOT, _R_REST, at, bids, asks)


@kernel
def write_levels(updates: Value, i: int, book: int, what: int, reason: int, at: int, n_bid: int, n_ask: int) -> None:
    """``_write_levels`` for Python."""
    _write_levels(updates[0], i, book, what, reason, at, n_bid, n_ask)


@kernel
def write_book(updates: Value, i: int, book: int, at: int, n: int, m: int, totals: Ints) -> None:
    """``_write_book`` for Python."""
    _write_book(updates[0], i, book, at, n, m, totals)
