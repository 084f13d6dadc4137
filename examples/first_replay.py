"""Replay the golden recording and look at its fills in a data frame.

python examples/first_replay.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl

import arbl2

TAPE = Path(__file__).resolve().parents[1] / "datasets" / "golden" / "two-venue-60s" / "tape"

with tempfile.TemporaryDirectory() as folder:
    result = arbl2.replay(TAPE, arbl2.RunConfig(), out=Path(folder))
    fills = result.fills()

print(f"{result.frames} frames, digest {result.digest[:16]}, PnL {result.kpi['pnl_krw']} KRW")
print(
    fills.group_by("symbol", "venue", "status")
    .agg(legs=pl.len(), coin=pl.col("filled_e8").sum() / 1e8)
    .sort("symbol", "venue", "status")
)
