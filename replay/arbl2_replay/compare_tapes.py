"""The recordings behind two runs: where they first differ, and the frames around a moment.

Frames are read from the row groups that hold them; segments that a manifest calls equal are not read at all. Memory is bounded
by a few row groups whatever the length of the tapes.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from arbl2.errors import Arbl2Error, TapeError
from arbl2.frames import VENUES
from arbl2.tape import TapeReader, session_place
from arbl2_replay.reading import tape_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.frames import Frame, FrameBlock
    from arbl2.tape import Segment

_STAMPS = ("seq", "recv_ns", "mono_ns", "venue", "conn", "kind", "op", "queue_us", "flags")
CLOCKS = ("anchor_wall_ns", "anchor_mono_ns")
"""Fields of a manifest that every engine time hangs on."""


class TapeRef(msgspec.Struct, frozen=True):
    """A recording as a run names it; ``place`` is "" where a run does not say."""

    session: str
    sha256: str
    state: str = ""
    place: str = ""
    instruments: dict[str, list[str]] = {}


@dataclass(frozen=True, slots=True)
class Seen:
    """A frame with its engine time, ns since the Unix epoch."""

    frame: Frame
    time_ns: int


@dataclass(frozen=True, slots=True)
class Window:
    """Frames of one recording, or of two beside each other. ``focus`` is the place in ``pairs`` that it is all about.

    ``title`` says why they are shown. None in a pair: that side has no such frame. ``fields`` names what differs at the focus;
    ``differs``: it is shown because the recordings do.
    """

    title: str
    session: str
    pairs: tuple[tuple[Seen | None, Seen | None], ...]
    focus: int
    one_tape: bool
    fields: tuple[str, ...] = ()
    differs: bool = False


class Recording:
    """One recording, read where it is asked for; each segment is compared with its manifest before a frame of it is shown."""

    def __init__(self, reader: TapeReader) -> None:
        self.manifest = reader.manifest
        self.place = reader.place
        self._reader = reader
        self._checked: set[str] = set()

    def blocks(self, segments: Sequence[Segment]) -> Iterator[FrameBlock]:
        """The frames of some segments. Raises TapeError where one is not what its manifest says."""
        for segment in segments:
            part = copy.copy(self._reader)
            part.manifest = msgspec.structs.replace(self.manifest, segments=[segment])
            if segment.file not in self._checked:
                part.verify_hashes()
                self._checked.add(segment.file)
            yield from part.blocks()

    def frames(self, first_seq: int, last_seq: int) -> Iterator[Seen]:
        """The frames from one ``seq`` to another, those that there are."""
        found = [s for s in self.manifest.segments if s.last_seq >= first_seq and s.first_seq <= last_seq]
        for block in self.blocks(found):
            start, stop = np.searchsorted(block.seq, [first_seq, last_seq + 1]).tolist()
            yield from (_seen(block, i) for i in range(start, stop))
            if stop < len(block):
                return

    def holds(self, seq: int, time_ns: int) -> bool:
        """Whether the frame ``seq`` is of this engine time. Every recording counts from 1, so it takes both to know a frame."""
        return any(seen.time_ns == time_ns for seen in self.frames(seq, seq))

    def first_at(self, from_seq: int, time_ns: int, venue: str) -> Seen | None:
        """The first frame of a venue, from ``from_seq`` on, at or after an engine time; None if the recording ends before."""
        code, anchor = VENUES.index(venue), self._reader.anchor
        for number, segment in enumerate(self.manifest.segments):
            if segment.last_seq < from_seq:
                continue
            if not any(anchor.time_ns(group.last_mono_ns) >= time_ns for group in self._reader.group_spans(number)):
                continue
            for block in self.blocks([segment]):
                late = np.flatnonzero((block.time_ns >= time_ns) & (block.seq >= from_seq) & (block.venue == code))
                if len(late):
                    return _seen(block, int(late[0]))
        return None


def open_tape(ref: TapeRef, tapes: Path | str | None) -> Recording:
    """The recording of a run: where it was then, else below ``tapes``. Raises TapeError if it is gone, or not the same now."""
    places = [place for place in (ref.place, str(session_place(tapes) / ref.session) if tapes is not None else "") if place]
    problem = f"the run does not say where its recording {ref.session} lies. Name the folder that it lies in with --tapes."
    for place in places:
        try:
            reader = TapeReader(place)
        except Arbl2Error as error:
            problem = f"{error} Or name the folder that the recording lies in now with --tapes."
            continue
        found = tape_sha256(reader.manifest)
        if found == ref.sha256:
            return Recording(reader)
        problem = (
            f"{place} is not the recording of this run any more (sha256 {found[:12]}..., then {ref.sha256[:12]}...). "
            "Restore it from a copy, or name the folder of the right one with --tapes."
        )
    raise TapeError(problem)


def clock_changes(a: Recording, b: Recording) -> Iterator[tuple[str, Any, Any]]:
    """What differs between the clock anchors of two recordings: name and both values."""
    for name in CLOCKS:
        ours, theirs = getattr(a.manifest, name), getattr(b.manifest, name)
        if ours != theirs:
            yield name, ours, theirs


def first_difference(a: Recording, b: Recording, around: int) -> Window | None:
    """The first frame that differs between two recordings, with ``around`` frames before and after; None if none does.

    Raises TapeError where a segment is not what its manifest says.
    """
    equal = _equal_segments(a.manifest.segments, b.manifest.segments)
    before: deque[Seen] = deque(maxlen=around)
    if equal and around:
        last_seq = a.manifest.segments[equal - 1].last_seq
        before.extend(a.frames(last_seq - around + 1, last_seq))
    ours = _Cursor(a.blocks(a.manifest.segments[equal:]))
    theirs = _Cursor(b.blocks(b.manifest.segments[equal:]))
    while (n := min(ours.ready(), theirs.ready())) > 0:
        mine, other = ours.peek(n), theirs.peek(n)
        row = _first_row(mine, other)
        before.extend(_seen(mine, i) for i in range(max(0, row - around), row))
        ours.skip(row)
        theirs.skip(row)
        if row < n:
            break
    rest = (ours.next_frames(around + 1), theirs.next_frames(around + 1))
    if not any(rest):
        return None
    pairs = (*((seen, seen) for seen in before), *zip_longest(*rest))
    at = pairs[len(before)]
    return Window(
        "first frame that differs", a.manifest.session, pairs, len(before), one_tape=False, fields=differing(*at), differs=True
    )


def beside(ours: Sequence[Seen], theirs: Sequence[Seen]) -> tuple[tuple[Seen | None, Seen | None], ...]:
    """Frames of two recordings with the same ``seq`` beside each other."""
    left, right = ({seen.frame.seq: seen for seen in side} for side in (ours, theirs))
    return tuple((left.get(seq), right.get(seq)) for seq in sorted(left.keys() | right.keys()))


def differing(a: Seen | None, b: Seen | None) -> tuple[str, ...]:
    """What differs between two frames; nothing where one is missing."""
    if a is None or b is None:
        return ()
    names = (*_STAMPS, "payload")
    return tuple(name for name in names if getattr(a.frame, name) != getattr(b.frame, name))


def payload_change(a: Seen | None, b: Seen | None) -> int | None:
    """Where the payloads of two frames first differ, counted from 0; None if they do not, or one is missing."""
    if a is None or b is None or a.frame.payload == b.frame.payload:
        return None
    pairs = enumerate(zip_longest(a.frame.payload, b.frame.payload))
    return next(at for at, (mine, other) in pairs if mine != other)


def _equal_segments(a: Sequence[Segment], b: Sequence[Segment]) -> int:
    """How many segments at the start are the same file."""
    n = 0
    for ours, theirs in zip(a, b, strict=False):
        if ours.sha256 != theirs.sha256:
            break
        n += 1
    return n


def _seen(block: FrameBlock, i: int) -> Seen:
    return Seen(block.frame(i), int(block.time_ns[i]))


def _first_row(a: FrameBlock, b: FrameBlock) -> int:
    """The first row that differs between two blocks of one length; their length if none does."""
    n = len(a)
    for name in _STAMPS:
        n = min(n, _first(getattr(a, name)[:n] != getattr(b, name)[:n]))
    n = min(n, _first(np.diff(a.offsets[: n + 1]) != np.diff(b.offsets[: n + 1])))
    ours = a.data[a.offsets[0] : a.offsets[n]]
    theirs = b.data[b.offsets[0] : b.offsets[n]]
    at = _first(ours != theirs)
    return n if at == len(ours) else int(np.searchsorted(a.offsets - a.offsets[0], at, side="right")) - 1


def _first(differs: NDArray[np.bool_]) -> int:
    return int(differs.argmax()) if differs.any() else len(differs)


class _Cursor:
    """The frames of a recording, taken as many at a time as two recordings have ready."""

    def __init__(self, blocks: Iterator[FrameBlock]) -> None:
        self._blocks = blocks
        self._block: FrameBlock | None = None

    def ready(self) -> int:
        """Frames that can be looked at now; 0 at the end."""
        while self._block is None or len(self._block) == 0:
            self._block = next(self._blocks, None)
            if self._block is None:
                return 0
        return len(self._block)

    def peek(self, n: int) -> FrameBlock:
        assert self._block is not None
        return self._block.slice(0, n)

    def skip(self, n: int) -> None:
        assert self._block is not None
        self._block = self._block.slice(n, len(self._block))

    def next_frames(self, n: int) -> list[Seen]:
        found: list[Seen] = []
        while len(found) < n and self.ready():
            found.append(_seen(self.peek(1), 0))
            self.skip(1)
        return found
