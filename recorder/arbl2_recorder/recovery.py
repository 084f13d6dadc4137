"""Recovery: sessions whose recorder was killed become whole recordings again.

Every whole batch of their logs is sealed into segments; only a torn tail is lost, and its bytes are counted. A session that
ended, however long ago, is never touched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from arbl2.errors import TapeError
from arbl2.tape import LOG, SEGMENTS, load_manifest, save_manifest, sessions
from arbl2_recorder.seal import seal_log
from arbl2_recorder.storage import RootLock, storage_error

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What recovery did for one session.

    ``frames_recovered`` came from logs, ``frames_sealed`` were safe in segments before; ``bytes_dropped`` of the logs belonged
    to no whole batch. ``problem`` is "" unless the session could not be read, and then nothing of it was changed.
    """

    session: str
    path: Path
    frames_recovered: int
    frames_sealed: int
    bytes_dropped: int
    problem: str = ""


def recover(root: Path) -> list[RecoveryReport]:
    """Restore every session below ``root`` whose recorder is dead, oldest first; an empty list if there is none.

    Raises TapeError if there is no such folder, StorageError if a recorder is running there or the disk refuses.
    """
    if not root.is_dir():
        raise TapeError(f"there is no folder {root}. Name the folder that `arbl2 record` wrote to.")
    with RootLock(root):
        return recover_locked(root)


def recover_locked(root: Path) -> list[RecoveryReport]:
    """As ``recover``, for a caller that already holds the root's lock."""
    try:
        reports = [_recover_session(path) for path in sessions(root)]
        _remove_stillborn(root)
    except OSError as error:
        raise storage_error(root, error) from error
    return [report for report in reports if report is not None]


def _recover_session(path: Path) -> RecoveryReport | None:
    try:
        manifest = load_manifest(path)
    except TapeError as error:
        return RecoveryReport(path.name, path, 0, 0, 0, problem=str(error))
    if manifest.state != "recording":
        return None
    for folder in (path, path / SEGMENTS):
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()
    sealed_before, recovered, dropped = manifest.rows, 0, 0
    for log in sorted(file for file in (path / LOG).glob("*.log") if file.stem.isdecimal()):
        done = seal_log(path, int(log.stem), manifest, salvage=True)
        manifest = done.manifest
        recovered += done.frames
        dropped += done.dropped_bytes
    note = f"the recorder was killed: {recovered} frames restored from logs, {dropped} torn bytes dropped"
    save_manifest(path, msgspec.structs.replace(manifest, state="recovered", notes=[*manifest.notes, note]))
    with contextlib.suppress(FileNotFoundError):
        (path / LOG).rmdir()
    return RecoveryReport(path.name, path, recovered, sealed_before, dropped)


def _remove_stillborn(root: Path) -> None:
    """A recorder killed before its first manifest leaves a folder that holds at most the unfinished manifest."""
    for unfinished in root.glob("*/manifest.json.part"):
        folder = unfinished.parent
        if [entry.name for entry in folder.iterdir()] == [unfinished.name]:
            unfinished.unlink()
            folder.rmdir()
