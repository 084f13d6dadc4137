"""Latencies in bounded memory: counts by size, each bucket at most 1.6 % wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BITS = 6
_FINE = 1 << _BITS
_MOST_NS = 2**52


@dataclass(frozen=True, slots=True)
class Latency:
    """What was measured, in microseconds: ``count`` times, with median, 99th percentile and maximum."""

    count: int
    p50_us: float
    p99_us: float
    max_us: float

    def __str__(self) -> str:
        return f"p50 {self.p50_us / 1e3:.3f}, p99 {self.p99_us / 1e3:.3f}, max {self.max_us / 1e3:.3f} ms ({self.count:,})"


class Histogram:
    """Adds up latencies in ns."""

    def __init__(self) -> None:
        self._counts = np.zeros(_FINE * (64 - _BITS), np.int64)
        self._count = 0
        self._max_ns = 0

    def add(self, ns: NDArray[Any]) -> None:
        """Count each. Below zero counts as zero, above 2^52 (52 days) as that."""
        if not len(ns):
            return
        ns = np.clip(ns, 0, _MOST_NS)
        bits = np.frexp(ns.astype(np.float64))[1]
        shift = np.maximum(0, bits - _BITS - 1).astype(np.int64)
        np.add.at(self._counts, (shift << _BITS) + (ns >> shift), 1)
        self._count += len(ns)
        self._max_ns = max(self._max_ns, int(ns.max()))

    def latency(self) -> Latency:
        """What was added so far; a quantile is the upper edge of its bucket."""
        return Latency(self._count, self._quantile_us(0.5), self._quantile_us(0.99), self._max_ns / 1e3)

    def _quantile_us(self, share: float) -> float:
        if not self._count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self._counts), max(1.0, share * self._count)))
        # below two rows of buckets a bucket is one ns wide
        shift = max(0, (index >> _BITS) - 1)
        return min(((index - (shift << _BITS)) + 1) << shift, self._max_ns) / 1e3
