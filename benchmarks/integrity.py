"""How often the gap ledger cries wolf, and what looking costs: ``python -m benchmarks.integrity [--minutes 60]``.

A clean synthetic market of both venues, with every stream the recorder takes (books, diffs with their REST books, trades, book
tickers) and the jitter of real ones, goes through the inspector; so do the real captures, if they are there. Every row of the
ledger would be a false flag. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from arbl2.frames import BINANCE, VENUES, ExchangeId, Frame, FrameBlock, FrameKind, Op
from arbl2.tape import TapeReader
from arbl2_recorder.integrity import Inspector
from arbl2_replay.flow import BinanceFlow, UpbitFlow
from arbl2_replay.importer import import_capture
from arbl2_replay.synth import SYMBOLS, SynthConfig, market_events, synth_manifest
from arbl2_replay.wire import (
    binance_book_ticker,
    binance_combined,
    binance_depth,
    binance_diff,
    binance_trade,
    upbit_orderbook,
    upbit_trade,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from arbl2.frames import Anchor
    from arbl2_recorder.ledger import Gap
    from arbl2_replay.synth import MarketEvent

CAPTURES = Path(__file__).resolve().parents[2] / "shared" / "data"
NAMES = ("upbit_frames_first10s.jsonl", "binance_spot_btcusdt_first30s.txt.gz", "binance_spot_btcusdt_depth20_first60s.txt.gz")
BLOCK = 2_000
MS = 1_000_000
CLOCK_NS = 10_000 * MS
DELAYS_MS = {"upbit": 4.0, "binance": 6.0}


class _Market:
    """Everything that both venues say of a synthetic market, as a recorder's frames; nothing is ever wrong with it."""

    def __init__(self, config: SynthConfig) -> None:
        self._config = config
        self._anchor = synth_manifest(config).anchor
        self._simple = config.upbit_format == "SIMPLE"
        self._chance = random.Random(config.seed)
        self._flows: dict[tuple[str, str], UpbitFlow | BinanceFlow] = {}
        self._last_ns: dict[str, int] = {}
        self._waiting: list[tuple[int, int, str, int, FrameKind, bytes]] = []
        self._count = 0

    def frames(self) -> Iterator[Frame]:
        """Frames in order; a message is delivered a little after it was sent, and never overtakes another of its venue."""
        seq, clock_ns = 0, 0
        for event in market_events(self._config):
            for payload in self._said(event):
                self._send(event.offset_ns, event.venue, payload)
            while self._waiting and self._waiting[0][0] <= event.offset_ns:
                offset_ns, _, venue, conn, kind, payload = heapq.heappop(self._waiting)
                if offset_ns >= clock_ns:
                    clock_ns = offset_ns + CLOCK_NS
                    seq += 1
                    yield self._frame(seq, offset_ns, "", 0, FrameKind.CLOCK, b"{}")
                seq += 1
                yield self._frame(seq, offset_ns, venue, conn, kind, payload)

    def _frame(self, seq: int, offset_ns: int, venue: str, conn: int, kind: FrameKind, payload: bytes) -> Frame:
        op = (Op.BINARY if venue == ExchangeId.UPBIT else Op.TEXT) if kind is FrameKind.MESSAGE else Op.NONE
        return Frame(seq, self._anchor.wall_ns + offset_ns, self._anchor.mono_ns + offset_ns, venue, conn, kind, op, payload)

    def _send(self, sent_ns: int, venue: str, payload: bytes, kind: FrameKind = FrameKind.MESSAGE, *, late_ms: float = 0) -> None:
        delay_ms = DELAYS_MS[venue] + late_ms + max(0.0, self._chance.gauss(3.6, 1.1))
        if self._chance.random() < 0.002:
            delay_ms += self._chance.uniform(15, 75)
        at_ns = sent_ns + int(delay_ms * MS)
        conn = 0
        if kind is FrameKind.MESSAGE:
            conn = VENUES.index(venue)
            at_ns = self._last_ns[venue] = max(at_ns, self._last_ns.get(venue, 0) + 2_000)
        self._count += 1
        heapq.heappush(self._waiting, (at_ns, self._count, venue, conn, kind, payload))

    def _said(self, event: MarketEvent) -> Iterator[bytes]:
        key = event.venue, event.code
        flow = self._flows.get(key)
        time_ms = event.mark if event.venue == ExchangeId.UPBIT else (self._config.start_ns + event.offset_ns) // MS
        if flow is None:
            first = UpbitFlow(event, time_ms) if event.venue == ExchangeId.UPBIT else BinanceFlow(event)
            self._flows[key] = first
            if isinstance(first, BinanceFlow):
                self._fetch(event, first)
            else:
                yield upbit_orderbook(event.code, event.book, event.mark, simple=self._simple, snapshot=True)
                yield upbit_trade(event.code, first.last, simple=self._simple, snapshot=True)
            return
        moved = flow.advance(event, time_ms, slow_is_due=False)
        if isinstance(flow, UpbitFlow):
            for number in range(len(moved.trades)):
                yield upbit_trade(event.code, flow.row(event, moved, number), simple=self._simple)
            yield upbit_orderbook(event.code, event.book, event.mark, simple=self._simple)
            return
        name = event.code.lower()
        for number, (px, size, sells) in enumerate(moved.trades, moved.first_trade_id):
            trade = binance_trade(event.code, number, px, size, time_ms, taker_sells=sells)
            yield binance_combined(f"{name}@trade", trade)
        if moved.touch:
            yield binance_combined(f"{name}@bookTicker", binance_book_ticker(event.code, event.book, event.mark))
        yield binance_combined(f"{name}@depth20@100ms", binance_depth(event.book, event.mark))
        if moved.change is not None:
            yield binance_combined(f"{name}@depth@100ms", binance_diff(event.code, moved.change, time_ms))

    def _fetch(self, event: MarketEvent, flow: BinanceFlow) -> None:
        """The book that the diffs start from: as it is now, asked for when the first of them has come."""
        url = f"https://rest/api/v3/depth?symbol={event.code}&limit=1000"
        # One venue's requests are made one at a time.
        late_ms = 300.0 + 200.0 * sum(isinstance(known, BinanceFlow) for known in self._flows.values())
        self._send(
            event.offset_ns, event.venue, b'{"method":"GET","url":"%s"}' % url.encode(), FrameKind.REQUEST, late_ms=late_ms
        )
        body = binance_depth(flow.deep.book(1_000), flow.deep.last_id, depth=1_000)
        self._send(event.offset_ns, event.venue, body, FrameKind.RESPONSE, late_ms=late_ms + 100.0)


