"""Time travel, measured and compared: ``python -m benchmarks.travel``.

10,000 random instants of small tapes are compared with a linear replay. Then a whole day (``benchmarks/day.py``), and a tape of
books 5,000 levels deep, are asked for random instants: p99 below 50 ms whatever the length.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arbl2.frames import Frame, FrameKind, Op
from arbl2.money import E8
from arbl2.tape import TAPE_VERSION, Manifest, load_manifest, write_session
from arbl2_replay.keyframes import FOLDER
from arbl2_replay.travel import Travel
from arbl2_replay.wire import Book, DepthChange, binance_combined, binance_depth, binance_diff, upbit_orderbook
from benchmarks import restless
from benchmarks.day import DATA, Day, tape
from benchmarks.measure import ROOT, machine
from benchmarks.record import verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arbl2_replay.travel import Instant

MOST_MS = 50.0
INSTANTS = 10_000
QUERIES = 1_000
DEEP_LEVELS = 5_000
DEEP_COINS = 10


def check(folder: Path, count: int, names: tuple[str, ...]) -> int:
    """Compare random instants, asked in random order, with a linear replay; returns how many differ."""
    linear = restless.Linear(folder)
    asked = restless.questions(linear.times, count, count, names)
    expected = list(zip(asked, linear.answers(asked), strict=True))
    random.Random(count).shuffle(expected)
    travel = Travel(folder)
    return sum(not _agree(travel.at(time_ns), name, seen) for (time_ns, name), seen in expected)


def _agree(instant: Instant, name: str, seen: restless.Seen) -> bool:
    view = instant.view(name)
    books = tuple(
        {
            "name": book.instrument.name,
            "status": book.status,
            "age_ns": book.age_ns,
            "update_id": book.update_id,
            "exchange_ms": book.exchange_ms,
            "bids": book.bids,
            "asks": book.asks,
        }
        for book in (*view.books, *([view.fx] if view.fx is not None else []))
    )
    same = (instant.seq, books, instant.valid_through(name)) == (seen.seq, seen.books, seen.validity)
    if seen.snapshot is None:
        return same
    return same and instant.snapshot(name) == seen.snapshot and instant.full_book(view.books[1].instrument.name) == seen.full


# ------------------------------------------------------------------------------------------------------------ deep books


def deep(folder: Path, minutes: float) -> Path:
    """A tape of books with 5,000 levels a side: snapshots, ten changes a second, beside Upbit's windows."""
    if not folder.exists():
        aside = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(aside, ignore_errors=True)
        names = [f"C{k}" for k in range(DEEP_COINS)]
        instruments = {"upbit": [*(f"KRW-{name}" for name in names), "KRW-USDT"], "binance": [f"{name}USDT" for name in names]}
        start_ns = restless.START_NS
        manifest = Manifest(
            tape_version=TAPE_VERSION,
            session=folder.name,
            state="sealed",
            anchor_wall_ns=start_ns,
            anchor_mono_ns=0,
            instruments=instruments,
        )
        write_session(aside, manifest, _deep_frames(names, minutes))
        aside.rename(folder)
    return folder


