"""Building the decoded store of a segment: frames in, the two files of ``store_format`` out."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.book import Universe
from arbl2.decoding import Decoder, fitting, lay_out
from arbl2.errors import StorageError
from arbl2.frames import VENUES, ExchangeId, FrameKind
from arbl2.providers import PROVIDERS
from arbl2.tape import sha256_of
from arbl2.updates import HOME_LEVELS, MAX_BOOKS, UpdateBlock, What
from arbl2_replay.store_format import (
    FIRST_SLICE_ROWS,
    LEVELS,
    LEVELS_AT_ONCE,
    MAX_SLICE_LEVELS,
    MAX_SLICE_PAYLOAD,
    MAX_SORTS,
    ROWS,
    SLICE_ROWS,
    Index,
    Kept,
    Part,
    Slice,
    Sort,
    Stamp,
    aside,
    decoder_version,
    instrument_names,
    save_index,
)
from arbl2_replay.store_kernels import COPY_BITS, REST_AT, SAME_PRICE, WINDOW, shrink

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.frames import FrameBlock
    from arbl2.providers import Provider
    from arbl2_replay.store_format import Files

_COPIED = ("exchange_ms", "first_id", "update_id", "check")
_SORT = np.dtype([(name, "<i4") for name in Sort.__struct_fields__])
_WITH_LEVELS = (What.BOOK, What.CHANGE, What.SNAPSHOT)
# Chosen by size and by time to read, see docs/decoded-store.md.
_IN_A_DICTIONARY = ("sort", "changes", "asks")
_ROW_OPTIONS: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": list(_IN_A_DICTIONARY),
    "column_encoding": {
        **{name: "BYTE_STREAM_SPLIT" for name in ROWS.names if name not in _IN_A_DICTIONARY},
        "check": "PLAIN",
        "payload": "DELTA_LENGTH_BYTE_ARRAY",
    },
    "write_statistics": False,
}
_LEVEL_OPTIONS: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": False,
    "column_encoding": {"code": "BYTE_STREAM_SPLIT", "qty": "BYTE_STREAM_SPLIT"},
    "write_statistics": False,
}


class _Reader:
    """Decodes blocks as a run of all instruments of a tape would, and says what a run without them would make of each row."""

    def __init__(self, instruments: Mapping[str, Sequence[str]]) -> None:
        universe = Universe.of(instruments, ())
        if len(universe.instruments) > MAX_BOOKS:
            raise StorageError(f"{len(universe.instruments):,} instruments are more than a decoded store has room for.")
        self._everyone, self._nobody = Decoder(universe), Decoder(Universe.of({}, ()))
        self.books = universe.instruments
        self.updates, self._others = UpdateBlock(), UpdateBlock()
        self._parts: dict[tuple[int, int], dict[ExchangeId, Provider]] = {}

    def decode(self, block: FrameBlock) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Fill ``updates``; returns by row the book that it concerns (-1: none), and the reason where that is not in the run.

        Raises StorageError for a row that depends on its instrument in a way that a store cannot say.
        """
        u, other, n = self.updates, self._others, len(block)
        u.cursor[0] = other.cursor[0] = HOME_LEVELS
        self._everyone.decode(block, u)
        self._nobody.decode(block, other)
        book, otherwise = u.book[:n].copy(), other.reason[:n].copy()
        same = (u.what[:n] == other.what[:n]) & (u.reason[:n] == otherwise)
        for row in np.flatnonzero(~same & (book < 0)).tolist():
            book[row] = self._instrument_of(block.slice(row, row + 1), int(u.what[row]), int(u.reason[row]))
        if np.any((other.what[:n] != What.NOTHING) & (other.what[:n] != u.what[:n])):
            raise StorageError(
                "a message of this tape means another thing without its instrument; a decoded store cannot say that."
            )
        return book, otherwise

    def _instrument_of(self, row: FrameBlock, what: int, reason: int) -> int:
        """The instrument without which the row would be read as another one: it is in the half that reads it alike."""
        low, high = 0, len(self.books)
        while high - low > 1:
            middle = (low + high) // 2
            if self._reads_as(row, (low, middle), what, reason):
                high = middle
            else:
                low = middle
        return low

    def _reads_as(self, row: FrameBlock, part: tuple[int, int], what: int, reason: int) -> bool:
        if part not in self._parts:
            numbered = list(enumerate(self.books))[slice(*part)]
            self._parts[part] = {
                venue: PROVIDERS[venue]({book.name: k for k, book in numbered if book.venue == venue}) for venue in ExchangeId
            }
        u = self._others
        u.cursor[0] = HOME_LEVELS
        lay_out(row, u)
        self._parts[part][ExchangeId(VENUES[row.venue[0]])].decode(row, u)
        return (int(u.what[0]), int(u.reason[0])) == (what, reason)


