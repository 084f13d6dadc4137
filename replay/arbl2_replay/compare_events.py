"""The decisions and fill events of two runs: the first row that differs, and how many do after it.

Rows are compared in the order written, bit by bit, a few thousand at a time. After the first difference rows are matched by what
they are about instead, since one more decision moves every later row and number.
"""

from __future__ import annotations

import glob
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arbl2.errors import StorageError, TapeError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE
from arbl2.tape import MAX_GROUP_BYTES, MAX_GROUP_ROWS
from arbl2_replay.sinks import DECISIONS, EVENTS_VERSION, FILLS, event_schema

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

BATCH_ROWS = 8_192
_DUCKDB: dict[str, str | bool | int | float | list[str]] = {"autoinstall_known_extensions": False, "memory_limit": "256MB"}
_SCHEMAS = {DECISIONS: event_schema(DECISION_DTYPE, "decisions"), FILLS: event_schema(FILL_DTYPE, "fills")}
NUMBERS = ("decision_id", "order_id", "upbit_order_id", "binance_order_id")
"""Columns that only count: one more decision moves all of them."""
_ABOUT = {DECISIONS: ("time_ns", "seq", "symbol"), FILLS: ("time_ns", "seq", "symbol", "venue")}
"""What a row is about: at one frame a policy is asked once for a coin, and sends one leg to a venue."""


@dataclass(frozen=True, slots=True)
class EventDifference:
    """The first row that differs in a table: ``row`` from 0, both sides (None: there is no such row), and where they differ.

    ``time_ns`` is when the earlier side was decided or resolved.
    """

    table: str
    row: int
    a: dict[str, Any] | None
    b: dict[str, Any] | None
    columns: tuple[str, ...]
    time_ns: int
    a_time_ns: int | None
    b_time_ns: int | None

    @property
    def earlier(self) -> dict[str, Any]:
        """The side that came first; the first run's if both came at once."""
        side = self.a if self.a_time_ns == self.time_ns else self.b
        assert side is not None
        return side

    @property
    def order(self) -> tuple[int, int]:
        """Where it stands in the one order across both tables."""
        if self.table == DECISIONS:
            return self.time_ns, 1
        return self.time_ns, 0 if int(self.earlier["time_ns"]) < self.time_ns else 2


@dataclass(frozen=True, slots=True)
class Counts:
    """How much of a table differs.

    The first ``before`` rows are equal. The others are matched by what they are about: ``alike`` rows are equal but for their
    numbers, ``changed`` are about the same and differ, ``only_a`` and ``only_b`` are of one run. ``columns`` says how many
    changed rows differ in which column, the most frequent first.
    """

    table: str
    rows_a: int
    rows_b: int
    before: int
    alike: int
    changed: int
    only_a: int
    only_b: int
    columns: dict[str, int]


def first_difference_of_events(a: Path, b: Path, table: str) -> EventDifference | None:
    """The first row of ``table`` that differs between two run folders; None if none does. Raises TapeError."""
    row, latest_ns = 0, 0
    ours, theirs = _Rows(a / table, table), _Rows(b / table, table)
    while True:
        n = min(ours.ready(), theirs.ready())
        if n == 0:
            break
        mine, other = ours.take(n), theirs.take(n)
        same = _equal_rows(mine, other)
        row += same
        if same:
            latest_ns = max(latest_ns, int(_times(mine.slice(0, same)).max()))
        if same < n:
            return _difference(table, row, mine.slice(same, 1), other.slice(same, 1), latest_ns)
    left = (ours.take(1) if ours.ready() else None, theirs.take(1) if theirs.ready() else None)
    return None if left == (None, None) else _difference(table, row, *left, latest_ns)


def _difference(table: str, row: int, a: pa.Table | None, b: pa.Table | None, latest_ns: int) -> EventDifference:
    times = [max(latest_ns, int(_times(side)[0])) if side is not None else None for side in (a, b)]
    columns: tuple[str, ...] = ()
    if a is not None and b is not None:
        columns = tuple(name for name in a.column_names if _unequal(a.column(name), b.column(name)).any())
    sides = [side.to_pylist()[0] if side is not None else None for side in (a, b)]
    return EventDifference(
        table=table,
        row=row,
        a=sides[0],
        b=sides[1],
        columns=columns,
        time_ns=min(at for at in times if at is not None),
        a_time_ns=times[0],
        b_time_ns=times[1],
    )


def _times(rows: pa.Table) -> NDArray[np.int64]:
    """When each row was decided, or resolved: engine time, ns."""
    if "arrive_ns" not in rows.column_names:
        return np.asarray(rows.column("time_ns"))
    return np.asarray(pc.max_element_wise(rows.column("after_ns"), rows.column("arrive_ns")))


def _equal_rows(a: pa.Table, b: pa.Table) -> int:
    """How many rows at the start are equal in every column."""
    differs = np.zeros(len(a), np.bool_)
    for name in a.column_names:
        differs |= _unequal(a.column(name), b.column(name))
    return int(differs.argmax()) if differs.any() else len(a)


