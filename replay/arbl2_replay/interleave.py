"""Sessions that overlap, as one: frames by engine time, at one instant by the rank of their session, within a session by ``seq``.

Only what is certain is handed on: the session whose block ends first gives all of it, the others what comes before that. So at
most one block of each session is in memory, and as much again for what is being put together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.frames import COLUMNS, FrameBlock
from arbl2.jit import frozen, kernel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_MAX_BYTES = 64 * 2**20
"""Payload bytes put together at once, unless one frame alone has more."""


@kernel
def _copy_payloads(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int32],
    rows: NDArray[np.int64],
    to: NDArray[np.uint8],
    starts: NDArray[np.int64],
) -> None:
    """The payload of each of ``rows`` to its place in ``to``."""
    for k in range(len(rows)):
        first = np.int64(offsets[rows[k]])
        last = np.int64(offsets[rows[k] + 1])
        for j in range(last - first):
            to[starts[k] + j] = data[first + j]


def gather(blocks: Sequence[FrameBlock], source: NDArray[np.int64], rows: NDArray[np.int64]) -> FrameBlock:
    """A block of the frames ``rows[i]`` of ``blocks[source[i]]``."""
    picked = [np.flatnonzero(source == k) for k in range(len(blocks))]
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        values = np.empty(len(rows), getattr(blocks[0], name).dtype)
        for block, at in zip(blocks, picked, strict=True):
            values[at] = getattr(block, name)[rows[at]]
        columns[name] = values
    lengths = np.empty(len(rows), np.int64)
    for block, at in zip(blocks, picked, strict=True):
        lengths[at] = block.offsets[rows[at] + 1] - block.offsets[rows[at]]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    data = np.empty(int(offsets[-1]), np.uint8)
    for block, at in zip(blocks, picked, strict=True):
        _copy_payloads(frozen(block.data), frozen(block.offsets), rows[at], data, offsets[at])
    return FrameBlock(**columns, offsets=offsets.astype(np.int32), data=data)


def only(block: FrameBlock, keep: NDArray[np.bool_]) -> FrameBlock:
    """The frames of a block that are kept."""
    if keep.all():
        return block
    rows = np.flatnonzero(keep)
    return gather([block], np.zeros(len(rows), np.int64), rows)


@dataclass(slots=True)
class _Stream:
    """One session: its block at hand, the times that order its frames, and where the next one stands."""

    blocks: Iterator[FrameBlock]
    block: FrameBlock | None = None
    keys: NDArray[np.int64] | None = None
    at: int = 0
    latest_ns: int = -(2**63)

    def fill(self) -> bool:
        """Have a frame at hand. False at the end of the session."""
        while self.block is None or self.at == len(self.block):
            self.block = next(self.blocks, None)
            self.at = 0
            if self.block is None:
                return False
            if len(self.block):
                # a frame that claims to be earlier than the one before it happened at that one's time
                self.keys = np.maximum(np.maximum.accumulate(self.block.time_ns), self.latest_ns)
                self.latest_ns = int(self.keys[-1])
        return True


def interleave(sessions: Sequence[Iterator[FrameBlock]]) -> Iterator[FrameBlock]:
    """The frames of sessions, given in the order of their rank."""
    streams = [_Stream(blocks) for blocks in sessions]
    while live := [stream for stream in streams if stream.fill()]:
        first = min(range(len(live)), key=lambda k: live[k].latest_ns)
        bound_ns = live[first].latest_ns
        stops = [_stop(stream, bound_ns, before=k < first, whole=k == first) for k, stream in enumerate(live)]
        yield from _merged(live, stops)
        for stream, stop in zip(live, stops, strict=True):
            stream.at = stop


def _stop(stream: _Stream, bound_ns: int, *, before: bool, whole: bool) -> int:
    """Where the frames end that come before everything that is not at hand yet."""
    assert stream.block is not None
    assert stream.keys is not None
    if whole:
        return len(stream.block)
    return max(stream.at, int(np.searchsorted(stream.keys, bound_ns, side="right" if before else "left")))


def _merged(streams: Sequence[_Stream], stops: Sequence[int]) -> Iterator[FrameBlock]:
    blocks: list[FrameBlock] = []
    keys: list[NDArray[np.int64]] = []
    for stream, stop in zip(streams, stops, strict=True):
        if stop > stream.at and stream.block is not None and stream.keys is not None:
            blocks.append(stream.block.slice(stream.at, stop))
            keys.append(stream.keys[stream.at : stop])
    if len(blocks) == 1:
        yield blocks[0]
        return
    order = np.argsort(np.concatenate(keys), kind="stable")
    rows = np.concatenate([np.arange(len(block)) for block in blocks])[order]
    source = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])[order]
    ends = np.cumsum(np.concatenate([np.diff(block.offsets) for block in blocks])[order], dtype=np.int64)
    start = 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _MAX_BYTES, side="right")))
        yield gather(blocks, source[start:stop], rows[start:stop])
        start = stop