class _Changes:
    """The changes of a slice in the order of its rows, and the part of each: 2 x book, and one more if it is of no window."""

    def __init__(self, books: int) -> None:
        self._kept: tuple[NDArray[Any], ...] = tuple(
            np.empty(LEVELS_AT_ONCE, dtype) for dtype in (np.int8, np.int8, np.int64, np.int64)
        )
        self.part = np.empty(LEVELS_AT_ONCE, np.int16)
        self.n = 0
        self._windows = (*(np.zeros(books * WINDOW, np.int64) for _ in range(2)), np.zeros(2 * books, np.int64))

    def add(self, u: UpdateBlock, n: int, book: NDArray[np.int32]) -> NDArray[np.int16]:
        """Keep the changes of ``n`` rows; returns how many of each row, and how many of them are asks that are no window."""
        counts = np.zeros((n, 2), np.int16)
        stop = int(shrink(u.records, n, self._windows, counts, self._kept, self.n))
        self.part[self.n : stop] = np.repeat(2 * book + (u.what[:n] != What.BOOK), counts[:, 0])
        self.n = stop
        return counts

    def start_anew(self) -> None:
        self.n = 0
        self._windows[-1][:] = 0

    def groups(self) -> list[tuple[Part, pa.Table]]:
        """Part by part, in the order of the rows."""
        if not self.n:
            return []
        order = np.argsort(self.part[: self.n], kind="stable")
        numbers, starts = np.unique(self.part[: self.n][order], return_index=True)
        return [
            _packed(int(number) >> 1, not number & 1, *(kept[rows] for kept in self._kept))
            for number, rows in zip(numbers, np.split(order, starts[1:]), strict=True)
        ]


def _packed(
    book: int,
    has_windows: bool,
    copied: NDArray[np.int8],
    gone: NDArray[np.int8],
    px: NDArray[np.int64],
    qty: NDArray[np.int64],
) -> tuple[Part, pa.Table]:
    """Changes in codes and lots, see ``store_kernels``."""
    is_new = px >= 0
    prices = px[is_new]
    first_px = int(prices[0]) if len(prices) else 0
    unit = max(int(np.gcd.reduce(np.diff(prices))), 1) if len(prices) > 1 else 1
    steps = np.diff(prices, prepend=first_px) // unit
    folded = (steps << 1) ^ (steps >> 63)
    rest_at = REST_AT if has_windows else 0
    is_wide = bool(len(folded)) and int(folded.view(np.uint64).max()) >= 2 ** (31 - rest_at) - 2
    rest = (px == SAME_PRICE).astype(np.int64)
    rest[is_new] = 2 if is_wide else folded + 2
    code = copied + (gone.astype(np.int64) << COPY_BITS) + (rest << rest_at)
    sizes = qty[rest > 0]
    lot = max(int(np.gcd.reduce(sizes)), 1)
    if is_wide:
        code = np.concatenate((code, px, px >> 32))
    lots = np.zeros(len(code), np.int64)
    lots[: len(sizes)] = sizes // lot
    part = Part(book=book, has_windows=has_windows, changes=len(px), unit=unit, lot=lot, first_px=first_px, is_wide=is_wide)
    return part, pa.Table.from_arrays([_column(code.astype(np.int32)), _column(lots)], schema=LEVELS)


