"""Time travel: what the books were at any instant of a recording, as the replay would have had them.

``Travel`` goes to the last keyframe at or before an instant (``keyframes``; made in one pass where they are missing), reads the
row group in which the instant lies, and takes the few frames between through an engine that never trades. Every frame stamped
at or before the instant counts, those of the same nanosecond too. Time is engine time: the session's wall anchor plus its
monotonic stamps, as everywhere in arbl2.
"""

from __future__ import annotations

import bisect
import logging
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from arbl2 import kernels
from arbl2.aggregator import Level, LevelFrom, SourceStatus
from arbl2.book import QUOTES, ladder, window
from arbl2.config import RunConfig
from arbl2.decoding import fitting
from arbl2.engine import Engine
from arbl2.errors import ConfigError, TapeError
from arbl2.tape import RECORDING, TapeReader
from arbl2.updates import HOME_LEVELS, MAX_BLOCK, UpdateBlock, What
from arbl2_replay.keyframes import FOLDER, DamagedError, Shelf, chain, mark, put, segment_body
from arbl2_replay.moments import Kind, Moment, utc
from arbl2_replay.reading import read_ahead
from arbl2_replay.warm import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from arbl2.aggregator import MultiExchangeL2Snapshot
    from arbl2.frames import FrameBlock
    from arbl2.providers import Instrument
    from arbl2_replay.keyframes import Group, SegmentKeys
T = TypeVar("T")

_LOG = logging.getLogger("arbl2.travel")
_GROUPS_KEPT = 2
_FIRST_LOOK = 64
"""Frames that are looked at first for the next change of a book; ever more after that."""
_OF_ANY_BOOK = np.array([What.CLOSED, What.LOST, What.ASKED, What.SNAPSHOT], np.uint8)


@dataclass(frozen=True, slots=True)
class BookAt:
    """One book at an instant: prices in 10^-8 of ``quote``, sizes in 10^-8 of ``base``, best first.

    ``bids`` and ``asks`` are (price, size) of the window that can be traded. ``age_ns`` is None where no book has come yet;
    ``update_id`` and ``exchange_ms`` are what the venue said with the last one, 0 if it says none. ``is_full``: built from depth
    changes, so that more levels are known than the window shows.
    """

    instrument: Instrument
    status: SourceStatus
    age_ns: int | None
    update_id: int
    exchange_ms: int
    is_full: bool
    bids: tuple[tuple[int, int], ...]
    asks: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a symbol or instrument at an instant. ``fx`` and edges (basis points) only for a pair of both venues."""

    name: str
    books: tuple[BookAt, ...]
    fx: BookAt | None
    sell_upbit_bps: float | None
    buy_upbit_bps: float | None


class Why(StrEnum):
    """Why an answer ends."""

    FRAME = "frame"  # the next one changes a book
    STALE = "stale"  # a book grows too old
    END = "end"  # of the tape


@dataclass(frozen=True, slots=True)
class Validity:
    """``time_ns`` is the last instant of which an answer is true (apart from ages), ``instrument`` what changes then.

    ``seq``: the frame that changes it, 0 if it is none.
    """

    time_ns: int
    why: Why
    instrument: str = ""
    seq: int = 0


class Instant:
    """The books right after frame ``seq``, seen at ``time_ns``. It stays what it is when its ``Travel`` goes elsewhere."""

    def __init__(self, travel: Travel, time_ns: int, seq: int, group: int, row: int) -> None:
        self._travel = travel
        self.time_ns = time_ns
        self.seq = seq
        self._place = (group, row)

    def snapshot(self, symbol: str) -> MultiExchangeL2Snapshot:
        """Both venues of a coin that is on both, as the aggregator has them. Raises ConfigError for another one."""
        return self._engine(self._travel.books_of(symbol)).aggregator.snapshot(symbol, self.time_ns)

    def full_book(self, instrument: str) -> tuple[tuple[Level, ...], tuple[Level, ...]]:
        """Every known level (bids, asks) of one market, best first, and how it is known. Raises ConfigError."""
        number = self._travel.instrument(instrument)
        state = self._engine((number,)).state
        sides = []
        for side in (0, 1):
            if state.books[number]["windowed"] or not state.books[number]["rungs"].any():
                sides.append(tuple(Level(*level, LevelFrom.WINDOW) for level in _levels(*window(state, number, side))))
            else:
                px, qty, origin = (a.tolist() for a in ladder(state, number, side))
                sides.append(tuple(Level(p, q, LevelFrom(o)) for p, q, o in zip(px, qty, origin, strict=True)))
        return sides[0], sides[1]

    def book(self, instrument: str) -> BookAt:
        """One market by the venue's name for it. Raises ConfigError for one that is not on the tape."""
        number = self._travel.instrument(instrument)
        return self._book(self._engine((number,)), number)

    def view(self, name: str) -> View:
        """A coin (its KRW and USDT markets, or the one there is), or a market by the venue's name. Raises ConfigError."""
        numbers = self._travel.books_of(name)
        engine = self._engine(numbers)
        universe = engine.universe
        symbol = name.upper()
        books = tuple(self._book(engine, number) for number in numbers[:2])
        if symbol not in universe.symbols:
            return View(symbol, books, None, None, None)
        snapshot = self.snapshot(symbol)
        fx = self._book(engine, universe.fx_book) if universe.fx_book >= 0 else None
        return View(symbol, books, fx, snapshot.sell_upbit_bps, snapshot.buy_upbit_bps)

    def valid_through(self, name: str) -> Validity:
        """How long ``view(name)`` stays what it is: the last instant of that. Raises ConfigError for what is not on the tape."""
        return self._travel.validity(self._place, self.time_ns, self._travel.books_of(name))

    def _engine(self, books: tuple[int, ...]) -> Engine:
        return self._travel.engine_at(self._place, books)

    def _book(self, engine: Engine, number: int) -> BookAt:
        state = engine.state
        row = state.books[number]
        bids, asks = (_levels(*window(state, number, side)) for side in (0, 1))
        return BookAt(
            instrument=engine.universe.instruments[number],
            status=engine.aggregator.status(number, self.time_ns, stale_ns=self._travel.stale_ns(number)),
            age_ns=self.time_ns - int(row["last_ns"]) if row["updates"] else None,
            update_id=int(row["update_id"]),
            exchange_ms=int(row["exchange_ms"]),
            is_full=bool(not row["windowed"] and row["rungs"].any()),
            bids=bids,
            asks=asks,
        )


