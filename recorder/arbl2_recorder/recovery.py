"""Recovery: sessions whose recorder was killed become whole recordings again.

Every whole batch of their logs is sealed into segments; only a torn tail is lost, and its bytes are counted. Their gap ledger is
written on from where it ended, and says that there was a kill. A session that ended, however long ago, is never touched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from arbl2.errors import TapeError
from arbl2.tape import LEDGER, LOG, RECORDING, RECOVERED, SEGMENTS, TapeReader, load_manifest, save_manifest, sessions
from arbl2_recorder.integrity import Inspector
from arbl2_recorder.ledger import END, Cause, Gap, read_state
from arbl2_recorder.seal import Watch, seal_log
from arbl2_recorder.storage import RootLock, storage_error

if TYPE_CHECKING:
    from pathlib import Path

    from arbl2.tape import Manifest


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
    if manifest.state != RECORDING:
        return None
    for folder in (path, path / SEGMENTS, path / LEDGER):
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()
    sealed_before, recovered, dropped = manifest.rows, 0, 0
    watch = Watch(path, manifest.session, _inspector(path, manifest))
    for log in sorted(file for file in (path / LOG).glob("*.log") if file.stem.isdecimal()):
        done = seal_log(path, int(log.stem), manifest, salvage=True, watch=watch)
        manifest = done.manifest
        recovered += done.frames
        dropped += done.dropped_bytes
    watch.finish(_killed(manifest, watch.inspector, f"{dropped:,} torn bytes of the log were dropped"))
    note = f"the recorder was killed: {recovered} frames restored from logs, {dropped} torn bytes dropped"
    save_manifest(path, msgspec.structs.replace(manifest, state=RECOVERED, notes=[*manifest.notes, note]))
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


def _inspector(path: Path, manifest: Manifest) -> Inspector:
    """One that goes on where the ledger ends; where there is none, or none that can be read, it begins after the segments."""
    if not manifest.segments:
        return Inspector()
    last = manifest.segments[-1]
    try:
        state = read_state(path / LEDGER / last.file) or b""
        return Inspector(state, after_seq=last.last_seq)
    except (TapeError, msgspec.MsgspecError):
        return Inspector(after_seq=last.last_seq)


def _killed(manifest: Manifest, inspector: Inspector, detail: str) -> Gap:
    seq, recv_ns, mono_ns = inspector.at
    known = mono_ns > 0
    return Gap(
        cause=Cause.KILLED,
        start_seq=seq,
        start_recv_ns=recv_ns if known else manifest.anchor_wall_ns,
        start_mono_ns=mono_ns if known else manifest.anchor_mono_ns,
        detail=detail,
    )


def inspect_session(session: Path | str) -> list[Gap]:
    """The rows that the ledger of a whole tape would have, whoever wrote the tape. Raises TapeError."""
    reader = TapeReader(session)
    inspector = Inspector()
    gaps = [gap for block in reader.blocks() for gap in inspector.inspect(block)]
    return [*gaps, *inspector.finish(), *_end(reader.manifest, inspector)]


def write_ledger(session: Path) -> int:
    """Make the ledger of a whole tape anew from its frames; returns its rows. Raises TapeError, StorageError."""
    reader = TapeReader(session)
    if reader.manifest.state == RECORDING:
        raise TapeError(f"{session} is being recorded, or was not recovered. Run `arbl2 recover` first.")
    watch = Watch(session, reader.manifest.session, Inspector())
    segments = iter(reader.manifest.segments)
    try:
        (session / LEDGER).mkdir(exist_ok=True)
        (session / LEDGER / f"{END}.parquet").unlink(missing_ok=True)
        segment = next(segments, None)
        for block in reader.blocks():
            assert segment is not None
            name = segment.file.partition(".")[0]
            watch.see(block, name)
            if watch.inspector.seq == segment.last_seq:
                watch.seal(name)
                segment = next(segments, None)
        watch.finish(*_end(reader.manifest, watch.inspector))
    except OSError as error:
        raise storage_error(session, error) from error
    finally:
        watch.discard()
    return watch.causes.total()


def _end(manifest: Manifest, inspector: Inspector) -> list[Gap]:
    return [_killed(manifest, inspector, "")] if manifest.state == RECOVERED else []
