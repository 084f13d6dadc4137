"""What a process says about its timed runs. Runs in any environment: standard library only."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


ENOUGH_S = 1.0
"""A run of some hundredths of a second tells more of the neighbours than of itself: as many are timed as fit into this."""


def rss_mb() -> float:
    """Peak resident memory of this process so far (``ru_maxrss`` would count the parent's before the new program started)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class Probe:
    """Make one right after the imports, time the run in ``timed``, hand over the rest with ``tell``."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {"rss_imports_mb": rss_mb()}
        self._times: dict[str, list[tuple[float, float]]] = {}

    def turns(self) -> Iterator[str]:
        """What each run is to be timed as: "first", then "run" until ``ENOUGH_S`` have passed, at least once."""
        yield "first"
        yield "run"
        while sum(wall for wall, _ in self._times["run"]) < ENOUGH_S:
            yield "run"

    @contextmanager
    def timed(self, name: str = "run") -> Iterator[None]:
        """Medians of seconds of wall time and of all threads' CPU under ``name``, and the peak memory after the first time."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        took = time.perf_counter() - wall, time.process_time() - cpu
        times = self._times.setdefault(name, [])
        times.append(took)
        for what, values in zip(("s", "cpu_s"), zip(*times, strict=True), strict=True):
            self.figures[f"{name}_{what}"] = median(values)
        if len(times) == 1:
            self.figures["rss_mb"] = rss_mb()

    def tell(self, **figures: Any) -> None:
        """The last line of the output is for the parent."""
        sys.stdout.write("\n" + json.dumps(self.figures | figures) + "\n")
