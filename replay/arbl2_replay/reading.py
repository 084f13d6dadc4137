"""Opening recordings for a replay: one or several sessions, whole or in part, from their decoded stores or from the raw bytes.

What is read is settled before anything is: which row groups, from which files, and that these are what they were when they were
sealed. ``Reading.batches`` then yields frames in the one order of the run, each block with what decodes it, read ahead in another
thread. Memory is bounded by two blocks, and where sessions overlap by one more of each of these.

Sessions have ranks: the order of their first engine times, then of their names. Frames go by (engine time, rank, ``seq``); those
of rank r have ``SESSION_CONNS`` * r added to their connection and r << ``SESSION_BITS`` to their ``seq``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from arbl2.errors import ConfigError, StorageError, TapeError
from arbl2.frames import VENUES, ExchangeId
from arbl2.kernels import SESSION_CONNS
from arbl2.tape import RECORDING, TapeReader, find_session, session_place, sessions
from arbl2_replay.decode_ahead import decode_ahead
from arbl2_replay.interleave import interleave, only
from arbl2_replay.moments import Kind, Moment
from arbl2_replay.steering import SESSION_BITS
from arbl2_replay.store import SegmentStore, find_store, make_store
from arbl2_replay.store_read import read_slices

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.book import Universe
    from arbl2.engine import Decode
    from arbl2.frames import FrameBlock
    from arbl2.tape import GroupSpan, Manifest

    Batch = tuple[FrameBlock, Decode | None]

_LOG = logging.getLogger("arbl2.replay")
_MOST_SESSIONS = 2**31 // SESSION_CONNS
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """What is wanted of the tapes: frames from the first at or after ``start_ns`` to the last before the first at ``stop_ns``.

    Both are engine times, None: everything. With ``venues``, frames of other venues are left out (those of none stay).
    """

    start_ns: int | None = None
    stop_ns: int | None = None
    venues: tuple[str, ...] = ()

    @property
    def is_all(self) -> bool:
        """Nothing is left out."""
        return self == Part()

    @property
    def codes(self) -> NDArray[np.bool_]:
        """By venue code, whether its frames are wanted."""
        return np.array([not self.venues or name in ("", *self.venues) for name in VENUES])


@dataclass(slots=True)
class Counts:
    """What a reading has touched so far: row groups of raw segments and of stores, and those that were left out unread."""

    groups_read: int = 0
    groups_left_out: int = 0
    raw_segments: int = 0
    decoded_segments: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Source:
    """What to read of one segment: row groups of the raw file (None: all), or slices of its store."""

    number: int
    rows: int
    groups: tuple[int, ...] | None = None
    store: SegmentStore | None = None


@dataclass(slots=True)
class Session:
    """One recording of a reading, and its rank among them."""

    reader: TapeReader
    rank: int = 0
    first_ns: int = 0
    last_ns: int = 0
    sources: list[_Source] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest:
        """What it says of itself."""
        return self.reader.manifest

    @property
    def place(self) -> str:
        """Where it lies: what can be typed to name it again."""
        place = self.reader.place
        return str(place.local.absolute() if place.local is not None else place)


class Reading:
    """Recordings that are open, in the order of their ranks. ``total``: frames that will come, at most."""

    def __init__(self, sessions: Sequence[Session], part: Part) -> None:
        self.sessions = tuple(sessions)
        self.part = part
        self.counts = Counts()
        self.total = sum(source.rows for session in sessions for source in session.sources)

    @property
    def instruments(self) -> dict[str, list[str]]:
        """Instruments of all sessions by venue, those of the venues that are wanted."""
        found: dict[str, set[str]] = {}
        for session in self.sessions:
            for venue, names in session.manifest.instruments.items():
                if not self.part.venues or venue in self.part.venues:
                    found.setdefault(venue, set()).update(names)
        return {venue: sorted(names) for venue, names in sorted(found.items())}

    @property
    def name(self) -> str:
        """The session, or the first of them and how many more."""
        more = len(self.sessions) - 1
        return self.sessions[0].manifest.session + (f"+{more}" if more else "")

    @property
    def identity(self) -> list[Any]:
        """What a checkpoint must be of to be gone on from: every segment, and the part that is read."""
        segments = [[s.file, s.rows, s.sha256] for session in self.sessions for s in session.manifest.segments]
        return segments if self.part.is_all else [*segments, [self.part.start_ns, self.part.stop_ns, list(self.part.venues)]]

    def batches(self, universe: Universe, skip: int = 0, *, decoded_ahead: bool = False) -> Generator[Batch]:
        """The frames after the first ``skip``, block by block, each with what decodes it (None: the engine). Raises TapeError.

        With ``decoded_ahead``, raw blocks are decoded in other threads before they are asked for, each in parts that an engine
        takes at once.
        """
        with closing(self._batches(universe, skip)) as batches, closing(read_ahead(batches)) as ahead:
            if not decoded_ahead:
                yield from ahead
                return
            with closing(decode_ahead(ahead, universe)) as decoded:
                yield from decoded

    def _batches(self, universe: Universe, skip: int) -> Generator[Batch]:
        left = _Left(skip)
        for cluster in _clusters(self.sessions):
            if len(cluster) == 1:
                yield from left.out(self._session(cluster[0], universe, left))
            else:
                frames = [(block for block, _ in self._session(session, universe, _Left(0))) for session in cluster]
                yield from left.out((block, None) for block in interleave(frames))

    def _session(self, session: Session, universe: Universe, left: _Left) -> Iterator[Batch]:
        trim = _Trim(self.part)
        for source in session.sources:
            if source.store is not None:
                found = self._slices(session, source, universe, trim, left)
            else:
                found = self._raw(session, source, trim, left)
            for block, decode in found:
                if len(block):
                    yield block, decode
                if trim.is_over:
                    return

    def _raw(self, session: Session, source: _Source, trim: _Trim, left: _Left) -> Iterator[Batch]:
        if self.part.is_all and left.skips(source.rows):
            return
        self.counts.raw_segments += 1
        keep = self.part.codes
        for _, block in session.reader.groups(source.number, source.groups):
            self.counts.groups_read += 1
            part = block.slice(*trim.rows(block))
            yield _ranked(only(part, keep[part.venue]) if self.part.venues else part, session.rank), None

    def _slices(self, session: Session, source: _Source, universe: Universe, trim: _Trim, left: _Left) -> Iterator[Batch]:
        assert source.store is not None
        self.counts.decoded_segments += 1
        index, keep = source.store.index, self.part.codes
        wanted = deque(source.groups or ())
        while wanted and self.part.is_all and left.skips(index.slices[wanted[0]].rows):
            wanted.popleft()
        books = _books(index.instruments, universe)
        for found in read_slices(source.store.files, index, wanted, session.reader.anchor, books):
            self.counts.groups_read += 1 + found.groups
            self.counts.groups_left_out += len(index.slices[found.number].parts) - found.groups
            first, last = trim.rows(found.frames)
            block, updates = found.frames, found.updates
            if self.part.venues:
                kept = keep[block.venue]
                first, last = (int(np.count_nonzero(kept[:stop])) for stop in (first, last))
                block, updates = only(block, kept), updates.only(kept)
            yield _ranked(block.slice(first, last), session.rank), updates.of_rank(session.rank << SESSION_BITS).decode


class _Left:
    """Frames that are still to be skipped."""

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def skips(self, rows: int) -> bool:
        """Whether all of ``rows`` frames are among them; then these are done with."""
        if rows > self._frames:
            return False
        self._frames -= rows
        return True

    def out(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The frames after them."""
        for block, decode in batches:
            drop = min(self._frames, len(block))
            self._frames -= drop
            if drop < len(block):
                yield block.slice(drop, len(block)), decode


