"""Latencies in bounded memory: counts by size, each bucket at most 1.6 % wide."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

_BITS = 6
_FINE = 1 << _BITS


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
        self._counts = array("q", bytes(8 * _FINE * (64 - _BITS)))
        self._count = 0
        self._max_ns = 0

    def add(self, ns: int) -> None:
        """Count one. Below zero counts as zero."""
        ns = max(ns, 0)
        shift = max(0, ns.bit_length() - _BITS - 1)
        self._counts[(shift << _BITS) + (ns >> shift)] += 1
        self._count += 1
        self._max_ns = max(self._max_ns, ns)

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
