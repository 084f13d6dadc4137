"""Upbit's side of the exchange server: its WebSocket requests, its silences and errors, its REST."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.frames import ExchangeId, Op
from arbl2.rules import upbit_date, upbit_tick_e8
from arbl2_replay.encode import as_snapshot, event, listed, upbit_book_as, upbit_last_trade, upbit_other_as
from arbl2_replay.serving import Client, Way, reply, to_json
from arbl2_replay.sources import What
from arbl2_replay.wire import E8, UPBIT_UNITS, Book, decimal_text, upbit_rest_orderbook, upbit_trade

if TYPE_CHECKING:
    from collections.abc import Mapping

    from websockets.http11 import Response

    from arbl2_replay.boards import UpbitBoard
    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.serving import Connection, SentLog
    from arbl2_replay.sources import Channel, Message
    from arbl2_replay.synth import MarketEvent
    from arbl2_replay.wire import UpbitTrade

_ERRORS = {
    "WRONG_FORMAT": "요청 형식이 맞지 않습니다.",
    "NO_TICKET": "ticket이 없습니다.",
    "NO_TYPE": "type이 없습니다.",
    "NO_CODES": "codes가 없습니다.",
    "INVALID_PARAM": "지원하지 않는 값입니다.",
}
_FORMATS = ("DEFAULT", "SIMPLE", "JSON_LIST", "SIMPLE_LIST")
_UPBIT_TYPES = re.compile(r"orderbook|trade|ticker|candle\.(1s|[0-9]{1,3}m)")


class _RefusedError(Exception):
    """Upbit refuses a request; the argument is the name of the error."""


class _UpbitType(msgspec.Struct, frozen=True):
    type: str
    codes: list[str]
    level_e8: int
    snapshot: bool
    realtime: bool


class _UpbitRequest(msgspec.Struct, frozen=True):
    ticket: str
    form: str
    types: list[_UpbitType]
    list_only: bool


@dataclass(slots=True)
class _UpbitStream:
    snapshot: bool = field(init=False)
    """Whether SNAPSHOT messages were asked for."""
    type: str
    code: str
    units: int
    level_e8: int
    awaits_snapshot: bool
    realtime: bool

    def __post_init__(self) -> None:
        self.snapshot = self.awaits_snapshot


def _upbit_request(message: bytes) -> _UpbitRequest:
    try:
        parts = msgspec.json.decode(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _RefusedError("WRONG_FORMAT") from None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _RefusedError("WRONG_FORMAT")
    tickets = [part["ticket"] for part in parts if "ticket" in part]
    if not tickets or not isinstance(tickets[0], str) or not tickets[0]:
        raise _RefusedError("NO_TICKET")
    formats = [part["format"] for part in parts if "format" in part] or ["DEFAULT"]
    if formats[0] not in _FORMATS:
        raise _RefusedError("INVALID_PARAM")
    list_only = any(part.get("method") == "LIST_SUBSCRIPTIONS" for part in parts)
    types = [_upbit_type(part) for part in parts if "type" in part]
    if not types and not list_only:
        raise _RefusedError("NO_TYPE")
    return _UpbitRequest(tickets[0], formats[0], types, list_only)


def _upbit_type(part: dict[str, Any]) -> _UpbitType:
    kind, codes, level = part["type"], part.get("codes"), part.get("level", 0)
    if not isinstance(kind, str) or not _UPBIT_TYPES.fullmatch(kind):
        raise _RefusedError("INVALID_PARAM")
    if not isinstance(codes, list) or not codes:
        raise _RefusedError("NO_CODES")
    only_snapshot = part.get("is_only_snapshot", part.get("isOnlySnapshot", False))
    only_realtime = part.get("is_only_realtime", part.get("isOnlyRealtime", False))
    if not (
        all(isinstance(code, str) for code in codes)
        and isinstance(level, int | float)
        and 0 <= level < 1e10
        and isinstance(only_snapshot, bool)
        and isinstance(only_realtime, bool)
    ):
        raise _RefusedError("INVALID_PARAM")
    return _UpbitType(kind, codes, round(level * E8), not only_realtime, not only_snapshot)


def _upbit_streams(request: _UpbitRequest) -> list[_UpbitStream]:
    streams = []
    for kind in request.types:
        if kind.type == "orderbook":
            streams += [stream for text in kind.codes if (stream := _upbit_book_stream(kind, text)) is not None]
        else:
            streams += [_UpbitStream(kind.type, code, 0, 0, kind.snapshot, kind.realtime) for code in kind.codes]
    return streams


def _upbit_book_stream(kind: _UpbitType, text: str) -> _UpbitStream | None:
    code, dot, units = text.partition(".")
    shown = int(units) if units.isascii() and units.isdigit() and len(units) < 4 else 0
    if dot and shown == 0:
        return None
    return _UpbitStream("orderbook", code, shown if shown in UPBIT_UNITS else 30, kind.level_e8, kind.snapshot, kind.realtime)


def refusal(name: str) -> bytes:
    """The error frame of a name."""
    return _error(name, _ERRORS[name])


class UpbitClient(Client):
    """A client of Upbit."""

    venue = ExchangeId.UPBIT

    def __init__(self, server: ExchangeServer, ws: Connection, sent: SentLog) -> None:
        super().__init__(server, ws, sent)
        self.form = "DEFAULT"
        self.types: list[_UpbitType] = []
        self.streams: dict[str, list[_UpbitStream]] = {}
        self.says_up = False

    @property
    def subscribed(self) -> bool:
        """Whether the client has asked for any stream."""
        return bool(self.streams)

    def wants(self, code: str) -> bool:
        """Whether it has asked for anything of a code."""
        return code in self.streams

    async def receive(self, message: str | bytes) -> None:
        """A subscription, a question or PING; what is neither is refused and the connection closed."""
        data = message.encode() if isinstance(message, str) else message
        if data == b"PING":
            self.says_up = True
            return
        try:
            request = _upbit_request(data)
        except _RefusedError as error:
            self.send(refusal(str(error)), Op.BINARY)
            await asyncio.sleep(self.options.upbit_error_close_s)
            await self.close(1000)
            return
        self.form = request.form
        self._chosen_anew()
        if request.list_only:
            self._list(request.ticket)
            return
        self.types = request.types
        self.streams = {}
        for stream in _upbit_streams(request):
            self.streams.setdefault(stream.code, []).append(stream)
        for board in self.server.upbit_boards():
            for stream in self.streams.get(board.code, ()):
                if stream.awaits_snapshot and not board.is_dark:
                    self._snapshot(board, stream)
        self.server.client_changed()

    def _list(self, ticket: str) -> None:
        simple = self.form.startswith("SIMPLE")
        names = ("ty", "cds", "lv") if simple else ("type", "codes", "level")
        result: list[dict[str, object]] = []
        for kind in self.types:
            item: dict[str, object] = {names[0]: kind.type, names[1]: kind.codes}
            if kind.type == "orderbook":
                item[names[2]] = kind.level_e8 // E8 if kind.level_e8 % E8 == 0 else kind.level_e8 / E8
            result.append(item)
        heads = ("mthd", "rslt", "tckt") if simple else ("method", "result", "ticket")
        self.send(to_json(dict(zip(heads, ("LIST_SUBSCRIPTIONS", result, ticket), strict=True))), Op.BINARY)

    # what a message means to a stream ------------------------------------------------------------------------------------------

    def _is_as_asked(self, channel: Channel, stream: _UpbitStream) -> bool:
        """Whether the channel is what the stream asks for, to the byte."""
        if channel.name != stream.type or channel.form != self.form:
            return False
        return channel.what is not What.BOOK or (channel.depth, channel.level_e8) == (stream.units, stream.level_e8)

    def _concerns(self, channel: Channel, stream: _UpbitStream) -> bool:
        """Whether this channel, of all that tell the like, serves the stream."""
        if channel.what is What.MARKET:
            return stream.type in (What.BOOK, What.TRADE)
        if channel.name != stream.type:
            return False
        if self._is_as_asked(channel, stream):
            return True
        offer = self.server.source.offers.get(channel.code)
        if offer is not None and any(self._is_as_asked(other, stream) for other in offer.shapes.values()):
            return False
        return channel.what is not What.BOOK or self.server.upbit_board(channel.code).is_source(channel)

    def _choose_way(self, channel: Channel) -> Way:
        streams = [stream for stream in self.streams.get(channel.code, ()) if self._concerns(channel, stream)]
        if not any(stream.awaits_snapshot or stream.realtime for stream in streams):
            return Way.NOTHING
        if len(streams) == 1 and streams[0].realtime and not streams[0].awaits_snapshot and not channel.snapshot:
            return Way.RECORDED if self._is_as_asked(channel, streams[0]) else Way.MADE
        return Way.MADE

    def tell(self, message: Message) -> None:
        """Books and trades, recorded or derived."""
        channel = message.channel
        for stream in self.streams.get(channel.code, ()):
            if not (stream.awaits_snapshot or stream.realtime) or not self._concerns(channel, stream):
                continue
            first, stream.awaits_snapshot = stream.awaits_snapshot, False
            if first:
                self._ways.clear()
            elif channel.snapshot and not stream.snapshot:
                continue  # only the realtime messages were asked for
            if channel.what is What.MARKET:
                self._tell_market(message, stream, first=first)
            else:
                self._tell_recorded(message, stream, as_first=False)

    def _snapshot(self, board: UpbitBoard, stream: _UpbitStream) -> None:
        """The newest message of a code as the first of a subscription."""
        newest = board.newest
        if newest is not None and newest.channel.what is What.MARKET:
            if self._concerns(newest.channel, stream):
                stream.awaits_snapshot = False
                self._tell_market(newest, stream, first=True)
            return
        told = board.newest if stream.type == What.BOOK else board.trade if stream.type == What.TRADE else None
        if told is not None:
            stream.awaits_snapshot = False
            self._tell_recorded(told, stream, as_first=True)

    def _tell_recorded(self, message: Message, stream: _UpbitStream, *, as_first: bool) -> None:
        channel = message.channel
        key = (self.form, stream.units, stream.level_e8, as_first)
        if self._is_as_asked(channel, stream):
            payload: bytes | None = as_snapshot(message.payload) if as_first else message.payload
        elif channel.what is What.BOOK:
            payload = message.made(key, lambda: self._book(message, stream, snapshot=as_first or channel.snapshot))
        else:
            payload = message.made(key, lambda: upbit_other_as(message, self.form))
            payload = as_snapshot(payload) if as_first and payload else payload
        if payload is not None:
            self.send(payload, Op.BINARY, f"{channel.name}:{channel.code}")

    def _book(self, message: Message, stream: _UpbitStream, *, snapshot: bool) -> bytes | None:
        shown = event(message)
        if shown is None or (stream.level_e8 and stream.level_e8 not in _levels_e8(shown)):
            return None
        book = _grouped(shown.book, stream.level_e8)
        return upbit_book_as(shown, units=stream.units, form=self.form, level_e8=stream.level_e8, snapshot=snapshot, book=book)

    def _tell_market(self, message: Message, stream: _UpbitStream, *, first: bool) -> None:
        """The synthetic market gives books; trades follow from them."""
        if stream.type == What.BOOK:
            key = (self.form, stream.units, stream.level_e8, first)
            payload = message.made(key, lambda: self._book(message, stream, snapshot=first))
            if payload is not None:
                self.send(payload, Op.BINARY, f"orderbook:{stream.code}")
        elif (flow := self.server.upbit_board(stream.code).follow()) is not None:
            if first:
                self._tell_trade(message, flow.last, stream, first=True)
            elif message.moved is not None and message.event is not None:
                for number in range(len(message.moved.trades)):
                    self._tell_trade(message, flow.row(message.event, message.moved, number), stream, first=False)

    def _tell_trade(self, message: Message, trade: UpbitTrade, stream: _UpbitStream, *, first: bool) -> None:
        simple, number = self.form.startswith("SIMPLE"), trade.sequential_id
        payload = message.made(
            (self.form, number, first),
            lambda: listed(upbit_trade(stream.code, trade, simple=simple, snapshot=first), self.form),
        )
        self.send(payload, Op.BINARY, f"trade:{stream.code}", number, number)

    async def attend(self) -> None:
        """UP frames for who asked, and an abrupt end for a connection on which nothing moves."""
        every, idle = self.options.upbit_up_s, self.options.upbit_idle_s
        loop = asyncio.get_running_loop()
        next_up = loop.time() + 0.65 * every
        while True:
            quiet_since = max(self.sent_at, self.ws.heard_at)
            if loop.time() >= quiet_since + idle:
                self.ws.transport.abort()
                return
            await asyncio.sleep(max(0.0, min(next_up, quiet_since + idle) - loop.time()))
            if loop.time() >= next_up:
                next_up += every
                if self.says_up and not self.server.stalled(self.venue):
                    self.send(b'{"status":"UP"}', Op.BINARY)


def _tick_e8(shown: MarketEvent) -> int:
    prices = shown.book.ask_px_e8 or shown.book.bid_px_e8 or (E8,)
    return upbit_tick_e8(shown.code, prices[0], upbit_date(shown.mark * 1_000_000))


def _levels_e8(shown: MarketEvent) -> list[int]:
    """Price groupings that the venue offers for a code: none, and three decades above its tick."""
    tick = _tick_e8(shown)
    return [0, 10 * tick, 100 * tick, 1_000 * tick]


def _grouped(book: Book, level_e8: int) -> Book:
    """The book with prices grouped: asks up, bids down to a multiple of ``level_e8`` (0 = as it is)."""
    if level_e8 == 0:
        return book
    bids: dict[int, int] = {}
    asks: dict[int, int] = {}
    for px, size in zip(book.bid_px_e8, book.bid_size_e8, strict=True):
        group = px // level_e8 * level_e8
        bids[group] = bids.get(group, 0) + size
    for px, size in zip(book.ask_px_e8, book.ask_size_e8, strict=True):
        group = -(-px // level_e8) * level_e8
        asks[group] = asks.get(group, 0) + size
    return Book(tuple(bids), tuple(bids.values()), tuple(asks), tuple(asks.values()))


# REST -----------------------------------------------------------------------------------------------------------------------


def upbit_rest(server: ExchangeServer, path: str, query: Mapping[str, str]) -> Response:
    """Answer ``GET`` on a path of Upbit's REST, as often in a second as the group of the path allows."""
    group = _GROUPS.get(path)
    if group is None:
        return reply(HTTPStatus.NOT_FOUND, _error("not_found", "no Route matched with those values"), {})
    limit = server.options.upbit_rest_per_s
    use = server.upbit_quota[group].take(1, limit)
    headers = {"Remaining-Req": f"group={group}; min=600; sec={max(0, limit - use.used)}"}
    if use.is_refused or use.is_banned:
        return reply(use.status, _error("too_many_requests", "요청 수 제한을 초과했습니다."), headers)
    if path == "/v1/market/all":
        details = query.get("is_details") == "true"
        return reply(HTTPStatus.OK, to_json([_market(code, details) for code in server.upbit_codes]), headers)
    if path == "/v1/ticker/all":
        quotes = query.get("quote_currencies", "KRW").upper().split(",")
        codes = [code for code in server.upbit_codes if code.partition("-")[0] in quotes]
        query = {"markets": ",".join(codes)}
    status, body = _rest_books(server, path, query)
    return reply(status, body, headers)


