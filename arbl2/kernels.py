"""The compiled loop, and the one-row kernels it is made of.

One row of updates takes this way: orders that arrived before it meet the book as it stood (``advance``); the row changes a book
(``apply``), which resolves the orders that waited for it; the aggregator computes the edges of every pair the book belongs to
(``look``); the policy asks for a trade or not (``threshold``, or a Python policy outside); risk and executor answer
(``submit``). ``run`` loops over these for a block of rows. Live trading calls it with one row, replay with thousands.

State is a handful of structured arrays (dtypes below), so that a row of it reads the same compiled, uncompiled and in Python.
Prices, sizes and amounts are int64 of 10^-8; products are split into whole and fractional units so that they stay exact in 64
bits, and what does not fit is an overflow that refuses the order. Only edges are floats (a signal, not money): one division, one
product and one subtraction of IEEE doubles, the same on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.events import Direction, FillStatus, Intent, Outcome, Side
from arbl2.frames import BINANCE, UPBIT
from arbl2.jit import kernel
from arbl2.updates import MAX_LEVELS, Reason, What

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Rows = NDArray[Any]  # structured

EATEN_CAP = 4 * MAX_LEVELS
"""Levels per book side whose takes are remembered."""
OUT_OF_SIGHT_NS = 60_000_000_000
"""How long a take is remembered after its level has left the displayed window."""
GAP_MS = 1_000
GAP_S = 600
"""The histogram of time between updates of a book: buckets of 1 ms up to a second, then of 1 s; the last is "or longer"."""

BOOK_STATE = np.dtype(
    [
        ("last_ns", "<i8"),  # engine time of the last good frame
        ("update_id", "<i8"),
        ("exchange_ms", "<i8"),
        ("updates", "<i8"),
        ("checksum", "<i8"),  # over every level of every update, in order
        ("conn", "<i4"),
        ("venue", "<i4"),
        ("pair", "<i4"),  # -1: of no pair
        ("is_fx", "<i4"),
        ("connected", "<i4"),
        ("trusted", "<i4"),
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
        ("fx_stale_ns", "<i8"),
        ("fx_book", "<i8"),  # -1: none
        ("latency_ns", "<i8", (3,)),  # by venue code
        ("fee_ppm", "<i8", (3,)),
        ("fee_in_base", "<i8", (3,)),  # 1: a buy pays its fee in the coin received
    ]
)

COUNTERS = np.dtype(
    [
        ("time_ns", "<i8"),
        ("active", "<i8"),  # orders in the table
        ("next_due_ns", "<i8"),
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

_E8 = 100_000_000
_FAR = 2**62
_CALM = 9.0e18  # amounts above this may not fit in int64
_BID = 0
_ASK = 1
_LEVELS = 0  # counts[book, side, ...]: levels displayed
_TAKES = 1  # and takes remembered
_PX = 0  # columns of a take
_QTY = 1
_SEEN = 2  # when its level was last displayed
_LARGEST = 2**63 - 1
_IN_FLIGHT = 1
_AWAITS = 2  # executed, waits for the first book after its arrival

_BOOK = int(What.BOOK)
_DOUBT = int(What.DOUBT)
_CLOSED = int(What.CLOSED)
_LOST = int(What.LOST)
_ID_REGRESS = int(Reason.ID_REGRESS)
_BUY = int(Side.BUY)
_SELL = int(Side.SELL)
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


@kernel
def _eaten_at(counts: Ints, eaten: Ints, b: int, side: int, px: int) -> int:
    """What our own orders took from a level and the venue has not shown anew."""
    for k in range(counts[b, side, _TAKES]):
        if eaten[b, side, k, _PX] == px:
            return int(eaten[b, side, k, _QTY])
    return 0


@kernel
def _eat(counts: Ints, eaten: Ints, b: int, side: int, px: int, take: int, time_ns: int) -> None:
    """Remember a take. A full table forgets the level farthest from the touch: all but 30 of its levels are out of sight."""
    count = counts[b, side, _TAKES]
    at = count
    for k in range(count):
        if eaten[b, side, k, _PX] == px:
            eaten[b, side, k, _QTY] += take
            return
    if count < EATEN_CAP:
        counts[b, side, _TAKES] = count + 1
    else:
        at = 0
        for k in range(1, count):
            farther = eaten[b, side, k, _PX] - eaten[b, side, at, _PX]
            if (side == _ASK and farther > 0) or (side == _BID and farther < 0):
                at = k
    eaten[b, side, at, _PX] = px
    eaten[b, side, at, _QTY] = take
    eaten[b, side, at, _SEEN] = time_ns


@kernel
def _heal_eaten(counts: Ints, px: Ints, qty: Ints, eaten: Ints, b: int, side: int, time_ns: int) -> None:
    """After an update: what we took stays taken, but never more than is displayed; a level that is gone is forgotten.

    A level beyond the displayed window is not known to be gone and stays remembered, for ``OUT_OF_SIGHT_NS`` at most.
    """
    n = counts[b, side, _LEVELS]
    worst = px[b, side, n - 1] if n > 0 else 0
    keep = 0
    for k in range(counts[b, side, _TAKES]):
        p = eaten[b, side, k, _PX]
        left = eaten[b, side, k, _QTY]
        seen = eaten[b, side, k, _SEEN]
        if n == 0 or (side == _ASK and p <= worst) or (side == _BID and p >= worst):
            shown = np.int64(0)
            for j in range(n):
                if px[b, side, j] == p:
                    shown = qty[b, side, j]
                    break
            left = min(left, shown)
            seen = time_ns
        elif time_ns - seen > OUT_OF_SIGHT_NS:
            left = np.int64(0)
        if left > 0:
            eaten[b, side, keep, _PX] = p
            eaten[b, side, keep, _QTY] = left
            eaten[b, side, keep, _SEEN] = seen
            keep += 1
    counts[b, side, _TAKES] = keep


@kernel
def _touch(counts: Ints, px: Ints, qty: Ints, eaten: Ints, b: int, side: int) -> int:
    """Best price that still has something to take; 0 if there is none."""
    if counts[b, side, _TAKES] == 0:
        return _shown(counts, px, b, side)
    for j in range(counts[b, side, _LEVELS]):
        p = px[b, side, j]
        if qty[b, side, j] > _eaten_at(counts, eaten, b, side, p):
            return int(p)
    return 0


@kernel
def _shown(counts: Ints, px: Ints, b: int, side: int) -> int:
    """Best displayed price; 0 if there is none."""
    return int(px[b, side, 0]) if counts[b, side, _LEVELS] > 0 else 0


@kernel
def _depth(counts: Ints, px: Ints, qty: Ints, b: int, side: int, limit: int) -> int:
    """Displayed size at ``limit`` or better (what others show; our own takes are not subtracted)."""
    total = 0
    for j in range(counts[b, side, _LEVELS]):
        p = px[b, side, j]
        if (side == _ASK and p > limit) or (side == _BID and p < limit) or total > _FAR:
            break
        total += min(qty[b, side, j], _FAR)
    return total


@kernel
def _displayed_quote(counts: Ints, px: Ints, qty: Ints, b: int, side: int, size: int) -> int:
    """What taking ``size`` from the displayed book costs or pays, best level first; -1 on overflow."""
    left = size
    quote = 0
    for j in range(counts[b, side, _LEVELS]):
        if left == 0:
            break
        take = min(left, qty[b, side, j])
        part = notional_e8(px[b, side, j], take, side == _ASK)
        if part < 0 or quote > _LARGEST - part:
            return -1
        quote += part
        left -= take
    return quote


@kernel
def _walk(
    counts: Ints, px: Ints, qty: Ints, eaten: Ints, taken: Ints,
    b: int, side: int, limit: int, size: int, slot: int, execute: bool, time_ns: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Take up to ``size`` at ``limit`` or better, level by level, from what is displayed and not yet eaten.

    Returns (filled, quote, levels), filled -1 if an amount does not fit in 64 bits. With ``execute`` the takes are remembered and
    noted in ``taken[slot]`` as this order's own; without it nothing changes, and the takes noted there do not count.
    """
    filled = 0
    quote = 0
    levels = 0
    for j in range(counts[b, side, _LEVELS]):
        p = px[b, side, j]
        if filled == size or (side == _ASK and p > limit) or (side == _BID and p < limit):
            break
        gone = _eaten_at(counts, eaten, b, side, p)
        if not execute:
            for k in range(MAX_LEVELS):
                if taken[slot, k, _PX] == p:
                    gone -= taken[slot, k, _QTY]
        free = qty[b, side, j] - max(gone, 0)
        if free <= 0:
            continue
        take = min(free, size - filled)
        part = notional_e8(p, take, side == _ASK)
        if part < 0 or quote > _LARGEST - part:
            return -1, 0, 0
        if execute:
            _eat(counts, eaten, b, side, p, take, time_ns)
            taken[slot, levels, _PX] = p
            taken[slot, levels, _QTY] = take
        filled += take
        quote += part
        levels += 1
    return filled, quote, levels


