"""Reading the decoded store: slices as frames, and the updates that ``Engine.decode`` would make of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import TapeError
from arbl2.frames import VENUES, FrameBlock
from arbl2.places import reason
from arbl2.updates import HOME_LEVELS, MAX_BLOCK, MAX_CHANGES, MAX_LEVELS, UpdateBlock, What
from arbl2_replay.store_format import LEVELS, ROWS, numbers
from arbl2_replay.store_kernels import DAMAGED, expand, unfold

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from arbl2.frames import Anchor
    from arbl2_replay.store_format import Files, Index, Slice

_EXPANDED = ("what", "book", "n_bid", "n_ask", "bid_changes", "ask_changes")
_COPIED = ("what", "reason", "exchange_ms", "first_id", "update_id", "check", "n_bid", "n_ask")
_NUMBERS = [name for name in ROWS.names if name != "payload"]
_LIMITS = {
    "venue": len(VENUES),
    "what": What.SNAPSHOT + 1,
    "reason": 64,
    "otherwise": 64,
    **dict.fromkeys(("n_bid", "n_ask"), MAX_CHANGES + 1),
}
"""Values are below these, and where they are counts not negative; what else there may be does no harm."""
_OF_A_BOOK = np.isin(np.arange(256), (What.BOOK, What.DOUBT, What.CHANGE))
_NO_BYTES = np.zeros(0, np.uint8)


class SliceUpdates:
    """The updates of one slice. ``decode`` fills them in for any frames of the slice, quickest in their order."""

    def __init__(
        self,
        columns: dict[str, NDArray[Any]],
        changes: tuple[NDArray[np.int64], NDArray[np.int64]],
        starts: NDArray[np.int64],
        books: NDArray[np.int32],
        where: str,
    ) -> None:
        """``changes`` of the tape's book k stand from ``starts[k + 1]`` on; ``books`` maps its books to those of the run."""
        self._columns = columns
        self._rows = tuple(_frozen(columns[name]) for name in _EXPANDED)
        self._changes = changes
        self._all_starts, self._starts, self._ends = starts, starts[:-1], starts[1:]
        self._books = books
        self._shift = 0
        self._book = np.where(columns["what"] == What.NOTHING, np.int32(-1), books[columns["book"]])
        self._count = len(books) - 1
        self._where = where
        self._begin()

    def _begin(self) -> None:
        sides = 2 * self._count
        self._row = 0
        self._at = self._starts.copy()
        self._windows = (*(np.zeros(sides * MAX_LEVELS, np.int64) for _ in range(2)), np.zeros(sides, np.int64))
        self._stands = np.zeros(self._count, np.int64)

    def of_rank(self, shift: int) -> SliceUpdates:
        """The same for frames whose ``seq`` is larger by ``shift``."""
        self._shift = shift
        return self

    def only(self, keep: NDArray[np.bool_]) -> SliceUpdates:
        """The updates of the rows that are kept, of which no other row may have levels in this run."""
        columns = {name: values[keep] for name, values in self._columns.items()}
        return SliceUpdates(columns, self._changes, self._all_starts, self._books, self._where)

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
        for name in _COPIED:
            getattr(u, name)[:n] = self._columns[name][first : first + n]
        u.book[:n] = self._book[first : first + n]
        return n

    def _expand(self, stop: int, u: UpdateBlock) -> int:
        n = int(expand(self._rows, self._row, stop, *self._changes, self._at, self._ends, self._windows, self._stands, u.records))
        if n == DAMAGED:
            raise damaged(self._where)
        self._row += n
        return n


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    """Not to be written to: that is part of the type that a kernel is compiled for, and what Arrow gives is."""
    values = values.view()
    values.flags.writeable = False
    return values


def damaged(where: object) -> TapeError:
    """What to say of files that are what they were written as and yet make no sense."""
    return TapeError(f"{where} is damaged. Delete the folder; it is built anew.")


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
            for number in wanted:
                yield _read(files, rows, levels, number, index.slices[number], anchor, books)
    except (pa.ArrowException, OSError, IndexError, ValueError) as error:
        raise TapeError(f"{files.folder} cannot be read ({reason(error)}). Delete the folder; it is built anew.") from None


