"""From frames to book updates: what every kind of frame means to the books, and the providers for the messages of each venue.

Decoding has no memory from block to block, so blocks can be decoded ahead of the loop, in any order and in other threads - by one
``Decoder`` at a time, since it has room for one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.frames import ExchangeId, FrameKind
from arbl2.jit import frozen, kernel
from arbl2.providers import PROVIDERS
from arbl2.updates import MAX_BLOCK, MAX_BLOCK_BYTES, Reason, What

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from arbl2.book import Universe
    from arbl2.frames import FrameBlock
    from arbl2.updates import UpdateBlock

    Value = Any

_REASONS = np.full(256, Reason.OTHER_MESSAGE, np.uint8)
"""What a frame is by its kind, until the venue's provider has read it."""
for _kind, _reason in {
    FrameKind.SENT: Reason.SENT,
    FrameKind.OPENED: Reason.OPENED,
    FrameKind.CLOSED: Reason.CLOSED,
    FrameKind.REQUEST: Reason.REQUEST,
    FrameKind.RESPONSE: Reason.REST,
    FrameKind.CLOCK: Reason.CLOCK,
    FrameKind.ALARM: Reason.ALARM,
}.items():
    _REASONS[_kind] = _reason


_MESSAGE, _CLOSED, _ALARM = int(FrameKind.MESSAGE), int(FrameKind.CLOSED), int(FrameKind.ALARM)


def lay_out(block: FrameBlock, u: UpdateBlock) -> None:
    """Fill the rows of ``u`` with what is known of the frames of a block, at most ``MAX_BLOCK``, before anybody has read them."""
    if len(block) > MAX_BLOCK:
        raise ValueError(f"{len(block):,} frames are more than there is room for at once ({MAX_BLOCK:,}).")
    if block.packed is not None:
        # NumPy takes its way for each column, which costs a lone frame more than the loop does
        _take_heads(frozen(block.packed.heads), block.packed.shift_ns, u.records)
        return
    n = len(block)
    take_stamps(block, u, n)
    u.offsets[: n + 1] = block.offsets
    u.what[:n] = 0
    u.reason[:n] = _REASONS[block.kind]
    u.book[:n] = -1


def take_stamps(block: FrameBlock, u: UpdateBlock, n: int) -> None:
    """Fill ``seq``, ``time_ns``, ``venue`` and ``conn`` of the first ``n`` rows. What stands in for a ``Decoder`` calls it."""
    for name in ("seq", "time_ns", "venue", "conn"):
        getattr(u, name)[:n] = getattr(block, name)[:n]


@kernel
def _take_heads(heads: NDArray[Any], shift_ns: int, updates: Value) -> None:
    u = updates[0]
    at = np.int64(0)
    u.offsets[0] = at
    for i in range(len(heads)):
        head = heads[i]
        u.seq[i] = head["seq"]
        u.time_ns[i] = head["mono_ns"] + shift_ns
        u.venue[i] = head["venue"]
        u.conn[i] = head["conn"]
        u.what[i] = 0
        u.reason[i] = _REASONS[head["kind"]]
        u.book[i] = -1
        at += np.int64(head["size"])
        u.offsets[i + 1] = at


class Decoder:
    """Decodes blocks for the books of a universe. ``scanner=False`` uses the strict library decoder only (slow, same result)."""

    def __init__(self, universe: Universe, *, scanner: bool = True) -> None:
        self._providers = [PROVIDERS[venue](universe.books(venue), scanner=scanner) for venue in ExchangeId]

    def decode(self, block: FrameBlock, u: UpdateBlock) -> int:
        """Fill the rows of ``u`` from the bytes of a block of at most ``MAX_BLOCK`` frames; returns how many it filled: all."""
        lay_out(block, u)
        n = len(block)
        if block.kinds().count(_MESSAGE) < n:
            self._others(block, u)
        for provider in self._providers:
            provider.decode(block, u)
        return n

    @staticmethod
    def _others(block: FrameBlock, u: UpdateBlock) -> None:
        for row in (block.kind != _MESSAGE).nonzero()[0].tolist():
            kind = block.kind[row]
            # Another connection goes on with the same streams: their books stay what they are.
            if kind == _CLOSED and b'"covered":true' not in block.payload(row):
                u.what[row] = What.CLOSED
            elif kind == _ALARM and b'"alarm":"dropped"' in block.payload(row):
                u.what[row] = What.LOST


def parts(block: FrameBlock) -> Iterator[FrameBlock]:
    """The block in pieces that fit an ``UpdateBlock``."""
    start = 0
    while start < len(block):
        stop = fitting(block, start)
        yield block.slice(start, stop)
        start = stop


def fitting(block: FrameBlock, start: int) -> int:
    """Where the rows end that are taken through the loop together: at least one, and no more bytes than there is room for."""
    if not start and len(block) <= MAX_BLOCK and len(block.data) <= MAX_BLOCK_BYTES:
        return len(block)
    stop = min(start + MAX_BLOCK, len(block))
    if block.offsets[stop] - block.offsets[start] > MAX_BLOCK_BYTES:
        limit = int(block.offsets[start]) + MAX_BLOCK_BYTES
        stop = max(start + 1, int(np.searchsorted(block.offsets[start : stop + 1], limit, side="right")) - 1 + start)
    return stop
