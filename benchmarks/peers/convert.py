"""The conversion from raw that both peers need, timed step by step: ``python -m benchmarks.peers.convert SESSION FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from benchmarks.market import tape
from benchmarks.peers import books, events, feed
from benchmarks.peers.decisions import FX, WARM_UP_MESSAGES
from benchmarks.peers.probe import Probe

WAYS = {"diff": events.differences, "snap": events.windows}


def main(session: Path, folder: Path) -> None:
    """Leave neutral arrays and both kinds of events of each book in ``folder``."""
    probe = Probe()
    for one in feed.read(tape(WARM_UP_MESSAGES)).values():
        for way in WAYS.values():
            way(one, traded=True)
    with probe.timed("decode"):
        feeds = feed.read(session)
    for book, one in feeds.items():
        books.save(folder, book, one)
    for name, way in WAYS.items():
        with probe.timed(f"{name}_events"):
            made = {book: way(one, traded=book != FX) for book, one in feeds.items()}
        with probe.timed(f"{name}_file"):
            # the form that the converters of hftbacktest write and that it reads from disk
            for book, rows in made.items():
                np.savez_compressed(folder / f"{name}-{book}.npz", data=rows)
        for book, rows in made.items():
            np.save(folder / f"{name}-{book}.npy", rows)
        probe.figures[f"{name}_rows"] = sum(map(len, made.values()))
    probe.tell(messages=sum(len(one.time_ns) for one in feeds.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
