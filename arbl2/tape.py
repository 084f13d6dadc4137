"""The tape: the file contract between the recorder and everything that reads a recording.

A session is a folder::

    <root>/<session>/manifest.json             what was recorded, by what, with which clocks; sha256 of every segment
    <root>/<session>/segments/000001.parquet   sealed frames (zstd), written aside and renamed when complete
    <root>/<session>/log/000002.log            frames not sealed yet; empty or absent once a session has ended

Schema of a segment, version 1 (rows in ``seq`` order):

    ========  ===================  ==========================================================================
    column    type                 meaning
    ========  ===================  ==========================================================================
    seq       int64                total order in the session, from 1, no holes
    recv_ns   int64                wall clock when it happened, ns since the Unix epoch
    mono_ns   int64                monotonic clock when it happened, ns; zero is arbitrary, differences are true
    venue     dictionary<string>   "upbit", "binance", or "" (clock samples)
    conn      int32                connection number in the session, from 1; 0 = none
    kind      dictionary<string>   message, sent, opened, closed, request, response, clock, alarm
    op        dictionary<string>   text, binary, ping, pong, or ""
    payload   binary               the exact bytes
    ========  ===================  ==========================================================================

Key-value metadata of the schema: ``arbl2.tape`` (version), ``arbl2.session``, ``arbl2.anchor`` (JSON wall_ns, mono_ns).
This module is the only one that knows the schema; it touches no clock and no socket.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import StorageError, TapeError
from arbl2.frames import KIND_NAMES, OP_NAMES, VENUES, Anchor, Frame, FrameBlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

TAPE_VERSION = 1
MANIFEST = "manifest.json"
SEGMENTS = "segments"
LOG = "log"
RECOVERED = "recovered"
"""State of a session whose recorder was killed: a torn or damaged part of its log may have left a hole in ``seq``."""
SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_NS = 2**62
ROW_GROUP_ROWS = 8_192
ROW_GROUP_BYTES = 16 * 2**20
MAX_GROUP_BYTES = 256 * 2**20
"""A larger row group was not written by arbl2, and would let a foreign file take memory without bound."""
MAX_GROUP_ROWS = 2**20
ZSTD_LEVEL = 9

_DICT = pa.dictionary(pa.int8(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("recv_ns", pa.int64(), nullable=False),
        pa.field("mono_ns", pa.int64(), nullable=False),
        pa.field("venue", _DICT, nullable=False),
        pa.field("conn", pa.int32(), nullable=False),
        pa.field("kind", _DICT, nullable=False),
        pa.field("op", _DICT, nullable=False),
        pa.field("payload", pa.binary(), nullable=False),
    ]
)
_VENUE_CODES = {name: code for code, name in enumerate(VENUES)}
_KIND_CODES = {name: code for code, name in KIND_NAMES.items()}
_OP_CODES = {name: code for code, name in OP_NAMES.items()}


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One sealed file: its name below ``segments/``, what it holds, and the SHA-256 of its bytes."""

    file: str
    rows: int
    first_seq: int
    last_seq: int
    first_recv_ns: int
    last_recv_ns: int
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a session is. ``state``: recording, sealed (ended cleanly), recovered (ended by a kill, log restored), imported."""

    tape_version: int
    session: str
    state: str
    anchor_wall_ns: int
    anchor_mono_ns: int
    versions: dict[str, str] = {}
    host: dict[str, str] = {}
    endpoints: dict[str, str] = {}
    instruments: dict[str, list[str]] = {}
    subscriptions: dict[str, Any] = {}
    segments: list[Segment] = []
    counts: dict[str, int] = {}
    notes: list[str] = []

    @property
    def anchor(self) -> Anchor:
        """The instant that joins the session's two clocks."""
        return Anchor(self.anchor_wall_ns, self.anchor_mono_ns)

    @property
    def rows(self) -> int:
        """Sealed frames."""
        return sum(segment.rows for segment in self.segments)