def _unequal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> NDArray[np.bool_]:
    if pa.types.is_floating(a.type):
        # by their bits, as the digest takes them
        return np.asarray(np.asarray(a).view(np.int64) != np.asarray(b).view(np.int64))
    return np.asarray(pc.not_equal(a, b))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TapeError(f"{path} is missing. Replay the tape again.") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise TapeError(f"{path} cannot be read ({said}). Replay the tape again.") from None


class _Rows:
    """Rows of one file in their order, some at a time, words spelled out."""

    def __init__(self, path: Path, table: str) -> None:
        self._path = path
        self._schema = _SCHEMAS[table]
        self._plain = pa.schema([(field.name, _plain(field.type)) for field in self._schema])
        self._tables = self._read(table)
        self._table: pa.Table | None = None

    def _read(self, table: str) -> Iterator[pa.Table]:
        with _reading(self._path), pq.ParquetFile(self._path) as file:
            self._check(file, table)
            for group in range(file.metadata.num_row_groups):
                found = file.metadata.row_group(group)
                if found.total_byte_size > MAX_GROUP_BYTES or found.num_rows > MAX_GROUP_ROWS:
                    raise TapeError(
                        f"{self._path} row group {group} is larger than any that arbl2 writes. Replay the tape again."
                    )
            for batch in file.iter_batches(BATCH_ROWS):
                batch.validate(full=True)
                yield pa.Table.from_batches([batch]).cast(self._plain)

    def _check(self, file: pq.ParquetFile, table: str) -> None:
        schema = file.schema_arrow
        key = f"arbl2.{table.removesuffix('.parquet')}".encode()
        stated = (schema.metadata or {}).get(key, b"").decode("ascii", "replace")
        if stated != EVENTS_VERSION or not schema.equals(self._schema, check_metadata=False):
            raise TapeError(f"{self._path} does not hold what this arbl2 writes there. Replay the tape again with this version.")

    def ready(self) -> int:
        """Rows that can be taken now; 0 at the end."""
        while self._table is None or len(self._table) == 0:
            self._table = next(self._tables, None)
            if self._table is None:
                return 0
        return len(self._table)

    def take(self, n: int) -> pa.Table:
        """The next ``n`` rows, at most as many as are ready."""
        assert self._table is not None
        rows, self._table = self._table.slice(0, n), self._table.slice(n)
        return rows


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def count_differences(a: Path, b: Path, first: EventDifference) -> Counts:
    """How much of a table differs from its first differing row on. Raises TapeError, StorageError."""
    names = [name for name in _SCHEMAS[first.table].names if name not in (*_ABOUT[first.table], *NUMBERS)]
    paths = [a / first.table, b / first.table]
    with tempfile.TemporaryDirectory(prefix="arbl2-diff-") as spill:
        try:
            with duckdb.connect(":memory:", config={**_DUCKDB, "temp_directory": spill}) as db:
                db.execute("SET enable_progress_bar = false")
                found = db.execute(_statement(first, names), [glob.escape(str(path)) for path in paths]).fetchone()
        except duckdb.OutOfMemoryException:
            raise StorageError(
                f"matching the rows of {paths[0]} and {paths[1]} took all the room below {Path(spill).parent}. "
                "Free some there, or name another folder in TMPDIR."
            ) from None
        except duckdb.Error as error:
            said = str(error).splitlines()[0]
            raise TapeError(f"{paths[0]} and {paths[1]} cannot be matched ({said}). Replay both tapes again.") from None
    only_a, only_b, matched, changed, *by_column = found or ()
    rows = []
    for path in paths:
        with _reading(path):
            rows.append(pq.read_metadata(path).num_rows)
    counted = sorted(((n, name) for name, n in zip(names, by_column, strict=True) if n), key=lambda item: -item[0])
    return Counts(
        table=first.table,
        rows_a=rows[0],
        rows_b=rows[1],
        before=first.row,
        alike=matched - changed,
        changed=changed,
        only_a=only_a,
        only_b=only_b,
        columns={name: n for n, name in counted},
    )


def _statement(first: EventDifference, names: Sequence[str]) -> str:
    """Both files from the first differing row on, matched; equal keys of one file are told apart by their order."""
    key = ", ".join(_ABOUT[first.table])
    rows = (
        "SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY file_row_number) AS nth "
        "FROM read_parquet(${k}, file_row_number = true) WHERE file_row_number >= {row}"
    )
    ours, theirs = (rows.format(key=key, k=k, row=first.row) for k in (1, 2))
    differs = ", ".join(f"a.{name} IS DISTINCT FROM b.{name} AS {name}" for name in names)
    by_column = ", ".join(f"count(*) FILTER (both_have AND {name})" for name in names)
    return f"""
        WITH a AS ({ours}), b AS ({theirs}), pair AS (
            SELECT a.nth IS NOT NULL AS in_a, b.nth IS NOT NULL AS in_b, in_a AND in_b AS both_have, {differs}
            FROM a FULL JOIN b USING ({key}, nth)
        )
        SELECT count(*) FILTER (NOT in_b), count(*) FILTER (NOT in_a), count(*) FILTER (both_have),
            count(*) FILTER (both_have AND ({" OR ".join(names)})), {by_column}
        FROM pair
    """  # noqa: S608 - names of our own schema
