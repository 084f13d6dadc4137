"""Both exchanges on a local socket: a market source behind the venues' own protocols.

Recorders and bots that speak to Upbit and Binance connect here without a change: same paths, same requests, same bytes back,
same silences (an unknown code or stream is accepted and never answered), same ways to end (an error frame and then close 1000,
an abrupt end after idling). Where the market comes from is behind ``MarketSource``; the server adds only the protocol, and
faults if it is told to.

Sending never waits: what a client does not read gathers in its socket buffer, and a client past ``client_buffer_bytes`` is
dropped, so that one slow reader neither holds the market up nor fills the memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Op
from arbl2_replay.binance_server import BinanceClient, binance_rest
from arbl2_replay.faults import Faults
from arbl2_replay.flow import BinanceFlow, UpbitFlow
from arbl2_replay.serving import Client, Connection, Quota, SentLog, ServerOptions
from arbl2_replay.sources import MarketSource, SyntheticSource
from arbl2_replay.upbit_server import UpbitClient, upbit_rest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from websockets.http11 import Request, Response

    from arbl2_replay.faults import FaultConfig
    from arbl2_replay.synth import MarketEvent, SynthConfig

__all__ = ["ExchangeServer", "MarketSource", "SentLog", "ServerOptions", "SyntheticSource", "run_server"]

log = logging.getLogger("arbl2.server")

UPBIT_PATH = "/websocket/v1"


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
        self._clients: list[Client] = []
        self.upbit_codes = tuple(source.upbit_codes)
        self.binance_symbols = tuple(source.binance_symbols)
        self.upbit_quota = {group: Quota(1.0) for group in ("market", "orderbook")}
        self.binance_weight = Quota(60.0)
        self.faults: Faults | None = None
        """What goes wrong, if ``options.faults`` says so."""
        self._newest: dict[tuple[str, str], MarketEvent] = {}
        self._flows: dict[tuple[str, str], UpbitFlow | BinanceFlow] = {}
        self._began_ms = 0
        self._shift_ms: dict[str, int] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._complete = asyncio.Event()
        self._stalled_until: dict[str, float] = {}
        self._connections = 0
        self._server: Server | None = None
        self._market: asyncio.Task[None] | None = None
        self._misfortune: asyncio.Task[None] | None = None
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
                create_connection=Connection,
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
        if options.faults is not None:
            self.faults = Faults(self, options.faults, options.fault_log)
            self._misfortune = asyncio.create_task(self.faults.run())
        complete = asyncio.create_task(self._complete.wait())
        await asyncio.wait((complete, self._market), timeout=2.0, return_when=asyncio.FIRST_COMPLETED)
        complete.cancel()
        log.info("serving Upbit and Binance on %s", self._address)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        assert self._market is not None
        self._market.cancel()
        if self._misfortune is not None and self.faults is not None:
            self._misfortune.cancel()
            await self.faults.stop()
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

    def open_clients(self) -> list[Client]:
        """Every connection that can be sent to, in the order of opening."""
        return [client for client in self._clients if client.is_open]

    def newest(self, venue: str) -> list[MarketEvent]:
        """The last book of every code that the venue's clients may see now (none while it is stalled)."""
        if self.stalled(venue):
            return []
        return [event for (owner, _), event in self._newest.items() if owner == venue]

    def last_event(self, venue: str, code: str) -> MarketEvent | None:
        """The last book of a code."""
        return self._newest.get((venue, code))

    def flow(self, event: MarketEvent) -> UpbitFlow | BinanceFlow:
        """What the event's code says beside its books, from now on: it costs nothing as long as nobody asks."""
        flow = self._flows.get((event.venue, event.code))
        if flow is None:
            flow = UpbitFlow(event, event.mark) if event.venue == ExchangeId.UPBIT else BinanceFlow(event)
            self._flows[event.venue, event.code] = flow
        return flow

    def now_ms(self, venue: str) -> int:
        """What the venue's clock shows, ms since the epoch."""
        return time.time_ns() // 1_000_000 + self._shift_ms.get(venue, 0)

    def set_clock(self, venue: str, shift_ms: int) -> None:
        """Let the venue's clock be off by so much from now on; 0 sets it right."""
        self._shift_ms[venue] = shift_ms

    def announce_shutdown(self) -> int:
        """Send Binance's ``serverShutdown`` notice to each of its connections, which stay open. Returns how many."""
        clients = [client for client in self._of(ExchangeId.BINANCE) if isinstance(client, BinanceClient)]
        for client in clients:
            client.announce_shutdown(self.now_ms(ExchangeId.BINANCE))
        return len(clients)

    def stalled(self, venue: str) -> bool:
        """Whether the venue is silent because of ``stall``."""
        return time.monotonic() < self._stalled_until.get(venue, 0.0)

    def stall(self, venue: str, seconds: float) -> None:
        """Keep the venue's connections open but without market data for so long; the market goes on unseen."""
        self._stalled_until[venue] = time.monotonic() + seconds

    async def disconnect(self, venue: str, code: int = 1001, reason: str = "") -> int:
        """End every connection of the venue with a close code; 1006 cuts them without a close frame. Returns how many."""
        clients = self._of(venue)
        await asyncio.gather(*(client.cut() if code == 1006 else client.close(code, reason) for client in clients))
        await asyncio.gather(*(client.ws.wait_closed() for client in clients))
        return len(clients)

    def send_raw(self, venue: str, payload: bytes, op: Op | None = None) -> int:
        """Send any bytes to every client of the venue (binary on Upbit, text on Binance, unless said). Returns how many."""
        clients = self._of(venue)
        for client in clients:
            client.send(payload, op or (Op.BINARY if venue == ExchangeId.UPBIT else Op.TEXT))
        return len(clients)

    def _of(self, venue: str) -> list[Client]:
        return [client for client in self._clients if client.venue == venue and client.is_open]

    async def _run_market(self) -> None:
        instruments = len(self.upbit_codes) + len(self.binance_symbols)
        try:
            async for shown in self._source.events():
                event = self._dated(shown)
                key = (event.venue, event.code)
                self._newest[key] = event
                if not self._complete.is_set() and len(self._newest) == instruments:
                    self._complete.set()
                count = self._counts[key] = self._counts.get(key, -1) + 1
                moved = None
                if (flow := self._flows.get(key)) is not None:
                    moved = flow.advance(event, self._time_ms(event), slow_is_due=count % 10 == 0)
                if self.stalled(event.venue):
                    continue
                encoded: dict[object, bytes] = {}
                for client in self._of(event.venue):
                    client.publish(event, moved, encoded, count)
        except Exception:
            log.exception("the market stopped")
            raise
        log.info("the market has ended")

    def _dated(self, event: MarketEvent) -> MarketEvent:
        """The event by the venue's clock as it is set. Books of Binance bear no time."""
        shift_ms = self._shift_ms.get(event.venue, 0)
        if not shift_ms or event.venue != ExchangeId.UPBIT:
            return event
        return event._replace(mark=event.mark + shift_ms)

    def _time_ms(self, event: MarketEvent) -> int:
        if event.venue == ExchangeId.UPBIT:
            return event.mark
        offset_ms = event.offset_ns // 1_000_000
        self._began_ms = self._began_ms or time.time_ns() // 1_000_000 - offset_ms
        return self._began_ms + offset_ms + self._shift_ms.get(event.venue, 0)

    async def _handle(self, ws: ServerConnection) -> None:
        assert isinstance(ws, Connection)
        assert ws.request is not None
        path = ws.request.path
        upbit = urlsplit(path).path == UPBIT_PATH
        self._connections += 1
        sent = SentLog(self._connections, ExchangeId.UPBIT if upbit else ExchangeId.BINANCE, path)
        if self.options.record_sent:
            self.sent.append(sent)
        client = UpbitClient(self, ws, sent) if upbit else BinanceClient(self, ws, sent)
        self._clients.append(client)
        attendant = asyncio.create_task(client.attend())
        try:
            with contextlib.suppress(ConnectionClosed):
                async for message in ws:
                    client.hear(message)
                    await client.receive(message)
        finally:
            self._clients.remove(client)
            client.ended()
            attendant.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await attendant

    def _respond(self, _: ServerConnection, request: Request) -> Response | None:
        url = urlsplit(request.path)
        path = url.path
        if path in (UPBIT_PATH, "/stream", "/ws") or path.startswith("/ws/"):
            return None
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        venue = ExchangeId.BINANCE if path.startswith("/api/v3/") else ExchangeId.UPBIT
        if self.faults is not None and (refused := self.faults.refused(venue, path)) is not None:
            return refused
        if venue is ExchangeId.BINANCE:
            return binance_rest(self, path.removeprefix("/api/v3/"), query)
        return upbit_rest(self, path, query)


def run_server(
    config: SynthConfig,
    host: str = "127.0.0.1",
    port: int = 0,
    ready: Callable[[ExchangeServer], None] = lambda _: None,
    *,
    speed: float = 1.0,
    faults: FaultConfig | None = None,
    fault_log: Path | None = None,
) -> None:
    """Serve the synthetic market until SIGINT or SIGTERM; ``ready`` is called once the server listens.

    ``faults`` lets things go wrong; each of them is appended to ``fault_log`` as a line of JSON. Must run in the main thread of
    its process. Raises ConfigError when the port cannot be taken.
    """
    options = ServerOptions(host=host, port=port, faults=faults, fault_log=fault_log)
    asyncio.run(_serve_until_signal(SyntheticSource(config, speed=speed), options, ready))


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
