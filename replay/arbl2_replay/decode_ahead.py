"""Decoding ahead: raw blocks become book updates in other threads while the loop works on the ones before.

The scanner is compiled and lets go of the interpreter lock, so two blocks are decoded at a time, each into room of its own; the
loop gets a copy, which takes a thirtieth of the time of decoding. The order is that of the blocks, and what is ahead is bounded.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from arbl2.decoding import Decoder, parts, take_stamps
from arbl2.updates import HOME_LEVELS, UpdateBlock

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from concurrent.futures import Future

    from arbl2.book import Universe
    from arbl2.engine import Decode
    from arbl2.frames import FrameBlock

    Batch = tuple[FrameBlock, Decode | None]

_WORKERS = 2
_AHEAD = 6
_COLUMNS = ("what", "reason", "book", "exchange_ms", "first_id", "update_id", "check", "start", "n_bid", "n_ask")


def decode_ahead(batches: Iterator[Batch], universe: Universe) -> Generator[Batch]:
    """The batches with what is not decoded yet decoded ahead; a block of them must be fed before the next one is asked for."""
    free: list[_Room] = []
    rooms = 0
    waiting: deque[tuple[FrameBlock, _Room]] = deque()
    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="arbl2-decode") as pool:
        for block, decode in batches:
            if decode is not None:
                while waiting:
                    yield from _next(waiting, free)
                yield block, decode
                continue
            for part in parts(block):
                if not free and rooms < _AHEAD:
                    free.append(_Room(universe))
                    rooms += 1
                elif not free:
                    yield from _next(waiting, free)
                waiting.append((part, free.pop()))
                waiting[-1][1].start(pool, part)
        while waiting:
            yield from _next(waiting, free)


def _next(waiting: deque[tuple[FrameBlock, _Room]], free: list[_Room]) -> Iterator[Batch]:
    part, room = waiting.popleft()
    yield part, room.copy
    free.append(room)


class _Room:
    """Room for one decoded block, with a decoder of its own."""

    def __init__(self, universe: Universe) -> None:
        self._decoder = Decoder(universe)
        self._updates = UpdateBlock()
        self._done: Future[int] | None = None
        self._at = 0

    def start(self, pool: ThreadPoolExecutor, block: FrameBlock) -> None:
        self._at = 0
        self._updates.cursor[0] = HOME_LEVELS
        self._done = pool.submit(self._decode, block)

    def _decode(self, block: FrameBlock) -> int:
        # checksums wrap on purpose, which NumPy reports when the kernels run uncompiled
        with np.errstate(over="ignore"):
            return self._decoder.decode(block, self._updates)

    def copy(self, block: FrameBlock, u: UpdateBlock) -> int:
        """Stands in for ``Engine.decode``: the next rows of the block that was decoded here."""
        assert self._done is not None
        self._done.result()
        n, at = len(block), self._at
        take_stamps(block, u, n)
        for name in _COLUMNS:
            getattr(u, name)[:n] = getattr(self._updates, name)[at : at + n]
        # Levels stand in the order in which the venues were decoded, so whoever takes a part of the rows takes all of them.
        levels = slice(HOME_LEVELS, int(self._updates.cursor[0]))
        u.px_e8[levels], u.qty_e8[levels] = self._updates.px_e8[levels], self._updates.qty_e8[levels]
        u.cursor[0] = levels.stop
        self._at += n
        return n
