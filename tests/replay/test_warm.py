"""The warm-up is all of it: a replay after it compiles nothing more, nor loads anything more from numba's cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from numba import config

from arbl2.frames import Frame, FrameKind, Op
from arbl2_replay.wire import Book, DepthChange, binance_combined, binance_depth, binance_diff
from markets import ANCHOR, E8, INSTRUMENTS
from tapes import tape_of

GOLDEN = Path(__file__).parents[2] / "datasets/golden"
ASKED = b'{"method":"GET","url":"https://api.binance.com/api/v3/depth?symbol=BTCUSDT&limit=5000"}'
BIDS, ASKS = ([100 * E8], [E8]), ([101 * E8], [E8])

PROGRAM = """
import json, sys
from arbl2_replay import replay
from arbl2_replay.warm import warm_up


def signatures():
    kernels = [value for name, module in sys.modules.items() if name.startswith("arbl2") for value in vars(module).values()]
    return {kernel.__qualname__: len(kernel.signatures) for kernel in kernels if hasattr(kernel, "signatures")}


warm_up()
before = signatures()
updates = {}
for tape in sys.argv[1:]:
    result = replay(tape, decoded=False)
    updates[tape] = {book["instrument"]: book["updates"] for book in result.books}
print(json.dumps({"updates": updates, "before": before, "after": signatures()}))
"""


def full_books(folder):
    """The way of a full book: a change, the snapshot that was asked for, and a change that follows both."""
    name = "BTCUSDT"

    def change(update_id):
        data = binance_diff(name, DepthChange(update_id, update_id, ((100 * E8, update_id),), ()), 1_700_000_000_000)
        return FrameKind.MESSAGE, binance_combined("btcusdt@depth@100ms", data)

    snapshot = FrameKind.RESPONSE, binance_depth(Book(*BIDS, *ASKS), 2)
    contents = [change(2), (FrameKind.REQUEST, ASKED), snapshot, change(3)]
    frames = [
        Frame(seq, 0, ANCHOR.mono_ns + seq * 10**6, "binance", 1, kind, Op.NONE, payload)
        for seq, (kind, payload) in enumerate(contents, start=1)
    ]
    return tape_of(folder, frames, ANCHOR, INSTRUMENTS)


@pytest.mark.skipif(bool(config.DISABLE_JIT), reason="nothing is compiled")
def test_a_replay_after_the_warm_up_compiles_nothing(tmp_path):
    tapes = [GOLDEN / "two-venue-60s/tape", GOLDEN / "crossed/tape", full_books(tmp_path / "full")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, tapes)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["after"] == found["before"]
    assert {"scan_upbit", "scan_binance", "scan_snapshot", "run"} <= {name for name, count in found["before"].items() if count}
    assert found["updates"][str(tapes[0])]["KRW-BTC"] > 0
    assert found["updates"][str(tapes[2])]["BTCUSDT"] == 1