def _levels(px: NDArray[np.int64], qty: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(px.tolist(), qty.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A row group in memory, and the engine time of each of its frames."""

    block: FrameBlock
    times: NDArray[np.int64]


class Travel:
    """A recording, here or at a URL, that can be asked for any instant. Missing keyframes are made first (one pass).

    They are kept in the session's folder; in ``cache`` if the session is at a URL or its folder cannot be written; in memory if
    that cannot be either. ``on_progress`` gets (frames done, frames to do) while they are made. Of a session that is being
    recorded the sealed part is read. Raises TapeError, ConfigError.
    """

    def __init__(
        self,
        session: Path | str,
        config: RunConfig | None = None,
        *,
        cache: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._reader = TapeReader(session)
        self._config = config or RunConfig()
        manifest = self._reader.manifest
        if not manifest.rows:
            raise TapeError(f"{session} holds no sealed frames{' yet' if self.is_growing else ''}, so there is no book to show.")
        warm_up()
        self._engine = self._new_engine()
        self._warm_face()
        depth = self._config.aggregator.binance_depth
        self._keys = chain(manifest, depth)
        local = self._reader.place.local
        folders = [local / FOLDER / depth] if local is not None else []
        folders += [cache / f"{manifest.session}-{manifest.segments[0].sha256[:12]}-{depth}"] if cache is not None else []
        self._shelf = Shelf(folders)
        self._here: tuple[int, int] | None = None
        self._right: tuple[int, ...] = ()
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()
        self._ahead = UpdateBlock()
        self.index: list[SegmentKeys] = []
        self._index(on_progress)

    # ------------------------------------------------------------------------------------------------------ where to go

    @property
    def session(self) -> str:
        """Name of the session."""
        return self._reader.manifest.session

    @property
    def is_growing(self) -> bool:
        """True while it is being recorded, or where its recorder was killed: only its sealed part is known."""
        return self._reader.manifest.state == RECORDING

    @property
    def first_ns(self) -> int:
        """Engine time of the first frame."""
        return int(self._first_ns[0])

    @property
    def last_ns(self) -> int:
        """Engine time of the last frame."""
        return self._groups[-1][1].last_ns

    def at(self, time_ns: int) -> Instant:
        """The instant, with every frame stamped at or before it. Raises TapeError outside of the tape."""
        if not self.first_ns <= time_ns <= self.last_ns:
            raise TapeError(f"{self.session} holds nothing at {utc(time_ns)}: {self._range()}")
        group = int(np.searchsorted(self._first_ns, time_ns, side="right")) - 1
        loaded = self._load(group)
        row = int(np.searchsorted(loaded.times, time_ns, side="right"))
        return Instant(self, time_ns, int(loaded.block.seq[row - 1]), group, row)

    def at_seq(self, seq: int) -> Instant:
        """The instant right after frame ``seq``, or the last one before it where the tape lacks it. Raises TapeError."""
        first, last = self._groups[0][1].first_seq, self._reader.manifest.segments[-1].last_seq
        if not first <= seq <= last:
            raise TapeError(f"{self.session} has no frame {seq:,}: its frames are {first:,} to {last:,}.")
        group = int(np.searchsorted(self._first_seq, seq, side="right")) - 1
        loaded = self._load(group)
        row = int(np.searchsorted(loaded.block.seq, seq, side="right"))
        return Instant(self, int(loaded.times[row - 1]), int(loaded.block.seq[row - 1]), group, row)

    def find(self, moment: Moment) -> Instant:
        """The instant that is meant. Raises TapeError outside of the tape."""
        match moment.kind:
            case Kind.SEQ:
                return self.at_seq(moment.value)
            case Kind.END:
                return self.at(self.last_ns)
            case Kind.SINCE:
                return self.at(self.first_ns + moment.value)
            case Kind.NS:
                return self.at(moment.value)

    def _range(self) -> str:
        what = "what is sealed of it so far goes" if self.is_growing else "it goes"
        seconds = (self.last_ns - self.first_ns) / 1e9
        return f"{what} from {utc(self.first_ns)} to {utc(self.last_ns)}, or from +0s to +{seconds:.9f}s."

    # ---------------------------------------------------------------------------------------------------- what there is

    def instrument(self, name: str) -> int:
        """Number of a market's book by the venue's name for it. Raises ConfigError."""
        for number, instrument in enumerate(self._engine.universe.instruments):
            if instrument.name == name.upper():
                return number
        raise ConfigError(f"{name} is not on this tape. {self._offer()}")

    def books_of(self, name: str) -> tuple[int, ...]:
        """The books that an answer about a coin or market is made of: for a pair Upbit's, Binance's and the KRW-USDT book."""
        universe = self._engine.universe
        wanted = name.upper()
        if wanted in universe.symbols:
            k = universe.symbols.index(wanted)
            fx = [universe.fx_book] if universe.fx_book >= 0 else []
            return (universe.upbit_books[k], universe.binance_books[k], *fx)
        for number, instrument in enumerate(universe.instruments):
            if instrument.name == wanted or (instrument.base == wanted and instrument.quote == QUOTES[instrument.venue]):
                return (number,)
        raise ConfigError(f"{name} is not on this tape. {self._offer()}")

    def _offer(self) -> str:
        universe = self._engine.universe
        markets = ", ".join(instrument.name for instrument in universe.instruments) or "no market at all"
        return f"It has {', '.join(universe.symbols) or 'no coin'} on both venues; its markets are {markets}."

    def stale_ns(self, number: int) -> int:
        """How old a book may be to count as ACTIVE."""
        config = self._engine.state.config[0]
        return int(config["fx_stale_ns" if number == self._engine.universe.fx_book else "stale_ns"])

    # ------------------------------------------------------------------------------------------------------ going there

    def engine_at(self, place: tuple[int, int], books: tuple[int, ...]) -> Engine:
        """The engine with ``books`` as they are before frame ``place[1]`` of row group ``place[0]``; other books may be wrong."""
        right = set(books) <= set(self._right)
        if self._here == place and right:
            return self._engine
        group, row = place
        start, segment, number = self._stops[bisect.bisect_right(self._stops, place, key=lambda stop: stop[0]) - 1]
        if self._here is None or not right or not start <= self._here <= place:
            self._here, self._right = None, books
            put(self._engine.state, self._state_at(segment, number))
            self._here = start
        at_group, at_row = self._here
        self._here = None
        while at_group < group:
            block = self._load(at_group).block
            self._engine.feed(block.slice(at_row, len(block)), self._decode)
            at_group, at_row = at_group + 1, 0
        self._engine.feed(self._load(group).block.slice(at_row, row), self._decode)
        self._here = place
        return self._engine

    def _state_at(self, segment: int, number: int) -> dict[str, NDArray[Any]]:
        try:
            return self.index[segment].load(number, self._engine.state, self._right)
        except DamagedError as damage:
            _LOG.warning("%s", damage)
            self._shelf.drop(self._stem(segment))
            self._index(None)
            return self.index[segment].load(number, self._engine.state, self._right)

    def _decode(self, block: FrameBlock, u: UpdateBlock) -> int:
        """Only what the books at hand depend on: the changes of many full books cost more than all the rest."""
        n = self._engine.decode(block, u)
        u.what[:n][~self._concerned(u, n, self._right)] = What.NOTHING
        return n

    def _load(self, group: int) -> _Loaded:
        if group in self._loaded:
            self._loaded.move_to_end(group)
            return self._loaded[group]
        segment, known = self._groups[group]
        block = self._reader.group(segment, known.number)
        if (len(block), int(block.seq[0])) != (known.rows, known.first_seq):
            raise TapeError(f"{self.session} holds other frames than when its keyframes were made. Restore it from a copy.")
        before_ns = self._groups[group - 1][1].last_ns if group else 0
        self._loaded[group] = _Loaded(block, np.maximum.accumulate(np.maximum(block.time_ns, before_ns)))
        while len(self._loaded) > _GROUPS_KEPT:
            self._loaded.popitem(last=False)
        return self._loaded[group]

    # ------------------------------------------------------------------------------------------------ how long it holds

    def validity(self, place: tuple[int, int], time_ns: int, books: tuple[int, ...]) -> Validity:
        """How long an answer that is made of ``books`` holds."""
        engine = self.engine_at(place, books)
        state = engine.state
        limits = [
            (int(state.books[number]["last_ns"]) + self.stale_ns(number), number)
            for number in books
            if engine.aggregator.status(number, time_ns, stale_ns=self.stale_ns(number)) is SourceStatus.ACTIVE
        ]
        horizon_ns, stale = min(limits, default=(self.last_ns, -1))
        marks = {number: mark(state, number) for number in books}
        group, row = place
        while group < len(self._groups) and self._groups[group][1].first_ns <= horizon_ns:
            changed = self._next_change((group, row), horizon_ns, marks)
            if changed is not None:
                row, number = changed
                loaded = self._load(group)
                until_ns = max(int(loaded.times[row]) - 1, time_ns)
                return Validity(until_ns, Why.FRAME, engine.universe.instruments[number].name, int(loaded.block.seq[row]))
            group, row = self._next_group(group, marks), 0
        if stale < 0 or horizon_ns >= self.last_ns:
            return Validity(self.last_ns, Why.END)
        return Validity(horizon_ns, Why.STALE, engine.universe.instruments[stale].name)

    def _next_group(self, group: int, marks: dict[int, int]) -> int:
        """The next row group in which one of the books changes; the last one tells that only when it is read."""
        last = len(self._groups) - 1
        for later in range(group + 1, last):
            after = self._groups[later + 1][1].marks
            if any(after[number] != before for number, before in marks.items()):
                return later
        return max(last, group + 1)

    def _next_change(self, place: tuple[int, int], horizon_ns: int, marks: dict[int, int]) -> tuple[int, int] | None:
        """Row and book of the first change in a row group by ``horizon_ns``; None if there is none.

        Only frames that concern the books go through the engine, which is nowhere afterwards.
        """
        group, row = place
        loaded = self._load(group)
        block, stop = loaded.block, int(np.searchsorted(loaded.times, horizon_ns, side="right"))
        if row >= stop:
            return None
        books = tuple(marks)
        engine = self.engine_at(place, books)
        self._here = None
        most = _FIRST_LOOK
        while row < stop:
            n = min(fitting(block, row) - row, stop - row, most)
            u = self._ahead
            u.cursor[0] = HOME_LEVELS
            # checksums wrap on purpose, which NumPy reports when the kernels run uncompiled
            with np.errstate(over="ignore"):
                concerned = self._concerned(u, engine.decode(block.slice(row, row + n), u), books)
            for at in np.flatnonzero(concerned).tolist():
                engine.feed(block.slice(row + at, row + at + 1), self._decode)
                for number, before in marks.items():
                    if mark(engine.state, number) != before:
                        return row + at, number
            row, most = row + n, min(2 * most, MAX_BLOCK)
        return None

    def _concerned(self, u: UpdateBlock, n: int, books: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which rows may change one of the books. A snapshot may be of any."""
        mine = np.zeros(len(self._engine.state.books) + 1, np.bool_)
        mine[list(books)] = True
        # book -1 is the last one of the table
        concerned: NDArray[np.bool_] = (mine[u.book[:n]] & (u.what[:n] != What.NOTHING)) | np.isin(u.what[:n], _OF_ANY_BOOK)
        return concerned

    # -------------------------------------------------------------------------------------------------------- keyframes

    def _index(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Find the keyframes of every segment and make those that are missing."""
        segments = self._reader.manifest.segments
        found = [self._shelf.find(self._stem(k), key) for k, key in enumerate(self._keys)]
        missing = [k for k, keys in enumerate(found) if keys is None]
        todo, done = sum(segments[k].rows for k in missing), 0

        def count(frames: int) -> None:
            nonlocal done
            done += frames
            if on_progress is not None:
                on_progress(done, todo)

        engine, stands_at = self._new_engine(), 0
        for k in missing:
            before = found[k - 1] if k else None
            if stands_at != k and before is not None:
                engine = self._at_end_of(k - 1, before)
            blocks = read_ahead(self._reader.groups(k))
            body = segment_body(self._keys[k], blocks, engine, (segments[k].bytes, segments[k].rows), count)
            found[k], stands_at = self._shelf.keep(self._stem(k), self._keys[k], body), k + 1
        self.index = [keys for keys in found if keys is not None]
        self._groups: list[tuple[int, Group]] = [(k, group) for k, keys in enumerate(self.index) for group in keys.groups]
        self._first_ns = np.array([group.first_ns for _, group in self._groups], np.int64)
        self._first_seq = np.array([group.first_seq for _, group in self._groups], np.int64)
        at = {(k, group.number): number for number, (k, group) in enumerate(self._groups)}
        self._stops = [
            ((at[k, group], row), k, number)
            for k, keys in enumerate(self.index)
            for number, (group, row) in enumerate(keys.stops)
        ]

    def _at_end_of(self, segment: int, keys: SegmentKeys) -> Engine:
        """An engine that has taken a segment of which there are keyframes."""
        engine = self._new_engine()
        group, row = keys.stops[-1]
        try:
            put(engine.state, keys.load(len(keys.stops) - 1, engine.state, range(len(engine.state.books))))
        except DamagedError:
            self._shelf.drop(self._stem(segment))
            raise
        for known in keys.groups:
            if known.number >= group:
                block = self._reader.group(segment, known.number)
                engine.feed(block.slice(row if known.number == group else 0, len(block)))
        return engine

    def _new_engine(self) -> Engine:
        engine = Engine(self._reader.manifest.instruments, self._config)
        # No edge reaches a threshold that is no number.
        engine.state.pairs["entry_bps"] = engine.state.pairs["exit_bps"] = np.nan
        return engine

    def _warm_face(self) -> None:
        """Load what a replay never calls, so that the first query does not wait for it."""
        kernels.is_active(self._engine.state.records, 0, 0, 0)
        for symbol in self._engine.universe.symbols[:1]:
            self._engine.aggregator.snapshot(symbol, 0)

    def _stem(self, segment: int) -> str:
        return self._reader.manifest.segments[segment].file.removesuffix(".parquet")
