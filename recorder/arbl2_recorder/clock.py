"""The only reader of the operating system's clocks.

Every frame carries two stamps: the wall clock (to line up with venue times and other machines) and the monotonic clock (for
order, gaps and latency: it never steps). An anchor is one instant on both; differences between later anchors show whether the
wall clock was stepped or slewed meanwhile.
"""

from __future__ import annotations

import time
from time import monotonic_ns, time_ns

from arbl2.frames import Anchor


def stamp() -> tuple[int, int]:
    """Now, as (wall ns since the Unix epoch, monotonic ns)."""
    return time_ns(), monotonic_ns()


def mono_ns() -> int:
    """Now on the monotonic clock, ns."""
    return monotonic_ns()


def wall_ns() -> int:
    """Now on the wall clock, ns since the Unix epoch."""
    return time_ns()


def sample() -> Anchor:
    """One instant on both clocks: the wall clock is read between two reads of the monotonic clock."""
    before = monotonic_ns()
    wall = time_ns()
    after = monotonic_ns()
    return Anchor(wall_ns=wall, mono_ns=before + (after - before) // 2)


def drift_ns(earlier: Anchor, later: Anchor) -> int:
    """How far the wall clock moved against the monotonic clock between two samples, ns (positive: it was put forward)."""
    return (later.wall_ns - earlier.wall_ns) - (later.mono_ns - earlier.mono_ns)


def utc_name(wall: int) -> str:
    """A wall time (ns) as the UTC text that session folders begin with, such as ``20261121T113443Z``."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall // 1_000_000_000))
