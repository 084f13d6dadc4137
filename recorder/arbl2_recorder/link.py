"""One connection from its dial to its end: what happens on it becomes frames, and what does not happen becomes alarms.

What a link watches for is what a venue does not say: it answers with silence to a code it does not know, and closes politely
after an error.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from arbl2.frames import FrameKind, Op
from arbl2_recorder import clock
from arbl2_recorder.venues import Sign

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2_recorder.session import Session
    from arbl2_recorder.venues import VenueFeed

_CLEAN_CODES = (1000, 1001)


def seconds(ns: int) -> float:
    """Nanoseconds as seconds."""
    return ns / 1e9


class Link:
    """One connection. ``leaving`` is set when it should be replaced by a new one before it ends."""

    def __init__(
        self,
        feed: VenueFeed,
        session: Session,
        conn: int,
        *,
        is_copy: Callable[[int, bytes, int], bool],
        is_covered: Callable[[Link], bool],
        on_first: Callable[[Link, str], None],
        heard: set[str],
    ) -> None:
        self._feed = feed
        self._session = session
        self._accept = session.accept
        self._is_data = feed.is_data
        self._is_copy = is_copy
        self._is_covered = is_covered
        self._on_first = on_first
        # What the streams of the group have said: a quiet one need not say anything on a second connection to be well.
        self._group_heard = heard
        self._venue = feed.venue
        self.conn = conn
        self._unseen = set(feed.streams)
        self._unacknowledged = feed.acks
        self._watching = True
        self._subscribed_ns = 0
        self._subscriptions: list[bytes] = []
        self._spoken_elsewhere: frozenset[str] = frozenset()
        self._last_ns = 0
        self.alone = True
        self.leaving = asyncio.Event()
        self.ready = asyncio.Event()
        self.opened_ns = 0
        self.first_data_ns = 0
        self.messages = 0
        self.copies = 0
        self.bytes = 0
        self.longest_gap_ns = 0
        self.first_ns = 0
        self.is_open = False
        self.problem = ""

    @property
    def last_ns(self) -> int:
        """When the last message arrived (monotonic ns); 0 before the first."""
        return self._last_ns

    @property
    def carries_all(self) -> bool:
        """Open, and every stream that is not quiet by nature has spoken."""
        return self.is_open and self.ready.is_set() and self.first_data_ns > 0

    def opened(self, recv_ns: int, mono_ns: int) -> None:
        """The handshake succeeded."""
        self.is_open = True
        self.opened_ns = mono_ns
        self._frame(FrameKind.OPENED, {"url": self._feed.url}, recv_ns, mono_ns)

    def message(self, op: Op, payload: bytes, recv_ns: int, mono_ns: int) -> None:
        """Keep it first; look into it only while something is still waited for."""
        is_data = self._is_data(payload)
        if self.alone or not is_data or not self._is_copy(self.conn, payload, mono_ns):
            self._accept(self._venue, self.conn, FrameKind.MESSAGE, op, payload, recv_ns, mono_ns)
        else:
            self.copies += 1
        self.messages += 1
        self.bytes += len(payload)
        if mono_ns - self._last_ns > self.longest_gap_ns:
            self._note_gap(mono_ns)
        self._last_ns = mono_ns
        if self._unseen or not is_data:
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
        if self._is_covered(self):
            facts["covered"] = True
        self._frame(FrameKind.CLOSED, facts, recv_ns, mono_ns)

    def restate(self) -> None:
        """A new session begins: it must say itself which connection carries what."""
        if self.is_open:
            recv_ns, mono_ns = clock.stamp()
            self._frame(FrameKind.OPENED, {"url": self._feed.url, "carried_over": True}, recv_ns, mono_ns)
            for payload in self._subscriptions:
                self._accept(self._venue, self.conn, FrameKind.SENT, Op.TEXT, payload, recv_ns, mono_ns)

    def sent(self, payload: bytes) -> None:
        """A subscription is about to leave; from now on answers are waited for."""
        recv_ns, mono_ns = clock.stamp()
        if not self._subscriptions and not self.alone:
            self._spoken_elsewhere = frozenset(self._group_heard)
        self._subscribed_ns = mono_ns
        self._subscriptions.append(payload)
        self._accept(self._venue, self.conn, FrameKind.SENT, Op.TEXT, payload, recv_ns, mono_ns)

    def refused(self, reason: str) -> None:
        """The dial failed: there was no connection, but there is an end to record."""
        self._frame(FrameKind.CLOSED, {"code": 1006, "reason": reason, "clean": False}, *clock.stamp())

    def check(self, now_ns: int, snapshot_timeout_s: float, max_age_s: float) -> None:
        """Raise an alarm, once each, for everything that should have come by now; leave when the time is up."""
        if self.is_open and seconds(now_ns - self.opened_ns) > max_age_s:
            self.leaving.set()
        if not self._watching or not self._subscribed_ns:
            return
        if seconds(now_ns - self._subscribed_ns) < snapshot_timeout_s:
            return
        self._watching = False
        if self._unacknowledged:
            self._alarm("no_ack", timeout_s=snapshot_timeout_s)
        self._give_up(timeout_s=snapshot_timeout_s)

    def finish(self) -> None:
        """The recording ends: streams that never said anything are named, even if their time was not up."""
        if self._watching and self._subscribed_ns:
            self._watching = False
            self._give_up()

    def _give_up(self, **facts: Any) -> None:
        for stream in sorted(self._unseen - self._feed.quiet - self._spoken_elsewhere):
            self._alarm("silent", stream=stream, **facts)
        self._unseen.clear()
        self.ready.set()

    def silent_s(self, now_ns: int) -> float:
        """Seconds since the last message, or since the subscription if none came."""
        since = max(self._last_ns, self._subscribed_ns)
        return seconds(now_ns - since) if since else 0.0

    def _look(self, payload: bytes, recv_ns: int, mono_ns: int) -> None:
        note = self._feed.read(payload)
        if note.sign is Sign.DATA:
            self.first_data_ns = self.first_data_ns or mono_ns
            if note.text in self._unseen:
                self._unseen.discard(note.text)
                self._group_heard.add(note.text)
                self._on_first(self, note.text)
            # A stream that may stay quiet for hours must not hold up a hand-over.
            if self._unseen <= self._feed.quiet:
                self.ready.set()
        elif note.sign is Sign.ACK:
            self._unacknowledged = max(0, self._unacknowledged - 1)
        elif note.sign is Sign.ERROR:
            # A refusal is an answer: complaining about a missing one too would say it twice.
            self._unacknowledged = 0
            self.problem = note.text
            self._alarm("venue_error", at=(recv_ns, mono_ns), said=note.text)
        elif note.sign is Sign.SHUTDOWN:
            self._alarm("venue_shutdown", at=(recv_ns, mono_ns))
            self.leaving.set()

    def _alarm(self, name: str, *, at: tuple[int, int] | None = None, **facts: Any) -> None:
        self._session.alarm(name, venue=self._venue, conn=self.conn, at=at, **facts)

    def _frame(self, kind: FrameKind, facts: dict[str, Any], recv_ns: int, mono_ns: int) -> None:
        self._session.record(self._venue, self.conn, kind, facts, recv_ns, mono_ns)
