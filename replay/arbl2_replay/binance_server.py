"""Binance's side of the exchange server: its streams and requests, its pings and limits, its REST."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from arbl2.frames import ExchangeId, Op
from arbl2.rules import binance_rules
from arbl2_replay.flow import BinanceFlow
from arbl2_replay.serving import Client, reply, to_json
from arbl2_replay.wire import (
    E8,
    binance_book_ticker,
    binance_combined,
    binance_depth,
    binance_diff,
    binance_trade,
    decimal_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from websockets.http11 import Response

    from arbl2_replay.flow import Moved
    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.serving import Connection, SentLog
    from arbl2_replay.synth import MarketEvent

_STREAM = re.compile(r"([a-z0-9]+)@(?:(depth)(5|10|20)?(@100ms|@1000ms)?|(trade)|(bookTicker))")
_MAX_STREAMS = 1_024
_METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")


class _Stream(NamedTuple):
    name: str
    symbol: str
    what: str
    """depth, diff, trade or bookTicker."""
    depth: int
    slow: bool


def _stream(name: str) -> _Stream | None:
    """What a stream name asks for; None for what the venue does not have, which it accepts and never answers."""
    match = _STREAM.fullmatch(name)
    if match is None:
        return None
    symbol, depth, levels, speed, trade, ticker = match.groups()
    what = trade or ticker or ("depth" if levels else "diff")
    return _Stream(name, symbol.upper(), what, int(levels or 0), slow=bool(depth) and speed != "@100ms")


class BinanceClient(Client):
    """A client of Binance."""

    venue = ExchangeId.BINANCE

    def __init__(self, server: ExchangeServer, ws: Connection, sent: SentLog) -> None:
        super().__init__(server, ws, sent)
        url = urlsplit(sent.path)
        self.combined = url.path == "/stream"
        if self.combined:
            named = parse_qs(url.query).get("streams", [""])[0].split("/")
        else:
            named = unquote(url.path).removeprefix("/ws").strip("/").split("/")
        self.streams: dict[str, _Stream | None] = {}
        self._by_symbol: dict[str, list[_Stream]] = {}
        self._choose({name: _stream(name) for name in named if name})
        self.heard: deque[float] = deque(maxlen=self.options.binance_messages_per_s)

    @property
    def subscribed(self) -> bool:
        """Whether the client has asked for any stream."""
        return bool(self.streams)

    @property
    def tells_changes(self) -> bool:
        """Whether one of the streams is a diff stream."""
        return any(stream.what == "diff" for streams in self._by_symbol.values() for stream in streams)

    async def receive(self, message: str | bytes) -> None:
        """A request; too many of them end the connection."""
        now = self.ws.loop.time()
        if len(self.heard) == self.heard.maxlen and now - self.heard[0] < 1.0:
            await self.close(1008, "Too many requests")
            return
        self.heard.append(now)
        answer = self._answer(message)
        if self.server.faults is not None:
            spoiled = self.server.faults.acknowledged(self, answer)
            if spoiled is None:
                return
            answer = spoiled
        self.send(to_json(answer), Op.TEXT)

    def _answer(self, message: str | bytes) -> dict[str, object]:
        try:
            request = msgspec.json.decode(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return {"code": 3, "msg": "Invalid JSON: expected value at line 1 column 1"}
        if not isinstance(request, dict):
            return {"code": 2, "msg": "Invalid request: expected an object"}
        number = request.get("id")
        if not _is_request_id(number):
            return {"code": 2, "msg": "Invalid request: request ID must be an unsigned integer"}
        method = request.get("method")
        if method is None:
            return {"code": 2, "msg": "Invalid request: missing field `method`", "id": number}
        if method not in _METHODS:
            known = ", ".join(f"`{name}`" for name in _METHODS)
            return {
                "code": 2,
                "msg": f"Invalid request: unknown variant `{method}`, expected one of {known}",
                "id": number,
            }
        return self._do(method, request.get("params", []), number)

    def _do(self, method: str, params: object, number: object) -> dict[str, object]:
        if not isinstance(params, list):
            return {"code": 2, "msg": "Invalid request: params must be an array", "id": number}
        if method == "LIST_SUBSCRIPTIONS":
            return {"result": list(self.streams), "id": number}
        if method in ("SUBSCRIBE", "UNSUBSCRIBE"):
            if not all(isinstance(name, str) for name in params):
                return {"code": 2, "msg": "Invalid request: stream name must be a string", "id": number}
            if len(self.streams) + len(params) > _MAX_STREAMS:
                return {"code": 2, "msg": "Invalid request: too many streams", "id": number}
            if method == "SUBSCRIBE":
                self._choose(self.streams | {name: _stream(name) for name in params})
            else:
                self._choose({name: stream for name, stream in self.streams.items() if name not in params})
            return {"result": None, "id": number}
        if not params or params[0] != "combined":
            return {"code": 0, "msg": "Unknown property", "id": number}
        if method == "GET_PROPERTY":
            return {"result": self.combined, "id": number}
        if len(params) != 2 or not isinstance(params[1], bool):
            return {"code": 1, "msg": "Invalid value type: expected Boolean", "id": number}
        self.combined = params[1]
        return {"result": None, "id": number}

    def _choose(self, streams: dict[str, _Stream | None]) -> None:
        self.streams = streams
        self._by_symbol = {}
        for stream in streams.values():
            if stream is not None:
                self._by_symbol.setdefault(stream.symbol, []).append(stream)
        for event in self.server.newest(self.venue):
            if any(stream.what != "depth" for stream in self._by_symbol.get(event.code, ())):
                self.server.flow(event)

    def publish(self, event: MarketEvent, moved: Moved | None, encoded: dict[object, bytes], count: int) -> None:
        """Whatever the event means for each stream."""
        for stream in self._by_symbol.get(event.code, ()):
            if stream.what == "depth":
                if stream.slow and count % 10:
                    continue
                raw = encoded.get(stream.depth)
                if raw is None:
                    raw = encoded[stream.depth] = binance_depth(event.book, event.mark, depth=stream.depth)
                self._tell(stream, raw, event.mark, event.mark)
            elif moved is None:
                self.server.flow(event)
            elif stream.what == "diff":
                change = moved.slow if stream.slow else moved.change
                if change is not None:
                    key = (stream.what, stream.slow)
                    if key not in encoded:
                        encoded[key] = binance_diff(event.code, change, moved.time_ms)
                    self._tell(stream, encoded[key], change.first_id, change.last_id)
            elif stream.what == "trade":
                for number, (px, size, sells) in enumerate(moved.trades, moved.first_trade_id):
                    raw = binance_trade(event.code, number, px, size, moved.time_ms, taker_sells=sells)
                    self._tell(stream, raw, number, number)
            elif moved.touch:
                self._tell(stream, binance_book_ticker(event.code, event.book, event.mark), event.mark, event.mark)

    def _tell(self, stream: _Stream, raw: bytes, first_id: int, last_id: int) -> None:
        self.send(binance_combined(stream.name, raw) if self.combined else raw, Op.TEXT, stream.name, first_id, last_id)

    def announce_shutdown(self, time_ms: int) -> None:
        """The notice that the venue is about to close the connection."""
        notice = to_json({"e": "serverShutdown", "E": time_ms})
        self.send(binance_combined("!serverShutdown", notice) if self.combined else notice, Op.TEXT)

    async def attend(self) -> None:
        """A ping every so often, the end for a client that does not answer, and for one that has been here too long."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + self.options.binance_lifetime_s
        while True:
            await asyncio.sleep(min(self.options.binance_ping_s, ends_at - loop.time()))
            if loop.time() >= ends_at:
                await self.close(1008, "Connection lifetime exceeded")
                return
            if self.frozen:
                continue
            answered = await self.ws.ping(str(time.time_ns() // 1_000_000))
            patience = min(self.options.binance_pong_s, ends_at - loop.time())
            try:
                await asyncio.wait_for(asyncio.shield(answered), patience)
            except TimeoutError:
                if patience == self.options.binance_pong_s:
                    await self.close(1008, "Pong timeout")
                    return


def _is_request_id(number: object) -> bool:
    if isinstance(number, str):
        return len(number) <= 36 and number.isascii() and number.isalnum()
    return number is None or (isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63)


# REST -----------------------------------------------------------------------------------------------------------------------


def binance_rest(server: ExchangeServer, path: str, query: Mapping[str, str]) -> Response:
    """Answer ``GET`` on a path below /api/v3/, as long as the weight of the minute lasts."""
    weight = _weight(path, query)
    if weight is None:
        return reply(HTTPStatus.NOT_FOUND, b"", {})
    used, left_s = server.binance_weight.take(weight)
    headers = {"X-MBX-USED-WEIGHT-1M": str(used)}
    limit = server.options.binance_weight_per_min
    if used > limit:
        said = f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE."
        body = to_json({"code": -1003, "msg": said})
        return reply(HTTPStatus.TOO_MANY_REQUESTS, body, {**headers, "Retry-After": str(math.ceil(left_s))})
    now_ms = server.now_ms(ExchangeId.BINANCE)
    status, body = HTTPStatus.OK, b"{}"
    if path == "exchangeInfo":
        status, body = _exchange_info(server, query, now_ms)
    elif path == "depth":
        status, body = _rest_depth(server, query)
    elif path == "time":
        body = to_json({"serverTime": now_ms})
    return reply(status, body, headers)


def _weight(path: str, query: Mapping[str, str]) -> int | None:
    """What a request costs; None for a path that does not exist."""
    if path == "depth":
        limit = query.get("limit", "100")
        levels = int(limit[:9]) if limit.isascii() and limit.isdigit() else 0
        return next(weight for most, weight in ((100, 5), (500, 25), (1_000, 50), (10**9, 250)) if levels <= most)
    return {"ping": 1, "time": 1, "exchangeInfo": 20}.get(path)


def _exchange_info(server: ExchangeServer, query: Mapping[str, str], now_ms: int) -> tuple[HTTPStatus, bytes]:
    wanted: object = list(server.binance_symbols)
    if "symbol" in query:
        wanted = [query["symbol"]]
    elif "symbols" in query:
        try:
            wanted = msgspec.json.decode(query["symbols"])
        except (msgspec.MsgspecError, RecursionError):
            wanted = None
    if not isinstance(wanted, list) or any(symbol not in server.binance_symbols for symbol in wanted):
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1121, "msg": "Invalid symbol."})
    limit = server.options.binance_weight_per_min
    body = {
        "timezone": "UTC",
        "serverTime": now_ms,
        "rateLimits": [{"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": limit}],
        "exchangeFilters": [],
        "symbols": [_exchange_symbol(symbol) for symbol in wanted],
    }
    return HTTPStatus.OK, to_json(body)


