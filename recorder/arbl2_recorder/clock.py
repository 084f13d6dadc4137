"""The only reader of the operating system's clocks.

Every frame carries two stamps: the wall clock (to line up with venue times and other machines) and the monotonic clock (for
order, gaps and latency: it never steps). An anchor is one instant on both; differences between later anchors show whether the
wall clock was stepped or slewed meanwhile. How far the wall clock is from true time only a time service can know: ``offset``
asks chrony, or else the kernel that every NTP client steers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from time import monotonic_ns, time_ns
from typing import ClassVar

from arbl2.frames import Anchor

_CHRONY_TIMEOUT_S = 2.0
_CHRONY_LOCAL = "7F7F0101"  # chrony serves its own clock: that it agrees with itself says nothing
_STA_UNSYNC, _STA_NANO = 0x0040, 0x2000
_ADJTIMEX_FAILED = -1
_SAMPLES, _LONG_NS = 4, 2**62


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The wall clock against true time, as a time service sees it.

    ``offset_ns``: how far the wall clock is ahead (negative: behind). ``error_ns``: the most that this can be wrong by.
    ``synchronised``: whether the service steers the clock now; if not, the figures mean little. ``source``: chrony, kernel.
    """

    offset_ns: int
    error_ns: int
    synchronised: bool
    source: str


def stamp() -> tuple[int, int]:
    """Now, as (wall ns since the Unix epoch, monotonic ns)."""
    return time_ns(), monotonic_ns()


mono_ns = monotonic_ns
"""Now on the monotonic clock, ns."""


def wall_ns() -> int:
    """Now on the wall clock, ns since the Unix epoch."""
    return time_ns()


def sample() -> Anchor:
    """One instant on both clocks: the wall clock is read between two reads of the monotonic clock.

    Of a few tries the one with the shortest time between them counts: a thread may be held up in there.
    """
    best = Anchor(0, 0)
    shortest_ns = _LONG_NS
    for _ in range(_SAMPLES):
        before = monotonic_ns()
        wall = time_ns()
        after = monotonic_ns()
        if after - before < shortest_ns:
            best, shortest_ns = Anchor(wall_ns=wall, mono_ns=before + (after - before) // 2), after - before
    return best


def drift_ns(earlier: Anchor, later: Anchor) -> int:
    """How far the wall clock moved against the monotonic clock between two samples, ns (positive: it was put forward)."""
    return (later.wall_ns - earlier.wall_ns) - (later.mono_ns - earlier.mono_ns)


def utc_name(wall: int) -> str:
    """A wall time (ns) as the UTC text that session folders begin with, such as ``20261121T113443Z``."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(wall // 1_000_000_000))


def offset() -> ClockOffset | None:
    """What chrony, or else the kernel, knows of the wall clock; None where neither can be asked (macOS, some containers).

    May take two seconds: never call it in the socket thread.
    """
    return _ask_chrony() or _ask_kernel()


def chrony_offset(report: str) -> ClockOffset | None:
    """The offset in one line of ``chronyc -c tracking``; None for anything else."""
    fields = report.strip().split(",")
    if len(fields) != 14:
        return None
    try:
        # chrony names the correction that is still to be added to the clock: its sign is the other one
        offset_ns = -round(float(fields[4]) * 1e9)
        error_ns = round((float(fields[10]) / 2 + float(fields[11])) * 1e9)
    except (ValueError, OverflowError):
        return None
    synchronised = fields[13] != "Not synchronised" and fields[0] != _CHRONY_LOCAL
    return ClockOffset(offset_ns, error_ns, synchronised, "chrony")


def kernel_offset(correction: int, max_error_us: int, status: int) -> ClockOffset:
    """The offset in the fields of ``adjtimex(2)``; the correction is in ns if the status says so, else in us."""
    unit_ns = 1 if status & _STA_NANO else 1_000
    return ClockOffset(-correction * unit_ns, max_error_us * 1_000, not status & _STA_UNSYNC, "kernel")


def _ask_chrony() -> ClockOffset | None:
    program = shutil.which("chronyc")
    if program is None:
        return None
    command = [program, "-n", "-c", "tracking"]
    try:
        done = subprocess.run(  # noqa: S603 - no part of the command comes from outside
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_CHRONY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return chrony_offset(done.stdout) if done.returncode == 0 else None


class _Timex(ctypes.Structure):
    """The front of Linux's struct timex; ``rest`` is larger than what the kernel fills behind it."""

    _fields_: ClassVar = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("frequency", ctypes.c_long),
        ("max_error", ctypes.c_long),
        ("estimated_error", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 512),
    ]


def _ask_kernel() -> ClockOffset | None:
    if sys.platform != "linux":
        return None
    timex = _Timex()  # no mode is set, so nothing is changed
    try:
        answer = ctypes.CDLL(None).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        return None
    return None if answer == _ADJTIMEX_FAILED else kernel_offset(timex.offset, timex.max_error, timex.status)
