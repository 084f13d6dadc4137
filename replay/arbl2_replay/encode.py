"""Frames that nobody recorded: what is served where a client asks for another form than the tape has.

A client that asks for what was recorded gets the recorded bytes and nothing in here runs. For everything else the rules are
these, and docs/serving.md tells them to users:

* a book of fewer levels, another grouping or Upbit's other format is read exactly (integers of 10^-8) and written by
  ``arbl2_replay.wire``, in the venue's spelling; levels that were not recorded are not there (Upbit pads with zeros);
* any other Upbit message in the other format keeps its values, text by text, under the other names; list formats put one message
  in brackets; REALTIME becomes SNAPSHOT in place, nothing else moves;
* Binance's wrapper is put around, or taken off, the very bytes that it holds;
* changes of 100 ms are merged to those of 1000 ms: the first U, the last u, the last size of every price.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.frames import ExchangeId
from arbl2_replay.sources import What
from arbl2_replay.synth import MarketEvent
from arbl2_replay.wire import E8, Book, DepthChange, binance_combined, upbit_orderbook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from arbl2_replay.sources import Message

Levels = list[tuple[str, str]]
_MOST = Decimal(10**10)  # as much as 10^-8 of it fit 64 bits; more is no price and no size
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ArithmeticError, ValueError)


class _Unit(msgspec.Struct):
    ask_price: Decimal
    bid_price: Decimal
    ask_size: Decimal
    bid_size: Decimal


class _SimpleUnit(msgspec.Struct, rename={"ask_price": "ap", "bid_price": "bp", "ask_size": "as", "bid_size": "bs"}):
    ask_price: Decimal
    bid_price: Decimal
    ask_size: Decimal
    bid_size: Decimal


class _Books(msgspec.Struct):
    timestamp: int
    orderbook_units: list[_Unit]


class _SimpleBooks(msgspec.Struct, rename={"timestamp": "tms", "orderbook_units": "obu"}):
    timestamp: int
    orderbook_units: list[_SimpleUnit]


class _Partial(msgspec.Struct, rename="camel"):
    last_update_id: int
    bids: Levels
    asks: Levels


class Diff(msgspec.Struct, rename={"first_id": "U", "last_id": "u", "bids": "b", "asks": "a"}):
    """Binance's ``depthUpdate``, prices and quantities as text."""

    first_id: int
    last_id: int
    bids: Levels
    asks: Levels


_default_books = msgspec.json.Decoder(_Books)
_simple_books = msgspec.json.Decoder(_SimpleBooks)
_partial = msgspec.json.Decoder(_Partial)
_diff = msgspec.json.Decoder(Diff)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


def or_none(read: Callable[[], Any]) -> Any:
    """What ``read`` returns; None for bytes that cannot be read."""
    try:
        return read()
    except _BROKEN:
        return None


def event(message: Message) -> MarketEvent | None:
    """The book that a message stands for; None if it has none, or cannot be read."""
    if message.event is None and message.channel.what in (What.BOOK, What.DEPTH):
        message.event = message.made(event, lambda: or_none(lambda: _event(message)))
    return message.event


def _event(message: Message) -> MarketEvent:
    channel = message.channel
    if channel.venue is ExchangeId.UPBIT:
        mark, book = _upbit_book(bare(message.payload), simple=channel.form.startswith("SIMPLE"))
    else:
        mark, book = partial(data(message))
    return MarketEvent(0, channel.venue, channel.code, mark, book)


def _upbit_book(payload: bytes, *, simple: bool) -> tuple[int, Book]:
    found = (_simple_books if simple else _default_books).decode(payload)
    bids = _side((unit.bid_price, unit.bid_size) for unit in found.orderbook_units)
    asks = _side((unit.ask_price, unit.ask_size) for unit in found.orderbook_units)
    return found.timestamp, Book(*bids, *asks)


