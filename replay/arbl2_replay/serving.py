"""What both venues of the exchange server have in common: options, the account of what was sent, one client, HTTP replies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from array import array
from dataclasses import dataclass, field
from email.utils import formatdate
from enum import Enum
from http import HTTPStatus
from typing import TYPE_CHECKING

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response
from websockets.protocol import State

from arbl2.frames import ExchangeId, Op
from arbl2_replay.encode import diff
from arbl2_replay.outlet import Outlet
from arbl2_replay.sources import What, frame_head, side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from arbl2_replay.faults import FaultConfig
    from arbl2_replay.gate import Gate
    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.sources import Channel, Message

log = logging.getLogger("arbl2.server")

FIRST_CREDIT_S = 0.05
"""A client of which nothing is known yet may be busy with other things for this long."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the server listens and how patient it is; the defaults are the venues' own times and limits."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes any free port."""
    record_sent: bool = False
    compression: str | None = "deflate"
    """Offered as the venues do; None refuses it."""
    client_buffer_bytes: int = 8 * 2**20
    """A client that has left more unread is cut off, with close code 1008."""
    start_ns: int = 0
    """Begin the recording there, ns since the epoch; 0 = at its beginning."""
    loop: bool = False
    """Begin the recording again when it is over."""
    disconnects: bool = True
    """Let recorded disconnects happen to the clients too."""
    subscribers: int = 0
    """The market waits until so many connections have subscribed, and again after a recorded disconnect (not with 0)."""
    rejoin_s: float = 30.0
    """So long it waits for those whom a recorded disconnect has cut off."""
    lockstep: bool = False
    """What one connection is told is read before another is told what came next: a ping and its pong in between."""
    control: bool = True
    """Answer requests below /arbl2/ (pause, seek, speed, faults)."""
    upbit_idle_s: float = 60.0
    upbit_up_s: float = 10.0
    upbit_error_close_s: float = 0.15
    upbit_rest_per_s: int = 10
    """Requests of one group (market, orderbook) in a second; more are answered with 429."""
    binance_ping_s: float = 20.0
    binance_pong_s: float = 60.0
    binance_messages_per_s: int = 5
    binance_lifetime_s: float = 86_400.0
    """After so long a connection is closed."""
    binance_weight_per_min: int = 6_000
    ban_after: int = 50
    """Requests refused within one window, after which the answer is 418 ..."""
    ban_s: float = 120.0
    """... for so long."""
    faults: FaultConfig | None = None
    fault_log: Path | None = None
    """Gets a line of JSON for every fault."""


@dataclass(slots=True)
class SentLog:
    """Every data payload that was sent to one connection, in order: its form and the SHA-256 of its bytes.

    Times are monotonic ns. ``ended_by`` is "" while it is open, then "server" (by a close frame that the client answered, or by a
    cut after everything was out: every payload reached it) or "client" (what was sent last may not have reached it; so it is too
    when the server cut off who did not read).
    """

    conn: int
    venue: str
    path: str
    payloads: list[tuple[Op, bytes]] = field(default_factory=list)
    at_ns: array[int] = field(default_factory=lambda: array("q"))
    """When each payload was handed to the socket."""
    requests: list[tuple[int, bytes]] = field(default_factory=list)
    """What the client said, and when."""
    opened_ns: int = field(default_factory=time.monotonic_ns)
    closed_ns: int = 0
    ended_by: str = ""

    @property
    def count(self) -> int:
        """Payloads so far."""
        return len(self.payloads)


class Quota:
    """What is used in a window of so many seconds; the first use after one has ended begins the next."""

    def __init__(self, window_s: float, ban_after: int, ban_s: float) -> None:
        self._window_s = window_s
        self._ban_after = ban_after
        self._ban_s = ban_s
        self._refused = 0
        self._banned_until = 0.0
        self._ends_at = 0.0
        self._used = 0

    def take(self, weight: int, limit: int) -> Use:
        """Use so much of ``limit``. Who asks on although refused is banned."""
        now = time.monotonic()
        if now >= self._ends_at:
            self._ends_at, self._used, self._refused = now + self._window_s, 0, 0
        self._used += weight
        self._refused += self._used > limit
        if self._refused > self._ban_after and now >= self._banned_until:
            self._banned_until = now + self._ban_s
        left_s = max(self._ends_at, self._banned_until) - now
        return Use(self._used, left_s, is_refused=self._used > limit, is_banned=now < self._banned_until)


@dataclass(frozen=True, slots=True)
class Use:
    """What was used in this window, and the seconds until there is more."""

    used: int
    left_s: float
    is_refused: bool
    is_banned: bool

    @property
    def status(self) -> HTTPStatus:
        """What to answer instead, if refused or banned."""
        return HTTPStatus.IM_A_TEAPOT if self.is_banned else HTTPStatus.TOO_MANY_REQUESTS


class Connection(ServerConnection):
    """Remembers when the client was last heard, be it only a ping, and tells its outlet when there is room."""

    heard_at: float = 0.0
    outlet: Outlet | None = None

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self.heard_at = self.loop.time()
        super().data_received(data)

    def resume_writing(self) -> None:
        """Called by the event loop."""
        super().resume_writing()
        if self.outlet is not None:
            self.outlet.room()


class Way(Enum):
    """What a client gets of a channel."""

    NOTHING = 0
    RECORDED = 1  # the recorded bytes
    MADE = 2  # something that must be made for it, or decided message by message


class Piece:
    """Messages that are due together."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self.channels: tuple[Channel, ...] = tuple(dict.fromkeys([message.channel for message in messages]))
        self._joined: dict[frozenset[Channel], bytes | memoryview] = {}

    def joined(self, wanted: frozenset[Channel]) -> bytes | memoryview:
        """The recorded frames of these channels, in order; made once for all clients that want the same."""
        frames = self._joined.get(wanted)
        if frames is None:
            messages = self.messages
            if len(wanted) < len(self.channels):
                messages = [message for message in messages if message.channel in wanted]
            frames = side_by_side(messages)
            self._joined[wanted] = frames
        return frames


