"""The decoded store of a session: is it there and to be believed, and how it comes to be."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from arbl2.errors import StorageError, TapeError
from arbl2.tape import GroupSpan, sha256_of
from arbl2_replay.store_build import build
from arbl2_replay.store_format import DECODED, Files, Kept, Stamp, believed, changed_tape, instrument_names, load_index

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from arbl2.tape import TapeReader
    from arbl2_replay.store_format import Index

_LOG = logging.getLogger("arbl2.replay")


@dataclass(frozen=True, slots=True)
class SegmentStore:
    """The store of one segment, fit for use."""

    files: Files
    index: Index

    @property
    def groups(self) -> list[GroupSpan]:
        """Its slices, as row groups of a raw segment are described."""
        return [
            GroupSpan(k, part.rows, part.first_mono_ns, part.last_mono_ns, frozenset(part.venues))
            for k, part in enumerate(self.index.slices)
        ]


@dataclass(frozen=True, slots=True)
class Built:
    """What ``build_session`` did: segments that had a store, those it made one for, and the bytes that all of them take."""

    session: str
    kept: int
    made: int
    bytes: int
    raw_bytes: int


def find_store(reader: TapeReader, number: int, *, check_segment: bool) -> SegmentStore | None:
    """The store of segment ``number``, None where there is none that may be believed.

    With ``check_segment``, raises TapeError where the raw segment is not what its manifest says.
    """
    if reader.place.local is None:
        return None
    segment = reader.manifest.segments[number]
    files = Files(reader.place.local, segment.file)
    index = load_index(files, segment.sha256, instrument_names(reader.manifest.instruments))
    index = believed(files, index, check_segment=check_segment) if index is not None else None
    return SegmentStore(files, index) if index is not None else None


def make_store(reader: TapeReader, number: int) -> SegmentStore:
    """Make the store of segment ``number``, replacing what is there.

    Raises StorageError where nothing can be written, TapeError for a segment that is not what its manifest says, or that holds
    what a store cannot.
    """
    if reader.place.local is None:
        raise StorageError(f"{reader.place} is not a folder of this machine: decoded stores are made beside a local tape only.")
    segment = reader.manifest.segments[number]
    files = Files(reader.place.local, segment.file)
    try:
        stamp = Stamp.of(files.segment)
        found = sha256_of(files.segment)
    except OSError as error:
        raise TapeError(f"{files.segment} cannot be read: {error.strerror or error}. Restore it from a copy.") from None
    if found != segment.sha256:
        raise changed_tape(files.segment, found, segment.sha256)
    blocks = (block for _, block in reader.groups(number))
    index = build(files, reader.manifest.instruments, blocks, Kept(sha256=found, stamp=stamp))
    _LOG.debug("made the decoded store of %s", files.segment)
    return SegmentStore(files, index)


def build_session(reader: TapeReader, on_progress: Callable[[int, int], None] | None = None) -> Built:
    """Make what is missing or outdated of the store of a session. Raises as ``make_store``."""
    kept = made = size = 0
    segments = reader.manifest.segments
    for number in range(len(segments)):
        store = find_store(reader, number, check_segment=True)
        kept += store is not None
        if store is None:
            store = make_store(reader, number)
            made += 1
        size += sum(part.stamp.size for part in (store.index.rows, store.index.levels))
        if on_progress is not None:
            on_progress(number + 1, len(segments))
    _sweep(reader)
    return Built(reader.manifest.session, kept, made, size, sum(segment.bytes for segment in segments))


def _sweep(reader: TapeReader) -> None:
    """Remove what belongs to no segment, and what a killed build left behind."""
    folder: Path | None = reader.place.local
    if folder is None:
        return
    stems = {segment.file.removesuffix(".parquet") for segment in reader.manifest.segments}
    for path in (folder / DECODED).glob("*"):
        if path.is_file() and path.name.split(".", 1)[0] not in stems:
            path.unlink(missing_ok=True)
