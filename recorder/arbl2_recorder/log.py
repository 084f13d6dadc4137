"""The crash-safe log: frames in batches, each batch whole or absent.

A log is a sequence of batches, little-endian::

    magic "A2L1" | crc32 u32 | rows u32 | payload bytes u32 | rows x head | payloads, one after the other

The CRC is taken over everything after itself. A head is a packed row of ``HEAD_DTYPE``. One write appends one batch, so that
what a kill or a power cut can tear is the last batch only; a reader keeps every batch whose CRC holds and counts every byte
that belongs to none. Heads and payloads lie apart so that a batch becomes columns without touching its frames one by one.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np

from arbl2.frames import HEAD, HEAD_DTYPE, KIND_NAMES, OP_NAMES, VENUES, Anchor, FrameBlock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAGIC = b"A2L1"
_FRONT = struct.Struct("<4sI")
_COUNTS = struct.Struct("<II")
_HEADS_AT = _FRONT.size + _COUNTS.size
_KINDS = np.array(sorted(KIND_NAMES), dtype=np.uint8)
_OPS = np.array(sorted(OP_NAMES), dtype=np.uint8)


def encode_batch(heads: list[bytes], payloads: list[bytes]) -> bytearray:
    """One batch from packed heads and their payloads."""
    batch = bytearray().join((bytes(_HEADS_AT), *heads, *payloads))
    body = len(batch) - _HEADS_AT - len(heads) * HEAD.size
    _COUNTS.pack_into(batch, _FRONT.size, len(heads), body)
    _FRONT.pack_into(batch, 0, MAGIC, zlib.crc32(memoryview(batch)[_FRONT.size :]))
    return batch


class LogReader:
    """Reads the whole batches of one log. After ``blocks`` is exhausted ``dropped_bytes`` counts what belonged to none.

    Memory is bounded by the largest batch.
    """

    def __init__(self, path: Path, anchor: Anchor) -> None:
        self._path = path
        self._anchor = anchor
        self.dropped_bytes = 0

    def blocks(self) -> Iterator[FrameBlock]:
        """Every whole batch in order. Past a damaged one the next whole batch is searched for. Raises OSError."""
        with self._path.open("rb") as file:
            at, size = 0, self._path.stat().st_size
            while at < size:
                file.seek(at)
                batch = self._batch(file.read(_HEADS_AT), size - at)
                if batch:
                    file.seek(at)
                    block = decode_batch(file.read(batch), self._anchor)
                    if block is not None:
                        at += batch
                        yield block
                        continue
                onward = self._next_magic(at + 1, size)
                self.dropped_bytes += onward - at
                at = onward

    @staticmethod
    def _batch(front: bytes, left: int) -> int:
        """Length of the batch that these bytes announce, 0 if they cannot be the start of a whole one."""
        if len(front) < _HEADS_AT or front[:4] != MAGIC:
            return 0
        rows, body = _COUNTS.unpack_from(front, _FRONT.size)
        length = _HEADS_AT + int(rows) * HEAD.size + int(body)
        return length if rows and length <= left else 0

    def _next_magic(self, start: int, size: int) -> int:
        step = 2**20
        with self._path.open("rb") as file:
            for at in range(start, size, step):
                file.seek(at)
                # Overlapping reads, or a magic that lies across two of them would be missed.
                found = file.read(step + len(MAGIC) - 1).find(MAGIC)
                if found >= 0:
                    return at + found
        return size


def decode_batch(batch: bytes, anchor: Anchor) -> FrameBlock | None:
    """The frames of one batch, None if it is damaged."""
    _, crc = _FRONT.unpack_from(batch)
    if zlib.crc32(memoryview(batch)[_FRONT.size :]) != crc:
        return None
    rows, body = _COUNTS.unpack_from(batch, _FRONT.size)
    head = np.frombuffer(batch, HEAD_DTYPE, count=rows, offset=_HEADS_AT)
    offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(head["size"], out=offsets[1:])
    known = (
        bool(np.isin(head["kind"], _KINDS).all())
        and bool(np.isin(head["op"], _OPS).all())
        and int(head["venue"].max()) < len(VENUES)
    )
    if offsets[-1] != body or not known:
        return None
    return FrameBlock.from_heads(head, memoryview(batch)[_HEADS_AT + rows * HEAD.size :], anchor)