class Client:
    """One WebSocket connection."""

    venue: ExchangeId

    def __init__(self, server: ExchangeServer, ws: Connection, sent: SentLog) -> None:
        self.server = server
        self.options = server.options
        self.ws = ws
        self.sent = sent
        self.sent_at = ws.loop.time()
        self.outlet = Outlet(ws, server.made_room)
        self.credit_s = FIRST_CREDIT_S
        """So long the market may still be held up by this client."""
        self.gate: Gate | None = None
        """Set by whoever holds up, spoils or swallows what is sent here."""
        self.frozen = False
        """The venue's machine has gone without a word: it neither sends, nor reads, nor pings."""
        self._deflates = bool(ws.protocol.extensions)
        self._gathered: list[bytes] | None = None
        self._ways: dict[Channel, Way] = {}
        self._ending = False
        self._flushed = False
        self._overflowed = False

    @property
    def is_open(self) -> bool:
        """Whether payloads can be sent."""
        return self.ws.state is State.OPEN and not self._ending

    # what goes out -------------------------------------------------------------------------------------------------------------

    def publish(self, piece: Piece) -> None:
        """Send what this client wants of these messages."""
        ways = [self.way(channel) for channel in piece.channels]
        if not any(way is not Way.NOTHING for way in ways) or not self.is_open:
            return
        if Way.MADE in ways or self._deflates or self.gate is not None or self.options.record_sent:
            self._gathered = []
            chosen = dict(zip(piece.channels, ways, strict=True))
            for message in piece.messages:
                way = chosen[message.channel]
                if way is Way.RECORDED:
                    self.send(message.payload, message.op, message.channel.name, *self._ids(message))
                elif way is Way.MADE:
                    self.tell(message)
            made, self._gathered = b"".join(self._gathered), None
            frames: bytes | memoryview = made
        else:
            frames = piece.joined(frozenset(c for c, way in zip(piece.channels, ways, strict=True) if way is Way.RECORDED))
            self.sent_at = self.ws.loop.time()
        if frames:
            self._put(frames)

    def _ids(self, message: Message) -> tuple[int, int]:
        """First and last id of a message, for faults that choose."""
        if self.gate is None or message.channel.what is not What.DIFF:
            return 0, 0
        change = diff(message)
        return (change.first_id, change.last_id) if change else (0, 0)

    def send(self, payload: bytes, op: Op, stream: str = "", first_id: int = 0, last_id: int = 0) -> None:
        """Send a payload without waiting. ``stream`` and the ids say what it is, for faults that choose."""
        if self.gate is None:
            self.write(payload, op)
        else:
            self.gate.send(payload, op, stream, first_id, last_id)

    def write(self, payload: bytes, op: Op) -> None:
        """Put a payload on its way, past the gate."""
        if not self.is_open:
            return
        if self._deflates:
            protocol = self.ws.protocol
            (protocol.send_text if op is Op.TEXT else protocol.send_binary)(payload)
            frame = b"".join(protocol.data_to_send())
        else:
            frame = frame_head(len(payload), op) + payload
        self.sent_at = self.ws.loop.time()
        if self.options.record_sent:
            self.sent.at_ns.append(time.monotonic_ns())
            self.sent.payloads.append((op, hashlib.sha256(payload).digest()))
        if self._gathered is None:
            self._put(frame)
        else:
            self._gathered.append(frame)

    def _put(self, frames: bytes | memoryview) -> None:
        self.outlet.put(frames)
        backlog = self.outlet.backlog
        if backlog > self.options.client_buffer_bytes and self.is_open:
            self._overflowed = True
            self._ending = True
            self.outlet.drop()
            self.server.cut_off(self, backlog)

    async def has_read(self, patience_s: float) -> None:
        """Return when the client has read everything so far (it has answered a ping behind it), or after so long."""
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(patience_s):
                await self.outlet.drained(patience_s)
                await (await self.ws.ping())

    # the end -------------------------------------------------------------------------------------------------------------------

    async def close(self, code: int, reason: str = "") -> None:
        """End the connection with a close frame, once everything sent so far is out."""
        if not self._ending:
            self._ending = True
            await self.outlet.drained()
        await self.ws.close(code, reason)

    async def cut(self, torn: bytes = b"") -> None:
        """End the connection without a close frame, once everything sent so far is out.

        ``torn`` begins a frame that never ends: its first bytes on the wire.
        """
        if not self.is_open or self.ws.transport.is_closing():
            return
        self._ending = True
        self.outlet.put(torn)
        self._flushed = await self.outlet.drained()
        self.ws.transport.abort()

    def ended(self) -> None:
        """The connection is over: tell who ended it."""
        protocol = self.ws.protocol
        answered = protocol.close_sent and protocol.close_rcvd and not protocol.close_rcvd_then_sent
        self.sent.ended_by = "server" if (answered or self._flushed) and not self._overflowed else "client"
        self.sent.closed_ns = time.monotonic_ns()

    # what the venues differ in -------------------------------------------------------------------------------------------------

    def hear(self, message: str | bytes) -> None:
        """Keep account of what the client says."""
        if self.options.record_sent:
            self.sent.requests.append((time.monotonic_ns(), message.encode() if isinstance(message, str) else message))

    def way(self, channel: Channel) -> Way:
        """What this client gets of a channel. Strays go to whoever gets anything that their connection carried."""
        way = self._ways.get(channel)
        if channel.what is What.STRAY:
            hears = any(it.conn == channel.conn and way is not Way.NOTHING for it, way in self._ways.items())
            return Way.RECORDED if hears and channel.venue is self.venue else Way.NOTHING
        if way is None:
            way = self._choose_way(channel) if channel.venue is self.venue else Way.NOTHING
            self._ways[channel] = way
        return way

    def _chosen_anew(self) -> None:
        """What the client wants has changed."""
        self._ways.clear()

    @property
    def subscribed(self) -> bool:
        """Whether the client has asked for any stream."""
        raise NotImplementedError

    def wants(self, code: str) -> bool:
        """Whether it has asked for anything of an instrument."""
        raise NotImplementedError

    async def receive(self, message: str | bytes) -> None:
        """Answer one message of the client."""
        raise NotImplementedError

    def _choose_way(self, channel: Channel) -> Way:
        """What this client gets of a channel of its venue."""
        raise NotImplementedError

    def tell(self, message: Message) -> None:
        """Send what a message means to each of the client's streams."""
        raise NotImplementedError

    async def attend(self) -> None:
        """What the venue does by itself while the connection lives."""
        raise NotImplementedError


_SENDABLE = (*range(1000, 1004), *range(1007, 1015))


def is_sendable(code: int) -> bool:
    """Whether a close code may be on the wire."""
    return code in _SENDABLE or 3000 <= code < 5000


def reply(status: HTTPStatus, body: bytes, extra: dict[str, str]) -> Response:
    """An HTTP answer in JSON."""
    headers = Headers(
        {
            "Content-Type": "application/json;charset=UTF-8",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "Date": formatdate(usegmt=True),
            **extra,
        }
    )
    return Response(status.value, status.phrase, headers, body)


def to_json(value: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