def _side(levels: Iterable[tuple[Decimal, Decimal]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Without the zeros that fill up a thin side."""
    pairs = [(_decimal_e8(px), _decimal_e8(size)) for px, size in levels if px and size]
    return tuple(px for px, _ in pairs), tuple(size for _, size in pairs)


def _decimal_e8(value: Decimal) -> int:
    if not 0 <= value < _MOST:
        raise ValueError(value)
    return int(value * E8)


def e8(text: str) -> int:
    """A price or quantity as Binance writes it, in 10^-8. Raises ValueError or ArithmeticError for another text."""
    whole, dot, part = text.partition(".")
    if dot and len(part) == 8 and len(whole) < 12 and whole.isascii() and whole.isdigit() and part.isascii() and part.isdigit():
        return int(whole + part)
    return _decimal_e8(Decimal(text))


def partial(body: bytes) -> tuple[int, Book]:
    """A partial book or a REST book of Binance: id and levels. Raises what cannot be read."""
    found = _partial.decode(body)
    bids, asks = ([(e8(px), e8(size)) for px, size in side] for side in (found.bids, found.asks))
    book = Book(*([pair[k] for pair in side] for side in (bids, asks) for k in (0, 1)))
    return found.last_update_id, book


def partial_text(body: bytes) -> tuple[int, Levels, Levels]:
    """The same with the texts of the levels. Raises what cannot be read."""
    found = _partial.decode(body)
    return found.last_update_id, found.bids, found.asks


def diff(message: Message) -> Diff | None:
    """The changes that a message tells; None if they cannot be read."""
    found: Diff | None = message.made(diff, lambda: or_none(lambda: _diff.decode(data(message))))
    return found


def bare(payload: bytes) -> bytes:
    """An Upbit message out of its list."""
    return payload[1:-1] if payload.startswith(b"[") else payload


def data(message: Message) -> bytes:
    """A Binance payload out of its wrapper."""
    payload = message.payload
    if message.channel.form == "raw":
        return payload
    head = _head(message.channel.name)
    if payload.startswith(head) and payload.endswith(b"}"):
        return payload[len(head) : -1]
    return bytes(_members.decode(payload)["data"])


def _head(stream: str) -> bytes:
    return b'{"stream":"%b","data":' % stream.encode()


def binance_as(message: Message, stream: str, *, combined: bool) -> bytes | None:
    """The recorded data, wrapped under ``stream`` or bare; None if it cannot be taken out of its wrapper."""
    raw: bytes | None = message.made(data, lambda: or_none(lambda: data(message)))
    if raw is None or not combined:
        return raw
    return binance_combined(stream, raw)


def upbit_book_as(shown: MarketEvent, *, units: int, form: str, level_e8: int, snapshot: bool, book: Book) -> bytes:
    """An Upbit book in any depth, grouping and format."""
    payload = upbit_orderbook(
        shown.code,
        book,
        shown.mark,
        units=units,
        simple=form.startswith("SIMPLE"),
        snapshot=snapshot,
        level_e8=level_e8,
    )
    return listed(payload, form)


def listed(payload: bytes, form: str) -> bytes:
    """In brackets, if the format is a list format."""
    return b"[%b]" % payload if form.endswith("LIST") else payload


_SNAPSHOT = {b'"stream_type":"REALTIME"': b'"stream_type":"SNAPSHOT"', b'"st":"REALTIME"': b'"st":"SNAPSHOT"'}


def as_snapshot(payload: bytes) -> bytes:
    """A REALTIME message told again as the first of a subscription."""
    for said, instead in _SNAPSHOT.items():
        head, found, tail = payload.rpartition(said)
        if found:
            return head + instead + tail
    return payload


_SIMPLE_NAMES = {
    "type": "ty",
    "code": "cd",
    "timestamp": "tms",
    "stream_type": "st",
    "trade_date": "td",
    "trade_time": "ttm",
    "trade_timestamp": "ttms",
    "trade_price": "tp",
    "trade_volume": "tv",
    "ask_bid": "ab",
    "prev_closing_price": "pcp",
    "change": "c",
    "change_price": "cp",
    "sequential_id": "sid",
    "best_ask_price": "bap",
    "best_ask_size": "bas",
    "best_bid_price": "bbp",
    "best_bid_size": "bbs",
}
_DEFAULT_NAMES = {short: long for long, short in _SIMPLE_NAMES.items()}


def upbit_other_as(message: Message, form: str) -> bytes | None:
    """An Upbit message that is no book in another format: other names, the same values. None if it cannot be read."""
    recorded = message.channel.form
    payload = bare(message.payload)
    if recorded.startswith("SIMPLE") == form.startswith("SIMPLE"):
        return listed(payload, form)
    names = _SIMPLE_NAMES if form.startswith("SIMPLE") else _DEFAULT_NAMES
    members = or_none(lambda: _members.decode(payload))
    if members is None:
        return None
    pairs = b",".join(b'"%b":%b' % (names.get(name, name).encode(), bytes(value)) for name, value in members.items())
    return listed(b"{%b}" % pairs, form)


class Merged:
    """Changes gathered until they are told at once."""

    def __init__(self) -> None:
        self._first_id = 0
        self._last_id = 0
        self._bids: dict[int, int] = {}
        self._asks: dict[int, int] = {}

    def add(self, change: Diff) -> None:
        """Take one more. Raises ValueError or ArithmeticError for a text that is no number."""
        self._first_id = self._first_id or change.first_id
        self._last_id = change.last_id
        for gathered, levels in ((self._bids, change.bids), (self._asks, change.asks)):
            gathered.update((e8(px), e8(size)) for px, size in levels)

    def take(self) -> DepthChange | None:
        """All of them as one, best prices first; None if there were none."""
        if not self._last_id:
            return None
        change = DepthChange(self._first_id, self._last_id, sorted(self._bids.items(), reverse=True), sorted(self._asks.items()))
        self._first_id = self._last_id = 0
        self._bids, self._asks = {}, {}
        return change


_TIMES = re.compile(rb'("(?:timestamp|tms|trade_timestamp|ttms|E|T)":)([0-9]{13})(?![0-9])')


def with_clock_off(payload: bytes, shift_ms: int) -> bytes:
    """The message of a venue whose clock is off by so much."""
    return _TIMES.sub(lambda found: b"%b%d" % (found[1], int(found[2]) + shift_ms), payload)


class _Last(msgspec.Struct):
    trade_price: msgspec.Raw | None = None
    tp: msgspec.Raw | None = None
    trade_timestamp: int | None = None
    ttms: int | None = None


_last = msgspec.json.Decoder(_Last)


def upbit_last_trade(message: Message) -> tuple[Decimal, int] | None:
    """Price and time (ms) of a recorded trade; None if it cannot be read."""

    def read() -> tuple[Decimal, int]:
        found = _last.decode(bare(message.payload))
        price = found.trade_price or found.tp
        assert price is not None
        return Decimal(bytes(price).decode()), found.trade_timestamp or found.ttms or 0

    try:
        return read()
    except (*_BROKEN, AssertionError):
        return None
