"""The tape: the file contract between the recorder and everything that reads a recording.

A session is a folder::

    <root>/<session>/manifest.json             what was recorded, by what, with which clocks; sha256 of every segment
    <root>/<session>/shipped.json              on this machine only: where a copy lies, and what of it was verified
    <root>/<session>/segments/000001.parquet   sealed frames (zstd), written aside and renamed when complete
    <root>/<session>/ledger/000001.parquet     what the recorder noticed while segment 000001 was recorded: gaps and their causes
    <root>/<session>/log/000002.log            frames not sealed yet; empty or absent once a session has ended

``<root>`` is a folder or the URL of an object store; logs are on the recording machine only.

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
    queue_us  int32                from then to the moment it got its seq, microseconds
    flags     uint8                bits: 1 = the recorder was held up before it read this, so it may have come earlier
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
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import StorageError, TapeError
from arbl2.frames import KIND_NAMES, OP_NAMES, VENUES, Anchor, Frame, FrameBlock
from arbl2.places import Place, changes_ns, place, reason, sizes, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

TAPE_VERSION = 1
MANIFEST = "manifest.json"
SHIPPED = "shipped.json"
SEGMENTS = "segments"
LEDGER = "ledger"
LOG = "log"
RECORDING = "recording"
"""State of a session that is being recorded, or whose recorder was killed and not recovered yet."""
RECOVERED = "recovered"
"""State of a session whose recorder was killed: a torn or damaged part of its log may have left a hole in ``seq``."""
SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_NS = 2**62
ROW_GROUP_ROWS = 8_192
ROW_GROUP_BYTES = 16 * 2**20
MAX_GROUP_BYTES = 256 * 2**20
"""A larger row group was not written by arbl2, and would let a foreign file take memory without bound."""
MAX_GROUP_ROWS = 2**20
MAX_LEDGER_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 64 * 2**20
"""Segments of several years; a larger file is no manifest."""
ZSTD_LEVEL = 9

# Counters and stamps grow by little; what is left of a queueing delay is noise, whose high bytes alone can be packed.
_ENCODINGS = {**dict.fromkeys(("seq", "recv_ns", "mono_ns", "conn"), "DELTA_BINARY_PACKED"), "queue_us": "BYTE_STREAM_SPLIT"}
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
        pa.field("queue_us", pa.int32(), nullable=False),
        pa.field("flags", pa.uint8(), nullable=False),
        pa.field("payload", pa.binary(), nullable=False),
    ]
)
_VENUE_CODES = {name: code for code, name in enumerate(VENUES)}
_KIND_CODES = {name: code for code, name in KIND_NAMES.items()}
_OP_CODES = {name: code for code, name in OP_NAMES.items()}


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """One sealed file: its name below ``segments/``, what it holds, and the SHA-256 of its bytes.

    ``payload_bytes`` are the bytes of its payloads as received, 0 if a version that did not count them wrote it.
    """

    file: str
    rows: int
    first_seq: int
    last_seq: int
    first_recv_ns: int
    last_recv_ns: int
    bytes: int
    sha256: str
    payload_bytes: int = 0


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


class Shipped(msgspec.Struct, frozen=True, kw_only=True):
    """The copy of a session: ``url`` of its folder, and the SHA-256 of each file as it was read back from there.

    ``files`` are named from the session folder. A file is listed only after what came back was compared.
    """

    url: str
    files: dict[str, str] = {}


def load_shipped(session_dir: Path) -> Shipped | None:
    """Where the copy of a local session lies, None if it was never shipped. Raises TapeError."""
    path = session_dir / SHIPPED
    try:
        return msgspec.json.decode(path.read_bytes(), type=Shipped)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TapeError(f"{path} cannot be read ({error}). Remove it and ship the session again.") from None
    except OSError as error:
        raise TapeError(f"{path} cannot be read: {reason(error)}.") from None


def session_place(session: Place | Path | str) -> Place:
    """The place of a session folder. Raises ConfigError for a URL of no known kind, TapeError if its store does not answer."""
    if isinstance(session, Place):
        return session
    try:
        return place(session)
    except OSError as error:
        raise unreadable(session, error) from None


def unreadable(where: Place | Path | str, error: OSError) -> TapeError:
    """What reading there came to, in words a person can act on."""
    remote = "://" in str(where)
    hint = "Check its name, the credentials in the environment and the network." if remote else "Check the disk and its rights."
    return TapeError(f"{where} cannot be read: {reason(error)}. {hint}")


def load_manifest(session: Place | Path | str) -> Manifest:
    """Read and check the manifest of a session folder, here or at a URL. Raises TapeError with what to do next."""
    return read_manifest(session)[0]


def read_manifest(session: Place | Path | str) -> tuple[Manifest, bytes]:
    """As ``load_manifest``, with the bytes that it was read from."""
    folder = session_place(session)
    path = folder / MANIFEST
    try:
        body = path.read(MAX_MANIFEST_BYTES)
        manifest = msgspec.json.decode(body, type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise TapeError(f"{folder} is not a recording: it has no {MANIFEST}. Name a session folder.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TapeError(f"{path} cannot be read ({error}). Restore it from a copy.") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if manifest.tape_version != TAPE_VERSION:
        raise TapeError(
            f"{path} is tape version {manifest.tape_version}; this arbl2 reads version {TAPE_VERSION}. Use a matching arbl2."
        )
    _check_manifest(path, manifest)
    return manifest, body


def _check_manifest(path: Place, manifest: Manifest) -> None:
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
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}. Free some space or choose another folder.") from error


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
        self._payload_bytes = 0
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
                use_dictionary=["venue", "kind", "op", "flags"],
                column_encoding=_ENCODINGS,
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
        payload_bytes = int(block.offsets[-1]) - int(block.offsets[0])
        self._batch_bytes += payload_bytes
        self._payload_bytes += payload_bytes
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
            sync_folder(self.path.parent)
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
            payload_bytes=self._payload_bytes,
        )

    def discard(self) -> None:
        """Drop the unfinished file."""
        # On a full disk the footer cannot be written either; the file is thrown away, so that is no loss.
        with contextlib.suppress(OSError):
            self._writer.close()
        self._aside.unlink(missing_ok=True)


class GroupSpan(NamedTuple):
    """A row group by its statistics: the earliest and latest stamp, and the codes of the venues it may hold.

    One without statistics may hold anything.
    """

    number: int
    rows: int
    first_mono_ns: int
    last_mono_ns: int
    venues: frozenset[int]


def _group_span(found: pq.RowGroupMetaData, number: int) -> GroupSpan:
    mono, venue = (found.column(SCHEMA.get_field_index(name)).statistics for name in ("mono_ns", "venue"))
    first, last = (mono.min, mono.max) if mono is not None and mono.has_min_max else (-(2**63), 2**63 - 1)
    venues = frozenset(range(len(VENUES)))
    if venue is not None and venue.has_min_max:
        venues = frozenset(code for code, name in enumerate(VENUES) if venue.min <= name <= venue.max)
    return GroupSpan(number, found.num_rows, first, last, venues)


class TapeReader:
    """Reads the sealed frames of one session, here or at a URL, block by block, in ``seq`` order.

    Memory is bounded by one row group whatever the length of the tape. Sizes are compared with the manifest on opening;
    ``verify_hashes`` reads every byte.
    """

    def __init__(self, session: Path | str) -> None:
        self.place = session_place(session)
        self.manifest = load_manifest(self.place)
        self.anchor = self.manifest.anchor
        paths = [self.segment(number) for number in range(len(self.manifest.segments))]
        try:
            found = sizes(paths)
        except OSError as error:
            raise unreadable(self.place, error) from None
        for segment, path, size in zip(self.manifest.segments, paths, found, strict=True):
            if size is None:
                raise self._missing(path)
            if size != segment.bytes:
                raise TapeError(
                    f"{path} has {size:,} bytes, the manifest says {segment.bytes:,}. It was changed or cut after sealing; "
                    "restore it from a copy."
                )

    def segment(self, number: int) -> Place:
        """The file of segment ``number`` (from 0)."""
        return self.place / SEGMENTS / self.manifest.segments[number].file

    def _missing(self, path: Place) -> TapeError:
        copy = load_shipped(self.place.local) if self.place.local is not None else None
        if copy is not None and f"{SEGMENTS}/{path.name}" in copy.files:
            return TapeError(f"{self.place} keeps its manifest only; its segments were shipped. Read it from '{copy.url}'.")
        return TapeError(f"{path} is missing although the manifest lists it. Restore it from a copy of the recording.")

    def verify_hashes(self) -> None:
        """Compare the SHA-256 of every segment with the manifest. Raises TapeError naming the file that differs."""
        for number, segment in enumerate(self.manifest.segments):
            path = self.segment(number)
            try:
                found = path.sha256()
            except OSError as error:
                raise unreadable(path, error) from None
            if found != segment.sha256:
                raise TapeError(
                    f"{path} does not match its manifest (sha256 {found[:12]}..., recorded {segment.sha256[:12]}...). "
                    "It was changed after sealing; restore it from a copy."
                )

    def blocks(self) -> Iterator[FrameBlock]:
        """Every row group as a FrameBlock. Raises TapeError naming the file and row group that cannot be read."""
        for number in range(len(self.manifest.segments)):
            for _, block in self.groups(number):
                yield block

    def groups(self, number: int, only: Sequence[int] | None = None) -> Iterator[tuple[int, FrameBlock]]:
        """The row groups of segment ``number`` (from 0) that hold frames, each with its own number.

        ``only`` some of them, in rising order. Raises TapeError.
        """
        segment = self.manifest.segments[number]
        path = self.segment(number)
        rows, last_seq = 0, segment.first_seq - 1
        for group, batch in _record_batches(path, self.manifest, only):
            where = f"{path} row group {group}"
            block = block_from_arrow(batch, self.anchor, where=where)
            if len(block) == 0:
                continue
            self._check_order(block, last_seq if only is None else int(block.seq[0]) - 1, where)
            rows, last_seq = rows + len(block), int(block.seq[-1])
            yield group, block
        if only is None and (rows, last_seq) != (segment.rows, segment.last_seq):
            raise TapeError(f"{path} holds other frames than its manifest says. Restore it from a copy of the recording.")

    def group(self, number: int, group: int) -> FrameBlock:
        """Row group ``group`` of segment ``number`` alone. Raises TapeError."""
        for _, block in self.groups(number, (group,)):
            return block
        raise TapeError(f"{self.segment(number)} has no frames in row group {group}. Restore it from a copy of the recording.")

    def group_spans(self, number: int) -> list[GroupSpan]:
        """What the statistics of each row group of segment ``number`` say. Raises TapeError."""
        path = self.segment(number)
        try:
            with path.open() as source, pq.ParquetFile(source) as file:
                return [_group_span(file.metadata.row_group(k), k) for k in range(file.metadata.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise TapeError(f"{path} cannot be read ({reason(error)}). Restore it from a copy of the recording.") from None

    def _check_order(self, block: FrameBlock, last_seq: int, where: str) -> None:
        steps = np.diff(block.seq, prepend=last_seq)
        if bool(np.any(steps < 1)) or (self.manifest.state != RECOVERED and bool(np.any(steps > 1))):
            raise TapeError(f"{where} lacks frames, or has them in the wrong order. Restore it from a copy.")

    def frames(self) -> Iterator[Frame]:
        """Every frame, one at a time (slow; for tools and tests)."""
        for block in self.blocks():
            yield from block.frames()


def ledger(session: Place | Path | str, columns: Sequence[str] | None = None) -> pa.Table | None:
    """The gap ledger of a session, all its files as one table (or those of ``columns`` that it has); None if it has none.

    Raises TapeError for a file that cannot be read or is too large to be a ledger.
    """
    folder = session_place(session) / LEDGER
    try:
        files = [path for path in folder.files() if path.name.endswith(".parquet")]
    except OSError as error:
        raise unreadable(folder, error) from None
    tables = [_ledger_file(path, columns) for path in files]
    return pa.concat_tables(tables, promote_options="permissive") if tables else None


def _ledger_file(path: Place, columns: Sequence[str] | None) -> pa.Table:
    try:
        with path.open() as source, pq.ParquetFile(source) as file:
            if sum(file.metadata.row_group(k).total_byte_size for k in range(file.metadata.num_row_groups)) > MAX_LEDGER_BYTES:
                raise TapeError(f"{path} is too large to be a gap ledger. Do not trust it.")
            wanted = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            return file.read(columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise TapeError(f"{path} cannot be read ({reason(error)}). Restore it from a copy of the recording.") from None


def _record_batches(path: Place, manifest: Manifest, only: Sequence[int] | None = None) -> Iterator[tuple[int, pa.RecordBatch]]:
    group = -1
    try:
        # Far away, one wide read is cheaper than one for each column.
        with path.open() as source, pq.ParquetFile(source, pre_buffer=path.local is None) as file:
            _check_schema(path, file.schema_arrow, manifest)
            every = range(file.metadata.num_row_groups)
            for group in every if only is None else (group for group in only if group in every):
                _check_size(path, group, file.metadata.row_group(group))
                table = file.read_row_group(group, use_threads=True).combine_chunks()
                for batch in table.to_batches():
                    yield group, batch
    except (pa.ArrowException, OSError) as error:
        where = f"{path} row group {group}" if group >= 0 else str(path)
        raise TapeError(f"{where} cannot be read ({reason(error)}). Restore it from a copy of the recording.") from None


def _check_size(path: Place, group: int, found: pq.RowGroupMetaData) -> None:
    """Refuse what arbl2 never writes and what would let a small foreign file take memory without bound."""
    payload = found.column(SCHEMA.get_field_index("payload"))
    by_reference = any("DICTIONARY" in encoding for encoding in payload.encodings)
    if found.total_byte_size > MAX_GROUP_BYTES or found.num_rows > MAX_GROUP_ROWS or by_reference:
        raise TapeError(
            f"{path} row group {group} was not written by arbl2: {found.num_rows:,} rows, {found.total_byte_size:,} bytes"
            f"{', payloads by reference' if by_reference else ''}. Record or import the data anew."
        )


def _check_schema(path: Place, schema: pa.Schema, manifest: Manifest) -> None:
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
    mono_ns = _values(batch.column("mono_ns"), np.int64)
    payload = batch.column("payload")
    _, offsets_buffer, data_buffer = payload.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[payload.offset : payload.offset + len(batch) + 1]
    return FrameBlock(
        seq=_values(batch.column("seq"), np.int64),
        time_ns=mono_ns + np.int64(anchor.wall_ns - anchor.mono_ns),
        recv_ns=_values(batch.column("recv_ns"), np.int64),
        mono_ns=mono_ns,
        venue=_codes(batch.column("venue"), _VENUE_CODES, where),
        conn=_values(batch.column("conn"), np.int32),
        kind=_codes(batch.column("kind"), _KIND_CODES, where),
        op=_codes(batch.column("op"), _OP_CODES, where),
        queue_us=_values(batch.column("queue_us"), np.int32),
        flags=_values(batch.column("flags"), np.uint8),
        offsets=offsets,
        data=np.frombuffer(data_buffer or b"", dtype=np.uint8),
    )


def _values(column: pa.Array, dtype: type[np.generic]) -> NDArray[Any]:
    # Not to_numpy: it first imports pandas, where there is one, for most of a second.
    buffer = column.buffers()[1]
    return np.frombuffer(buffer if buffer is not None else b"", dtype)[column.offset : column.offset + len(column)]


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
        _column(block.queue_us, pa.int32()),
        _column(block.flags, pa.uint8()),
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
    return lookup[_values(column.indices, np.int8)]


@overload
def sessions(root: Path) -> list[Path]: ...
@overload
def sessions(root: Path | str) -> list[Path | str]: ...
def sessions(root: Path | str) -> list[Path] | list[Path | str]:
    """Session folders below ``root``, the one written last at the end: paths below a folder, URLs below a URL.

    Raises TapeError if they cannot be listed; a folder that does not exist holds none.
    """
    above = session_place(root)
    try:
        folders = above.folders()
        found = [
            (changed_ns, folder.name, folder)
            for folder, changed_ns in zip(folders, changes_ns([folder / MANIFEST for folder in folders]), strict=True)
            if changed_ns is not None
        ]
    except NotADirectoryError:
        return []
    except OSError as error:
        raise unreadable(above, error) from None
    return [folder.local or str(folder) for _, _, folder in sorted(found, key=lambda item: item[:2])]


@overload
def find_session(tape: Path | None, root: Path) -> Path: ...
@overload
def find_session(tape: Path | str | None, root: Path | str) -> Path | str: ...
def find_session(tape: Path | str | None, root: Path | str) -> Path | str:
    """The session folder meant by ``tape``: itself, or the newest below it or below ``root``. Raises TapeError."""
    where = session_place(root if tape is None else tape)
    try:
        if tape is not None and (where / MANIFEST).size() is not None:
            return where.local or str(where)
    except OSError as error:
        raise unreadable(where, error) from None
    found = sessions(root if tape is None else tape)
    if not found:
        looked = f"below {where}" if tape is None else f"at {where}"
        raise TapeError(f"there is no recording {looked}. `arbl2 record` makes one; `arbl2 demo` shows the whole way.")
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