_GROUPS = {
    "/v1/market/all": "market",
    "/v1/orderbook": "orderbook",
    "/v1/orderbook/instruments": "orderbook",
    "/v1/ticker": "ticker",
    "/v1/ticker/all": "ticker",
}
UPBIT_GROUPS = tuple(dict.fromkeys(_GROUPS.values()))


def _rest_books(server: ExchangeServer, path: str, query: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
    if not query.get("markets"):
        return HTTPStatus.BAD_REQUEST, _error(400, "Missing parameter: markets")
    shown: list[tuple[UpbitBoard, MarketEvent]] = []
    for code in query["markets"].upper().split(","):
        if code not in server.upbit_codes:
            return HTTPStatus.NOT_FOUND, _error(404, "Code not found")
        board = server.upbit_board(code)
        if (found := board.event()) is not None:
            shown.append((board, found))
    if path == "/v1/orderbook/instruments":
        return HTTPStatus.OK, to_json([_instrument(found) for _, found in shown])
    if path.startswith("/v1/ticker"):
        return HTTPStatus.OK, b"[%b]" % b",".join(_ticker(board, found) for board, found in shown)
    count, level = query.get("count", "30"), query.get("level", "0")
    if not (count.isascii() and count.isdigit() and re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,8})?", level)):
        return HTTPStatus.BAD_REQUEST, _error(400, "Type mismatch error. Check the parameters type!")
    units, level_e8 = min(max(int(count[:9]), 1), 30), round(float(level) * E8)
    books = b",".join(
        upbit_rest_orderbook(found.code, _grouped(found.book, level_e8), found.mark, count=units, level_e8=level_e8)
        for _, found in shown
        if level_e8 == 0 or level_e8 in _levels_e8(found)
    )
    return HTTPStatus.OK, b"[%b]" % books


