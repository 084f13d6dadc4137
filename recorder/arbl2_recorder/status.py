"""What a recording tells about itself: a snapshot while it runs, a result when it has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from arbl2_recorder.recovery import RecoveryReport


@dataclass(frozen=True, slots=True)
class VenueStatus:
    """One venue now. ``state``: dialling, open, waiting (for the next dial). ``last_message_s`` is None before the first."""

    name: str
    state: str
    connections: int
    messages: int
    bytes: int
    rate_per_s: float
    last_message_s: float | None
    problem: str


@dataclass(frozen=True, slots=True)
class Status:
    """A recording now. ``queued_bytes`` wait for the disk; ``waiting_logs`` wait to be sealed. ``phase``: recording, sealing."""

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


@dataclass(frozen=True, slots=True)
class RecordResult:
    """A recording that has ended and is sealed.

    ``frames`` on the tape, ``payload_bytes`` in them, ``sealed_bytes`` of its files; ``messages`` per venue; ``counts`` by
    "<venue or ->.<kind>"; ``alarms`` by name; ``silent`` streams never said anything; ``longest_silence_s`` is per
    venue, nothing from any stream; ``ended``: duration, stop or signal. ``clean`` says that every message that
    arrived is on the tape. ``recovered`` are earlier sessions below the same root that were restored at the start.
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