def load_manifest(session_dir: Path) -> Manifest:
    """Read and check the manifest of a session folder. Raises TapeError with what to do next."""
    path = session_dir / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise TapeError(f"{session_dir} is not a recording: it has no {MANIFEST}. Name a session folder.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TapeError(f"{path} cannot be read ({error}). Restore it from a copy.") from None
    except OSError as error:
        raise TapeError(f"{path} cannot be read: {error.strerror}.") from None
    if manifest.tape_version != TAPE_VERSION:
        raise TapeError(
            f"{path} is tape version {manifest.tape_version}; this arbl2 reads version {TAPE_VERSION}. Use a matching arbl2."
        )
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: Manifest) -> None:
    if not SESSION_NAME.fullmatch(manifest.session):
        raise TapeError(f"{path} has a session name that cannot be a folder's ({manifest.session[:40]!r}). Do not trust it.")
    if not (0 <= manifest.anchor_wall_ns < _MAX_NS and -_MAX_NS < manifest.anchor_mono_ns < _MAX_NS):
        raise TapeError(f"{path} has a clock anchor that no clock shows. Restore it from a copy of the recording.")
    last_seq = 0
    for segment in manifest.segments:
        if Path(segment.file).name != segment.file:
            raise TapeError(f"{path} names a segment outside its folder ({segment.file!r}). Do not trust this recording.")
        if segment.first_seq != last_seq + 1 and (manifest.state != RECOVERED or segment.first_seq <= last_seq):
            raise TapeError(
                f"{path} lists no segment with frames {last_seq + 1:,} to {segment.first_seq - 1:,}. "
                "Restore the recording from a copy."
            )
        last_seq = segment.last_seq


def save_manifest(session_dir: Path, manifest: Manifest) -> None:
    """Write the manifest so that a reader sees the old one or the new one, never half of one."""
    body = msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2)
    write_atomically(session_dir / MANIFEST, body + b"\n")


def write_atomically(path: Path, body: bytes) -> None:
    """Write beside, flush to disk, rename. Raises StorageError."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}. Free some space or choose another folder.") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _anchor_json(anchor: Anchor) -> bytes:
    return msgspec.json.encode({"wall_ns": anchor.wall_ns, "mono_ns": anchor.mono_ns})


class SegmentWriter:
    """Frames in, one sealed Parquet segment out.

    Rows go to ``<name>.part``; ``seal`` closes, syncs and renames it, so that a file without the suffix is always whole.
    """

    def __init__(self, session_dir: Path, number: int, session: str, anchor: Anchor, *, zstd_level: int = ZSTD_LEVEL) -> None:
        self.path = session_dir / SEGMENTS / f"{number:06d}.parquet"
        self._aside = self.path.with_name(self.path.name + ".part")
        self._anchor = anchor
        self._frames: list[Frame] = []
        self._frame_bytes = 0
        self._batches: list[pa.RecordBatch] = []
        self._batch_rows = 0
        self._batch_bytes = 0
        self._rows = 0
        self._first: tuple[int, int] | None = None
        self._last = (0, 0)
        self._schema = SCHEMA.with_metadata(
            {"arbl2.tape": str(TAPE_VERSION), "arbl2.session": session, "arbl2.anchor": _anchor_json(anchor)}
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._aside,
                self._schema,
                compression="zstd",
                compression_level=zstd_level,
                use_dictionary=["venue", "kind", "op"],
                column_encoding=dict.fromkeys(("seq", "recv_ns", "mono_ns", "conn"), "DELTA_BINARY_PACKED"),
                write_statistics=["seq", "recv_ns", "mono_ns", "venue", "conn", "kind"],
            )
        except OSError as error:
            raise StorageError(f"cannot write {self._aside}: {error}. Free some space or choose another folder.") from error

    def append(self, frame: Frame) -> None:
        """Add one frame; a row group is written whenever enough have gathered."""
        self._frames.append(frame)
        self._frame_bytes += len(frame.payload)
        if len(self._frames) >= ROW_GROUP_ROWS or self._frame_bytes >= ROW_GROUP_BYTES:
            self._gather()

    def append_block(self, block: FrameBlock) -> None:
        """Add a block of frames without touching them one by one; it must not be written to afterwards."""
        self._gather()
        self._add(block)

    def _gather(self) -> None:
        if self._frames:
            block = FrameBlock.from_frames(self._frames, self._anchor)
            self._frames, self._frame_bytes = [], 0
            self._add(block)

    def _add(self, block: FrameBlock) -> None:
        if len(block) == 0:
            return
        if self._first is None:
            self._first = (int(block.seq[0]), int(block.recv_ns[0]))
        self._last = (int(block.seq[-1]), int(block.recv_ns[-1]))
        self._rows += len(block)
        self._batches.append(block_to_arrow(block, self._schema))
        self._batch_rows += len(block)
        self._batch_bytes += int(block.offsets[-1]) - int(block.offsets[0])
        if self._batch_rows >= ROW_GROUP_ROWS or self._batch_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._batches:
            return
        table = pa.Table.from_batches(self._batches, schema=self._schema)
        self._batches, self._batch_rows, self._batch_bytes = [], 0, 0
        try:
            self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        except OSError as error:
            raise StorageError(f"cannot write {self._aside}: {error}. Free some space or choose another folder.") from error

    def seal(self) -> Segment:
        """Close, sync and rename; returns the manifest's entry. A segment must hold at least one frame."""
        self._gather()
        self._flush()
        if self._first is None:
            raise StorageError(f"nothing to seal in {self.path}.")
        try:
            self._writer.close()
            with self._aside.open("rb") as file:
                os.fsync(file.fileno())
            digest, size = sha256_of(self._aside), self._aside.stat().st_size
            self._aside.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(f"cannot seal {self.path}: {error}. Free some space; the log is kept.") from error
        return Segment(
            file=self.path.name,
            rows=self._rows,
            first_seq=self._first[0],
            last_seq=self._last[0],
            first_recv_ns=self._first[1],
            last_recv_ns=self._last[1],
            bytes=size,
            sha256=digest,
        )

    def discard(self) -> None:
        """Drop the unfinished file."""
        # On a full disk the footer cannot be written either; the file is thrown away, so that is no loss.
        with contextlib.suppress(OSError):
            self._writer.close()
        self._aside.unlink(missing_ok=True)


