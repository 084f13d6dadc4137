"""Binance spot: what its messages and the bodies of its depth requests mean.

The combined partial depth ``{"stream":"btcusdt@depth20@100ms","data":{"lastUpdateId":...,"bids":[...],"asks":[...]}}`` replaces
the book. It has no symbol, no event time and no ``e``: the instrument is known from the stream's name only, so the ``/stream``
endpoint must be used. ``lastUpdateId`` may repeat (a refresh) but never goes back within a connection. Acks and errors stand
outside the wrapper.

A depth change (``btcusdt@depth@100ms``, event ``depthUpdate``) carries the ids ``U`` to ``u`` of what changed since the one
before and absolute sizes, 0 = gone; together with a snapshot (``GET /api/v3/depth``) it gives the whole book. Which changes
belong to which snapshot is the loop's business (docs/full-books.md). Futures chain by ``pu`` instead and are refused.

Prices and quantities are strings with eight decimals, whatever the tick.

Source: github.com/binance/binance-spot-api-docs web-socket-streams.md (2026-07).
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from arbl2.frames import BINANCE, ExchangeId
from arbl2.providers.base import (
    Instrument,
    Provider,
    Reading,
    RefusedError,
    read_as,
    read_count,
    read_e8,
    read_object,
    read_string,
)
from arbl2.scan import scan_binance, scan_snapshot
from arbl2.updates import MAX_CHANGES, MAX_LEVELS, Reason, What

if TYPE_CHECKING:
    from msgspec import Raw

_QUOTES = ("USDT", "USDC", "FDUSD", "TUSD", "BUSD", "BTC", "ETH", "BNB", "EUR", "TRY", "BRL", "JPY")
_NAME = re.compile(rf"([A-Z0-9]{{1,12}}?)({'|'.join(_QUOTES)})\Z")
_PARTIAL = re.compile(r"([a-z0-9]{1,24})@depth(?:5|10|20)(?:@100ms)?\Z")
_DIFF = re.compile(r"([a-z0-9]{1,24})@depth(?:@100ms)?\Z")
_ASKED = re.compile(r"/api/v3/depth\?(?:[^#]*&)?symbol=([A-Z0-9]{1,24})(?:[&#]|\Z)")
_LEVELS = msgspec.json.Decoder(list[list[msgspec.Raw]])
_EVENTS = {
    "trade": Reason.TRADE,
    "aggTrade": Reason.TRADE,
    "24hrTicker": Reason.TICKER,
    "serverShutdown": Reason.SHUTDOWN,
}


class BinanceL2Provider(Provider):
    """Partial depth, depth changes and snapshots of Binance spot."""

    venue = ExchangeId.BINANCE
    venue_code = BINANCE
    _scan = staticmethod(scan_binance)
    _scan_response = staticmethod(scan_snapshot)

    @staticmethod
    def instrument(name: str) -> Instrument:
        """``BTCUSDT`` is BTC priced in USDT."""
        match = _NAME.match(name)
        base, quote = (match[1], match[2]) if match else (name, "")
        return Instrument(ExchangeId.BINANCE, name, base, quote)

    @staticmethod
    def wire_name(name: str) -> str:
        """Stream names are in lower case."""
        return name.lower()

    def read(self, payload: bytes) -> Reading:
        """Decode one message strictly. Raises RefusedError for bad input."""
        members = read_object(payload)
        if "stream" not in members:
            return self._change(members) if _is_change(members) else Reading(_bare(members))
        stream = read_string(members["stream"])
        if stream == "!serverShutdown":
            return Reading(Reason.SHUTDOWN)
        partial = _PARTIAL.match(stream)
        match = partial or _DIFF.match(stream)
        symbol = match[1].upper() if match else ""
        data = _data(members, symbol)
        if _is_change(data):
            return self._change(data, symbol)
        if partial is None:
            return Reading(_event(data, stream))
        if symbol not in self.books:
            return Reading(Reason.UNKNOWN_INSTRUMENT)
        return Reading(
            Reason.BOOK,
            instrument=symbol,
            update_id=read_count(data.get("lastUpdateId"), symbol),
            bids=_side(data.get("bids"), symbol, MAX_LEVELS),
            asks=_side(data.get("asks"), symbol, MAX_LEVELS),
        )

    def _change(self, data: dict[str, Raw], named: str = "") -> Reading:
        """A depth change; ``named`` is the symbol of its stream, which must be its own."""
        symbol = read_string(data.get("s"), named)
        if named and symbol != named:
            raise RefusedError(Reason.WRONG_SHAPE, named)
        if "pu" in data:
            raise RefusedError(Reason.FUTURES, symbol)
        if symbol not in self.books:
            return Reading(Reason.UNKNOWN_INSTRUMENT)
        first_id, last_id = (read_count(data.get(key), symbol) for key in ("U", "u"))
        if first_id > last_id:
            raise RefusedError(Reason.WRONG_SHAPE, symbol)
        return Reading(
            Reason.DIFF,
            instrument=symbol,
            what=What.CHANGE,
            exchange_ms=read_count(data.get("E"), symbol),
            first_id=first_id,
            update_id=last_id,
            bids=_side(data.get("b"), symbol, MAX_CHANGES),
            asks=_side(data.get("a"), symbol, MAX_CHANGES),
        )

    def asked(self, request: bytes) -> str:
        """The symbol of a depth request; "" for any other."""
        try:
            match = _ASKED.search(_REQUEST.decode(request).url)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return ""
        return match[1] if match else ""

    def read_response(self, body: bytes) -> Reading:
        """Decode the body of a REST answer: a depth snapshot, or something that is no book. Raises RefusedError for bad input."""
        if b'"lastUpdateId"' not in body:
            return Reading(Reason.REST)
        data = read_object(body)
        update_id = read_count(data.get("lastUpdateId"))
        bids, asks = (tuple(filter(all, _side(data.get(key), "", MAX_CHANGES))) for key in ("bids", "asks"))
        if any(a[0] <= b[0] for a, b in pairwise(bids)) or any(a[0] >= b[0] for a, b in pairwise(asks)):
            raise RefusedError(Reason.UNSORTED)
        if bids and asks and bids[0][0] >= asks[0][0]:
            raise RefusedError(Reason.CROSSED)
        return Reading(Reason.REST, what=What.SNAPSHOT, update_id=update_id, bids=bids, asks=asks)


class _Request(msgspec.Struct):
    url: str


_REQUEST = msgspec.json.Decoder(_Request)


def _is_change(data: dict[str, Raw]) -> bool:
    return "e" in data and read_string(data["e"]) == "depthUpdate"


def _bare(members: dict[str, Raw]) -> Reason:
    """What a message outside the combined wrapper is."""
    if "error" in members or ("code" in members and "msg" in members):
        return Reason.VENUE_ERROR
    if "result" in members:
        return Reason.ACK
    if "lastUpdateId" in members:
        raise RefusedError(Reason.WRONG_SHAPE)  # a partial depth of /ws: it does not say of which symbol
    return _event(members, "")


def _event(data: dict[str, Raw], stream: str) -> Reason:
    if "e" in data:
        return _EVENTS.get(read_string(data["e"]), Reason.OTHER_MESSAGE)
    if stream.endswith("@bookTicker") or {"u", "s", "b", "B", "a", "A"} <= data.keys():
        return Reason.BOOK_TICKER
    return Reason.OTHER_MESSAGE


def _data(members: dict[str, Raw], symbol: str) -> dict[str, Raw]:
    raw = members.get("data")
    if raw is None:
        raise RefusedError(Reason.WRONG_SHAPE, symbol)
    try:
        return read_object(raw)
    except RefusedError as refused:
        raise RefusedError(refused.reason, symbol) from None


def _side(raw: Raw | None, symbol: str, most: int) -> tuple[tuple[int, int], ...]:
    levels = read_as(_LEVELS, raw, symbol)
    if len(levels) > most:
        raise RefusedError(Reason.TOO_MANY_LEVELS, symbol)
    return tuple(_level(level, symbol) for level in levels)


def _level(level: list[Raw], symbol: str) -> tuple[int, int]:
    if len(level) < 2:
        raise RefusedError(Reason.WRONG_SHAPE, symbol)
    price, size = (read_string(part, symbol).encode() for part in level[:2])
    return read_e8(price, symbol, exact=True), read_e8(size, symbol, exact=False)
