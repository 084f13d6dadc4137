"""Markets small enough to follow by hand: books at given milliseconds, in the bytes that the venues send.

``Market`` collects frames, ``run`` takes them through the engine twice, as a whole and in blocks of one, and holds both to one
digest. ``Script`` is a policy that asks at given milliseconds and remembers every view it was shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from arbl2.config import PaperConfig, PolicyConfig, RunConfig
from arbl2.engine import Engine
from arbl2.events import Direction, Intent
from arbl2.frames import Anchor, Frame, FrameBlock, FrameKind, Op
from arbl2.policy import Ask
from arbl2.tape import TAPE_VERSION, Manifest, write_session
from arbl2_replay.kpi import Kpi
from arbl2_replay.wire import Book, binance_combined, binance_depth, upbit_orderbook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.policy import View

    Number = int | float | str
    Levels = Sequence[tuple[Number, Number]]

E8 = 10**8
MS = 10**6
START_NS = 1_700_000_000 * 10**9
ANCHOR = Anchor(START_NS, 0)
INSTRUMENTS = {"upbit": ["KRW-BTC", "KRW-USDT", "KRW-XRP"], "binance": ["BTCUSDT", "XRPUSDT"]}
UPBIT, BINANCE = 1, 2
FREE = PaperConfig(upbit_fee_bps=0.0, binance_fee_bps=0.0, upbit_krw="1000000000", binance_usdt="1000000")


def e8(number: Number) -> int:
    """A decimal as it is written, in 10^-8."""
    return int(Decimal(str(number)) * E8)


def at_ns(ms: float) -> int:
    """Engine time of a millisecond of the market."""
    return START_NS + round(ms * MS)


class Market:
    """Frames in the order added. Levels are (price, size), best first; Upbit is connection 1 and Binance connection 2."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def add(self, ms: float, venue: str, kind: FrameKind, payload: bytes, conn: int = 0) -> Market:
        op = Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE
        conn = conn or (1 if venue == "upbit" else 2)
        mono_ns = ANCHOR.mono_ns + round(ms * MS)
        self.frames.append(Frame(len(self.frames) + 1, at_ns(ms), mono_ns, venue, conn, kind, op, payload))
        return self

    def upbit(self, ms: float, bids: Levels, asks: Levels, coin: str = "BTC", conn: int = 0) -> Market:
        payload = upbit_orderbook(f"KRW-{coin}", book(bids, asks), 1, units=30)
        return self.add(ms, "upbit", FrameKind.MESSAGE, payload, conn)

    def binance(self, ms: float, bids: Levels, asks: Levels, coin: str = "BTC", update_id: int = 0, conn: int = 0) -> Market:
        depth = binance_depth(book(bids, asks), update_id or len(self.frames) + 1)
        payload = binance_combined(f"{coin.lower()}usdt@depth20@100ms", depth)
        return self.add(ms, "binance", FrameKind.MESSAGE, payload, conn)

    def rate(self, ms: float, bid: Number = 1_399, ask: Number = 1_400) -> Market:
        """The KRW-USDT book."""
        return self.upbit(ms, [(bid, 10_000_000)], [(ask, 10_000_000)], "USDT")

    def premium(self, ms: float) -> Market:
        """All three books: selling on Upbit (150,000,000 KRW) and buying on Binance (100,000 USDT x 1,400) gains 7 %."""
        self.rate(ms).upbit(ms + 1, [(150_000_000, 10)], [(150_100_000, 10)])
        return self.binance(ms + 2, [(99_990, 10)], [(100_000, 10)])

    def parity(self, ms: float) -> Market:
        """All three books, with nothing to gain either way."""
        self.rate(ms).upbit(ms + 1, [(139_900_000, 10)], [(140_100_000, 10)])
        return self.binance(ms + 2, [(99_990, 10)], [(100_000, 10)])

    def block(self) -> FrameBlock:
        return FrameBlock.from_frames(self.frames, ANCHOR)

    def write(self, folder: Path, session: str = "market", **fields: Any) -> Path:
        """The market as a recording."""
        write_session(folder, manifest(session, **fields), self.frames)
        return folder