class TapeReader:
    """Reads the sealed frames of one session, block by block, in ``seq`` order.

    Memory is bounded by one row group whatever the length of the tape. ``check`` compares sizes with the manifest on opening;
    ``verify_hashes`` reads every byte.
    """

    def __init__(self, session_dir: Path) -> None:
        self.path = session_dir
        self.manifest = load_manifest(session_dir)
        self.anchor = self.manifest.anchor
        for segment in self.manifest.segments:
            path = self._segment_path(segment)
            if not path.is_file():
                raise TapeError(f"{path} is missing although the manifest lists it. Restore it from a copy of the recording.")
            size = path.stat().st_size
            if size != segment.bytes:
                raise TapeError(
                    f"{path} has {size:,} bytes, the manifest says {segment.bytes:,}. It was changed or cut after sealing; "
                    "restore it from a copy."
                )

    def _segment_path(self, segment: Segment) -> Path:
        return self.path / SEGMENTS / segment.file

    def verify_hashes(self) -> None:
        """Compare the SHA-256 of every segment with the manifest. Raises TapeError naming the file that differs."""
        for segment in self.manifest.segments:
            path = self._segment_path(segment)
            found = sha256_of(path)
            if found != segment.sha256:
                raise TapeError(
                    f"{path} does not match its manifest (sha256 {found[:12]}..., recorded {segment.sha256[:12]}...). "
                    "It was changed after sealing; restore it from a copy."
                )

    def blocks(self) -> Iterator[FrameBlock]:
        """Every row group as a FrameBlock. Raises TapeError naming the file and row group that cannot be read."""
        for segment in self.manifest.segments:
            path = self._segment_path(segment)
            rows, last_seq = 0, segment.first_seq - 1
            for group, batch in _record_batches(path, self.manifest):
                block = block_from_arrow(batch, self.anchor, where=f"{path} row group {group}")
                if len(block) == 0:
                    continue
                steps = np.diff(block.seq, prepend=last_seq)
                if bool(np.any(steps < 1)) or (self.manifest.state != RECOVERED and bool(np.any(steps > 1))):
                    raise TapeError(
                        f"{path} row group {group} lacks frames, or has them in the wrong order. Restore it from a copy."
                    )
                rows, last_seq = rows + len(block), int(block.seq[-1])
                yield block
            if (rows, last_seq) != (segment.rows, segment.last_seq):
                raise TapeError(f"{path} holds other frames than its manifest says. Restore it from a copy of the recording.")

    def frames(self) -> Iterator[Frame]:
        """Every frame, one at a time (slow; for tools and tests)."""
        for block in self.blocks():
            yield from block.frames()


