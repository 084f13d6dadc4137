"""Books of any shape in the venues' bytes, and what can happen to bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from arbl2.decoding import lay_out
from arbl2.frames import BINANCE, UPBIT, FrameBlock, FrameKind
from arbl2.providers import BinanceL2Provider, UpbitL2Provider
from arbl2.updates import MAX_BLOCK, Reason, UpdateBlock, What
from arbl2_replay.wire import (
    Book,
    DepthChange,
    UpbitTrade,
    binance_book_ticker,
    binance_combined,
    binance_depth,
    binance_diff,
    binance_trade,
    upbit_orderbook,
    upbit_trade,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from arbl2.providers import Provider

UPBIT_BOOKS = {"KRW-BTC": 0, "KRW-USDT": 1, "KRW-1INCH": 2}
BINANCE_BOOKS = {"BTCUSDT": 3, "ETHUSDT": 4, "1000SATSUSDT": 5}


class Row(NamedTuple):
    """What a provider made of one message."""

    what: str
    reason: str
    book: int
    exchange_ms: int
    first_id: int
    update_id: int
    bids: list[tuple[int, int]]
    asks: list[tuple[int, int]]


def provider(venue: int, *, scanner: bool = True) -> Provider:
    kind, books = (UpbitL2Provider, UPBIT_BOOKS) if venue == UPBIT else (BinanceL2Provider, BINANCE_BOOKS)
    return kind(books, scanner=scanner)


def block_of(
    payloads: Sequence[bytes], venue: int, *, data: bytes | None = None, kind: FrameKind = FrameKind.MESSAGE
) -> FrameBlock:
    """Messages as a block whose buffer ends with the last byte of the last one (or goes on, if ``data`` is given)."""
    n = len(payloads)
    offsets = np.zeros(n + 1, np.int32)
    np.cumsum([len(payload) for payload in payloads], out=offsets[1:])
    stamps = np.arange(1, n + 1, dtype=np.int64)
    return FrameBlock(
        seq=stamps,
        time_ns=stamps,
        recv_ns=stamps,
        mono_ns=stamps,
        venue=np.full(n, venue, np.uint8),
        conn=np.ones(n, np.int32),
        kind=np.full(n, kind, np.uint8),
        op=np.ones(n, np.uint8),
        queue_us=np.zeros(n, np.int32),
        flags=np.zeros(n, np.uint8),
        offsets=offsets,
        data=np.frombuffer(data if data is not None else b"".join(payloads), np.uint8),
    )


def rows_of(block: FrameBlock, decoder: Provider) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(block), MAX_BLOCK):
        part = block.slice(start, min(start + MAX_BLOCK, len(block)))
        u = UpdateBlock()
        with np.errstate(over="ignore"):  # too many digits wrap before they are refused, which NumPy reports without the JIT
            lay_out(part, u)
            decoder.decode(part, u)
        rows += [_row(u, i) for i in range(len(part))]
    return rows


def _row(u: UpdateBlock, i: int) -> Row:
    what, reason = What(int(u.what[i])), Reason(int(u.reason[i]))
    ms = first_id = update_id = 0
    bids: list[tuple[int, int]] = []
    asks: list[tuple[int, int]] = []
    if what is not What.NOTHING:
        ms, first_id, update_id = (int(column[i]) for column in (u.exchange_ms, u.first_id, u.update_id))
        at, n, m = int(u.start[i]), int(u.n_bid[i]), int(u.n_ask[i])
        bids, asks = (
            list(zip(u.px_e8[a : a + k].tolist(), u.qty_e8[a : a + k].tolist(), strict=True)) for a, k in ((at, n), (at + n, m))
        )
    return Row(what.name, reason.label, int(u.book[i]) if what is not What.NOTHING else -1, ms, first_id, update_id, bids, asks)


def decode(payloads: Sequence[bytes], venue: int, *, scanner: bool, kind: FrameKind = FrameKind.MESSAGE) -> list[Row]:
    return rows_of(block_of(payloads, venue, kind=kind), provider(venue, scanner=scanner))


# ---------------------------------------------------------------------------------------------------------------- books


def wild_book(rng: Random, levels: int) -> Book:
    """A valid book: anything from a satoshi to 10^18 in price, dust to 10^16 in size, up to ``levels`` levels a side."""
    n_bid, n_ask = (rng.choice((0, 1, levels // 2, levels, levels)) for _ in range(2))
    tick = rng.choice((1, 10, 1_000, 50_000, 10**6, 10**8, 10**11, 5 * 10**12))
    bid = tick * (n_bid * 4 + rng.choice((1, 7, 1_000, 10**5)) + rng.randrange(1_000))
    px: list[list[int]] = [[], []]
    for side, count in ((0, n_bid), (1, n_ask)):
        price = bid
        for _ in range(count):
            price += (1 if side else -1) * tick * rng.choice((1, 1, 1, 2, 4))
            px[side].append(price)
    sizes = [[_size(rng) for _ in side] for side in px]
    return Book(px[0], sizes[0], px[1], sizes[1])


def _size(rng: Random) -> int:
    return rng.choice((1, rng.randrange(1, 10**5), rng.randrange(1, 10**9), rng.randrange(1, 10**16), 10 ** rng.randrange(16)))


def levels_of(book: Book) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    bids = list(zip(book.bid_px_e8, book.bid_size_e8, strict=True))
    return bids, list(zip(book.ask_px_e8, book.ask_size_e8, strict=True))


def upbit_bytes(rng: Random, book: Book, units: int, *, code: str = "KRW-BTC", **more: Any) -> bytes:
    simple, snapshot = rng.random() < 0.5, rng.random() < 0.2
    payload = upbit_orderbook(code, book, 1_767_312_000_123, units=units, simple=simple, snapshot=snapshot, **more)
    if rng.random() < 0.2:  # before 2024 there was no "level"
        payload = payload.replace(b',"level":0}', b"}").replace(b',"lv":0}', b"}")
    return payload


def binance_bytes(rng: Random, book: Book, depth: int, *, symbol: str = "BTCUSDT") -> bytes:
    suffix = rng.choice(("", "@100ms"))
    update_id = rng.choice((0, 1, 50_000_000_123, 10**17))
    return binance_combined(f"{symbol.lower()}@depth{depth}{suffix}", binance_depth(book, update_id, depth=depth))


def wild_change(rng: Random, most: int) -> DepthChange:
    """A change of up to ``most`` levels a side, in any order, some of them gone."""
    sides = [[(px, rng.choice((0, size))) for px, size in side] for side in levels_of(wild_book(rng, most))]
    for side in sides:
        rng.shuffle(side)
    first_id = rng.choice((1, 50_000_000_123, 10**17))
    return DepthChange(first_id, first_id + rng.choice((0, 1, 1_000)), *sides)


def change_bytes(rng: Random, change: DepthChange, *, symbol: str = "BTCUSDT", raw: bool = False) -> bytes:
    data = binance_diff(symbol, change, 1_767_312_000_123)
    return data if raw else binance_combined(f"{symbol.lower()}@depth{rng.choice(('', '@100ms'))}", data)


def snapshot_bytes(rng: Random, most: int = 100) -> bytes:
    return binance_depth(wild_book(rng, most), rng.choice((0, 1, 50_000_000_123)), depth=most)


def told_beside(rng: Random, symbol: str) -> bytes:
    """What Binance says beside its books: a trade, the touch."""
    if rng.random() < 0.5:
        data = binance_trade(
            symbol, rng.randrange(10**10), _size(rng), _size(rng), 1_767_312_000_123, taker_sells=rng.random() < 0.5
        )
        return binance_combined(f"{symbol.lower()}@trade", data)
    return binance_combined(f"{symbol.lower()}@bookTicker", binance_book_ticker(symbol, wild_book(rng, 1), rng.randrange(10**10)))


def upbit_told(rng: Random, code: str) -> bytes:
    """What Upbit says beside its books: a trade or a ticker, in either spelling."""
    simple = rng.random() < 0.5
    trade = UpbitTrade(
        time_ms=1_767_312_000_123, px_e8=_size(rng), size_e8=_size(rng), taker_sells=rng.random() < 0.5, closing_px_e8=_size(rng),
        sequential_id=rng.randrange(10**17), book=wild_book(rng, 1),
    )  # fmt: skip
    payload = upbit_trade(code, trade, simple=simple, snapshot=rng.random() < 0.1)
    if rng.random() < 0.5:
        return payload
    extra = rng.choice((b',"delisting_date":null', b',"is_trading_suspended":false', b',"change_rate":-0.0123', b',"x":1.5E-7'))
    return payload.replace(b'"trade"', b'"ticker"', 1)[:-1] + extra + b"}"


def any_bytes(rng: Random, venue: int) -> bytes:
    """A message as the venue would send it."""
    if venue == UPBIT and rng.random() < 0.2:
        return upbit_told(rng, rng.choice((*UPBIT_BOOKS, "KRW-NOPE")))
    if venue == UPBIT:
        units = rng.choice((1, 5, 15, 30))
        return upbit_bytes(rng, wild_book(rng, units), units, code=rng.choice((*UPBIT_BOOKS, "KRW-NOPE")))
    if rng.random() < 0.2:
        return told_beside(rng, rng.choice((*BINANCE_BOOKS, "NOPEUSDT")))
    if rng.random() < 0.5:
        symbol = rng.choice((*BINANCE_BOOKS, "NOPEUSDT"))
        return change_bytes(rng, wild_change(rng, rng.choice((1, 4, 60))), symbol=symbol, raw=rng.random() < 0.1)
    depth = rng.choice((5, 10, 20))
    return binance_bytes(rng, wild_book(rng, depth), depth, symbol=rng.choice((*BINANCE_BOOKS, "NOPEUSDT")))


# ------------------------------------------------------------------------------------------------------------- mutations

NUMBERS = (
    *(b"0", b"-0", b"00", b"01", b"-1", b"+1", b"1.", b".5", b"0.0", b"-0.0", b"1e2", b"1E2", b"1e+2", b"1e-2", b"1.5E-9"),
    *(b"1e400", b"1e-400", b"1E018", b"1e0099", b"0e999999", b"1e", b"1e+", b"1.0e1.0", b"--1", b"0x10", b"1_000", b"1,000"),
    *(
        b"NaN",
        b"nan",
        b"Infinity",
        b"-Infinity",
        b"Inf",
        b"null",
        b"true",
        b'"1"',
        b'""',
        b'"1e3"',
        b'"NaN"',
        b'" 1"',
        b"[]",
        b"{}",
    ),
    *(b"999999999999999999", b"9999999999999999999", b"1" + b"0" * 30, b"0." + b"0" * 30 + b"1", b"92233720368.54775807"),
    *(b"92233720368.54775808", b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"18446744073709551616"),
    *(b"1.23456789", b"1.234567891", b"0.000000001", b"123456789012345678", b"1234567890.12345678", b"12345678901.12345678"),
    *(b"9" * 401, b"1." + b"1" * 401, b"9" * 5_000, b"1" + b"0" * 20 + b"e-20", b"\xef\xbc\x91", b"1 ", b" 1", b"1\n", b"\t1"),
)
_NASTY = (
    *(
        b'"',
        b"\\",
        b"\\u0041",
        b"\\ud800",
        b"\x00",
        b"\xff",
        b"\xc3\x28",
        b"\xf0\x9f\x98\x80",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
    ),
    *(b" ", b"\n", b"\t", b"\r", b"\x0c", b"\xef\xbb\xbf", b"//", b"/**/", b"null", b"0", b"9", b"-", b"e", b".", b"[" * 2_000),
)


def mutated(rng: Random, payload: bytes) -> bytes:
    """One to three accidents."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        payload = rng.choice(_ACCIDENTS)(rng, payload)
    return payload


