"""Our tape to neutral arrays, in the fastest way that libraries from the package index allow: pyarrow and typed msgspec.

Typed decoding straight to floats was the quickest of what was measured (orjson and json leave the numbers of Binance as text).
This is the first step of every peer's conversion, so its speed counts for them; nothing of arbl2's own decoder is used.
"""

from __future__ import annotations

from array import array
from itertools import chain
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arbl2.tape import TapeReader
from benchmarks.peers.books import BookFeed
from benchmarks.peers.decisions import BINANCE, FX, UPBIT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INSTRUMENTS = {UPBIT: "KRW-BTC", BINANCE: "BTCUSDT", FX: "KRW-USDT"}


_COLUMNS = ["mono_ns", "venue", "kind", "payload"]
_AT_ONCE = 1_024
"""Messages made into Python objects at once: few enough for the processor's cache (a whole row group costs 1-6 us more each)."""


class _Unit(msgspec.Struct, gc=False):
    bid_price: float
    bid_size: float
    ask_price: float
    ask_size: float


class _UpbitMessage(msgspec.Struct, gc=False):
    code: str
    orderbook_units: list[_Unit]


class _Depth(msgspec.Struct, gc=False):
    bids: list[tuple[float, float]]
    asks: list[tuple[float, float]]


class _BinanceMessage(msgspec.Struct, gc=False):
    data: _Depth | None = None


class _Columns:
    """One book while it is read: times, and four or two numbers a level in the order of the message."""

    def __init__(self) -> None:
        self.times = array("q")
        self.levels = array("d")


def rows(session: Path) -> Iterator[tuple[int, str, str, bytes]]:
    """(mono_ns, venue, kind, payload) of every frame of a session."""
    for path in sorted((session / "segments").iterdir()):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=_COLUMNS)
                for at in range(0, len(table), _AT_ONCE):
                    part = table.slice(at, _AT_ONCE)
                    texts = (part[name].cast(pa.string()) for name in ("venue", "kind"))
                    columns = (part["mono_ns"], *texts, part["payload"])
                    yield from zip(*(column.to_numpy().tolist() for column in columns), strict=True)


def read(session: Path) -> dict[int, BookFeed]:
    """Every book message of a session by book number. Raises SystemExit if a book does not always show as many levels."""
    anchor = TapeReader(session).anchor
    shift_ns = anchor.wall_ns - anchor.mono_ns
    upbit = msgspec.json.Decoder(_UpbitMessage).decode
    # Binance writes its numbers as text; not strict = read them as floats
    binance = msgspec.json.Decoder(_BinanceMessage, strict=False).decode
    astuple, flat = msgspec.structs.astuple, chain.from_iterable
    columns = {book: _Columns() for book in INSTRUMENTS}
    by_code = {INSTRUMENTS[book]: columns[book] for book in (UPBIT, FX)}
    for mono_ns, venue, kind, payload in rows(session):
        if kind != "message":
            continue
        if venue == "upbit":
            message = upbit(payload)
            one = by_code[message.code]
            one.levels.fromlist(list(flat(map(astuple, message.orderbook_units))))
        else:
            depth = binance(payload).data
            if depth is None:
                continue
            one = columns[BINANCE]
            one.levels.fromlist([*flat(depth.bids), *flat(depth.asks)])
        one.times.append(mono_ns + shift_ns)
    return {book: _book(book, one) for book, one in columns.items()}


def _book(book: int, one: _Columns) -> BookFeed:
    times, levels = np.array(one.times, np.int64), np.array(one.levels, np.float64)
    if len(levels) % (4 * len(times)):
        raise SystemExit(f"{INSTRUMENTS[book]} does not show the same number of levels in every message; measure another tape.")
    if book == BINANCE:
        sides = levels.reshape(len(times), 2, -1, 2)
        return BookFeed(times, *(np.ascontiguousarray(sides[:, side]) for side in range(2)))
    units = levels.reshape(len(times), -1, 4)
    return BookFeed(times, *(np.ascontiguousarray(units[:, :, at : at + 2]) for at in (0, 2)))
