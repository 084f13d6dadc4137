"""Two questions to a tape: was anything decided with knowledge of what came later, and how much hangs on the order of ties?

Both are asked by replaying altered tapes: cut short, or with ties in another order.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from arbl2_replay.altered import cut, with_ties_permuted, write_tape
from arbl2_replay.compare_events import first_difference_of_events
from arbl2_replay.driver import replay
from arbl2_replay.sinks import DECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pyarrow as pa

    from arbl2.config import RunConfig
    from arbl2.frames import FrameBlock
    from arbl2.policy import Policy
    from arbl2.tape import TapeReader
    from arbl2_replay.driver import RunResult


@dataclass(frozen=True, slots=True)
class Cuts:
    """The tape was cut after these frames; ``looked_ahead`` are those before which something else was decided."""

    seqs: tuple[int, ...]
    decisions: int
    looked_ahead: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Jitter:
    """What the order of frames from both venues within ``window_ms`` decides, over ``times`` permutations.

    ``ties`` of ``frames`` frames have one of the other venue that near; ``flips`` are decisions that only one run has, of
    ``decisions``; ``pnl_krw`` is how the PnL moves. Both are (min, median, max); None: no book to mark at.
    """

    times: int
    window_ms: float
    frames: int
    ties: int
    decisions: int
    flips: tuple[float, float, float]
    pnl_krw: tuple[float, float, float] | None
    queue_p99_ms: float


@dataclass(frozen=True, slots=True)
class Job:
    """A tape, and how its run is repeated. ``policy`` makes (or is, if it remembers nothing) the Python policy of the run."""

    reader: TapeReader
    config: RunConfig
    policy: Policy | Callable[[], Policy] | None
    on_progress: Callable[[int, int], None] | None

    def new_policy(self) -> Policy | None:
        """The policy of another run."""
        return self.policy() if callable(self.policy) else self.policy

    def replayed(self, tape: Path | str | None = None, out: Path | None = None) -> RunResult:
        """The replay of the tape, or of another one, from its raw bytes. Raises TapeError if it is damaged."""
        where = self.reader.place.local or str(self.reader.place) if tape is None else tape
        return replay(where, self.config, policy=self.new_policy(), out=out, decoded=False, on_progress=self.on_progress)


@contextmanager
def _altered(job: Job, blocks: Iterator[FrameBlock], aside: Path) -> Iterator[RunResult]:
    """The replay of an altered tape, which is gone afterwards."""
    folder = aside / "altered"
    try:
        yield job.replayed(write_tape(folder, job.reader.manifest, blocks), out=folder / "runs")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ask_cuts(job: Job, base: pa.Table, count: int, seed: int, aside: Path) -> Cuts:
    """Cut at random frames: the decisions before a cut must be those of ``base`` to the byte, and no others."""
    segments = job.reader.manifest.segments
    chance = np.random.default_rng(seed)
    seqs = sorted(chance.integers(segments[0].first_seq, segments[-1].last_seq, count, endpoint=True).tolist())
    decided = base.column("seq").to_numpy()
    looked_ahead, compared = [], 0
    for seq in seqs:
        with _altered(job, cut(job.reader.blocks(), seq), aside) as result:
            assert result.run_dir is not None
            ours = base.filter(decided <= seq)
            compared += len(ours)
            pq.write_table(ours, aside / DECISIONS)
            if first_difference_of_events(aside, result.run_dir, DECISIONS) is not None:
                looked_ahead.append(seq)
    return Cuts(tuple(seqs), compared, tuple(looked_ahead))


def ask_jitter(job: Job, base: pa.Table, count: int, window_ns: int, seed: int, aside: Path) -> Jitter:
    """Permute ties ``count`` times; ``base`` are the decisions of the tape as it is."""
    base_pnl = job.replayed().kpi["pnl_krw"]
    flips: list[int] = []
    pnls: list[float] = []
    for number in range(count):
        blocks = with_ties_permuted(job.reader.blocks(), window_ns, seed + number)
        with _altered(job, blocks, aside) as result:
            assert result.run_dir is not None
            flips.append(_flips(base, pq.read_table(result.run_dir / DECISIONS), window_ns))
            if result.kpi["pnl_krw"] is not None and base_pnl is not None:
                pnls.append(float(result.kpi["pnl_krw"]) - float(base_pnl))
    frames, ties, queue_us = 0, 0, []
    for block in job.reader.blocks():
        frames += len(block)
        ties += _ties(block, window_ns)
        queue_us.append(block.queue_us)
    return Jitter(
        times=count,
        window_ms=window_ns / 1e6,
        frames=frames,
        ties=ties,
        decisions=len(base),
        flips=_spread(flips),
        pnl_krw=_spread(pnls) if pnls else None,
        queue_p99_ms=float(np.percentile(np.concatenate(queue_us), 99)) / 1e3,
    )


def _spread(values: list[Any]) -> tuple[float, float, float]:
    return float(min(values)), float(median(values)), float(max(values))


def _ties(block: FrameBlock, window_ns: int) -> int:
    """Frames with one of the other venue within the window, before or after."""
    heard = block.venue > 0
    time_ns, venue = block.time_ns[heard], block.venue[heard]
    near = (np.diff(time_ns) < window_ns) & (np.diff(venue.astype(np.int8)) != 0)
    tied = np.zeros(len(time_ns), bool)
    tied[:-1] |= near
    tied[1:] |= near
    return int(tied.sum())


def _flips(a: pa.Table, b: pa.Table, window_ns: int) -> int:
    """Decisions of either run that the other does not have: for the same coin, way and outcome, at most a window apart."""
    sides: list[dict[tuple[str, ...], list[int]]] = []
    for table in (a, b):
        found: dict[tuple[str, ...], list[int]] = defaultdict(list)
        keys = [table.column(name).to_pylist() for name in ("symbol", "direction", "intent", "outcome")]
        for *key, time_ns in zip(*keys, table.column("time_ns").to_pylist(), strict=True):
            found[tuple(key)].append(time_ns)
        sides.append(found)
    ours, theirs = sides
    return sum(_unmatched(ours.get(key, []), theirs.get(key, []), window_ns) for key in ours.keys() | theirs.keys())


def _unmatched(a: list[int], b: list[int], window_ns: int) -> int:
    i = j = matched = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= window_ns:
            i, j, matched = i + 1, j + 1, matched + 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return len(a) + len(b) - 2 * matched
