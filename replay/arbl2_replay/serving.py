"""What both venues of the exchange server have in common: options, the account of what was sent, one client, HTTP replies."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from websockets.asyncio.server import ServerConnection, broadcast
from websockets.datastructures import Headers
from websockets.http11 import Response
from websockets.protocol import State

from arbl2.frames import ExchangeId, Op

if TYPE_CHECKING:
    from http import HTTPStatus
    from pathlib import Path

    from arbl2_replay.faults import FaultConfig
    from arbl2_replay.flow import Moved
    from arbl2_replay.gate import Gate
    from arbl2_replay.server import ExchangeServer
    from arbl2_replay.synth import MarketEvent

log = logging.getLogger("arbl2.server")


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
    faults: FaultConfig | None = None
    fault_log: Path | None = None
    """Gets a line of JSON for every fault."""


@dataclass(slots=True)
class SentLog:
    """Every data payload that was sent to one connection, in order: its form and the SHA-256 of its bytes.

    Times are monotonic ns. ``ended_by`` is "" while it is open, then "server" (by a close frame that the client answered, or by a
    cut after everything was out: every payload reached it) or "client" (what was sent last may not have reached it).
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

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._ends_at = 0.0
        self._used = 0

    def take(self, weight: int) -> tuple[int, float]:
        """What was used in this window, ``weight`` included, and the seconds that are left of it."""
        now = time.monotonic()
        if now >= self._ends_at:
            self._ends_at, self._used = now + self._window_s, 0
        self._used += weight
        return self._used, self._ends_at - now


class Connection(ServerConnection):
    """Remembers when the client was last heard, be it only a ping."""

    heard_at: float = 0.0

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        self.heard_at = self.loop.time()
        super().data_received(data)


class Client:
    """One WebSocket connection."""

    venue: ExchangeId

    def __init__(self, server: ExchangeServer, ws: Connection, sent: SentLog) -> None:
        self.server = server
        self.options = server.options
        self.ws = ws
        self.sent = sent
        self.sent_at = ws.loop.time()
        self.gate: Gate | None = None
        """Set by whoever holds up, spoils or swallows what is sent here."""
        self.frozen = False
        """The venue's machine has gone without a word: it neither sends, nor reads, nor pings."""
        self._cut = False
        self._flushed = False

    @property
    def is_open(self) -> bool:
        """Whether payloads can be sent."""
        return self.ws.state is State.OPEN and not self._cut

    def send(self, payload: bytes, op: Op, stream: str = "", first_id: int = 0, last_id: int = 0) -> None:
        """Send a payload without waiting. ``stream`` and the ids say what it is, for faults that choose."""
        if self.gate is None:
            self.write(payload, op)
        else:
            self.gate.send(payload, op, stream, first_id, last_id)

    def write(self, payload: bytes, op: Op) -> None:
        """Hand a payload to the socket; drops the client when it has stopped reading."""
        if not self.is_open:
            return
        broadcast((self.ws,), payload, text=op is Op.TEXT)
        self.sent_at = self.ws.loop.time()
        if self.options.record_sent:
            self.sent.at_ns.append(time.monotonic_ns())
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

    async def close(self, code: int, reason: str = "") -> None:
        """End the connection with a close frame."""
        await self.ws.close(code, reason)

    async def cut(self, torn: bytes = b"") -> None:
        """End the connection without a close frame, once everything sent so far is out.

        ``torn`` begins a frame that never ends: its first bytes on the wire.
        """
        transport, loop = self.ws.transport, self.ws.loop
        if not self.is_open or transport.is_closing():
            return
        self._cut = True
        transport.write(torn)
        give_up_at = loop.time() + 2.0
        while (left := transport.get_write_buffer_size()) and loop.time() < give_up_at:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.001)
        self._flushed = not left
        transport.abort()

    def ended(self) -> None:
        """The connection is over: tell who ended it."""
        protocol = self.ws.protocol
        answered = protocol.close_sent and protocol.close_rcvd and not protocol.close_rcvd_then_sent
        self.sent.ended_by = "server" if answered or self._flushed else "client"
        self.sent.closed_ns = time.monotonic_ns()

    def hear(self, message: str | bytes) -> None:
        """Keep account of what the client says."""
        if self.options.record_sent:
            self.sent.requests.append((time.monotonic_ns(), message.encode() if isinstance(message, str) else message))

    @property
    def subscribed(self) -> bool:
        """Whether the client has asked for any stream."""
        raise NotImplementedError

    async def receive(self, message: str | bytes) -> None:
        """Answer one message of the client."""
        raise NotImplementedError

    def publish(self, event: MarketEvent, moved: Moved | None, encoded: dict[object, bytes], count: int) -> None:
        """Send what this client wants of the event.

        ``moved`` is what the flow of the code makes of it, None while nobody asked for more than books; ``encoded`` is shared by
        all clients; ``count`` is the code's own.
        """
        raise NotImplementedError

    async def attend(self) -> None:
        """What the venue does by itself while the connection lives."""
        raise NotImplementedError


def reply(status: HTTPStatus, body: bytes, extra: dict[str, str]) -> Response:
    """An HTTP answer in JSON."""
    headers = Headers(
        {
            "Content-Type": "application/json;charset=UTF-8",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **extra,
        }
    )
    return Response(status.value, status.phrase, headers, body)


def to_json(value: object) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