# --- orders -----------------------------------------------------------------------------------------------------------


@kernel
def _write_fill(orders: Rows, order_state: Ints, taken: Ints, counters: Rows, fills: Rows, slot: int) -> None:
    """Move an order from the table to the fill events and close the gap it leaves."""
    fills[counters[0]["fills"]] = orders[slot]
    counters[0]["fills"] += 1
    last = counters[0]["active"] - 1
    for k in range(slot, last):
        orders[k] = orders[k + 1]
        order_state[k, 0] = order_state[k + 1, 0]
        order_state[k, 1] = order_state[k + 1, 1]
        order_state[k, 2] = order_state[k + 1, 2]
        order_state[k, 3] = order_state[k + 1, 3]
        for j in range(MAX_LEVELS):
            taken[k, j, _PX] = taken[k + 1, j, _PX]
            taken[k, j, _QTY] = taken[k + 1, j, _QTY]
    counters[0]["active"] = last


@kernel
def _next_due(orders: Rows, order_state: Ints, counters: Rows) -> int:
    """Slot of the order in flight that arrives first (ties: the one sent first), or -1; notes when that is."""
    best = -1
    due = _FAR
    for k in range(counters[0]["active"]):
        if order_state[k, 0] == _IN_FLIGHT and orders[k]["arrive_ns"] < due:
            due = orders[k]["arrive_ns"]
            best = k
    counters[0]["next_due_ns"] = due
    return best