def manifest(session: str = "market", **fields: Any) -> Manifest:
    values: dict[str, Any] = {
        "tape_version": TAPE_VERSION,
        "session": session,
        "state": "sealed",
        "anchor_wall_ns": ANCHOR.wall_ns,
        "anchor_mono_ns": ANCHOR.mono_ns,
        "instruments": INSTRUMENTS,
    }
    return Manifest(**{**values, **fields})


def book(bids: Levels, asks: Levels) -> Book:
    return Book(*([e8(level[k]) for level in side] for side in (bids, asks) for k in (0, 1)))


def buy_binance(size: Number, upbit: Number = 0) -> Ask:
    """Buy on Binance; sell ``upbit`` coins on Upbit."""
    return Ask(Direction.SELL_UPBIT, Intent.ENTRY, e8(upbit), e8(size))


def sell_upbit(size: Number) -> Ask:
    return buy_binance(0, size)


def sell_binance(size: Number, upbit: Number = 0) -> Ask:
    """Sell on Binance; buy ``upbit`` coins on Upbit."""
    return Ask(Direction.BUY_UPBIT, Intent.EXIT, e8(upbit), e8(size))


class Script:
    """Asks at given milliseconds (of one coin), and remembers the views by millisecond."""

    def __init__(self, asks: Mapping[float, Ask], coin: str = "BTC") -> None:
        self.asks = {at_ns(ms): ask for ms, ask in asks.items()}
        self.coin = coin
        self.views: dict[float, View] = {}

    def decide(self, view: View) -> Ask | None:
        if view.symbol != self.coin:
            return None
        self.views[(view.time_ns - START_NS) / MS] = view
        return self.asks.get(view.time_ns)


@dataclass
class Outcome:
    """What a market gave."""

    engine: Engine
    decisions: NDArray[Any]
    fills: NDArray[Any]
    kpi: dict[str, Any]
    views: dict[float, View]

    def filled(self, venue: int) -> list[int]:
        """Filled sizes of one venue's orders (10^-8), in the order resolved."""
        return [int(row["filled_e8"]) for row in self.fills if row["venue"] == venue]


def take(engine: Engine, market: Market, step: int = 0) -> Engine:
    """Feed the whole market, ``step`` frames at once (0: all), and finish."""
    block = market.block()
    step = step or len(block)
    for start in range(0, len(block), step):
        engine.feed(block.slice(start, min(start + step, len(block))))
    engine.finish()
    return engine


def feed(market: Market, config: RunConfig, script: Any = None, step: int = 0) -> Engine:
    """A new engine that has taken the market."""
    return take(Engine(INSTRUMENTS, config, policy=script), market, step)


def run(market: Market, config: RunConfig | None = None, policy: Callable[[], Any] | None = None) -> Outcome:
    """Whole, then frame by frame with a policy made anew: the same digest, whatever the block size."""
    config = config or RunConfig(symbols=("BTC",))
    script = policy() if policy else None
    engine = feed(market, config, script)
    assert feed(market, config, policy() if policy else None, step=1).digest() == engine.digest()
    events = engine.drain()
    kpi = Kpi(engine)
    kpi.add(events)
    return Outcome(engine, events.decisions, events.fills, kpi.result(), getattr(script, "views", {}))


def play(market: Market, asks: Mapping[float, Ask], paper: PaperConfig = FREE, coin: str = "BTC") -> Outcome:
    """The market with a ``Script`` of asks for one coin."""
    return run(market, RunConfig(symbols=(coin,), paper=paper), lambda: Script(asks, coin))


def threshold(entry_bps: float = 20.0, tp_bps: float = 4_000.0, size_krw: str = "1000000") -> RunConfig:
    """The compiled policy on BTC with room for many entries; by default it never closes."""
    policy = PolicyConfig(entry_bps=entry_bps, tp_bps=tp_bps, size_krw=size_krw, max_position_krw="1000000000")
    coins = {"BTC": "1000"}
    paper = PaperConfig(upbit_krw="1000000000", binance_usdt="10000000", upbit_coins=coins, binance_coins=coins)
    return RunConfig(symbols=("BTC",), policy=policy, paper=paper)
