"""The tape that is measured: a synthetic BTC market on two venues, made once and kept in ``benchmarks/.data``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from arbl2.frames import FrameKind
from arbl2.tape import write_session
from arbl2_replay.synth import SYMBOLS, SynthConfig, synth_frames, synth_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arbl2.frames import Frame

DATA = Path(__file__).with_name(".data")


def tape(messages: int) -> Path:
    """The session folder of ``messages`` messages: Upbit KRW-BTC and KRW-USDT with 15 units, Binance BTCUSDT with 20 levels."""
    # the market gives some 23 messages a second
    config = SynthConfig(seed=7, duration_s=60 + messages / 20, symbols=(SYMBOLS["BTC"],), upbit_units=15, binance_depth=20)
    folder = DATA / f"btc-{messages}"
    if not (folder / "manifest.json").exists():
        write_session(folder, synth_manifest(config), _first(synth_frames(config), messages))
    return folder


def _first(frames: Iterator[Frame], messages: int) -> Iterator[Frame]:
    for frame in frames:
        yield frame
        messages -= frame.kind is FrameKind.MESSAGE
        if messages == 0:
            return
