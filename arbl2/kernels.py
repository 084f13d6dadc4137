"""The compiled loop, and the one-row kernels it is made of.

One row of updates takes this way: orders that arrived before it meet the book as it stood (``_advance``); the row changes a book
(``apply``: a whole window, a change of a full book, a snapshot), which resolves the orders that waited for it; the aggregator
computes the edges of every pair the book belongs to (``_look``); the policy asks for a trade or not (``threshold``, or a Python
policy outside); risk and executor answer (``_submit``). ``run`` loops over these for a block of rows. Live trading calls it with
one row, replay with thousands.

State is one record (``state_dtype``) of arrays, most of them structured (dtypes below), so that a row of it reads the same
compiled, uncompiled and in Python. A book is a window of at most 30 levels a side: ``s.window`` says where in the level arrays
it stands. A window that came in the block at hand is used where it was decoded; ``come_home`` copies the last one of each book
to its own place before the block's room is used again. Books that are built from depth changes also have a ladder: every known
level, worst first, so that the changes near the touch move little.

Prices, sizes and amounts are int64 of 10^-8; products are split into whole and fractional units so that they stay exact in 64
bits, and what does not fit is an overflow that refuses the order. Only edges are floats (a signal, not money): one division, one
product and one subtraction of IEEE doubles, the same on every machine.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.events import DECISION_DTYPE, FILL_DTYPE, Direction, FillStatus, Intent, Outcome, Side
from arbl2.frames import BINANCE, UPBIT
from arbl2.jit import kernel, part
from arbl2.updates import MAX_CHANGES, MAX_LEVELS, UPDATES, Reason, What

if TYPE_CHECKING:
    from numpy.typing import NDArray

    State = Any  # a record of ``state_dtype``, or the array that holds it
    Ints = NDArray[np.int64]

ORDER_SLOTS = 512
"""Orders that can be on their way, or wait to be resolved, at the same time."""
EVENT_ROWS = 8_192
"""Room for decisions and for fills until they must be collected."""
EATEN_CAP = 4 * MAX_LEVELS
"""Levels per book side whose takes are remembered."""
OUT_OF_SIGHT_NS = 60_000_000_000
"""How long a take is remembered after its level has left the displayed window."""
LADDER = 8_192
"""Levels a side of a full book; of more, the farthest are forgotten."""
WAIT_ROWS = 256
WAIT_LEVELS = 2 * MAX_CHANGES
"""Depth changes, and their levels, that are kept for a book that waits for its snapshot."""
SESSION_CONNS = 1 << 20
"""Connection numbers of a session; in a merged run those of the next one start here (``conn`` // this = session rank)."""
ASKERS = 64
"""Sessions whose REST requests are told apart at the same time."""
REASONS = 64
"""Room for every ``Reason``."""
GAP_MS = 1_000
GAP_S = 600
"""The histogram of time between updates of a book: buckets of 1 ms up to a second, then of 1 s; the last is "or longer"."""

BOOK_STATE = np.dtype(
    [
        ("last_ns", "<i8"),  # engine time of the last good frame
        ("update_id", "<i8"),
        ("exchange_ms", "<i8"),
        ("updates", "<i8"),
        ("checksum", "<i8"),  # over every level and every time of every update, in order
        ("conn", "<i4"),
        ("venue", "<i4"),
        ("pair", "<i4"),  # -1: of no pair
        ("is_fx", "<i4"),
        ("connected", "<i4"),
        ("trusted", "<i4"),
        ("windowed", "<i4"),  # 1: a whole window has come, so depth changes are left alone
        ("synced", "<i4"),  # 1: the ladder is a snapshot with every change since
        ("held_rows", "<i4"),  # depth changes kept until the snapshot comes
        ("held_levels", "<i4"),
        ("rungs", "<i8", (2,)),  # levels of the ladder by side
        ("known_px", "<i8", (2,)),  # the worst price up to which every level is known
    ]
)

HELD = np.dtype(
    [
        ("first_id", "<i8"),
        ("update_id", "<i8"),
        ("exchange_ms", "<i8"),
        ("conn", "<i4"),  # -1: closed since, or messages of it were lost
        ("start", "<i4"),
        ("n_bid", "<i4"),
        ("n_ask", "<i4"),
    ]
)

PAIR_STATE = np.dtype(
    [
        ("upbit_book", "<i8"),
        ("binance_book", "<i8"),
        ("lot_e8", "<i8"),  # 0: rules unknown, not traded
        ("min_notional_e8", "<i8", (3,)),  # by venue code
        ("size_krw_e8", "<i8"),
        ("max_position_krw_e8", "<i8"),
        ("entry_bps", "<f8"),
        ("exit_bps", "<f8"),
        ("in_flight", "<i8"),  # orders decided and not yet executed
        ("position_e8", "<i8", (3,)),  # coin bought (+) or sold (-) by venue code since the start
        ("episode", "<i8", (2,)),  # 1 while the policy goes on asking: sell_upbit, buy_upbit
        ("refused", "<i8", (2,)),  # last refusal written in the episode
    ]
)

CONFIG = np.dtype(
    [
        ("stale_ns", "<i8"),
        ("depth", "<i8"),  # AUTO, WINDOW_ONLY or CHANGES_ONLY
        ("fx_stale_ns", "<i8"),
        ("fx_book", "<i8"),  # -1: none
        ("latency_ns", "<i8", (3,)),  # by venue code
        ("fee_ppm", "<i8", (3,)),
        ("fee_in_base", "<i8", (3,)),  # 1: a buy pays its fee in the coin received
    ]
)

COUNTERS = np.dtype(
    [
        ("books", "<i8"),
        ("pairs", "<i8"),
        ("time_ns", "<i8"),
        ("active", "<i8"),  # orders in the table
        ("next_due_ns", "<i8"),
        ("asked", "<i8", (3, ASKERS)),  # book whose snapshot was asked for last, by venue code and session rank; -1: none
        ("asks", "<i8", (3, ASKERS)),  # 1: requests are on the tape
        ("last_decision", "<i8"),
        ("last_order", "<i8"),
        ("overflow", "<i8"),  # order whose amount did not fit in 64 bits; the run must stop
        ("decisions", "<i8"),  # rows in the decision buffer
        ("fills", "<i8"),  # rows in the fill buffer
        ("refusals", "<i8", (8,)),  # every refusal by Outcome, written or not
    ]
)

VIEW = np.dtype(
    [
        ("time_ns", "<i8"),
        ("seq", "<i8"),
        ("usable", "<i8"),  # both books ACTIVE and trusted, FX fresh
        ("sell_upbit_bps", "<f8"),  # edge of selling on Upbit and buying on Binance; NaN: a side is missing
        ("buy_upbit_bps", "<f8"),
        ("sell_upbit_shown_bps", "<f8"),  # the same edges at the displayed prices, our own takes not subtracted
        ("buy_upbit_shown_bps", "<f8"),
        ("upbit_bid_e8", "<i8"),  # best prices net of what we took; 0 = none
        ("upbit_ask_e8", "<i8"),
        ("binance_bid_e8", "<i8"),
        ("binance_ask_e8", "<i8"),
        ("fx_bid_e8", "<i8"),
        ("fx_ask_e8", "<i8"),
        ("upbit_age_ns", "<i8"),
        ("binance_age_ns", "<i8"),
        ("fx_age_ns", "<i8"),
    ]
)


@functools.cache
def state_dtype(books: int) -> np.dtype[Any]:
    """Everything the loop reads and writes, as one record: kernels hand on its address and nothing else.

    Sizes are part of the type, and each type is compiled apart, so there are few: ``books`` is one of ``SIZES``. Unused room is
    never touched and takes no memory. ``B`` books, half as many pairs, ``L`` levels a side:

    ``window``: [B, 2, 3], start, levels and takes remembered by side (0 bids, 1 asks); ``eaten``: [B, 2, takes, 3] (price,
    size, last displayed); ``gaps``: [B, buckets]; ``rung_*``: [B, 2, LADDER], worst first, ``rung_from`` a ``LevelFrom``;
    ``held*``: [B, rows or levels], depth changes that wait for a snapshot; ``balance``, ``locked``: [3, 1 + pairs] by venue
    code, column 0 the quote currency, column 1 + k the coin of pair k; ``order_state``: [orders, 4], phase, book, lock and
    connection; ``taken``: [orders, L, 2], what each order took; ``reasons``: [3, REASONS], frames by venue code and ``Reason``;
    ``u``: the updates of the block at hand. Whatever is not said otherwise is int64.
    """
    pairs = books // 2
    return np.dtype(
        [
            ("books", BOOK_STATE, (books,)),
            ("window", "<i8", (books, 2, 3)),
            ("eaten", "<i8", (books, 2, EATEN_CAP, 3)),
            ("gaps", "<i8", (books, GAP_MS + GAP_S)),
            ("rung_px", "<i8", (books, 2, LADDER)),
            ("rung_qty", "<i8", (books, 2, LADDER)),
            ("rung_from", "<u1", (books, 2, LADDER)),
            ("held", HELD, (books, WAIT_ROWS)),
            ("held_px", "<i8", (books, WAIT_LEVELS)),
            ("held_qty", "<i8", (books, WAIT_LEVELS)),
            ("pairs", PAIR_STATE, (pairs,)),
            ("config", CONFIG, (1,)),
            ("balance", "<i8", (3, 1 + pairs)),
            ("locked", "<i8", (3, 1 + pairs)),
            ("orders", FILL_DTYPE, (ORDER_SLOTS,)),
            ("no_order", FILL_DTYPE, (1,)),  # zeros
            ("order_state", "<i8", (ORDER_SLOTS, 4)),
            ("taken", "<i8", (ORDER_SLOTS, MAX_LEVELS, 2)),
            ("counters", COUNTERS, (1,)),
            ("reasons", "<i8", (3, REASONS)),
            ("decisions", DECISION_DTYPE, (EVENT_ROWS,)),
            ("fills", FILL_DTYPE, (EVENT_ROWS,)),
            ("seen", VIEW, (1,)),
            ("ask", "<i8", (4,)),
            ("u", UPDATES),
        ]
    )


i8: Any = np.int64
"""Makes a number of any width an int64: the one width of the loop, so that each kernel is compiled once."""
SIZES = (32, 1_024)
"""Numbers of books that the loop is compiled for."""
_E8 = 100_000_000
_FAR = 2**62
_CALM = 9.0e18  # amounts above this may not fit in int64
# Typed constants: a plain 0 or True is a type of its own to numba, and would compile every kernel it is passed to once more.
_BID: Any = np.int64(0)
_ASK: Any = np.int64(1)
_YES: Any = np.bool_(True)
_NO: Any = np.bool_(False)
_FIRST: Any = np.int64(0)
_DEAD = -1  # in place of the connection of a change that waits: it closed, or lost messages
_START = 0  # window[book, side, ...]: where it stands
_LEVELS = 1  # levels displayed
_TAKES = 2  # and takes remembered
_PX = 0  # columns of a take
_QTY = 1
_SEEN = 2  # when its level was last displayed
_LARGEST = 2**63 - 1
_IN_FLIGHT = 1
_AWAITS = 2  # executed, waits for the first book after its arrival
AUTO, WINDOW_ONLY, CHANGES_ONLY = 0, 1, 2
"""Which messages make a Binance book: windows once one has come, windows only, or depth changes only."""
FROM_SNAPSHOT, FROM_CHANGE, BEYOND = np.uint8(1), np.uint8(2), np.uint8(3)

# What ``apply`` did.
_IDLE: Any = np.int64(0)
_CHANGED: Any = np.int64(1)
_REFUSED: Any = np.int64(2)  # the row's reason is set

_BOOK = int(What.BOOK)
_DOUBT = int(What.DOUBT)
_CLOSED = int(What.CLOSED)
_LOST = int(What.LOST)
_CHANGE = int(What.CHANGE)
_REQUESTED = int(What.ASKED)
_SNAPSHOT = int(What.SNAPSHOT)
_ID_REGRESS = int(Reason.ID_REGRESS)
_COPY = int(Reason.COPY)
_GAP = int(Reason.SEQUENCE_GAP)
_CROSSED = int(Reason.CROSSED)
_UPBIT: Any = np.int64(UPBIT)
_BINANCE: Any = np.int64(BINANCE)
_BUY: Any = np.int64(Side.BUY)
_SELL: Any = np.int64(Side.SELL)
_SELL_UPBIT = int(Direction.SELL_UPBIT)
_BUY_UPBIT = int(Direction.BUY_UPBIT)
_ENTRY = int(Intent.ENTRY)
_EXIT = int(Intent.EXIT)
_FILLED = int(FillStatus.FILLED)
_PARTIAL = int(FillStatus.PARTIAL)
_UNFILLED = int(FillStatus.UNFILLED)
_NO_BOOK = int(FillStatus.NO_BOOK)
_ACCEPTED = int(Outcome.ACCEPTED)
_MIN_NOTIONAL = int(Outcome.MIN_NOTIONAL)
_NO_BALANCE = int(Outcome.NO_BALANCE)
_OVERFLOW = int(Outcome.OVERFLOW)
_ORDERS_FULL = int(Outcome.ORDERS_FULL)
_NO_RULES = int(Outcome.NO_RULES)
_BAD_ASK = int(Outcome.BAD_ASK)


# --- arithmetic -------------------------------------------------------------------------------------------------------


@kernel
def notional_e8(px: int, qty: int, up: bool) -> int:
    """price x size in 10^-8 of the quote currency, rounded up or down; -1 if it does not fit in 64 bits."""
    if np.float64(px) * np.float64(qty) / _E8 > _CALM:
        return -1
    px_whole, px_part = px // _E8, px % _E8
    qty_whole, qty_part = qty // _E8, qty % _E8
    parts = px_part * qty_part
    value = px_whole * qty_whole * _E8 + px_whole * qty_part + px_part * qty_whole + parts // _E8
    if up and parts % _E8 != 0:
        value += 1
    return value


@kernel
def fee_e8(amount: int, ppm: int) -> int:
    """``ppm`` millionths of an amount, rounded up."""
    whole, part = amount // 1_000_000, amount % 1_000_000
    return whole * ppm + (part * ppm + 999_999) // 1_000_000


@kernel
def size_for_e8(amount: int, px: int) -> int:
    """How much coin ``amount`` buys at ``px``, rounded down; -1 if it does not fit in 64 bits."""
    if px <= 0 or px > _FAR // 10 or np.float64(amount) / np.float64(px) * _E8 > _CALM:
        return -1
    size = amount // px
    rest = amount % px
    for _ in range(8):  # long division, a decimal digit at a time
        rest *= 10
        size = size * 10 + rest // px
        rest %= px
    return size


# --- books ------------------------------------------------------------------------------------------------------------


@part
def _eaten_at(s: State, b: int, side: int, px: int) -> int:
    """What our own orders took from a level and the venue has not shown anew."""
    for k in range(s.window[b, side, _TAKES]):
        if s.eaten[b, side, k, _PX] == px:
            return int(s.eaten[b, side, k, _QTY])
    return 0


@part
def _eat(s: State, b: int, side: int, px: int, take: int, time_ns: int) -> None:
    """Remember a take. A full table forgets the level farthest from the touch: all but 30 of its levels are out of sight."""
    count = s.window[b, side, _TAKES]
    at = count
    for k in range(count):
        if s.eaten[b, side, k, _PX] == px:
            s.eaten[b, side, k, _QTY] += take
            return
    if count < EATEN_CAP:
        s.window[b, side, _TAKES] = count + 1
    else:
        at = 0
        for k in range(1, count):
            farther = s.eaten[b, side, k, _PX] - s.eaten[b, side, at, _PX]
            if (side == _ASK and farther > 0) or (side == _BID and farther < 0):
                at = k
    s.eaten[b, side, at, _PX] = px
    s.eaten[b, side, at, _QTY] = take
    s.eaten[b, side, at, _SEEN] = time_ns


@part
def _heal_eaten(s: State, b: int, side: int, time_ns: int) -> None:
    """After an update: what we took stays taken, but never more than is displayed; a level that is gone is forgotten.

    A level beyond the displayed window is not known to be gone and stays remembered, for ``OUT_OF_SIGHT_NS`` at most.
    """
    n = s.window[b, side, _LEVELS]
    at = s.window[b, side, _START]
    worst = s.u.px_e8[at + n - 1] if n > 0 else 0
    keep = 0
    for k in range(s.window[b, side, _TAKES]):
        p = s.eaten[b, side, k, _PX]
        left = s.eaten[b, side, k, _QTY]
        seen = s.eaten[b, side, k, _SEEN]
        if n == 0 or (side == _ASK and p <= worst) or (side == _BID and p >= worst):
            shown = i8(0)
            for j in range(n):
                if s.u.px_e8[at + j] == p:
                    shown = s.u.qty_e8[at + j]
                    break
            left = min(left, shown)
            seen = time_ns
        elif time_ns - seen > OUT_OF_SIGHT_NS:
            left = i8(0)
        if left > 0:
            s.eaten[b, side, keep, _PX] = p
            s.eaten[b, side, keep, _QTY] = left
            s.eaten[b, side, keep, _SEEN] = seen
            keep += 1
    s.window[b, side, _TAKES] = keep


@part
def _touch(s: State, b: int, side: int) -> int:
    """Best price that still has something to take; 0 if there is none."""
    if s.window[b, side, _TAKES] == 0:
        return _shown(s, b, side)
    at = s.window[b, side, _START]
    for j in range(s.window[b, side, _LEVELS]):
        p = s.u.px_e8[at + j]
        if s.u.qty_e8[at + j] > _eaten_at(s, b, side, p):
            return int(p)
    return 0


@part
def _shown(s: State, b: int, side: int) -> int:
    """Best displayed price; 0 if there is none."""
    return int(s.u.px_e8[s.window[b, side, _START]]) if s.window[b, side, _LEVELS] > 0 else 0


@part
def _depth(s: State, b: int, side: int, limit: int) -> int:
    """Displayed size at ``limit`` or better (what others show; our own takes are not subtracted)."""
    total = 0
    at = s.window[b, side, _START]
    for j in range(s.window[b, side, _LEVELS]):
        p = s.u.px_e8[at + j]
        if (side == _ASK and p > limit) or (side == _BID and p < limit) or total > _FAR:
            break
        total += min(s.u.qty_e8[at + j], _FAR)
    return total


@part
def _displayed_quote(s: State, b: int, side: int, size: int) -> int:
    """What taking ``size`` from the displayed book costs or pays, best level first; -1 on overflow."""
    left = size
    quote = 0
    at = s.window[b, side, _START]
    for j in range(s.window[b, side, _LEVELS]):
        if left == 0:
            break
        take = min(left, s.u.qty_e8[at + j])
        part = notional_e8(s.u.px_e8[at + j], take, side == _ASK)
        if part < 0 or quote > _LARGEST - part:
            return -1
        quote += part
        left -= take
    return quote


@part
def _walk(s: State, b: int, side: int, limit: int, size: int, slot: int, execute: bool, time_ns: int) -> tuple[int, int, int]:
    """Take up to ``size`` at ``limit`` or better, level by level, from what is displayed and not yet eaten.

    Returns (filled, quote, levels), filled -1 if an amount does not fit in 64 bits. With ``execute`` the takes are remembered and
    noted in ``taken[slot]`` as this order's own; without it nothing changes, and the takes noted there do not count.
    """
    filled = 0
    quote = 0
    levels = 0
    at = s.window[b, side, _START]
    for j in range(s.window[b, side, _LEVELS]):
        p = s.u.px_e8[at + j]
        if filled == size or (side == _ASK and p > limit) or (side == _BID and p < limit):
            break
        gone = _eaten_at(s, b, side, p)
        if not execute:
            for k in range(MAX_LEVELS):
                if s.taken[slot, k, _PX] == p:
                    gone -= s.taken[slot, k, _QTY]
        free = s.u.qty_e8[at + j] - max(gone, 0)
        if free <= 0:
            continue
        take = min(free, size - filled)
        part = notional_e8(p, take, side == _ASK)
        if part < 0 or quote > _LARGEST - part:
            return -1, 0, 0
        if execute:
            _eat(s, b, side, p, take, time_ns)
            s.taken[slot, levels, _PX] = p
            s.taken[slot, levels, _QTY] = take
        filled += take
        quote += part
        levels += 1
    return filled, quote, levels


# --- orders -----------------------------------------------------------------------------------------------------------


@part
def _write_fill(s: State, slot: int) -> None:
    """Move an order from the table to the fill events and close the gap it leaves."""
    s.fills[s.counters[0]["fills"]] = s.orders[slot]
    s.counters[0]["fills"] += 1
    last = s.counters[0]["active"] - 1
    for k in range(slot, last):
        s.orders[k] = s.orders[k + 1]
        for j in range(4):
            s.order_state[k, j] = s.order_state[k + 1, j]
        for j in range(MAX_LEVELS):
            for column in (_PX, _QTY):
                s.taken[k, j, column] = s.taken[k + 1, j, column]
    s.counters[0]["active"] = last


@part
def _next_due(s: State) -> int:
    """Slot of the order in flight that arrives first (ties: the one sent first), or -1; notes when that is."""
    best = -1
    due = _FAR
    for k in range(s.counters[0]["active"]):
        if s.order_state[k, 0] == _IN_FLIGHT and s.orders[k]["arrive_ns"] < due:
            due = s.orders[k]["arrive_ns"]
            best = k
    s.counters[0]["next_due_ns"] = due
    return best


@part
def _execute(s: State, slot: int) -> None:
    """An order meets the book as it stood at its arrival: walk, fee, ledger."""
    order = s.orders[slot]
    pair = order["symbol"]
    venue = order["venue"]
    b = s.order_state[slot, 1]
    buys = order["side"] == _BUY
    cash, coin = 0, pair + 1
    if buys:
        s.locked[venue, cash] -= s.order_state[slot, 2]
    else:
        s.locked[venue, coin] -= s.order_state[slot, 2]
    s.pairs[pair]["in_flight"] -= 1
    fresh = order["arrive_ns"] - s.books[b]["last_ns"] <= s.config[0]["stale_ns"]
    if s.books[b]["connected"] == 0 or s.books[b]["trusted"] == 0 or not fresh:
        order["status"] = _NO_BOOK
        _write_fill(s, slot)
        return
    side = _ASK if buys else _BID
    filled, quote, levels = _walk(s, b, side, order["limit_px_e8"], order["size_e8"], slot, _YES, order["arrive_ns"])
    cash_after = s.balance[venue, cash] // 2 + quote // 2 + 2
    coin_after = s.balance[venue, coin] // 2 + filled // 2 + 2
    if filled < 0 or cash_after > _FAR or coin_after > _FAR:
        s.counters[0]["overflow"] = order["order_id"]
        return
    order["filled_e8"] = filled
    order["quote_e8"] = quote
    order["levels"] = levels
    order["before_ns"] = s.books[b]["last_ns"]
    order["before_e8"] = min(order["visible_e8"], _depth(s, b, side, order["limit_px_e8"]))
    if filled == order["size_e8"]:
        order["status"] = _FILLED
    elif filled > 0:
        order["status"] = _PARTIAL
    else:
        order["status"] = _UNFILLED
    in_base = buys and s.config[0]["fee_in_base"][venue] == 1
    fee = fee_e8(filled if in_base else quote, s.config[0]["fee_ppm"][venue])
    order["fee_e8"] = fee
    order["fee_in_base"] = 1 if in_base else 0
    if buys:
        got = filled - fee if in_base else filled
        s.balance[venue, cash] -= quote if in_base else quote + fee
        s.balance[venue, coin] += got
        s.pairs[pair]["position_e8"][venue] += got
    else:
        s.balance[venue, cash] += quote - fee
        s.balance[venue, coin] -= filled
        s.pairs[pair]["position_e8"][venue] -= filled
    s.order_state[slot, 0] = _AWAITS
    s.order_state[slot, 3] = s.books[b]["conn"]


@part
def _advance(s: State, time_ns: int) -> None:
    """Execute every order that arrived before ``time_ns``, in the order of arrival.

    An order that arrives at the very instant of a frame meets the book after that frame: B- is the last book received at or
    before the arrival.
    """
    while s.counters[0]["next_due_ns"] < time_ns:
        slot = _next_due(s)
        if slot < 0 or s.counters[0]["next_due_ns"] >= time_ns:
            break
        _execute(s, slot)
        if s.counters[0]["overflow"] != 0:
            return
        _next_due(s)


@part
def _resolve(s: State, b: int, time_ns: int, good: bool) -> None:
    """Write the executed orders of book ``b``: ``good`` if its new state is the first trusted book after their arrival."""
    slot = i8(0)
    while slot < s.counters[0]["active"]:
        if s.order_state[slot, 0] != _AWAITS or s.order_state[slot, 1] != b:
            slot += 1
            continue
        order = s.orders[slot]
        if good and s.order_state[slot, 3] == s.books[b]["conn"]:
            side = _ASK if order["side"] == _BUY else _BID
            order["after_ns"] = time_ns
            order["after_e8"] = min(order["visible_e8"], _depth(s, b, side, order["limit_px_e8"]))
            filled, quote, _ = _walk(s, b, side, order["limit_px_e8"], order["size_e8"], slot, _NO, time_ns)
            order["after_filled_e8"] = max(filled, 0)
            order["after_quote_e8"] = quote
            order["resolved"] = 1 if filled >= 0 else 0
        _write_fill(s, slot)


# --- one row ----------------------------------------------------------------------------------------------------------


@part
def _renew(s: State, b: int, time_ns: int, conn: int, update_id: int, exchange_ms: int) -> None:
    """Note that a good message of the book came."""
    book = s.books[b]
    if book["updates"] > 0 and conn == book["conn"]:
        gap_ms = (time_ns - book["last_ns"]) // 1_000_000
        s.gaps[b, gap_ms if gap_ms < GAP_MS else min(GAP_MS - 1 + gap_ms // 1_000, GAP_MS + GAP_S - 1)] += 1
    book["last_ns"] = time_ns
    book["conn"] = conn
    book["connected"] = 1
    book["trusted"] = 1
    book["update_id"] = update_id
    book["exchange_ms"] = exchange_ms
    book["updates"] += 1


@part
def _fold(s: State, b: int, time_ns: int, check: int) -> None:
    """Fold what came, and when, into the checksum of the book. It wraps on purpose."""
    s.books[b]["checksum"] = ((s.books[b]["checksum"] ^ time_ns) + check) * 0x5851F42D4C957F2D


@part
def _settle(s: State, b: int, time_ns: int) -> None:
    """The book has changed: orders that waited for it, and what we took from it."""
    if s.counters[0]["active"] > 0:
        _resolve(s, b, time_ns, _YES)
    if s.window[b, _BID, _TAKES] > 0:
        _heal_eaten(s, b, _BID, time_ns)
    if s.window[b, _ASK, _TAKES] > 0:
        _heal_eaten(s, b, _ASK, time_ns)


@part
def _doubt(s: State, b: int, time_ns: int) -> None:
    """The book cannot be trusted until its next good message."""
    s.books[b]["trusted"] = 0
    _resolve(s, b, time_ns, _NO)


@part
def _leave(s: State, venue: int, conn: int, closed: bool, time_ns: int) -> None:
    """A connection closed, or messages of it were dropped: every book that it fed.

    Changes of it that wait for a snapshot stay, but do not show any more that their connection lives.
    """
    for k in range(s.counters[0]["books"]):
        book = s.books[k]
        for j in range(book["held_rows"]):
            if book["venue"] == venue and s.held[k, j]["conn"] == conn:
                s.held[k, j]["conn"] = _DEAD
        if book["venue"] == venue and book["conn"] == conn and book["connected"] == 1:
            if closed:
                book["connected"] = 0
            _doubt(s, k, time_ns)


@part
def _is_copy(s: State, b: int, time_ns: int, conn: int, update_id: int, exchange_ms: int) -> bool:
    """In a merged run: a book of another session than the one that feeds it, and not newer than what is known.

    Without ids (Upbit) the venue's own time decides. A book that is not active takes whatever comes.
    """
    book = s.books[b]
    if book["updates"] == 0 or conn // SESSION_CONNS == book["conn"] // SESSION_CONNS:
        return False
    if not _is_active(s, b, time_ns, s.config[0]["stale_ns"]):
        return False
    return bool(update_id <= book["update_id"] if update_id > 0 else exchange_ms <= book["exchange_ms"])


@part
def _window(s: State, i: int, b: int, time_ns: int) -> Any:
    """A whole window replaces the book: it is used where it stands."""
    u = s.u
    conn = i8(u.conn[i])
    update_id = u.update_id[i]
    book = s.books[b]
    if s.config[0]["depth"] == CHANGES_ONLY and u.venue[i] == BINANCE:
        return _IDLE
    if _is_copy(s, b, time_ns, conn, update_id, u.exchange_ms[i]):
        u.reason[i] = _COPY
        return _REFUSED
    if book["windowed"] == 1 and update_id > 0 and conn == book["conn"] and update_id < book["update_id"]:
        u.reason[i] = _ID_REGRESS
        _doubt(s, b, time_ns)
        return _REFUSED
    book["windowed"] = 1
    s.window[b, _BID, _START] = u.start[i]
    s.window[b, _BID, _LEVELS] = u.n_bid[i]
    s.window[b, _ASK, _START] = i8(u.start[i]) + u.n_bid[i]
    s.window[b, _ASK, _LEVELS] = u.n_ask[i]
    _renew(s, b, time_ns, conn, update_id, u.exchange_ms[i])
    _fold(s, b, time_ns, u.check[i])
    _settle(s, b, time_ns)
    return _CHANGED


# --- full books -------------------------------------------------------------------------------------------------------


@part
def _is_known(s: State, b: int, side: int, px: int) -> bool:
    """Every level up to this price is known: it lies within the snapshot's range."""
    known = s.books[b]["known_px"][side]
    return bool(px >= known if side == _BID else px <= known)


@part
def _rung(s: State, b: int, side: int, px: int) -> Any:
    """Where a price stands in the ladder, or would."""
    low = i8(0)
    high = s.books[b]["rungs"][side]
    while low < high:
        middle = (low + high) // 2
        rung = s.rung_px[b, side, middle]
        if (side == _BID and rung < px) or (side == _ASK and rung > px):
            low = middle + 1
        else:
            high = middle
    return low


# Rows move by unsigned numbers: with signed ones numba looks for negative indices at each step, and the compiler no longer sees
# that it is one move of memory (three times as long for the changes of a real book).


@part
def _close_row(column: Any, at: int, last: int) -> None:
    """Row ``at`` goes; those behind it up to ``last`` move down by one."""
    one = np.uint64(1)
    for k in range(np.uint64(at), np.uint64(last)):
        column[k] = column[k + one]


@part
def _open_row(column: Any, at: int, count: int) -> None:
    """Room at ``at``; those from there on, of ``count`` in all, move up by one."""
    one = np.uint64(1)
    top = np.uint64(count)
    for k in range(np.uint64(count - at)):
        column[top - k] = column[top - k - one]


@part
def _set_level(s: State, b: int, side: int, px: int, qty: int) -> None:
    """One level of a depth change: its new size, 0 = gone. A full ladder forgets its worst level, and knows that much less."""
    if px == 0:  # no price: an empty slot
        return
    n = s.books[b]["rungs"][side]
    at = _rung(s, b, side, px)
    if at < n and s.rung_px[b, side, at] == px:
        if qty > 0:
            s.rung_qty[b, side, at] = qty
            s.rung_from[b, side, at] = FROM_CHANGE if _is_known(s, b, side, px) else BEYOND
            return
        _close_row(s.rung_px[b, side], at, n - 1)
        _close_row(s.rung_qty[b, side], at, n - 1)
        _close_row(s.rung_from[b, side], at, n - 1)
        s.books[b]["rungs"][side] = n - 1
        return
    if qty == 0:
        return
    if n == LADDER:
        if at == 0:
            if _is_known(s, b, side, px):
                s.books[b]["known_px"][side] = s.rung_px[b, side, 0]
            return
        if _is_known(s, b, side, s.rung_px[b, side, 0]):
            s.books[b]["known_px"][side] = s.rung_px[b, side, 1] if at > 1 else px
        at -= 1
        _close_row(s.rung_px[b, side], _FIRST, at)
        _close_row(s.rung_qty[b, side], _FIRST, at)
        _close_row(s.rung_from[b, side], _FIRST, at)
    else:
        _open_row(s.rung_px[b, side], at, n)
        _open_row(s.rung_qty[b, side], at, n)
        _open_row(s.rung_from[b, side], at, n)
        s.books[b]["rungs"][side] = n + 1
    s.rung_px[b, side, at] = px
    s.rung_qty[b, side, at] = qty
    s.rung_from[b, side, at] = FROM_CHANGE if _is_known(s, b, side, px) else BEYOND


@part
def _show(s: State, b: int) -> bool:
    """The best levels of the ladder, as far as every level is known, become the window. False if the book is crossed."""
    for side in range(2):
        n = s.books[b]["rungs"][side]
        at = (b * 2 + side) * MAX_LEVELS
        shown = 0
        for k in range(min(n, MAX_LEVELS)):
            px = s.rung_px[b, side, n - 1 - k]
            if not _is_known(s, b, side, px):
                break
            s.u.px_e8[at + k] = px
            s.u.qty_e8[at + k] = s.rung_qty[b, side, n - 1 - k]
            shown += 1
        s.window[b, side, _START] = at
        s.window[b, side, _LEVELS] = shown
    bid = _shown(s, b, _BID)
    ask = _shown(s, b, _ASK)
    return bool(bid == 0 or ask == 0 or bid < ask)


@part
def _stand(s: State, i: int, b: int, time_ns: int) -> Any:
    """The ladder has changed: show it, unless it is crossed."""
    if not _show(s, b):
        s.u.reason[i] = _CROSSED
        _doubt(s, b, time_ns)
        return _REFUSED
    _settle(s, b, time_ns)
    return _CHANGED


@part
def _hold(s: State, i: int, b: int) -> None:
    """Keep a change until the snapshot comes (step 1 of the venue's rules). When there is no more room, start anew."""
    u = s.u
    book = s.books[b]
    n = i8(u.n_bid[i]) + u.n_ask[i]
    if book["held_rows"] == WAIT_ROWS or book["held_levels"] + n > WAIT_LEVELS:
        book["held_rows"] = 0
        book["held_levels"] = 0
    at = i8(book["held_levels"])
    row = s.held[b, book["held_rows"]]
    row["first_id"] = u.first_id[i]
    row["update_id"] = u.update_id[i]
    row["exchange_ms"] = u.exchange_ms[i]
    row["conn"] = u.conn[i]
    row["start"] = at
    row["n_bid"] = u.n_bid[i]
    row["n_ask"] = u.n_ask[i]
    for k in range(n):
        s.held_px[b, at + k] = s.u.px_e8[u.start[i] + k]
        s.held_qty[b, at + k] = s.u.qty_e8[u.start[i] + k]
    book["held_rows"] += 1
    book["held_levels"] = at + n


@part
def _changes_count(s: State, b: int) -> bool:
    """Depth changes make this book."""
    depth = s.config[0]["depth"]
    return bool(depth == CHANGES_ONLY or (depth == AUTO and s.books[b]["windowed"] == 0))


@part
def _change(s: State, i: int, b: int, time_ns: int) -> Any:
    """A depth change, by the venue's rules for a local book: none before the snapshot, none twice, none missing."""
    u = s.u
    book = s.books[b]
    if not _changes_count(s, b):
        return _IDLE
    _fold(s, b, time_ns, u.check[i])
    if book["synced"] == 0:
        _hold(s, i, b)
        return _IDLE
    if u.update_id[i] <= book["update_id"]:  # step 5: what the snapshot, or another connection, has told already
        return _IDLE
    if u.first_id[i] > book["update_id"] + 1:  # step 6: something is missing, so start over
        book["synced"] = 0
        book["held_rows"] = 0
        book["held_levels"] = 0
        _doubt(s, b, time_ns)
        _hold(s, i, b)
        u.reason[i] = _GAP
        return _REFUSED
    for k in range(i8(u.n_bid[i]) + u.n_ask[i]):
        at = u.start[i] + k
        _set_level(s, b, _BID if k < u.n_bid[i] else _ASK, u.px_e8[at], u.qty_e8[at])
    _renew(s, b, time_ns, i8(u.conn[i]), u.update_id[i], u.exchange_ms[i])
    return _stand(s, i, b, time_ns)


@part
def _load(s: State, i: int, b: int) -> None:
    """A snapshot becomes the ladder; what it shows is the range in which every level is known."""
    u = s.u
    for side in range(2):
        n = min(i8(u.n_bid[i]) if side == _BID else i8(u.n_ask[i]), LADDER)
        at = i8(u.start[i]) if side == _BID else i8(u.start[i]) + u.n_bid[i]
        for k in range(n):
            s.rung_px[b, side, k] = s.u.px_e8[at + n - 1 - k]
            s.rung_qty[b, side, k] = s.u.qty_e8[at + n - 1 - k]
            s.rung_from[b, side, k] = FROM_SNAPSHOT
        s.books[b]["rungs"][side] = n
        # an empty side knows nothing
        s.books[b]["known_px"][side] = s.u.px_e8[at + n - 1] if n > 0 else (_LARGEST if side == _BID else 0)


@part
def _snapshot(s: State, i: int, time_ns: int) -> Any:
    """The snapshot that was asked for last: load it, then every change held that is newer (steps 3 to 6 of the venue's rules)."""
    u = s.u
    asked = s.counters[0]["asked"]
    rank = i8(u.conn[i]) // SESSION_CONNS % ASKERS
    b = asked[u.venue[i], rank]
    if s.counters[0]["asks"][u.venue[i], rank] == 1:
        asked[u.venue[i], rank] = -1
    if b < 0 or not _changes_count(s, b):
        return _IDLE
    u.book[i] = b
    book = s.books[b]
    _fold(s, b, time_ns, u.check[i])
    if book["synced"] == 1 and u.update_id[i] <= book["update_id"]:
        return _IDLE
    _load(s, i, b)
    book["synced"] = 1
    last_id = u.update_id[i]
    last = i8(-1)
    for k in range(book["held_rows"]):
        row = s.held[b, k]
        if row["update_id"] <= last_id:
            continue
        if row["first_id"] > last_id + 1:  # the snapshot is older than the first change: wait for another one
            book["synced"] = 0
            book["trusted"] = 0
            return _IDLE
        for j in range(i8(row["n_bid"]) + row["n_ask"]):
            at = row["start"] + j
            _set_level(s, b, _BID if j < row["n_bid"] else _ASK, s.held_px[b, at], s.held_qty[b, at])
        last_id = row["update_id"]
        last = i8(k)
    book["held_rows"] = 0
    book["held_levels"] = 0
    book["update_id"] = last_id
    if last < 0 or s.held[b, last]["conn"] == _DEAD:  # nothing says yet that the changes go on from here
        return _IDLE
    _renew(s, b, time_ns, i8(s.held[b, last]["conn"]), last_id, s.held[b, last]["exchange_ms"])
    return _stand(s, i, b, time_ns)


@part
def apply(s: State, i: int, time_ns: int) -> Any:
    """One row changes the books: what came of it, and for a refused row the reason why."""
    u = s.u
    what = u.what[i]
    b = i8(u.book[i])
    if what == _BOOK:
        return _window(s, i, b, time_ns)
    if what == _CHANGE:
        return _change(s, i, b, time_ns)
    if what == _CLOSED or what == _LOST:  # noqa: SIM109
        _leave(s, i8(u.venue[i]), i8(u.conn[i]), what == _CLOSED, time_ns)
    elif what == _DOUBT:
        _doubt(s, b, time_ns)
    elif what == _REQUESTED:
        rank = i8(u.conn[i]) // SESSION_CONNS % ASKERS
        s.counters[0]["asked"][u.venue[i], rank] = b
        s.counters[0]["asks"][u.venue[i], rank] = 1
    elif what == _SNAPSHOT:
        return _snapshot(s, i, time_ns)
    return _IDLE


@kernel
def come_home(state: State) -> None:
    """Copy windows that stand in the room of the block to the homes of their books, before that room is used again."""
    s = state[0]
    for b in range(s.counters[0]["books"]):
        for side in range(2):
            at = s.window[b, side, _START]
            home = (b * 2 + side) * MAX_LEVELS
            if at != home:
                for k in range(s.window[b, side, _LEVELS]):
                    s.u.px_e8[home + k] = s.u.px_e8[at + k]
                    s.u.qty_e8[home + k] = s.u.qty_e8[at + k]
                s.window[b, side, _START] = home


@kernel
def edge_sell_upbit_bps(upbit_bid: int, binance_ask: int, fx_ask: int) -> float:
    """Gross edge of selling a coin on Upbit and buying it on Binance, with the USDT bought back at the ask.

    bid_KRW / (ask_USDT x KRW per USDT) - 1, in basis points; NaN if a price is missing (0).
    """
    if upbit_bid <= 0 or binance_ask <= 0 or fx_ask <= 0:
        return np.nan
    cost = np.float64(binance_ask) * (np.float64(fx_ask) / _E8)
    return (np.float64(upbit_bid) / cost - 1.0) * 10_000.0


@kernel
def edge_buy_upbit_bps(upbit_ask: int, binance_bid: int, fx_bid: int) -> float:
    """Gross edge of buying a coin on Upbit and selling it on Binance, with the USDT sold at the bid; NaN if one is missing."""
    if upbit_ask <= 0 or binance_bid <= 0 or fx_bid <= 0:
        return np.nan
    proceeds = np.float64(binance_bid) * (np.float64(fx_bid) / _E8)
    return (proceeds / np.float64(upbit_ask) - 1.0) * 10_000.0


@part
def _is_active(s: State, b: int, time_ns: int, stale_ns: int) -> bool:
    """Connected, trusted and not older than ``stale_ns`` (exactly that old is still active)."""
    fresh = time_ns - s.books[b]["last_ns"] <= stale_ns
    return bool(s.books[b]["connected"] == 1 and s.books[b]["trusted"] == 1 and fresh)


@part
def _look(s: State, pair: int, time_ns: int, seq: int) -> bool:
    """The aggregator: best prices of a pair on both venues and the edges in one currency. False if the pair cannot trade now."""
    v = s.seen[0]
    v["time_ns"] = time_ns
    v["seq"] = seq
    v["usable"] = 0
    f = s.config[0]["fx_book"]
    u = s.pairs[pair]["upbit_book"]
    b = s.pairs[pair]["binance_book"]
    if f < 0 or not _is_active(s, f, time_ns, s.config[0]["fx_stale_ns"]):
        return False
    stale_ns = s.config[0]["stale_ns"]
    if not _is_active(s, u, time_ns, stale_ns) or not _is_active(s, b, time_ns, stale_ns):
        return False
    v["upbit_age_ns"] = time_ns - s.books[u]["last_ns"]
    v["binance_age_ns"] = time_ns - s.books[b]["last_ns"]
    v["fx_age_ns"] = time_ns - s.books[f]["last_ns"]
    upbit_bid = _touch(s, u, _BID)
    upbit_ask = _touch(s, u, _ASK)
    binance_bid = _touch(s, b, _BID)
    binance_ask = _touch(s, b, _ASK)
    fx_bid = _shown(s, f, _BID)
    fx_ask = _shown(s, f, _ASK)
    v["upbit_bid_e8"] = upbit_bid
    v["upbit_ask_e8"] = upbit_ask
    v["binance_bid_e8"] = binance_bid
    v["binance_ask_e8"] = binance_ask
    v["fx_bid_e8"] = fx_bid
    v["fx_ask_e8"] = fx_ask
    v["sell_upbit_bps"] = edge_sell_upbit_bps(upbit_bid, binance_ask, fx_ask)
    v["buy_upbit_bps"] = edge_buy_upbit_bps(upbit_ask, binance_bid, fx_bid)
    v["sell_upbit_shown_bps"] = v["sell_upbit_bps"]
    v["buy_upbit_shown_bps"] = v["buy_upbit_bps"]
    if s.window[u, _BID, _TAKES] + s.window[u, _ASK, _TAKES] + s.window[b, _BID, _TAKES] + s.window[b, _ASK, _TAKES] > 0:
        v["sell_upbit_shown_bps"] = edge_sell_upbit_bps(_shown(s, u, _BID), _shown(s, b, _ASK), fx_ask)
        v["buy_upbit_shown_bps"] = edge_buy_upbit_bps(_shown(s, u, _ASK), _shown(s, b, _BID), fx_bid)
    v["usable"] = 1
    return True


@kernel
def exit_size_e8(held: int, size: int, lot: int, px: int, min_notional: int) -> int:
    """How much of ``held`` coin to close at once: all of it if less than twice ``size``; 0 if it is dust."""
    if held <= 0 or px <= 0:
        return 0
    part = held if held < 2 * size else size
    part -= part % lot
    value = notional_e8(px, part, _NO)
    return part if value < 0 or value >= min_notional else 0


@part
def threshold(s: State, pair: int) -> bool:
    """The entry / take-profit policy. Fills ``s.ask`` (direction, intent, upbit_size_e8, binance_size_e8); False = no trade.

    It enters a direction when its edge is at least ``entry_bps``, and closes when the opposite edge is at least
    ``exit_bps`` = tp_bps - entry_bps, so that entry edge + exit edge reach tp_bps. Each leg closes what that venue holds.
    """
    v = s.seen[0]
    p = s.pairs[pair]
    held_upbit = p["position_e8"][UPBIT]
    held_binance = p["position_e8"][BINANCE]
    # the usual case first: sizes cost long divisions
    enters = v["sell_upbit_bps"] >= p["entry_bps"] or v["buy_upbit_bps"] >= p["entry_bps"]
    closes = v["sell_upbit_bps"] >= p["exit_bps"] or v["buy_upbit_bps"] >= p["exit_bps"]
    if not enters and not (closes and (held_upbit != 0 or held_binance != 0)):
        return False
    size = size_for_e8(p["size_krw_e8"], v["upbit_ask_e8"] if v["upbit_ask_e8"] > 0 else v["upbit_bid_e8"])
    most = size_for_e8(p["max_position_krw_e8"], v["upbit_ask_e8"] if v["upbit_ask_e8"] > 0 else v["upbit_bid_e8"])
    lot = p["lot_e8"]
    if size <= 0 or most <= 0 or lot == 0:
        return False
    size -= size % lot
    min_upbit = p["min_notional_e8"][UPBIT]
    min_binance = p["min_notional_e8"][BINANCE]
    # opened by selling on Upbit: short there, long on Binance
    close_u = exit_size_e8(-held_upbit, size, lot, v["upbit_ask_e8"], min_upbit)
    close_b = exit_size_e8(held_binance, size, lot, v["binance_bid_e8"], min_binance)
    if (close_u > 0 or close_b > 0) and v["buy_upbit_bps"] >= p["exit_bps"]:
        s.ask[0], s.ask[1], s.ask[2], s.ask[3] = _BUY_UPBIT, _EXIT, close_u, close_b
        return True
    # opened by buying on Upbit: long there, short on Binance
    open_u = exit_size_e8(held_upbit, size, lot, v["upbit_bid_e8"], min_upbit)
    open_b = exit_size_e8(-held_binance, size, lot, v["binance_ask_e8"], min_binance)
    if (open_u > 0 or open_b > 0) and v["sell_upbit_bps"] >= p["exit_bps"]:
        s.ask[0], s.ask[1], s.ask[2], s.ask[3] = _SELL_UPBIT, _EXIT, open_u, open_b
        return True
    room = max(abs(held_upbit), abs(held_binance)) + size <= most
    if size <= 0 or not room:
        return False
    if v["sell_upbit_bps"] >= p["entry_bps"] and open_u == 0 and open_b == 0:
        s.ask[0], s.ask[1], s.ask[2], s.ask[3] = _SELL_UPBIT, _ENTRY, size, size
        return True
    if v["buy_upbit_bps"] >= p["entry_bps"] and close_u == 0 and close_b == 0:
        s.ask[0], s.ask[1], s.ask[2], s.ask[3] = _BUY_UPBIT, _ENTRY, size, size
        return True
    return False


@part
def _lock_for(s: State, pair: int, venue: int, side: int, px: int, size: int) -> int:
    """What a leg must set aside at worst (quote currency for a buy, coin for a sell); minus an Outcome if it cannot be sent."""
    value = notional_e8(px, size, _YES)
    if value < 0 or value > _FAR or size > _FAR:
        return -_OVERFLOW
    if value < s.pairs[pair]["min_notional_e8"][venue]:
        return -_MIN_NOTIONAL
    if side == _SELL:
        return size if s.balance[venue, pair + 1] - s.locked[venue, pair + 1] >= size else -_NO_BALANCE
    need = value + MAX_LEVELS  # every level taken may round up by one more unit
    if s.config[0]["fee_in_base"][venue] == 0:
        need += fee_e8(value, s.config[0]["fee_ppm"][venue])
    return need if s.balance[venue, 0] - s.locked[venue, 0] >= need else -_NO_BALANCE


@part
def _is_sound(s: State, lot: int) -> bool:
    """A known direction and intent, whole lots, none negative, at least one leg."""
    known = (s.ask[0] == _SELL_UPBIT or s.ask[0] == _BUY_UPBIT) and (s.ask[1] == _ENTRY or s.ask[1] == _EXIT)
    whole = s.ask[2] >= 0 and s.ask[3] >= 0 and s.ask[2] % lot == 0 and s.ask[3] % lot == 0
    return bool(known and whole and s.ask[2] + s.ask[3] > 0)


@part
def _send(s: State, decision: Any, venue: int, b: int, side: int, limit: int, size: int, lock: int) -> int:
    """Put one leg in flight; returns its order id."""
    slot = s.counters[0]["active"]
    s.counters[0]["active"] = slot + 1
    s.counters[0]["last_order"] += 1
    s.orders[slot] = s.no_order[0]
    order = s.orders[slot]
    book_side = _ASK if side == _BUY else _BID
    depth = _depth(s, b, book_side, limit)
    visible = min(size, depth)
    order["order_id"] = s.counters[0]["last_order"]
    order["decision_id"] = decision["decision_id"]
    order["time_ns"] = decision["time_ns"]
    order["arrive_ns"] = decision["time_ns"] + s.config[0]["latency_ns"][venue]
    order["seq"] = decision["seq"]
    order["edge_bps"] = decision["edge_bps"]
    order["limit_px_e8"] = limit
    order["size_e8"] = size
    order["bid_px_e8"] = _shown(s, b, _BID)
    order["ask_px_e8"] = _shown(s, b, _ASK)
    order["visible_e8"] = visible
    order["depth_e8"] = depth
    order["visible_quote_e8"] = max(_displayed_quote(s, b, book_side, visible), 0)
    order["decision_book_ns"] = s.books[b]["last_ns"]
    order["symbol"] = decision["symbol"]
    order["venue"] = venue
    order["side"] = side
    order["direction"] = decision["direction"]
    order["intent"] = decision["intent"]
    order["first_in_episode"] = decision["first_in_episode"]
    s.order_state[slot, 0] = _IN_FLIGHT
    s.order_state[slot, 1] = b
    s.order_state[slot, 2] = lock
    s.order_state[slot, 3] = 0
    for k in range(MAX_LEVELS):
        s.taken[slot, k, _PX] = 0
    coin_or_cash = 0 if side == _BUY else decision["symbol"] + 1
    s.locked[venue, coin_or_cash] += lock
    s.counters[0]["next_due_ns"] = min(s.counters[0]["next_due_ns"], order["arrive_ns"])
    return int(s.counters[0]["last_order"])


@part
def _submit(s: State, pair: int) -> None:
    """Risk check and executor: an ask becomes a decision, accepted with its legs in flight or refused with the reason.

    Both legs are IOC at the best price seen, and either both can be paid for or none is sent. A refusal is counted always and
    written once an episode.
    """
    v = s.seen[0]
    p = s.pairs[pair]
    sells = s.ask[0] == _SELL_UPBIT
    upbit_px = v["upbit_bid_e8"] if sells else v["upbit_ask_e8"]
    binance_px = v["binance_ask_e8"] if sells else v["binance_bid_e8"]
    upbit_side = _SELL if sells else _BUY
    binance_side = _BUY if sells else _SELL
    outcome = _ACCEPTED if p["lot_e8"] > 0 else _NO_RULES
    if outcome == _ACCEPTED and not _is_sound(s, p["lot_e8"]):
        outcome = _BAD_ASK
    upbit_lock = 0
    binance_lock = 0
    if outcome == _ACCEPTED and s.counters[0]["active"] + 2 > ORDER_SLOTS:
        outcome = _ORDERS_FULL
    if outcome == _ACCEPTED and s.ask[2] > 0:
        upbit_lock = _lock_for(s, pair, _UPBIT, upbit_side, upbit_px, s.ask[2])
        outcome = -min(upbit_lock, 0)
    if outcome == _ACCEPTED and s.ask[3] > 0:
        binance_lock = _lock_for(s, pair, _BINANCE, binance_side, binance_px, s.ask[3])
        outcome = -min(binance_lock, 0)
    way = 0 if sells else 1
    if outcome != _ACCEPTED:
        s.counters[0]["refusals"][outcome] += 1
        if p["refused"][way] == outcome:
            return
        p["refused"][way] = outcome
    d = s.decisions[s.counters[0]["decisions"]]
    s.counters[0]["decisions"] += 1
    s.counters[0]["last_decision"] += 1
    d["decision_id"] = s.counters[0]["last_decision"]
    d["time_ns"] = v["time_ns"]
    d["seq"] = v["seq"]
    d["edge_bps"] = v["sell_upbit_bps"] if sells else v["buy_upbit_bps"]
    d["upbit_px_e8"] = upbit_px
    d["binance_px_e8"] = binance_px
    d["fx_px_e8"] = v["fx_ask_e8"] if sells else v["fx_bid_e8"]
    d["upbit_size_e8"] = s.ask[2]
    d["binance_size_e8"] = s.ask[3]
    d["upbit_order_id"] = 0
    d["binance_order_id"] = 0
    d["upbit_age_ns"] = v["upbit_age_ns"]
    d["binance_age_ns"] = v["binance_age_ns"]
    d["fx_age_ns"] = v["fx_age_ns"]
    d["symbol"] = pair
    d["direction"] = s.ask[0]
    d["intent"] = s.ask[1]
    d["outcome"] = outcome
    d["first_in_episode"] = 0
    if outcome != _ACCEPTED:
        return
    d["first_in_episode"] = 1 if p["episode"][way] == 0 else 0
    p["episode"][way] = 1
    p["refused"][way] = 0
    if s.ask[2] > 0:
        d["upbit_order_id"] = _send(s, d, _UPBIT, p["upbit_book"], upbit_side, upbit_px, s.ask[2], upbit_lock)
        p["in_flight"] += 1
    if s.ask[3] > 0:
        d["binance_order_id"] = _send(s, d, _BINANCE, p["binance_book"], binance_side, binance_px, s.ask[3], binance_lock)
        p["in_flight"] += 1


@part
def _end_episodes(s: State, pair: int, usable: bool) -> None:
    """An opportunity lasts while its displayed edge stays at or over the lower of the two thresholds.

    Displayed, because an edge that only our own takes have closed is still the same opportunity for everyone else.
    """
    p = s.pairs[pair]
    least = min(p["entry_bps"], p["exit_bps"])
    for way in range(2):
        edge = s.seen[0]["sell_upbit_shown_bps"] if way == 0 else s.seen[0]["buy_upbit_shown_bps"]
        if not usable or not edge >= least:
            p["episode"][way] = 0
            p["refused"][way] = 0


# --- the loop ---------------------------------------------------------------------------------------------------------


@kernel
def run(state: State, first: int, last: int, use_threshold: bool) -> int:
    """Rows ``first`` up to ``last`` of a block; returns the row to go on from when an event buffer must be emptied first, or when
    an amount did not fit (``counters["overflow"]``).

    With ``use_threshold`` the compiled policy decides. Without it the loop stops after each row, for a Python policy to look;
    ``u.what`` of the row is BOOK if ``u.book`` changed.
    """
    s = state[0]
    u = s.u
    c = s.counters[0]
    for i in range(first, last):
        room = min(EVENT_ROWS - c["decisions"] - c["pairs"], EVENT_ROWS - c["fills"] - ORDER_SLOTS)
        if room < 0:
            return i
        # a frame that claims to be earlier than the one before it happened at that one's time
        t = max(u.time_ns[i], c["time_ns"])
        c["time_ns"] = t
        if c["next_due_ns"] < t:
            _advance(s, t)
            if c["overflow"] != 0:
                return i
        if u.what[i] == 0:
            s.reasons[u.venue[i], u.reason[i]] += 1
            continue
        changed = apply(s, i, t) == _CHANGED
        s.reasons[u.venue[i], u.reason[i]] += 1
        u.what[i] = _BOOK if changed else 0
        if not use_threshold:
            return i + 1
        if not changed:
            continue
        book = s.books[u.book[i]]
        one = i8(book["pair"])
        every = book["is_fx"] == 1
        start = 0 if every else max(one, 0)
        for k in range(start, c["pairs"] if every else one + 1):
            if s.pairs[k]["in_flight"] > 0:
                continue
            usable = _look(s, k, t, u.seq[i])
            _end_episodes(s, k, usable)
            if usable and threshold(s, k):
                _submit(s, k)
    return last


# --- doors ------------------------------------------------------------------------------------------------------------
# The same kernels for Python. They take the array that holds the record: numba takes a tenth of a millisecond to see what a
# record is, and a quarter of a microsecond for an array.


@kernel
def advance(state: State, time_ns: int) -> None:
    """``_advance`` for Python."""
    _advance(state[0], time_ns)


@kernel
def is_active(state: State, b: int, time_ns: int, stale_ns: int) -> bool:
    """``_is_active`` for Python."""
    return bool(_is_active(state[0], b, time_ns, stale_ns))


@kernel
def look(state: State, pair: int, time_ns: int, seq: int) -> bool:
    """``_look`` for Python."""
    return bool(_look(state[0], pair, time_ns, seq))


@kernel
def submit(state: State, pair: int) -> None:
    """``_submit`` for Python."""
    _submit(state[0], pair)


@kernel
def end_episodes(state: State, pair: int, usable: bool) -> None:
    """``_end_episodes`` for Python."""
    _end_episodes(state[0], pair, usable)
