"""What a depth change costs: the same messages into arbl2's full book and into dicts with orjson.

A random book of 5,000 levels a side is told as Binance tells it: a snapshot, then a change for every 100 ms, mostly near the
touch; sizes of messages and gaps between levels are about those of real BTCUSDT. Both ways give the best prices after every
message, which are compared first.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_left
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING

import orjson

from arbl2.book import ladder, window
from arbl2.config import AggregatorConfig, RunConfig
from arbl2.engine import Engine
from arbl2.frames import Anchor, Frame, FrameBlock, FrameKind, Op
from arbl2_replay.wire import Book, DepthChange, binance_combined, binance_depth, binance_diff
from benchmarks.measure import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SYMBOL = "BTCUSDT"
ANCHOR = Anchor(1_767_312_000_000_000_000, 0)
CONFIG = RunConfig(aggregator=AggregatorConfig(binance_depth="diff"))
STREAM = "btcusdt@depth@100ms"
LEVELS = 5_000
TICK, MIDDLE = 10**6, 6_000_000
"""10^-8 USDT, and the price at the start in ticks."""
E8 = 10**8
FIRST_ID = 50_000_000_000
REQUEST = b'{"method":"GET","url":"https://api.binance.com/api/v3/depth?symbol=BTCUSDT&limit=1000"}'


class _Side:
    """Levels of one side; prices are kept as ticks away from zero in the direction of "worse", so that both sides are alike."""

    def __init__(self, rng: Random, sign: int) -> None:
        self.rng, self.sign = rng, sign
        self.away = list(accumulate((rng.choice((1, 5, 18, 18, 40, 124)) for _ in range(LEVELS)), initial=sign * MIDDLE + 1))
        self.sizes = dict.fromkeys(self.away, E8)

    def change(self, touch: int, count: int) -> list[tuple[int, int]]:
        """What differs after the touch has come to ``touch``: levels passed are gone, ``count`` others have another size."""
        changed = {}
        while self.away[0] <= touch:
            changed[self.away.pop(0)] = 0
        for _ in range(count):
            rank = min(int(self.rng.expovariate(1 / 25)) if self.rng.random() < 0.8 else self.rng.randrange(1_500), LEVELS // 2)
            away = self.away[rank] - self.rng.choice((0, 0, 0, 1, 5))
            if away <= touch:
                continue
            changed[away] = size = self.rng.choice((0, 0, 1, 2, 300)) * self.rng.randrange(1, 10**6) * 100
            at = bisect_left(self.away, away)
            known = self.away[at] == away
            if size and not known:
                self.away.insert(at, away)
            elif not size and known and len(self.away) > LEVELS // 2:
                del self.away[at]
        for away, size in changed.items():
            self.sizes[away] = size
        return [(away * self.sign * TICK, size) for away, size in sorted(changed.items())]

    def levels(self) -> list[tuple[int, int]]:
        return [(away * self.sign * TICK, self.sizes[away]) for away in self.away]


def frames(changes: int) -> Iterator[Frame]:
    """A request, its snapshot of 5,000 levels a side, and ``changes`` depth changes."""
    rng = Random(7)
    bids, asks = _Side(rng, -1), _Side(rng, 1)
    yield _frame(1, FrameKind.REQUEST, REQUEST)
    book = Book(*(tuple(level[k] for level in side.levels()) for side in (bids, asks) for k in (0, 1)))
    yield _frame(2, FrameKind.RESPONSE, binance_depth(book, FIRST_ID, depth=LEVELS))
    middle, last_id = float(MIDDLE), FIRST_ID
    for seq in range(3, changes + 3):
        middle += rng.gauss(0, 1) * (rng.random() < 0.1) * 20 + (MIDDLE - middle) / 1_000
        touch, first_id, last_id = round(middle), last_id + 1, last_id + rng.randrange(1, 60)
        count = min(int(rng.lognormvariate(2.3, 0.9)), 300)
        change = DepthChange(first_id, last_id, bids.change(-touch, count), asks.change(touch, count))
        yield _frame(
            seq, FrameKind.MESSAGE, binance_combined(STREAM, binance_diff(SYMBOL, change, 1_767_312_000_000 + 100 * seq))
        )


def _frame(seq: int, kind: FrameKind, payload: bytes) -> Frame:
    at_ns = seq * 100_000_000
    return Frame(seq, at_ns, at_ns, "binance", int(kind is FrameKind.MESSAGE), kind, Op.TEXT, payload)


class Dicts:
    """A local book as one would write it: the venue's steps, integers of 10^-8, the touch kept up to date."""

    def __init__(self) -> None:
        self.last_id = 0
        self.sides: list[dict[int, int]] = [{}, {}]
        self.best = [0, 0]

    def snapshot(self, payload: bytes) -> None:
        body = orjson.loads(payload)
        self.last_id = body["lastUpdateId"]
        for side, name in enumerate(("bids", "asks")):
            self.sides[side] = {_e8(px): _e8(size) for px, size in body[name]}
        self.best = [max(self.sides[0]), min(self.sides[1])]

    def change(self, payload: bytes) -> None:
        data = orjson.loads(payload)["data"]
        if data["u"] <= self.last_id:
            return
        if data["U"] > self.last_id + 1:
            raise SystemExit("the synthetic changes have a gap")
        bids, asks = self.sides
        bid, ask = self.best
        for price, size in data["b"]:
            px = _e8(price)
            if qty := _e8(size):
                bids[px] = qty
                bid = max(bid, px)
            else:
                bids.pop(px, None)
        for price, size in data["a"]:
            px = _e8(price)
            if qty := _e8(size):
                asks[px] = qty
                ask = min(ask, px)
            else:
                asks.pop(px, None)
        if bid not in bids:
            bid = max(bids)
        if ask not in asks:
            ask = min(asks)
        self.last_id, self.best = data["u"], [bid, ask]