def _record_batches(path: Path, manifest: Manifest) -> Iterator[tuple[int, pa.RecordBatch]]:
    group = -1
    try:
        with pq.ParquetFile(path) as file:
            _check_schema(path, file.schema_arrow, manifest)
            for group in range(file.metadata.num_row_groups):
                _check_size(path, group, file.metadata.row_group(group))
                table = file.read_row_group(group, use_threads=True).combine_chunks()
                for batch in table.to_batches():
                    yield group, batch
    except (pa.ArrowException, OSError) as error:
        where = f"{path} row group {group}" if group >= 0 else str(path)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TapeError(f"{where} cannot be read ({reason}). Restore it from a copy of the recording.") from None


def _check_size(path: Path, group: int, found: pq.RowGroupMetaData) -> None:
    """Refuse what arbl2 never writes and what would let a small foreign file take memory without bound."""
    payload = found.column(SCHEMA.get_field_index("payload"))
    by_reference = any("DICTIONARY" in encoding for encoding in payload.encodings)
    if found.total_byte_size > MAX_GROUP_BYTES or found.num_rows > MAX_GROUP_ROWS or by_reference:
        raise TapeError(
            f"{path} row group {group} was not written by arbl2: {found.num_rows:,} rows, {found.total_byte_size:,} bytes"
            f"{', payloads by reference' if by_reference else ''}. Record or import the data anew."
        )


def _check_schema(path: Path, schema: pa.Schema, manifest: Manifest) -> None:
    metadata = schema.metadata or {}
    version = metadata.get(b"arbl2.tape", b"").decode("ascii", "replace")
    if version != str(TAPE_VERSION):
        raise TapeError(f"{path} is not an arbl2 tape of version {TAPE_VERSION} (found {version!r}).")
    if not schema.equals(SCHEMA, check_metadata=False):
        raise TapeError(f"{path} has other columns than tape version {TAPE_VERSION}. It is damaged or foreign.")
    stated = (metadata.get(b"arbl2.session", b"").decode("utf-8", "replace"), metadata.get(b"arbl2.anchor", b""))
    if stated != (manifest.session, _anchor_json(manifest.anchor)):
        raise TapeError(f"{path} belongs to another session, or another clock, than its manifest. Restore both from one copy.")


def block_from_arrow(batch: pa.RecordBatch, anchor: Anchor, *, where: str = "tape") -> FrameBlock:
    """Columns of one Arrow batch; stamps and payload bytes are views of Arrow's memory, not copies."""
    mono_ns = batch.column("mono_ns").to_numpy()
    payload = batch.column("payload")
    _, offsets_buffer, data_buffer = payload.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[payload.offset : payload.offset + len(batch) + 1]
    return FrameBlock(
        seq=batch.column("seq").to_numpy(),
        time_ns=mono_ns + np.int64(anchor.wall_ns - anchor.mono_ns),
        recv_ns=batch.column("recv_ns").to_numpy(),
        mono_ns=mono_ns,
        venue=_codes(batch.column("venue"), _VENUE_CODES, where),
        conn=batch.column("conn").to_numpy(),
        kind=_codes(batch.column("kind"), _KIND_CODES, where),
        op=_codes(batch.column("op"), _OP_CODES, where),
        offsets=offsets,
        data=np.frombuffer(data_buffer or b"", dtype=np.uint8),
    )


