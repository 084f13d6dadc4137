"""Where the events of a run land: ``decisions.parquet``, ``fills.parquet`` and ``run.json``, complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import StorageError
from arbl2.events import DECISION_DTYPE, FILL_DTYPE, Direction, FillStatus, Intent, Outcome, Side
from arbl2.frames import VENUES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from enum import IntEnum

    from numpy.typing import NDArray

    from arbl2.engine import Events

RUN_JSON = "run.json"
FILLS = "fills.parquet"
DECISIONS = "decisions.parquet"
EVENTS_VERSION = "1"
OUTCOME_SOURCE = "book"
"""Outcomes were read from the recorded book at arrival, never from a fill model."""

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


class RunSink:
    """Collects a run in a folder aside and moves it into place when it is complete."""

    def __init__(self, root: Path, symbols: Sequence[str]) -> None:
        self._root = root
        self._symbols = symbols
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
            self._schemas = {
                DECISIONS: event_schema(DECISION_DTYPE, "decisions"),
                FILLS: event_schema(FILL_DTYPE, "fills"),
            }
            self._writers = {
                name: pq.ParquetWriter(self._aside / name, schema, compression="zstd") for name, schema in self._schemas.items()
            }
        except OSError as error:
            raise StorageError(f"cannot write to {root}: {error.strerror or error}. Choose another folder with --out.") from error

    def write(self, events: Events) -> None:
        """Append drained events. Raises StorageError."""
        for name, rows in ((DECISIONS, events.decisions), (FILLS, events.fills)):
            if len(rows):
                try:
                    self._writers[name].write_table(event_table(rows, self._schemas[name], self._symbols))
                except OSError as error:
                    raise StorageError(f"cannot write {name}: {error}. Free some space or choose --out.") from error

    def commit(self, name: str, summary: dict[str, Any]) -> Path:
        """Close the tables, write ``run.json`` and move everything to ``<root>/<name>``, replacing an equal-named run."""
        target = self._root / name
        try:
            for writer in self._writers.values():
                writer.close()
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
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._aside, ignore_errors=True)
