"""A small tape on which everything happens to books, and the linear replay that time travel is compared with.

Full books from depth changes, books from windows, snapshots on time and late, gaps in ids, refused messages, lost connections,
dropped messages, silence, many frames in the same nanosecond, stamps that step back.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arbl2.aggregator import SourceStatus
from arbl2.book import ladder, window
from arbl2.config import PolicyConfig, RunConfig
from arbl2.engine import Engine
from arbl2.frames import Frame, FrameKind, Op
from arbl2.money import E8
from arbl2.tape import TAPE_VERSION, Manifest, TapeReader, write_session
from arbl2_replay.travel import Validity, Why
from arbl2_replay.wire import Book, DepthChange, binance_combined, binance_depth, binance_diff, upbit_orderbook

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from arbl2.aggregator import Level, MultiExchangeL2Snapshot

START_NS = 1_767_312_000_000_000_000
MS = 1_000_000
NEVER = RunConfig(policy=PolicyConfig(entry_bps=1e6, tp_bps=1e6))
INSTRUMENTS = {
    "upbit": ["KRW-ADA", "KRW-BTC", "KRW-USDT", "KRW-XRP"],
    "binance": ["BTCUSDT", "ETHUSDT", "XRPUSDT"],
}
NAMES = ("BTC", "XRP", "KRW-ADA", "eth", "KRW-BTC", "USDT")
PRICES = {"ADA": 1_100, "BTC": 140_000_000, "USDT": 1_400, "XRP": 3_000, "BTCUSDT": 100_000, "ETHUSDT": 3_500, "XRPUSDT": 2}
WINDOWED = ("XRPUSDT",)
PAUSES_NS = (0, 0, 1, 900_000, 4_000_000, 11_000_000, 30_000_000)


@dataclass
class _Maker:
    """Frames by chance, from a seed."""

    chance: random.Random
    frames: list[Frame] = field(default_factory=list)
    mono_ns: int = 5_000_000
    conn: dict[str, int] = field(default_factory=lambda: {"upbit": 1, "binance": 2})
    ids: dict[str, int] = field(default_factory=dict)

    def add(self, venue: str, kind: FrameKind, payload: bytes) -> None:
        self.mono_ns += self.chance.choice(PAUSES_NS)
        if self.chance.random() < 0.004:
            self.mono_ns += self.chance.choice((2_100_000_000, 4_000_000_000, 11_000_000_000))
        back_ns = 3_000_000 if self.chance.random() < 0.01 else 0
        op = Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE
        conn = self.conn.get(venue, 0)
        mono_ns = max(self.mono_ns - back_ns, 0)
        self.frames.append(Frame(len(self.frames) + 1, START_NS + mono_ns, mono_ns, venue, conn, kind, op, payload))

    def levels(self, price: int, count: int, side: int) -> list[tuple[int, int]]:
        """Best first; some sizes of 0 stand for nothing."""
        step = max(price * E8 // 20_000, 1)
        start = price * E8 + (step if side else 0)
        picked = sorted(self.chance.sample(range(2 * count), count))
        return [(start + (k if side else -k) * step, self.chance.randint(1, 9 * E8)) for k in picked]

    def upbit(self) -> None:
        coin = self.chance.choice(("ADA", "BTC", "BTC", "USDT", "XRP"))
        sides = [self.levels(PRICES[coin], 30, side) for side in (0, 1)]
        book = Book(*([level[k] for level in side] for side in sides for k in (0, 1)))
        payload = upbit_orderbook(f"KRW-{coin}", book, 1_767_312_000_000 + self.mono_ns // MS)
        if self.chance.random() < 0.02:
            payload = payload.replace(b'"total_ask_size":', b'"total_ask_size":1')
        self.add("upbit", FrameKind.MESSAGE, payload)

    def window(self) -> None:
        symbol = self.chance.choice(WINDOWED)
        sides = [self.levels(PRICES[symbol], 20, side) for side in (0, 1)]
        book = Book(*([level[k] for level in side] for side in sides for k in (0, 1)))
        self.ids[symbol] = self.ids.get(symbol, 1_000) + self.chance.choice((1, 7, 0, -20))
        payload = binance_combined(f"{symbol.lower()}@depth20@100ms", binance_depth(book, max(self.ids[symbol], 1)))
        self.add("binance", FrameKind.MESSAGE, payload)

    def change(self) -> None:
        symbol = self.chance.choice(("BTCUSDT", "BTCUSDT", "ETHUSDT"))
        first = self.ids.get(symbol, 1_000) + (1 if self.chance.random() > 0.02 else 5)
        self.ids[symbol] = first + self.chance.randint(0, 4)
        sides = []
        for side in (0, 1):
            rows = self.levels(PRICES[symbol], 80, side)
            rows = self.chance.sample(rows, self.chance.randint(0, 8))
            sides.append([(px, 0 if self.chance.random() < 0.4 else size) for px, size in rows])
        change = DepthChange(first, self.ids[symbol], sides[0], sides[1])
        data = binance_diff(symbol, change, 1_767_312_000_000 + self.mono_ns // MS)
        self.add("binance", FrameKind.MESSAGE, binance_combined(f"{symbol.lower()}@depth@100ms", data))

    def snapshot(self) -> None:
        symbol = self.chance.choice(("BTCUSDT", "ETHUSDT"))
        url = f"https://api.binance.com/api/v3/depth?symbol={symbol}&limit=5000"
        self.add("binance", FrameKind.REQUEST, b'{"method":"GET","url":"%b"}' % url.encode())
        for _ in range(self.chance.randint(0, 12)):
            self.something()
        if self.chance.random() < 0.2:
            return  # it was never answered
        sides = [self.levels(PRICES[symbol], 60, side) for side in (0, 1)]
        if self.chance.random() < 0.1:
            sides[1].reverse()
        book = Book(*([level[k] for level in side] for side in sides for k in (0, 1)))
        known = self.ids.get(symbol, 1_000) - self.chance.choice((0, 2, 10, 30))
        self.add("binance", FrameKind.RESPONSE, binance_depth(book, max(known, 1), depth=1_000))

    def broken(self) -> None:
        venue = self.chance.choice(("upbit", "binance"))
        if self.chance.random() < 0.4:
            self.add(venue, FrameKind.ALARM, b'{"alarm":"dropped","messages":3}')
            return
        covered = b'"covered":true' if self.chance.random() < 0.3 else b'"covered":false'
        self.add(venue, FrameKind.CLOSED, b'{"code":1006,"reason":"","clean":false,%b}' % covered)
        self.conn[venue] += 2
        self.add(venue, FrameKind.OPENED, b'{"url":"wss://test"}')

    def something(self) -> None:
        kinds = (self.upbit, self.change, self.window, self.broken, self.clock)
        self.chance.choices(kinds, (45, 40, 15, 0.7, 1))[0]()

    def clock(self) -> None:
        self.add("", FrameKind.CLOCK, b'{"wall_ns":1,"mono_ns":1}')


def tape(folder: Path, *, frames: int = 3_000, seed: int = 1, snapshots: float = 0.006) -> Path:
    """Write the tape. ``snapshots``: how likely one is asked for at a frame."""
    maker = _Maker(random.Random(seed))
    maker.snapshot()
    while len(maker.frames) < frames:
        if maker.chance.random() < snapshots:
            maker.snapshot()
        maker.something()
    manifest = Manifest(
        tape_version=TAPE_VERSION,
        session=f"restless-{seed}",
        state="sealed",
        anchor_wall_ns=START_NS,
        anchor_mono_ns=0,
        instruments=INSTRUMENTS,
    )
    write_session(folder, manifest, maker.frames, zstd_level=1)
    return folder


# ------------------------------------------------------------------------------------------------------- linear replay


@dataclass(frozen=True)
class Seen:
    """What the linear replay has at an instant about one name."""

    seq: int
    books: tuple[dict[str, Any], ...]
    snapshot: MultiExchangeL2Snapshot | None
    full: tuple[tuple[Level, ...], tuple[Level, ...]] | None
    validity: Validity


class Linear:
    """An engine that takes a tape frame by frame, once, and is asked at instants in rising order."""

    def __init__(self, folder: Path, config: RunConfig = NEVER) -> None:
        reader = TapeReader(folder)
        self._engine = Engine(reader.manifest.instruments, config)
        self._blocks = list(reader.blocks())
        self.times: list[int] = []
        self.seqs: list[int] = []
        for block in self._blocks:
            for time_ns, seq in zip(block.time_ns.tolist(), block.seq.tolist(), strict=True):
                self.times.append(max(time_ns, self.times[-1] if self.times else 0))
                self.seqs.append(seq)
        self._changes: list[list[int]] = [[] for _ in self._engine.universe.instruments]

    def answers(self, questions: Iterable[tuple[int, str]]) -> list[Seen]:
        """The answers to (engine time, name), which must be sorted; how long each holds is filled in when the tape is over."""
        frames = self._frames()
        done = 0
        drafts = []
        for time_ns, name in questions:
            count = bisect.bisect_right(self.times, time_ns)
            while done < count:
                next(frames)
                done += 1
            drafts.append((time_ns, done, self._look(time_ns, name)))
        for _ in frames:
            pass
        return [
            Seen(self.seqs[count - 1], books, snapshot, full, self._validity(time_ns, count, numbers, limits))
            for time_ns, count, (numbers, limits, books, snapshot, full) in drafts
        ]

    def _frames(self) -> Iterator[None]:
        number = 0
        before = [self._content(k) for k in range(len(self._changes))]
        for block in self._blocks:
            for row in range(len(block)):
                self._engine.feed(block.slice(row, row + 1))
                for k, old in enumerate(before):
                    now = self._content(k)
                    if now != old:
                        before[k] = now
                        self._changes[k].append(number)
                number += 1
                yield

    def _content(self, number: int) -> tuple[Any, ...]:
        """Everything of a book that can be seen."""
        state = self._engine.state
        row = state.books[number]
        fields = ("connected", "trusted", "last_ns", "updates", "update_id", "exchange_ms", "windowed")
        arrays = [a for side in (0, 1) for a in (*window(state, number, side), *ladder(state, number, side))]
        return (*(int(row[name]) for name in fields), *(a.tobytes() for a in arrays))

    def _numbers(self, name: str) -> tuple[int, ...]:
        universe = self._engine.universe
        if name.upper() in universe.symbols:
            k = universe.symbols.index(name.upper())
            return universe.upbit_books[k], universe.binance_books[k], universe.fx_book
        wanted = {name.upper(), f"KRW-{name.upper()}", f"{name.upper()}USDT"}
        return (next(k for k, instrument in enumerate(universe.instruments) if instrument.name in wanted),)

    def _look(self, time_ns: int, name: str) -> tuple[Any, ...]:
        state, universe, aggregator = self._engine.state, self._engine.universe, self._engine.aggregator
        books, limits = [], {}
        numbers = self._numbers(name)
        for number in numbers:
            row = state.books[number]
            limit_ns = 10_000_000_000 if number == universe.fx_book else 2_000_000_000
            age_ns = time_ns - int(row["last_ns"])
            status = SourceStatus.STALE
            if not row["connected"]:
                status = SourceStatus.DISCONNECTED
            elif row["trusted"] and age_ns <= limit_ns:
                status, limits[number] = SourceStatus.ACTIVE, int(row["last_ns"]) + limit_ns
            sides = [tuple(zip(*(a.tolist() for a in window(state, number, side)), strict=True)) for side in (0, 1)]
            books.append(
                {
                    "name": universe.instruments[number].name,
                    "status": status,
                    "age_ns": age_ns if row["updates"] else None,
                    "update_id": int(row["update_id"]),
                    "exchange_ms": int(row["exchange_ms"]),
                    "bids": sides[0],
                    "asks": sides[1],
                }
            )
        symbol = name.upper()
        pair = symbol in universe.symbols
        snapshot = aggregator.snapshot(symbol, time_ns) if pair else None
        full = aggregator.full_book(symbol, universe.instruments[numbers[1]].venue) if pair else None
        return numbers, limits, tuple(books), snapshot, full

    def _validity(self, time_ns: int, count: int, numbers: tuple[int, ...], limits: dict[int, int]) -> Validity:
        end_ns = self.times[-1]
        nexts = []
        for order, number in enumerate(numbers):
            at = bisect.bisect_left(self._changes[number], count)
            if at < len(self._changes[number]):
                nexts.append((self._changes[number][at], order))
        stale_ns, stale = min(((limit, number) for number, limit in limits.items()), default=(end_ns, -1))
        names = [instrument.name for instrument in self._engine.universe.instruments]
        if nexts:
            frame, order = min(nexts)
            if self.times[frame] <= stale_ns:
                return Validity(max(self.times[frame] - 1, time_ns), Why.FRAME, names[numbers[order]], self.seqs[frame])
        if stale < 0 or stale_ns >= end_ns:
            return Validity(end_ns, Why.END)
        return Validity(stale_ns, Why.STALE, names[stale])


def questions(times: list[int], count: int, seed: int, names: tuple[str, ...]) -> list[tuple[int, str]]:
    """Instants on frames, a nanosecond beside them and anywhere between, with names; sorted."""
    chance = random.Random(seed)
    found = []
    for k in range(count):
        on = chance.choice(times)
        anywhere = chance.randint(times[0], times[-1])
        time_ns = (on, on - 1, on + 1, anywhere)[k % 4]
        found.append((min(max(time_ns, times[0]), times[-1]), chance.choice(names)))
    return sorted(found)
