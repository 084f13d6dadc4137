"""What calibrating costs: ``python -m benchmarks.calibrate``.

Synthetic fill events, written as a replay writes them, go through the real DuckDB store to block sums; beside it a polars query
makes the same sums from the same file. Each measurement has a process of its own, the two take turns, and the sums must be
equal to the last integer.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from arbl2.events import FILL_DTYPE, Side
from arbl2.frames import BINANCE, UPBIT
from arbl2.zones import ZoneTable
from arbl2_calibration.fit import BLOCK_NS, SUMS, fit
from arbl2_calibration.runs import COLUMNS, open_runs
from arbl2_calibration.store import Store
from benchmarks.record import _answer, _peak_rss_mb, _run, here, spread, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

    from arbl2.zones import ZoneCuts
    from arbl2_calibration.fit import Blocks

SYMBOLS = ("BTC", "ETH", "XRP")
GAPS_NS = {"BTC": 100_000_000, "ETH": 104_000_000, "XRP": 130_000_000}
START_NS = 1_790_100_000 * 10**9
SPAN_NS = 30 * 86_400 * 10**9
GRID_NS = 100_000_000
CHUNK = 250_000


# ------------------------------------------------------------------------------------------------------------- the events


def fills(count: int) -> Iterator[NDArray[Any]]:
    """Rows of ``FILL_DTYPE`` over 30 days in chunks: books every 100 ms, survival that moves with the quarter of an hour."""
    rng = np.random.default_rng(17)
    shock = rng.normal(0.0, 0.5, SPAN_NS // BLOCK_NS + 2)
    for first in range(0, count, CHUNK):
        n = min(CHUNK, count - first)
        rows = np.zeros(n, dtype=FILL_DTYPE)
        ends = START_NS + SPAN_NS * first // count, START_NS + SPAN_NS * (first + n) // count
        rows["order_id"] = rows["decision_id"] = rows["seq"] = np.arange(first + 1, first + n + 1)
        rows["time_ns"] = time_ns = np.sort(rng.integers(*ends, n))
        rows["arrive_ns"] = arrive = time_ns + rng.choice([40, 60, 150, 300], n) * 1_000_000
        rows["venue"], rows["side"] = rng.choice([UPBIT, BINANCE], n), rng.choice([Side.BUY, Side.SELL], n)
        rows["edge_bps"] = edge = rng.gamma(3.0, 3.0, n) * rng.choice([-1.0, 1.0], n)
        rows["size_e8"] = size = rng.integers(10**6, 10**8, n)
        # one in a hundred sees nothing at its limit
        rows["depth_e8"] = depth = rng.integers(10**6, 2 * 10**8, n) * (rng.random(n) > 0.01)
        rows["visible_e8"] = visible = np.minimum(size, depth)
        pull = 1.0 + 0.5 * (rows["venue"] == BINANCE) - 0.02 * np.abs(edge) + shock[(time_ns - START_NS) // BLOCK_NS]
        left = np.where(rng.random(n) < 1.0 / (1.0 + np.exp(-pull)), 1.0, rng.random(n) * (rng.random(n) < 0.3))
        rows["before_e8"] = before = np.round(left * visible)
        rows["after_e8"] = np.round(before * np.where(rng.random(n) < 0.9, 1.0, rng.random(n)))
        rows["decision_book_ns"], rows["before_ns"] = time_ns // GRID_NS * GRID_NS, arrive // GRID_NS * GRID_NS
        rows["after_ns"] = rows["before_ns"] + GRID_NS * rng.choice([1, 2, 3], n, p=[0.9, 0.07, 0.03])
        mid, half = rng.integers(9 * 10**12, 11 * 10**12, n), rng.integers(10**9, 3 * 10**9, n)
        rows["bid_px_e8"], rows["ask_px_e8"] = mid - half, mid + half
        visible_px = mid + rows["side"] * (half + rng.integers(0, 10**9, n))
        fill_px = visible_px + rows["side"] * rng.integers(-(10**8), 5 * 10**8, n)
        rows["limit_px_e8"], rows["filled_e8"] = fill_px, before
        rows["visible_quote_e8"] = np.round(visible_px / 1e8 * visible)
        rows["quote_e8"] = np.round(fill_px / 1e8 * before)
        rows["symbol"] = rng.integers(0, len(SYMBOLS), n)
        rows["direction"], rows["intent"], rows["status"] = 1, 1, np.where(before == size, 1, np.where(before > 0, 2, 3))
        rows["first_in_episode"] = rng.random(n) > 0.1
        rows["resolved"] = resolved = rng.random(n) > 0.02
        for name in ("after_ns", "after_e8"):
            rows[name][~resolved] = 0
        yield rows


def write_run(folder: Path, count: int) -> None:
    """A run folder as a replay leaves it."""
    from arbl2_replay.sinks import event_schema, event_table  # noqa: PLC0415 - its memory must not count as the store's

    schema = event_schema(FILL_DTYPE, "fills")
    with pq.ParquetWriter(folder / "fills.parquet", schema, compression="zstd") as writer:
        for rows in fills(count):
            writer.write_table(event_table(rows, schema, SYMBOLS))
    books = [
        {
            "venue": venue,
            "instrument": f"{venue} {symbol}",
            "symbol": symbol,
            "updates": 1,
            "gap_median_ns": gap,
            "gap_p99_ns": gap,
        }
        for venue in ("upbit", "binance")
        for symbol, gap in GAPS_NS.items()
    ]
    tape = {"session": "synthetic", "sha256": "0" * 64}
    run = {"run": {}, "tape": tape, "digest": "0" * 64, "outcome_source": "book", "books": books, "config": {}, "rules": {}}
    (folder / "run.json").write_text(json.dumps(run))


# ------------------------------------------------------------------------------------------------------------ the two ways


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds per stage, peak memory, and the SHA-256 of the sums."""

    seconds: dict[str, float]
    rss_mb: float
    rows: int
    fitted: int
    sha256: str


