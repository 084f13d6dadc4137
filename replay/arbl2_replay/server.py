"""Both exchanges on a local socket: a market source behind the venues' own protocols.

Recorders and bots that speak to Upbit and Binance connect here without a change: same paths, same requests, same bytes back,
same silences (an unknown code or stream is accepted and never answered), same ways to end (an error frame and then close 1000,
an abrupt end after idling). Where the market comes from is behind ``MarketSource``; the server adds only the protocol, the one
clock of all its connections, and faults if it is told to.

Sending never waits: what a client does not read gathers in its outlet, and a client past ``client_buffer_bytes`` is cut off, so
that one slow reader neither holds the market up nor fills the memory. At the speed "as fast as it is read" the market does wait
for its readers; how little for one that keeps others waiting is said at ``_let_them_read``.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import time
from bisect import bisect_right
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from arbl2.errors import ConfigError
from arbl2.frames import ExchangeId, Op
from arbl2_replay.ahead import Ahead
from arbl2_replay.binance_server import BinanceClient, binance_rest
from arbl2_replay.boards import BinanceBoard, UpbitBoard
from arbl2_replay.control import PREFIX, control
from arbl2_replay.encode import with_clock_off
from arbl2_replay.faults import FaultConfig, Faults
from arbl2_replay.market_clock import MarketClock
from arbl2_replay.serving import Client, Connection, Piece, Quota, SentLog, ServerOptions, is_sendable
from arbl2_replay.sources import Batch, Closed, MarketSource, Message, SyntheticSource, What
from arbl2_replay.upbit_server import UPBIT_GROUPS, UpbitClient, upbit_rest

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from websockets.http11 import Request, Response

    from arbl2_replay.clock import Speed
    from arbl2_replay.faults import WireFault
    from arbl2_replay.sources import Channel
    from arbl2_replay.synth import MarketEvent, SynthConfig

__all__ = ["ExchangeServer", "MarketSource", "SentLog", "ServerOptions", "SyntheticSource", "run_server"]

log = logging.getLogger("arbl2.server")

UPBIT_PATH = "/websocket/v1"
PIECE_BYTES = 256 * 2**10
"""So much is sent in one turn of the event loop at most."""
PIECE_MESSAGES = 512
HELD_UP_BYTES = 2**20
"""At the highest speed the market waits for a client that has left more unread, until half of it is read."""
LOOK_S = 0.02
STRETCH_S = 0.1
"""Who has read how much is compared this often."""
CREDIT_S = 0.25
"""So long one client may keep others waiting that has kept pace before: twice as long, since while they wait all are slow."""
EARNED = 0.5
"""Such a share of the time in which it keeps pace becomes its credit."""
SETTLE_S = 0.1
"""A client that has subscribed may still be subscribing to more."""
BARRIER_S = 2.0
GOODBYE_S = 30.0


class ExchangeServer:
    """Upbit and Binance on one loopback port, for any number of clients.

    Use as ``async with ExchangeServer(source) as server``. The market begins with the server (or when enough clients have
    subscribed), and the body when every instrument has a book (or after 2 s without). Raises ConfigError when the port cannot be
    taken.
    """

    def __init__(self, source: MarketSource, options: ServerOptions | None = None) -> None:
        self.options = options or ServerOptions()
        self.source = source
        self.sent: list[SentLog] = []
        """Per connection what was sent to it, in the order of opening; filled only with ``record_sent``."""
        self.messages = 0
        """Messages of the market so far."""
        self.cut_clients = 0
        """Clients that did not read and were cut off."""
        self.upbit_codes = tuple(source.upbit_codes)
        self.binance_symbols = tuple(source.binance_symbols)
        ban = self.options.ban_after, self.options.ban_s
        self.upbit_quota = {group: Quota(1.0, *ban) for group in UPBIT_GROUPS}
        self.binance_weight = Quota(60.0, *ban)
        self.faults: Faults | None = None
        """What goes wrong, if ``options.faults`` says so."""
        self.clock: MarketClock
        self._clients: list[Client] = []
        self._upbit: dict[str, UpbitBoard] = {}
        self._binance: dict[str, BinanceBoard] = {}
        self._shift_ms: dict[str, int] = {}
        self._missing = 0
        self._complete = asyncio.Event()
        self._primed = asyncio.Event()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._stretch_began = 0.0
        self._stalled_until: dict[str, float] = {}
        self._connections = 0
        self._server: Server | None = None
        self._market: asyncio.Task[None] | None = None
        self._pass: asyncio.Task[None] | None = None
        self._seek_ns: int | None = self.options.start_ns or None
        self._misfortune: asyncio.Task[None] | None = None
        self._farewells: set[asyncio.Task[None]] = set()
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
        self._forget()
        self.clock = MarketClock(self.source.speed, self.source.start_ns)
        self._market = asyncio.create_task(self._run_market())
        if options.faults is not None:
            self.faults = Faults(self, options.faults, options.fault_log)
            self._misfortune = asyncio.create_task(self.faults.run())
        # a recording tells what REST needs with its first batch; a synthetic market begins at once
        ready = asyncio.create_task((self._primed if self.source.offers else self._complete).wait())
        await asyncio.wait((ready, self._market), timeout=2.0, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        log.info("serving Upbit and Binance on %s", self._address)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        assert self._market is not None
        self._market.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # who wants to know has asked market_ended
            await self._market
        if self._misfortune is not None:
            self._misfortune.cancel()
        if self.faults is not None:
            await self.faults.stop()
        self._server.close()
        await self._server.wait_closed()
        await asyncio.gather(*self._farewells, return_exceptions=True)

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

    @property
    def control_url(self) -> str:
        """Base URL of the remote control, to be followed by status, pause, ..."""
        return f"http://{self._address}{PREFIX}"

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

    def upbit_boards(self) -> Iterator[UpbitBoard]:
        """What Upbit's clients may see now (nothing while it is stalled)."""
        return iter(()) if self.stalled(ExchangeId.UPBIT) else iter(self._upbit.values())

    def upbit_board(self, code: str) -> UpbitBoard:
        """What is known of a code."""
        board = self._upbit.get(code)
        if board is None:
            board = self._upbit[code] = UpbitBoard(code, self.source.offers.get(code))
        return board

    def binance_board(self, symbol: str) -> BinanceBoard | None:
        """What is known of a symbol; None if there is no such symbol."""
        return self._binance.get(symbol)

    def last_event(self, venue: str, code: str) -> MarketEvent | None:
        """The last book of an instrument."""
        board = self._upbit.get(code) if venue == ExchangeId.UPBIT else self._binance.get(code)
        return board.event() if board is not None else None

    def now_ms(self, venue: str) -> int:
        """What the venue's clock shows, ms since the epoch."""
        return self.clock.now_ns() // 1_000_000 + self._shift_ms.get(venue, 0)

    def time_ms(self, message: Message) -> int:
        """When a message was sent, by the venue's clock, ms since the epoch."""
        return message.time_ns // 1_000_000 + self._shift_ms.get(message.channel.venue, 0)

    def set_clock(self, venue: str, shift_ms: int) -> None:
        """Let the venue's clock be off by so much from now on; 0 sets it right."""
        self._shift_ms[venue] = shift_ms

    def seek(self, time_ns: int) -> None:
        """Go to another moment of the market (ns since the epoch). Connections end with 1012: ids and times will jump."""
        if self.has_ended:
            raise ConfigError("the market has ended. Start the server again.")
        if isinstance(self.source, SyntheticSource):
            raise ConfigError("a synthetic market has no past and no future to go to. Serve a recording.")
        self._seek_ns = max(time_ns, self.source.start_ns)
        if self._pass is not None:
            self._pass.cancel()

    def set_speed(self, speed: Speed) -> None:
        """Let the market go faster or slower from now on."""
        if isinstance(self.source, SyntheticSource) and not speed.factor:
            raise ConfigError("a synthetic market never ends, so it cannot go as fast as possible. Name a speed such as 100x.")
        self.clock.speed = speed.factor

    @property
    def has_ended(self) -> bool:
        """Whether the market is over."""
        return self._market is not None and self._market.done()

    def inject(self, kind: WireFault) -> bool:
        """Let a fault happen now, to a connection that can suffer it. Returns whether there was one."""
        if self.faults is None:
            self.faults = Faults(self, FaultConfig(), self.options.fault_log)
        return self.faults.inject(kind)

    def disconnect_soon(self, venue: str, code: int) -> None:
        """``disconnect`` without waiting for it."""
        self._part(self._end(self._of(venue), code, ""))

    def client_changed(self) -> None:
        """A client has subscribed, or has gone."""
        self._changed.set()

    def made_room(self, backlog: int) -> None:
        """A client has read on and has so much left."""
        if backlog <= HELD_UP_BYTES // 2:
            self._room.set()

    def cut_off(self, client: Client, backlog: int) -> None:
        """Part with a client that does not read."""
        self.cut_clients += 1
        log.warning(
            "dropped %s connection %d: it left %s bytes unread; read faster or subscribe to less",
            client.venue,
            client.sent.conn,
            f"{backlog:,}",
        )
        self._part(client.ws.close(1008, "too slow"))

    def _part(self, work: Coroutine[None, None, None]) -> None:
        async def guarded() -> None:
            with contextlib.suppress(ConnectionClosed, OSError):
                await work

        task = asyncio.create_task(guarded())
        self._farewells.add(task)
        task.add_done_callback(self._farewells.discard)

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
        await self._end(clients, code, reason)
        return len(clients)

    async def _end(self, clients: Sequence[Client], code: int, reason: str) -> None:
        await asyncio.gather(*(client.close(code, reason) if is_sendable(code) else client.cut() for client in clients))
        await asyncio.gather(*(client.ws.wait_closed() for client in clients))

    async def goodbye(self) -> None:
        """End every connection with 1001, once it has read everything or stopped reading."""
        await asyncio.gather(*(client.has_read(GOODBYE_S) for client in self.open_clients()))
        await self._end(self.open_clients(), 1001, "the market has ended")

    def send_raw(self, venue: str, payload: bytes, op: Op | None = None) -> int:
        """Send any bytes to every client of the venue (binary on Upbit, text on Binance, unless said). Returns how many."""
        clients = self._of(venue)
        for client in clients:
            client.send(payload, op or (Op.BINARY if venue == ExchangeId.UPBIT else Op.TEXT))
        return len(clients)

    def _of(self, venue: str) -> list[Client]:
        return [client for client in self._clients if client.venue == venue and client.is_open]

    # the market ----------------------------------------------------------------------------------------------------------------

    async def _run_market(self) -> None:
        try:
            while True:
                self._pass = asyncio.create_task(self._play())
                try:
                    await self._pass
                except asyncio.CancelledError:
                    if self._seek_ns is None or not self._pass.cancelled():
                        self._pass.cancel()
                        raise
                else:
                    if not self.options.loop:
                        break
                await self._begin_anew()
        except Exception:
            log.exception("the market stopped")
            raise
        log.info("the market has ended")

    async def _begin_anew(self) -> None:
        """Ids and times go back: nobody may take what comes now for what comes next."""
        self.clock.hold()
        await self._end(self.open_clients(), 1012, "the market begins again")
        self._forget()

    def _forget(self) -> None:
        self._upbit = {}
        self._binance = {code: BinanceBoard(code, self.source.offers.get(code)) for code in self.binance_symbols}
        self._missing = len(self.upbit_codes) + len(self.binance_symbols)

    async def _play(self) -> None:
        """The market from its beginning, or from where it is to be, to its end."""
        from_ns, self._seek_ns = self._seek_ns or 0, None
        self.clock.set(max(from_ns, self.source.start_ns))
        ahead = Ahead(self.source.batches())
        try:
            while (batch := await ahead.next()) is not None:
                self._expect(batch)
                self._primed.set()
                await self._go_through(batch, from_ns)
        finally:
            await ahead.stop()

    def _expect(self, batch: Batch) -> None:
        """REST books that were recorded about now."""
        for symbol, body in batch.bodies:
            board = self._binance.get(symbol)
            if board is not None:
                board.expect(body)

    async def _go_through(self, batch: Batch, from_ns: int) -> None:
        messages = batch.messages
        if from_ns and messages and messages[0].time_ns < from_ns:
            past = [message for message in messages if message.time_ns < from_ns]
            self._note(past)
            messages = messages[len(past) :]
            await asyncio.sleep(0)
        if messages and self.clock.held:
            await self._subscribed(self.options.subscribers, None)
            self.clock.begin(max(from_ns, messages[0].time_ns))
        i = 0
        while i < len(messages):
            await self.clock.until(messages[i].time_ns)
            stop = self._due(messages, i)
            await self._deliver(messages[i:stop])
            i = stop
        if batch.closed is not None:
            self._go_dark(batch.closed)
            if self.options.disconnects and not self.clock.held:
                await self._disconnect(batch.closed)

    def _due(self, messages: Sequence[Message], start: int) -> int:
        """Where the messages end that can go together now."""
        stop = min(len(messages), start + PIECE_MESSAGES)
        if self.clock.speed:
            stop = max(bisect_right(messages, self.clock.now_ns(), start, stop, key=lambda message: message.time_ns), start + 1)
        first = messages[start]
        while stop > start + 1 and messages[stop - 1].end - first.start > PIECE_BYTES:
            stop = (start + stop + 1) // 2
        return stop

    async def _deliver(self, messages: Sequence[Message]) -> None:
        if any(self._shift_ms.values()):
            messages = [self._shifted(message) for message in messages]
        self._note(messages)
        if self._stalled_until:
            messages = [message for message in messages if not self.stalled(message.channel.venue)]
        if self.options.lockstep:
            await self._in_step(messages)
        else:
            self._publish(messages)
        if self.clock.speed:
            await asyncio.sleep(0)
        else:
            await self._let_them_read()

    def _note(self, messages: Sequence[Message]) -> None:
        """What the messages mean to what is known: the last of each channel, unless somebody follows them all."""
        self.messages += len(messages)
        for channel, last in {message.channel: message for message in messages}.items():
            if not channel.code:
                continue
            board = self._board_of(channel)
            was_known = board.newest is not None
            told = [last] if board.is_quiet(channel) else [message for message in messages if message.channel is channel]
            for message in told:
                board.hear(message, self.time_ms(message))
            if not was_known and not self._complete.is_set():
                self._missing -= 1
                if self._missing <= 0:
                    self._complete.set()

    def _board_of(self, channel: Channel) -> UpbitBoard | BinanceBoard:
        if channel.venue is ExchangeId.UPBIT:
            return self.upbit_board(channel.code)
        board = self._binance.get(channel.code)
        if board is None:
            board = self._binance[channel.code] = BinanceBoard(channel.code, self.source.offers.get(channel.code))
        return board

    def _publish(self, messages: Sequence[Message]) -> None:
        if messages:
            piece = Piece(messages)
            for client in self._clients:
                client.publish(piece)

    def _shifted(self, message: Message) -> Message:
        """The message by the venue's clock as it is set. Books of Binance bear no time."""
        shift_ms = self._shift_ms.get(message.channel.venue, 0)
        if not shift_ms:
            return message
        if message.channel.what is not What.MARKET:
            return message.instead(with_clock_off(message.payload, shift_ms))
        shown = message.event
        if shown is None or message.channel.venue is not ExchangeId.UPBIT:
            return message
        return Message.of_event(message.channel, message.time_ns, shown._replace(mark=shown.mark + shift_ms))

    # who waits for whom --------------------------------------------------------------------------------------------------------

    async def _let_them_read(self) -> None:
        """At the highest speed: wait for those who have left much unread.

        A client may keep others waiting - who were sent at least half as much and have read it; or any, while it does not read
        at all - for as long as its credit lasts; then the market goes on without it, and it is cut off when it has fallen too far
        behind. It has little credit to begin with, and gets more only while it reads at least half as fast as the fastest.
        """
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        most = HELD_UP_BYTES
        while not self.clock.speed:
            self._compare(loop.time())
            behind = {
                client: client.outlet.read
                for client in self._clients
                if client.outlet.backlog > most and client.credit_s > 0 and client.is_open
            }
            if not behind:
                return
            most = HELD_UP_BYTES // 2
            self._room.clear()
            began = loop.time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._room.wait()
            waited_s = min(loop.time() - began, LOOK_S)  # more is the machine's fault
            for client, had_read in behind.items():
                if self._keeps_others_waiting(client, had_read):
                    client.credit_s -= waited_s

    def _compare(self, now: float) -> None:
        """Give those credit who kept pace since the last time."""
        lasted_s = now - self._stretch_began
        if lasted_s < STRETCH_S:
            return
        self._stretch_began = now
        earned_s = EARNED * min(lasted_s, STRETCH_S)  # a market that stood still says nothing
        read = {client: client.outlet.read - client.outlet.read_before for client in self._clients if client.is_open}
        fastest = max(read.values(), default=0)
        for client, count in read.items():
            if client.outlet.backlog <= HELD_UP_BYTES or 2 * count >= fastest:
                client.credit_s = min(CREDIT_S, client.credit_s + earned_s)
            client.outlet.begin_stretch()

    def _keeps_others_waiting(self, client: Client, had_read: int) -> bool:
        others = [other for other in self._clients if other is not client and other.subscribed and other.is_open]
        if client.outlet.read == had_read:
            return bool(others)
        return any(other.outlet.is_clear and 2 * other.outlet.bytes_lately >= client.outlet.bytes_lately for other in others)

    async def _in_step(self, messages: Sequence[Message]) -> None:
        """One run of messages of one connection after the other, each read before the next is sent."""
        run: list[Message] = []
        for message in messages:
            if run and (message.channel.venue, message.channel.conn) != (run[0].channel.venue, run[0].channel.conn):
                await self._read_by_all(run)
                run = []
            run.append(message)
        if run:
            await self._read_by_all(run)

    async def _read_by_all(self, run: Sequence[Message]) -> None:
        before = {client: client.outlet.taken for client in self._clients}
        self._publish(run)
        told = [client for client, taken in before.items() if client.outlet.taken > taken and client.is_open]
        await asyncio.gather(*(client.has_read(BARRIER_S) for client in told))

    async def _subscribed(self, count: int, patience_s: float | None) -> None:
        """Wait until so many connections have subscribed."""
        if not count:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while sum(client.subscribed and client.is_open for client in self._clients) < count:
                    self._changed.clear()
                    await self._changed.wait()
                await asyncio.sleep(SETTLE_S)

    def _go_dark(self, closed: Closed) -> None:
        """A recorded connection was lost, and nobody carried on what it carried."""
        for code, _ in closed.streams:
            board = self._upbit.get(code) if closed.venue is ExchangeId.UPBIT else self._binance.get(code)
            if board is not None:
                board.lost()

    async def _disconnect(self, closed: Closed) -> None:
        """Let the same happen to the clients that are told of the same instruments."""
        codes = {code for code, _ in closed.streams}
        clients = [client for client in self._of(closed.venue) if any(client.wants(code) for code in codes)]
        count = sum(client.subscribed for client in self.open_clients())
        if not self.clock.speed:
            # what is still on its way would be lost with the connection, and at this speed that may be much
            await asyncio.gather(*(client.has_read(GOODBYE_S) for client in clients))
        await self._end(clients, closed.code, closed.reason)
        if self.options.subscribers and clients:
            self.clock.hold()
            await self._subscribed(count, self.options.rejoin_s)
            self.clock.begin(self.clock.now_ns())

    # connections ---------------------------------------------------------------------------------------------------------------

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
            self.client_changed()
            self.made_room(0)
            attendant.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await attendant

    def _respond(self, _: ServerConnection, request: Request) -> Response | None:
        url = urlsplit(request.path)
        path = url.path
        if path in (UPBIT_PATH, "/stream", "/ws") or path.startswith("/ws/"):
            return None
        asked = parse_qs(url.query)
        query = {name: values[-1] for name, values in asked.items()}
        if "markets" in asked:  # Upbit takes a list also as a parameter said again and again
            query["markets"] = ",".join(asked["markets"])
        if self.options.control and path.startswith(PREFIX):
            return control(self, path.removeprefix(PREFIX), query, request)
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
    """Serve the synthetic market until SIGINT or SIGTERM; see ``serve_market``."""
    options = ServerOptions(host=host, port=port, faults=faults, fault_log=fault_log)
    serve_market(SyntheticSource(config, speed=speed), options, ready)


def serve_market(
    source: MarketSource,
    options: ServerOptions,
    ready: Callable[[ExchangeServer], None] = lambda _: None,
    *,
    stay: bool = False,
) -> None:
    """Serve a market until it ends (or, with ``stay``, goes on in silence), SIGINT or SIGTERM.

    ``ready`` is called once the server listens. Must run in the main thread of its process. Raises ConfigError when the port
    cannot be taken, TapeError for a recording that cannot be read.
    """
    # messages refer to nothing that refers to them: looking for cycles among so many costs more than sending them
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    # the thread that reads ahead must not hold up the one that sends
    sys.setswitchinterval(5e-4)
    asyncio.run(_serve_until_signal(source, options, ready, stay=stay))


async def _serve_until_signal(
    source: MarketSource, options: ServerOptions, ready: Callable[[ExchangeServer], None], *, stay: bool
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with ExchangeServer(source, options) as server:
        ready(server)
        stopped = asyncio.create_task(stop.wait())
        ended = asyncio.create_task(server.market_ended())
        await asyncio.wait((stopped, ended), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
            ending = stopped if stay else asyncio.create_task(server.goodbye())
            await asyncio.wait((stopped, ending), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        ended.cancel()
