"""How late paced frames are: ``python -m benchmarks.pacing``.

Two tapes (a minute of the golden one at 1x; ten minutes of ten coins on both venues at 10x), each on the machine as it is and
with one core kept busy by another process. Beside every replay two bare pacers run at the same time, which hand the same stamps
to nobody: a loop of ``time.sleep`` and one of ``asyncio.sleep``. What they are late by, the machine is to blame for. The most
punctual frame of each counts as in time; the replay's frames are stamped where the engine takes them, a progress bar is drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.tape import TapeReader
from arbl2_replay import replay
from benchmarks.day import Day, tape
from benchmarks.measure import ROOT, machine
from benchmarks.record import verdict

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

GOLDEN = ROOT / "datasets" / "golden" / "two-venue-60s" / "tape"
P99_MS = 2.0
BURST_GAP_NS = 1_000_000
BURST_FRAMES = 5
_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True)
class Scene:
    """What is replayed: seconds of a tape, so many times as fast."""

    name: str
    tape: Path
    factor: float
    tape_s: float

    def due_ns(self) -> NDArray[np.int64]:
        """When each frame is due, from the first on."""
        found = []
        for block in TapeReader(self.tape).blocks():
            found.append(block.time_ns)
            if block.time_ns[-1] - found[0][0] > self.tape_s * 1e9:
                break
        times: NDArray[np.int64] = np.concatenate(found)
        times = times[times <= times[0] + round(self.tape_s * 1e9)]
        due: NDArray[np.int64] = ((times - times[0]) / self.factor).astype(np.int64)
        return due


@dataclass(frozen=True, slots=True)
class Measured:
    """When frames were handed on, from the first on, and the share of one core that it took."""

    name: str
    at_ns: NDArray[np.int64]
    cpu: float


# ------------------------------------------------------------------------------------------------------------- the processes


def _measured(name: str, work: Callable[[], NDArray[np.int64]]) -> Measured:
    started, cpu = time.monotonic(), time.process_time()
    at_ns = work()
    return Measured(name, at_ns, (time.process_time() - cpu) / (time.monotonic() - started))


def _replay(pipe: Connection, scene: Scene) -> None:
    taken: list[tuple[int, int]] = []
    feed = Engine.feed

    def stamped(engine: Engine, block: Any, decode: Any = None) -> None:
        taken.append((time.monotonic_ns(), len(block)))
        feed(engine, block, decode)

    replay(scene.tape, RunConfig(), until="+1s", check_hashes=False)  # compiled, imported, in the page cache
    Engine.feed = stamped  # type: ignore[method-assign, assignment]
    pipe.send("ready")
    pipe.recv()

    def work() -> NDArray[np.int64]:
        with Path(os.devnull).open("w") as nowhere, Progress(console=Console(file=nowhere, force_terminal=True)) as bar:
            task = bar.add_task("replay", total=None)

            def update(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            replay(
                scene.tape,
                RunConfig(),
                speed=f"{scene.factor:g}x",
                until=f"+{scene.tape_s:g}s",
                check_hashes=False,
                on_progress=update,
            )
        stamps, counts = np.array(taken, np.int64).T
        at_ns: NDArray[np.int64] = np.repeat(stamps, counts)
        return at_ns

    pipe.send(_measured("arbl2 replay", work))


def _sleeping(pipe: Connection, scene: Scene) -> None:
    due = scene.due_ns().tolist()
    pipe.send("ready")
    pipe.recv()

    def work() -> NDArray[np.int64]:
        at = []
        start = time.monotonic_ns()
        for due_ns in due:
            while (left := start + due_ns - time.monotonic_ns()) > 0:
                time.sleep(left / 1e9)
            at.append(time.monotonic_ns())
        return np.array(at, np.int64)

    pipe.send(_measured("bare time.sleep", work))


def _on_a_loop(pipe: Connection, scene: Scene) -> None:
    due = scene.due_ns().tolist()
    pipe.send("ready")
    pipe.recv()

    async def pace() -> NDArray[np.int64]:
        at = []
        start = time.monotonic_ns()
        for due_ns in due:
            while (left := start + due_ns - time.monotonic_ns()) > 0:  # noqa: ASYNC110 - nobody rings, time passes
                await asyncio.sleep(left / 1e9)
            at.append(time.monotonic_ns())
        return np.array(at, np.int64)

    pipe.send(_measured("bare asyncio.sleep", lambda: asyncio.run(pace())))


def _busy(pipe: Connection) -> None:
    pipe.send("ready")
    while not pipe.poll():
        sum(range(100_000))


# ---------------------------------------------------------------------------------------------------------------- the figures


def play(scene: Scene, *, loaded: bool) -> list[Measured]:
    """The replay and the bare pacers, at the same time."""
    processes, pipes = [], []
    pacers: list[tuple[Callable[..., None], Any]] = [(_replay, (scene,)), (_sleeping, (scene,)), (_on_a_loop, (scene,))]
    for target, arguments in [*pacers, *([(_busy, ())] * loaded)]:
        here, there = _spawn.Pipe()
        process = _spawn.Process(target=target, args=(there, *arguments), daemon=True)
        process.start()
        processes.append(process)
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes[:3]:
        pipe.send("go")
    found = [pipe.recv() for pipe in pipes[:3]]
    for pipe in pipes[3:]:
        pipe.send("enough")
    for process in processes:
        process.join()
    return found


def late_ms(measured: Measured, due_ns: NDArray[np.int64]) -> NDArray[np.float64]:
    """How late each frame was, ms; the most punctual of all was not."""
    late_ns = measured.at_ns - due_ns
    late: NDArray[np.float64] = (late_ns - late_ns.min()) / 1e6
    return late


def burst_ms(measured: Measured, due_ns: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much each burst was longer or shorter than recorded, ms (a burst: some frames close behind each other)."""
    edges = np.flatnonzero(np.diff(due_ns) >= BURST_GAP_NS) + 1
    first, last = np.r_[0, edges], np.r_[edges, len(due_ns)] - 1
    long = last - first + 1 >= BURST_FRAMES
    first, last = first[long], last[long]
    off: NDArray[np.float64] = np.abs((measured.at_ns[last] - measured.at_ns[first]) - (due_ns[last] - due_ns[first])) / 1e6
    return off


