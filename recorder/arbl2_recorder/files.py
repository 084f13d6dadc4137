"""The disk side of one session: its folder, its log and what becomes of it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

from arbl2.tape import LOG, save_manifest
from arbl2_recorder.birth import create
from arbl2_recorder.seal import Sealer
from arbl2_recorder.writer import LogWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from arbl2.errors import StorageError
    from arbl2.tape import Manifest
    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.venues import VenueFeed


class SessionFiles:
    """A new session on the disk, with the threads that write it. Making and closing one waits for the disk.

    ``on_error`` and ``on_wanted`` are called in those threads. Raises StorageError.
    """

    def __init__(
        self,
        config: RecordConfig,
        feeds: list[VenueFeed],
        *,
        on_error: Callable[[StorageError], None],
        on_wanted: Callable[[tuple[str, ...]], None],
    ) -> None:
        self.path, manifest = create(config, feeds)
        self.started_ns = manifest.anchor_mono_ns
        self.sealer = Sealer(self.path, manifest, on_error, on_wanted=on_wanted)
        self.log = LogWriter(
            self.path,
            flush_ms=config.flush_ms,
            fsync=config.fsync,
            segment_seconds=config.segment_seconds,
            segment_bytes=config.segment_bytes,
            on_rotated=self.sealer.put,
            on_error=on_error,
        )

    @property
    def manifest(self) -> Manifest:
        """As it is on the disk."""
        return self.sealer.manifest

    @property
    def error(self) -> StorageError | None:
        """Why the session is not whole."""
        return self.log.error or self.sealer.error

    @property
    def sealed_bytes(self) -> int:
        """Bytes of the segments."""
        return sum(segment.bytes for segment in self.manifest.segments)

    def discard(self) -> None:
        """Remove a session that never began."""
        self.log.close()
        self.sealer.close()
        shutil.rmtree(self.path)

    def close(self, notes: Sequence[str]) -> None:
        """Write what is queued, and seal. A failed disk leaves the session to be recovered: look at ``error``."""
        self.log.close()
        self.sealer.close()
        if self.error is None:
            self.sealer.manifest = msgspec.structs.replace(self.manifest, state="sealed", notes=[*self.manifest.notes, *notes])
            save_manifest(self.path, self.manifest)
            (self.path / LOG).rmdir()
