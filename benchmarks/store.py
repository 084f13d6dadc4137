"""The decoded store: ``python -m benchmarks.store`` prints what it costs to read, and what other ways of packing it would cost.

CPU time of one thread, the best of several rounds: on a busy machine the clock tells of its neighbours.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.tape import TapeReader
from arbl2.updates import HOME_LEVELS, MAX_BLOCK, UpdateBlock
from arbl2_replay.reading import _books
from arbl2_replay.store import make_store
from arbl2_replay.store_build import _LEVEL_OPTIONS, _ROW_OPTIONS
from arbl2_replay.store_read import read_slices
from arbl2_replay.warm import warm_up
from benchmarks.market import tape

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa

ROUNDS = 9


def best_us(work: Callable[[], Any], messages: int) -> float:
    """CPU microseconds a message of this thread, the best of ``ROUNDS``."""
    taken = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        work()
        taken.append(time.thread_time() - started)
    return min(taken) / messages * 1e6


def stages(session: Path, messages: int) -> list[tuple[str, float]]:
    """What each thread of a replay from the store does."""
    reader = TapeReader(session)
    started = time.thread_time()
    store = make_store(reader, 0)
    built = (time.thread_time() - started) / messages * 1e6
    engine = Engine(reader.manifest.instruments, RunConfig())
    books = _books(store.index.instruments, engine.universe)
    every = range(len(store.index.slices))
    u = UpdateBlock()

    def read() -> list[Any]:
        return list(read_slices(store.files, store.index, every, reader.anchor, books))

    slices = read()

    def expand() -> None:
        for part in slices:
            for start in range(0, len(part.frames), MAX_BLOCK):
                u.cursor[0] = HOME_LEVELS
                part.updates.decode(part.frames.slice(start, min(start + MAX_BLOCK, len(part.frames))), u)

    def feed() -> None:
        run = Engine(reader.manifest.instruments, RunConfig())
        for part in slices:
            run.feed(part.frames, part.updates.decode)
        run.finish()

    sizes = [kept.stamp.size / messages for kept in (store.index.rows, store.index.levels)]
    return [
        ("bytes a message: rows", sizes[0]),
        ("bytes a message: levels", sizes[1]),
        ("us to build, once", built),
        ("us to read, in the reading thread", best_us(read, messages)),
        ("us to expand, in the main thread", best_us(expand, messages)),
        ("us to expand and loop, in the main thread", best_us(feed, messages)),
    ]


def _read_all(file: pq.ParquetFile) -> None:
    for group in range(file.num_row_groups):
        file.read_row_group(group, use_threads=False)


def packings(
    path: Path, options: dict[str, Any], encodings: list[str], messages: int, folder: Path
) -> list[tuple[str, float, float]]:
    """(name, bytes a message, us a message to read) of a file of the store packed otherwise; "" keeps the encodings."""
    source = pq.ParquetFile(path)
    groups: list[pa.Table] = [source.read_row_group(k) for k in range(source.num_row_groups)]
    found = []
    for codec, level in (("zstd", 1), ("zstd", 3), ("zstd", 9), ("lz4", None), ("snappy", None), ("none", None)):
        for encoding in encodings:
            ways = {**options, "compression": codec, "compression_level": level}
            if encoding:
                ways["column_encoding"] = dict.fromkeys(source.schema_arrow.names, encoding)
            packed = folder / "packed.parquet"
            with pq.ParquetWriter(packed, source.schema_arrow, **ways) as writer:
                for group in groups:
                    writer.write_table(group, row_group_size=len(group))
            us = best_us(partial(_read_all, pq.ParquetFile(packed)), messages)
            name = " ".join(filter(None, (codec, str(level or ""), encoding.lower().replace("_", " "))))
            found.append((name, packed.stat().st_size / messages, us))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description="What the decoded store costs.")
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--packings", action="store_true", help="try other encodings and compressions, too (a minute)")
    options = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        session = Path(shutil.copytree(tape(options.messages), folder / "tape", ignore=shutil.ignore_patterns("decoded")))
        for what, value in stages(session, options.messages):
            print(f"{value:8.3f}  {what}")
        if options.packings:
            files = (
                ("rows", _ROW_OPTIONS, [""]),
                ("levels", _LEVEL_OPTIONS, ["BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED", "PLAIN"]),
            )
            for part, ways, encodings in files:
                print(f"\n| {part}, packed with | bytes/message | us/message to read |\n|---|---|---|")
                for row in packings(session / "decoded" / f"000001.{part}.parquet", ways, encodings, options.messages, folder):
                    print(f"| {row[0]} | {row[1]:.1f} | {row[2]:.3f} |")


if __name__ == "__main__":
    main()
