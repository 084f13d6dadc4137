"""What is measured, and how: every stage once a round, in turn, so that a busy moment hits all of them alike."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from arbl2 import kernels
from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.tape import TapeReader
from arbl2.updates import HOME_LEVELS, MAX_BLOCK
from arbl2_replay import replay
from benchmarks import plain
from benchmarks.peers.probe import ENOUGH_S

if TYPE_CHECKING:
    from collections.abc import Callable


ROOT = Path(__file__).resolve().parents[1]
CONFIG = RunConfig()


@dataclass(frozen=True, slots=True)
class Figure:
    """Values of all rounds in the same unit."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)


class Stages:
    """The stages on one tape. What a stage needs is made before it is measured."""

    def __init__(self, session: Path, messages: int) -> None:
        self.session = session
        self.messages = messages
        self.reader = TapeReader(session)
        self.blocks = [
            block.slice(at, min(at + MAX_BLOCK, len(block)))
            for block in self.reader.blocks()
            for at in range(0, len(block), MAX_BLOCK)
        ]

    def _engine(self) -> Engine:
        return Engine(self.reader.manifest.instruments, CONFIG)

    def decode_and_loop(self) -> tuple[float, float]:
        """Seconds of decoding, and of the loop alone. They take turns block by block, as in a replay."""
        engine = self._engine()
        u = engine.state.u
        in_decode = in_loop = 0.0
        for block in self.blocks:
            n = len(block)
            started = time.perf_counter()
            kernels.come_home(engine.state.records)
            u.cursor[0] = HOME_LEVELS
            engine.decode(block, u)
            decoded = time.perf_counter()
            engine._run_rows(0, n)
            in_loop += time.perf_counter() - decoded
            in_decode += decoded - started
        return in_decode, in_loop

    def replay(self) -> None:
        replay(self.session, CONFIG, decoded=False)

    def replay_decoded(self) -> None:
        replay(self.session, CONFIG, decoded=True)

    def plain_loop(self) -> None:
        plain.run(self.session, CONFIG, self.shift_ns)

    @property
    def shift_ns(self) -> int:
        return self.reader.anchor.wall_ns - self.reader.anchor.mono_ns

    def check(self) -> plain.Result:
        """Both ways decide at the same instants and fill the same. Raises SystemExit if they do not."""
        engine = self._engine()
        for block in self.blocks:
            engine.feed(block)
        engine.finish()
        events = engine.drain()
        ours = plain.Result(
            decisions=len(events.decisions),
            time_sum=int(np.sum(events.decisions["time_ns"].astype(object))),
            fills=len(events.fills),
            filled_e8=int(events.fills["filled_e8"].sum()),
        )
        theirs = plain.run(self.session, CONFIG, self.shift_ns)
        if ours != theirs or engine.refusals():
            raise SystemExit(f"the two ways differ: arbl2 {ours} {engine.refusals()}, plain loop {theirs}")
        return ours

    def rounds(self, count: int) -> list[Figure]:
        """Microseconds per message of each stage over ``count`` rounds, after one that is not counted."""
        parts = ("decode: messages in memory to book updates", "the loop alone: book updates to decisions and fills")
        stages: list[tuple[str, Callable[[], None]]] = [
            ("replay from raw: Parquet to key figures (`arbl2_replay.replay`)", self.replay),
            ("replay from the decoded store, all of it", self.replay_decoded),
            ("plain loop from raw: pyarrow, orjson, Python integers", self.plain_loop),
        ]
        taken: dict[str, list[float]] = {name: [] for name in (*parts, *(name for name, _ in stages))}
        for number in range(count + 1):
            gc.collect()
            for name, seconds in zip(parts, self.decode_and_loop(), strict=True):
                if number:
                    taken[name].append(seconds / self.messages * 1e6)
            for name, stage in stages:
                gc.collect()
                seconds = median(_timed(stage))
                if number:
                    taken[name].append(seconds / self.messages * 1e6)
        return [Figure(name, tuple(values)) for name, values in taken.items()]


def _timed(stage: Callable[[], None]) -> list[float]:
    """Seconds of as many calls as fit into ``ENOUGH_S``: one of some hundredths tells more of the neighbours than of itself."""
    taken: list[float] = []
    while sum(taken) < ENOUGH_S:
        started = time.perf_counter()
        stage()
        taken.append(time.perf_counter() - started)
    return taken


def starts(rounds: int) -> list[Figure]:
    """Seconds of `arbl2 replay` on the golden tape of 60 s: with nothing compiled yet, then with numba's cache on disk."""
    golden = ROOT / "datasets" / "golden" / "two-venue-60s"
    cold: list[float] = []
    warm: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            environment = {**os.environ, "NUMBA_CACHE_DIR": f"{folder}/cache-{number}"}
            command = [sys.executable, "-m", "arbl2", "replay", "--out", f"{folder}/runs", "--json"]
            command += ["--config", str(golden / "config.toml"), str(golden / "tape")]
            for taken in (cold, warm):
                started = time.perf_counter()
                subprocess.run(command, env=environment, check=True, capture_output=True, cwd=folder)
                taken.append(time.perf_counter() - started)
    return [
        Figure("the first `arbl2 replay` (it compiles the kernels)", tuple(cold)),
        Figure("every later one (golden tape of 60 s)", tuple(warm)),
    ]


def machine() -> dict[str, str]:
    """What the figures depend on."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "CPU": f"{names[0] if names else platform.processor() or platform.machine()} with {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "numba", "pyarrow", "orjson")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
