"""What a process says about its one timed run. Runs in any environment: standard library only."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


def rss_mb() -> float:
    """Peak resident memory of this process so far (``ru_maxrss`` would count the parent's before the new program started)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


class Probe:
    """Make one right after the imports, time the run in ``timed``, hand over the rest with ``tell``."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {"rss_imports_mb": rss_mb()}

    @contextmanager
    def timed(self, name: str = "run") -> Iterator[None]:
        """Seconds of wall time and of all threads' CPU under ``name``, and the peak memory at its end."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.figures[f"{name}_s"] = time.perf_counter() - wall
        self.figures[f"{name}_cpu_s"] = time.process_time() - cpu
        self.figures["rss_mb"] = rss_mb()

    def tell(self, **figures: Any) -> None:
        """The last line of the output is for the parent."""
        sys.stdout.write("\n" + json.dumps(self.figures | figures) + "\n")
