"""Frames of a recording written by hand: both venues' messages, connections, requests and alarms, one after the other."""

from __future__ import annotations

import json

from arbl2.frames import Anchor, Frame, FrameKind, Op
from arbl2_replay.wire import Book, UpbitTrade, upbit_orderbook, upbit_trade

WALL_NS = 1_763_700_000_000_000_000
ANCHOR = Anchor(WALL_NS, 10**12)
MS = 1_000_000
E8 = 10**8
DIFF = "btcusdt@depth@100ms"
DEPTH_URL = "https://rest/api/v3/depth?symbol=BTCUSDT&limit=1000"
BOOK = Book((100 * E8, 99 * E8), (E8, 2 * E8), (101 * E8, 102 * E8), (3 * E8, 4 * E8))


class Script:
    """Frames one after the other, 100 ms apart unless told otherwise."""

    def __init__(self):
        self.frames = []
        self.mono_ns = ANCHOR.mono_ns
        self.step_ns = 0

    @property
    def seq(self):
        return len(self.frames)

    @property
    def time_ms(self):
        return (ANCHOR.time_ns(self.mono_ns)) // MS

    def add(self, venue, conn, kind, payload, *, ms=100, flags=0):
        self.mono_ns += int(ms * MS)
        payload = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        recv_ns = ANCHOR.time_ns(self.mono_ns) + self.step_ns
        op = Op.TEXT if kind is FrameKind.MESSAGE else Op.NONE
        self.frames.append(Frame(self.seq + 1, recv_ns, self.mono_ns, venue, conn, kind, op, payload, 7, flags))
        return self

    def opened(self, conn=1, venue="binance"):
        return self.add(venue, conn, FrameKind.OPENED, {"url": "wss://x"})

    def closed(self, conn=1, venue="binance", ms=100, **facts):
        return self.add(venue, conn, FrameKind.CLOSED, {"code": 1006, "reason": "cut", "clean": False} | facts, ms=ms)

    def alarm(self, name, venue="binance", conn=1, **facts):
        return self.add(venue, conn, FrameKind.ALARM, {"alarm": name, **facts})

    def message(self, payload, venue="binance", conn=1, **options):
        return self.add(venue, conn, FrameKind.MESSAGE, payload, **options)

    def wrapped(self, stream, data, conn=1, **options):
        return self.message(b'{"stream":"%s","data":%s}' % (stream.encode(), json.dumps(data).encode()), conn=conn, **options)

    def diff(self, first, last, conn=1, stream=DIFF, late_ms=0, **options):
        data = {"e": "depthUpdate", "E": self.time_ms - late_ms, "s": "BTCUSDT", "U": first, "u": last, "b": [], "a": []}
        return self.wrapped(stream, data, conn, **options)

    def trade(self, number, conn=1, **options):
        return self.wrapped("btcusdt@trade", {"e": "trade", "s": "BTCUSDT", "t": number, "p": "1.0"}, conn, **options)

    def ticker(self, number, bid="1.00", ask="1.01", conn=1):
        return self.wrapped("btcusdt@bookTicker", {"u": number, "s": "BTCUSDT", "b": bid, "B": "1", "a": ask, "A": "1"}, conn)

    def partial(self, number, bid="1.00", ask="1.01", conn=1):
        data = {"lastUpdateId": number, "bids": [[bid, "1"]], "asks": [[ask, "1"]]}
        return self.wrapped("btcusdt@depth20@100ms", data, conn)

    def ask(self, url=DEPTH_URL):
        return self.add("binance", 0, FrameKind.REQUEST, {"method": "GET", "url": url})

    def body(self, book_id):
        return self.add("binance", 0, FrameKind.RESPONSE, b'{"lastUpdateId":%d,"bids":[],"asks":[]}' % book_id)

    def book(self, late_ms=0, conn=2, code="KRW-BTC", book=BOOK, ms=100, flags=0, change=lambda payload: payload, **options):
        self.mono_ns += ms * MS
        payload = change(upbit_orderbook(code, book, self.time_ms - late_ms, units=5, **options))
        return self.message(payload, "upbit", conn, ms=0, flags=flags)

    def upbit_trade(self, number, conn=2, **options):
        trade = UpbitTrade(self.time_ms, 100 * E8, E8, True, number, 100 * E8, BOOK)
        return self.message(upbit_trade("KRW-BTC", trade, **options), "upbit", conn)

    def tick(self, seconds):
        """Clock samples every ten seconds, as a recorder takes them, and nothing else."""
        for _ in range(seconds // 10):
            self.add("", 0, FrameKind.CLOCK, {}, ms=10_000)
        return self


def chain():
    """Two diffs, a book that covers the second, two more diffs: frames 1 to 7."""
    return Script().opened().diff(1, 5).diff(6, 9).ask().body(7).diff(10, 10).diff(11, 14)