def _digest(zone: NDArray[np.int64], block: NDArray[np.int64], sums: NDArray[np.int64]) -> str:
    """Of zone, block and sums in the order of zone and block."""
    return hashlib.sha256(np.ascontiguousarray(np.column_stack([zone, block, sums]), dtype=np.int64).tobytes()).hexdigest()


class _Watch:
    """Seconds between calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        gc.collect()
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._at
        self._at = now


def _duckdb(pipe: Connection, folder: str) -> None:
    """Process: the store of ``arbl2 calibrate``, and its fit."""
    table = ZoneTable()
    watch = _Watch()
    runs, _ = open_runs([Path(folder)])
    with Store(table) as store:
        store.load(runs)
        watch.lap("load")
        summary = store.summary()
        store.guard(summary)
        watch.lap("guards")
        blocks, _ = store.block_sums(BLOCK_NS)
        watch.lap("scan")
    rss_mb = _peak_rss_mb()
    fit(blocks, table)
    watch.lap("fit")
    pipe.send(Taken(watch.seconds, rss_mb, len(blocks.zone), summary.fitted, _blocks_digest(blocks)))


def _blocks_digest(blocks: Blocks) -> str:
    return _digest(blocks.zone, blocks.block, blocks.sums)


def _cell(value: pl.Expr, cuts: Sequence[float]) -> pl.Expr:
    """Place of a value from 0 among half-open intervals that begin at the cuts."""
    place = pl.lit(0, pl.Int32)
    for cut in cuts[1:]:
        place += (value >= cut).cast(pl.Int32)
    return place


def _e(value: pl.Expr) -> pl.Expr:
    return value.round(0, mode="half_away_from_zero").cast(pl.Int64)


def events(folder: Path, cuts: ZoneCuts) -> pl.LazyFrame:
    """The polars twin of load_run.sql, without its checks: one row per event that is fitted or unresolved."""
    f8 = pl.Float64
    gaps = pl.LazyFrame({"symbol": list(GAPS_NS), "g_max_ns": [2.0 * gap for gap in GAPS_NS.values()]})
    col = pl.col
    legs = pl.scan_parquet(folder / "fills.parquet").select(COLUMNS).with_columns(col("venue", "side", "symbol").cast(pl.String))
    sign = pl.when(col("side") == "buy").then(1.0).otherwise(-1.0)
    mid = (col("bid_px_e8").cast(f8) + col("ask_px_e8").cast(f8)) / 2
    touch = pl.when(col("side") == "buy").then(col("ask_px_e8")).otherwise(col("bid_px_e8")).cast(f8)
    priced = (col("bid_px_e8") > 0) & (col("ask_px_e8") > 0) & (col("visible_e8") > 0) & (col("filled_e8") > 0)
    visible_px = col("visible_quote_e8").cast(f8) * 1e8 / col("visible_e8")
    fill_px = col("quote_e8").cast(f8) * 1e8 / col("filled_e8")
    place = (col("venue") == "binance").cast(pl.Int32) * 2 + (col("side") == "sell").cast(pl.Int32)
    place = place * len(cuts.edge_bps) + _cell(col("edge_bps").abs(), cuts.edge_bps)
    place = place * len(cuts.size_over_depth) + _cell(col("visible_e8").cast(f8) / col("depth_e8"), cuts.size_over_depth)
    place = place * len(cuts.latency_ns) + _cell(col("arrive_ns") - col("time_ns"), cuts.latency_ns)
    before, after = (col(name).cast(f8) / col("visible_e8") for name in ("before_e8", "after_e8"))
    since, until = col("arrive_ns") - col("before_ns"), col("after_ns") - col("arrive_ns")
    a = since.cast(f8) / (col("after_ns") - col("before_ns"))
    newer = col("before_ns") > col("decision_book_ns")
    close = (a > 0) & (since <= col("g_max_ns")) & (until <= col("g_max_ns"))
    y = before + a * (after - before)
    return (
        legs.filter(col("first_in_episode") & (col("visible_e8") > 0))
        .join(gaps, on="symbol")
        .select(
            zone_no=place,
            block=col("time_ns") // BLOCK_NS,
            fitted=col("resolved") & (newer | close),
            y_e9=_e(1e9 * y),
            y_lo_e9=_e(1e9 * pl.min_horizontal(before, after)),
            y_hi_e9=_e(1e9 * pl.max_horizontal(before, after)),
            fill_e9=_e(1e9 * y * col("visible_e8") / col("size_e8")),
            half_spread_e6=pl.when(priced).then(_e(1e10 * sign * (touch - mid) / mid)),
            walk_e6=pl.when(priced).then(_e(1e10 * sign * (visible_px - touch) / mid)),
            drift_e6=pl.when(priced).then(_e(1e10 * sign * (fill_px - visible_px) / mid)),
        )
    )


def sums(frame: pl.LazyFrame) -> pl.LazyFrame:
    """The polars twin of block_sum.sql."""
    fitted = pl.col("fitted")

    def total(name: str) -> pl.Expr:
        return pl.when(fitted).then(pl.col(name)).sum()

    y = pl.col("y_e9")
    found = {
        "unresolved": (~fitted).sum(),
        "n": fitted.sum(),
        "y_e9": total("y_e9"),
        "y2_e9": pl.when(fitted).then(_e(y * (y / 1e9))).sum(),
        "y_lo_e9": total("y_lo_e9"),
        "y_hi_e9": total("y_hi_e9"),
        "y_none": (fitted & (y == 0)).sum(),
        "y_all": (fitted & (y == 10**9)).sum(),
        "fill_e9": total("fill_e9"),
        "priced": (fitted & pl.col("drift_e6").is_not_null()).sum(),
        "half_spread_e6": total("half_spread_e6"),
        "walk_e6": total("walk_e6"),
        "drift_e6": total("drift_e6"),
    }
    return frame.group_by("zone_no", "block").agg(**found).sort("zone_no", "block")


def _polars(pipe: Connection, folder: str, staged: bool) -> None:
    """Process: the twin, either with the events in memory between load and scan, or as one streaming query."""
    cuts = ZoneTable().cuts
    watch = _Watch()
    frame = events(Path(folder), cuts)
    if staged:
        frame = frame.collect().lazy()
        watch.lap("load")
        found = sums(frame).collect()
        watch.lap("scan")
    else:
        found = sums(frame).collect(engine="streaming")
        watch.lap("all")
    values = np.column_stack([found[name].to_numpy().astype(np.int64) for name in SUMS])
    zone, block = found["zone_no"].to_numpy().astype(np.int64), found["block"].to_numpy()
    digest = _digest(zone, block, values)
    pipe.send(Taken(watch.seconds, _peak_rss_mb(), len(found), int(found["n"].sum()), digest))


# -------------------------------------------------------------------------------------------------------------- the figures


def _measure(target: Any, *arguments: Any) -> Taken:
    process, pipe = _run(target, *arguments)
    try:
        taken: Taken = _answer(pipe, 600, target.__name__)
        return taken
    finally:
        process.kill()
        process.join()


def compare(count: int, rounds: int) -> bool:
    with tempfile.TemporaryDirectory(prefix="arbl2-bench-") as folder:
        write_run(Path(folder), count)
        size_mb = (Path(folder) / "fills.parquet").stat().st_size / 1e6
        duck, staged, single = [], [], []
        for _ in range(rounds):
            duck.append(_measure(_duckdb, folder))
            staged.append(_measure(_polars, folder, True))
            single.append(_measure(_polars, folder, False))
    rows = f"{duck[0].fitted:,} fitted, {duck[0].rows:,} sums of zone and block"
    print(f"\n{count:,} events ({size_mb:,.0f} MB), {rows}; seconds, {rounds} rounds in turn: median (min - max)\n")
    print("| | file to events | guards | scan to sums | file to sums | fit | peak RSS MB |\n|---|---|---|---|---|---|---|")
    for name, runs in (("arbl2_calibration (DuckDB)", duck), ("polars, events in memory", staged), ("polars, one query", single)):
        cells = []
        for stage in ("load", "guards", "scan", "", "fit"):
            values = [run.seconds.get(stage, 0.0) if stage else _through(run) for run in runs]
            cells.append(spread(values, 2) if any(values) else "-")
        print(f"| {name} | {' | '.join(cells)} | {spread([run.rss_mb for run in runs])} |")
    scan = _ratio([run.seconds["scan"] for run in duck], [run.seconds["scan"] for run in staged])
    whole = _ratio([_through(run) for run in duck], [_through(run) for run in single])
    print(f"\nDuckDB / polars: scan {scan:.2f}, file to sums {whole:.2f} (DuckDB's load also checks every row and keeps it)\n")
    found = {run.sha256 for run in (*duck, *staged, *single)}
    return verdict("equal sums", len(found) == 1, f"{len(found)} different results in {3 * rounds} runs")


def _through(run: Taken) -> float:
    return run.seconds.get("all", 0.0) or run.seconds["load"] + run.seconds["scan"]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate", description=__doc__.split("\n", 1)[0] if __doc__ else ""
    )
    parser.add_argument("--events", type=int, nargs="+", default=[10**6, 10**7], help="how many (default: 10^6 and 10^7)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: 3)")
    options = parser.parse_args()
    print(here())
    holds = True
    for count in options.events:
        holds &= compare(count, options.rounds)
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
