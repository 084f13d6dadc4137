"""Retention: which whole sessions may go when the disk or the calendar says so, and how they go.

Choosing is pure. Deleting renames a session aside first, so that nobody ever meets half of one; what a kill leaves aside is
deleted by the next call. Only sessions that have ended are ever touched, and never the newest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arbl2.errors import Arbl2Error, ConfigError, TapeError
from arbl2.tape import LOG, RECORDING, load_manifest, sessions
from arbl2_recorder.ship import is_shipped, session_lock, verify_copy
from arbl2_recorder.storage import storage_error

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ASIDE = ".pruned-"
"""Front of the name of a session on its way out; hidden, so that it is no session any more."""
DAY_NS = 86_400 * 10**9


@dataclass(frozen=True, slots=True)
class Held:
    """What retention knows of a session: when its last frame came (ns since the Unix epoch) and what it takes on the disk.

    ``ended``: it is sealed or recovered, and nothing of it waits in a log. ``shipped``: all of it is in its copy.
    """

    name: str
    ended_ns: int
    bytes: int
    ended: bool
    shipped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long and how much to keep; None means without limit. Raises ConfigError for a limit that is not above 0.

    ``keep_days`` counts from the last frame of a session. ``keep_bytes`` is for everything below the folder, the session being
    recorded included. ``only_shipped`` spares what has no whole copy elsewhere, whatever the limits say.
    """

    keep_days: float | None = None
    keep_bytes: int | None = None
    only_shipped: bool = False

    def __post_init__(self) -> None:
        for name in ("keep_days", "keep_bytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0, or left out to keep everything")

    def chosen(self, held: Sequence[Held], now_ns: int) -> list[Held]:
        """The sessions to delete, oldest first. Never the newest, never one that has not ended."""
        oldest_first = sorted(held, key=lambda session: (session.ended_ns, session.name))
        left = sum(session.bytes for session in held)
        going = []
        for session in oldest_first[:-1]:
            old = self.keep_days is not None and now_ns - session.ended_ns > self.keep_days * DAY_NS
            much = self.keep_bytes is not None and left > self.keep_bytes
            if (old or much) and session.ended and (session.shipped or not self.only_shipped):
                going.append(session)
                left -= session.bytes
        return going


@dataclass(frozen=True, slots=True)
class Pruned:
    """A session that was chosen. ``problem`` is "" if it is gone (or would be), else why it is still there."""

    session: str
    bytes: int
    problem: str = ""


def survey(root: Path) -> list[Held]:
    """What retention knows of every readable session below ``root``. Raises StorageError."""
    found = []
    for path in sessions(root):
        # What cannot be read is for a person to look at: it is neither counted nor deleted.
        with contextlib.suppress(Arbl2Error):
            found.append(_held(path))
    return found


def _held(path: Path) -> Held:
    manifest = load_manifest(path)
    try:
        waiting = any(log.stat().st_size for log in (path / LOG).glob("*.log"))
        size = _size(path)
    except OSError as error:
        raise storage_error(path, error) from error
    last_ns = max((segment.last_recv_ns for segment in manifest.segments), default=manifest.anchor_wall_ns)
    ended = manifest.state != RECORDING and not waiting and not path.is_symlink()
    return Held(path.name, last_ns, size, ended, is_shipped(path))


def _size(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            total += _size(folder / entry.name)
        else:
            total += entry.stat(follow_symlinks=False).st_size
    return total


def prune(root: Path, retention: Retention, *, now_ns: int, dry_run: bool = False) -> list[Pruned]:
    """Delete what ``retention`` chooses below ``root``, oldest first; with ``dry_run`` only say what that would be.

    With ``only_shipped`` the copy of each is read back and compared before. A session that cannot be deleted is reported and
    left alone. It may run beside a recorder. Raises TapeError or StorageError if the folder itself cannot be used.
    """
    if not root.is_dir():
        raise TapeError(f"there is no folder {root}. Name the folder that `arbl2 record` wrote to.")
    if not dry_run:
        _finish(root)
    return [
        Pruned(session.name, session.bytes, "" if dry_run else _delete(root / session.name, retention))
        for session in retention.chosen(survey(root), now_ns)
    ]


def _delete(path: Path, retention: Retention) -> str:
    try:
        with session_lock(path):
            if retention.only_shipped:
                verify_copy(path)
            aside = path.with_name(ASIDE + path.name)
            path.rename(aside)
            shutil.rmtree(aside)
    except Arbl2Error as error:
        return str(error)
    except OSError as error:
        return str(storage_error(path, error))
    return ""


def _finish(root: Path) -> None:
    """Delete what an interrupted call had already put aside."""
    for aside in root.glob(f"{ASIDE}*"):
        if aside.is_symlink():
            continue
        try:
            # Held: another call is at it.
            with contextlib.suppress(Arbl2Error), session_lock(aside):
                shutil.rmtree(aside)
        except OSError as error:
            raise storage_error(root, error) from error