def _deep_frames(names: list[str], minutes: float) -> Iterator[Frame]:
    chance = np.random.default_rng(7)
    tick = E8 // 100
    middle = 100_000 * E8
    ids = dict.fromkeys(names, 1_000)
    seq = 0

    def frame(ns: int, venue: str, kind: FrameKind, payload: bytes) -> Frame:
        nonlocal seq
        seq += 1
        conn = 1 if venue == "upbit" else 2
        return Frame(
            seq, restless.START_NS + ns, ns, venue, conn, kind, Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE, payload
        )

    def side(away: np.ndarray[tuple[int, ...], np.dtype[np.int64]], sign: int) -> list[tuple[int, int]]:
        sizes = np.round(chance.lognormal(-2.0, 2.0, len(away)) * 1e5).astype(np.int64) * 1_000 + 1_000
        return [(middle + sign * (5 + int(k)) * tick, int(size)) for k, size in zip(away, sizes, strict=True)]

    for name in names:
        url = f"https://api.binance.com/api/v3/depth?symbol={name}USDT&limit=5000"
        yield frame(0, "binance", FrameKind.REQUEST, b'{"method":"GET","url":"%b"}' % url.encode())
        sides = [side(np.cumsum(chance.geometric(0.2, DEEP_LEVELS)), sign) for sign in (-1, 1)]
        book = Book(*([level[k] for level in rows] for rows in sides for k in (0, 1)))
        yield frame(1, "binance", FrameKind.RESPONSE, binance_depth(book, ids[name], depth=DEEP_LEVELS))
    for step in range(1, round(minutes * 600)):
        for number, name in enumerate(names):
            ns = step * 100_000_000 + number * 5_000_000
            sides = []
            for sign in (-1, 1):
                # most of what happens is near the touch
                away = np.unique(np.round(chance.pareto(0.7, chance.integers(5, 25)) * 20).astype(np.int64).clip(0, 40_000))
                gone = chance.random(len(away)) < 0.4
                sides.append([(px, 0 if out else size) for (px, size), out in zip(side(away, sign), gone, strict=True)])
            first = ids[name] + 1
            ids[name] = first + 30
            change = DepthChange(first, ids[name], sides[0], sides[1])
            data = binance_diff(f"{name}USDT", change, ns // 1_000_000)
            yield frame(ns, "binance", FrameKind.MESSAGE, binance_combined(f"{name.lower()}usdt@depth@100ms", data))
            if chance.random() < 0.8:
                rows = [side(np.arange(15), sign) for sign in (-1, 1)]
                book = Book(*([level[k] * (1_400 if k == 0 else 1) for level in part] for part in rows for k in (0, 1)))
                coin = "USDT" if number == 0 and step % 5 == 0 else name
                yield frame(ns + 1, "upbit", FrameKind.MESSAGE, upbit_orderbook(f"KRW-{coin}", book, ns // 1_000_000, units=15))


# ---------------------------------------------------------------------------------------------------------------- timing


def measure(folder: Path, *, fresh: bool) -> bool:
    """Build the index, ask random instants and ones near each other, print; True if p99 holds."""
    if fresh:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
    load = os.getloadavg()[0]
    manifest = load_manifest(folder)
    started = time.perf_counter()
    travel = Travel(folder)
    built_s = time.perf_counter() - started
    started = time.perf_counter()
    travel = Travel(folder)
    opened_ms = (time.perf_counter() - started) * 1e3
    kept, sealed = sum(keys.bytes for keys in travel.index), sum(segment.bytes for segment in manifest.segments)
    stops = sum(len(keys.stops) for keys in travel.index)
    hours = (travel.last_ns - travel.first_ns) / 3.6e12
    print(f"\n{travel.session}: {manifest.rows:,} frames over {hours:.2f} h, {sealed / 1e6:,.1f} MB sealed; load {load:.1f}")
    print(f"  index: {stops:,} keyframes, {kept / 1e6:,.1f} MB ({kept / sealed:.1%} of the tape); opened in {opened_ms:.0f} ms")
    if fresh:
        print(f"  built in {built_s:.1f} s ({built_s / manifest.rows * 1e6:.2f} us a frame)")
    names = [name.removesuffix("USDT") for name in manifest.instruments["binance"]]
    chance = random.Random(1)
    cold, near = [], []
    for _ in range(QUERIES):
        name, time_ns = chance.choice(names), chance.randint(travel.first_ns, travel.last_ns)
        cold.append(_timed(travel, time_ns, name))
        beside = min(max(time_ns + chance.randint(-1_000_000_000, 1_000_000_000), travel.first_ns), travel.last_ns)
        near.append(_timed(travel, beside, name))
    for what, taken in (("anywhere", cold), ("within a second of the last one", near)):
        (p50, p99, most), cpu = (
            np.quantile(taken, (0.5, 0.99, 1.0), axis=0)[:, 0] * 1e3,
            np.quantile(taken, 0.99, axis=0)[1] * 1e3,
        )
        print(
            f"  {what}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.1f} ms; p99 of CPU time {cpu:.1f} ms ({QUERIES:,} queries)"
        )
    p99 = float(np.quantile(cold, 0.99, axis=0)[0]) * 1e3
    said = f"p99 {p99:.1f} ms anywhere (asked: below {MOST_MS:g}); load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    return verdict("time travel", p99 < MOST_MS, said)


def _timed(travel: Travel, time_ns: int, name: str) -> tuple[float, float]:
    """Seconds of one query, by the clock and in CPU time of all threads."""
    started, cpu = time.perf_counter(), time.process_time()
    instant = travel.at(time_ns)
    instant.view(name)
    instant.valid_through(name)
    return time.perf_counter() - started, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.travel", description="Time travel: compared and measured.")
    parser.add_argument("--instants", type=int, default=INSTANTS, help="compared with a linear replay (0 = none)")
    parser.add_argument("--keep", action="store_true", help="use the keyframes there are instead of making them anew")
    parser.add_argument("--deep-minutes", type=float, default=15.0, help="length of the tape of deep books (0 = none)")
    options = parser.parse_args()
    holds = True
    if options.instants:
        with tempfile.TemporaryDirectory() as folder:
            small = Path(shutil.copytree(ROOT / "datasets" / "golden" / "two-venue-60s" / "tape", Path(folder) / "golden"))
            wild = restless.tape(Path(folder) / "wild", frames=12_000)
            half = options.instants // 2
            wrong = check(small, half, ("BTC", "ETH", "XRP", "KRW-USDT")) + check(wild, options.instants - half, restless.NAMES)
        holds &= verdict("equality", wrong == 0, f"{wrong:,} of {options.instants:,} instants differ from a linear replay")
    whole = DATA / "day-24h-10"
    holds &= measure(whole if whole.exists() else tape(Day(hours=2.0)), fresh=not options.keep)
    if options.deep_minutes:
        holds &= measure(deep(DATA / f"deep-{options.deep_minutes:g}min", options.deep_minutes), fresh=not options.keep)
    print("\nMeasured on: " + ", ".join(f"{name} {value}" for name, value in machine().items()))
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
