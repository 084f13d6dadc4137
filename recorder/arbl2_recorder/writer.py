"""The log writer: a thread of its own, so that a slow disk never holds up the sockets.

The socket thread appends to a batch in memory; this thread writes whole batches, at least every flush interval, and starts a
new log when the old one is big or old enough. Memory is bounded by whoever appends: ``queued_bytes`` says what waits. What was
written survives a kill; what was synced, which is asked for with every flush, also survives a power cut.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

from arbl2.errors import StorageError
from arbl2.frames import HEAD
from arbl2.places import sync_folder
from arbl2.tape import LOG
from arbl2_recorder import clock
from arbl2_recorder.log import encode_batch
from arbl2_recorder.storage import storage_error
from arbl2_recorder.syncer import Syncer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_logger = logging.getLogger("arbl2.recorder")

BATCH_BYTES = 2 * 2**20
SYNC_BYTES = 16 * 2**20
"""As much is written between two syncs at most, unless the disk is slower: one for each batch would cost most of its speed."""
FRAME_OVERHEAD = 192
"""What a waiting frame costs in memory beyond its payload, bytes: two bytes objects, a packed head, two list slots."""


class _Batch:
    __slots__ = ("heads", "payloads", "size")

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.payloads: list[bytes] = []
        self.size = 0


def log_path(session_dir: Path, number: int) -> Path:
    """The log that becomes segment ``number``."""
    return session_dir / LOG / f"{number:06d}.log"


class LogWriter:
    """Appends frames to ``log/000001.log``, ``000002.log``, ... of a session.

    ``on_rotated(number)`` is called in the writer's thread when a log with frames in it is closed for good;
    ``on_error(error)`` once, when the disk fails: nothing is written after that. Raises StorageError when it cannot start.
    """

    def __init__(
        self,
        session_dir: Path,
        *,
        flush_ms: int,
        fsync: bool,
        segment_seconds: int,
        segment_bytes: int,
        on_rotated: Callable[[int], None],
        on_error: Callable[[StorageError], None],
    ) -> None:
        self._session_dir = session_dir
        # Two fifths of the interval are left for a busy machine and for the write: what a kill costs stays within it.
        self._flush_ns = flush_ms * 600_000
        self._fsync = fsync
        self._segment_ns = segment_seconds * 1_000_000_000
        self._segment_bytes = segment_bytes
        self._on_rotated = on_rotated
        self._on_error = on_error
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._open_batch = _Batch()
        self._full: list[_Batch] = []
        self._number = 0
        self._handle = -1
        self._size = 0
        self._unsynced = 0
        self._opened_slot = 0
        self._syncer = Syncer(self._sync_failed)
        self.queued_bytes = 0
        self.logged_bytes = 0
        self.logged_seq = 0
        """The last frame that a kill cannot take any more."""
        self.error: StorageError | None = None
        try:
            (session_dir / LOG).mkdir(exist_ok=True)
            self._open_next()
        except OSError as error:
            self._syncer.close()
            raise storage_error(session_dir / LOG, error) from error
        self._thread = threading.Thread(target=self._run, name="arbl2-log-writer", daemon=True)
        self._thread.start()

    def append(self, head: bytes, payload: bytes) -> None:
        """Queue one frame (head packed by ``frames.HEAD``). Never waits for the disk."""
        cost = len(payload) + FRAME_OVERHEAD
        with self._lock:
            batch = self._open_batch
            batch.heads.append(head)
            batch.payloads.append(payload)
            batch.size += cost
            self.queued_bytes += cost
            if batch.size >= BATCH_BYTES:
                self._full.append(batch)
                self._open_batch = _Batch()
                self._wake.set()

    def close(self) -> None:
        """Write and sync what is queued, close the log and hand it over. Look at ``error`` afterwards."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._syncer.close()

    def _run(self) -> None:
        try:
            due_ns = clock.mono_ns() + self._flush_ns
            while True:
                self._wake.wait(max(0, due_ns - clock.mono_ns()) / 1e9)
                self._wake.clear()
                if self.error is not None:
                    self._give_up(self.error)
                    return
                closing = self._closing
                now_ns = clock.mono_ns()
                flush = closing or now_ns >= due_ns
                if flush:
                    due_ns = now_ns + self._flush_ns
                for batch in self._take(everything=flush):
                    self._write(batch)
                    self._rotate_if_due()
                self._rotate_if_due()
                if flush:
                    self._sync()
                if closing:
                    self._close_log()
                    return
        except OSError as error:
            self._give_up(storage_error(log_path(self._session_dir, self._number), error))
        except Exception as error:
            _logger.exception("the log writer failed")
            self._give_up(StorageError(f"the log writer stopped: {error!r}. What was logged before stays."))

    def _sync_failed(self, error: OSError) -> None:
        self._report(storage_error(self._session_dir / LOG, error))
        self._wake.set()

    def _report(self, error: StorageError) -> None:
        with self._lock:
            is_first, self.error = self.error is None, self.error or error
        if is_first:
            self._on_error(error)

    def _give_up(self, error: StorageError) -> None:
        if self._handle >= 0:
            # A torn batch costs the reader nothing, but a log that ends whole needs no explanation.
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
            self._syncer.ask(partial(os.close, self._handle))
        self._report(error)

    def _take(self, *, everything: bool) -> list[_Batch]:
        with self._lock:
            taken, self._full = self._full, []
            if everything and self._open_batch.heads:
                taken.append(self._open_batch)
                self._open_batch = _Batch()
        return taken

    def _write(self, batch: _Batch) -> None:
        data = encode_batch(batch.heads, batch.payloads)
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]
        self._size += len(data)
        self._unsynced += len(data)
        if self._unsynced >= SYNC_BYTES:
            self._sync()
        self.logged_bytes += len(data)
        self.logged_seq = HEAD.unpack_from(batch.heads[-1])[0]
        with self._lock:
            self.queued_bytes -= batch.size

    def _sync(self) -> None:
        if self._fsync and self._unsynced:
            self._syncer.ask(partial(os.fdatasync, self._handle))
        self._unsynced = 0

    def _slot(self) -> int:
        return clock.wall_ns() // self._segment_ns

    def _rotate_if_due(self) -> None:
        if not self._size:
            self._opened_slot = self._slot()
        elif self._size >= self._segment_bytes or self._slot() != self._opened_slot:
            self._close_log()
            self._open_next()

    def _open_next(self) -> None:
        self._number += 1
        path = log_path(self._session_dir, self._number)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = 0
        self._opened_slot = self._slot()
        if self._fsync:
            self._syncer.ask(partial(sync_folder, path.parent))

    def _close_log(self) -> None:
        self._sync()
        handle, self._handle = self._handle, -1
        self._syncer.ask(partial(os.close, handle))
        if self._size:
            self._on_rotated(self._number)
        else:
            log_path(self._session_dir, self._number).unlink()
