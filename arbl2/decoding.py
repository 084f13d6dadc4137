"""From frames to book updates: what every kind of frame means to the books, and the providers for the messages of each venue.

Decoding has no memory from block to block, so blocks can be decoded ahead of the loop, in any order and in other threads - by one
``Decoder`` at a time, since it has room for one frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from arbl2.frames import ExchangeId, FrameKind
from arbl2.providers import PROVIDERS
from arbl2.updates import MAX_BLOCK, MAX_BLOCK_BYTES, Reason, What

if TYPE_CHECKING:
    from collections.abc import Iterator

    from arbl2.book import Universe
    from arbl2.frames import FrameBlock
    from arbl2.updates import UpdateBlock

_REASONS = np.zeros(16, np.uint8)
for _kind, _reason in {
    FrameKind.MESSAGE: Reason.OTHER_MESSAGE,
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


class Decoder:
    """Decodes blocks for the books of a universe. ``scanner=False`` uses the strict library decoder only (slow, same result)."""

    def __init__(self, universe: Universe, *, scanner: bool = True) -> None:
        self._providers = [PROVIDERS[venue](universe.books(venue), scanner=scanner) for venue in ExchangeId]

    def decode(self, block: FrameBlock, u: UpdateBlock) -> int:
        """Fill the rows of ``u`` from the bytes of a block of at most ``MAX_BLOCK`` frames; returns how many it filled: all."""
        n = len(block)
        u.what[:n] = 0
        u.reason[:n] = Reason.OTHER_MESSAGE  # until the venue's provider has read it
        u.book[:n] = -1
        # Most blocks, and nearly all of one frame, hold nothing but messages: bytes are counted in a fraction of the time that
        # columns take to be compared, above all where the code for it has left the processor's caches.
        if block.kind.tobytes().count(_MESSAGE) < n:
            self._others(block, u)
        for provider in self._providers:
            provider.decode(block, u)
        return n

    @staticmethod
    def _others(block: FrameBlock, u: UpdateBlock) -> None:
        u.reason[: len(block)] = _REASONS[block.kind]
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
    stop = min(start + MAX_BLOCK, len(block))
    if block.offsets[stop] - block.offsets[start] > MAX_BLOCK_BYTES:
        limit = int(block.offsets[start]) + MAX_BLOCK_BYTES
        stop = max(start + 1, int(np.searchsorted(block.offsets[start : stop + 1], limit, side="right")) - 1 + start)
    return stop