@kernel
def _execute(
    books: Rows, counts: Ints, px: Ints, qty: Ints, eaten: Ints, pairs: Rows, config: Rows,
    balance: Ints, locked: Ints, orders: Rows, order_state: Ints, taken: Ints, counters: Rows, fills: Rows, slot: int,
) -> None:  # fmt: skip
    """An order meets the book as it stood at its arrival: walk, fee, ledger."""
    order = orders[slot]
    pair = order["symbol"]
    venue = order["venue"]
    b = order_state[slot, 1]
    buys = order["side"] == _BUY
    cash, coin = 0, pair + 1
    if buys:
        locked[venue, cash] -= order_state[slot, 2]
    else:
        locked[venue, coin] -= order_state[slot, 2]
    pairs[pair]["in_flight"] -= 1
    fresh = order["arrive_ns"] - books[b]["last_ns"] <= config[0]["stale_ns"]
    if books[b]["connected"] == 0 or books[b]["trusted"] == 0 or not fresh:
        order["status"] = _NO_BOOK
        _write_fill(orders, order_state, taken, counters, fills, slot)
        return
    side = _ASK if buys else _BID
    filled, quote, levels = _walk(
        counts, px, qty, eaten, taken, b, side, order["limit_px_e8"], order["size_e8"], slot, True, order["arrive_ns"]
    )
    cash_after = balance[venue, cash] // 2 + quote // 2 + 2
    coin_after = balance[venue, coin] // 2 + filled // 2 + 2
    if filled < 0 or cash_after > _FAR or coin_after > _FAR:
        counters[0]["overflow"] = order["order_id"]
        return
    order["filled_e8"] = filled
    order["quote_e8"] = quote
    order["levels"] = levels
    order["before_ns"] = books[b]["last_ns"]
    order["before_e8"] = min(order["visible_e8"], _depth(counts, px, qty, b, side, order["limit_px_e8"]))
    if filled == order["size_e8"]:
        order["status"] = _FILLED
    elif filled > 0:
        order["status"] = _PARTIAL
    else:
        order["status"] = _UNFILLED
    in_base = buys and config[0]["fee_in_base"][venue] == 1
    fee = fee_e8(filled if in_base else quote, config[0]["fee_ppm"][venue])
    order["fee_e8"] = fee
    order["fee_in_base"] = 1 if in_base else 0
    if buys:
        got = filled - fee if in_base else filled
        balance[venue, cash] -= quote if in_base else quote + fee
        balance[venue, coin] += got
        pairs[pair]["position_e8"][venue] += got
    else:
        balance[venue, cash] += quote - fee
        balance[venue, coin] -= filled
        pairs[pair]["position_e8"][venue] -= filled
    order_state[slot, 0] = _AWAITS
    order_state[slot, 3] = books[b]["conn"]