def _e8(text: str) -> int:
    return int(text.replace(".", ""))


class Changes:
    """The two ways on one tape in memory."""

    def __init__(self, changes: int) -> None:
        self.frames = list(frames(changes))
        self.block = FrameBlock.from_frames(self.frames, ANCHOR)
        self.payloads = [frame.payload for frame in self.frames]

    @property
    def mean_bytes(self) -> float:
        return sum(map(len, self.payloads[2:])) / len(self.payloads[2:])

    def check(self) -> int:
        """Both ways see the same best prices after every change, and the same levels at the end: how many.

        Raises SystemExit if they do not.
        """
        engine, book = Engine({"binance": [SYMBOL]}, CONFIG), Dicts()
        book.snapshot(self.payloads[1])
        engine.feed(self.block.slice(0, 2))
        for k, payload in enumerate(self.payloads[2:], 2):
            engine.feed(self.block.slice(k, k + 1))
            book.change(payload)
            ours = [int(window(engine.state, 0, side)[0][0]) for side in (0, 1)]
            if ours != book.best:
                raise SystemExit(f"the two ways differ at message {k}: arbl2 {ours}, dicts {book.best}")
        full = [dict(zip(*(column.tolist() for column in ladder(engine.state, 0, side)[:2]), strict=True)) for side in (0, 1)]
        if full != book.sides:
            raise SystemExit("the two ways differ in levels behind the best prices")
        return sum(map(len, full))

    def engine(self) -> Callable[[], None]:
        """The book is loaded, the changes are to come."""
        engine, changes = Engine({"binance": [SYMBOL]}, CONFIG), self.block.slice(2, len(self.block))
        engine.feed(self.block.slice(0, 2))
        return lambda: engine.feed(changes)

    def dicts(self) -> Callable[[], None]:
        """The same."""
        book, changes = Dicts(), self.payloads[2:]
        book.snapshot(self.payloads[1])

        def run() -> None:
            for payload in changes:
                book.change(payload)

        return run

    def rounds(self, count: int) -> list[Figure]:
        """Microseconds per change of each way over ``count`` rounds in turn, after one that is not counted."""
        ways = {"depth changes: raw to full book": self.engine, "the same with orjson and dicts, touch only": self.dicts}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(count + 1):
            for name, prepare in ways.items():
                way = prepare()
                gc.collect()
                started = time.perf_counter()
                way()
                if number:
                    taken[name].append((time.perf_counter() - started) / len(self.payloads[2:]) * 1e6)
        return [Figure(name, tuple(values)) for name, values in taken.items()]