def _ticker(board: UpbitBoard, found: MarketEvent) -> bytes:
    """The part of a ticker that can be told: the last trade, or the best bid where there was none. Day figures are left out."""
    side = found.book.bid_px_e8 or found.book.ask_px_e8
    price, time_ms = _number(side[0]) if side else "0", found.mark
    flow = board.follow()
    if flow is not None:
        price, time_ms = _number(flow.last.px_e8), flow.last.time_ms
    elif board.trade is not None and (last := upbit_last_trade(board.trade)) is not None:
        price, time_ms = f"{last[0]:f}", last[1]
    moment = datetime.fromtimestamp(time_ms / 1e3, tz=UTC)
    return (
        f'{{"market":"{board.code}","trade_date":"{moment:%Y%m%d}","trade_time":"{moment:%H%M%S}",'
        f'"trade_timestamp":{time_ms},"trade_price":{price},"timestamp":{found.mark},'
        '"market_state":"ACTIVE","market_warning":"NONE","delisting_date":null}'
    ).encode()


def _error(name: str | int, message: str) -> bytes:
    return to_json({"error": {"name": name, "message": message}})


_NAMES = {
    "BTC": ("비트코인", "Bitcoin"),
    "ETH": ("이더리움", "Ethereum"),
    "XRP": ("엑스알피(리플)", "XRP"),
    "USDT": ("테더", "Tether"),
}


def _market(code: str, details: bool) -> dict[str, object]:
    base = code.partition("-")[2]
    korean, english = _NAMES.get(base, (base, base))
    market: dict[str, object] = {"market": code, "korean_name": korean, "english_name": english}
    if details:
        cautions = (
            "PRICE_FLUCTUATIONS",
            "TRADING_VOLUME_SOARING",
            "DEPOSIT_AMOUNT_SOARING",
            "GLOBAL_PRICE_DIFFERENCES",
            "CONCENTRATION_OF_SMALL_ACCOUNTS",
        )
        market["market_event"] = {"warning": False, "caution": dict.fromkeys(cautions, False)}
    return market


def _instrument(shown: MarketEvent) -> dict[str, object]:
    levels = [_number(level) for level in _levels_e8(shown)]
    return {
        "market": shown.code,
        "quote_currency": shown.code.partition("-")[0],
        "tick_size": _number(_tick_e8(shown)),
        "supported_levels": levels,
    }


def _number(value_e8: int) -> str:
    return decimal_text(value_e8).rstrip("0").rstrip(".")