def show(scene: Scene, *, loaded: bool) -> bool:
    """Measure a scene and print it; whether frames were handed on in time."""
    due_ns = scene.due_ns()
    where = "another process keeps one core busy" if loaded else "nothing else is started"
    print(f"\n{scene.name}: {len(due_ns):,} frames in {due_ns[-1] / 1e9:.0f} s at {scene.factor:g}x; {where}", flush=True)
    print(f"{'':20} {'late by, ms':^26} {'gaps off by, ms':^17} {'bursts off by, ms':^24} {'one core':>9}")
    print(f"{'':20} {'p50':>8} {'p99':>8} {'max':>8} {'p50':>8} {'p99':>8} {'count':>7} {'p50':>8} {'p99':>8}")
    p99 = {}
    for measured in play(scene, loaded=loaded):
        if len(measured.at_ns) != len(due_ns):
            raise SystemExit(f"{measured.name} handed on {len(measured.at_ns):,} frames of {len(due_ns):,}")
        late = late_ms(measured, due_ns)
        gaps = np.abs(np.diff(measured.at_ns) - np.diff(due_ns)) / 1e6
        bursts = burst_ms(measured, due_ns)
        p99[measured.name] = float(np.percentile(late, 99))
        figures = [*np.percentile(late, (50, 99, 100)), *np.percentile(gaps, (50, 99))]
        ends = [*np.percentile(bursts, (50, 99))] if len(bursts) else [0.0, 0.0]
        columns = [*(f"{value:8.3f}" for value in figures), f"{len(bursts):7,}", *(f"{value:8.3f}" for value in ends)]
        print(f"{measured.name:20} {' '.join(columns)} {measured.cpu:9.1%}", flush=True)
    ours, bare = p99["arbl2 replay"], min(p99["bare time.sleep"], p99["bare asyncio.sleep"])
    most = max(P99_MS, 2 * bare)
    return verdict("lateness", ours <= most, f"p99 {ours:.2f} ms (asked: at most {P99_MS:g}, or twice the better bare pacer)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pacing", description="How late paced frames are.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each replay takes (default: 60)")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()) + f"; load {os.getloadavg()[0]:.1f}")
    scenes = (
        Scene("golden tape", GOLDEN, 1.0, min(options.seconds, 59.0)),
        Scene("dense tape", tape(Day(hours=1 / 6)), 10.0, 10 * min(options.seconds, 59.9)),
    )
    held = [show(scene, loaded=loaded) for scene in scenes for loaded in (False, True)]
    raise SystemExit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
