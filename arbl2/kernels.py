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
"""Takes remembered per book side; an order stops walking when they are used up."""
GAP_BUCKETS = 1024
"""Buckets of 1 ms in the histogram of time between updates of a book; the last one is "this long or longer"."""

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
        ("n", "<i4", (2,)),  # levels: bids, asks
        ("eaten", "<i4", (2,)),  # takes remembered: on bids, on asks
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
_IN_FLIGHT = 1
_AWAITS = 2  # executed, waits for the first book after its arrival

_BOOK = int(What.BOOK)
_DOUBT = int(What.DOUBT)
_CLOSED = int(What.CLOSED)
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
def _eaten_at(books: Rows, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, b: int, side: int, px: int, but: int) -> int:
    """What our own orders (except ``but``) took from a level and the venue has not shown anew."""
    total = 0
    for k in range(books[b]["eaten"][side]):
        if eaten_px[b, side, k] == px and eaten_by[b, side, k] != but:
            total += eaten_qty[b, side, k]
    return total


@kernel
def _heal_eaten(books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, b: int, side: int) -> None:
    """After an update: what we took stays taken, but never more than is displayed; a level that is gone is forgotten.

    A level beyond the displayed window is not known to be gone and stays remembered.
    """
    n = books[b]["n"][side]
    count = books[b]["eaten"][side]
    keep = 0
    for k in range(count):
        p = eaten_px[b, side, k]
        shown = -1
        for j in range(n):
            if px[b, side, j] == p:
                shown = qty[b, side, j]
        if shown < 0:
            beyond = n > 0 and ((side == _BID and p < px[b, side, n - 1]) or (side == _ASK and p > px[b, side, n - 1]))
            if not beyond:
                continue
        else:
            for j in range(keep):  # earlier takes of the same level count first
                if eaten_px[b, side, j] == p:
                    shown -= eaten_qty[b, side, j]
            if shown <= 0:
                continue
            eaten_qty[b, side, k] = min(eaten_qty[b, side, k], shown)
        eaten_px[b, side, keep] = p
        eaten_qty[b, side, keep] = eaten_qty[b, side, k]
        eaten_by[b, side, keep] = eaten_by[b, side, k]
        keep += 1
    books[b]["eaten"][side] = keep


@kernel
def _touch(books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, b: int, side: int) -> int:
    """Best price that still has something to take; 0 if there is none."""
    if books[b]["eaten"][side] == 0:
        return int(px[b, side, 0]) if books[b]["n"][side] > 0 else 0
    for j in range(books[b]["n"][side]):
        p = px[b, side, j]
        if qty[b, side, j] > _eaten_at(books, eaten_px, eaten_qty, eaten_by, b, side, p, 0):
            return int(p)
    return 0


@kernel
def _depth(books: Rows, px: Ints, qty: Ints, b: int, side: int, limit: int) -> int:
    """Displayed size at ``limit`` or better (what others show; our own takes are not subtracted)."""
    total = 0
    for j in range(books[b]["n"][side]):
        p = px[b, side, j]
        if (side == _ASK and p > limit) or (side == _BID and p < limit) or total > _FAR:
            break
        total += min(qty[b, side, j], _FAR)
    return total


@kernel
def _displayed_quote(books: Rows, px: Ints, qty: Ints, b: int, side: int, size: int) -> int:
    """What taking ``size`` from the displayed book costs or pays, best level first; -1 on overflow."""
    left = size
    quote = 0
    for j in range(books[b]["n"][side]):
        if left == 0:
            break
        take = min(left, qty[b, side, j])
        part = notional_e8(px[b, side, j], take, side == _ASK)
        if part < 0 or quote > _FAR:
            return -1
        quote += part
        left -= take
    return quote