def _read(
    files: Files,
    rows: pq.ParquetFile,
    levels: pq.ParquetFile,
    number: int,
    part: Slice,
    anchor: Anchor,
    books: NDArray[np.int32],
) -> Decoded:
    table = rows.read_row_group(number, columns=[*_NUMBERS, *(["payload"] if part.has_payload else [])], use_threads=False)
    columns = {name: numbers(table, name) for name in _NUMBERS}
    n = len(table)
    if n == 0 or n != part.rows or not _is_sound(columns, len(books) - 1):
        raise damaged(files.rows)
    _leave_out(columns, books)
    offsets, data = _payloads(table) if part.has_payload else (np.zeros(n + 1, np.int32), _NO_BYTES)
    none: Any = np.broadcast_to(np.uint8(0), n)
    block = FrameBlock(
        seq=columns["seq"],
        time_ns=columns["mono_ns"] + np.int64(anchor.wall_ns - anchor.mono_ns),
        recv_ns=none.astype(np.int64),
        mono_ns=columns["mono_ns"],
        venue=columns["venue"],
        conn=columns["conn"],
        kind=columns["kind"],
        op=none,
        queue_us=none.astype(np.int32),
        flags=none,
        offsets=offsets,
        data=data,
    )
    groups = [j for j, kept in enumerate(part.parts) if kept.book < 0 or books[kept.book] >= 0]
    updates = SliceUpdates(columns, *_changes(levels, part, groups, len(books)), books, str(files.folder))
    return Decoded(number, block, updates, len(groups))


def _is_sound(columns: Mapping[str, NDArray[Any]], count: int) -> bool:
    """Nothing that would make a kernel look outside its arrays."""
    below = all(int(columns[name].max()) < limit for name, limit in _LIMITS.items())
    counts = all(int(columns[name].min()) >= 0 for name in ("n_bid", "n_ask", "bid_changes", "ask_changes"))
    seq, book, what = (columns[name] for name in ("seq", "book", "what"))
    books = int(book.min()) >= -1 and int(book.max()) < count and not np.any((book < 0) & _OF_A_BOOK[what])
    return below and counts and books and bool(np.all(seq[1:] > seq[:-1]))


def _leave_out(columns: dict[str, NDArray[Any]], books: NDArray[np.int32]) -> None:
    """Make of rows of instruments that are not in the run what they are to it."""
    foreign = (columns["book"] >= 0) & (books[columns["book"]] < 0)
    if foreign.any():
        columns["reason"] = np.where(foreign, columns["otherwise"], columns["reason"])
        columns["what"] = np.where(foreign & (columns["what"] != What.ASKED), np.uint8(What.NOTHING), columns["what"])


def _changes(
    levels: pq.ParquetFile, part: Slice, wanted: Sequence[int], books: int
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]:
    """The changes of the parts that are wanted, and where those of each book begin (of none first)."""
    starts = np.zeros(books + 1, np.int64)
    if not wanted:
        return (np.zeros(0, np.int64), np.zeros(0, np.int64)), starts
    table = levels.read_row_groups([part.first_group + j for j in wanted], use_threads=False)
    codes, sizes = (numbers(table, name) for name in LEVELS.names)
    if len(table) != sum(part.parts[j].levels for j in wanted):
        raise ValueError("its levels are not those of its index")
    px, qty = np.empty_like(codes), np.empty_like(sizes)
    at = 0
    for kept in (part.parts[j] for j in wanted):
        if kept.book + 2 >= len(starts):
            raise ValueError("its levels are of a book that there is not")
        unfold(codes, sizes, at, at + kept.levels, kept.unit, kept.lot, px, qty)
        at += kept.levels
        starts[kept.book + 2] = kept.levels
    return (px, qty), np.cumsum(starts)


def _payloads(table: pa.Table) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    payload = table["payload"].combine_chunks()
    _, offsets, data = payload.buffers()
    return (
        np.frombuffer(offsets, np.int32)[payload.offset : payload.offset + len(payload) + 1],
        np.frombuffer(data or b"", np.uint8),
    )
