"""Is the recorder well? It writes its status beside its lock; anyone may read it, and a service manager acts on the answer.

Only a fresh status of the very process that holds the folder counts. Ages are taken from the monotonic clock, which a step of
the wall clock does not move; so the check has to run on the recorder's machine, and in its container if it has one.
"""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from arbl2_recorder import clock
from arbl2_recorder.live import printable, size
from arbl2_recorder.status import Status  # noqa: TC001 - read at run time when a status is read back
from arbl2_recorder.storage import LOCK_FILE

if TYPE_CHECKING:
    from pathlib import Path

_logger = logging.getLogger("arbl2.recorder")
STATUS_FILE = ".recorder.status.json"
_DROP_S = 60.0


@dataclass(frozen=True, slots=True)
class StatusFile:
    """A status, who wrote it and when (both clocks)."""

    pid: int
    wall_ns: int
    mono_ns: int
    status: Status


@dataclass(frozen=True, slots=True)
class Health:
    """``reasons`` say what is wrong; there are none if the recorder is healthy. ``age_s`` of the status, None without one.

    ``warnings`` are what a person should look at although a new start would not mend it.
    """

    reasons: tuple[str, ...]
    session: str = ""
    age_s: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.reasons

    def sentence(self) -> str:
        """The answer in one line."""
        answer = f"healthy: {self.session}" if self.healthy else "unhealthy: " + "; ".join(self.reasons)
        return answer + "".join(f"; warning: {warning}" for warning in self.warnings)


def write_status(root: Path, status: Status) -> None:
    """Replace the status file of a root folder, whole or not at all. A disk that refuses is logged, not raised.

    It waits for the disk: never call it in the socket thread.
    """
    wall_ns, mono_ns = clock.stamp()
    part = root / f"{STATUS_FILE}.part"
    try:
        part.write_bytes(msgspec.json.encode(StatusFile(os.getpid(), wall_ns, mono_ns, status)))
        part.replace(root / STATUS_FILE)
    except OSError as error:
        _logger.warning("cannot write the status for health checks: %s", error)


def holder(root: Path) -> int | None:
    """The process that holds a root folder, None if there is none."""
    try:
        pid = int((root / LOCK_FILE).read_text(encoding="ascii"))
        os.kill(pid, 0)
    except PermissionError:
        return pid
    except (OSError, ValueError, OverflowError):
        return None
    return pid


def health(root: Path, *, max_age_s: float = 10.0, max_silence_s: float = 60.0, min_free_bytes: int = 2**30) -> Health:
    """Look at the recorder of a root folder. Never raises: what cannot be read is a reason too."""
    pid = holder(root)
    if pid is None:
        return Health((f"no recorder is running below {root}",))
    try:
        found = msgspec.json.decode((root / STATUS_FILE).read_bytes(), type=StatusFile)
    except FileNotFoundError:
        return Health((f"the recorder (process {pid}) has not written its status yet",))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Health((f"{root / STATUS_FILE} cannot be read: {error}",))
    if found.pid != pid:
        return Health((f"the recorder (process {pid}) has not written its status yet",))
    age_s = (clock.mono_ns() - found.mono_ns) / 1e9
    reasons = _reasons(found.status, age_s, max_age_s, max_silence_s)
    try:
        free = shutil.disk_usage(root).free
    except OSError as error:
        reasons.append(f"{root} cannot be looked at: {error.strerror or error}")
    else:
        if free < min_free_bytes:
            reasons.append(f"only {size(free)} of disk are free")
    problem = found.status.ship_problem
    warnings = (f"not shipped: {printable(problem)}",) if problem else ()
    return Health(tuple(reasons), found.status.session, round(age_s, 3), warnings)


def _reasons(status: Status, age_s: float, max_age_s: float, max_silence_s: float) -> list[str]:
    if age_s < 0:
        return ["the status is of an earlier boot of this machine"]
    if age_s > max_age_s:
        return [f"the status is {age_s:.0f} s old: the recorder or its disk hangs"]
    reasons = []
    if status.phase == "recording":
        for venue in status.venues:
            silent_s = age_s + (status.elapsed_s if venue.last_message_s is None else venue.last_message_s)
            if silent_s > max_silence_s:
                problem = f" ({venue.state}: {venue.problem})" if venue.problem else ""
                reasons.append(f"{venue.name} has been silent for {silent_s:.0f} s{problem}")
    if status.last_drop_s is not None and status.last_drop_s + age_s <= _DROP_S:
        reasons.append(f"messages are being dropped, {status.dropped:,} so far: the disk is too slow")
    return reasons
