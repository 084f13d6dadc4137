"""Random sessions in which everything collides: few prices, tiny sizes, all faults, late orders, empty accounts.

A synthetic market is too well behaved to reach the corners of the rules. Here prices live on a grid of some ticks (10 bp each)
around parity, a book changes by a level or two per message and is wider than the window shown, so that what an order took is
shown again, shrunk, gone, or out of sight. Binance tells its books as windows, as changes with snapshots, or both, over several
connections, and two recorders may have heard it all. Everything follows from the seed.
"""

from __future__ import annotations

import re
from random import Random
from typing import Literal, NamedTuple

from arbl2.config import AggregatorConfig, PaperConfig, PolicyConfig, RunConfig
from arbl2.frames import Anchor, Frame, FrameKind, Op
from arbl2.rules import RuleOverride
from arbl2_replay.wire import E8, Book, DepthChange, binance_combined, binance_depth, binance_diff, upbit_orderbook

MS = 1_000_000
ANCHOR = Anchor(wall_ns=1_767_312_000_000_000_000, mono_ns=5_000_000_000_000)
COINS = ("AAA", "BBB")
INSTRUMENTS = {"upbit": ["KRW-AAA", "KRW-BBB", "KRW-USDT"], "binance": ["AAAUSDT", "BBBUSDT"]}
# tick and middle of the grid, 10^-8 of the quote currency
_GRID = {
    "KRW-AAA": (10 * E8, 10_000 * E8),
    "KRW-BBB": (E8 // 100, 10 * E8),
    "KRW-USDT": (E8, 1_000 * E8),
    "AAAUSDT": (E8 // 100, 10 * E8),
    "BBBUSDT": (1_000, E8 // 100),
}
_LEVELS = re.compile(rb'("(?:orderbook_units|obu|bids|b)":)\[.*?\](?=,"(?:asks|st|stream_type|a)":)')
_FIRST_SIZE = re.compile(rb'("(?:ask_size|as)":|\[\["[0-9.]+",")([0-9.E-]+)')
SESSION = 1 << 20
_REST = b'{"method":"GET","url":"https://api.binance.com%b"}'
_SPOILS = ("cut", "utf8", "null", "minus", "nan", "level", "unknown", "total", "regress", "unsorted", "crossed", "ack", "list")


class Soup(NamedTuple):
    config: RunConfig
    frames: list[Frame]


class _Wide:
    """A book wider than its window; coin sizes are multiples of a tenth of what an order wants."""

    def __init__(self, rng: Random, name: str) -> None:
        self.rng, self.name = rng, name
        self.tick, self.middle = _GRID[name]
        self.unit = E8 // 10 * (1 if "AAA" in name else 1_000)
        self.gap = 0
        self.update_id = 1_000
        self.sides: list[dict[int, int]] = [{}, {}]
        self.told: tuple[int, list[dict[int, int]]] = (self.update_id, [{}, {}])  # by changes
        self.past: list[tuple[int, list[dict[int, int]]]] = []
        for _ in range(12):
            self.change()

    def change(self) -> None:
        rng = self.rng
        self.update_id += rng.choice((0, 1, 1, 7))
        if rng.random() < 0.1:
            self.gap = rng.choice((-1, 0, 0, 1)) if self.name == "KRW-USDT" else rng.choice((-4, -3, -1, 0, 1, 3, 4))
        for side in range(2):
            for _ in range(rng.choice((0, 1, 2))):
                away = 1 + int(7 * rng.random() ** 2)
                px = self.middle + (self.gap + (away if side else -away)) * self.tick
                size = rng.choice((0, 1, 2, 3, 5, 8, 13, 40)) * self.unit + rng.choice((0, 0, 0, 1, 7))
                self.sides[side][px] = size
            if rng.random() < 0.05:  # far from the touch
                px = self.middle + rng.randrange(9, 60) * (self.tick if side else -self.tick)
                self.sides[side][px] = rng.choice((0, 1, 5)) * self.unit
            touch = self.middle + self.gap * self.tick
            self.sides[side] = {
                px: size for px, size in self.sides[side].items() if size and (px > touch if side else px < touch)
            }

    def shown(self) -> Book:
        return _sorted(self.sides)

    def tell(self, spoil: str) -> DepthChange:
        """What has changed since the last time."""
        rng = self.rng
        last_id, sides = self.told
        self.update_id = max(self.update_id, last_id + 1)
        now = [dict(side) for side in self.sides]
        if spoil == "crossed" and now[1]:
            now[0][min(now[1]) + self.tick] = self.unit  # the next change takes it back
        self.past = [*self.past[-8:], self.told]
        self.told = (self.update_id, now)
        changes = []
        for was, side in zip(sides, now, strict=True):
            levels = [(px, side.get(px, 0)) for px in {**was, **side} if was.get(px) != side.get(px)]
            if rng.random() < 0.2:
                levels.append((self.middle + rng.randrange(-70, 70) * self.tick, 0))  # never was there, or is: then it is news
                side.pop(levels[-1][0], None)
            if rng.random() < 0.03:
                levels.append((0, self.unit))
            rng.shuffle(levels)
            changes.append(levels)
        first_id = last_id + 1 - rng.choice((0, 0, 0, 0, 2))
        return DepthChange(first_id, self.update_id, *changes)

    def snapshot(self) -> tuple[int, Book]:
        """As of now, of what was told, or of earlier."""
        update_id, sides = self.rng.choice(((self.update_id, self.sides), self.told, self.told, *self.past[-4:]))
        return update_id, _sorted(sides)


def _sorted(sides: list[dict[int, int]]) -> Book:
    levels = sorted(sides[0].items(), reverse=True), sorted(sides[1].items())
    return Book(*([level[k] for level in side] for side in levels for k in (0, 1)))


def _change(rng: Random, book: _Wide, spoil: str, time_ms: int) -> bytes:
    """A depth change, wrapped or as the raw endpoint sends it."""
    name = "NOPEUSDT" if spoil == "unknown" else book.name
    data = binance_diff(name, book.tell(spoil), time_ms)
    if spoil == "level":
        data = data.replace(b',"b":', b',"pu":1,"b":')
    if spoil == "regress":
        data = re.sub(rb'"u":[0-9]+', b'"u":1', data)
    if spoil == "total":
        name = rng.choice(("AAAUSDT", "BBBUSDT"))  # the stream of one, the symbol of another
    stream = f"{name.lower()}@depth{rng.choice(('', '@100ms'))}"
    return _spoiled(rng, binance_combined(stream, data) if rng.random() < 0.9 else data, spoil)


def _snapshot(rng: Random, book: _Wide) -> bytes:
    update_id, shown = book.snapshot()
    spoil = rng.choice((*[""] * 12, "cut", "null", "minus", "unsorted", "crossed", "empty", "error", "more", "zero"))
    if spoil == "unsorted":
        shown = shown._replace(bid_px_e8=shown.bid_px_e8[::-1])
    if spoil == "crossed":
        shown = shown._replace(bid_px_e8=[px + 90 * book.tick for px in shown.bid_px_e8])
    if spoil == "zero":
        shown = shown._replace(ask_size_e8=[0, *shown.ask_size_e8[1:]], bid_px_e8=[*shown.bid_px_e8[:-1], 0])
    body = binance_depth(shown, 0 if spoil == "empty" else update_id, depth=rng.choice((0, 2, 5, 1_000, 1_000)))
    if spoil == "error":
        return rng.choice((b'{"code":-1121,"msg":"Invalid symbol."}', b"", b"<html>", b'{"lastUpdateId":5}', b'["lastUpdateId"]'))
    return _spoiled(rng, body[:-1] + b',"more":[]}' if spoil == "more" else body, spoil)


def _payload(rng: Random, book: _Wide, units: int, depth: int, spoil: str, time_ms: int) -> bytes:
    shown = book.shown()
    if spoil == "unsorted" and len(shown.ask_px_e8) > 1:
        shown = shown._replace(ask_px_e8=[shown.ask_px_e8[1], shown.ask_px_e8[0], *shown.ask_px_e8[2:]])
    if spoil == "crossed" and shown.ask_px_e8 and shown.bid_px_e8:
        shown = shown._replace(bid_px_e8=[px + 40 * book.tick for px in shown.bid_px_e8])
    if book.name.startswith("KRW-"):
        if spoil in ("ack", "list"):
            return rng.choice((b'{"status":"UP"}', b'{"error":{"name":"X","message":"y"}}', b"[]", b'{"type":"trade"}'))
        code = "KRW-NOPE" if spoil == "unknown" else book.name
        level = E8 if spoil == "level" else 0
        simple, snapshot = rng.random() < 0.3, rng.random() < 0.1
        good = upbit_orderbook(code, shown, time_ms, units=units, simple=simple, snapshot=snapshot, level_e8=level)
        if spoil == "total":
            good = good.replace(b'_ask_size":', b'_ask_size":1', 1).replace(b'"tas":', b'"tas":1', 1)
    else:
        if spoil in ("ack", "list"):
            return rng.choice((b'{"result":null,"id":1}', b'{"error":{"code":2}}', b'{"stream":"x@trade","data":{}}'))
        name = "nope" if spoil == "unknown" else book.name.lower()
        update_id = book.update_id - (500 if spoil == "regress" else 0)
        good = binance_combined(f"{name}@depth{depth}@100ms", binance_depth(shown, update_id, depth=depth))
    return _spoiled(rng, good, spoil)


def _spoiled(rng: Random, good: bytes, spoil: str) -> bytes:
    match spoil:
        case "cut":
            return good[: rng.randrange(len(good))]
        case "utf8":
            return good.replace(b'"', b'"\xff', 1)
        case "null":
            return _LEVELS.sub(rb"\1null", good, count=1)
        case "minus":
            return _FIRST_SIZE.sub(rb"\1-\2", good, count=1)
        case "nan":
            return _FIRST_SIZE.sub(rb"\1NaN", good, count=1)
    return good


def _exchange_info(rng: Random) -> bytes:
    filters = (
        b'{"filterType":"PRICE_FILTER","tickSize":"0.01"},{"filterType":"LOT_SIZE","stepSize":"%b"},{"filterType":"NOTIONAL",'
    )
    filters += b'"minNotional":"%b"}'
    symbols = [
        b'{"symbol":"%b","filters":[%b]}'
        % (name, filters % (rng.choice((b"0.1", b"0.5", b"1")), rng.choice((b"2", b"3.5", b"0"))))
        for name in (b"AAAUSDT", b"BBBUSDT")
    ]
    return rng.choice((b'{"symbols":[%b]}', b'{"symbols":[%b]}', b'{"symbols":[%b]')) % b",".join(symbols)


def random_config(rng: Random, binance_depth: Literal["auto", "partial", "diff"]) -> RunConfig:
    few = rng.random() < 0.4  # accounts that run dry
    coins = {"AAA": rng.choice(("1", "2.5", "7")) if few else "1000", "BBB": rng.choice(("900", "5000")) if few else "9000000"}
    return RunConfig(
        symbols=COINS if rng.random() < 0.8 else ("BBB",),
        aggregator=AggregatorConfig(
            stale_s=rng.choice((0.2, 1.0, 2.0)),
            fx_stale_s=rng.choice((1.0, 2.0, 10.0)),
            binance_depth=binance_depth,
        ),
        policy=PolicyConfig(
            entry_bps=rng.choice((5.0, 10.0, 20.0)),
            tp_bps=rng.choice((0.0, 10.0, 25.0, 45.0)),
            size_krw=rng.choice(("1500", "4000", "9000", "20000", "50000.5")),
            max_position_krw=rng.choice(("20000", "100000", "1000000")),
        ),
        paper=PaperConfig(
            upbit_latency_ms=rng.choice((0.0, 1.0, 20.0, 120.0)),
            binance_latency_ms=rng.choice((0.0, 1.0, 60.0, 300.0)),
            upbit_fee_bps=rng.choice((0.0, 5.0, 13.9)),
            binance_fee_bps=rng.choice((0.0, 7.5, 10.0)),
            binance_fee_in=rng.choice(("received", "quote")),
            upbit_krw="30000" if few else "100000000",
            binance_usdt="25.5" if few else "100000",
            upbit_coins=coins,
            binance_coins=coins,
        ),
        rules={}
        if rng.random() < 0.2  # then the tape brings them
        else {
            "AAA": RuleOverride(lot=rng.choice(("0.1", "0.00000001")), upbit_min_notional="2000", binance_min_notional="2"),
            "BBB": RuleOverride(lot=rng.choice(("1", "0.3")), upbit_min_notional="2000", binance_min_notional="2"),
        },
    )


def soup(seed: int, messages: int = 400) -> Soup:
    """A configuration and the frames of a session, from ``seed`` alone."""
    rng = Random(seed)
    changes = rng.choice((0.0, 0.0, 0.7, 1.0))  # how much of Binance is told by changes
    made_of = rng.choice(
        ("auto", "partial") if not changes else ("auto", "diff", "diff") if changes < 1 else ("auto", "auto", "diff")
    )
    config = random_config(rng, made_of)
    units, depth = rng.choice((1, 5, 15)), rng.choice((5, 10))
    books = [_Wide(rng, name) for name in _GRID]
    weights = (4, 4, 1, 4, 4)
    bad = rng.choice((0.0, 0.02, 0.1))
    copies = rng.choice((0.0, 0.0, 0.0, 0.0, 0.9))  # how much a second recorder heard
    conns = {"upbit": 1, "binance": 2}
    frames: list[Frame] = []
    late: list[tuple[int, str, FrameKind, Op, bytes, int]] = []
    asked: list[_Wide] = []
    mono_ns = ANCHOR.mono_ns

    def add(venue: str, kind: FrameKind, payload: bytes, conn: int) -> None:
        op = (Op.BINARY if venue == "upbit" else Op.TEXT) if kind is FrameKind.MESSAGE else Op.NONE
        frames.append(Frame(len(frames) + 1, mono_ns, mono_ns, venue, conn, kind, op, payload))
        if rng.random() < copies:
            late.append((len(frames) + rng.choice((0, 0, 1, 3)), venue, kind, op, payload, conn + SESSION))
        while late and late[0][0] <= len(frames):
            _, *copy, conn = late.pop(0)
            frames.append(Frame(len(frames) + 1, mono_ns, mono_ns, copy[0], conn, *copy[1:]))  # type: ignore[arg-type]

    def rest() -> None:
        """Requests and answers: none, one, or the wrong one."""
        book = rng.choice(books[3:])
        draw = rng.random()
        if draw < 0.5:
            asked.append(book)
            url = b"/api/v3/depth?" + rng.choice((b"symbol=%b&limit=1000", b"limit=5&symbol=%b")) % book.name.encode()
            add("binance", FrameKind.REQUEST, _REST % url, 0)
        elif draw < 0.53:
            other = (
                b"/api/v3/exchangeInfo",
                b"/fapi/v1/depth?symbol=AAAUSDT",
                b"/api/v3/depth?symbol=NOPEUSDT",
                b"",
                b"/api/v3/depth",
            )
            add("binance", FrameKind.REQUEST, rng.choice((_REST % rng.choice(other), b"{}", b"not JSON")), 0)
        elif asked or draw < 0.54:
            add("binance", FrameKind.RESPONSE, _snapshot(rng, asked.pop() if asked else book), 0)

    rules_after = rng.randrange(60)
    while len(frames) < messages:
        if len(frames) == rules_after or rng.random() < 0.005:
            add("binance", FrameKind.RESPONSE, _exchange_info(rng), 0)
        mono_ns += rng.choice((0, 0, 1, MS, MS, 5 * MS, 20 * MS, 20 * MS, 60 * MS, 100 * MS))
        if rng.random() < 0.01:
            mono_ns += rng.choice((-30 * MS, 500 * MS, 2_000 * MS, 2_000 * MS + 1, 3_000 * MS))
        book = rng.choices(books, weights)[0]
        venue = "upbit" if book.name.startswith("KRW-") else "binance"
        if changes and rng.random() < 0.15:
            rest()
        draw = rng.random()
        time_ms = (mono_ns - ANCHOR.mono_ns) // MS + 1_000
        if draw < bad / 4:
            covered = rng.random() < 0.2
            add(venue, FrameKind.CLOSED, b'{"covered":true}' if covered else b"{}", conns[venue] if rng.random() < 0.8 else 1)
            conns[venue] = max(conns.values()) + 1
        elif draw < bad / 3:
            kind = rng.choice((FrameKind.CLOCK, FrameKind.ALARM, FrameKind.ALARM, FrameKind.RESPONSE, FrameKind.SENT))
            add(venue, kind, rng.choice((b"{}", b'{"alarm":"dropped"}')), conns[venue])
        else:
            spoil = rng.choice(_SPOILS) if draw < bad else ""
            if not spoil and rng.random() < 0.8:
                book.change()
            if venue == "binance" and rng.random() < changes:
                payload = _change(rng, book, spoil, time_ms)
                if rng.random() < bad / 2:
                    continue  # lost
                add(venue, FrameKind.MESSAGE, payload, conns[venue])
                if rng.random() < 0.1:  # another connection tells it too
                    add(venue, FrameKind.MESSAGE, payload, conns[venue] + rng.choice((0, 1)))
            else:
                add(venue, FrameKind.MESSAGE, _payload(rng, book, units, depth, spoil, time_ms), conns[venue])
    return Soup(config, frames[:messages])
