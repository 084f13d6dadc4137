"""What the decoded store of a segment is made of, where it lies, and when it may be believed.

Beside the raw tape, for each segment::

    <session>/decoded/000001.rows.parquet     a row for each frame: stamps, what it does to which book, how many changes
    <session>/decoded/000001.levels.parquet   the changes, a row group for each slice and part
    <session>/decoded/000001.index            its own SHA-256, then JSON: what the two were made from, their hashes, the slices

A slice is up to ``SLICE_ROWS`` frames and stands alone. The index is written last. It names the SHA-256 of the segment and the
version of the decoder: where one of them differs, the store is as good as absent. It may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa

from arbl2 import decoding, engine, frames, money, providers, scan, updates
from arbl2.errors import TapeError
from arbl2.frames import VENUES, ExchangeId
from arbl2.tape import sha256_of
from arbl2.updates import LEVEL_ROOM, MAX_BLOCK, MAX_BOOKS, MAX_LEVELS, Reason, What
from arbl2_replay import store_kernels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

    from numpy.typing import NDArray

DECODED = "decoded"
SLICE_ROWS = 16_384
FIRST_SLICE_ROWS = 8_192
MAX_SLICE_LEVELS = 2**21
"""A slice ends early where it has more changes, or ..."""
MAX_SLICE_PAYLOAD = 2**25
"""... more bytes of payload."""
MOST_SLICE_ROWS = 2**17
MOST_SLICE_BYTES = 2**28
LEVELS_AT_ONCE = MAX_SLICE_LEVELS + LEVEL_ROOM + MAX_BLOCK * 4 * MAX_LEVELS
"""A slice has no more changes: it ends with the block that fills it, which may be of depth changes, and of windows that have
nothing in common with the window before (one for each level that goes or comes, on two sides)."""
MAX_INDEX_BYTES = 64 * 2**20
_SETTLED_NS = 100_000_000
"""A file that changed less than this before it was looked at may change again without another stamp."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

ROWS = pa.schema(
    [
        pa.field("sort", pa.uint16(), nullable=False),  # index into the sorts of the index
        pa.field("seq", pa.int64(), nullable=False),  # step from the row before
        pa.field("mono_ns", pa.int64(), nullable=False),  # step from the row before
        pa.field("exchange_ms", pa.int64(), nullable=False),  # step from the row before with levels of the same book
        pa.field("first_id", pa.int64(), nullable=False),  # of a depth change its distance from the update_id before
        pa.field("update_id", pa.int64(), nullable=False),  # step, as of exchange_ms
        pa.field("check", pa.int64(), nullable=False),
        pa.field("changes", pa.int16(), nullable=False),
        pa.field("asks", pa.int16(), nullable=False),  # of the changes, 0 for windows
        pa.field("payload", pa.binary(), nullable=False),  # alarms and REST bodies that are no snapshot; empty for all others
    ]
)
"""Steps begin at 0 in each slice and wrap, so that every number is exact."""
LEVELS = pa.schema([pa.field("code", pa.int32(), nullable=False), pa.field("qty", pa.int64(), nullable=False)])
"""As ``store_kernels`` has them. There are fewer sizes than codes; zeros fill the column."""
MAX_SORTS = 2**16


def numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of numbers as an array that may not be written to."""
    # Not to_numpy: it first imports pandas, where there is one, for most of a second.
    column = table[name]
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies one chunk, too
    dtype = table.schema.field(name).type.to_pandas_dtype()
    return np.frombuffer(column.buffers()[1] or b"", dtype)[column.offset : column.offset + len(column)]


class Stamp(msgspec.Struct, frozen=True, kw_only=True):
    """What the file system said of a file when its SHA-256 was taken. Times are ns since the Unix epoch."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    looked_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """As it is now. Raises OSError."""
        now_ns = time.time_ns()
        found = path.stat()
        return cls(
            size=found.st_size, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns, inode=found.st_ino, looked_ns=now_ns
        )

    def is_same(self, path: Path) -> bool:
        """The file system says the same now. Raises OSError."""
        return msgspec.structs.replace(Stamp.of(path), looked_ns=self.looked_ns) == self

    def holds(self, path: Path) -> bool:
        """The file was not touched since. Raises OSError."""
        return self.ctime_ns + _SETTLED_NS < self.looked_ns and self.is_same(path)


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A file that the store was made from or is made of: the SHA-256 of its bytes, and its stamp when that was taken."""

    sha256: str
    stamp: Stamp

    def holds(self, path: Path) -> bool:
        """It is still there: untouched, or made anew with the same bytes by another replay. Raises OSError."""
        return self.stamp.is_same(path) or sha256_of(path) == self.sha256


BookNumber = Annotated[int, msgspec.Meta(ge=-1, lt=MAX_BOOKS)]
Byte = Annotated[int, msgspec.Meta(ge=0, lt=256)]
Levels = Annotated[int, msgspec.Meta(ge=0, le=MAX_LEVELS)]


