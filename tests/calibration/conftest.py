"""Runs with a known truth: fill tables as the replay's sink writes them, from a seeded market of two venues."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbl2.events import FILL_DTYPE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

START_NS = 1_790_100_000 * 10**9  # on the grid of quarter hours
GAP_NS = 100_000_000
Columns = dict[str, np.ndarray]


def market(
    seed: int,
    *,
    n: int = 3_000,
    hours: float = 24.0,
    start_ns: int = START_NS,
    latency_ns: int = 150_000_000,
    first_order: int = 1,
) -> Columns:
    """``n`` legs on books that come every 100 ms. Level sizes survive with a chance that differs by venue and edge and moves
    with a shock shared by the quarter of an hour; at 150 ms the book before arrival is always newer than the decision book."""
    rng = np.random.default_rng(seed)
    time = np.sort(start_ns + rng.integers(0, int(hours * 3600e9), n))
    venue, side = rng.choice(["upbit", "binance"], n), rng.choice(["buy", "sell"], n)
    edge = rng.choice([3.0, 6.0, 9.0, 15.0, 25.0], n) * rng.choice([-1.0, 1.0], n)
    size = rng.integers(10**6, 10**8, n)
    depth = rng.integers(10**6, 2 * 10**8, n)
    visible = np.minimum(size, depth)
    shock = rng.normal(0.0, 0.5, int(hours * 4) + 2)[(time - start_ns) // (900 * 10**9)]
    chance = 1.0 / (1.0 + np.exp(-(1.0 + 0.5 * (venue == "binance") - 0.02 * np.abs(edge) + shock)))
    left = np.where(rng.random(n) < chance, 1.0, np.where(rng.random(n) < 0.3, rng.random(n), 0.0))
    before = np.round(left * visible).astype(np.int64)
    after = np.round(before * np.where(rng.random(n) < 0.9, 1.0, rng.random(n))).astype(np.int64)
    arrive = time + latency_ns
    before_ns = arrive // GAP_NS * GAP_NS
    mid = rng.integers(9 * 10**12, 11 * 10**12, n)
    half = rng.integers(10**9, 3 * 10**9, n)
    sign = np.where(side == "buy", 1, -1)
    visible_px = mid + sign * (half + rng.integers(0, 10**9, n))
    fill_px = visible_px + sign * rng.integers(-(10**8), 5 * 10**8, n)
    ones = np.ones(n, dtype=np.int64)
    return {
        "order_id": np.arange(first_order, first_order + n),
        "decision_id": np.arange(first_order, first_order + n),
        "time_ns": time,
        "arrive_ns": arrive,
        "seq": np.arange(1, n + 1),
        "edge_bps": edge,
        "limit_px_e8": fill_px,
        "size_e8": size,
        "bid_px_e8": mid - half,
        "ask_px_e8": mid + half,
        "visible_e8": visible,
        "depth_e8": depth,
        "visible_quote_e8": np.round(visible_px / 1e8 * visible).astype(np.int64),
        "decision_book_ns": time // GAP_NS * GAP_NS,
        "filled_e8": before.copy(),
        "quote_e8": np.round(fill_px / 1e8 * before).astype(np.int64),
        "fee_e8": 0 * ones,
        "before_ns": before_ns,
        "before_e8": before,
        "after_ns": before_ns + GAP_NS,
        "after_e8": after,
        "after_filled_e8": 0 * ones,
        "after_quote_e8": 0 * ones,
        "symbol": np.full(n, "BTC"),
        "levels": ones,
        "venue": venue,
        "side": side,
        "direction": np.where((venue == "upbit") == (side == "sell"), "sell_upbit", "buy_upbit"),
        "intent": np.full(n, "entry"),
        "status": np.where(before == visible, "filled", np.where(before > 0, "partial", "unfilled")),
        "fee_in_base": np.zeros(n, dtype=bool),
        "first_in_episode": np.ones(n, dtype=bool),
        "resolved": np.ones(n, dtype=bool),
    }


def take(columns: Columns, rows: Any) -> Columns:
    return {name: column[rows] for name, column in columns.items()}


def write_run(
    folder: Path,
    columns: Columns,
    *,
    tape: str = "20260921T000000Z",
    source: str | None = "book",
    said: str | None = None,
    version: str | None = "1",
    row_group: int = 100_000,
    change: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A run folder. ``source`` None leaves the metadata out; ``said`` is what run.json claims; ``change`` edits run.json."""
    assert set(FILL_DTYPE.names or ()) >= set(columns), "a column that no fill row has"
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {}
    if version is not None:
        metadata["arbl2.fills"] = version
    if source is not None:
        metadata["arbl2.outcome_source"] = source
    texts = {"symbol", "venue", "side", "direction", "intent", "status"}
    table = pa.table(
        {name: pa.array(column.tolist(), pa.string()) if name in texts else pa.array(column) for name, column in columns.items()}
    )
    pq.write_table(
        table.replace_schema_metadata(metadata), folder / "fills.parquet", compression="zstd", row_group_size=row_group
    )
    run = {
        "run": {"id": "r1"},
        "tape": {"session": tape, "sha256": hashlib.sha256(tape.encode()).hexdigest()},
        "digest": hashlib.sha256(f"events of {tape}".encode()).hexdigest(),
        "outcome_source": said or source or "book",
        "books": [
            {
                "venue": venue,
                "instrument": instrument,
                "symbol": "BTC",
                "updates": 864_000,
                "gap_median_ns": GAP_NS,
                "gap_p99_ns": 3 * GAP_NS,
            }
            for venue, instrument in (("upbit", "KRW-BTC"), ("binance", "BTCUSDT"))
        ],
        "config": {},
        "rules": {},
    }
    if change is not None:
        change(run)
    (folder / "run.json").write_text(json.dumps(run))
    return folder


class Lab:
    """The helpers above, as one fixture (tests are not importable modules)."""

    START_NS = START_NS
    GAP_NS = GAP_NS
    market = staticmethod(market)
    take = staticmethod(take)
    write_run = staticmethod(write_run)


@pytest.fixture(scope="session")
def lab() -> type[Lab]:
    return Lab
