"""Binance's side of the exchange server: its streams and requests, its pings and limits, its REST."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from arbl2.frames import ExchangeId, Op
from arbl2.rules import binance_rules
from arbl2_replay.channels import binance_stream
from arbl2_replay.encode import binance_as, event
from arbl2_replay.serving import Client, Way, reply, to_json
from arbl2_replay.sources import What
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

    from arbl2_replay.boards import BinanceBoard
    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.serving import Connection, SentLog
    from arbl2_replay.sources import Channel, Message
    from arbl2_replay.wire import DepthChange

_MAX_STREAMS = 1_024
_METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")


class _Stream(NamedTuple):
    name: str
    symbol: str
    what: What
    depth: int = 0
    slow: bool = False


def _stream(name: str) -> _Stream:
    """What a stream name asks for. A name that the venue does not have is accepted too, and never answered."""
    known = binance_stream(name)
    if known is None:
        return _Stream(name, name.partition("@")[0].upper(), What.OTHER)
    symbol, what, depth, slow = known
    return _Stream(name, symbol, what, depth, slow)


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
        self.streams: dict[str, _Stream] = {}
        self._by_symbol: dict[str, list[_Stream]] = {}
        self._choose({name: _stream(name) for name in named if name})
        self.heard: deque[float] = deque(maxlen=self.options.binance_messages_per_s)

    @property
    def subscribed(self) -> bool:
        """Whether the client has asked for any stream."""
        return bool(self.streams)

    def wants(self, code: str) -> bool:
        """Whether it has asked for anything of a symbol."""
        return code in self._by_symbol

    @property
    def tells_changes(self) -> bool:
        """Whether one of the streams is a diff stream."""
        return any(stream.what is What.DIFF for streams in self._by_symbol.values() for stream in streams)

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
        self._chosen_anew()
        return {"result": None, "id": number}

    def _choose(self, streams: dict[str, _Stream]) -> None:
        self.streams = streams
        self._by_symbol = {}
        for stream in streams.values():
            self._by_symbol.setdefault(stream.symbol, []).append(stream)
        self._chosen_anew()
        for symbol in self._by_symbol:
            self._follow(symbol)
        self.server.client_changed()

    def _follow(self, symbol: str) -> None:
        """Let what nobody recorded be derived from now on, if one of the streams needs it."""
        board = self.server.binance_board(symbol)
        if board is None:
            return
        made = [stream for stream in self._by_symbol[symbol] if not self._is_recorded(stream)]
        kinds = {stream.what for stream in made}
        if What.DEPTH in kinds:
            board.show_books()
        if board.has_diffs and What.DIFF in kinds:
            board.merge()
            kinds.discard(What.DIFF)
        if kinds & {What.DIFF, What.TICKER, What.TRADE}:
            board.follow()

    # what a message means to a stream ------------------------------------------------------------------------------------------

    def _is_recorded(self, stream: _Stream) -> bool:
        offer = self.server.source.offers.get(stream.symbol)
        return offer is not None and stream.name in offer.names()

    def _choose_way(self, channel: Channel) -> Way:
        if channel.what is What.NOTICE:
            return Way.RECORDED if self.options.disconnects else Way.NOTHING
        streams = self._by_symbol.get(channel.code, ())
        recorded = [stream for stream in streams if stream.name == channel.name]
        board = self.server.binance_board(channel.code)
        if board is not None and any(board.serves(channel, stream.what) and not self._is_recorded(stream) for stream in streams):
            return Way.MADE
        if not recorded:
            return Way.NOTHING
        return Way.RECORDED if self.combined == (channel.form == "combined") else Way.MADE

    def tell(self, message: Message) -> None:
        """Whatever the message means for each stream."""
        channel = message.channel
        board = self.server.binance_board(channel.code)
        for stream in self._by_symbol.get(channel.code, ()):
            if stream.name == channel.name:
                is_as_asked = self.combined == (channel.form == "combined")
                payload = message.payload if is_as_asked else binance_as(message, stream.name, combined=self.combined)
                if payload is not None:
                    self.send(payload, Op.TEXT, stream.name, *self._ids(message))
            elif board is not None and board.serves(channel, stream.what) and not self._is_recorded(stream):
                self._tell_made(message, board, stream)

    def _tell_made(self, message: Message, board: BinanceBoard, stream: _Stream) -> None:
        """A stream that was not recorded, from the books that were."""
        moved = message.moved
        if stream.what is What.DIFF and board.has_diffs:
            self._tell_change(message, stream, message.merged if stream.slow else None, self.server.time_ms(message))
            return
        shown = event(message)
        if stream.slow and not message.is_slow_turn:
            return
        if stream.what is What.DEPTH:
            if shown is not None:
                raw = message.made(stream.depth, lambda: binance_depth(shown.book, shown.mark, depth=stream.depth))
                self._tell(stream, raw, shown.mark, shown.mark)
        elif moved is None:
            board.follow()
        elif stream.what is What.DIFF:
            self._tell_change(message, stream, moved.slow if stream.slow else moved.change, moved.time_ms)
        elif stream.what is What.TRADE and message.channel.what is What.MARKET:
            for number, (px, size, sells) in enumerate(moved.trades, moved.first_trade_id):
                raw = binance_trade(stream.symbol, number, px, size, moved.time_ms, taker_sells=sells)
                self._tell(stream, raw, number, number)
        elif stream.what is What.TICKER and moved.touch and shown is not None:
            self._tell(stream, binance_book_ticker(stream.symbol, shown.book, shown.mark), shown.mark, shown.mark)

    def _tell_change(self, message: Message, stream: _Stream, change: DepthChange | None, time_ms: int) -> None:
        if change is not None:
            raw = message.made((stream.what, stream.slow), lambda: binance_diff(stream.symbol, change, time_ms))
            self._tell(stream, raw, change.first_id, change.last_id)

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
        # 36 characters are a UUID, hyphens and all
        return len(number) <= 36 and number.isascii() and number.replace("-", "").isalnum()
    return number is None or (isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63)


# REST -----------------------------------------------------------------------------------------------------------------------


def binance_rest(server: ExchangeServer, path: str, query: Mapping[str, str]) -> Response:
    """Answer ``GET`` on a path below /api/v3/, as long as the weight of the minute lasts."""
    weight = _weight(path, query)
    if weight is None:
        return reply(HTTPStatus.NOT_FOUND, b"", {})
    limit = server.options.binance_weight_per_min
    use = server.binance_weight.take(weight, limit)
    headers = dict.fromkeys(("X-MBX-USED-WEIGHT", "X-MBX-USED-WEIGHT-1M"), str(use.used))
    if use.is_refused or use.is_banned:
        said = f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE."
        body = to_json({"code": -1003, "msg": said})
        return reply(use.status, body, {**headers, "Retry-After": str(math.ceil(use.left_s))})
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
        "symbols": [_exchange_symbol(server, symbol) for symbol in wanted],
    }
    return HTTPStatus.OK, to_json(body)


def _rest_depth(server: ExchangeServer, query: Mapping[str, str]) -> tuple[HTTPStatus, bytes]:
    if "symbol" not in query:
        missing = "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed."
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1102, "msg": missing})
    board = server.binance_board(query["symbol"])
    if board is None:
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1121, "msg": "Invalid symbol."})
    limit = query.get("limit", "100")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 5_000):
        illegal = "Illegal characters found in parameter 'limit'; legal range is '1-5000'."
        return HTTPStatus.BAD_REQUEST, to_json({"code": -1100, "msg": illegal})
    found = board.rest(int(limit))
    if found is None:
        return HTTPStatus.SERVICE_UNAVAILABLE, to_json({"code": -1000, "msg": "No book of this symbol is known at this moment."})
    return HTTPStatus.OK, binance_depth(found[1], found[0], depth=int(limit))


def _exchange_symbol(server: ExchangeServer, symbol: str) -> object:
    recorded = server.source.exchange_info.get(symbol)
    if recorded is not None:
        return msgspec.json.decode(recorded)
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
