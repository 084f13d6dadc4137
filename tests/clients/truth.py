"""What the market really was, rebuilt from a recording as slowly and plainly as can be: dictionaries and sorting.

Nothing of arbl2 but the reader of tapes is used here, so that a book of ours and this one cannot be wrong in the same way.
"""

from __future__ import annotations

import json
from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

from arbl2.frames import FrameKind
from arbl2.tape import TapeReader

if TYPE_CHECKING:
    from pathlib import Path

LEVELS = 20


class Book(NamedTuple):
    """Best level first; at most 20 a side."""

    bids: list[tuple[Decimal, Decimal]]
    asks: list[tuple[Decimal, Decimal]]


Marks = dict[int, Book]
"""A code's states by the venue's own id of each: ``timestamp`` on Upbit, the last update id on Binance. In the order of time."""


def tell(pairs) -> list[tuple[Decimal, Decimal]]:
    return [(Decimal(px), Decimal(size)) for px, size in pairs][:LEVELS]


def states(session: Path, *, from_partial: bool = True) -> dict[str, Marks]:
    """Every state that the recording tells of, by code; on Binance without ``from_partial`` only those that its diffs lead to."""
    found: dict[str, Marks] = defaultdict(dict)
    partial: dict[str, Marks] = defaultdict(dict)
    twins: dict[str, Twin] = {}
    asked: dict[str, str] = {}
    for frame in TapeReader(session).frames():
        if frame.kind is FrameKind.REQUEST:
            asked[frame.venue] = json.loads(frame.payload)["url"]
        elif frame.kind is FrameKind.RESPONSE and "/api/v3/depth?" in asked[frame.venue]:
            symbol = parse_qs(urlsplit(asked[frame.venue]).query)["symbol"][0]
            twins.setdefault(symbol, Twin(found[symbol])).restart(json.loads(frame.payload))
        elif frame.kind is FrameKind.MESSAGE:
            message = json.loads(frame.payload, parse_float=Decimal)
            if message.get("type") == "orderbook":
                _upbit(found[message["code"]], message)
            elif "stream" in message:
                symbol = message["stream"].partition("@")[0].upper()
                if "lastUpdateId" in (data := message["data"]):
                    partial[symbol][data["lastUpdateId"]] = Book(tell(data["bids"]), tell(data["asks"]))
                elif data.get("e") == "depthUpdate":
                    twins.setdefault(symbol, Twin(found[symbol])).hear(data)
    for symbol, marks in partial.items():
        both = marks.keys() & found[symbol].keys()
        assert all(marks[mark] == found[symbol][mark] for mark in both), f"diffs and partial books of {symbol} disagree"
        if from_partial:
            found[symbol] = dict(sorted((found[symbol] | marks).items()))
    return found


def _upbit(marks: Marks, message: dict) -> None:
    units = message["orderbook_units"]
    book = Book(
        tell((unit["bid_price"], unit["bid_size"]) for unit in units if unit["bid_size"]),
        tell((unit["ask_price"], unit["ask_size"]) for unit in units if unit["ask_size"]),
    )
    assert marks.setdefault(message["timestamp"], book) == book, "two books at one time"


class Twin:
    """A Binance book by the venue's recipe: a snapshot and every change after it, without a hole, over whichever connection."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._last_id: int | None = None
        self._waiting: list[dict] = []

    def restart(self, snapshot: dict) -> None:
        if self._last_id is not None and snapshot["lastUpdateId"] <= self._last_id:
            return
        self._bids = {Decimal(px): Decimal(size) for px, size in snapshot["bids"]}
        self._asks = {Decimal(px): Decimal(size) for px, size in snapshot["asks"]}
        self._last_id = snapshot["lastUpdateId"]
        self._show()
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            self.hear(change)

    def hear(self, change: dict) -> None:
        if self._last_id is None:
            self._waiting.append(change)
            return
        if change["u"] <= self._last_id:
            return
        if change["U"] > self._last_id + 1:
            self._last_id, self._waiting = None, [change]
            return
        for side, levels in ((self._bids, change["b"]), (self._asks, change["a"])):
            for px, size in levels:
                side[Decimal(px)] = Decimal(size)
                if not Decimal(size):
                    del side[Decimal(px)]
        self._last_id = change["u"]
        self._show()

    def _show(self) -> None:
        bids, asks = sorted(self._bids.items(), reverse=True), sorted(self._asks.items())
        self._marks[self._last_id] = Book(bids[:LEVELS], asks[:LEVELS])