class _Trim:
    """Cuts the frames of one session, given in their order, to the time that is wanted."""

    def __init__(self, part: Part) -> None:
        self._start_ns, self._stop_ns = part.start_ns, part.stop_ns
        self.is_over = False

    def rows(self, block: FrameBlock) -> tuple[int, int]:
        """First row that is wanted and the one after the last."""
        first, last = 0, len(block)
        if self._start_ns is not None:
            late = block.time_ns >= self._start_ns
            first = int(late.argmax()) if late.any() else last
            if first < last:
                self._start_ns = None
        if self._stop_ns is not None:
            beyond = block.time_ns >= self._stop_ns
            if beyond.any():
                self.is_over, last = True, int(beyond.argmax())
        return min(first, last), last


def read_ahead(batches: Iterator[T]) -> Generator[T]:
    """The same, with the next one read and unpacked while the caller works on the current one."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="arbl2-read") as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch


def _ranked(block: FrameBlock, rank: int) -> FrameBlock:
    if not rank or not len(block):
        return block
    if int(block.conn.max()) >= SESSION_CONNS or int(block.seq[-1]) >> SESSION_BITS:
        raise TapeError("a recording has more connections or frames than can be told apart in a run of several. Replay it alone.")
    return dataclasses.replace(block, seq=block.seq + (rank << SESSION_BITS), conn=block.conn + np.int32(rank * SESSION_CONNS))


def _books(names: Sequence[str], universe: Universe) -> NDArray[np.int32]:
    """By book of a tape the book of the run, -1 if it is not in it; one more -1 stands for no book."""
    known = {f"{i.venue}:{i.name}": k for k, i in enumerate(universe.instruments)}
    return np.array([*(known.get(name, -1) for name in names), -1], np.int32)


def find_sessions(names: Sequence[str], root: str, *, every: bool) -> list[Path | str]:
    """The sessions that are meant: those named, of a folder the newest or ``every`` one; below ``root`` without names.

    Raises TapeError if there is none.
    """
    if not every:
        return [find_session(name, root) for name in names] if names else [find_session(None, root)]
    found: list[Path | str] = []
    for name in names or [root]:
        below = find_session(name, root)
        found += [below] if str(below) == str(session_place(name)) else sessions(name)
    return found


def open_reading(
    tapes: Sequence[Path | str],
    *,
    start: Moment | str | int | None = None,
    stop: Moment | str | int | None = None,
    venues: Sequence[str] = (),
    decoded: bool | None = None,
    check_hashes: bool = True,
) -> Reading:
    """Open session folders, here or at URLs, and hold them to their manifests.

    ``start`` and ``stop`` are engine times (ns since the epoch), or what ``Moment.parse`` reads; ``+90s`` counts from the first
    frame. ``decoded``: None uses decoded stores where they are, True makes those that are missing, False reads raw bytes. Where
    sessions overlap, raw bytes are read. Raises ConfigError, TapeError.
    """
    start, stop = (Moment.parse(moment) if isinstance(moment, str) else moment for moment in (start, stop))
    sessions = _opened(tapes)
    since = any(isinstance(moment, Moment) and moment.kind is Kind.SINCE for moment in (start, stop))
    _rank(sessions, needs_times=len(sessions) > 1 or since)
    first_ns = sessions[0].first_ns
    part = Part(
        start_ns=_instant_ns(start, first_ns, "--from"),
        stop_ns=_instant_ns(stop, first_ns, "--to"),
        venues=_venues(venues, sessions),
    )
    if part.start_ns is not None and part.stop_ns is not None and part.start_ns >= part.stop_ns:
        raise ConfigError("--to is not after --from, so there is nothing between them. Choose other moments.")
    planner = _Planner(part, decoded, check_hashes=check_hashes)
    for cluster in _clusters(sessions):
        for session in cluster:
            session.sources = planner.sources(session.reader, may_be_decoded=len(cluster) == 1)
    reading = Reading(sessions, part)
    reading.counts.groups_left_out = planner.left_out
    return reading


def _opened(tapes: Sequence[Path | str]) -> list[Session]:
    if not tapes:
        raise ConfigError("no recording was named. Name one or several.")
    if len(tapes) >= _MOST_SESSIONS:
        raise ConfigError(f"{len(tapes):,} recordings are too many for one run. Replay fewer at a time.")
    sessions: dict[str, Session] = {}
    for tape in tapes:
        reader = TapeReader(tape)
        name = reader.manifest.session
        if reader.manifest.state == RECORDING:
            mend = "ship it again" if reader.place.local is None else f"run `arbl2 recover {reader.place.local.parent}`"
            raise TapeError(f"{reader.place} is being recorded, or its recorder was killed. Stop it, or {mend}.")
        if name in sessions:
            raise ConfigError(f"{reader.place} and {sessions[name].place} are both the recording {name}. Name each once.")
        sessions[name] = Session(reader)
    found = [session for session in sessions.values() if session.manifest.segments]
    return found or list(sessions.values())[:1]


def _rank(sessions: list[Session], *, needs_times: bool) -> None:
    """Put sessions in the order of their ranks."""
    for session in sessions if needs_times else ():
        if session.manifest.segments:
            session.first_ns, session.last_ns = _span(session.reader)
    sessions.sort(key=lambda session: (session.first_ns, session.manifest.session))
    for rank, session in enumerate(sessions):
        session.rank = rank


def _span(reader: TapeReader) -> tuple[int, int]:
    """Engine time of the first frame, and the latest there is."""
    first = next(block for _, block in reader.groups(0))
    latest = max(group.last_mono_ns for number in range(len(reader.manifest.segments)) for group in reader.group_spans(number))
    return int(first.time_ns[0]), reader.anchor.time_ns(latest)


def _clusters(sessions: Sequence[Session]) -> list[list[Session]]:
    """Sessions that overlap, together; in the order of their ranks."""
    clusters: list[list[Session]] = []
    latest_ns = 0
    for session in sessions:
        if clusters and session.first_ns < latest_ns:
            clusters[-1].append(session)
        else:
            clusters.append([session])
        latest_ns = max(latest_ns, session.last_ns)
    return clusters


def _instant_ns(moment: Moment | int | None, first_ns: int, option: str) -> int | None:
    if moment is None or isinstance(moment, int):
        return moment
    if moment.kind is Kind.SINCE:
        return first_ns + moment.value
    if moment.kind is Kind.NS:
        return moment.value
    raise ConfigError(f"{option} takes a time: 2026-01-02T03:04:05, or +90s from the first frame.")


def _venues(venues: Sequence[str], sessions: Sequence[Session]) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(venue.lower() for venue in venues))
    there = {venue for session in sessions for venue, names in session.manifest.instruments.items() if names}
    for venue in wanted:
        if venue not in there:
            known = ", ".join(name for name in ExchangeId if name in there) or "no instrument at all"
            raise ConfigError(f"{venue} is not a venue of what was recorded. There is {known}.")
    return wanted


class _Planner:
    """Settles what is read of each segment, and holds it to its manifest."""

    def __init__(self, part: Part, decoded: bool | None, *, check_hashes: bool) -> None:
        self._part = part
        self._decoded = decoded
        self._check_hashes = check_hashes
        self._has_said = False
        self.left_out = 0

    def sources(self, reader: TapeReader, *, may_be_decoded: bool) -> list[_Source]:
        """What to read of a session. Raises TapeError where a segment that is wanted is not what its manifest says."""
        choice = _Choice(self._part, reader)
        found = []
        for number, segment in enumerate(reader.manifest.segments):
            groups = [] if self._part.is_all else reader.group_spans(number)
            if groups and not choice.is_any_of(groups):
                self.left_out += len(groups)
                continue
            store = self._store(reader, number) if may_be_decoded and self._decoded is not False else None
            if store is None and self._check_hashes:
                _verify(reader, number)
            if store is not None:
                found.append(self._chosen(choice, number, store.groups, store))
            elif groups:
                found.append(self._chosen(choice, number, groups, None))
            else:
                found.append(_Source(number, segment.rows))
        return found

    def _chosen(self, choice: _Choice, number: int, groups: list[GroupSpan], store: SegmentStore | None) -> _Source:
        wanted = []
        for group in groups:
            if choice.wants(group):
                wanted.append(group)
            else:
                self.left_out += 1 if store is None else 1 + len(store.index.slices[group.number].parts)
        return _Source(number, sum(group.rows for group in wanted), tuple(group.number for group in wanted), store)

    def _store(self, reader: TapeReader, number: int) -> SegmentStore | None:
        store = find_store(reader, number, check_segment=self._check_hashes)
        if store is not None or not self._decoded:
            return store
        try:
            return make_store(reader, number)
        except (StorageError, ConfigError) as error:
            if not self._has_said:
                self._has_said = True
                _LOG.warning("replaying raw bytes: %s", error)
            return None


class _Choice:
    """Chooses row groups of one session, in their order."""

    def __init__(self, part: Part, reader: TapeReader) -> None:
        self._part = part
        self._anchor = reader.anchor
        self._has_begun = part.start_ns is None
        self.is_over = False

    def is_any_of(self, groups: list[GroupSpan]) -> bool:
        """Whether one of a segment's groups is wanted. If none is, they are done with."""
        ahead = copy.copy(self)
        if any([ahead.wants(group) for group in groups]):  # noqa: C419 - each of them moves it on
            return True
        self._has_begun, self.is_over = ahead._has_begun, ahead.is_over
        return False

    def wants(self, group: GroupSpan) -> bool:
        """Whether the group may hold a frame that is wanted, or the frame at which that begins or ends."""
        if self.is_over:
            return False
        first_ns, last_ns = (self._anchor.time_ns(mono_ns) for mono_ns in (group.first_mono_ns, group.last_mono_ns))
        part = self._part
        begins = not self._has_begun
        if begins and last_ns < (part.start_ns or 0):
            return False
        self._has_begun = True
        if part.stop_ns is not None and last_ns >= part.stop_ns:
            self.is_over = True
            return begins or first_ns < part.stop_ns
        return begins or any(part.codes[code] for code in group.venues)


def _verify(reader: TapeReader, number: int) -> None:
    part = copy.copy(reader)
    part.manifest = msgspec.structs.replace(reader.manifest, segments=[reader.manifest.segments[number]])
    part.verify_hashes()


def tape_sha256(manifest: Manifest) -> str:
    """One hash over the segment hashes of a tape."""
    return hashlib.sha256("".join(segment.sha256 for segment in manifest.segments).encode()).hexdigest()


def tape_summary(reading: Reading) -> dict[str, Any]:
    """The recordings of a run for its ``run.json``: one, or the list of them with one name and hash for all."""
    tapes = [
        {
            "session": session.manifest.session,
            "sha256": tape_sha256(session.manifest),
            "state": session.manifest.state,
            "place": session.place,
            "instruments": session.manifest.instruments,
        }
        for session in reading.sessions
    ]
    if len(tapes) == 1:
        return tapes[0]
    sha256 = hashlib.sha256("".join(str(tape["sha256"]) for tape in tapes).encode()).hexdigest()
    return {"session": reading.name, "sha256": sha256, "tapes": tapes}