def blocks(frames: Iterable[Frame], anchor: Anchor) -> Iterator[FrameBlock]:
    """Frames in blocks of ``BLOCK``."""
    part: list[Frame] = []
    for frame in frames:
        part.append(frame)
        if len(part) == BLOCK:
            yield FrameBlock.from_frames(part, anchor)
            part = []
    if part:
        yield FrameBlock.from_frames(part, anchor)


def inspect(name: str, parts: Iterable[FrameBlock]) -> int:
    """Print what the inspector says of the blocks and what it took; the number of rows."""
    inspector = Inspector()
    gaps: list[Gap] = []
    frames = data = 0
    took_s = 0.0
    for block in parts:
        frames += len(block)
        data += int(block.offsets[-1] - block.offsets[0])
        begin_s = time.perf_counter()
        gaps += inspector.inspect(block)
        took_s += time.perf_counter() - begin_s
    gaps += inspector.finish()
    causes = ", ".join(f"{cause} {n:,}" for cause, n in sorted(Counter(gap.cause.value for gap in gaps).items())) or "none"
    cost = f"{took_s / frames * 1e6:.1f} us per frame of {data / frames:,.0f} bytes"
    print(f"{name}: {frames:,} frames, flags: {causes}; {cost}", flush=True)
    for gap in gaps[:10]:
        print(f"    {gap.words}")
    return len(gaps)


def cost(config: SynthConfig) -> None:
    """Print what a partial book of some 1.4 kB takes."""
    parts = [frame for frame in _Market(config).frames() if frame.venue == VENUES[BINANCE] and b"@depth20@" in frame.payload]
    numbered = [Frame(n, f.recv_ns, f.mono_ns, f.venue, f.conn, f.kind, f.op, f.payload) for n, f in enumerate(parts, start=1)]
    inspect("partial books alone", list(blocks(numbered, synth_manifest(config).anchor)))


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.integrity", description="False flags of the gap ledger: must be 0."
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the synthetic market (default: 60)")
    options = parser.parse_args()
    flags = 0
    for upbit_format in ("DEFAULT", "SIMPLE"):
        # The formats differ on Upbit only; the second one needs no whole hour again.
        minutes = options.minutes if upbit_format == "DEFAULT" else options.minutes / 10
        symbols = tuple(SYMBOLS[coin] for coin in ("BTC", "ETH", "XRP"))
        config = SynthConfig(seed=11, duration_s=60.0 * minutes, symbols=symbols, upbit_format=upbit_format)
        market = blocks(_Market(config).frames(), synth_manifest(config).anchor)
        flags += inspect(f"{minutes:g} min of a clean market, every stream, {upbit_format}", market)
    cost(SynthConfig(seed=11, duration_s=200.0, symbols=(SYMBOLS["BTC"],)))
    if CAPTURES.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            for name in NAMES:
                tape = import_capture(CAPTURES / name, Path(folder)).path
                flags += inspect(name, TapeReader(tape).blocks())
    else:
        print("the real captures are not here (../shared/data)")
    print(f"false flags: {flags:,} (must be 0)")
    return 1 if flags else 0


if __name__ == "__main__":
    sys.exit(main())
