"""Pacing: when a frame is handed on. It only sleeps; the time of the replay is the time on the frames.

Hence 1x, 10x and max give the same run: what the engine sees does not depend on what is in here.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arbl2.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arbl2.frames import FrameBlock

_BUCKET_NS = 10_000
_BUCKETS = 100_000  # 1 s of lateness; more lands in the last bucket, the maximum is kept apart


@dataclass(frozen=True, slots=True)
class Speed:
    """How much faster than recorded; 0 = as fast as possible."""

    factor: float

    @classmethod
    def parse(cls, text: str) -> Speed:
        """``1x``, ``10x``, ``0.5x`` or ``max``. Raises ConfigError."""
        if text.strip().lower() == "max":
            return cls(0.0)
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)x?", text.strip().lower())
        if match is None or float(match[1]) == 0:
            raise ConfigError(f"--speed {text!r} is not a speed. Write 1x, 10x, 0.5x or max.")
        return cls(float(match[1]))

    def __str__(self) -> str:
        return f"{self.factor:g}x" if self.factor else "max"


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late frames were handed on, in ms: median, 99th percentile, maximum, over ``frames``."""

    frames: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class Pacer:
    """Cuts blocks into the pieces that are due and sleeps in between, so that bursts keep their shape."""

    def __init__(self, speed: Speed) -> None:
        self._factor = speed.factor
        self._start_ns = 0
        self._first_ns = 0
        self._histogram = np.zeros(_BUCKETS, np.int64)
        self._worst_ns = 0

    def pieces(self, block: FrameBlock) -> Iterator[FrameBlock]:
        """The block in pieces, each yielded when its first frame is due."""
        if not self._factor or len(block) == 0:
            yield block
            return
        if self._start_ns == 0:
            self._start_ns = time.monotonic_ns()
            self._first_ns = int(block.time_ns[0])
        due_ns = self._start_ns + ((block.time_ns - self._first_ns) / self._factor).astype(np.int64)
        i = 0
        while i < len(block):
            self._sleep_until(int(due_ns[i]))
            now = time.monotonic_ns()
            stop = max(i + 1, int(np.searchsorted(due_ns, now, side="right")))
            late = np.maximum(now - due_ns[i:stop], 0)
            np.add.at(self._histogram, np.minimum(late // _BUCKET_NS, _BUCKETS - 1), 1)
            self._worst_ns = max(self._worst_ns, int(late.max()))
            yield block.slice(i, stop)
            i = stop

    @staticmethod
    def _sleep_until(due_ns: int) -> None:
        while (left := due_ns - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)

    def lateness(self) -> Lateness | None:
        """What was measured; None when running at max."""
        total = int(self._histogram.sum())
        if total == 0:
            return None
        rising = np.cumsum(self._histogram)
        p50, p99 = (float(np.searchsorted(rising, share * total) + 1) * _BUCKET_NS / 1e6 for share in (0.5, 0.99))
        worst = self._worst_ns / 1e6
        return Lateness(total, min(p50, worst), min(p99, worst), worst)