def _rest_depth(server: ExchangeServer, query: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
    if "symbol" not in query:
        missing = "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed."
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1102, "msg": missing})
    event = server.last_event(ExchangeId.BINANCE, query["symbol"])
    if event is None:
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1121, "msg": "Invalid symbol."})
    limit = query.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 5_000):
        illegal = "Illegal characters found in parameter 'limit'; legal range is '1-5000'."
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1100, "msg": illegal})
    flow = server.flow(event)
    assert isinstance(flow, BinanceFlow)
    deep = flow.deep
    return HTTPStatus.OK, binance_depth(deep.book(int(limit)), deep.last_id, depth=int(limit))


def _exchange_symbol(symbol: str) -> dict[str, object]:
    rules = binance_rules(symbol)
    filters: list[dict[str, object]] = []
    if rules is not None:
        tick, lot = decimal_text(rules.tick_e8), decimal_text(rules.lot_e8)
        filters = [
            {
                "filterType": "PRICE_FILTER",
                "minPrice": tick,
                "maxPrice": decimal_text(10**14 - rules.tick_e8),
                "tickSize": tick,
            },
            {"filterType": "LOT_SIZE", "minQty": lot, "maxQty": decimal_text(9_000 * E8 * 1_000), "stepSize": lot},
            {
                "filterType": "NOTIONAL",
                "minNotional": decimal_text(rules.min_notional_e8),
                "applyMinToMarket": True,
                "maxNotional": "9000000.00000000",
                "applyMaxToMarket": False,
                "avgPriceMins": 5,
            },
        ]
    return {
        "symbol": symbol,
        "status": "TRADING",
        "baseAsset": symbol.removesuffix("USDT"),
        "baseAssetPrecision": 8,
        "quoteAsset": "USDT",
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "isSpotTradingAllowed": True,
        "filters": filters,
    }