class Sort(msgspec.Struct, frozen=True, array_like=True):
    """What many frames have in common: where they came from, what they do to which book of the tape (-1: to none), and why.

    ``otherwise`` is the reason in a run that does not know the instrument; ``n_bid`` and ``n_ask`` are the levels of a whole
    window, 0 for anything else.
    """

    venue: Annotated[int, msgspec.Meta(ge=0, lt=len(VENUES))]
    conn: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
    kind: Byte
    what: Annotated[int, msgspec.Meta(ge=0, le=int(What.SNAPSHOT))]
    reason: Reason
    otherwise: Reason
    book: BookNumber
    n_bid: Levels
    n_ask: Levels


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of one book (-1: of none) in a slice: how many, the units of their prices and sizes, and the first price, 10^-8.

    They are those of its windows, or its other levels. ``is_wide``: the low halves of prices stand behind the codes and the high
    ones behind those, in three times as many rows.
    """

    book: BookNumber
    has_windows: bool
    changes: Count
    unit: Count
    lot: Count
    first_px: Count
    is_wide: bool


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """A row group of the rows, and those of the levels that belong to it: ``parts[j]`` is group ``first_group + j``.

    ``first_mono_ns`` and ``last_mono_ns`` are the earliest and the latest stamp.
    """

    rows: Count
    first_mono_ns: int
    last_mono_ns: int
    venues: list[Annotated[int, msgspec.Meta(ge=0, lt=len(VENUES))]]
    has_payload: bool
    first_group: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    parts: list[Part]


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What the store of one segment is. ``instruments`` are "venue:name", in the order of the book numbers."""

    decoder: str
    instruments: list[str]
    segment: Kept
    rows: Kept
    levels: Kept
    sorts: Annotated[list[Sort], msgspec.Meta(max_length=MAX_SORTS)]
    slices: list[Slice]


@functools.cache
def decoder_version() -> str:
    """One hash over the source of everything that decides what is in a store."""
    return source_version(
        *(decoding, engine, frames, money, scan, updates, store_kernels),
        files=(*sorted(Path(providers.__file__).parent.glob("*.py")), Path(__file__), Path(__file__).with_name("store_build.py")),
    )


def source_version(*modules: ModuleType, files: tuple[Path, ...] = ()) -> str:
    """One hash over sources: what was made by other ones is made anew."""
    digest = hashlib.sha256()
    for path in (*(Path(str(module.__file__)) for module in modules), *files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def instrument_names(instruments: Mapping[str, Sequence[str]]) -> list[str]:
    """The instruments of a tape as "venue:name", in the order of the book numbers of a store."""
    return [f"{venue}:{name}" for venue in ExchangeId for name in sorted(dict.fromkeys(instruments.get(venue, ())))]


class Files:
    """The files of the store of one segment of a session on this machine."""

    def __init__(self, session: Path, segment_file: str) -> None:
        self.folder = session / DECODED
        stem = segment_file.removesuffix(".parquet")
        self.segment = session / "segments" / segment_file
        self.index = self.folder / f"{stem}.index"
        self.rows = self.folder / f"{stem}.rows.parquet"
        self.levels = self.folder / f"{stem}.levels.parquet"


def load_index(files: Files, segment_sha256: str, names: Sequence[str]) -> Index | None:
    """The index of a segment's store, None if there is none that was made from this segment by this decoder."""
    try:
        if files.index.stat().st_size > MAX_INDEX_BYTES:
            return None
        head, _, body = files.index.read_bytes().partition(b"\n")
        if head != _check(body):
            return None
        index = msgspec.json.decode(body, type=Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    known = (index.segment.sha256, index.decoder, index.instruments)
    return index if known == (segment_sha256, decoder_version(), list(names)) else None


def changed_tape(path: Path, found: str, recorded: str) -> TapeError:
    """What to say of a segment whose bytes are not those of its manifest."""
    return TapeError(
        f"{path} does not match its manifest (sha256 {found[:12]}..., recorded {recorded[:12]}...). "
        "It was changed after sealing; restore it from a copy."
    )


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def believed(files: Files, index: Index, *, check_segment: bool) -> Index | None:
    """The index as of now if both files of the store are those that it names, else None.

    Files whose stamps moved are read and compared again. With ``check_segment`` the raw segment is held to its hash in the same
    way; raises TapeError if it is another one.
    """
    fresh = {}
    for name, path in (("segment", files.segment), ("rows", files.rows), ("levels", files.levels)):
        kept: Kept = getattr(index, name)
        if name == "segment" and not check_segment:
            continue
        try:
            if kept.stamp.holds(path):
                continue
            stamp = Stamp.of(path)
            found = sha256_of(path)
        except OSError:
            return None
        if found != kept.sha256:
            if name == "segment":
                raise changed_tape(path, found, kept.sha256)
            return None
        fresh[name] = Kept(sha256=found, stamp=stamp)
    if fresh:
        index = msgspec.structs.replace(index, **fresh)
        # so that the next replay need not read the files for it; where nothing can be written, each one does
        with contextlib.suppress(OSError):
            save_index(files, index)
    return index


def aside(path: Path) -> Path:
    """Where a file is written before it is renamed: a name of this process, with nothing there."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    return part


def save_index(files: Files, index: Index) -> None:
    """Write the index, whole or not at all. Raises OSError.

    It is not flushed to the disk: after a power cut it is there, or not, or its hash tells that it is not whole.
    """
    body = msgspec.json.encode(index) + b"\n"
    part = aside(files.index)
    try:
        part.write_bytes(_check(body) + b"\n" + body)
        part.replace(files.index)
    finally:
        part.unlink(missing_ok=True)
