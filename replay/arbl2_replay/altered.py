"""Tapes with a change that should not matter, or should: cut short, or with what came at once in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from arbl2.frames import COLUMNS, FrameBlock
from arbl2.tape import SegmentWriter, save_manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.tape import Manifest

_ZSTD_LEVEL = 1
_PLACES = ("seq", "time_ns", "recv_ns", "mono_ns", "queue_us", "flags")
"""Columns that stay where they are when frames trade places."""


def write_tape(folder: Path, manifest: Manifest, blocks: Iterable[FrameBlock]) -> Path:
    """A session of these blocks, which must hold a frame at least, in a folder of its name. Raises StorageError."""
    session = folder / manifest.session
    writer = SegmentWriter(session, 1, manifest.session, manifest.anchor, zstd_level=_ZSTD_LEVEL)
    try:
        for block in blocks:
            writer.append_block(block)
        segment = writer.seal()
    except BaseException:
        writer.discard()
        raise
    save_manifest(session, msgspec.structs.replace(manifest, segments=[segment], counts={}))
    return session


def cut(blocks: Iterable[FrameBlock], seq: int) -> Iterator[FrameBlock]:
    """The frames up to ``seq``."""
    for block in blocks:
        n = int(np.searchsorted(block.seq, seq, side="right"))
        if n:
            yield packed(block.slice(0, n))
        if n < len(block):
            return


def with_ties_permuted(blocks: Iterable[FrameBlock], window_ns: int, seed: int) -> Iterator[FrameBlock]:
    """The frames with a random order across venues within every ``window_ns``; those of one venue keep theirs.

    Stamps and ``seq`` stay in their places, so time runs as before and no frame moves by more than the window. Where windows
    begin is random too: any two frames that are closer than the window may trade places.
    """
    chance = np.random.default_rng(seed)
    phase_ns = int(chance.integers(window_ns))
    held: FrameBlock | None = None
    for block in blocks:
        whole = packed(block) if held is None else _joined(held, packed(block))
        slot = (np.maximum.accumulate(whole.time_ns) + phase_ns) // window_ns
        # the last window may go on in the next block
        n = int(np.searchsorted(slot, slot[-1], side="left"))
        held = packed(whole.slice(n, len(whole)))
        if n:
            yield _permuted(packed(whole.slice(0, n)), slot[:n], chance)
    if held is not None and len(held):
        slot = (np.maximum.accumulate(held.time_ns) + phase_ns) // window_ns
        yield _permuted(held, slot, chance)


def _permuted(block: FrameBlock, slot: NDArray[np.int64], chance: np.random.Generator) -> FrameBlock:
    n = len(block)
    drawn = chance.random(n)
    # each venue's frames of a window take its drawn numbers in rising order, so that they stay in theirs
    key = np.empty(n)
    key[np.lexsort((np.arange(n), block.venue, slot))] = drawn[np.lexsort((drawn, block.venue, slot))]
    order = np.lexsort((key, slot))
    return _ordered(block, order)


def _ordered(block: FrameBlock, order: NDArray[np.intp]) -> FrameBlock:
    columns = {name: getattr(block, name) if name in _PLACES else getattr(block, name)[order] for name in COLUMNS}
    offsets = np.zeros(len(block) + 1, np.int32)
    np.cumsum(np.diff(block.offsets)[order], out=offsets[1:])
    data = np.frombuffer(b"".join(block.payload(i) for i in order.tolist()), np.uint8)
    return FrameBlock(**columns, offsets=offsets, data=data)


def packed(block: FrameBlock) -> FrameBlock:
    """The same frames with no byte of others around."""
    first, last = int(block.offsets[0]), int(block.offsets[-1])
    if not first and last == len(block.data):
        return block
    columns = {name: getattr(block, name) for name in COLUMNS}
    return FrameBlock(**columns, offsets=block.offsets - np.int32(first), data=block.data[first:last])


def _joined(a: FrameBlock, b: FrameBlock) -> FrameBlock:
    columns = {name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in (*COLUMNS, "data")}
    return FrameBlock(**columns, offsets=np.concatenate([a.offsets, b.offsets[1:] + a.offsets[-1]]))
