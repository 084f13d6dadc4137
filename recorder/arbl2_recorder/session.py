"""A session in the making: the one place where a frame gets its ``seq``.

``accept`` is called in the socket thread, as soon as something has happened, and never waits. If the disk is so slow that the
queue reaches its limit, messages are left out until half of it is free again, and before anything else is written every
connection that lost some gets an ALARM frame that says how many and from when to when: a hole is never silent.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.frames import HEAD, VENUES, Anchor, Flag, FrameKind, Op
from arbl2_recorder import clock

if TYPE_CHECKING:
    from arbl2_recorder.clock import ClockOffset
    from arbl2_recorder.consumer import Consumer
    from arbl2_recorder.writer import LogWriter

_logger = logging.getLogger("arbl2.recorder")
_MESSAGE = FrameKind.MESSAGE
_now_ns = clock.mono_ns
_LATE, _ON_TIME = int(Flag.LATE), int(Flag.NONE)
_MOST_US = 2**31 - 1
BEAT_S = 0.005
LATE_NS = 20_000_000
LEAST_LATE_NS, MOST_LATE_NS = 50_000_000, 1_000_000_000
"""A beat that is older than this when bytes are read means that the event loop was held up by something else."""


@dataclass(slots=True)
class _Loss:
    frames: int
    bytes: int
    from_recv_ns: int
    to_recv_ns: int


class Session:
    """Gives out connection numbers and ``seq``, and appends to the log. Not thread-safe: the socket thread owns it."""

    def __init__(self, log: LogWriter, *, queue_bytes: int, consumer: Consumer | None = None) -> None:
        self._log = log
        self._queue_bytes = queue_bytes
        self._consumer = consumer
        self._conns = 0
        self._losses: dict[tuple[int, int], _Loss] = {}
        self.seq = 0
        self.payload_bytes = 0
        self.dropped = 0
        self.late_frames = 0
        self.last_drop_ns = 0
        self.alarms: Counter[str] = Counter()
        self._noted: Counter[str] = Counter()
        self.last_alarm = ""
        self.silent: set[str] = set()
        self._beat_ns = 0
        self._late_until_ns = 0

    def beat(self) -> None:
        """The event loop turns: called every ``BEAT_S``. What is read long after the last beat may have waited in the kernel.

        A beat that comes late itself (it may come before the sockets are read) means the same for what is read from now on: a
        backlog takes its time, so the flag stays for about as long as the loop was held up.
        """
        now_ns = clock.mono_ns()
        held_ns, self._beat_ns = now_ns - (self._beat_ns or now_ns), now_ns
        if held_ns > LATE_NS:
            self._late_until_ns = now_ns + min(max(held_ns, LEAST_LATE_NS), MOST_LATE_NS)

    def go_on_in(self, log: LogWriter) -> None:
        """What comes next begins a new session, from ``seq`` 1. What was lost so far is declared in the old one."""
        if self._losses:
            self._declare(*clock.stamp())
        self._log = log
        self.seq = 0

    def take_alarms(self) -> Counter[str]:
        """Alarms since the last call."""
        fresh = self.alarms - self._noted
        self._noted = Counter(self.alarms)
        return fresh

    def connection(self) -> int:
        """A new connection number, from 1. Every dial gets one, whether it succeeds or not."""
        self._conns += 1
        return self._conns

    def accept(self, venue: int, conn: int, kind: FrameKind, op: Op, payload: bytes, recv_ns: int, mono_ns: int) -> int:
        """Record one frame; ``venue`` is a code of ``VENUES``. Returns its seq, 0 if it had to be dropped."""
        if self._losses or self._log.queued_bytes > self._queue_bytes:
            if kind is _MESSAGE and self._log.queued_bytes > self._queue_bytes // 2:
                self._lose(venue, conn, payload, recv_ns, mono_ns)
                return 0
            if self._losses:
                self._declare(recv_ns, mono_ns)
        return self._append(venue, conn, kind, op, payload, recv_ns, mono_ns)

    def record(self, venue: int, conn: int, kind: FrameKind, facts: dict[str, Any], recv_ns: int, mono_ns: int) -> None:
        """Record a frame whose payload is ours: the facts as JSON."""
        self.accept(venue, conn, kind, Op.NONE, msgspec.json.encode(facts), recv_ns, mono_ns)

    def alarm(self, name: str, *, venue: int = 0, conn: int = 0, at: tuple[int, int] | None = None, **facts: Any) -> None:
        """Record that something is wrong or missing, and tell the log of the program.

        ``at`` (recv_ns, mono_ns) is the stamp of the message that showed it, if one did. Messages that arrived with that one
        are still to come with the same stamp: an alarm stamped now would make time step back after it.
        """
        if name == "silent":
            self.silent.add(str(facts["stream"]))
        self._raise_alarm(name, venue, conn, facts)
        recv_ns, mono_ns = at or clock.stamp()
        self.record(venue, conn, FrameKind.ALARM, {"alarm": name, **facts}, recv_ns, mono_ns)

    def clock_sample(self, offset: ClockOffset | None = None) -> Anchor:
        """Record one instant on both clocks, and what a time service knows of the wall clock."""
        sample = clock.sample()
        facts: dict[str, Any] = {"wall_ns": sample.wall_ns, "mono_ns": sample.mono_ns}
        if offset is not None:
            facts |= dataclasses.asdict(offset)
        self.record(0, 0, FrameKind.CLOCK, facts, sample.wall_ns, sample.mono_ns)
        return sample

    def _append(self, venue: int, conn: int, kind: FrameKind, op: Op, payload: bytes, recv_ns: int, mono_ns: int) -> int:
        self.seq = seq = self.seq + 1
        self.payload_bytes += len(payload)
        flags = _ON_TIME
        if mono_ns < self._late_until_ns or 0 < self._beat_ns < mono_ns - LATE_NS:
            flags = _LATE
            self.late_frames += 1
        queue_us = (_now_ns() - mono_ns) // 1000
        queue_us = min(queue_us, _MOST_US)
        head = HEAD.pack(seq, recv_ns, mono_ns, conn, queue_us, venue, kind, op, flags, len(payload))
        self._log.append(head, payload)
        if self._consumer is not None:
            self._consumer.put(head, payload)
        return seq

    def _lose(self, venue: int, conn: int, payload: bytes, recv_ns: int, mono_ns: int) -> None:
        self.dropped += 1
        self.last_drop_ns = mono_ns
        loss = self._losses.setdefault((venue, conn), _Loss(0, 0, recv_ns, recv_ns))
        loss.frames += 1
        loss.bytes += len(payload)
        loss.to_recv_ns = recv_ns

    def _declare(self, recv_ns: int, mono_ns: int) -> None:
        losses, self._losses = self._losses, {}
        for (venue, conn), loss in losses.items():
            facts = {name: getattr(loss, name) for name in loss.__slots__}
            self._raise_alarm("dropped", venue, conn, facts)
            payload = msgspec.json.encode({"alarm": "dropped", **facts})
            self._append(venue, conn, FrameKind.ALARM, Op.NONE, payload, recv_ns, mono_ns)

    def _raise_alarm(self, name: str, venue: int, conn: int, facts: dict[str, Any]) -> None:
        self.alarms[name] += 1
        where = f"{VENUES[venue]} connection {conn}: " if conn else (f"{VENUES[venue]}: " if venue else "")
        details = ", ".join(f"{key} {value}" for key, value in facts.items())
        self.last_alarm = f"{where}{name.replace('_', ' ')}" + (f" ({details})" if details else "")
        _logger.warning("%s", self.last_alarm)
