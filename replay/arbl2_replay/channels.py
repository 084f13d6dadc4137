"""Which stream a recorded message belongs to, told from its first bytes.

Most messages of a tape repeat the head of one before: it is looked up, and read properly only when it is new.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from arbl2.frames import ExchangeId
from arbl2_replay.encode import bare, or_none
from arbl2_replay.sources import Channel, What
from arbl2_replay.wire import E8

if TYPE_CHECKING:
    from collections.abc import Callable

_UPBIT_HEAD = re.compile(rb'\[?\{"(?:type|ty)":"[a-z0-9.]{1,20}","(?:code|cd)":"[A-Z0-9-]{1,20}"')
_BINANCE_HEAD = re.compile(rb'\{"stream":"[^"\\]{1,100}"')
_BEGINNING = 40
"""So many bytes tell most streams apart, and hold no price, time or id yet."""
_STREAM = re.compile(r"([a-z0-9]+)@(?:(depth)(5|10|20)?(@100ms|@1000ms)?|(trade)|(bookTicker))")
_MOST_HEADS = 20_000
"""No market has more kinds of messages; what goes beyond counts as stray."""


class _UpbitMessage(msgspec.Struct):
    type: str | None = None
    ty: str | None = None
    code: str | None = None
    cd: str | None = None
    level: float | None = None
    lv: float | None = None
    orderbook_units: list[Any] = []
    obu: list[Any] = []
    error: Any = None
    status: Any = None
    method: str | None = None
    mthd: str | None = None


class _BinanceMessage(msgspec.Struct):
    stream: str = ""
    e: str = ""
    s: str = ""
    id: Any = None
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    code: Any = None
    msg: Any = None
    error: Any = None
    u: int | None = None
    b: Any = None


_upbit = msgspec.json.Decoder(_UpbitMessage)
_binance = msgspec.json.Decoder(_BinanceMessage)
_RAW_NAMES = {"depthUpdate": "depth@100ms", "trade": "trade", "aggTrade": "aggTrade"}


def binance_stream(name: str) -> tuple[str, What, int, bool] | None:
    """Symbol, kind, depth and whether it is the slow one, of a stream name; None for streams of other kinds."""
    match = _STREAM.fullmatch(name)
    if match is None:
        return None
    symbol, depth, levels, speed, trade, ticker = match.groups()
    what = What.TRADE if trade else What.TICKER if ticker else What.DEPTH if levels else What.DIFF
    return symbol.upper(), what, int(levels or 0), bool(depth) and speed != "@100ms"


class Sorter:
    """Sorts the messages of one recording, connection by connection. ``found`` is told of every channel when it is new."""

    def __init__(self, found: Callable[[Channel], None]) -> None:
        self._found = found
        self._by_beginning: dict[tuple[int, bytes, bool], Channel | None] = {}
        self._by_head: dict[tuple[int, bytes, bool], Channel | None] = {}
        self._channels: dict[tuple[object, ...], Channel] = {}
        self._urls: dict[int, str] = {}

    def opened(self, conn: int, payload: bytes) -> None:
        """A connection was opened; its URL may name the only stream of a bare message."""
        said = or_none(lambda: msgspec.json.decode(payload))
        url = said.get("url") if isinstance(said, dict) else None
        self._urls[conn] = url if isinstance(url, str) else ""

    def resubscribed(self, conn: int) -> None:
        """What comes from now on may have another form under the same head."""
        self._by_beginning.clear()
        self._by_head = {key: channel for key, channel in self._by_head.items() if key[0] != conn}

    def closed(self, conn: int) -> None:
        """Nothing comes from there any more."""
        self.resubscribed(conn)
        self._channels = {key: channel for key, channel in self._channels.items() if channel.conn != conn}
        self._urls.pop(conn, None)

    def streams(self, conn: int) -> set[tuple[str, str]]:
        """Instrument and name of what the connection has told so far."""
        return {(channel.code, channel.name) for channel in self._channels.values() if channel.conn == conn and channel.code}

    def channel(self, venue: ExchangeId, conn: int, within: bytes, start: int, end: int) -> Channel | None:
        """Where the message ``within[start:end]`` belongs; None for what answered the recorder alone (acknowledgements, UP)."""
        snapshot = venue is ExchangeId.UPBIT and within.find(b'"SNAPSHOT"', end - 64, end) > start
        beginning = conn, within[start : start + _BEGINNING], snapshot
        known = self._by_beginning.get(beginning, self)
        if known is not self:
            return known  # type: ignore[return-value]
        match = (_UPBIT_HEAD if venue is ExchangeId.UPBIT else _BINANCE_HEAD).match(within, start, end)
        head = match[0] if match else b""
        channel = self._sorted_by_head(venue, (conn, head, snapshot), within[start:end])
        if 0 < len(head) <= _BEGINNING <= end - start and len(self._by_beginning) < _MOST_HEADS:
            self._by_beginning[beginning] = channel
        return channel

    def _sorted_by_head(self, venue: ExchangeId, key: tuple[int, bytes, bool], payload: bytes) -> Channel | None:
        conn, head, snapshot = key
        if key in self._by_head:
            return self._by_head[key]
        channel = _upbit_channel(conn, payload, snapshot=snapshot) if venue is ExchangeId.UPBIT else self._binance(conn, payload)
        if channel is not None:
            channel = self._same(channel)
        if head and len(self._by_head) < _MOST_HEADS and (channel is None or channel.what is not What.STRAY):
            self._by_head[key] = channel
        return channel

    def _same(self, channel: Channel) -> Channel:
        fields = tuple(getattr(channel, name) for name in channel.__slots__)
        known = self._channels.get(fields)
        if known is None:
            if len(self._channels) >= _MOST_HEADS:
                return Channel(channel.venue, What.STRAY, conn=channel.conn)
            known = self._channels[fields] = channel
            self._found(channel)
        return known

    def _binance(self, conn: int, payload: bytes) -> Channel | None:
        venue = ExchangeId.BINANCE
        said = or_none(lambda: _binance.decode(payload))
        if said is None:
            return Channel(venue, What.STRAY, conn=conn)
        if said.e == "serverShutdown" or said.stream == "!serverShutdown":
            return Channel(venue, What.NOTICE, conn=conn)
        if said.stream:
            return _binance_channel(conn, said.stream, "combined")
        if said.result is not msgspec.UNSET or said.error is not None or (said.code is not None and said.msg is not None):
            return None
        return _binance_channel(conn, self._bare_name(conn, said), "raw")

    def _bare_name(self, conn: int, said: _BinanceMessage) -> str:
        """The stream of a message without wrapper. A connection that carries one stream was opened by its name."""
        opened = urlsplit(self._urls.get(conn, ""))
        named = [*parse_qs(opened.query).get("streams", [""])[0].split("/"), opened.path.rpartition("/ws/")[2]]
        names = [name for name in named if "@" in name]
        kind = said.e and _RAW_NAMES.get(said.e, said.e)
        if not kind and said.s and said.u is not None and said.b is not None:
            kind = What.TICKER
        symbol = said.s.lower()
        fitting = [name for name in names if not kind or name.startswith(f"{symbol}@{kind.partition('@')[0]}")]
        if len(fitting) == 1:
            return fitting[0]
        return f"{symbol}@{kind}" if symbol and kind else ""


def _binance_channel(conn: int, name: str, form: str) -> Channel:
    venue = ExchangeId.BINANCE
    if not name:
        return Channel(venue, What.STRAY, conn=conn)
    known = binance_stream(name)
    if known is None:
        return Channel(venue, What.OTHER, name.partition("@")[0].upper(), name, conn, form)
    symbol, what, depth, _ = known
    return Channel(venue, what, symbol, name, conn, form, depth)


def _upbit_channel(conn: int, payload: bytes, *, snapshot: bool) -> Channel | None:
    venue = ExchangeId.UPBIT
    said = or_none(lambda: _upbit.decode(bare(payload)))
    code = said and (said.code or said.cd)
    kind = said and (said.type or said.ty)
    if said is None or not code or not kind:
        answered = said is not None and (said.status or said.method or said.mthd or said.error is not None)
        return None if answered else Channel(venue, What.STRAY, conn=conn)
    form = ("SIMPLE" if said.cd else "DEFAULT") if payload.startswith(b"{") else ("SIMPLE_LIST" if said.cd else "JSON_LIST")
    what = {"orderbook": What.BOOK, "trade": What.TRADE}.get(kind, What.OTHER)
    depth = len(said.orderbook_units or said.obu)
    level_e8 = round((said.level or said.lv or 0) * E8) if what is What.BOOK else 0
    return Channel(venue, what, code, kind, conn, form, depth, level_e8, snapshot)
