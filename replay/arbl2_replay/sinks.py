"""Where the events of a run land: ``decisions.parquet``, ``fills.parquet`` and ``run.json``, complete or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import StorageError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE, Direction, FillStatus, Intent, Outcome, Side
from arbl2.frames import VENUES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from enum import IntEnum

    from numpy.typing import NDArray

    from arbl2.engine import Events

RUN_JSON = "run.json"
FILLS = "fills.parquet"
DECISIONS = "decisions.parquet"
EVENTS_VERSION = "1"
OUTCOME_SOURCE = "book"
"""Outcomes were read from the recorded book at arrival, never from a fill model."""

_DTYPES = {"decisions": DECISION_DTYPE, "fills": FILL_DTYPE}
_GROUP_ROWS = 2**16
_CHUNK_BYTES = 2**20

_ENUMS: dict[str, type[IntEnum]] = {
    "side": Side,
    "direction": Direction,
    "intent": Intent,
    "outcome": Outcome,
    "status": FillStatus,
}
_FLAGS = ("fee_in_base", "first_in_episode", "resolved")
_DICT = pa.dictionary(pa.int8(), pa.string())


def _arrow_type(name: str, dtype: np.dtype[Any]) -> pa.DataType:
    if name in _ENUMS or name in ("symbol", "venue"):
        return pa.dictionary(pa.int16(), pa.string()) if name == "symbol" else _DICT
    return pa.bool_() if name in _FLAGS else pa.from_numpy_dtype(dtype)


def event_schema(dtype: np.dtype[Any], kind: str) -> pa.Schema:
    """Arrow schema of the event rows: codes become words, flags become booleans, integers stay."""
    fields = [pa.field(name, _arrow_type(name, dtype[name]), nullable=False) for name in dtype.names or ()]
    return pa.schema(fields, metadata={f"arbl2.{kind}": EVENTS_VERSION, "arbl2.outcome_source": OUTCOME_SOURCE})


def event_table(rows: NDArray[Any], schema: pa.Schema, symbols: Sequence[str]) -> pa.Table:
    """Event rows as an Arrow table of ``schema``."""
    columns = []
    for name in schema.names:
        values = np.ascontiguousarray(rows[name])
        if name == "symbol":
            columns.append(pa.DictionaryArray.from_arrays(pa.array(values, pa.int16()), pa.array(list(symbols), pa.string())))
        elif name == "venue":
            columns.append(pa.DictionaryArray.from_arrays(pa.array(values, pa.int8()), pa.array(list(VENUES), pa.string())))
        elif name in _ENUMS:
            members = list(_ENUMS[name])
            codes = np.searchsorted(np.array(sorted(members)), values)
            words = pa.array([member.name.lower() for member in sorted(members)], pa.string())
            columns.append(pa.DictionaryArray.from_arrays(pa.array(codes, pa.int8()), words))
        elif name in _FLAGS:
            columns.append(pa.array(values.astype(bool)))
        else:
            columns.append(pa.array(values))
    return pa.Table.from_arrays(columns, schema=schema)


@dataclass(frozen=True, slots=True)
class EarlierRows:
    """Where the rows of a checkpoint are, and what ``EventLog.pack`` said of them."""

    folder: Path
    packed: Mapping[str, Mapping[str, Any]]


class EventLog:
    """The event rows of a run in two plain files, ``decisions.rows`` and ``fills.rows``, in the order written.

    After ``go_back`` the rows that are in the files already are made once more, and not written again.
    """

    def __init__(self, folder: Path, earlier: EarlierRows | None = None) -> None:
        """Raises StorageError, and TapeError if earlier rows are not what they were."""
        self._paths = {table: folder / f"{table}.rows" for table in _DTYPES}
        self._files: dict[str, BinaryIO] = {}
        self._hashes = {table: _Hashed() for table in _DTYPES}
        self.rows = dict.fromkeys(_DTYPES, 0)
        """Rows of the run so far, by table."""
        asides = {table: path.with_name(path.name + ".part") for table, path in self._paths.items()}
        try:
            for table, aside in asides.items():
                self._files[table] = aside.open("w+b")
            if earlier is not None:
                self._take_over(earlier.folder, earlier.packed)
            for table, aside in asides.items():
                aside.replace(self._paths[table])
        except BaseException as error:
            self.close()
            for aside in asides.values():
                aside.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _unwritable(folder, error) from error
            raise
        self._written = dict(self.rows)

    def _take_over(self, folder: Path, packed: Mapping[str, Mapping[str, Any]]) -> None:
        for table, file in self._files.items():
            path = folder / f"{table}.rows"
            self.rows[table] = int(packed[table]["rows"])
            left = self.rows[table] * _DTYPES[table].itemsize
            try:
                with path.open("rb") as old:
                    while left and (chunk := old.read(min(left, _CHUNK_BYTES))):
                        file.write(chunk)
                        left -= len(chunk)
            except FileNotFoundError:
                raise TapeError(f"the checkpoint lacks {path}. Replay from the beginning.") from None
        if self.pack() != packed:
            raise TapeError(f"the event rows in {folder} are not those of its checkpoint. Replay from the beginning.")

    def write(self, events: Events) -> None:
        """Append drained events. Raises StorageError."""
        for table, new in (("decisions", events.decisions), ("fills", events.fills)):
            known = self._written[table] - self.rows[table]
            self.rows[table] += len(new)
            if len(new) > known:
                self._append(table, new[known:].tobytes())
                self._written[table] = self.rows[table]

    def _append(self, table: str, body: bytes) -> None:
        file = self._files[table]
        try:
            file.seek(0, os.SEEK_END)
            file.write(body)
        except OSError as error:
            raise _unwritable(self._paths[table], error) from error

    def go_back(self, rows: Mapping[str, int]) -> None:
        """The run goes on from where it had so many rows."""
        self.rows = dict(rows)

    def pack(self) -> dict[str, dict[str, int | str]]:
        """Rows and SHA-256 by table, once they are on the disk. Raises StorageError."""
        packed: dict[str, dict[str, int | str]] = {}
        for table, file in self._files.items():
            try:
                file.flush()
                os.fsync(file.fileno())
                found = self._hashes[table].upto(file, self.rows[table] * _DTYPES[table].itemsize)
            except OSError as error:
                raise _unwritable(self._paths[table], error) from error
            packed[table] = {"rows": self.rows[table], "sha256": found}
        return packed

    def groups(self, table: str) -> Iterator[NDArray[Any]]:
        """The rows of a table, so many at once that a file made of them does not depend on how they were written."""
        dtype, file = _DTYPES[table], self._files[table]
        file.seek(0)
        for start in range(0, self.rows[table], _GROUP_ROWS):
            count = min(_GROUP_ROWS, self.rows[table] - start)
            yield np.frombuffer(file.read(count * dtype.itemsize), dtype)

    def close(self) -> None:
        """Keep the files; what ``pack`` said of them is on the disk, the rest is of no use to anyone."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def remove(self) -> None:
        """Remove the files."""
        self.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)


