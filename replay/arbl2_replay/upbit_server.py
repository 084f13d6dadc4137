"""Upbit's side of the exchange server: its WebSocket requests, its silences and errors, its REST."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.frames import ExchangeId, Op
from arbl2.rules import upbit_date, upbit_tick_e8
from arbl2_replay.flow import UpbitFlow
from arbl2_replay.serving import Client, reply, to_json
from arbl2_replay.wire import E8, UPBIT_UNITS, Book, decimal_text, upbit_orderbook, upbit_rest_orderbook, upbit_trade

if TYPE_CHECKING:
    from collections.abc import Mapping

    from websockets.http11 import Response

    from arbl2_replay.flow import Moved
    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.serving import Connection, SentLog
    from arbl2_replay.synth import MarketEvent
    from arbl2_replay.wire import UpbitTrade

_ERRORS = {
    "WRONG_FORMAT": "요청 형식이 맞지 않습니다.",
    "NO_TICKET": "ticket이 없습니다.",
    "NO_TYPE": "type이 없습니다.",
    "NO_CODES": "codes가 없습니다.",
    "INVALID_PARAM": "지원하지 않는 값입니다.",
}
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
    simple: bool
    types: list[_UpbitType]
    list_only: bool


@dataclass(slots=True)
class _UpbitStream:
    type: str
    code: str
    units: int
    level_e8: int
    awaits_snapshot: bool
    realtime: bool


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
    if formats[0] not in ("DEFAULT", "SIMPLE"):
        raise _RefusedError("INVALID_PARAM")
    list_only = any(part.get("method") == "LIST_SUBSCRIPTIONS" for part in parts)
    types = [_upbit_type(part) for part in parts if "type" in part]
    if not types and not list_only:
        raise _RefusedError("NO_TYPE")
    return _UpbitRequest(tickets[0], formats[0] == "SIMPLE", types, list_only)


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
        if kind.type == "trade":
            streams += [_UpbitStream("trade", code, 0, 0, kind.snapshot, kind.realtime) for code in kind.codes]
        elif kind.type == "orderbook":
            streams += [stream for text in kind.codes if (stream := _upbit_book_stream(kind, text)) is not None]
        # the market has no other types: they are as silent as codes that do not trade
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
        self.simple = False
        self.types: list[_UpbitType] = []
        self.streams: dict[str, list[_UpbitStream]] = {}
        self.says_up = False

    @property
    def subscribed(self) -> bool:
        """Whether the client has asked for any stream."""
        return bool(self.streams)

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
        self.simple = request.simple
        if request.list_only:
            self._list(request.ticket)
            return
        self.types = request.types
        self.streams = {}
        for stream in _upbit_streams(request):
            self.streams.setdefault(stream.code, []).append(stream)
        for event in self.server.newest(self.venue):
            for stream in self.streams.get(event.code, ()):
                if stream.type == "trade":
                    flow = self.server.flow(event)
                    if stream.awaits_snapshot and isinstance(flow, UpbitFlow):
                        self._tell(event.code, flow.last, stream, {})
                elif stream.awaits_snapshot:
                    self._show(event, stream, {})

    def _list(self, ticket: str) -> None:
        names = ("ty", "cds", "lv") if self.simple else ("type", "codes", "level")
        result: list[dict[str, object]] = []
        for kind in self.types:
            item: dict[str, object] = {names[0]: kind.type, names[1]: kind.codes}
            if kind.type == "orderbook":
                item[names[2]] = kind.level_e8 // E8 if kind.level_e8 % E8 == 0 else kind.level_e8 / E8
            result.append(item)
        heads = ("mthd", "rslt", "tckt") if self.simple else ("method", "result", "ticket")
        self.send(to_json(dict(zip(heads, ("LIST_SUBSCRIPTIONS", result, ticket), strict=True))), Op.BINARY)

    def publish(self, event: MarketEvent, moved: Moved | None, encoded: dict[object, bytes], count: int) -> None:
        """Books, and the trades that led to them."""
        for stream in self.streams.get(event.code, ()):
            if not (stream.awaits_snapshot or stream.realtime):
                continue
            if stream.type == "orderbook":
                self._show(event, stream, encoded)
                continue
            flow = self.server.flow(event)
            assert isinstance(flow, UpbitFlow)
            if stream.awaits_snapshot:
                self._tell(event.code, flow.last, stream, encoded)
            elif moved is not None:
                for number in range(len(moved.trades)):
                    self._tell(event.code, flow.row(event, moved, number), stream, encoded)

    def _tell(self, code: str, trade: UpbitTrade, stream: _UpbitStream, encoded: dict[object, bytes]) -> None:
        snapshot = stream.awaits_snapshot
        stream.awaits_snapshot = False
        key = (self.simple, trade.sequential_id, snapshot)
        payload = encoded.get(key)
        if payload is None:
            payload = encoded[key] = upbit_trade(code, trade, simple=self.simple, snapshot=snapshot)
        self.send(payload, Op.BINARY, f"trade:{code}", trade.sequential_id, trade.sequential_id)

    def _show(self, event: MarketEvent, stream: _UpbitStream, encoded: dict[object, bytes]) -> None:
        snapshot = stream.awaits_snapshot
        stream.awaits_snapshot = False
        key = (self.simple, stream.units, stream.level_e8, snapshot)
        payload = encoded.get(key)
        if payload is None:
            if stream.level_e8 and stream.level_e8 not in _levels_e8(event):
                return
            payload = encoded[key] = upbit_orderbook(
                event.code,
                _grouped(event.book, stream.level_e8),
                event.mark,
                units=stream.units,
                simple=self.simple,
                snapshot=snapshot,
                level_e8=stream.level_e8,
            )
        self.send(payload, Op.BINARY, f"orderbook:{event.code}")

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


def _tick_e8(event: MarketEvent) -> int:
    return upbit_tick_e8(event.code, event.book.ask_px_e8[0], upbit_date(event.mark * 1_000_000))


def _levels_e8(event: MarketEvent) -> list[int]:
    """Price groupings that the venue offers for a code: none, and three decades above its tick."""
    tick = _tick_e8(event)
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
    used, _ = server.upbit_quota[group].take(1)
    limit = server.options.upbit_rest_per_s
    headers = {"Remaining-Req": f"group={group}; min=600; sec={max(0, limit - used)}"}
    if used > limit:
        return reply(HTTPStatus.TOO_MANY_REQUESTS, _error("too_many_requests", "요청 수 제한을 초과했습니다."), headers)
    if path == "/v1/market/all":
        details = query.get("is_details") == "true"
        return reply(HTTPStatus.OK, to_json([_market(code, details) for code in server.upbit_codes]), headers)
    status, body = _rest_books(server, path, query)
    return reply(status, body, headers)


_GROUPS = {"/v1/market/all": "market", "/v1/orderbook": "orderbook", "/v1/orderbook/instruments": "orderbook"}


def _rest_books(server: ExchangeServer, path: str, query: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
    if not query.get("markets"):
        return HTTPStatus.BAD_REQUEST, _error(400, "Missing parameter: markets")
    events = []
    for code in query["markets"].upper().split(","):
        if code not in server.upbit_codes:
            return HTTPStatus.NOT_FOUND, _error(404, "Code not found")
        if (event := server.last_event(ExchangeId.UPBIT, code)) is not None:
            events.append(event)
    if path == "/v1/orderbook/instruments":
        return HTTPStatus.OK, to_json([_instrument(event) for event in events])
    count, level = query.get("count", "30"), query.get("level", "0")
    if not (count.isascii() and count.isdigit() and re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,8})?", level)):
        return HTTPStatus.BAD_REQUEST, _error(400, "Type mismatch error. Check the parameters type!")
    units, level_e8 = min(max(int(count[:9]), 1), 30), round(float(level) * E8)
    books = b",".join(
        upbit_rest_orderbook(event.code, _grouped(event.book, level_e8), event.mark, count=units, level_e8=level_e8)
        for event in events
        if level_e8 == 0 or level_e8 in _levels_e8(event)
    )
    return HTTPStatus.OK, b"[%b]" % books


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


def _instrument(event: MarketEvent) -> dict[str, object]:
    levels = [_number(level) for level in _levels_e8(event)]
    return {
        "market": event.code,
        "quote_currency": event.code.partition("-")[0],
        "tick_size": _number(_tick_e8(event)),
        "supported_levels": levels,
    }


def _number(value_e8: int) -> str:
    return decimal_text(value_e8).rstrip("0").rstrip(".")
