"""Reading the decoded store: slices as frames, and the updates that ``Engine.decode`` would make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.decoding import take_stamps
from arbl2.errors import TapeError
from arbl2.frames import FrameBlock
from arbl2.jit import frozen
from arbl2.places import reason
from arbl2.updates import HOME_LEVELS, MAX_BLOCK, MAX_CHANGES, UpdateBlock, What
from arbl2_replay import store_kernels
from arbl2_replay.store_format import LEVELS, LEVELS_AT_ONCE, MOST_SLICE_BYTES, MOST_SLICE_ROWS, ROWS, Sort, numbers
from arbl2_replay.store_kernels import (
    BOOK,
    COLUMNS,
    DAMAGED,
    FAR,
    LATEST,
    N_ASK,
    N_BID,
    REASON,
    RUN_BOOK,
    STAND,
    WHAT,
    WINDOW,
    expand,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from arbl2.frames import Anchor
    from arbl2_replay.store_format import Files, Index, Slice

_NUMBERS = [name for name in ROWS.names if name != "payload"]
_OF_A_BOOK = (What.BOOK, What.DOUBT, What.CHANGE)
_NO_BYTES = np.zeros(0, np.uint8)


class Sorts:
    """The sorts of a segment, as columns, and what they mean to one run.

    ``books`` maps the tape's books to those of the run, -1: not in it; one more -1 at its end stands for no book.
    """

    def __init__(self, index: Index, books: NDArray[np.int32]) -> None:
        """Raises ValueError for sorts of books that there are not."""
        names = Sort.__struct_fields__
        table = np.array([msgspec.structs.astuple(sort) for sort in index.sorts], np.int64).reshape(-1, len(names))
        columns = dict(zip(names, table.T, strict=True))
        what, book = columns["what"], columns["book"]
        if len(book) and (book.max() >= len(books) - 1 or np.any((book < 0) & np.isin(what, _OF_A_BOOK))):
            raise ValueError("its rows are of books that there are not")
        foreign = (book >= 0) & (books[book] < 0)
        self.venue, self.kind = (columns[name].astype(np.uint8) for name in ("venue", "kind"))
        self.conn = columns["conn"].astype(np.int32)
        self.meaning = np.zeros((len(table), store_kernels.SORT), np.int64)
        self.meaning[:, WHAT] = np.where(foreign & (what != What.ASKED), int(What.NOTHING), what)
        self.meaning[:, REASON] = np.where(foreign, columns["otherwise"], columns["reason"])
        self.meaning[:, BOOK] = book
        self.meaning[:, RUN_BOOK] = np.where(self.meaning[:, WHAT] == What.NOTHING, -1, books[book])
        self.meaning[:, N_BID], self.meaning[:, N_ASK] = columns["n_bid"], columns["n_ask"]
        self.books = books


class SliceUpdates:
    """The updates of one slice. ``decode`` fills them in for any frames of the slice, quickest in their order."""

    def __init__(self, columns: dict[str, NDArray[Any]], sorts: Sorts, changes: Changes, where: str) -> None:
        self._columns = columns
        self._rows = tuple(frozen(columns[name]) for name in COLUMNS)
        self._sorts = sorts
        self._changes = changes
        self._count = len(sorts.books) - 1
        self._where = where
        self._shift = 0
        self._begin()

    def _begin(self) -> None:
        books = self._count
        self._row = 0
        self._parts = self._changes.parts.copy()
        self._latest = np.zeros((books + 1, LATEST), np.int64)
        self._windows = (*(np.zeros(books * WINDOW, np.int64) for _ in range(2)), np.zeros(2 * books, np.int64))
        self._stands = np.zeros((books, STAND), np.int64)

    def of_rank(self, shift: int) -> SliceUpdates:
        """The same for frames whose ``seq`` is larger by ``shift``."""
        self._shift = shift
        return self

    def only(self, keep: NDArray[np.bool_]) -> SliceUpdates:
        """The updates of the rows that are kept, of which no other row may have levels in this run."""
        columns = {name: values[keep] for name, values in self._columns.items()}
        return SliceUpdates(columns, self._sorts, self._changes, self._where)

    def decode(self, block: FrameBlock, u: UpdateBlock) -> int:
        """Fill the rows of ``u`` for the first frames of ``block``, which are of this slice; returns how many it filled."""
        seq, wanted = self._columns["seq"], int(block.seq[0]) - self._shift
        first = int(np.searchsorted(seq, wanted))
        if first + len(block) > len(seq) or seq[first] != wanted:
            raise damaged(self._where)
        if first < self._row:
            self._begin()
        while self._row < first:  # a window follows from the ones before it
            self._expand(min(first, self._row + MAX_BLOCK), u)
            u.cursor[0] = HOME_LEVELS
        n = self._expand(first + len(block), u)
        take_stamps(block, u, n)
        return n

    def _expand(self, stop: int, u: UpdateBlock) -> int:
        codes, sizes = self._changes.codes, self._changes.sizes
        n = int(
            expand(
                *(self._rows, self._sorts.meaning, self._row, stop, codes, sizes),
                *(self._parts, self._latest, self._windows, self._stands, u.records),
            )
        )
        if n == DAMAGED:
            raise damaged(self._where)
        self._row += n
        return n


def damaged(where: object) -> TapeError:
    """What to say of files that are what they were written as and yet make no sense."""
    return TapeError(f"{where} is damaged. Delete the folder; it is built anew.")


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes of a slice, book by book, in codes and lots, and the table of parts that says which are whose."""

    codes: NDArray[np.int32]
    sizes: NDArray[np.int64]
    parts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Slice ``number`` of a segment: its frames, their updates, and how many row groups of levels were read for them."""

    number: int
    frames: FrameBlock
    updates: SliceUpdates
    groups: int


def read_slices(files: Files, index: Index, wanted: Sequence[int], anchor: Anchor, books: NDArray[np.int32]) -> Iterator[Decoded]:
    """The slices ``wanted`` of a segment's store.

    ``books`` maps the tape's books to those of the run, -1: not in it; one more -1 at its end stands for no book.

    Frames have no wall clock, op, queueing time or flags, which no engine reads: these columns are 0. Raises TapeError.
    """
    try:
        with pq.ParquetFile(files.rows) as rows, pq.ParquetFile(files.levels) as levels:
            if not (index.rows.holds(files.rows) and index.levels.holds(files.levels)):
                raise TapeError(f"{files.folder} changed while it was read. Replay again.")
            if not rows.schema_arrow.equals(ROWS) or not levels.schema_arrow.equals(LEVELS):
                raise TapeError(f"{files.folder} has other columns than this arbl2 writes. Delete the folder; it is built anew.")
            sorts = Sorts(index, books)
            for number in wanted:
                yield _read(files, rows, levels, number, index.slices[number], anchor, sorts)
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
        raise TapeError(f"{files.folder} cannot be read ({reason(error)}). Delete the folder; it is built anew.") from None


def _read(
    files: Files, rows: pq.ParquetFile, levels: pq.ParquetFile, number: int, part: Slice, anchor: Anchor, sorts: Sorts
) -> Decoded:
    found = rows.metadata.row_group(number)
    by_reference = any("DICTIONARY" in encoding for encoding in found.column(ROWS.get_field_index("payload")).encodings)
    is_large = found.num_rows > MOST_SLICE_ROWS or found.total_byte_size > MOST_SLICE_BYTES
    if found.num_rows != part.rows or is_large or by_reference:
        raise damaged(files.rows)
    table = rows.read_row_group(number, columns=[*_NUMBERS, *(["payload"] if part.has_payload else [])], use_threads=False)
    columns = {name: numbers(table, name) for name in _NUMBERS}
    columns |= {name: np.cumsum(columns[name]) for name in ("seq", "mono_ns")}
    n = len(table)
    if n == 0 or n != part.rows or not _is_sound(columns, len(sorts.venue)):
        raise damaged(files.rows)
    offsets, data = _payloads(table) if part.has_payload else (np.zeros(n + 1, np.int32), _NO_BYTES)
    none: Any = np.broadcast_to(np.uint8(0), n)
    sort, mono_ns = columns["sort"], columns["mono_ns"]
    block = FrameBlock(
        seq=columns["seq"],
        time_ns=mono_ns + np.int64(anchor.wall_ns - anchor.mono_ns),
        recv_ns=np.broadcast_to(np.int64(0), n),
        mono_ns=mono_ns,
        venue=sorts.venue[sort],
        conn=sorts.conn[sort],
        kind=sorts.kind[sort],
        op=none,
        queue_us=np.broadcast_to(np.int32(0), n),
        flags=none,
        offsets=offsets,
        data=data,
    )
    groups = [j for j, kept in enumerate(part.parts) if kept.book < 0 or sorts.books[kept.book] >= 0]
    updates = SliceUpdates(columns, sorts, _changes(levels, part, groups, len(sorts.books)), str(files.folder))
    return Decoded(number, block, updates, len(groups))


def _is_sound(columns: Mapping[str, NDArray[Any]], sorts: int) -> bool:
    """Nothing that would make a kernel look outside its arrays."""
    changes, asks = columns["changes"], columns["asks"]
    bids = changes - asks
    counts = min(int(bids.min()), int(asks.min())) >= 0 and max(int(bids.max()), int(asks.max())) <= MAX_CHANGES
    seq = columns["seq"]
    return int(columns["sort"].max()) < sorts and counts and bool(np.all(seq[1:] > seq[:-1]))


def _changes(levels: pq.ParquetFile, part: Slice, wanted: Sequence[int], books: int) -> Changes:
    """The changes of the parts that are wanted."""
    parts = np.zeros((2 * books, store_kernels.PART), np.int64)
    if not wanted:
        return Changes(frozen(np.zeros(0, np.int32)), frozen(np.zeros(0, np.int64)), parts)
    kept_parts = [part.parts[j] for j in wanted]
    groups = [part.first_group + j for j in wanted]
    # looked at before they are read, so that a small file cannot take memory without bound
    rows = [kept.changes * (3 if kept.is_wide else 1) for kept in kept_parts]
    if groups[-1] >= levels.num_row_groups or [levels.metadata.row_group(group).num_rows for group in groups] != rows:
        raise ValueError("its levels are not those of its index")
    if sum(kept.changes for kept in kept_parts) > LEVELS_AT_ONCE:
        raise ValueError("it has more levels than this arbl2 writes")
    table = levels.read_row_groups(groups, use_threads=False)
    if len(table) != sum(rows):  # a footer may promise more than there is
        raise ValueError("its levels are not those of its index")
    at = 0
    for kept in kept_parts:
        if kept.book + 2 > books:
            raise ValueError("its levels are of a book that there is not")
        far = kept.changes if kept.is_wide else 0
        of = parts[2 * (kept.book + 1) + (not kept.has_windows)]
        of[: FAR + 1] = at, at + kept.changes, at, kept.unit, kept.lot, kept.first_px, far
        at += kept.changes + 2 * far
    return Changes(frozen(numbers(table, "code")), frozen(numbers(table, "qty")), parts)


def _payloads(table: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    payload = table["payload"].combine_chunks()
    _, offsets, data = payload.buffers()
    return (
        np.frombuffer(offsets, np.int32)[payload.offset : payload.offset + len(payload) + 1],
        np.frombuffer(data or b"", np.uint8),
    )