class _Hashed:
    """SHA-256 of the first bytes of a file that grows; what was read already is not read again."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._read = 0

    def upto(self, file: BinaryIO, size: int) -> str:
        if size < self._read:
            self._hash, self._read = hashlib.sha256(), 0
        file.seek(self._read)
        while self._read < size and (chunk := file.read(min(size - self._read, _CHUNK_BYTES))):
            self._hash.update(chunk)
            self._read += len(chunk)
        return self._hash.hexdigest()


def _unwritable(where: Path | str, error: OSError) -> StorageError:
    return StorageError(f"cannot write {where}: {error.strerror or error}. Free some space or choose another folder.")


class RunSink:
    """Makes a run in a folder aside and moves it into place when it is complete.

    Its event rows wait in ``log``: aside too, or in the folder ``rows_in``, where they stay; those of a checkpoint come first.
    """

    def __init__(
        self, root: Path, symbols: Sequence[str], rows_in: Path | None = None, earlier: EarlierRows | None = None
    ) -> None:
        self._root = root
        self._symbols = symbols
        self._keeps_rows = rows_in is not None
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
        except OSError as error:
            raise StorageError(f"cannot write to {root}: {error.strerror or error}. Choose another folder with --out.") from error
        try:
            self.log = EventLog(rows_in or self._aside, earlier)
        except BaseException:
            shutil.rmtree(self._aside)
            raise

    def write(self, events: Events) -> None:
        """As ``EventLog.write``."""
        self.log.write(events)

    def commit(self, name: str, summary: dict[str, Any]) -> Path:
        """Write the tables and ``run.json`` and move everything to ``<root>/<name>``, replacing an equal-named run."""
        target = self._root / name
        try:
            for file, table in ((DECISIONS, "decisions"), (FILLS, "fills")):
                schema = event_schema(_DTYPES[table], table)
                with pq.ParquetWriter(self._aside / file, schema, compression="zstd") as writer:
                    for rows in self.log.groups(table):
                        writer.write_table(event_table(rows, schema, self._symbols))
            if not self._keeps_rows:
                self.log.remove()
            body = msgspec.json.format(msgspec.json.encode(summary, order="deterministic"), indent=2)
            (self._aside / RUN_JSON).write_bytes(body + b"\n")
            self._aside.chmod(0o755)
            if (target / RUN_JSON).is_file():
                shutil.rmtree(target)
            self._aside.replace(target)
        except OSError as error:
            raise StorageError(f"cannot write the run to {target}: {error.strerror or error}. Choose another --out.") from error
        return target

    def discard(self) -> None:
        """Remove what was collected."""
        self.log.close()
        shutil.rmtree(self._aside, ignore_errors=True)
