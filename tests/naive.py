"""The slow obvious twin of the engine: dicts, lists, Python integers and fractions, one frame at a time.

It is written from the documented rules and shares no arithmetic, no decoder and no loop with the core; only configuration, rule
tables and the names of events are the core's. What it writes is compared with the compiled engine row by row.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from math import nan
from typing import TYPE_CHECKING, Any

from arbl2.config import STARTING_COINS
from arbl2.events import Direction, FillStatus, Intent, Outcome, Side
from arbl2.frames import FrameKind
from arbl2.rules import BinanceRules, binance_rules, pair_rules

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from arbl2.config import RunConfig
    from arbl2.frames import Anchor, Frame

E8 = 10**8
INT64_MAX = 2**63 - 1
TOO_MUCH = 2**62  # an order worth more is refused
MOST_LEVELS = 30
MOST_CHANGES = 10_000  # levels a side of a depth change or a snapshot
MOST_RUNGS = 8_192  # levels a side of a full book
MOST_HELD, MOST_HELD_LEVELS = 256, 20_000  # what is kept for a snapshot to come
SESSION = 2**20  # connection numbers of one session in a merged run
GONE = -1  # instead of a connection
SNAPSHOT, CHANGE, BEYOND = 1, 2, 3  # how a level of a full book is known
MOST_DIGITS = 400
MOST_TAKES = 120
OUT_OF_SIGHT_NS = 60 * 10**9
MOST_ORDERS = 512
VENUE_CODE = {"upbit": 1, "binance": 2}
ABSENT = object()
QUOTE = {"upbit": "KRW", "binance": "USDT"}

# ------------------------------------------------------------------------------------------------------------- messages


class Refused(Exception):
    """Bad input: (reason, instrument or "")."""


@dataclass
class Message:
    """Levels are (price, size) in 10^-8, as sent: a book's best first, a change's in any order."""

    reason: str
    name: str = ""
    update_id: int = 0
    bids: list[tuple[int, int]] = field(default_factory=list)
    asks: list[tuple[int, int]] = field(default_factory=list)
    first_id: int = 0
    exchange_ms: int = 0
    conn: int = 0


def _no_constant(text: str) -> Any:
    raise ValueError(text)


def _json(payload: bytes) -> Any:
    try:
        return json.loads(payload.decode("utf-8"), parse_float=Decimal, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused("not_json", "") from None


def _e8(value: Decimal | int, name: str, *, price: bool) -> int:
    if value < 0:
        raise Refused("negative", name)
    if len(Decimal(value).as_tuple().digits) > MOST_DIGITS:
        raise Refused("bad_number", name)
    scaled = Fraction(value) * E8
    if price and scaled.denominator != 1:
        raise Refused("off_scale", name)
    if scaled >= INT64_MAX + 1:
        raise Refused("too_large", name)
    return int(scaled)  # sizes are rounded down: never overstated


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused("wrong_shape", name)
    if not 0 <= value <= INT64_MAX:
        raise Refused("negative" if value < 0 else "too_large", name)
    return value


def _json_number(value: Any, name: str, *, price: bool = False) -> int:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise Refused("wrong_shape", name)
    return _e8(value, name, price=price)


def _text_number(value: Any, name: str, *, price: bool) -> int:
    if not isinstance(value, str):
        raise Refused("wrong_shape", name)
    if not re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", value):
        raise Refused("bad_number", name)
    return _e8(Decimal(value), name, price=price)


def _checked(message: Message, totals: tuple[int, int] | None) -> Message:
    sums = [sum(size for _, size in side) for side in (message.bids, message.asks)]
    counts = [len(message.bids), len(message.asks)]
    message.bids = [level for level in message.bids if level[0] and level[1]]
    message.asks = [level for level in message.asks if level[0] and level[1]]
    bids, asks = ([px for px, _ in side] for side in (message.bids, message.asks))
    if sorted(set(bids), reverse=True) != bids or sorted(set(asks)) != asks:
        raise Refused("unsorted", message.name)
    if bids and asks and bids[0] >= asks[0]:
        raise Refused("crossed", message.name)
    if totals is not None:
        for stated, added, count in zip(totals, sums, counts, strict=True):
            # the venue adds doubles: the 16th digit may differ
            if abs(added - stated) > count + 1 + Fraction(stated, 10**14):
                raise Refused("total_mismatch", message.name)
    return message


def read_upbit(payload: bytes, known: set[str]) -> Message:
    if payload.startswith(b"["):
        return Message("other_message")
    body = _json(payload)
    if not isinstance(body, dict):
        raise Refused("wrong_shape", "")
    if "error" in body:
        return Message("venue_error")
    if "status" in body and "type" not in body:
        return Message("up")
    if "method" in body or "mthd" in body:
        return Message("ack")

    def get(members: dict[str, Any], key: str, short: str) -> Any:
        return members.get(key, members.get(short))

    kind = get(body, "type", "ty")
    if not isinstance(kind, str):
        raise Refused("wrong_shape", "")
    if kind != "orderbook":
        return Message({"trade": "trade", "ticker": "ticker"}.get(kind, "other_message"))
    name = get(body, "code", "cd")
    if not isinstance(name, str):
        raise Refused("wrong_shape", "")
    if name not in known:
        return Message("unknown_instrument")
    level = body.get("level", body.get("lv", ABSENT))
    if level is not ABSENT and _json_number(level, name) != 0:
        return Message("grouped_book")
    units = get(body, "orderbook_units", "obu")
    if not isinstance(units, list) or not all(isinstance(unit, dict) for unit in units):
        raise Refused("wrong_shape", name)
    if len(units) > MOST_LEVELS:
        raise Refused("too_many_levels", name)
    exchange_ms = _count(get(body, "timestamp", "tms"), name)
    bids = [
        (_json_number(get(u, "bid_price", "bp"), name, price=True), _json_number(get(u, "bid_size", "bs"), name)) for u in units
    ]
    asks = [
        (_json_number(get(u, "ask_price", "ap"), name, price=True), _json_number(get(u, "ask_size", "as"), name)) for u in units
    ]
    totals = [body.get(key, body.get(short, ABSENT)) for key, short in (("total_bid_size", "tbs"), ("total_ask_size", "tas"))]
    stated = None if ABSENT in totals else (_json_number(totals[0], name), _json_number(totals[1], name))
    return _checked(Message("book", name, 0, bids, asks, exchange_ms=exchange_ms), stated)


def read_binance(payload: bytes, known: set[str]) -> Message:
    body = _json(payload)
    if not isinstance(body, dict):
        raise Refused("wrong_shape", "")
    if "stream" not in body:
        if _event_name(body) == "depthUpdate":
            return _depth_change(body, "", known)
        if "error" in body or ("code" in body and "msg" in body):
            return Message("venue_error")
        if "result" in body:
            return Message("ack")
        if "lastUpdateId" in body:  # a partial depth of /ws: of which symbol?
            raise Refused("wrong_shape", "")
        return Message(_other(body, ""))
    stream = body["stream"]
    if not isinstance(stream, str):
        raise Refused("wrong_shape", "")
    if stream == "!serverShutdown":
        return Message("shutdown")
    match = re.fullmatch(r"([a-z0-9]{1,24})@depth(5|10|20)?(@100ms)?", stream)
    name = match[1].upper() if match else ""
    data = body.get("data")
    if not isinstance(data, dict):
        raise Refused("wrong_shape", name)
    if _event_name(data) == "depthUpdate":
        return _depth_change(data, name, known)
    if match is None or match[2] is None:
        return Message(_other(data, stream))
    if name not in known:
        return Message("unknown_instrument")
    update_id = _count(data.get("lastUpdateId"), name)
    sides = [_levels(data.get(key), name, MOST_LEVELS) for key in ("bids", "asks")]
    return _checked(Message("book", name, update_id, *sides), None)


def _event_name(data: dict[str, Any]) -> str:
    if "e" in data and not isinstance(data["e"], str):
        raise Refused("wrong_shape", "")
    return str(data.get("e", ""))


def _other(data: dict[str, Any], stream: str) -> str:
    if "e" in data:
        kinds = {"trade": "trade", "aggTrade": "trade", "24hrTicker": "ticker", "serverShutdown": "shutdown"}
        return kinds.get(data["e"], "other_message")
    ticks = stream.endswith("@bookTicker") or all(key in data for key in "usbBaA")
    return "book_ticker" if ticks else "other_message"


def _levels(levels: Any, name: str, most: int) -> list[tuple[int, int]]:
    if not isinstance(levels, list) or not all(isinstance(level, list) and len(level) >= 2 for level in levels):
        raise Refused("wrong_shape", name)
    if len(levels) > most:
        raise Refused("too_many_levels", name)
    return [(_text_number(level[0], name, price=True), _text_number(level[1], name, price=False)) for level in levels]


def _depth_change(data: dict[str, Any], streamed: str, known: set[str]) -> Message:
    name = data.get("s")
    if not isinstance(name, str) or (streamed and name != streamed):
        raise Refused("wrong_shape", streamed)
    if "pu" in data:  # futures: another chain
        raise Refused("futures", name)
    if name not in known:
        return Message("unknown_instrument")
    first_id, last_id = _count(data.get("U"), name), _count(data.get("u"), name)
    if first_id > last_id:
        raise Refused("wrong_shape", name)
    exchange_ms = _count(data.get("E"), name)
    bids, asks = (_levels(data.get(key), name, MOST_CHANGES) for key in ("b", "a"))
    return Message("diff", name, last_id, bids, asks, first_id, exchange_ms)


def read_snapshot(body: bytes) -> Message:
    """The body of a REST answer; one without a ``lastUpdateId`` is no snapshot."""
    if b'"lastUpdateId"' not in body:
        return Message("rest")
    data = _json(body)
    if not isinstance(data, dict):
        raise Refused("wrong_shape", "")
    last_id = _count(data.get("lastUpdateId"), "")
    bids, asks = (_levels(data.get(key), "", MOST_CHANGES) for key in ("bids", "asks"))
    return _checked(Message("snapshot" if last_id else "rest", "", last_id, bids, asks), None)


def asked_for(request: bytes) -> str:
    """The symbol of a depth request, "" for another request."""
    try:
        url = _json(request)["url"]
        path, _, query = url.partition("#")[0].partition("?")
        symbols = [value for key, _, value in (part.partition("=") for part in query.split("&")) if key == "symbol"]
    except (Refused, KeyError, TypeError, AttributeError):
        return ""
    return symbols[0] if path.endswith("/api/v3/depth") and symbols else ""


def stated_rules(body: bytes) -> dict[str, BinanceRules]:
    """Order rules in a recorded exchangeInfo; a symbol that lacks one of the three is left out."""
    info, out = _json(body), {}
    if not isinstance(info, dict) or not isinstance(info.get("symbols"), list):
        raise Refused("bad_rules", "")
    for symbol in info["symbols"]:
        filters = {one["filterType"]: one for one in symbol["filters"]}
        texts = [
            filters.get("PRICE_FILTER", {}).get("tickSize", "0"),
            filters.get("LOT_SIZE", {}).get("stepSize", "0"),
            filters.get("NOTIONAL", filters.get("MIN_NOTIONAL", {})).get("minNotional", "0"),
        ]
        tick, lot, least = (_text_number(text, "", price=True) for text in texts)
        if tick and lot and least:
            out[symbol["symbol"]] = BinanceRules(tick, lot, least)
    return out


# ---------------------------------------------------------------------------------------------------------------- money


def notional(px: int, qty: int, *, up: bool) -> int:
    """10^-8 of the quote currency, rounded against us or down."""
    exact = Fraction(px * qty, E8)
    return -(-exact.numerator // exact.denominator) if up else exact.numerator // exact.denominator


def fee_of(amount: int, ppm: int) -> int:
    return -(-amount * ppm // 10**6)


# ---------------------------------------------------------------------------------------------------------------- books


@dataclass
class Take:
    """What our orders took from one level and the venue has not shown anew."""

    qty: int
    seen_ns: int  # when the level was last displayed


@dataclass(eq=False)
class Book:
    venue: str
    bids: list[tuple[int, int]] = field(default_factory=list)
    asks: list[tuple[int, int]] = field(default_factory=list)
    taken_bids: dict[int, Take] = field(default_factory=dict)
    taken_asks: dict[int, Take] = field(default_factory=dict)
    last_ns: int = 0
    conn: int = 0
    update_id: int = 0
    exchange_ms: int = 0
    updates: int = 0
    gaps: Counter[str] = field(default_factory=Counter)  # time between updates over one connection, up to "600 s" or more
    connected: bool = False
    trusted: bool = False
    windowed: bool = False  # whole windows make it
    synced: bool = False  # its ladder is a snapshot with every change since
    held: list[Message] = field(default_factory=list)  # changes that wait for the snapshot
    ladder: dict[str, dict[int, tuple[int, int]]] = field(default_factory=lambda: {"bid": {}, "ask": {}})  # size, how known
    range: dict[str, int | None] = field(default_factory=lambda: {"bid": None, "ask": None})  # the worst price that is known

    # --- full books

    def hold(self, message: Message) -> None:
        levels = sum(len(one.bids) + len(one.asks) for one in (*self.held, message))
        if len(self.held) == MOST_HELD or levels > MOST_HELD_LEVELS:
            self.held = []
        self.held.append(message)

    def load(self, snapshot: Message) -> None:
        for side, levels in (("bid", snapshot.bids), ("ask", snapshot.asks)):
            kept = levels[:MOST_RUNGS]
            self.ladder[side] = {px: (qty, SNAPSHOT) for px, qty in kept}
            self.range[side] = kept[-1][0] if kept else None
        self.update_id = snapshot.update_id

    def change(self, message: Message) -> None:
        for side, levels in (("bid", message.bids), ("ask", message.asks)):
            for px, qty in levels:
                self._set(side, px, qty)
        self.update_id = message.update_id

    def _set(self, side: str, px: int, qty: int) -> None:
        rungs = self.ladder[side]
        if qty == 0:
            rungs.pop(px, None)
        elif px:
            rungs[px] = (qty, CHANGE if self.knows(side, px) else BEYOND)
        if len(rungs) > MOST_RUNGS:
            worst = self.worst(side)
            del rungs[worst]
            if self.knows(side, worst):
                self.range[side] = self.worst(side)

    def worst(self, side: str) -> int:
        return min(self.ladder[side]) if side == "bid" else max(self.ladder[side])

    def knows(self, side: str, px: int) -> bool:
        end = self.range[side]
        return end is not None and (px >= end if side == "bid" else px <= end)

    def rungs(self, side: str) -> list[tuple[int, int, int]]:
        """(price, size, how known), best first."""
        return [(px, *self.ladder[side][px]) for px in sorted(self.ladder[side], reverse=side == "bid")]

    def show(self) -> bool:
        """The best known levels are what is displayed; False if they are crossed."""
        self.bids, self.asks = (
            [(px, qty) for px, qty, _ in self.rungs(side)[:MOST_LEVELS] if self.knows(side, px)] for side in ("bid", "ask")
        )
        return not self.bids or not self.asks or self.bids[0][0] < self.asks[0][0]

    # --- what is displayed

    def levels(self, side: str) -> list[tuple[int, int]]:
        return self.bids if side == "bid" else self.asks

    def takes(self, side: str) -> dict[int, Take]:
        return self.taken_bids if side == "bid" else self.taken_asks

    def active(self, time_ns: int, stale_ns: int) -> bool:
        return self.connected and self.trusted and time_ns - self.last_ns <= stale_ns

    def taken(self, side: str, px: int) -> int:
        return self.takes(side)[px].qty if px in self.takes(side) else 0

    def touch(self, side: str) -> int:
        """Best price that has something left for us; 0 if none."""
        return next((px for px, qty in self.levels(side) if qty > self.taken(side, px)), 0)

    def displayed_touch(self, side: str) -> int:
        return self.levels(side)[0][0] if self.levels(side) else 0

    def reachable(self, side: str, limit: int) -> list[tuple[int, int]]:
        return [(px, qty) for px, qty in self.levels(side) if (px >= limit if side == "bid" else px <= limit)]

    def depth(self, side: str, limit: int) -> int:
        return sum(qty for _, qty in self.reachable(side, limit))

    def take(self, side: str, px: int, qty: int, time_ns: int) -> None:
        takes = self.takes(side)
        if px in takes:
            takes[px].qty += qty
            return
        if len(takes) == MOST_TAKES:
            del takes[min(takes) if side == "bid" else max(takes)]  # the farthest from the touch
        takes[px] = Take(qty, time_ns)

    def heal(self, side: str, now: int) -> None:
        """What we took stays taken, but not more than is displayed; gone inside the window is gone, out of sight is remembered
        for a minute.
        """
        levels, shown, takes = self.levels(side), dict(self.levels(side)), self.takes(side)
        for px, take in list(takes.items()):
            out_of_sight = levels and (px < levels[-1][0] if side == "bid" else px > levels[-1][0])
            if not out_of_sight:
                take.qty, take.seen_ns = min(take.qty, shown.get(px, 0)), now
            if take.qty == 0 or now - take.seen_ns > OUT_OF_SIGHT_NS:
                del takes[px]


def walk(book: Book, side: str, limit: int, size: int, *, own: Mapping[int, int] | None = None) -> list[tuple[int, int]]:
    """(price, size) taken level by level from what is displayed, in reach, and not taken by others of our orders."""
    out: list[tuple[int, int]] = []
    left = size
    for px, qty in book.reachable(side, limit):
        free = qty - max(book.taken(side, px) - (own or {}).get(px, 0), 0)
        if left and free > 0:
            out.append((px, min(free, left)))
            left -= out[-1][1]
    return out


def cost(takes: Iterable[tuple[int, int]], side: str) -> int:
    return sum(notional(px, qty, up=side == "ask") for px, qty in takes)


# --------------------------------------------------------------------------------------------------------------- engine


def edges(upbit_bid: int, upbit_ask: int, binance_bid: int, binance_ask: int, fx_bid: int, fx_ask: int) -> dict[Direction, float]:
    """Gross edges in bps, NaN where a price is missing (0)."""
    edge = dict.fromkeys(Direction, nan)
    if upbit_bid and binance_ask and fx_ask:  # the USDT spent is bought back at the ask
        edge[Direction.SELL_UPBIT] = (upbit_bid / (binance_ask * (fx_ask / 1e8)) - 1.0) * 10_000.0
    if upbit_ask and binance_bid and fx_bid:
        edge[Direction.BUY_UPBIT] = (binance_bid * (fx_bid / 1e8) / upbit_ask - 1.0) * 10_000.0
    return edge


@dataclass
class Order:
    row: dict[str, Any]  # the fill event it will become
    venue: str
    symbol: str
    book: Book
    lock: int
    executed: bool = False
    conn: int = 0
    took: dict[int, int] = field(default_factory=dict)

    @property
    def buys(self) -> bool:
        return self.row["side"] == Side.BUY

    @property
    def book_side(self) -> str:
        return "ask" if self.buys else "bid"


@dataclass
class Pair:
    index: int
    symbol: str
    books: dict[str, Book]
    lot: int = 0  # 0: no rules, not traded
    min_notional: dict[str, int] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=lambda: {"upbit": 0, "binance": 0})
    in_flight: int = 0
    episode: dict[Direction, bool] = field(default_factory=lambda: dict.fromkeys(Direction, False))
    refused: dict[Direction, Outcome] = field(default_factory=lambda: dict.fromkeys(Direction, Outcome.ACCEPTED))


@dataclass
class View:
    """What the policy sees of a pair."""

    upbit_bid: int
    upbit_ask: int
    binance_bid: int
    binance_ask: int
    fx_bid: int
    fx_ask: int
    edge: dict[Direction, float]
    shown_edge: dict[Direction, float]  # at the displayed prices, whatever we took


@dataclass
class Ask:
    direction: Direction
    intent: Intent
    upbit_size: int
    binance_size: int


class NaiveEngine:
    """Feed frames in order, then ``finish``. Results: decisions, fills, balance, reasons, refusals."""

    def __init__(self, instruments: Mapping[str, Sequence[str]], config: RunConfig) -> None:
        self.config = config
        kept = {f"KRW-{coin}" for coin in config.symbols} | {"KRW-USDT"} | {f"{coin}USDT" for coin in config.symbols}
        self.books = {
            venue: {name: Book(venue) for name in instruments.get(venue, ()) if not config.symbols or name in kept}
            for venue in VENUE_CODE
        }
        self.fx = self.books["upbit"].get("KRW-USDT")
        upbit = {name.removeprefix("KRW-") for name in self.books["upbit"]}
        binance = {name.removesuffix("USDT") for name in self.books["binance"]}
        symbols = sorted(set(config.symbols) or upbit & binance)
        self.pairs = []
        for index, symbol in enumerate(symbols):
            books = {"upbit": self.books["upbit"][f"KRW-{symbol}"], "binance": self.books["binance"][f"{symbol}USDT"]}
            self.pairs.append(Pair(index, symbol, books))
        names = sorted(set(instruments.get("binance", ())))
        self.lone_name = names[0] if len(names) == 1 else ""
        self.asked: dict[int, str] = {}  # by session: what its last REST request asked for
        self.recorded_rules: dict[str, BinanceRules] = {}
        self._set_rules()
        paper = config.paper
        self.latency_ns = {"upbit": round(paper.upbit_latency_ms * 10**6), "binance": round(paper.binance_latency_ms * 10**6)}
        self.fee_ppm = {"upbit": round(paper.upbit_fee_bps * 100), "binance": round(paper.binance_fee_bps * 100)}
        self.stale_ns = round(config.aggregator.stale_s * 10**9)
        self.fx_stale_ns = round(config.aggregator.fx_stale_s * 10**9)
        self.balance = {
            "upbit": {"KRW": int(Decimal(paper.upbit_krw) * E8)},
            "binance": {"USDT": int(Decimal(paper.binance_usdt) * E8)},
        }
        for venue, coins in (("upbit", paper.upbit_coins), ("binance", paper.binance_coins)):
            for symbol in symbols:
                self.balance[venue][symbol] = int(Decimal(coins.get(symbol, STARTING_COINS.get(symbol, "0"))) * E8)
        self.orders: list[Order] = []  # sent and not yet written, in the order sent
        self.time_ns = 0
        self.sent = 0
        self.decided = 0
        self.frames = 0
        self.decisions: list[dict[str, Any]] = []
        self.fills: list[dict[str, Any]] = []
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.refusals: Counter[str] = Counter()

    def _set_rules(self) -> None:
        """Order rules: as configured, else as recorded, else built in, else none."""
        for pair in self.pairs:
            override = self.config.rules.get(pair.symbol)
            name = f"{pair.symbol}USDT"
            if name in self.recorded_rules or binance_rules(name) or (override and override.lot):
                rules = pair_rules(pair.symbol, self.config.rules, self.recorded_rules)
                pair.lot = rules.lot_e8
                pair.min_notional = {"upbit": rules.upbit_min_notional_e8, "binance": rules.binance_min_notional_e8}

    # --- frames

    def feed(self, frames: Iterable[Frame], anchor: Anchor) -> NaiveEngine:
        for frame in frames:
            self.frame(frame, anchor.wall_ns + frame.mono_ns - anchor.mono_ns)
        return self

    def frame(self, frame: Frame, time_ns: int) -> None:
        self.frames += 1
        self.time_ns = max(self.time_ns, time_ns)
        self._execute_due(self.time_ns)
        reason = {FrameKind.RESPONSE: "rest"}.get(frame.kind, frame.kind.name.lower())
        if frame.kind == FrameKind.MESSAGE and frame.venue:
            self._message(frame)
            return
        lost = frame.kind == FrameKind.ALARM and b'"alarm":"dropped"' in frame.payload
        if lost or (frame.kind == FrameKind.CLOSED and b'"covered":true' not in frame.payload):
            for book in self.books[frame.venue].values():
                for message in book.held:
                    if message.conn == frame.conn:
                        message.conn = GONE
                if book.connected and book.conn == frame.conn:
                    book.connected = frame.kind != FrameKind.CLOSED
                    self._doubt(book)
        elif frame.kind == FrameKind.REQUEST and frame.venue == "binance":
            self.asked[frame.conn // SESSION] = asked_for(frame.payload)
        elif frame.kind == FrameKind.RESPONSE and frame.venue == "binance":
            reason = self._response(frame)
        self.reasons[frame.venue or "-", reason] += 1

    def _response(self, frame: Frame) -> str:
        if b'"symbols"' in frame.payload:
            try:
                self.recorded_rules |= stated_rules(frame.payload)
                self._set_rules()
            except Refused:
                return "bad_rules"
        try:
            message = read_snapshot(frame.payload)
        except Refused as refused:
            return str(refused.args[0])
        if message.reason != "snapshot":
            return "rest"
        # a body does not say of which symbol it is; where nothing was ever asked, a single instrument leaves no doubt
        known, session = self.books["binance"], frame.conn // SESSION
        name = self.asked.get(session, self.lone_name)
        if session in self.asked:
            self.asked[session] = ""
        if name in known and self._is_made_of_changes(known[name]):
            return self._snapshot(known[name], message, frame.seq)
        return "rest"

    def _message(self, frame: Frame) -> None:
        read = read_upbit if frame.venue == "upbit" else read_binance
        known = self.books[frame.venue]
        try:
            message = read(frame.payload, set(known))
        except Refused as refused:
            reason, name = refused.args
            self.reasons[frame.venue, reason] += 1
            if name in known:
                self._doubt(known[name])
            return
        reason, message.conn = message.reason, frame.conn
        if reason == "book":
            reason = self._window(known[message.name], message, frame.seq)
        elif reason == "diff" and self._is_made_of_changes(known[message.name]):
            reason = self._change(known[message.name], message, frame.seq)
        self.reasons[frame.venue, reason] += 1

    # --- books

    def _is_made_of_changes(self, book: Book) -> bool:
        depth = self.config.aggregator.binance_depth
        return depth == "diff" or (depth == "auto" and not book.windowed)

    def _window(self, book: Book, message: Message, seq: int) -> str:
        if book.venue == "binance" and self.config.aggregator.binance_depth == "diff":
            return "book"
        if self._is_copy(book, message):
            return "copy"
        if book.windowed and 0 < message.update_id < book.update_id and message.conn == book.conn:
            self._doubt(book)
            return "id_regress"
        book.windowed = True
        book.bids, book.asks = message.bids, message.asks
        self._renew(book, message)
        self._changed(book, seq)
        return "book"

    def _is_copy(self, book: Book, message: Message) -> bool:
        """Told by another session than the one that feeds the book, and no news, while that one is well."""
        if not book.updates or message.conn // SESSION == book.conn // SESSION or not book.active(self.time_ns, self.stale_ns):
            return False
        if message.update_id:
            return message.update_id <= book.update_id
        return message.exchange_ms <= book.exchange_ms

    def _change(self, book: Book, message: Message, seq: int) -> str:
        if not book.synced:  # steps 1 and 2: keep it until the snapshot comes
            book.hold(message)
            return "diff"
        if message.update_id <= book.update_id:  # known already
            return "diff"
        if message.first_id > book.update_id + 1:  # something is missing: from the beginning
            book.synced, book.held = False, [message]
            self._doubt(book)
            return "sequence_gap"
        book.change(message)
        return self._rebuilt(book, message, seq, "diff")

    def _snapshot(self, book: Book, snapshot: Message, seq: int) -> str:
        if book.synced and snapshot.update_id <= book.update_id:
            return "rest"  # the book is further on
        book.load(snapshot)  # step 6
        newer = [message for message in book.held if message.update_id > snapshot.update_id]  # step 5
        applied = None
        for message in newer:
            if message.update_id <= book.update_id:
                continue  # another connection told it too
            if message.first_id > book.update_id + 1:  # steps 3 and 4: too old, ask for another
                book.synced = book.trusted = False
                return "rest"
            book.change(message)
            applied = message
        book.synced, book.held = True, []
        # without a change over a connection that is still there nothing says that the book goes on
        return self._rebuilt(book, applied, seq, "rest") if applied and applied.conn != GONE else "rest"

    def _rebuilt(self, book: Book, message: Message, seq: int, reason: str) -> str:
        self._renew(book, message)
        if not book.show():
            self._doubt(book)
            return "crossed"
        self._changed(book, seq)
        return reason

    def _renew(self, book: Book, message: Message) -> None:
        if book.updates and message.conn == book.conn:
            ms = (self.time_ns - book.last_ns) // 10**6
            book.gaps[f"{ms} ms" if ms < 1_000 else f"{min(ms // 1_000, 600)} s"] += 1
        book.update_id, book.exchange_ms, book.conn = message.update_id, message.exchange_ms, message.conn
        book.last_ns, book.connected, book.trusted = self.time_ns, True, True
        book.updates += 1

    def _changed(self, book: Book, seq: int) -> None:
        self._resolve(book, good=True)
        book.heal("bid", self.time_ns)
        book.heal("ask", self.time_ns)
        for pair in self.pairs:
            if (book is self.fx or book in pair.books.values()) and pair.in_flight == 0:
                self._look(pair, seq)

    def _doubt(self, book: Book) -> None:
        book.trusted = False
        self._resolve(book, good=False)

    # --- orders meet books

    def _execute_due(self, before_ns: int) -> None:
        due = [order for order in self.orders if not order.executed and order.row["arrive_ns"] < before_ns]
        for order in sorted(due, key=lambda order: order.row["arrive_ns"]):  # stable: ties in the order sent
            self._execute(order)

    def _execute(self, order: Order) -> None:
        book, row, side, venue = order.book, order.row, order.book_side, order.venue
        self.pairs[row["symbol"]].in_flight -= 1
        order.executed = True
        order.lock = 0
        if not book.active(row["arrive_ns"], self.stale_ns):
            row["status"] = FillStatus.NO_BOOK
            self._write(order)
            return
        takes = walk(book, side, row["limit_px_e8"], row["size_e8"])
        order.took = dict(takes)
        for px, qty in takes:
            book.take(side, px, qty, row["arrive_ns"])
        filled, quote = sum(qty for _, qty in takes), cost(takes, side)
        in_base = order.buys and venue == "binance" and self.config.paper.binance_fee_in == "received"
        fee = fee_of(filled if in_base else quote, self.fee_ppm[venue])
        row.update(filled_e8=filled, quote_e8=quote, levels=len(takes), fee_e8=fee, fee_in_base=int(in_base))
        row["before_ns"] = book.last_ns
        row["before_e8"] = min(row["visible_e8"], book.depth(side, row["limit_px_e8"]))
        row["status"] = FillStatus.FILLED if filled == row["size_e8"] else FillStatus.PARTIAL if filled else FillStatus.UNFILLED
        cash, coin = (-quote, filled) if order.buys else (quote, -filled)
        if in_base:
            coin -= fee
        else:
            cash -= fee
        self.balance[venue][QUOTE[venue]] += cash
        self.balance[venue][order.symbol] += coin
        self.pairs[row["symbol"]].held[venue] += coin
        order.conn = book.conn

    def _resolve(self, book: Book, *, good: bool) -> None:
        """B+: the first book after the arrival, on the same connection and trusted; else the leg stays unresolved."""
        for order in [order for order in self.orders if order.executed and order.book is book]:
            row, side = order.row, order.book_side
            if good and order.conn == book.conn:
                takes = walk(book, side, row["limit_px_e8"], row["size_e8"], own=order.took)
                row["after_ns"] = self.time_ns
                row["after_e8"] = min(row["visible_e8"], book.depth(side, row["limit_px_e8"]))
                row["after_filled_e8"] = sum(qty for _, qty in takes)
                row["after_quote_e8"] = cost(takes, side)
                row["resolved"] = 1
            self._write(order)

    def _write(self, order: Order) -> None:
        self.fills.append(order.row)
        self.orders.remove(order)

    def finish(self) -> NaiveEngine:
        self._execute_due(self.time_ns + 1)
        for order in list(self.orders):
            if not order.executed:
                order.row["status"] = FillStatus.IN_FLIGHT
            self._write(order)
        return self

    # --- edges and policy

    def _look(self, pair: Pair, seq: int) -> None:
        view = self._view(pair)
        least = min(self.config.policy.entry_bps, self.config.policy.tp_bps - self.config.policy.entry_bps)
        for direction in Direction:  # an opportunity lasts while its displayed edge does
            if view is None or not view.shown_edge[direction] >= least:
                pair.episode[direction] = False
                pair.refused[direction] = Outcome.ACCEPTED
        ask = self._threshold(pair, view) if view else None
        if ask is not None and view is not None:
            self._submit(pair, view, ask, seq)

    def _view(self, pair: Pair) -> View | None:
        upbit, binance, fx, now = pair.books["upbit"], pair.books["binance"], self.fx, self.time_ns
        if fx is None or not fx.active(now, self.fx_stale_ns):
            return None
        if not upbit.active(now, self.stale_ns) or not binance.active(now, self.stale_ns):
            return None
        fx_bid, fx_ask = fx.displayed_touch("bid"), fx.displayed_touch("ask")
        upbit_bid, upbit_ask = upbit.touch("bid"), upbit.touch("ask")
        binance_bid, binance_ask = binance.touch("bid"), binance.touch("ask")
        edge = edges(upbit_bid, upbit_ask, binance_bid, binance_ask, fx_bid, fx_ask)
        touches = (book.displayed_touch(side) for book in (upbit, binance) for side in ("bid", "ask"))
        return View(upbit_bid, upbit_ask, binance_bid, binance_ask, fx_bid, fx_ask, edge, edges(*touches, fx_bid, fx_ask))

    def _threshold(self, pair: Pair, view: View) -> Ask | None:
        policy = self.config.policy
        exit_bps = policy.tp_bps - policy.entry_bps
        at = view.upbit_ask or view.upbit_bid
        if at == 0 or pair.lot == 0:
            return None
        size = int(Fraction(policy.size_krw) * E8 * E8) // at
        most = int(Fraction(policy.max_position_krw) * E8 * E8) // at
        if size == 0 or most == 0:
            return None
        size -= size % pair.lot
        short_upbit, long_upbit = max(-pair.held["upbit"], 0), max(pair.held["upbit"], 0)
        short_binance, long_binance = max(-pair.held["binance"], 0), max(pair.held["binance"], 0)

        def part(held: int, px: int, venue: str) -> int:
            """All of what is held if it is less than two entries, else one entry; nothing if the order would be too small."""
            if held == 0 or px == 0:
                return 0
            lots = held if held < 2 * size else size
            lots -= lots % pair.lot
            return lots if notional(px, lots, up=False) >= pair.min_notional[venue] else 0

        back = Direction.BUY_UPBIT, part(short_upbit, view.upbit_ask, "upbit"), part(long_binance, view.binance_bid, "binance")
        forth = Direction.SELL_UPBIT, part(long_upbit, view.upbit_bid, "upbit"), part(short_binance, view.binance_ask, "binance")
        for direction, on_upbit, on_binance in (back, forth):
            if (on_upbit or on_binance) and view.edge[direction] >= exit_bps:
                return Ask(direction, Intent.EXIT, on_upbit, on_binance)
        if size == 0 or max(abs(held) for held in pair.held.values()) + size > most:
            return None
        for direction, undoes in ((Direction.SELL_UPBIT, forth), (Direction.BUY_UPBIT, back)):
            if view.edge[direction] >= policy.entry_bps and not undoes[1] and not undoes[2]:
                return Ask(direction, Intent.ENTRY, size, size)
        return None

    # --- risk and executor

    def _locked(self, venue: str, currency: str) -> int:
        return sum(
            order.lock
            for order in self.orders
            if order.venue == venue and currency == (QUOTE[venue] if order.buys else order.symbol)
        )

    def _lock(self, pair: Pair, venue: str, side: Side, px: int, size: int) -> int | Outcome:
        """What the leg sets aside at worst, or why it cannot be sent."""
        value = notional(px, size, up=True)
        if value > TOO_MUCH:
            return Outcome.OVERFLOW
        if value < pair.min_notional[venue]:
            return Outcome.MIN_NOTIONAL
        currency, need = QUOTE[venue], value
        if side == Side.SELL:
            currency, need = pair.symbol, size
        elif venue == "upbit" or self.config.paper.binance_fee_in == "quote":
            need += fee_of(value, self.fee_ppm[venue])
        return need if self.balance[venue][currency] - self._locked(venue, currency) >= need else Outcome.NO_BALANCE

    def _submit(self, pair: Pair, view: View, ask: Ask, seq: int) -> None:
        sells = ask.direction == Direction.SELL_UPBIT
        legs = [
            ("upbit", Side.SELL if sells else Side.BUY, view.upbit_bid if sells else view.upbit_ask, ask.upbit_size),
            ("binance", Side.BUY if sells else Side.SELL, view.binance_ask if sells else view.binance_bid, ask.binance_size),
        ]
        outcome = Outcome.ORDERS_FULL if len(self.orders) + 2 > MOST_ORDERS else Outcome.ACCEPTED
        locks = {}
        for venue, side, px, size in legs:
            if outcome == Outcome.ACCEPTED and size:
                lock = self._lock(pair, venue, side, px, size)
                if isinstance(lock, Outcome):
                    outcome = lock
                locks[venue] = int(lock)
        if outcome != Outcome.ACCEPTED:
            self.refusals[outcome.name.lower()] += 1
            if pair.refused[ask.direction] == outcome:
                return
            pair.refused[ask.direction] = outcome
        self.decided += 1
        decision = {
            "decision_id": self.decided,
            "time_ns": self.time_ns,
            "seq": seq,
            "edge_bps": view.edge[ask.direction],
            "upbit_px_e8": legs[0][2],
            "binance_px_e8": legs[1][2],
            "fx_px_e8": view.fx_ask if sells else view.fx_bid,
            "upbit_size_e8": ask.upbit_size,
            "binance_size_e8": ask.binance_size,
            "upbit_order_id": 0,
            "binance_order_id": 0,
            "upbit_age_ns": self.time_ns - pair.books["upbit"].last_ns,
            "binance_age_ns": self.time_ns - pair.books["binance"].last_ns,
            "fx_age_ns": self.time_ns - self.fx.last_ns if self.fx else 0,
            "symbol": pair.index,
            "direction": ask.direction,
            "intent": ask.intent,
            "outcome": outcome,
            "first_in_episode": 0,
        }
        self.decisions.append(decision)
        if outcome != Outcome.ACCEPTED:
            return
        decision["first_in_episode"] = int(not pair.episode[ask.direction])
        pair.episode[ask.direction] = True
        pair.refused[ask.direction] = Outcome.ACCEPTED
        for venue, side, px, size in legs:
            if size:
                decision[f"{venue}_order_id"] = self._send(pair, decision, venue, side, px, size, locks[venue])

    def _send(self, pair: Pair, decision: dict[str, Any], venue: str, side: Side, px: int, size: int, lock: int) -> int:
        self.sent += 1
        book = pair.books[venue]
        book_side = "ask" if side == Side.BUY else "bid"
        depth = book.depth(book_side, px)
        visible = min(size, depth)
        at_once, left = [], visible
        for level_px, qty in book.levels(book_side):
            if left:
                at_once.append((level_px, min(qty, left)))
                left -= at_once[-1][1]
        later = ("filled_e8", "quote_e8", "fee_e8", "before_ns", "before_e8", "after_ns", "after_e8", "after_filled_e8")
        row = dict.fromkeys((*later, "after_quote_e8", "levels", "status", "fee_in_base", "resolved"), 0)
        row.update(
            order_id=self.sent,
            decision_id=decision["decision_id"],
            time_ns=decision["time_ns"],
            arrive_ns=decision["time_ns"] + self.latency_ns[venue],
            seq=decision["seq"],
            edge_bps=decision["edge_bps"],
            limit_px_e8=px,
            size_e8=size,
            bid_px_e8=book.displayed_touch("bid"),
            ask_px_e8=book.displayed_touch("ask"),
            visible_e8=visible,
            depth_e8=depth,
            visible_quote_e8=cost(at_once, book_side),
            decision_book_ns=book.last_ns,
            symbol=pair.index,
            venue=VENUE_CODE[venue],
            side=side,
            direction=decision["direction"],
            intent=decision["intent"],
            first_in_episode=decision["first_in_episode"],
        )
        pair.in_flight += 1
        self.orders.append(Order(row, venue, pair.symbol, book, lock))
        return self.sent