@kernel
def _walk(
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints,
    b: int, side: int, limit: int, size: int, order_id: int, take_it: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """Take up to ``size`` at ``limit`` or better, level by level, from what is displayed and not yet eaten.

    Returns (filled, quote, levels). With ``take_it`` the takes are remembered as ``order_id``'s; without it nothing changes and
    the takes of ``order_id`` itself do not count.
    """
    filled = 0
    quote = 0
    levels = 0
    for j in range(books[b]["n"][side]):
        p = px[b, side, j]
        if filled == size or (side == _ASK and p > limit) or (side == _BID and p < limit):
            break
        free = qty[b, side, j] - _eaten_at(books, eaten_px, eaten_qty, eaten_by, b, side, p, order_id)
        if free <= 0:
            continue
        take = min(free, size - filled)
        part = notional_e8(p, take, side == _ASK)
        if part < 0 or quote > _FAR:
            break
        if take_it:
            k = books[b]["eaten"][side]
            if k == EATEN_CAP:
                break
            eaten_px[b, side, k] = p
            eaten_qty[b, side, k] = take
            eaten_by[b, side, k] = order_id
            books[b]["eaten"][side] = k + 1
        filled += take
        quote += part
        levels += 1
    return filled, quote, levels


# --- orders -----------------------------------------------------------------------------------------------------------


@kernel
def _write_fill(orders: Rows, order_state: Ints, counters: Rows, fills: Rows, slot: int) -> None:
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
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, pairs: Rows, config: Rows,
    balance: Ints, locked: Ints, orders: Rows, order_state: Ints, counters: Rows, fills: Rows, slot: int,
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
        _write_fill(orders, order_state, counters, fills, slot)
        return
    side = _ASK if buys else _BID
    filled, quote, levels = _walk(
        books, px, qty, eaten_px, eaten_qty, eaten_by, b, side, order["limit_px_e8"], order["size_e8"], order["order_id"], True
    )
    order["filled_e8"] = filled
    order["quote_e8"] = quote
    order["levels"] = levels
    order["before_ns"] = books[b]["last_ns"]
    order["before_e8"] = min(order["visible_e8"], _depth(books, px, qty, b, side, order["limit_px_e8"]))
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
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, pairs: Rows, config: Rows,
    balance: Ints, locked: Ints, orders: Rows, order_state: Ints, counters: Rows, fills: Rows, time_ns: int,
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
            books, px, qty, eaten_px, eaten_qty, eaten_by, pairs, config,
            balance, locked, orders, order_state, counters, fills, slot,
        )  # fmt: skip
        _next_due(orders, order_state, counters)


