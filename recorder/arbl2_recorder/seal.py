"""Sealing: a closed log becomes a Parquet segment with its ledger, the manifest learns of it, then the log goes.

The order makes every step safe to lose: a segment that the manifest does not name is written again from its log, and so is its
ledger; a log whose frames the manifest already counts is dropped by ``seq``.

Between two closed logs the sealer reads along in the open one, so that gaps are known within a second. It does so in slices
with pauses, and not at all while frames come thick and fast: the log waits on the disk, the thread that stamps must not wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from arbl2.errors import StorageError
from arbl2.frames import KIND_NAMES, VENUES, Flag, FrameKind
from arbl2.places import sync_folder
from arbl2.tape import SegmentWriter, save_manifest
from arbl2_recorder import clock
from arbl2_recorder.integrity import Inspector
from arbl2_recorder.ledger import END, Cause, Gap, LedgerWriter
from arbl2_recorder.log import LogReader, decode_batch
from arbl2_recorder.status import QueueDelay
from arbl2_recorder.storage import storage_error
from arbl2_recorder.writer import log_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.frames import FrameBlock
    from arbl2.tape import Manifest, Segment


_logger = logging.getLogger("arbl2.recorder")
SEALER_NICENESS = 15
SLICE_FRAMES = 48
"""Half a millisecond of looking at books."""
PAUSE_S = 0.002
TAIL_S = 0.5
TELL_NS = 1_000_000_000
MOST_FRAMES_PER_S = 20_000
_MOST_US = 100_000
_FRONT_BYTES = 16
"""Magic, CRC and counts of a batch."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """What became of one log: the manifest that now names its segment, frames sealed, bytes that were no whole batch."""

    manifest: Manifest
    frames: int
    dropped_bytes: int


class Watch:
    """Everything that is found out about frames on their way to a segment: their gaps, and how long they queued.

    ``rest`` is called after every slice of frames, ``on_gaps`` with the rows that came to an end.
    """

    def __init__(
        self,
        session_dir: Path,
        session: str,
        inspector: Inspector,
        *,
        rest: Callable[[], object] = lambda: None,
        on_gaps: Callable[[list[Gap]], None] | None = None,
    ) -> None:
        self._session_dir = session_dir
        self._session = session
        self._rest = rest
        self._on_gaps = on_gaps
        self._writer: LedgerWriter | None = None
        self._delays = np.zeros(_MOST_US + 1, dtype=np.int64)
        self._longest_us = 0
        self.inspector = inspector
        self.late_frames = 0
        self.causes: Counter[str] = Counter()

    def see(self, block: FrameBlock, name: int | str) -> None:
        """Look at those frames that were not seen before; rows go to the ledger of that number or name. Raises StorageError."""
        first = int(np.searchsorted(block.seq, self.inspector.seq, side="right"))
        for start in range(first, len(block), SLICE_FRAMES):
            part = block.slice(start, start + SLICE_FRAMES)
            self._measure(part)
            self._keep(self._inspect(part), name)
            self._rest()

    def _inspect(self, block: FrameBlock) -> list[Gap]:
        try:
            return self.inspector.inspect(block)
        except Exception as error:
            # Whatever a venue sent that trips the inspector, the frames themselves are whole: they must be sealed.
            _logger.exception("the inspector failed and starts anew")
            self.inspector = Inspector(after_seq=int(block.seq[-1]))
            seq, recv_ns, mono_ns = int(block.seq[0]), int(block.recv_ns[0]), int(block.mono_ns[0])
            detail = f"the inspector failed ({error!r}): {len(block)} frames were not checked"
            return [Gap(cause=Cause.ALARM, start_seq=seq, start_recv_ns=recv_ns, start_mono_ns=mono_ns, detail=detail)]

    def _measure(self, block: FrameBlock) -> None:
        delays = block.queue_us[block.kind == FrameKind.MESSAGE]
        if len(delays):
            np.add.at(self._delays, np.clip(delays, 0, _MOST_US), 1)
            self._longest_us = max(self._longest_us, int(delays.max()))
        self.late_frames += int(np.count_nonzero(block.flags & Flag.LATE))

    def _keep(self, gaps: list[Gap], name: int | str) -> None:
        if gaps:
            if self._writer is None:
                self._writer = LedgerWriter(self._session_dir, name, self._session)
            self._writer.append(gaps)
            self.causes.update(gap.cause for gap in gaps)
            if self._on_gaps is not None:
                self._on_gaps(gaps)

    def seal(self, name: int | str) -> None:
        """Complete the ledger of a segment. Raises StorageError."""
        writer, self._writer = self._writer or LedgerWriter(self._session_dir, name, self._session), None
        writer.seal(self.inspector.state())

    def finish(self, *more: Gap) -> None:
        """The session has ended: write what is still open, and ``more``. Raises StorageError."""
        self._keep([*self.inspector.finish(), *more], END)
        if self._writer is not None:
            self._writer.seal()
            self._writer = None

    def discard(self) -> None:
        """Drop what is not sealed."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None

    @property
    def queue_us(self) -> QueueDelay:
        """From the arrival of a message to its seq. Percentiles know 100 ms at most."""
        cumulated = np.cumsum(self._delays)
        p50, p99 = (int(np.searchsorted(cumulated, share * cumulated[-1])) for share in (0.5, 0.99))
        return QueueDelay(p50, p99, self._longest_us)


