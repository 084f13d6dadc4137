"""Makes the tapes of the golden datasets. Run by hand, once; the tapes are data from then on.

.venv/bin/python tests/golden/make_tapes.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

from arbl2.frames import Frame, FrameKind, Op
from arbl2.tape import TAPE_VERSION, Manifest, write_session
from arbl2_replay.synth import Fault, FaultKind, SynthConfig, synth_frames, synth_manifest
from arbl2_replay.wire import Book, binance_combined, binance_depth, upbit_orderbook

GOLDEN = Path(__file__).resolve().parents[2] / "datasets" / "golden"
E8 = 100_000_000


def two_venue_60s() -> SynthConfig:
    """60 s, three coins, both venues, with everything that goes wrong."""
    at = iter(range(3_000, 60_000, 1_370))
    bad = [
        Fault(kind=FaultKind(kind), at_ms=next(at), venue=venue, code=code)
        for kind, venue, code in (
            ("truncated", "upbit", "KRW-BTC"),
            ("truncated", "binance", "BTCUSDT"),
            ("not_utf8", "upbit", "KRW-ETH"),
            ("not_utf8", "binance", "ETHUSDT"),
            ("wrong_type", "upbit", "KRW-XRP"),
            ("wrong_type", "binance", "XRPUSDT"),
            ("nan", "upbit", "KRW-BTC"),
            ("nan", "binance", "BTCUSDT"),
            ("negative", "upbit", "KRW-ETH"),
            ("negative", "binance", "ETHUSDT"),
            ("unsorted", "upbit", "KRW-XRP"),
            ("unsorted", "binance", "XRPUSDT"),
            ("crossed", "upbit", "KRW-BTC"),
            ("crossed", "binance", "BTCUSDT"),
            ("unknown_symbol", "upbit", "KRW-BTC"),
            ("unknown_symbol", "binance", "BTCUSDT"),
            ("backwards", "upbit", "KRW-BTC"),
            ("backwards", "binance", "BTCUSDT"),
            ("wrong_total", "upbit", "KRW-ETH"),
            ("up", "upbit", ""),
            ("binance_ack", "binance", ""),
            ("binance_error", "binance", ""),
            ("upbit_error", "upbit", ""),
        )
    ]
    return SynthConfig(
        seed=60,
        duration_s=60.0,
        excursion_every_s=8.0,
        faults=(
            *bad,
            Fault(kind=FaultKind.DISCONNECT, at_ms=14_000, venue="upbit", lasts_ms=1_500),
            Fault(kind=FaultKind.DISCONNECT, at_ms=35_000, venue="binance", lasts_ms=900),
            Fault(kind=FaultKind.STALE, at_ms=22_000, venue="binance", lasts_ms=3_000),
            Fault(kind=FaultKind.STALE, at_ms=41_000, venue="upbit", code="KRW-ETH", lasts_ms=4_000),
            Fault(kind=FaultKind.CLOCK_STEP, at_ms=50_000, step_ms=-200),
        ),
    )


def _book(bid: int, ask: int, size: str, decimals: int = 8) -> Book:
    size_e8 = round(float(size) * E8)
    return Book([bid], [size_e8], [ask], [size_e8])


def crossed() -> list[Frame]:
    """A handful of books in which the profit can be computed by hand (it is, in test_golden.py)."""
    ms = 1_000_000
    fx = upbit_orderbook("KRW-USDT", _book(1_400 * E8, 1_401 * E8, "50000"), 1, units=1)

    def upbit(bid_krw: int, ask_krw: int, at_ms: int) -> bytes:
        return upbit_orderbook("KRW-BTC", _book(bid_krw * E8, ask_krw * E8, "0.5"), at_ms, units=1)

    def binance(bid_cents: int, ask_cents: int, update_id: int) -> bytes:
        book = _book(bid_cents * E8 // 100, ask_cents * E8 // 100, "0.5")
        return binance_combined("btcusdt@depth5@100ms", binance_depth(book, update_id, depth=5))

    events = [
        (0, "upbit", FrameKind.OPENED, b'{"url":"wss://api.upbit.com/websocket/v1"}'),
        (1, "binance", FrameKind.OPENED, b'{"url":"wss://stream.binance.com:9443/stream"}'),
        (10, "upbit", FrameKind.MESSAGE, fx),
        # crossed by 7 %: Upbit bids 150,000,000 KRW, Binance asks 100,000 USDT x 1,401
        (100, "upbit", FrameKind.MESSAGE, upbit(150_000_000, 150_100_000, 100)),
        (110, "binance", FrameKind.MESSAGE, binance(9_999_000, 10_000_000, 1)),
        (210, "binance", FrameKind.MESSAGE, binance(9_999_000, 10_000_000, 2)),
        (220, "upbit", FrameKind.MESSAGE, upbit(150_000_000, 150_100_000, 220)),
        (1_000, "upbit", FrameKind.MESSAGE, fx),
        # the premium is gone: Upbit asks 140,000,000 KRW, Binance bids 99,990 USDT x 1,400
        (1_100, "upbit", FrameKind.MESSAGE, upbit(139_900_000, 140_000_000, 1_100)),
        (1_110, "binance", FrameKind.MESSAGE, binance(9_999_000, 10_000_000, 3)),
        (1_310, "binance", FrameKind.MESSAGE, binance(9_999_000, 10_000_000, 4)),
        (1_320, "upbit", FrameKind.MESSAGE, upbit(139_900_000, 140_000_000, 1_320)),
        (1_400, "upbit", FrameKind.CLOSED, b'{"code":1000,"reason":"","clean":true}'),
        (1_401, "binance", FrameKind.CLOSED, b'{"code":1000,"reason":"","clean":true}'),
    ]
    start = 1_767_312_000_000_000_000
    return [
        Frame(
            seq=seq,
            recv_ns=start + at * ms,
            mono_ns=5_000_000_000 + at * ms,
            venue=venue,
            conn=1 if venue == "upbit" else 2,
            kind=kind,
            op=(Op.BINARY if venue == "upbit" else Op.TEXT) if kind is FrameKind.MESSAGE else Op.NONE,
            payload=payload,
        )
        for seq, (at, venue, kind, payload) in enumerate(events, start=1)
    ]


def main() -> None:
    config = two_venue_60s()
    for name, manifest, frames in (
        ("two-venue-60s", synth_manifest(config), synth_frames(config)),
        (
            "crossed",
            Manifest(
                tape_version=TAPE_VERSION,
                session="crossed",
                state="sealed",
                anchor_wall_ns=1_767_312_000_000_000_000,
                anchor_mono_ns=5_000_000_000,
                instruments={"upbit": ["KRW-BTC", "KRW-USDT"], "binance": ["BTCUSDT"]},
                notes=["made by hand: not data of any venue"],
            ),
            iter(crossed()),
        ),
    ):
        folder = GOLDEN / name / "tape"
        shutil.rmtree(folder, ignore_errors=True)
        done = write_session(folder, manifest, frames, zstd_level=19)
        print(name, done.rows, "frames", done.segments[0].bytes, "bytes")


if __name__ == "__main__":
    main()
