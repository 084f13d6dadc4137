"""The loop one would write without arbl2: pyarrow, orjson and Python integers, one message at a time.

Same books, same threshold rule, same IOC fills with what we took remembered, same fees and positions, hence the same decisions.
It is written to be fast: of a message that only moves the touch, only the touch becomes integers. It leaves out what arbl2 does
besides: checks of the books (order, totals, ids), connections, balances and locks, the second bracket of each fill, event rows,
key figures, digests, and any message that is not well formed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from arbl2.config import RunConfig

E8 = 10**8
LOT = 1_000
MIN_KRW, MIN_USDT = 5_000 * E8, 5 * E8
Levels = list[tuple[int, int]]


@dataclass(slots=True)
class Book:
    """Best prices as integers of 10^-8; the message itself for whoever needs the levels."""

    upbit: bool
    bid: int = 0
    ask: int = 0
    last_ns: int = -(10**18)
    message: Any = None
    took_bids: dict[int, int] = field(default_factory=dict)
    took_asks: dict[int, int] = field(default_factory=dict)

    def levels(self, side: str) -> Levels:
        if self.upbit:
            price, size = f"{side}_price", f"{side}_size"
            return [(int(unit[price] * 1e8 + 0.5), int(unit[size] * 1e8 + 0.5)) for unit in self.message]
        # eight decimals always: without the point it is the integer
        return [(int(px.replace(".", "")), int(qty.replace(".", ""))) for px, qty in self.message[f"{side}s"]]

    def touch(self, side: str) -> int:
        took = self.took_bids if side == "bid" else self.took_asks
        best = self.bid if side == "bid" else self.ask
        if best not in took:
            return best
        return next((px for px, qty in self.levels(side) if qty > took.get(px, 0)), 0)

    def heal(self, side: str, took: dict[int, int]) -> dict[int, int]:
        """What we took, cut to what is displayed; forgotten where the level is gone within the window."""
        if self.upbit:
            last = int(self.message[-1][f"{side}_price"] * 1e8 + 0.5)
        else:
            last = int(self.message[f"{side}s"][-1][0].replace(".", ""))
        if max(took) < last if side == "bid" else min(took) > last:
            return took  # all out of sight
        shown = dict(self.levels(side))
        kept = {}
        for px, qty in took.items():
            if px in shown:
                kept[px] = min(qty, shown[px])
            elif px < last if side == "bid" else px > last:
                kept[px] = qty
        return kept


@dataclass(slots=True)
class Order:
    arrive_ns: int
    book: Book
    buys: bool
    limit: int
    size: int


@dataclass(slots=True)
class Result:
    """What is compared with arbl2."""

    decisions: int = 0
    time_sum: int = 0
    fills: int = 0
    filled_e8: int = 0


def rows(session: Path) -> Iterator[tuple[int, str, str, bytes]]:
    """(mono_ns, venue, kind, payload) of a session, row group by row group, in the fastest way found."""
    for path in sorted((session / "segments").iterdir()):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["mono_ns", "venue", "kind", "payload"])
                columns = [table["mono_ns"], table["venue"].cast(pa.string()), table["kind"].cast(pa.string()), table["payload"]]
                yield from zip(*(column.to_numpy().tolist() for column in columns), strict=True)


def closing(held: int, size: int, px: int, least: int) -> int:
    if held <= 0 or px <= 0:
        return 0
    part = held if held < 2 * size else size
    part -= part % LOT
    return part if px * part // E8 >= least else 0


def run(session: Path, config: RunConfig, shift_ns: int, trace: list[tuple[int, int]] | None = None) -> Result:
    """Replay a clean BTC session; ``shift_ns`` turns monotonic stamps into engine time.

    ``trace`` gathers (engine time, direction) of every decision, 1 = sell on Upbit, -1 = buy there.
    """
    policy, paper = config.policy, config.paper
    size_krw, most_krw = int(policy.size_krw) * E8**2, int(policy.max_position_krw) * E8**2
    entry, leave = policy.entry_bps, policy.tp_bps - policy.entry_bps
    least = min(entry, leave)
    stale_ns, fx_stale_ns = int(config.aggregator.stale_s * 1e9), int(config.aggregator.fx_stale_s * 1e9)
    upbit_ns, binance_ns = int(paper.upbit_latency_ms * 1e6), int(paper.binance_latency_ms * 1e6)
    binance_ppm = int(paper.binance_fee_bps * 100)
    upbit, binance, fx = Book(upbit=True), Book(upbit=False), Book(upbit=True)
    books = {"KRW-BTC": upbit, "KRW-USDT": fx}
    held_upbit = held_binance = 0
    orders: list[Order] = []
    result = Result()

    def execute(order: Order) -> None:
        nonlocal held_upbit, held_binance
        book, buys = order.book, order.buys
        result.fills += 1
        if order.arrive_ns - book.last_ns > stale_ns:
            return
        took = book.took_asks if buys else book.took_bids
        left = order.size
        for px, qty in book.levels("ask" if buys else "bid"):
            if not left or (px > order.limit if buys else px < order.limit):
                break
            take = min(left, qty - took.get(px, 0))
            if take > 0:
                took[px] = took.get(px, 0) + take
                left -= take
        filled = order.size - left
        result.filled_e8 += filled
        if book is upbit:
            held_upbit += filled if buys else -filled
        else:
            held_binance += filled - -(-filled * binance_ppm // 1_000_000) if buys else -filled

    def decide(now: int) -> None:
        if now - upbit.last_ns > stale_ns or now - binance.last_ns > stale_ns or now - fx.last_ns > fx_stale_ns:
            return
        upbit_bid, upbit_ask = upbit.touch("bid"), upbit.touch("ask")
        binance_bid, binance_ask = binance.touch("bid"), binance.touch("ask")
        sell = buy = float("-inf")
        if upbit_bid and binance_ask:
            sell = (upbit_bid / (binance_ask * (fx.ask / 1e8)) - 1.0) * 10_000.0
        if upbit_ask and binance_bid:
            buy = (binance_bid * (fx.bid / 1e8) / upbit_ask - 1.0) * 10_000.0
        if sell < least and buy < least:
            return
        at = upbit_ask or upbit_bid
        size, most = size_krw // at, most_krw // at
        size -= size % LOT
        back_u = closing(-held_upbit, size, upbit_ask, MIN_KRW)
        back_b = closing(held_binance, size, binance_bid, MIN_USDT)
        forth_u = closing(held_upbit, size, upbit_bid, MIN_KRW)
        forth_b = closing(-held_binance, size, binance_ask, MIN_USDT)
        room = max(abs(held_upbit), abs(held_binance)) + size <= most
        if (back_u or back_b) and buy >= leave:
            sells, on_upbit, on_binance = False, back_u, back_b
        elif (forth_u or forth_b) and sell >= leave:
            sells, on_upbit, on_binance = True, forth_u, forth_b
        elif room and sell >= entry and not (forth_u or forth_b):
            sells, on_upbit, on_binance = True, size, size
        elif room and buy >= entry and not (back_u or back_b):
            sells, on_upbit, on_binance = False, size, size
        else:
            return
        result.decisions += 1
        result.time_sum += now
        if trace is not None:
            trace.append((now, 1 if sells else -1))
        if on_upbit:
            orders.append(Order(now + upbit_ns, upbit, not sells, upbit_bid if sells else upbit_ask, on_upbit))
        if on_binance:
            orders.append(Order(now + binance_ns, binance, sells, binance_ask if sells else binance_bid, on_binance))
        orders.sort(key=lambda order: order.arrive_ns)

    now = 0
    loads = orjson.loads
    for mono_ns, venue, kind, payload in rows(session):
        now = mono_ns + shift_ns
        while orders and orders[0].arrive_ns < now:
            execute(orders.pop(0))
        if kind != "message":
            continue
        message = loads(payload)
        if venue == "upbit":
            book, units = books[message["code"]], message["orderbook_units"]
            best = units[0]
            book.bid, book.ask = int(best["bid_price"] * 1e8 + 0.5), int(best["ask_price"] * 1e8 + 0.5)
            book.message = units
        elif "data" in message:
            book, data = binance, message["data"]
            book.bid, book.ask = int(data["bids"][0][0].replace(".", "")), int(data["asks"][0][0].replace(".", ""))
            book.message = data
        else:
            continue
        book.last_ns = now
        if book.took_bids:
            book.took_bids = book.heal("bid", book.took_bids)
        if book.took_asks:
            book.took_asks = book.heal("ask", book.took_asks)
        if not orders:
            decide(now)
    while orders and orders[0].arrive_ns <= now:
        execute(orders.pop(0))
    result.fills += len(orders)
    return result