def seal_log(session_dir: Path, number: int, manifest: Manifest, *, salvage: bool, watch: Watch | None = None) -> Sealed:
    """Turn log ``number`` into segment ``number`` and its ledger, update the manifest on disk, delete the log.

    ``salvage`` accepts a log with damaged or torn parts (after a kill); otherwise they are an error and the log is kept.
    Without a ``watch`` there will be no ledger. Raises StorageError.
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
            if watch is not None:
                watch.see(fresh, number)
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
        if watch is not None:
            watch.seal(number)
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


class LogTail(LogReader):
    """Reads along in a log that is being written: whole batches only, and each once."""

    def __init__(self, session_dir: Path, number: int, manifest: Manifest) -> None:
        super().__init__(log_path(session_dir, number), manifest.anchor)
        self.number = number
        self.read_bytes = 0

    @property
    def size(self) -> int:
        """Bytes in the log now. Raises OSError."""
        return self._path.stat().st_size

    def next(self) -> FrameBlock | None:
        """The next batch; None if it is not there, or not whole yet. Raises OSError."""
        with self._path.open("rb") as file:
            left = os.fstat(file.fileno()).st_size - self.read_bytes
            file.seek(self.read_bytes)
            length = self._batch(file.read(_FRONT_BYTES), left)
            if not length:
                return None
            file.seek(self.read_bytes)
            block = decode_batch(file.read(length), self._anchor)
        if block is not None:
            self.read_bytes += length
        return block


class Sealer:
    """Seals the logs of one session, one after the other, in a thread of its own; the only writer of its manifest.

    In that thread ``on_error(error)`` is called once (logs handed over later are kept for ``recover``), ``on_gaps`` with rows of
    the ledger as they come to an end, and ``on_wanted`` about once a second with the Binance symbols whose diff stream needs a
    book from the REST side, for as long as there are any.
    """

    def __init__(
        self,
        session_dir: Path,
        manifest: Manifest,
        on_error: Callable[[StorageError], None],
        *,
        on_gaps: Callable[[list[Gap]], None] | None = None,
        on_wanted: Callable[[tuple[str, ...]], None] | None = None,
    ) -> None:
        self._session_dir = session_dir
        self._on_error = on_error
        self._on_wanted = on_wanted
        self._closing = threading.Event()
        self._closed_logs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._watch = Watch(session_dir, manifest.session, Inspector(), rest=self._rest, on_gaps=on_gaps)
        self._tail = LogTail(session_dir, 1, manifest)
        self._grown = (clock.mono_ns(), 0)
        self._pressed = False
        self._told_ns = 0
        self.manifest = manifest
        self.error: StorageError | None = None
        self.gaps: dict[str, int] = {}
        self.last_gap = ""
        self.queue_us = QueueDelay()
        self.late_frames = 0
        self.streams: list[tuple[str, str, int, int]] = []
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
        self._closing.set()
        self._closed_logs.put(None)
        self._thread.join()

    def _run(self) -> None:
        # Compressing must not take a core from the thread that stamps (Linux gives every thread its own niceness).
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), SEALER_NICENESS)
        more = False
        while True:
            try:
                number = self._closed_logs.get(timeout=PAUSE_S if more else TAIL_S)
            except queue.Empty:
                more = self._try(self._follow, "the open log could not be read along") or False
                continue
            if number is None:
                break
            self._try(partial(self._seal, number), f"segment {number} could not be sealed")
        self._try(self._finish, "the ledger could not be ended")
        self._watch.discard()

    def _try(self, work: Callable[[], bool], what: str) -> bool:
        """What ``work`` says; nothing is done any more once something has failed."""
        if self.error is not None:
            return False
        try:
            return work()
        except StorageError as error:
            self.error = error
        except Exception as error:
            self.error = StorageError(f"{what}: {error!r}. Its log is kept.")
        self._on_error(self.error)
        return False

    def _seal(self, number: int) -> bool:
        self.manifest = seal_log(self._session_dir, number, self.manifest, salvage=False, watch=self._watch).manifest
        self._tail = LogTail(self._session_dir, number + 1, self.manifest)
        self._grown = (clock.mono_ns(), 0)
        self._tell()
        return True

    def _finish(self) -> bool:
        # A log that could not be handed over is left to recovery, and what is open at its end with it.
        if self._watch.inspector.seq == self._sealed_seq:
            self._watch.finish()
        self._tell(at_once=True)
        self.gaps = dict(self._watch.causes)
        return True

    @property
    def _sealed_seq(self) -> int:
        return self.manifest.segments[-1].last_seq if self.manifest.segments else 0

    def _follow(self) -> bool:
        """Look at one more batch of the open log; whether there may be more."""
        try:
            block = self._tail.next() if not self._is_pressed() else None
        except OSError:
            # Not there yet; or closed, and about to be handed over.
            block = None
        if block is not None:
            self._watch.see(block, self._tail.number)
        self._tell()
        return block is not None

    def _is_pressed(self) -> bool:
        """Whether the log grows so fast that reading along has to wait."""
        now_ns, size = clock.mono_ns(), self._tail.size
        then_ns, was = self._grown
        if now_ns - then_ns >= TAIL_S * 1e9:
            self._grown = (now_ns, size)
            frames = self._watch.inspector.seq - self._sealed_seq
            frame_bytes = self._tail.read_bytes / frames if frames else 1_000.0
            self._pressed = (size - was) / frame_bytes > MOST_FRAMES_PER_S * (now_ns - then_ns) / 1e9
        return self._pressed

    def _rest(self) -> None:
        """No pause any more once the session is closing."""
        self._closing.wait(PAUSE_S)

    def _tell(self, *, at_once: bool = False) -> None:
        watch, now_ns = self._watch, clock.mono_ns()
        if now_ns - self._told_ns < TELL_NS and not at_once:
            return
        self._told_ns = now_ns
        self.gaps, self.last_gap = watch.inspector.gaps, watch.inspector.last_gap
        self.queue_us, self.late_frames, self.streams = watch.queue_us, watch.late_frames, watch.inspector.streams()
        wanted = watch.inspector.wanted()
        if wanted and self._on_wanted is not None and not at_once:
            self._on_wanted(wanted)
