"""One connection to one venue, kept alive: dial, subscribe, watch, dial again.

A ``Link`` is one connection from its dial to its end; a ``Leg`` is the sequence of them. What a link watches for is what a
venue does not say: it answers with silence to a code it does not know, and closes politely after an error.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import TYPE_CHECKING, Any, cast

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from arbl2.frames import FrameKind, Op
from arbl2_recorder import clock
from arbl2_recorder.backoff import Backoff
from arbl2_recorder.status import VenueStatus
from arbl2_recorder.venues import Sign
from arbl2_recorder.wire import RecordingConnection

if TYPE_CHECKING:
    from websockets.client import ClientProtocol

    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.session import Session
    from arbl2_recorder.venues import VenueFeed

_CLEAN_CODES = (1000, 1001)
_wire_logger = logging.getLogger("arbl2.recorder.wire")


def _seconds(ns: int) -> float:
    return ns / 1e9


class Link:
    """One connection: turns what happens on it into frames, and notices what does not happen."""

    def __init__(self, feed: VenueFeed, session: Session, conn: int) -> None:
        self._feed = feed
        self._session = session
        self._accept = session.accept
        self._is_data = feed.is_data
        self._venue = feed.venue
        self.conn = conn
        self._unseen = set(feed.streams)
        self._unacknowledged = feed.acknowledges
        self._watching = True
        self._subscribed_ns = 0
        self._last_ns = 0
        self.first_data_ns = 0
        self.messages = 0
        self.bytes = 0
        self.longest_gap_ns = 0
        self.first_ns = 0
        self.is_open = False
        self.problem = ""

    @property
    def last_ns(self) -> int:
        """When the last message arrived (monotonic ns); 0 before the first."""
        return self._last_ns

    def opened(self, recv_ns: int, mono_ns: int) -> None:
        """The handshake succeeded."""
        self.is_open = True
        self._frame(FrameKind.OPENED, {"url": self._feed.url}, recv_ns, mono_ns)

    def message(self, op: Op, payload: bytes, recv_ns: int, mono_ns: int) -> None:
        """Keep it first; look into it only while something is still waited for."""
        self._accept(self._venue, self.conn, FrameKind.MESSAGE, op, payload, recv_ns, mono_ns)
        self.messages += 1
        self.bytes += len(payload)
        if mono_ns - self._last_ns > self.longest_gap_ns:
            self._note_gap(mono_ns)
        self._last_ns = mono_ns
        if self._unseen or not self._is_data(payload):
            self._look(payload, recv_ns, mono_ns)

    def _note_gap(self, mono_ns: int) -> None:
        if self._last_ns:
            self.longest_gap_ns = mono_ns - self._last_ns
        else:
            self.first_ns = mono_ns

    def closed(self, code: int, reason: str, recv_ns: int, mono_ns: int) -> None:
        """The connection ended. After an error of the venue even a close with 1000 is not a clean end."""
        self.is_open = False
        facts: dict[str, Any] = {"code": code, "reason": reason}
        facts["clean"] = code in _CLEAN_CODES and not self.problem
        if self.problem:
            facts["error"] = self.problem
        self._frame(FrameKind.CLOSED, facts, recv_ns, mono_ns)

    def sent(self, payload: bytes) -> None:
        """A subscription is about to leave; from now on answers are waited for."""
        recv_ns, mono_ns = clock.stamp()
        self._subscribed_ns = mono_ns
        self._accept(self._venue, self.conn, FrameKind.SENT, Op.TEXT, payload, recv_ns, mono_ns)

    def refused(self, reason: str) -> None:
        """The dial failed: there was no connection, but there is an end to record."""
        self._frame(FrameKind.CLOSED, {"code": 1006, "reason": reason, "clean": False}, *clock.stamp())

    def check(self, now_ns: int, snapshot_timeout_s: float) -> None:
        """Raise an alarm, once each, for everything that should have come by now."""
        if not self._watching or not self._subscribed_ns:
            return
        if _seconds(now_ns - self._subscribed_ns) < snapshot_timeout_s:
            return
        self._watching = False
        if self._unacknowledged:
            self._alarm("no_ack", timeout_s=snapshot_timeout_s)
        for stream in sorted(self._unseen):
            self._alarm("silent", stream=stream, timeout_s=snapshot_timeout_s)
        self._unseen.clear()

    def finish(self) -> None:
        """The recording ends: streams that never said anything are named, even if their time was not up."""
        if self._watching and self._subscribed_ns:
            self._watching = False
            for stream in sorted(self._unseen):
                self._alarm("silent", stream=stream)

    def silent_s(self, now_ns: int) -> float:
        """Seconds since the last message, or since the subscription if none came."""
        since = max(self._last_ns, self._subscribed_ns)
        return _seconds(now_ns - since) if since else 0.0

    def _look(self, payload: bytes, recv_ns: int, mono_ns: int) -> None:
        note = self._feed.read(payload)
        if note.sign is Sign.DATA:
            self._unseen.discard(note.text)
            self.first_data_ns = self.first_data_ns or mono_ns
        elif note.sign is Sign.ACK:
            self._unacknowledged = False
        elif note.sign is Sign.ERROR:
            # A refusal is an answer: complaining about a missing one too would say it twice.
            self._unacknowledged = False
            self.problem = note.text
            self._alarm("venue_error", at=(recv_ns, mono_ns), said=note.text)
        elif note.sign is Sign.SHUTDOWN:
            self._alarm("venue_shutdown", at=(recv_ns, mono_ns))

    def _alarm(self, name: str, *, at: tuple[int, int] | None = None, **facts: Any) -> None:
        self._session.alarm(name, venue=self._venue, conn=self.conn, at=at, **facts)

    def _frame(self, kind: FrameKind, facts: dict[str, Any], recv_ns: int, mono_ns: int) -> None:
        self._session.record(self._venue, self.conn, kind, facts, recv_ns, mono_ns)


class Leg:
    """Keeps one venue connected until cancelled. Totals are over all its links."""

    def __init__(self, feed: VenueFeed, session: Session, config: RecordConfig) -> None:
        self.feed = feed
        self._session = session
        self._config = config
        self._backoff = Backoff(config.backoff_cap_s)
        self._link: Link | None = None
        self._socket: RecordingConnection | None = None
        self._dialled_ns = 0
        self._started_ns = clock.mono_ns()
        self._connections = 0
        self._messages = 0
        self._bytes = 0
        self._last_ns = 0
        self._longest_gap_ns = 0
        self._state = "dialling"
        self.problem = ""
        self.delivered = False

    @property
    def messages(self) -> int:
        """Messages received so far."""
        return self._messages + (self._link.messages if self._link else 0)

    async def run(self) -> None:
        """Dial, record, dial again. Ends by cancellation only, and then closes the connection properly."""
        while True:
            link = self._link = Link(self.feed, self._session, self._session.connection())
            self._state = "dialling"
            self._dialled_ns = clock.mono_ns()
            wait_s = 0.0
            try:
                wait_s = await self._dial(link)
            finally:
                self._retire(link)
            self._state = "waiting"
            since_dial_s = _seconds(clock.mono_ns() - self._dialled_ns)
            floor_s = self._config.dial_interval_s - since_dial_s
            await asyncio.sleep(max(floor_s, wait_s, self._backoff.delay_s()))

    def finish(self) -> None:
        """The recording is about to end."""
        if self._link is not None:
            self._link.finish()

    def longest_silence_s(self, start_ns: int, end_ns: int) -> float:
        """The longest time without a message between two instants, the time before the first and after the last included."""
        if not self._last_ns:
            return _seconds(end_ns - start_ns)
        return _seconds(max(self._longest_gap_ns, end_ns - self._last_ns))

    def check(self, now_ns: int) -> None:
        """Called several times a second: alarms that are due, and the end of a connection that has gone silent."""
        link, socket = self._link, self._socket
        if link is None or socket is None or not link.is_open:
            return
        link.check(now_ns, self._config.snapshot_timeout_s)
        self.delivered = self.delivered or link.first_data_ns > 0
        silent_s = link.silent_s(now_ns)
        if silent_s > self._config.stall_s:
            self._session.alarm("stalled", venue=self.feed.venue, conn=link.conn, silent_s=round(silent_s, 3))
            link.problem = "stalled"
            self._socket = None
            socket.transport.abort()

    def status(self, now_ns: int, rate_per_s: float) -> VenueStatus:
        """A snapshot for people."""
        link = self._link
        last_ns = max(self._last_ns, link.last_ns if link else 0)
        return VenueStatus(
            name=self.feed.name,
            state=self._state,
            connections=self._connections,
            messages=self.messages,
            bytes=self._bytes + (link.bytes if link else 0),
            rate_per_s=rate_per_s,
            last_message_s=_seconds(now_ns - last_ns) if last_ns else None,
            problem=self.problem,
        )

    async def _dial(self, link: Link) -> float:
        """One connection from dial to end; returns how long the venue asked to be left alone, seconds."""
        config = self._config

        def create(protocol: ClientProtocol, **options: Any) -> RecordingConnection:
            return RecordingConnection(protocol, tap=link, **options)

        try:
            opened = await connect(
                self.feed.url,
                open_timeout=config.open_timeout_s,
                close_timeout=config.close_timeout_s,
                ping_interval=config.ping_interval_s,
                ping_timeout=config.ping_timeout_s,
                max_size=config.max_message_bytes,
                logger=_wire_logger,
                create_connection=cast("Any", create),
            )
        except (OSError, InvalidHandshake, InvalidURI) as error:
            self.problem = str(error) or type(error).__name__
            link.refused(self.problem)
            return _retry_after_s(error)
        socket = self._socket = cast("RecordingConnection", opened)
        self._connections += 1
        self._state = "open"
        try:
            subscription = self.feed.subscription(str(uuid.uuid4()))
            link.sent(subscription)
            await socket.send(subscription.decode("utf-8"))
            await socket.wait_closed()
        except (OSError, WebSocketException) as error:
            self.problem = str(error)
        finally:
            self._socket = None
            await socket.close()
        self.problem = link.problem or "the connection was closed"
        return 0.0

    def _retire(self, link: Link) -> None:
        self._link = None
        self._messages += link.messages
        self._bytes += link.bytes
        if link.first_ns:
            self._longest_gap_ns = max(
                self._longest_gap_ns, link.longest_gap_ns, link.first_ns - (self._last_ns or self._started_ns)
            )
        self._last_ns = max(self._last_ns, link.last_ns)
        self.delivered = self.delivered or link.first_data_ns > 0
        if link.first_data_ns and _seconds(link.last_ns - link.first_data_ns) >= self._config.stable_s:
            self._backoff.reset()


def _retry_after_s(error: Exception) -> float:
    if not isinstance(error, InvalidStatus):
        return 0.0
    text = error.response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0.0
