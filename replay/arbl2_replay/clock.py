"""Pacing: when a frame is handed on. It only sleeps; the time of the replay is the time on the frames.

Hence 1x, 10x and max give the same run: what the engine sees does not depend on what is in here.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from arbl2.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

_TURN_S = 0.0002
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


@contextmanager
def punctual() -> Iterator[None]:
    """Keep away what makes a thread late while frames are paced: other threads' turns of 5 ms, and full garbage collections.

    The thread that reads ahead and the one that draws the view then let go of the interpreter within a fraction of a millisecond;
    what is alive already is not searched for garbage again and again.
    """
    turn_s = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(turn_s)
        gc.unfreeze()


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late frames were handed on, in ms: median, 99th percentile, maximum, over ``frames``."""

    frames: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class Pacer:
    """The time of the tape as it passes, and waiting for frames to be due, so that bursts keep their shape.

    ``wait`` is given seconds, at most the time to the next frame; what it returns says whether it was cut short.
    """

    def __init__(self, speed: Speed, wait: Callable[[float], object] = time.sleep) -> None:
        self._speed = speed
        self._wait = wait
        self._at_ns: int | None = None
        self._since_ns: int | None = None
        self._histogram = np.zeros(_BUCKETS, np.int64)
        self._worst_ns = 0
        self.late_ms = 0.0
        """How late the last frames were."""

    @property
    def speed(self) -> Speed:
        """How much faster than recorded."""
        return self._speed

    @speed.setter
    def speed(self, speed: Speed) -> None:
        self.hold()
        self._speed = speed

    def hold(self) -> None:
        """Stand still until frames are asked for again. Nobody is late meanwhile."""
        if self._at_ns is not None and self._since_ns is not None:
            self._at_ns += round((time.monotonic_ns() - self._since_ns) * self._speed.factor)
        self._since_ns = None

    def jump(self, time_ns: int) -> None:
        """Be at this time of the tape, standing still."""
        self._at_ns, self._since_ns = time_ns, None

    def due(self, time_ns: NDArray[np.int64]) -> int:
        """Wait until the first of these frames is due; returns how many are by then, 0 if the waiting was cut short.

        ``time_ns``: int64[n], n > 0, engine times of the frames that come next.
        """
        factor = self._speed.factor
        if not factor:
            self._at_ns = None
            return len(time_ns)
        at_ns = self._at_ns = int(time_ns[0]) if self._at_ns is None else self._at_ns
        since_ns = self._since_ns = time.monotonic_ns() if self._since_ns is None else self._since_ns
        first_ns = since_ns + int((int(time_ns[0]) - at_ns) / factor)
        while (left_ns := first_ns - time.monotonic_ns()) > 0:
            if self._wait(left_ns / 1e9):
                return 0
        now_ns = time.monotonic_ns()
        count = max(1, int(np.searchsorted(time_ns, at_ns + int((now_ns - since_ns) * factor), side="right")))
        due_ns = since_ns + ((time_ns[:count] - at_ns) / factor).astype(np.int64)
        late_ns = np.maximum(now_ns - due_ns, 0)
        np.add.at(self._histogram, np.minimum(late_ns // _BUCKET_NS, _BUCKETS - 1), 1)
        worst_ns = int(late_ns.max())
        self._worst_ns = max(self._worst_ns, worst_ns)
        self.late_ms = worst_ns / 1e6
        return count

    def lateness(self) -> Lateness | None:
        """What was measured; None when running at max."""
        total = int(self._histogram.sum())
        if total == 0:
            return None
        rising = np.cumsum(self._histogram)
        p50, p99 = (float(np.searchsorted(rising, share * total) + 1) * _BUCKET_NS / 1e6 for share in (0.5, 0.99))
        worst = self._worst_ns / 1e6
        return Lateness(total, min(p50, worst), min(p99, worst), worst)