@kernel
def advance(
    books: Rows, counts: Ints, px: Ints, qty: Ints, eaten: Ints, pairs: Rows, config: Rows,
    balance: Ints, locked: Ints, orders: Rows, order_state: Ints, taken: Ints, counters: Rows, fills: Rows, time_ns: int,
) -> None:  # fmt: skip
    """Execute every order that arrived before ``time_ns``, in the order of arrival.

    An order that arrives at the very instant of a frame meets the book after that frame: B- is the last book received at or
    before the arrival.
    """
    while counters[0]["next_due_ns"] < time_ns:
        slot = _next_due(orders, order_state, counters)
        if slot < 0 or counters[0]["next_due_ns"] >= time_ns:
            break
        _execute(
            books, counts, px, qty, eaten, pairs, config,
            balance, locked, orders, order_state, taken, counters, fills, slot,
        )  # fmt: skip
        if counters[0]["overflow"] != 0:
            return
        _next_due(orders, order_state, counters)


@kernel
def _resolve(
    books: Rows, counts: Ints, px: Ints, qty: Ints, eaten: Ints,
    orders: Rows, order_state: Ints, taken: Ints, counters: Rows, fills: Rows, b: int, time_ns: int, good: bool,
) -> None:  # fmt: skip
    """Write the executed orders of book ``b``: ``good`` if its new state is the first trusted book after their arrival."""
    slot = 0
    while slot < counters[0]["active"]:
        if order_state[slot, 0] != _AWAITS or order_state[slot, 1] != b:
            slot += 1
            continue
        order = orders[slot]
        if good and order_state[slot, 3] == books[b]["conn"]:
            side = _ASK if order["side"] == _BUY else _BID
            order["after_ns"] = time_ns
            order["after_e8"] = min(order["visible_e8"], _depth(counts, px, qty, b, side, order["limit_px_e8"]))
            filled, quote, _ = _walk(
                counts, px, qty, eaten, taken,
                b, side, order["limit_px_e8"], order["size_e8"], slot, False, time_ns,
            )  # fmt: skip
            order["after_filled_e8"] = max(filled, 0)
            order["after_quote_e8"] = quote
            order["resolved"] = 1 if filled >= 0 else 0
        _write_fill(orders, order_state, taken, counters, fills, slot)


# --- one row ----------------------------------------------------------------------------------------------------------


@kernel
def _replace_side(
    counts: Ints, px: Ints, qty: Ints, b: int, side: int, new_px: Ints, new_qty: Ints, at: int, n: int, checksum: int
) -> Any:
    """The levels replace one side of the book; returns the checksum with them folded in.

    Sums wrap on purpose. Factors are odd, so that a change of any one level changes the sum, and differ by level, so that order
    counts; a sum of independent products took half the time of a chain of hashes.
    """
    total = np.int64(n)  # int64 from the start: it wraps
    for j in range(n):
        p = new_px[at + j]
        q = new_qty[at + j]
        px[b, side, j] = p
        qty[b, side, j] = q
        total += (p * 0x100000001B3 + q * 0x1B873593) * (2 * j + 1)
    counts[b, side, _LEVELS] = n
    return (checksum ^ total) * 0x5851F42D4C957F2D