def block_to_arrow(block: FrameBlock, schema: pa.Schema = SCHEMA) -> pa.RecordBatch:
    """The columns of one Arrow batch; stamps and payload bytes are views of the block, not copies."""
    columns = [
        _column(block.seq, pa.int64()),
        _column(block.recv_ns, pa.int64()),
        _column(block.mono_ns, pa.int64()),
        _names(block.venue, _VENUE_CODES),
        _column(block.conn, pa.int32()),
        _names(block.kind, _KIND_CODES),
        _names(block.op, _OP_CODES),
        pa.Array.from_buffers(pa.binary(), len(block), [None, _buffer(block.offsets), _buffer(block.data)], null_count=0),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _buffer(values: NDArray[Any]) -> pa.Buffer:
    return pa.py_buffer(np.ascontiguousarray(values))


def _column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    # Not pa.array: given an ndarray it first imports pandas, where there is one, and holds up every thread meanwhile.
    return pa.Array.from_buffers(kind, len(values), [None, _buffer(values)], null_count=0)


def _names(column: NDArray[np.uint8], codes: dict[str, int]) -> pa.DictionaryArray:
    index = np.zeros(256, dtype=np.int8)
    index[list(codes.values())] = np.arange(len(codes), dtype=np.int8)
    return pa.DictionaryArray.from_arrays(_column(index[column], pa.int8()), _strings(tuple(codes)))


@functools.cache
def _strings(names: tuple[str, ...]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, names)], dtype=np.int32)
    text = pa.py_buffer("".join(names).encode("ascii"))
    return pa.Array.from_buffers(pa.string(), len(names), [None, pa.py_buffer(offsets), text], null_count=0)


def _codes(column: pa.DictionaryArray, codes: dict[str, int], where: str) -> Any:
    names = column.dictionary.to_pylist()
    unknown = [name for name in names if name not in codes]
    if unknown:
        raise TapeError(f"{where}: unknown value {unknown[0]!r}. The tape was written by a newer arbl2, or is damaged.")
    lookup = np.array([codes[name] for name in names] or [0], dtype=np.uint8)
    return lookup[column.indices.to_numpy()]


def sessions(root: Path) -> list[Path]:
    """Session folders below ``root``, the one written last at the end."""
    if not root.is_dir():
        return []
    manifests = root.glob(f"*/{MANIFEST}")
    return [path.parent for path in sorted(manifests, key=lambda path: (path.stat().st_mtime_ns, path.parent.name))]


def find_session(tape: Path | None, root: Path) -> Path:
    """The session folder meant by ``tape``: itself, or the newest below it or below ``root``. Raises TapeError."""
    if tape is not None and (tape / MANIFEST).is_file():
        return tape
    if tape is not None and not tape.is_dir():
        raise TapeError(f"there is no recording at {tape}. `arbl2 record` makes one; `arbl2 demo` shows the whole way.")
    found = sessions(tape if tape is not None else root)
    if not found:
        raise TapeError(
            f"there is no recording below {tape or root}. `arbl2 record` makes one; `arbl2 demo` shows the whole way."
        )
    return found[-1]


def write_session(
    session_dir: Path,
    manifest: Manifest,
    frames: Sequence[Frame] | Iterator[Frame],
    *,
    zstd_level: int = ZSTD_LEVEL,
) -> Manifest:
    """Write a whole session at once (importers, synthetic tapes): one segment and its manifest."""
    writer = SegmentWriter(session_dir, 1, manifest.session, manifest.anchor, zstd_level=zstd_level)
    counts: dict[str, int] = {}
    try:
        for frame in frames:
            writer.append(frame)
            key = f"{frame.venue or '-'}.{KIND_NAMES[frame.kind]}"
            counts[key] = counts.get(key, 0) + 1
        segment = writer.seal()
    except BaseException:
        writer.discard()
        raise
    done = msgspec.structs.replace(manifest, segments=[segment], counts=dict(sorted(counts.items())))
    save_manifest(session_dir, done)
    return done
