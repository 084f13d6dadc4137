"""Both exchanges on a local socket: a market source behind the venues' own protocols.

Recorders and bots that speak to Upbit and Binance connect here without a change: same paths, same requests, same bytes back,
same silences (an unknown code or stream is accepted and never answered), same ways to end (an error frame and then close 1000,
an abrupt end after idling). Where the market comes from is behind ``MarketSource``; the server adds only the protocol.

Sending never waits: what a client does not read gathers in its socket buffer, and a client past ``client_buffer_bytes`` is
dropped, so that one slow reader neither holds the market up nor fills the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
import signal
import time
from collections import deque
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Op
from arbl2.rules import binance_rules, upbit_date, upbit_tick_e8
from arbl2_replay.synth import STEP_NS, MarketEvent, SynthConfig, binance_symbols, market_events, upbit_codes
from arbl2_replay.wire import (
    E8,
    UPBIT_UNITS,
    Book,
    binance_combined,
    binance_depth,
    decimal_text,
    upbit_orderbook,
    upbit_rest_orderbook,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

log = logging.getLogger("arbl2.server")

UPBIT_PATH = "/websocket/v1"


class MarketSource(Protocol):
    """Where the market comes from."""

    @property
    def upbit_codes(self) -> Sequence[str]:
        """Upbit market codes, such as KRW-BTC."""

    @property
    def binance_symbols(self) -> Sequence[str]:
        """Binance symbols, such as BTCUSDT."""

    def events(self) -> AsyncIterator[MarketEvent]:
        """Every event at the moment when it is due. Called once; when it ends, the connections stay open and silent."""


class SyntheticSource:
    """The synthetic market in real time, ``speed`` times as fast, without an end.

    Exchange times are those of the wall clock at the start and run ``speed`` times as fast too.
    """

    def __init__(self, config: SynthConfig, *, speed: float = 1.0) -> None:
        if not 0 < speed < float("inf"):
            raise ConfigError(f"speed must be a number above zero, not {speed}. Give 1 for real time.")
        self._config = config
        self._speed = speed
        self.upbit_codes = upbit_codes(config)
        self.binance_symbols = binance_symbols(config)

    async def events(self) -> AsyncIterator[MarketEvent]:
        """Every event of the market, paced by the event loop's clock."""
        loop = asyncio.get_running_loop()
        # whole steps, so that each Upbit code keeps its phase of the 100 ms grid
        now_ns = time.time_ns()
        config = msgspec.structs.replace(self._config, start_ns=now_ns // STEP_NS * STEP_NS)
        began = loop.time() - (now_ns - config.start_ns) / 1e9
        for event in market_events(config, endless=True):
            await asyncio.sleep(max(0.0, began + event.offset_ns / 1e9 / self._speed - loop.time()))
            yield event


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the server listens and how patient it is; the defaults are the venues' own times."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes any free port."""
    record_sent: bool = False
    compression: str | None = "deflate"
    """Offered as the venues do; None refuses it."""
    client_buffer_bytes: int = 8 * 2**20
    upbit_idle_s: float = 60.0
    upbit_up_s: float = 10.0
    upbit_error_close_s: float = 0.15
    binance_ping_s: float = 20.0
    binance_pong_s: float = 60.0
    binance_messages_per_s: int = 5


@dataclass(slots=True)
class SentLog:
    """Every data payload that was sent to one connection, in order: its form and the SHA-256 of its bytes."""

    conn: int
    venue: str
    path: str
    payloads: list[tuple[Op, bytes]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Payloads so far."""
        return len(self.payloads)


class _Connection(ServerConnection):
    """Remembers when the client was last heard, be it only a ping."""

    heard_at: float = 0.0

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        super().data_received(data)


class _Client:
    """One WebSocket connection."""

    venue: ExchangeId

    def __init__(self, server: ExchangeServer, ws: _Connection, sent: SentLog) -> None:
        self.server = server
        self.options = server.options
        self.ws = ws
        self.sent = sent
        self.sent_at = ws.loop.time()

    def send(self, payload: bytes, op: Op) -> None:
        """Hand a payload to the socket without waiting; drops the client when it has stopped reading."""
        if self.ws.state is not State.OPEN:
            return
        broadcast((self.ws,), payload, text=op is Op.TEXT)
        self.sent_at = self.ws.loop.time()
        if self.options.record_sent:
            self.sent.payloads.append((op, hashlib.sha256(payload).digest()))
        waiting = self.ws.transport.get_write_buffer_size()
        if waiting > self.options.client_buffer_bytes:
            log.warning(
                "dropped %s connection %d: it left %s bytes unread; read faster or subscribe to less",
                self.venue,
                self.sent.conn,
                f"{waiting:,}",
            )
            self.ws.transport.abort()

    async def receive(self, message: str | bytes) -> None:
        """Answer one message of the client."""
        raise NotImplementedError

    def publish(self, event: MarketEvent, encoded: dict[object, bytes], count: int) -> None:
        """Send what this client wants of the event; ``encoded`` is shared by all clients, ``count`` is the code's own."""
        raise NotImplementedError

    async def attend(self) -> None:
        """What the venue does by itself while the connection lives."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------------- Upbit

_UPBIT_ERRORS = {
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
        if kind.type != "orderbook":
            continue  # the market has books only: other types are as silent as codes that do not trade
        for text in kind.codes:
            code, dot, units = text.partition(".")
            shown = int(units) if units.isascii() and units.isdigit() and len(units) < 4 else 0
            if dot and shown == 0:
                continue
            streams.append(_UpbitStream(code, shown if shown in UPBIT_UNITS else 30, kind.level_e8, kind.snapshot, kind.realtime))
    return streams


class _UpbitClient(_Client):
    venue = ExchangeId.UPBIT

    def __init__(self, server: ExchangeServer, ws: _Connection, sent: SentLog) -> None:
        super().__init__(server, ws, sent)
        self.simple = False
        self.types: list[_UpbitType] = []
        self.streams: dict[str, list[_UpbitStream]] = {}
        self.says_up = False

    async def receive(self, message: str | bytes) -> None:
        data = message.encode() if isinstance(message, str) else message
        if data == b"PING":
            self.says_up = True
            return
        try:
            request = _upbit_request(data)
        except _RefusedError as error:
            name = str(error)
            self.send(_json({"error": {"name": name, "message": _UPBIT_ERRORS[name]}}), Op.BINARY)
            await asyncio.sleep(self.options.upbit_error_close_s)
            await self.ws.close(1000)
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
                if stream.awaits_snapshot:
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
        self.send(_json(dict(zip(heads, ("LIST_SUBSCRIPTIONS", result, ticket), strict=True))), Op.BINARY)

    def publish(self, event: MarketEvent, encoded: dict[object, bytes], count: int) -> None:
        for stream in self.streams.get(event.code, ()):
            if stream.awaits_snapshot or stream.realtime:
                self._show(event, stream, encoded)

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
        self.send(payload, Op.BINARY)

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


# ----------------------------------------------------------------------------------------------------------------- Binance

_DEPTH_STREAM = re.compile(r"([a-z0-9]+)@depth(5|10|20)(@100ms|@1000ms)?")
_MAX_STREAMS = 1_024
_METHODS = ("SUBSCRIBE", "UNSUBSCRIBE", "LIST_SUBSCRIPTIONS", "SET_PROPERTY", "GET_PROPERTY")


class _BinanceClient(_Client):
    venue = ExchangeId.BINANCE

    def __init__(self, server: ExchangeServer, ws: _Connection, sent: SentLog) -> None:
        super().__init__(server, ws, sent)
        url = urlsplit(sent.path)
        self.combined = url.path == "/stream"
        if self.combined:
            named = parse_qs(url.query).get("streams", [""])[0].split("/")
        else:
            named = unquote(url.path).removeprefix("/ws").strip("/").split("/")
        self.streams = {name: _DEPTH_STREAM.fullmatch(name) for name in named if name}
        self.heard: deque[float] = deque(maxlen=self.options.binance_messages_per_s)

    async def receive(self, message: str | bytes) -> None:
        now = self.ws.loop.time()
        if len(self.heard) == self.heard.maxlen and now - self.heard[0] < 1.0:
            await self.ws.close(1008, "Too many requests")
            return
        self.heard.append(now)
        self.send(_json(self._answer(message)), Op.TEXT)

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
            for name in params:
                if method == "SUBSCRIBE":
                    self.streams[name] = _DEPTH_STREAM.fullmatch(name)
                else:
                    self.streams.pop(name, None)
            return {"result": None, "id": number}
        if not params or params[0] != "combined":
            return {"code": 0, "msg": "Unknown property", "id": number}
        if method == "GET_PROPERTY":
            return {"result": self.combined, "id": number}
        if len(params) != 2 or not isinstance(params[1], bool):
            return {"code": 1, "msg": "Invalid value type: expected Boolean", "id": number}
        self.combined = params[1]
        return {"result": None, "id": number}

    def publish(self, event: MarketEvent, encoded: dict[object, bytes], count: int) -> None:
        for name, match in self.streams.items():
            if match is None or match[1] != event.code.lower() or (match[3] != "@100ms" and count % 10):
                continue
            depth = int(match[2])
            raw = encoded.get(depth)
            if raw is None:
                raw = encoded[depth] = binance_depth(event.book, event.mark, depth=depth)
            self.send(binance_combined(name, raw) if self.combined else raw, Op.TEXT)

    async def attend(self) -> None:
        """A ping every so often, and the end for a client that does not answer."""
        while True:
            await asyncio.sleep(self.options.binance_ping_s)
            answered = await self.ws.ping(str(time.time_ns() // 1_000_000))
            try:
                await asyncio.wait_for(asyncio.shield(answered), self.options.binance_pong_s)
            except TimeoutError:
                await self.ws.close(1008, "Pong timeout")
                return


def _is_request_id(number: object) -> bool:
    if isinstance(number, str):
        return len(number) <= 36 and number.isascii() and number.isalnum()
    return number is None or (isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63)


# -------------------------------------------------------------------------------------------------------------- the server


class ExchangeServer:
    """Upbit and Binance on one loopback port, for any number of clients.

    Use as ``async with ExchangeServer(source) as server``. The market begins with the server, and the body when every
    instrument has a book (or after 2 s without). Raises ConfigError when the port cannot be taken.
    """

    def __init__(self, source: MarketSource, options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        self.sent: list[SentLog] = []
        """Per connection what was sent to it, in the order of opening; filled only with ``record_sent``."""
        self._source = source
        self._clients: list[_Client] = []
        self._newest: dict[tuple[str, str], MarketEvent] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._complete = asyncio.Event()
        self._stalled_until: dict[str, float] = {}
        self._connections = 0
        self._server: Server | None = None
        self._market: asyncio.Task[None] | None = None
        self._address = ""

    async def __aenter__(self) -> Self:
        options = self.options
        try:
            self._server = await serve(
                self._handle,
                options.host,
                options.port,
                process_request=self._respond,
                ping_interval=None,  # Upbit sends none, Binance has its own rhythm
                create_connection=_Connection,
                compression=options.compression,
                close_timeout=2,
            )
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {options.host}:{options.port} ({error.strerror}). Choose another port, or 0 for any free one."
            ) from None
        host = f"[{options.host}]" if ":" in options.host else options.host
        self._address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        self._market = asyncio.create_task(self._run_market())
        complete = asyncio.create_task(self._complete.wait())
        await asyncio.wait((complete, self._market), timeout=2.0, return_when=asyncio.FIRST_COMPLETED)
        complete.cancel()
        log.info("serving Upbit and Binance on %s", self._address)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        assert self._market is not None
        self._market.cancel()
        self._server.close()
        await self._server.wait_closed()
        with contextlib.suppress(asyncio.CancelledError):
            await self._market

    @property
    def port(self) -> int:
        """The port that was taken."""
        return int(self._address.rpartition(":")[2])

    @property
    def upbit_ws_url(self) -> str:
        """WebSocket URL of Upbit."""
        return f"ws://{self._address}{UPBIT_PATH}"

    @property
    def upbit_rest_url(self) -> str:
        """Base URL of Upbit's REST, to be followed by /v1/..."""
        return f"http://{self._address}"

    @property
    def binance_ws_url(self) -> str:
        """Combined WebSocket URL of Binance."""
        return f"ws://{self._address}/stream"

    @property
    def binance_rest_url(self) -> str:
        """Base URL of Binance's REST, to be followed by /api/v3/..."""
        return f"http://{self._address}"

    async def market_ended(self) -> None:
        """Returns when the source has no more events; raises what the source raised."""
        assert self._market is not None
        await asyncio.shield(self._market)

    def clients(self, venue: str) -> int:
        """Open connections of a venue."""
        return len(self._of(venue))

    def newest(self, venue: str) -> list[MarketEvent]:
        """The last book of every code that the venue's clients may see now (none while it is stalled)."""
        if self.stalled(venue):
            return []
        return [event for (owner, _), event in self._newest.items() if owner == venue]

    def stalled(self, venue: str) -> bool:
        """Whether the venue is silent because of ``stall``."""
        return time.monotonic() < self._stalled_until.get(venue, 0.0)

    def stall(self, venue: str, seconds: float) -> None:
        """Keep the venue's connections open but without market data for so long; the market goes on unseen."""
        self._stalled_until[venue] = time.monotonic() + seconds

    async def disconnect(self, venue: str, code: int = 1001, reason: str = "") -> int:
        """End every connection of the venue with a close code; 1006 cuts them without a close frame. Returns how many."""
        clients = self._of(venue)
        for client in clients:
            if code == 1006:
                client.ws.transport.abort()
        if code != 1006:
            await asyncio.gather(*(client.ws.close(code, reason) for client in clients))
        await asyncio.gather(*(client.ws.wait_closed() for client in clients))
        return len(clients)

    def send_raw(self, venue: str, payload: bytes, op: Op | None = None) -> int:
        """Send any bytes to every client of the venue (binary on Upbit, text on Binance, unless said). Returns how many."""
        clients = self._of(venue)
        for client in clients:
            client.send(payload, op or (Op.BINARY if venue == ExchangeId.UPBIT else Op.TEXT))
        return len(clients)

    def _of(self, venue: str) -> list[_Client]:
        return [client for client in self._clients if client.venue == venue and client.ws.state is State.OPEN]

    async def _run_market(self) -> None:
        instruments = len(self._source.upbit_codes) + len(self._source.binance_symbols)
        try:
            async for event in self._source.events():
                key = (event.venue, event.code)
                self._newest[key] = event
                if not self._complete.is_set() and len(self._newest) == instruments:
                    self._complete.set()
                count = self._counts[key] = self._counts.get(key, -1) + 1
                if self.stalled(event.venue):
                    continue
                encoded: dict[object, bytes] = {}
                for client in self._of(event.venue):
                    client.publish(event, encoded, count)
        except Exception:
            log.exception("the market stopped")
            raise
        log.info("the market has ended")

    async def _handle(self, ws: ServerConnection) -> None:
        assert isinstance(ws, _Connection)
        assert ws.request is not None
        path = ws.request.path
        upbit = urlsplit(path).path == UPBIT_PATH
        self._connections += 1
        sent = SentLog(self._connections, ExchangeId.UPBIT if upbit else ExchangeId.BINANCE, path)
        if self.options.record_sent:
            self.sent.append(sent)
        client = _UpbitClient(self, ws, sent) if upbit else _BinanceClient(self, ws, sent)
        self._clients.append(client)
        attendant = asyncio.create_task(client.attend())
        try:
            with contextlib.suppress(ConnectionClosed):
                async for message in ws:
                    await client.receive(message)
        finally:
            self._clients.remove(client)
            attendant.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await attendant

    def _respond(self, _: ServerConnection, request: Request) -> Response | None:
        url = urlsplit(request.path)
        path = url.path
        if path in (UPBIT_PATH, "/stream", "/ws") or path.startswith("/ws/"):
            return None
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if path.startswith("/api/v3/"):
            return self._binance_rest(path.removeprefix("/api/v3/"), query)
        return self._upbit_rest(path, query)

    # REST ---------------------------------------------------------------------------------------------------------------

    def _upbit_rest(self, path: str, query: Mapping[str, str]) -> Response:
        if path == "/v1/market/all":
            details = query.get("is_details") == "true"
            return _upbit_reply(HTTPStatus.OK, _json([_market(code, details) for code in self._source.upbit_codes]))
        if path not in ("/v1/orderbook", "/v1/orderbook/instruments"):
            return _upbit_reply(HTTPStatus.NOT_FOUND, _upbit_error("not_found", "no Route matched with those values"))
        if not query.get("markets"):
            return _upbit_reply(HTTPStatus.BAD_REQUEST, _upbit_error(400, "Missing parameter: markets"))
        events = []
        for code in query["markets"].upper().split(","):
            if code not in self._source.upbit_codes:
                return _upbit_reply(HTTPStatus.NOT_FOUND, _upbit_error(404, "Code not found"))
            if (event := self._newest.get((ExchangeId.UPBIT, code))) is not None:
                events.append(event)
        if path == "/v1/orderbook/instruments":
            return _upbit_reply(HTTPStatus.OK, _json([_instrument(event) for event in events]))
        count, level = query.get("count", "30"), query.get("level", "0")
        if not (count.isascii() and count.isdigit() and re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,8})?", level)):
            message = "Type mismatch error. Check the parameters type!"
            return _upbit_reply(HTTPStatus.BAD_REQUEST, _upbit_error(400, message))
        units, level_e8 = min(max(int(count[:9]), 1), 30), round(float(level) * E8)
        books = b",".join(
            upbit_rest_orderbook(event.code, _grouped(event.book, level_e8), event.mark, count=units, level_e8=level_e8)
            for event in events
            if level_e8 == 0 or level_e8 in _levels_e8(event)
        )
        return _upbit_reply(HTTPStatus.OK, b"[%b]" % books)

    def _binance_rest(self, path: str, query: Mapping[str, str]) -> Response:
        now_ms = time.time_ns() // 1_000_000
        if path == "ping":
            return _binance_reply(HTTPStatus.OK, b"{}")
        if path == "time":
            return _binance_reply(HTTPStatus.OK, _json({"serverTime": now_ms}))
        if path == "exchangeInfo":
            return self._exchange_info(query, now_ms)
        if path == "depth":
            return self._rest_depth(query)
        return _binance_reply(HTTPStatus.NOT_FOUND, b"")

    def _exchange_info(self, query: Mapping[str, str], now_ms: int) -> Response:
        wanted: object = list(self._source.binance_symbols)
        if "symbol" in query:
            wanted = [query["symbol"]]
        elif "symbols" in query:
            try:
                wanted = msgspec.json.decode(query["symbols"])
            except (msgspec.MsgspecError, RecursionError):
                wanted = None
        if not isinstance(wanted, list) or any(symbol not in self._source.binance_symbols for symbol in wanted):
            return _binance_reply(HTTPStatus.BAD_REQUEST, _json({"code": -1121, "msg": "Invalid symbol."}))
        body = {
            "timezone": "UTC",
            "serverTime": now_ms,
            "rateLimits": [{"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 6_000}],
            "exchangeFilters": [],
            "symbols": [_exchange_symbol(symbol) for symbol in wanted],
        }
        return _binance_reply(HTTPStatus.OK, _json(body))

    def _rest_depth(self, query: Mapping[str, str]) -> Response:
        if "symbol" not in query:
            missing = "Mandatory parameter 'symbol' was not sent, was empty/null, or malformed."
            return _binance_reply(HTTPStatus.BAD_REQUEST, _json({"code": -1102, "msg": missing}))
        event = self._newest.get((ExchangeId.BINANCE, query["symbol"]))
        if event is None:
            return _binance_reply(HTTPStatus.BAD_REQUEST, _json({"code": -1121, "msg": "Invalid symbol."}))
        limit = query.get("limit", "100")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= 5_000):
            illegal = "Illegal characters found in parameter 'limit'; legal range is '1-5000'."
            return _binance_reply(HTTPStatus.BAD_REQUEST, _json({"code": -1100, "msg": illegal}))
        return _binance_reply(HTTPStatus.OK, binance_depth(event.book, event.mark, depth=int(limit)))


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


def _upbit_error(name: str | int, message: str) -> bytes:
    return _json({"error": {"name": name, "message": message}})


def _upbit_reply(status: HTTPStatus, body: bytes) -> Response:
    return _reply(status, body, {"Remaining-Req": "group=market; min=600; sec=9"})


def _binance_reply(status: HTTPStatus, body: bytes) -> Response:
    return _reply(status, body, {"X-MBX-USED-WEIGHT-1M": "1"})


def _reply(status: HTTPStatus, body: bytes, extra: dict[str, str]) -> Response:
    headers = Headers(
        {
            "Content-Type": "application/json;charset=UTF-8",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **extra,
        }
    )
    return Response(status.value, status.phrase, headers, body)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def run_server(
    config: SynthConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    ready: Callable[[ExchangeServer], None] = lambda _: None,
    *,
    speed: float = 1.0,
) -> None:
    """Serve the synthetic market until SIGINT or SIGTERM; ``ready`` is called once the server listens.

    Must run in the main thread of its process. Raises ConfigError when the port cannot be taken.
    """
    asyncio.run(_serve_until_signal(SyntheticSource(config, speed=speed), ServerOptions(host=host, port=port), ready))


async def _serve_until_signal(source: MarketSource, options: ServerOptions, ready: Callable[[ExchangeServer], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with ExchangeServer(source, options) as server:
        ready(server)
        stopped = asyncio.create_task(stop.wait())
        ended = asyncio.create_task(server.market_ended())
        await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if ended.done():
            ended.result()
        ended.cancel()