def _flip(rng: Random, payload: bytes) -> bytes:
    at = _at(rng, payload)
    return payload[:at] + bytes([payload[at] ^ (1 << rng.randrange(8))]) + payload[at + 1 :] if payload else b""


def _delete(rng: Random, payload: bytes) -> bytes:
    at = _at(rng, payload)
    return payload[:at] + payload[at + rng.choice((1, 1, 2, 9, 60)) :]


def _insert(rng: Random, payload: bytes) -> bytes:
    at = _at(rng, payload)
    return payload[:at] + rng.choice(_NASTY) + payload[at:]


def _cut(rng: Random, payload: bytes) -> bytes:
    return payload[: _at(rng, payload)] if rng.random() < 0.7 else payload[_at(rng, payload) :]


def _repeat(rng: Random, payload: bytes) -> bytes:
    a, b = sorted((_at(rng, payload), _at(rng, payload)))
    return payload[:b] + payload[a:b] + payload[b:]


def _number(rng: Random, payload: bytes) -> bytes:
    """Another spelling where a number stands."""
    starts = [k for k in range(1, len(payload)) if payload[k : k + 1].isdigit() and not payload[k - 1 : k].isalnum()]
    starts = [k for k in starts if payload[k - 1 : k] not in b".-"]
    if not starts:
        return payload
    at = rng.choice(starts)
    stop = at
    while stop < len(payload) and payload[stop : stop + 1] in b"0123456789.eE+-":
        stop += 1
    return payload[:at] + rng.choice(NUMBERS) + payload[stop:]