@kernel
def apply(
    books: Rows, counts: Ints, px: Ints, qty: Ints, eaten: Ints, gaps: Ints,
    orders: Rows, order_state: Ints, taken: Ints, counters: Rows, fills: Rows,
    time_ns: int, venue: int, conn: int, what: int, b: int, exchange_ms: int, update_id: int,
    n_bid: int, n_ask: int, at: int, new_px: Ints, new_qty: Ints,
) -> bool:  # fmt: skip
    """One row changes the books. False if the row had to be doubted because its update id went back."""
    if what == _CLOSED or what == _LOST:  # noqa: SIM109
        for k in range(len(books)):
            if books[k]["venue"] == venue and books[k]["conn"] == conn and books[k]["connected"] == 1:
                if what == _CLOSED:
                    books[k]["connected"] = 0
                books[k]["trusted"] = 0
                _resolve(books, counts, px, qty, eaten, orders, order_state, taken, counters, fills, k, time_ns, False)
        return True
    regress = what == _BOOK and update_id > 0 and conn == books[b]["conn"] and update_id < books[b]["update_id"]
    if what == _DOUBT or regress:
        books[b]["trusted"] = 0
        _resolve(books, counts, px, qty, eaten, orders, order_state, taken, counters, fills, b, time_ns, False)
        return not regress
    if books[b]["updates"] > 0 and conn == books[b]["conn"]:
        gap_ms = (time_ns - books[b]["last_ns"]) // 1_000_000
        gaps[b, gap_ms if gap_ms < GAP_MS else min(GAP_MS - 1 + gap_ms // 1_000, GAP_MS + GAP_S - 1)] += 1
    books[b]["last_ns"] = time_ns
    books[b]["conn"] = conn
    books[b]["connected"] = 1
    books[b]["trusted"] = 1
    books[b]["update_id"] = update_id
    books[b]["exchange_ms"] = exchange_ms
    books[b]["updates"] += 1
    checksum = books[b]["checksum"] ^ time_ns
    checksum = _replace_side(counts, px, qty, b, _BID, new_px, new_qty, at, n_bid, checksum)
    checksum = _replace_side(counts, px, qty, b, _ASK, new_px, new_qty, at + n_bid, n_ask, checksum)
    books[b]["checksum"] = checksum
    if counters[0]["active"] > 0:
        _resolve(books, counts, px, qty, eaten, orders, order_state, taken, counters, fills, b, time_ns, True)
    for side in (_BID, _ASK):
        if counts[b, side, _TAKES] > 0:
            _heal_eaten(counts, px, qty, eaten, b, side, time_ns)
    return True


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


@kernel
def is_active(books: Rows, b: int, time_ns: int, stale_ns: int) -> bool:
    """Connected, trusted and not older than ``stale_ns`` (exactly that old is still active)."""
    fresh = time_ns - books[b]["last_ns"] <= stale_ns
    return bool(books[b]["connected"] == 1 and books[b]["trusted"] == 1 and fresh)


@kernel
def look(
    books: Rows, counts: Ints, px: Ints, qty: Ints, eaten: Ints, pairs: Rows, config: Rows,
    pair: int, time_ns: int, seq: int, view: Rows,
) -> bool:  # fmt: skip
    """The aggregator: best prices of a pair on both venues and the edges in one currency. False if the pair cannot trade now."""
    v = view[0]
    v["time_ns"] = time_ns
    v["seq"] = seq
    v["usable"] = 0
    f = config[0]["fx_book"]
    u = pairs[pair]["upbit_book"]
    b = pairs[pair]["binance_book"]
    if f < 0 or not is_active(books, f, time_ns, config[0]["fx_stale_ns"]):
        return False
    stale_ns = config[0]["stale_ns"]
    if not is_active(books, u, time_ns, stale_ns) or not is_active(books, b, time_ns, stale_ns):
        return False
    v["upbit_age_ns"] = time_ns - books[u]["last_ns"]
    v["binance_age_ns"] = time_ns - books[b]["last_ns"]
    v["fx_age_ns"] = time_ns - books[f]["last_ns"]
    upbit_bid = _touch(counts, px, qty, eaten, u, _BID)
    upbit_ask = _touch(counts, px, qty, eaten, u, _ASK)
    binance_bid = _touch(counts, px, qty, eaten, b, _BID)
    binance_ask = _touch(counts, px, qty, eaten, b, _ASK)
    fx_bid = _shown(counts, px, f, _BID)
    fx_ask = _shown(counts, px, f, _ASK)
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
    if counts[u, _BID, _TAKES] + counts[u, _ASK, _TAKES] + counts[b, _BID, _TAKES] + counts[b, _ASK, _TAKES] > 0:
        v["sell_upbit_shown_bps"] = edge_sell_upbit_bps(_shown(counts, px, u, _BID), _shown(counts, px, b, _ASK), fx_ask)
        v["buy_upbit_shown_bps"] = edge_buy_upbit_bps(_shown(counts, px, u, _ASK), _shown(counts, px, b, _BID), fx_bid)
    v["usable"] = 1
    return True


@kernel
def exit_size_e8(held: int, size: int, lot: int, px: int, min_notional: int) -> int:
    """How much of ``held`` coin to close at once: all of it if less than twice ``size``; 0 if it is dust."""
    if held <= 0 or px <= 0:
        return 0
    part = held if held < 2 * size else size
    part -= part % lot
    value = notional_e8(px, part, False)
    return part if value < 0 or value >= min_notional else 0


@kernel
def threshold(pairs: Rows, pair: int, view: Rows, ask: Ints) -> bool:
    """The entry / take-profit policy. Fills ``ask`` (direction, intent, upbit_size_e8, binance_size_e8); False = no trade.

    It enters a direction when its edge is at least ``entry_bps``, and closes when the opposite edge is at least
    ``exit_bps`` = tp_bps - entry_bps, so that entry edge + exit edge reach tp_bps. Each leg closes what that venue holds.
    """
    v = view[0]
    p = pairs[pair]
    least = min(p["entry_bps"], p["exit_bps"])
    # the usual case first: sizes cost a long division
    if not (v["sell_upbit_bps"] >= least or v["buy_upbit_bps"] >= least):
        return False
    size = size_for_e8(p["size_krw_e8"], v["upbit_ask_e8"] if v["upbit_ask_e8"] > 0 else v["upbit_bid_e8"])
    most = size_for_e8(p["max_position_krw_e8"], v["upbit_ask_e8"] if v["upbit_ask_e8"] > 0 else v["upbit_bid_e8"])
    lot = p["lot_e8"]
    if size <= 0 or most <= 0 or lot == 0:
        return False
    size -= size % lot
    held_upbit = p["position_e8"][UPBIT]
    held_binance = p["position_e8"][BINANCE]
    min_upbit = p["min_notional_e8"][UPBIT]
    min_binance = p["min_notional_e8"][BINANCE]
    # opened by selling on Upbit: short there, long on Binance
    close_u = exit_size_e8(-held_upbit, size, lot, v["upbit_ask_e8"], min_upbit)
    close_b = exit_size_e8(held_binance, size, lot, v["binance_bid_e8"], min_binance)
    if (close_u > 0 or close_b > 0) and v["buy_upbit_bps"] >= p["exit_bps"]:
        ask[0], ask[1], ask[2], ask[3] = _BUY_UPBIT, _EXIT, close_u, close_b
        return True
    # opened by buying on Upbit: long there, short on Binance
    open_u = exit_size_e8(held_upbit, size, lot, v["upbit_bid_e8"], min_upbit)
    open_b = exit_size_e8(-held_binance, size, lot, v["binance_ask_e8"], min_binance)
    if (open_u > 0 or open_b > 0) and v["sell_upbit_bps"] >= p["exit_bps"]:
        ask[0], ask[1], ask[2], ask[3] = _SELL_UPBIT, _EXIT, open_u, open_b
        return True
    room = max(abs(held_upbit), abs(held_binance)) + size <= most
    if size <= 0 or not room:
        return False
    if v["sell_upbit_bps"] >= p["entry_bps"] and open_u == 0 and open_b == 0:
        ask[0], ask[1], ask[2], ask[3] = _SELL_UPBIT, _ENTRY, size, size
        return True
    if v["buy_upbit_bps"] >= p["entry_bps"] and close_u == 0 and close_b == 0:
        ask[0], ask[1], ask[2], ask[3] = _BUY_UPBIT, _ENTRY, size, size
        return True
    return False


@kernel
def _lock_for(
    pairs: Rows, config: Rows, balance: Ints, locked: Ints, pair: int, venue: int, side: int, px: int, size: int
) -> int:
    """What a leg must set aside at worst (quote currency for a buy, coin for a sell); minus an Outcome if it cannot be sent."""
    value = notional_e8(px, size, True)
    if value < 0 or value > _FAR or size > _FAR:
        return -_OVERFLOW
    if value < pairs[pair]["min_notional_e8"][venue]:
        return -_MIN_NOTIONAL
    if side == _SELL:
        return size if balance[venue, pair + 1] - locked[venue, pair + 1] >= size else -_NO_BALANCE
    need = value + MAX_LEVELS  # every level taken may round up by one more unit
    if config[0]["fee_in_base"][venue] == 0:
        need += fee_e8(value, config[0]["fee_ppm"][venue])
    return need if balance[venue, 0] - locked[venue, 0] >= need else -_NO_BALANCE


@kernel
def _is_sound(ask: Ints, lot: int) -> bool:
    """A known direction and intent, whole lots, none negative, at least one leg."""
    known = (ask[0] == _SELL_UPBIT or ask[0] == _BUY_UPBIT) and (ask[1] == _ENTRY or ask[1] == _EXIT)
    whole = ask[2] >= 0 and ask[3] >= 0 and ask[2] % lot == 0 and ask[3] % lot == 0
    return bool(known and whole and ask[2] + ask[3] > 0)


@kernel
def _send(
    books: Rows, counts: Ints, px: Ints, qty: Ints, config: Rows, locked: Ints,
    orders: Rows, order_state: Ints, taken: Ints, counters: Rows,
    decision: Any, venue: int, b: int, side: int, limit: int, size: int, lock: int,
) -> int:  # fmt: skip
    """Put one leg in flight; returns its order id."""
    slot = counters[0]["active"]
    counters[0]["active"] = slot + 1
    counters[0]["last_order"] += 1
    order = orders[slot]
    book_side = _ASK if side == _BUY else _BID
    depth = _depth(counts, px, qty, b, book_side, limit)
    visible = min(size, depth)
    order["order_id"] = counters[0]["last_order"]
    order["decision_id"] = decision["decision_id"]
    order["time_ns"] = decision["time_ns"]
    order["arrive_ns"] = decision["time_ns"] + config[0]["latency_ns"][venue]
    order["seq"] = decision["seq"]
    order["edge_bps"] = decision["edge_bps"]
    order["limit_px_e8"] = limit
    order["size_e8"] = size
    order["bid_px_e8"] = _shown(counts, px, b, _BID)
    order["ask_px_e8"] = _shown(counts, px, b, _ASK)
    order["visible_e8"] = visible
    order["depth_e8"] = depth
    order["visible_quote_e8"] = max(_displayed_quote(counts, px, qty, b, book_side, visible), 0)
    order["decision_book_ns"] = books[b]["last_ns"]
    order["filled_e8"] = 0
    order["quote_e8"] = 0
    order["fee_e8"] = 0
    order["before_ns"] = 0
    order["before_e8"] = 0
    order["after_ns"] = 0
    order["after_e8"] = 0
    order["after_filled_e8"] = 0
    order["after_quote_e8"] = 0
    order["symbol"] = decision["symbol"]
    order["levels"] = 0
    order["venue"] = venue
    order["side"] = side
    order["direction"] = decision["direction"]
    order["intent"] = decision["intent"]
    order["status"] = 0
    order["fee_in_base"] = 0
    order["first_in_episode"] = decision["first_in_episode"]
    order["resolved"] = 0
    order_state[slot, 0] = _IN_FLIGHT
    order_state[slot, 1] = b
    order_state[slot, 2] = lock
    order_state[slot, 3] = 0
    for k in range(MAX_LEVELS):
        taken[slot, k, _PX] = 0
    coin_or_cash = 0 if side == _BUY else decision["symbol"] + 1
    locked[venue, coin_or_cash] += lock
    counters[0]["next_due_ns"] = min(counters[0]["next_due_ns"], order["arrive_ns"])
    return int(counters[0]["last_order"])


@kernel
def submit(
    books: Rows, counts: Ints, px: Ints, qty: Ints, pairs: Rows, config: Rows, balance: Ints, locked: Ints,
    orders: Rows, order_state: Ints, taken: Ints, counters: Rows, decisions: Rows, pair: int, view: Rows, ask: Ints,
) -> None:  # fmt: skip
    """Risk check and executor: an ask becomes a decision, accepted with its legs in flight or refused with the reason.

    Both legs are IOC at the best price seen, and either both can be paid for or none is sent. A refusal is counted always and
    written once an episode.
    """
    v = view[0]
    p = pairs[pair]
    sells = ask[0] == _SELL_UPBIT
    upbit_px = v["upbit_bid_e8"] if sells else v["upbit_ask_e8"]
    binance_px = v["binance_ask_e8"] if sells else v["binance_bid_e8"]
    upbit_side = _SELL if sells else _BUY
    binance_side = _BUY if sells else _SELL
    outcome = _ACCEPTED if p["lot_e8"] > 0 else _NO_RULES
    if outcome == _ACCEPTED and not _is_sound(ask, p["lot_e8"]):
        outcome = _BAD_ASK
    upbit_lock = 0
    binance_lock = 0
    if outcome == _ACCEPTED and counters[0]["active"] + 2 > len(orders):
        outcome = _ORDERS_FULL
    if outcome == _ACCEPTED and ask[2] > 0:
        upbit_lock = _lock_for(pairs, config, balance, locked, pair, UPBIT, upbit_side, upbit_px, ask[2])
        outcome = -min(upbit_lock, 0)
    if outcome == _ACCEPTED and ask[3] > 0:
        binance_lock = _lock_for(pairs, config, balance, locked, pair, BINANCE, binance_side, binance_px, ask[3])
        outcome = -min(binance_lock, 0)
    way = 0 if sells else 1
    if outcome != _ACCEPTED:
        counters[0]["refusals"][outcome] += 1
        if p["refused"][way] == outcome:
            return
        p["refused"][way] = outcome
    d = decisions[counters[0]["decisions"]]
    counters[0]["decisions"] += 1
    counters[0]["last_decision"] += 1
    d["decision_id"] = counters[0]["last_decision"]
    d["time_ns"] = v["time_ns"]
    d["seq"] = v["seq"]
    d["edge_bps"] = v["sell_upbit_bps"] if sells else v["buy_upbit_bps"]
    d["upbit_px_e8"] = upbit_px
    d["binance_px_e8"] = binance_px
    d["fx_px_e8"] = v["fx_ask_e8"] if sells else v["fx_bid_e8"]
    d["upbit_size_e8"] = ask[2]
    d["binance_size_e8"] = ask[3]
    d["upbit_order_id"] = 0
    d["binance_order_id"] = 0
    d["upbit_age_ns"] = v["upbit_age_ns"]
    d["binance_age_ns"] = v["binance_age_ns"]
    d["fx_age_ns"] = v["fx_age_ns"]
    d["symbol"] = pair
    d["direction"] = ask[0]
    d["intent"] = ask[1]
    d["outcome"] = outcome
    d["first_in_episode"] = 0
    if outcome != _ACCEPTED:
        return
    d["first_in_episode"] = 1 if p["episode"][way] == 0 else 0
    p["episode"][way] = 1
    p["refused"][way] = 0
    if ask[2] > 0:
        d["upbit_order_id"] = _send(
            books, counts, px, qty, config, locked, orders, order_state, taken, counters,
            d, UPBIT, p["upbit_book"], upbit_side, upbit_px, ask[2], upbit_lock,
        )  # fmt: skip
        p["in_flight"] += 1
    if ask[3] > 0:
        d["binance_order_id"] = _send(
            books, counts, px, qty, config, locked, orders, order_state, taken, counters,
            d, BINANCE, p["binance_book"], binance_side, binance_px, ask[3], binance_lock,
        )  # fmt: skip
        p["in_flight"] += 1


@kernel
def end_episodes(pairs: Rows, pair: int, view: Rows, usable: bool) -> None:
    """An opportunity lasts while its displayed edge stays at or over the lower of the two thresholds.

    Displayed, because an edge that only our own takes have closed is still the same opportunity for everyone else.
    """
    p = pairs[pair]
    least = min(p["entry_bps"], p["exit_bps"])
    for way in range(2):
        edge = view[0]["sell_upbit_shown_bps"] if way == 0 else view[0]["buy_upbit_shown_bps"]
        if not usable or not edge >= least:
            p["episode"][way] = 0
            p["refused"][way] = 0


# --- the loop ---------------------------------------------------------------------------------------------------------


@kernel
def run(
    books: Rows, counts: Ints, px: Ints, qty: Ints, eaten: Ints, gaps: Ints, pairs: Rows, config: Rows,
    balance: Ints, locked: Ints, orders: Rows, order_state: Ints, taken: Ints, counters: Rows, decisions: Rows, fills: Rows,
    view: Rows, ask: Ints, seq: Ints, time_ns: Ints, venue: NDArray[np.uint8], conn: NDArray[np.int32],
    what: NDArray[np.uint8], reason: NDArray[np.uint8], book: NDArray[np.int32], exchange_ms: Ints, update_id: Ints,
    start: NDArray[np.int32], n_bid: NDArray[np.int16], n_ask: NDArray[np.int16], new_px: Ints, new_qty: Ints,
    first: int, last: int, use_threshold: bool,
) -> int:  # fmt: skip
    """Rows ``first`` up to ``last`` of a block; returns the row to go on from when an event buffer must be emptied first, or when
    an amount did not fit (``counters["overflow"]``).

    With ``use_threshold`` the compiled policy decides. Without it the loop stops after each row, for a Python policy to look.
    """
    for i in range(first, last):
        room = min(len(decisions) - counters[0]["decisions"] - len(pairs), len(fills) - counters[0]["fills"] - len(orders))
        if room < 0:
            return i
        # a frame that claims to be earlier than the one before it happened at that one's time
        t = max(time_ns[i], counters[0]["time_ns"])
        counters[0]["time_ns"] = t
        if counters[0]["next_due_ns"] < t:
            advance(
                books, counts, px, qty, eaten, pairs, config,
                balance, locked, orders, order_state, taken, counters, fills, t,
            )  # fmt: skip
            if counters[0]["overflow"] != 0:
                return i
        if what[i] == 0:
            continue
        good = apply(
            books, counts, px, qty, eaten, gaps, orders, order_state, taken, counters, fills,
            t, venue[i], conn[i], what[i], book[i], exchange_ms[i], update_id[i],
            n_bid[i], n_ask[i], start[i], new_px, new_qty,
        )  # fmt: skip
        if not good:
            reason[i] = _ID_REGRESS
            what[i] = _DOUBT
        if not use_threshold:
            return i + 1
        if what[i] != _BOOK:
            continue
        one = books[book[i]]["pair"]
        every = books[book[i]]["is_fx"] == 1
        for k in range(0 if every else max(one, 0), len(pairs) if every else one + 1):
            if pairs[k]["in_flight"] > 0:
                continue
            usable = look(books, counts, px, qty, eaten, pairs, config, k, t, seq[i], view)
            end_episodes(pairs, k, view, usable)
            if usable and threshold(pairs, k, view, ask):
                submit(
                    books, counts, px, qty, pairs, config, balance, locked,
                    orders, order_state, taken, counters, decisions, k, view, ask,
                )  # fmt: skip
    return last
