"""What a recording tells about itself: a snapshot while it runs, a result when it has ended.

``as_json`` turns either into one line for machines. The field names are the documentation: units are in them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from arbl2_recorder.clock import ClockOffset  # noqa: TC001 - read at run time when a status is read back

if TYPE_CHECKING:
    from pathlib import Path

    from arbl2_recorder.recovery import RecoveryReport


@dataclass(frozen=True, slots=True)
class QueueDelay:
    """From the arrival of the bytes in the process to the ``seq`` of their frame, over the session so far."""

    p50_us: int = 0
    p99_us: int = 0
    max_us: int = 0


@dataclass(frozen=True, slots=True)
class VenueStatus:
    """One venue now. ``state``: dialling, open, waiting (for the next dial). ``last_message_s`` is None before the first.

    ``connections`` were opened since the start, ``open_connections`` are open now, ``reconnects`` replaced one that was lost.
    ``copies`` are messages that another connection had delivered already: neither in ``messages`` nor on the tape.
    """

    name: str
    state: str
    connections: int
    messages: int
    bytes: int
    rate_per_s: float
    last_message_s: float | None
    problem: str
    open_connections: int = 0
    reconnects: int = 0
    copies: int = 0


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """One stream of a venue, by the venue's own name. ``last_message_s`` is the age of the last message, None before it."""

    venue: str
    name: str
    messages: int
    rate_per_s: float
    last_message_s: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """A recording now. ``phase``: recording, sealing. Counts are since the start of the session.

    ``queued_bytes`` wait for the disk; ``waiting_logs`` wait to be sealed. ``dropped`` messages found no room, the last one
    ``last_drop_s`` ago (None: never). ``late_frames`` came while the event loop was stalled, so that their stamp may be late.
    ``gaps`` of the ledger by cause. ``disk_free_bytes`` and ``clock`` are None where the machine does not say.
    ``wall_ns`` is when the snapshot was taken. ``ship_problem`` says why sealed segments are not shipped, "" if they are or
    nobody asked for it.
    """

    session: str
    phase: str
    elapsed_s: float
    venues: tuple[VenueStatus, ...]
    frames: int
    queued_bytes: int
    logged_bytes: int
    sealed_bytes: int
    segments: int
    waiting_logs: int
    dropped: int
    alarms: int
    last_alarm: str
    streams: tuple[StreamStatus, ...] = ()
    queue: QueueDelay = QueueDelay()
    late_frames: int = 0
    last_drop_s: float | None = None
    gaps: dict[str, int] = field(default_factory=dict)
    last_gap: str = ""
    shipped_segments: int = 0
    ship_problem: str = ""
    disk_free_bytes: int | None = None
    clock: ClockOffset | None = None
    wall_ns: int = 0


@dataclass(frozen=True, slots=True)
class RecordResult:
    """A recording that has ended and is sealed.

    ``frames`` on the tape, ``payload_bytes`` in them, ``sealed_bytes`` of its files; ``messages`` and ``reconnects`` per
    venue; ``counts`` by "<venue or ->.<kind>"; ``alarms`` by name; ``gaps`` of the ledger by cause; ``silent`` streams never
    said anything; ``longest_silence_s`` is per venue, nothing from any stream; ``ended``: duration, stop or signal. ``clean``
    says that every message that arrived is on the tape. ``recovered`` are earlier sessions below the same root that were
    restored at the start. A long recording has several ``sessions``; ``session``, ``path`` and ``queue`` are of the last one.
    ``ship_problem`` says why something of it could not be shipped, "" if nothing is wrong.
    """

    session: str
    path: Path
    frames: int
    payload_bytes: int
    sealed_bytes: int
    messages: dict[str, int]
    counts: dict[str, int]
    alarms: dict[str, int]
    silent: tuple[str, ...]
    longest_silence_s: dict[str, float]
    dropped: int
    duration_s: float
    ended: str
    clean: bool
    recovered: tuple[RecoveryReport, ...]
    queue: QueueDelay = QueueDelay()
    late_frames: int = 0
    gaps: dict[str, int] = field(default_factory=dict)
    reconnects: dict[str, int] = field(default_factory=dict)
    shipped_segments: int = 0
    ship_problem: str = ""
    sessions: tuple[str, ...] = ()


def as_json(what: Status | RecordResult) -> bytes:
    """One JSON object on a line of its own; ``type`` says which of the two it is."""
    kind = "status" if isinstance(what, Status) else "result"
    fields = msgspec.to_builtins(what, enc_hook=str)
    return msgspec.json.encode({"type": kind, **fields}) + b"\n"
