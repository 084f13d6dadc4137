"""The whole book of a Binance symbol, from the recorded REST books and the recorded changes.

It answers ``GET /api/v3/depth`` with an id that fits the changes that clients are told at that moment. A recorded REST book is
known a little before its time; a client that asks when no older one fits is given that one, whose id lies ahead of the stream,
and drops the changes before it, just as it must with the venue's own answers. Nothing is read before somebody asks, or a few
thousand messages have gathered.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from arbl2_replay.encode import diff, e8, or_none, partial_text
from arbl2_replay.wire import Book

if TYPE_CHECKING:
    from arbl2_replay.encode import Diff, Levels
    from arbl2_replay.sources import Message

_MOST_WAITING = 2_000
_MOST_BODIES = 64


class FullBook:
    """Levels as the venue writes them. ``last_id`` is the id of the last change in it, 0 while there is no book."""

    def __init__(self) -> None:
        self.last_id = 0
        self._heard_id = 0
        self._bids: dict[str, str] = {}
        self._asks: dict[str, str] = {}
        self._waiting: list[Message] = []
        self._bodies: deque[bytes] = deque(maxlen=_MOST_BODIES)

    def expect(self, body: bytes) -> None:
        """A REST book that was recorded about now."""
        self._bodies.append(body)

    def hear(self, message: Message) -> None:
        """A recorded change."""
        self._waiting.append(message)
        if len(self._waiting) >= _MOST_WAITING:
            self._settle()

    def lost(self) -> None:
        """Changes were missed: only a new REST book helps."""
        self._settle()
        self.last_id = 0

    def book(self, limit: int) -> tuple[int, Book] | None:
        """Id and the best ``limit`` levels a side; None if there is no book."""
        self._settle()
        if not self.last_id:
            self._adopt(self._heard_id)
        if not self.last_id:
            return None
        bids, asks = ([(e8(px), e8(size)) for px, size in side.items()] for side in (self._bids, self._asks))
        best = (heapq.nlargest(limit, bids), heapq.nsmallest(limit, asks))
        return self.last_id, Book(*(tuple(pair[k] for pair in side) for side in best for k in (0, 1)))

    def _settle(self) -> None:
        for message in self._waiting:
            change = diff(message)
            if change is not None:
                self._apply(change)
        self._waiting = []

    def _apply(self, change: Diff) -> None:
        if self.last_id and change.first_id > self.last_id + 1:
            self.last_id = 0
        if not self.last_id:
            self._adopt(change.first_id - 1)
        self._heard_id = change.last_id
        if not self.last_id or change.last_id <= self.last_id:
            return
        _write(self._bids, change.bids)
        _write(self._asks, change.asks)
        self.last_id = change.last_id

    def _adopt(self, least_id: int) -> None:
        """Begin with the first REST book that is not older than that."""
        while self._bodies:
            body = self._bodies.popleft()
            found = or_none(lambda body=body: partial_text(body))  # type: ignore[misc]
            if found is not None and found[0] >= least_id:
                self.last_id, bids, asks = found
                self._bids, self._asks = {}, {}
                _write(self._bids, bids)
                _write(self._asks, asks)
                return


def _write(side: dict[str, str], levels: Levels) -> None:
    for px, size in levels:
        if size.strip("0."):
            side[px] = size
        else:
            side.pop(px, None)