def _column(values: NDArray[Any]) -> pa.Array:
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)], null_count=0)


def _in_steps(columns: dict[str, NDArray[Any]], what: NDArray[np.uint8], book: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """The columns of a slice as they are kept, see ``ROWS``."""
    steps = dict(columns)
    for name in ("seq", "mono_ns"):
        steps[name] = np.diff(columns[name], prepend=0)
    with_levels = np.flatnonzero(np.isin(what, _WITH_LEVELS))
    order = with_levels[np.argsort(book[with_levels], kind="stable")]
    for name in ("exchange_ms", "first_id", "update_id"):  # where a row has no levels nothing reads them
        steps[name] = np.zeros_like(columns[name])
    begins = np.diff(book[order], prepend=-2) != 0
    for name in ("exchange_ms", "update_id"):
        steps[name][order] = columns[name][order] - np.where(begins, 0, np.roll(columns[name][order], 1))
    before = np.where(begins, 0, np.roll(columns["update_id"][order], 1))
    steps["first_id"][order] = columns["first_id"][order] - np.where(what[order] == What.CHANGE, before, 0)
    return steps


class _Writer:
    """Frames in, slices out."""

    def __init__(self, decoder: _Reader, rows: pq.ParquetWriter, levels: pq.ParquetWriter) -> None:
        self._decoder = decoder
        self._files = rows, levels
        self._changes = _Changes(len(decoder.books))
        self._blocks: list[dict[str, NDArray[Any]]] = []
        self._payloads: list[bytes] = []
        self._rows = self._payload = self._groups = 0
        self._sorts: dict[tuple[int, ...], int] = {}
        self.slices: list[Slice] = []

    def add(self, block: FrameBlock) -> None:
        start = 0
        while start < len(block):
            # the first slices are short: the loop starts on them while the next one is read
            most = min(SLICE_ROWS, FIRST_SLICE_ROWS << len(self.slices))
            stop = min(fitting(block, start), start + most - self._rows)
            self._add(block.slice(start, stop))
            start = stop
            if self._rows == most or self._changes.n >= MAX_SLICE_LEVELS or self._payload >= MAX_SLICE_PAYLOAD:
                self.end_slice()

    def _add(self, block: FrameBlock) -> None:
        n, u = len(block), self._decoder.updates
        book, otherwise = self._decoder.decode(block)
        what = u.what[:n].copy()
        counts = self._changes.add(u, n, book)
        columns: dict[str, NDArray[Any]] = {"seq": block.seq, "mono_ns": block.mono_ns, "what": what, "book": book}
        columns |= {name: getattr(u, name)[:n].copy() for name in _COPIED}
        columns |= {"sort": self._sort(block, book, otherwise, what), "changes": counts[:, 0], "asks": counts[:, 1]}
        self._blocks.append(columns)
        self._keep_payloads(block, what)
        self._rows += n

    def _sort(
        self, block: FrameBlock, book: NDArray[np.int32], otherwise: NDArray[np.uint8], what: NDArray[np.uint8]
    ) -> NDArray[np.uint16]:
        """The sort of every row; new ones are added. Raises StorageError where there are too many."""
        n, u = len(block), self._decoder.updates
        rows = np.zeros(n, _SORT)
        for name in ("venue", "conn", "kind"):
            rows[name] = getattr(block, name)
        rows["what"], rows["reason"], rows["otherwise"], rows["book"] = what, u.reason[:n], otherwise, book
        for name in ("n_bid", "n_ask"):
            rows[name] = np.where(what == What.BOOK, getattr(u, name)[:n], 0)
        distinct, where = np.unique(rows.view(f"V{_SORT.itemsize}"), return_inverse=True)  # as bytes: fields are compared slowly
        found = [self._sorts.setdefault(sort, len(self._sorts)) for sort in distinct.view(_SORT).tolist()]
        if len(self._sorts) > MAX_SORTS:
            raise StorageError("this tape has more connections and shapes of books than a decoded store can tell apart.")
        return np.array(found, np.uint16)[where]

    @property
    def sorts(self) -> list[Sort]:
        """What rows refer to by its place in here."""
        return [msgspec.convert(sort, Sort) for sort in self._sorts]

    def _keep_payloads(self, block: FrameBlock, what: NDArray[np.uint8]) -> None:
        read = (block.kind == FrameKind.ALARM) | ((block.kind == FrameKind.RESPONSE) & (what != What.SNAPSHOT))
        payloads = [b""] * len(block)
        for row in np.flatnonzero(read).tolist():
            payloads[row] = block.payload(row)
            self._payload += len(payloads[row])
        self._payloads += payloads

    def end_slice(self) -> None:
        """Write what has gathered."""
        if not self._rows:
            return
        rows, levels = self._files
        columns = {name: np.concatenate([block[name] for block in self._blocks]) for name in self._blocks[0]}
        steps = _in_steps(columns, columns["what"], columns["book"])
        table = pa.Table.from_arrays(
            [_column(steps[name]) for name in ROWS.names if name in steps] + [pa.array(self._payloads, pa.binary())], schema=ROWS
        )
        rows.write_table(table, row_group_size=SLICE_ROWS)
        groups = self._changes.groups()
        for _, group in groups:
            levels.write_table(group, row_group_size=len(group))
        sorts = self.sorts
        self.slices.append(
            Slice(
                rows=len(table),
                first_mono_ns=int(columns["mono_ns"].min()),
                last_mono_ns=int(columns["mono_ns"].max()),
                venues=sorted({sorts[k].venue for k in np.unique(columns["sort"]).tolist()}),
                has_payload=self._payload > 0,
                first_group=self._groups,
                parts=[part for part, _ in groups],
            )
        )
        self._groups += len(groups)
        self._blocks, self._payloads, self._rows, self._payload = [], [], 0, 0
        self._changes.start_anew()


def build(files: Files, instruments: Mapping[str, Sequence[str]], blocks: Iterable[FrameBlock], segment: Kept) -> Index:
    """Make the store of one segment from its frames, replacing what is there. Raises StorageError, and TapeError of ``blocks``.

    ``segment`` is the raw file that ``blocks`` are read from.
    """
    folder = files.folder
    try:
        if folder.is_symlink():
            raise StorageError(f"{folder} leads elsewhere; a decoded store is made beside its tape only.")
        folder.mkdir(exist_ok=True)
        files.index.unlink(missing_ok=True)
        parts = {path: aside(path) for path in (files.rows, files.levels)}
        try:
            with ExitStack() as stack:
                rows = stack.enter_context(pq.ParquetWriter(parts[files.rows], ROWS, **_ROW_OPTIONS))
                levels = stack.enter_context(pq.ParquetWriter(parts[files.levels], LEVELS, **_LEVEL_OPTIONS))
                writer = _Writer(_Reader(instruments), rows, levels)
                with np.errstate(over="ignore"):  # checksums wrap on purpose, which NumPy reports without the compiler
                    for block in blocks:
                        writer.add(block)
                    writer.end_slice()
            kept = {path: _finish(part, path) for path, part in parts.items()}
        finally:
            for part in parts.values():
                part.unlink(missing_ok=True)
        index = Index(
            decoder=decoder_version(),
            instruments=instrument_names(instruments),
            segment=segment,
            rows=kept[files.rows],
            levels=kept[files.levels],
            sorts=writer.sorts,
            slices=writer.slices,
        )
        save_index(files, index)
    except OSError as error:
        raise StorageError(f"the decoded store cannot be written to {folder}: {error.strerror or error}.") from error
    return index


def _finish(part: Path, path: Path) -> Kept:
    with part.open("rb") as file:
        os.fsync(file.fileno())  # its stamp is believed later, so its bytes must be there after a power cut
    digest = sha256_of(part)
    part.replace(path)
    return Kept(sha256=digest, stamp=Stamp.of(path))
