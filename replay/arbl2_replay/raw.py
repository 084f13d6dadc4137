"""Raw segments, as much of them as is wanted: row groups that cannot hold any of it are left out unread."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.errors import TapeError
from arbl2.frames import VENUES
from arbl2.places import reason
from arbl2.tape import SCHEMA, _check_schema, _check_size, block_from_arrow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from arbl2.frames import FrameBlock
    from arbl2.places import Place
    from arbl2.tape import TapeReader

_MONO, _VENUE = (SCHEMA.get_field_index(name) for name in ("mono_ns", "venue"))


class Group(NamedTuple):
    """What the statistics of a row group say: the earliest and latest stamp, and the codes of the venues it may hold."""

    number: int
    rows: int
    first_mono_ns: int
    last_mono_ns: int
    venues: frozenset[int]


def groups_of(reader: TapeReader, number: int) -> list[Group]:
    """The row groups of segment ``number``; one without statistics may hold anything. Raises TapeError."""
    path = reader._segment(reader.manifest.segments[number])
    try:
        with path.open() as source, pq.ParquetFile(source) as file:
            return [_group(file.metadata.row_group(k), k) for k in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _group(found: pq.RowGroupMetaData, number: int) -> Group:
    mono, venue = (found.column(k).statistics for k in (_MONO, _VENUE))
    first, last = (mono.min, mono.max) if mono is not None and mono.has_min_max else (-(2**63), 2**63 - 1)
    venues = frozenset(range(len(VENUES)))
    if venue is not None and venue.has_min_max:
        venues = frozenset(code for code, name in enumerate(VENUES) if venue.min <= name <= venue.max)
    return Group(number, found.num_rows, first, last, venues)


def read_groups(reader: TapeReader, number: int, groups: Sequence[int]) -> Iterator[FrameBlock]:
    """The frames of some row groups of segment ``number``, each group a block. Raises TapeError."""
    path = reader._segment(reader.manifest.segments[number])
    group = -1
    try:
        with path.open() as source, pq.ParquetFile(source, pre_buffer=path.local is None) as file:
            _check_schema(path, file.schema_arrow, reader.manifest)
            last_seq, before = 0, -2
            for group in groups:
                _check_size(path, group, file.metadata.row_group(group))
                for batch in file.read_row_group(group, use_threads=True).combine_chunks().to_batches():
                    where = f"{path} row group {group}"
                    block = block_from_arrow(batch, reader.anchor, where=where)
                    if len(block):
                        reader._check_order(block, last_seq if before == group - 1 else int(block.seq[0]) - 1, where)
                        last_seq, before = int(block.seq[-1]), group
                        yield block
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(f"{path} row group {group}" if group >= 0 else path, error) from None


def _unreadable(where: Place | str, error: Exception) -> TapeError:
    return TapeError(f"{where} cannot be read ({reason(error)}). Restore it from a copy of the recording.")