def _digit(rng: Random, payload: bytes) -> bytes:
    digits = [k for k, byte in enumerate(payload) if 48 <= byte <= 57]
    if not digits:
        return payload
    at = rng.choice(digits)
    return payload[:at] + bytes([48 + rng.randrange(10)]) + payload[at + 1 :]


def _space(rng: Random, payload: bytes) -> bytes:
    for mark in (b":", b",", b"{", b"["):
        if rng.random() < 0.4:
            payload = payload.replace(mark, mark + rng.choice((b" ", b"\n", b"\t")))
    return payload


def _reorder(rng: Random, payload: bytes) -> bytes:
    """Another order of members, or one of them twice."""
    parts = payload.split(b",")
    if len(parts) < 2:
        return payload
    a, b = rng.randrange(len(parts)), rng.randrange(len(parts))
    if rng.random() < 0.5:
        parts[a], parts[b] = parts[b], parts[a]
    else:
        parts.insert(b, parts[a])
    return b",".join(parts)


def _rename(rng: Random, payload: bytes) -> bytes:
    names = (b"code", b"cd", b"type", b"ty", b"bids", b"asks", b"data", b"stream", b"level", b"obu", b"ask_size", b"bp", b"error")
    if b"depthUpdate" in payload:
        names = (b'"U"', b'"u"', b'"pu"', b'"b"', b'"a"', b'"E"', b'"e"', b'"s"', b"@depth", b"depthUpdate", b'"data"', b"@trade")
    return payload.replace(rng.choice(names), rng.choice(names), rng.choice((1, -1)))


def _nest(rng: Random, payload: bytes) -> bytes:
    return rng.choice((b"[%b]", b'{"data":%b}', b'{"stream":"btcusdt@depth20","data":%b}', b"%b ", b" %b", b"%b,")) % payload


def _at(rng: Random, payload: bytes) -> int:
    return rng.randrange(len(payload)) if payload else 0


_ACCIDENTS = (_flip, _flip, _delete, _insert, _cut, _repeat, _number, _number, _number, _digit, _space, _reorder, _rename, _nest)
ANY_VENUE = (UPBIT, BINANCE)
