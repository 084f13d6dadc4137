"""The artefact on disk: ``calibration.json`` and, beside it, the block sums that it was computed from.

The JSON commits to the block sums by their SHA-256, taken over the numbers and not over the Parquet bytes, so that anyone can
recompute the estimates and see that they belong together.
"""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import StorageError, TapeError
from arbl2.tape import write_atomically
from arbl2.zones import CalibrationTable
from arbl2_calibration.fit import SUMS, Blocks
from arbl2_calibration.runs import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CALIBRATION = "calibration.json"
BLOCKS = "calibration_blocks.parquet"
_VERSION = "1"


def blocks_sha256(blocks: Blocks, sessions: Sequence[str], zone_ids: Sequence[str]) -> str:
    """SHA-256 (hex) over zone, session, block and sums of every row, in order."""
    digest = hashlib.sha256()
    for zone, session, block, sums in zip(blocks.zone, sessions, blocks.block, blocks.sums, strict=True):
        digest.update(f"{zone_ids[zone]}\n{session}\n{block}\n{sums.tolist()}\n".encode())
    return digest.hexdigest()


def write(
    out: Path, body: bytes, blocks: Blocks, sessions: Sequence[str], zone_ids: Sequence[str], block_ns: int
) -> tuple[Path, Path]:
    """Write both files into ``out`` so that no reader sees half of one; the JSON comes last. Raises StorageError."""
    table = pa.table(
        {
            "zone_id": pa.array([zone_ids[zone] for zone in blocks.zone], pa.string()),
            "session": pa.array(sessions, pa.string()),
            "block": pa.array(blocks.block),
            **{name: pa.array(blocks.column(name)) for name in SUMS},
        }
    ).replace_schema_metadata({"arbl2.calibration_blocks": _VERSION, "arbl2.block_ns": str(block_ns)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {out}: {error.strerror}. Choose another one.") from None
    write_atomically(out / BLOCKS, buffer.getvalue())
    write_atomically(out / CALIBRATION, body)
    return out / CALIBRATION, out / BLOCKS


def load(path: Path) -> CalibrationTable:
    """Read a calibration (``calibration.json``, or the folder it is in) and check it against the block sums beside it.

    Raises TapeError when either is missing, damaged, foreign, or not what was written.
    """
    file = path / CALIBRATION if path.is_dir() else path
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise TapeError(f"there is no calibration at {file}. `arbl2 calibrate` makes one.") from None
    except OSError as error:
        raise TapeError(f"{file} cannot be read: {error.strerror}.") from None
    table = CalibrationTable.loads(data, where=str(file), name=path.absolute().name)
    blocks = file.with_name(BLOCKS)
    if not blocks.exists():
        raise TapeError(f"{file} lacks the block sums that it was made from: copy {BLOCKS} beside it, or calibrate again.")
    read_blocks(blocks, table)
    return table


def read_blocks(path: Path, table: CalibrationTable) -> tuple[Blocks, list[str]]:
    """The block sums of a calibration and the session of each row. Raises TapeError unless they are those it was made from."""
    zone_ids = [zone.zone_id for zone in table.table.zones]
    place = {zone_id: i for i, zone_id in enumerate(zone_ids)}
    try:
        columns = pq.read_table(path, columns=["zone_id", "session", "block", *SUMS])
        sums = np.column_stack([columns[name].to_numpy() for name in SUMS]).astype(np.int64)
        zones = np.array([place[zone_id] for zone_id in columns["zone_id"].to_pylist()], dtype=np.int64)
        blocks = Blocks(zones, columns["block"].to_numpy(), sums)
        sessions = columns["session"].to_pylist()
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise TapeError(f"{path} cannot be read ({first_line(error)}). Calibrate again.") from None
    if blocks_sha256(blocks, sessions, zone_ids) != table.artefact.blocks_sha256:
        raise TapeError(f"{path} does not hold the block sums that the calibration was made from. Calibrate again.")
    return blocks, sessions
