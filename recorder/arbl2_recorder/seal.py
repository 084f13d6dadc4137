"""Sealing: a closed log becomes a Parquet segment, the manifest learns of it, then the log goes.

The order makes every step safe to lose: a segment that the manifest does not name is written again from its log, a log whose
frames the manifest already counts is dropped by ``seq``.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from arbl2.errors import StorageError
from arbl2.frames import KIND_NAMES, VENUES
from arbl2.tape import SegmentWriter, save_manifest
from arbl2_recorder.log import LogReader
from arbl2_recorder.storage import storage_error, sync_folder
from arbl2_recorder.writer import log_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.tape import Manifest, Segment


SEALER_NICENESS = 15


@dataclass(frozen=True, slots=True)
class Sealed:
    """What became of one log: the manifest that now names its segment, frames sealed, bytes that were no whole batch."""

    manifest: Manifest
    frames: int
    dropped_bytes: int


def seal_log(session_dir: Path, number: int, manifest: Manifest, *, salvage: bool) -> Sealed:
    """Turn log ``number`` into segment ``number``, update the manifest on disk, delete the log.

    ``salvage`` accepts a log with damaged or torn parts (after a kill); otherwise they are an error and the log is kept.
    Raises StorageError.
    """
    path = log_path(session_dir, number)
    last_seq = manifest.segments[-1].last_seq if manifest.segments else 0
    counts = np.zeros((len(VENUES), max(KIND_NAMES) + 1), dtype=np.int64)
    reader = LogReader(path, manifest.anchor)
    writer = SegmentWriter(session_dir, number, manifest.session, manifest.anchor)
    frames = 0
    try:
        for block in reader.blocks():
            fresh = block.slice(int(np.searchsorted(block.seq, last_seq, side="right")), len(block))
            writer.append_block(fresh)
            np.add.at(counts, (fresh.venue, fresh.kind), 1)
            frames += len(fresh)
        if reader.dropped_bytes and not salvage:
            raise StorageError(
                f"{path} does not read back as it was written ({reader.dropped_bytes:,} bytes are damaged). "
                "It is kept; check the disk, then run `arbl2 recover`."
            )
        segment = writer.seal() if frames else None
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        # After a seal there is nothing left aside and this does nothing.
        writer.discard()
    if segment is not None:
        manifest = _with_segment(manifest, segment, counts)
        save_manifest(session_dir, manifest)
    try:
        path.unlink()
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    return Sealed(manifest, frames, reader.dropped_bytes)


def _with_segment(manifest: Manifest, segment: Segment, added: NDArray[np.int64]) -> Manifest:
    counts = dict(manifest.counts)
    for venue, kind in np.argwhere(added).tolist():
        key = f"{VENUES[venue] or '-'}.{KIND_NAMES[kind]}"
        counts[key] = counts.get(key, 0) + int(added[venue, kind])
    return msgspec.structs.replace(manifest, segments=[*manifest.segments, segment], counts=dict(sorted(counts.items())))


class Sealer:
    """Seals the logs of one session, one after the other, in a thread of its own; the only writer of its manifest.

    ``on_error(error)`` is called once, in that thread; logs handed over later are kept for ``recover``.
    """

    def __init__(self, session_dir: Path, manifest: Manifest, on_error: Callable[[StorageError], None]) -> None:
        self._session_dir = session_dir
        self._on_error = on_error
        self._closed_logs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.manifest = manifest
        self.error: StorageError | None = None
        self._thread = threading.Thread(target=self._run, name="arbl2-sealer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Closed logs that are not segments yet (the one in work not counted)."""
        return self._closed_logs.qsize()

    def put(self, number: int) -> None:
        """Hand over a closed log."""
        self._closed_logs.put(number)

    def close(self) -> None:
        """Seal what was handed over. Look at ``error`` afterwards."""
        self._closed_logs.put(None)
        self._thread.join()

    def _run(self) -> None:
        # Compressing must not take a core from the thread that stamps (Linux gives every thread its own niceness).
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SEALER_NICENESS)
        while (number := self._closed_logs.get()) is not None:
            if self.error is not None:
                continue
            try:
                self.manifest = seal_log(self._session_dir, number, self.manifest, salvage=False).manifest
            except StorageError as error:
                self.error = error
            except Exception as error:
                self.error = StorageError(f"segment {number} could not be sealed: {error!r}. Its log is kept.")
            if self.error is not None:
                self._on_error(self.error)