@kernel
def _resolve(
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints,
    orders: Rows, order_state: Ints, counters: Rows, fills: Rows, b: int, time_ns: int, good: bool,
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
            order["after_e8"] = min(order["visible_e8"], _depth(books, px, qty, b, side, order["limit_px_e8"]))
            filled, quote, _ = _walk(
                books, px, qty, eaten_px, eaten_qty, eaten_by,
                b, side, order["limit_px_e8"], order["size_e8"], order["order_id"], False,
            )  # fmt: skip
            order["after_filled_e8"] = filled
            order["after_quote_e8"] = quote
            order["resolved"] = 1
        _write_fill(orders, order_state, counters, fills, slot)


# --- one row ----------------------------------------------------------------------------------------------------------


@kernel
def _replace_side(
    books: Rows, px: Ints, qty: Ints, b: int, side: int, new_px: Ints, new_qty: Ints, at: int, n: int, checksum: int
) -> int:
    """The levels replace one side of the book; returns the checksum with them folded in."""
    for j in range(n):
        p = new_px[at + j]
        q = new_qty[at + j]
        px[b, side, j] = p
        qty[b, side, j] = q
        # wraps on purpose; odd factors keep every bit of every level in play
        checksum = ((checksum ^ p) * 0x100000001B3) ^ (q * 0x1B873593)
    books[b]["n"][side] = n
    return checksum


@kernel
def apply(
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, gaps: Ints,
    orders: Rows, order_state: Ints, counters: Rows, fills: Rows,
    time_ns: int, venue: int, conn: int, what: int, b: int, exchange_ms: int, update_id: int,
    n_bid: int, n_ask: int, at: int, new_px: Ints, new_qty: Ints,
) -> bool:  # fmt: skip
    """One row changes the books. False if the row had to be doubted because its update id went back."""
    if what == _CLOSED:
        for k in range(len(books)):
            if books[k]["venue"] == venue and books[k]["conn"] == conn and books[k]["connected"] == 1:
                books[k]["connected"] = 0
                _resolve(books, px, qty, eaten_px, eaten_qty, eaten_by, orders, order_state, counters, fills, k, time_ns, False)
        return True
    regress = what == _BOOK and update_id > 0 and conn == books[b]["conn"] and update_id < books[b]["update_id"]
    if regress:
        books[b]["update_id"] = update_id
    if what == _DOUBT or regress:
        books[b]["trusted"] = 0
        _resolve(books, px, qty, eaten_px, eaten_qty, eaten_by, orders, order_state, counters, fills, b, time_ns, False)
        return not regress
    if books[b]["updates"] > 0 and conn == books[b]["conn"]:
        gaps[b, min((time_ns - books[b]["last_ns"]) // 1_000_000, GAP_BUCKETS - 1)] += 1
    books[b]["last_ns"] = time_ns
    books[b]["conn"] = conn
    books[b]["connected"] = 1
    books[b]["trusted"] = 1
    books[b]["update_id"] = update_id
    books[b]["exchange_ms"] = exchange_ms
    books[b]["updates"] += 1
    checksum = books[b]["checksum"] ^ time_ns
    checksum = _replace_side(books, px, qty, b, _BID, new_px, new_qty, at, n_bid, checksum)
    checksum = _replace_side(books, px, qty, b, _ASK, new_px, new_qty, at + n_bid, n_ask, checksum ^ n_bid)
    books[b]["checksum"] = checksum
    if books[b]["eaten"][_BID] > 0:
        _heal_eaten(books, px, qty, eaten_px, eaten_qty, eaten_by, b, _BID)
    if books[b]["eaten"][_ASK] > 0:
        _heal_eaten(books, px, qty, eaten_px, eaten_qty, eaten_by, b, _ASK)
    if counters[0]["active"] > 0:
        _resolve(books, px, qty, eaten_px, eaten_qty, eaten_by, orders, order_state, counters, fills, b, time_ns, True)
    return True


@kernel
def edge_sell_upbit_bps(upbit_bid: int, binance_ask: int, fx_ask: int) -> float:
    """Gross edge of selling a coin on Upbit and buying it on Binance, with the USDT bought back at the ask.

    bid_KRW / (ask_USDT x KRW per USDT) - 1, in basis points.
    """
    cost = np.float64(binance_ask) * (np.float64(fx_ask) / _E8)
    return (np.float64(upbit_bid) / cost - 1.0) * 10_000.0


@kernel
def edge_buy_upbit_bps(upbit_ask: int, binance_bid: int, fx_bid: int) -> float:
    """Gross edge of buying a coin on Upbit and selling it on Binance, with the USDT sold at the bid."""
    proceeds = np.float64(binance_bid) * (np.float64(fx_bid) / _E8)
    return (proceeds / np.float64(upbit_ask) - 1.0) * 10_000.0


@kernel
def is_active(books: Rows, b: int, time_ns: int, stale_ns: int) -> bool:
    """Connected, trusted and not older than ``stale_ns`` (exactly that old is still active)."""
    fresh = time_ns - books[b]["last_ns"] <= stale_ns
    return bool(books[b]["connected"] == 1 and books[b]["trusted"] == 1 and fresh)


@kernel
def look(
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, pairs: Rows, config: Rows,
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
    upbit_bid = _touch(books, px, qty, eaten_px, eaten_qty, eaten_by, u, _BID)
    upbit_ask = _touch(books, px, qty, eaten_px, eaten_qty, eaten_by, u, _ASK)
    binance_bid = _touch(books, px, qty, eaten_px, eaten_qty, eaten_by, b, _BID)
    binance_ask = _touch(books, px, qty, eaten_px, eaten_qty, eaten_by, b, _ASK)
    fx_bid = px[f, _BID, 0] if books[f]["n"][_BID] > 0 else 0
    fx_ask = px[f, _ASK, 0] if books[f]["n"][_ASK] > 0 else 0
    v["upbit_bid_e8"] = upbit_bid
    v["upbit_ask_e8"] = upbit_ask
    v["binance_bid_e8"] = binance_bid
    v["binance_ask_e8"] = binance_ask
    v["fx_bid_e8"] = fx_bid
    v["fx_ask_e8"] = fx_ask
    v["sell_upbit_bps"] = np.nan
    v["buy_upbit_bps"] = np.nan
    if upbit_bid > 0 and binance_ask > 0 and fx_ask > 0:
        v["sell_upbit_bps"] = edge_sell_upbit_bps(upbit_bid, binance_ask, fx_ask)
    if upbit_ask > 0 and binance_bid > 0 and fx_bid > 0:
        v["buy_upbit_bps"] = edge_buy_upbit_bps(upbit_ask, binance_bid, fx_bid)
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
    if value < 0 or value > _FAR:
        return -_OVERFLOW
    if value < pairs[pair]["min_notional_e8"][venue]:
        return -_MIN_NOTIONAL
    if side == _SELL:
        return size if balance[venue, pair + 1] - locked[venue, pair + 1] >= size else -_NO_BALANCE
    need = value
    if config[0]["fee_in_base"][venue] == 0:
        need += fee_e8(value, config[0]["fee_ppm"][venue])
    return need if balance[venue, 0] - locked[venue, 0] >= need else -_NO_BALANCE


@kernel
def _send(
    books: Rows, px: Ints, qty: Ints, config: Rows, locked: Ints, orders: Rows, order_state: Ints, counters: Rows,
    decision: Any, venue: int, b: int, side: int, limit: int, size: int, lock: int,
) -> int:  # fmt: skip
    """Put one leg in flight; returns its order id."""
    slot = counters[0]["active"]
    counters[0]["active"] = slot + 1
    counters[0]["last_order"] += 1
    order = orders[slot]
    book_side = _ASK if side == _BUY else _BID
    depth = _depth(books, px, qty, b, book_side, limit)
    visible = min(size, depth)
    order["order_id"] = counters[0]["last_order"]
    order["decision_id"] = decision["decision_id"]
    order["time_ns"] = decision["time_ns"]
    order["arrive_ns"] = decision["time_ns"] + config[0]["latency_ns"][venue]
    order["seq"] = decision["seq"]
    order["edge_bps"] = decision["edge_bps"]
    order["limit_px_e8"] = limit
    order["size_e8"] = size
    order["bid_px_e8"] = px[b, _BID, 0] if books[b]["n"][_BID] > 0 else 0
    order["ask_px_e8"] = px[b, _ASK, 0] if books[b]["n"][_ASK] > 0 else 0
    order["visible_e8"] = visible
    order["depth_e8"] = depth
    order["visible_quote_e8"] = _displayed_quote(books, px, qty, b, book_side, visible)
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
    coin_or_cash = 0 if side == _BUY else decision["symbol"] + 1
    locked[venue, coin_or_cash] += lock
    counters[0]["next_due_ns"] = min(counters[0]["next_due_ns"], order["arrive_ns"])
    return int(counters[0]["last_order"])


@kernel
def submit(
    books: Rows, px: Ints, qty: Ints, pairs: Rows, config: Rows, balance: Ints, locked: Ints,
    orders: Rows, order_state: Ints, counters: Rows, decisions: Rows, pair: int, view: Rows, ask: Ints,
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
            books, px, qty, config, locked, orders, order_state, counters,
            d, UPBIT, p["upbit_book"], upbit_side, upbit_px, ask[2], upbit_lock,
        )  # fmt: skip
        p["in_flight"] += 1
    if ask[3] > 0:
        d["binance_order_id"] = _send(
            books, px, qty, config, locked, orders, order_state, counters,
            d, BINANCE, p["binance_book"], binance_side, binance_px, ask[3], binance_lock,
        )  # fmt: skip
        p["in_flight"] += 1


@kernel
def end_episode(pairs: Rows, pair: int, asked: int) -> None:
    """An opportunity lasts while the policy goes on asking for its direction."""
    if asked != _SELL_UPBIT:
        pairs[pair]["episode"][0] = 0
        pairs[pair]["refused"][0] = 0
    if asked != _BUY_UPBIT:
        pairs[pair]["episode"][1] = 0
        pairs[pair]["refused"][1] = 0


# --- the loop ---------------------------------------------------------------------------------------------------------


@kernel
def run(
    books: Rows, px: Ints, qty: Ints, eaten_px: Ints, eaten_qty: Ints, eaten_by: Ints, gaps: Ints, pairs: Rows, config: Rows,
    balance: Ints, locked: Ints, orders: Rows, order_state: Ints, counters: Rows, decisions: Rows, fills: Rows,
    view: Rows, ask: Ints, seq: Ints, time_ns: Ints, venue: NDArray[np.uint8], conn: NDArray[np.int32],
    what: NDArray[np.uint8], reason: NDArray[np.uint8], book: NDArray[np.int32], exchange_ms: Ints, update_id: Ints,
    start: NDArray[np.int32], n_bid: NDArray[np.int16], n_ask: NDArray[np.int16], new_px: Ints, new_qty: Ints,
    first: int, last: int, use_threshold: bool,
) -> int:  # fmt: skip
    """Rows ``first`` up to ``last`` of a block; returns the row to go on from when an event buffer must be emptied first.

    With ``use_threshold`` the compiled policy decides. Without it the loop stops after each row, for a Python policy to look.
    """
    for i in range(first, last):
        room = min(len(decisions) - counters[0]["decisions"] - len(pairs), len(fills) - counters[0]["fills"] - len(orders))
        if room < 0:
            return i
        # a frame that claims to be earlier than the one before it happened at that one's time
        t = max(time_ns[i], counters[0]["time_ns"])
        counters[0]["time_ns"] = t
        advance(
            books, px, qty, eaten_px, eaten_qty, eaten_by, pairs, config,
            balance, locked, orders, order_state, counters, fills, t,
        )  # fmt: skip
        if what[i] == 0:
            continue
        good = apply(
            books, px, qty, eaten_px, eaten_qty, eaten_by, gaps, orders, order_state, counters, fills,
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
            asks = look(books, px, qty, eaten_px, eaten_qty, eaten_by, pairs, config, k, t, seq[i], view) and threshold(
                pairs, k, view, ask
            )
            end_episode(pairs, k, ask[0] if asks else 0)
            if asks:
                submit(books, px, qty, pairs, config, balance, locked, orders, order_state, counters, decisions, k, view, ask)
    return last
