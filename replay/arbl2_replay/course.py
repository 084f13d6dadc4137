"""The way of one run over its tape: which frames come next, when, and what is kept so that it can go back or go on later."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from arbl2.engine import Checkpoint
from arbl2.errors import ConfigError, TapeError
from arbl2.frames import BINANCE, UPBIT, FrameKind
from arbl2_replay.checkpoint import Marks, Snapshot
from arbl2_replay.steering import Goal, Pair, Place, Position

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from arbl2.engine import Decode, Engine
    from arbl2.frames import FrameBlock
    from arbl2_replay.clock import Pacer
    from arbl2_replay.kpi import Kpi
    from arbl2_replay.moments import Moment
    from arbl2_replay.sinks import EventLog
    from arbl2_replay.steering import Request, Steering

    Source = Callable[[int], Generator[tuple[FrameBlock, Decode | None]]]
    """Blocks of a tape from so many frames on, each with what decodes it (None: the engine)."""


_LOOK_S = 0.2
_MOST_PAIRS = 8
_DRAIN_ROWS = 1_024
"""Figures and files take many event rows in hardly more time than few."""
_ENDED = "the replay ended on the way."


class Course:
    """Takes a tape through an engine, piece by piece, and keeps what a run needs beside the engine to be resumed.

    ``total`` is the number of frames of the tape, ``block_rows`` caps the frames fed at once (0: a block of the source);
    events go to ``log``, if there is one.
    """

    def __init__(
        self, source: Source, engine: Engine, kpi: Kpi, pacer: Pacer, steering: Steering | None = None, *, total: int
    ) -> None:
        self.total = total
        self.block_rows = 0
        self.log: EventLog | None = None
        self.watchers: list[Callable[[], None]] = []
        """Called after every piece."""
        self.alarms: Counter[str] = Counter()
        self.place = Place()
        self._source = source
        self._engine = engine
        self._kpi = kpi
        self._pacer = pacer
        self._steering = steering
        self._until: Goal | None = None
        self._blocks: Generator[tuple[FrameBlock, Decode | None]] | None = None
        self._rest: FrameBlock | None = None
        self._decode: Decode | None = None
        self._first_ns = 0
        self._last = (0, 0)
        self._paused = steering is not None and steering.starts_paused
        self._steps = 0
        self._target: Goal | None = None
        self._under_way: Request | None = None
        self._ended = False
        self._pairs: tuple[Pair, ...] = ()
        self._looked_s = 0.0
        self._marks = Marks()
        self._no_marks: ConfigError | None = None

    def open(self, until: Moment | None = None, earlier: Snapshot | None = None) -> None:
        """Stand before the first frame, or where a snapshot was taken. Raises TapeError if there are no frames, ConfigError."""
        if earlier is not None:
            self.restore(earlier)
        self._reopen()
        rest = self._ahead()
        if not self.place.frames:
            if rest is None:
                raise TapeError("the tape holds no frames. Was the recorder stopped before anything arrived?")
            self._first_ns = int(rest.time_ns[0])
            self._last = (self._first_ns, 0)
        if until is not None:
            self._until = Goal.of(until, self._first_ns)
            if self._until.is_behind(self.place):
                raise ConfigError("--until is a moment before the checkpoint. Name a later one, or replay from the beginning.")

    @property
    def tape_s(self) -> float:
        """Time of the tape from the first frame to the latest that was taken, seconds."""
        return (self.place.last_ns - self._first_ns) / 1e9 if self.place.frames else 0.0

    @property
    def span_ns(self) -> tuple[int, int]:
        """Engine time of the first frame and the latest that was taken."""
        return self._first_ns, self.place.last_ns

    def close(self) -> None:
        """Stop reading ahead. What is under way is not reached any more."""
        if self._blocks is not None:
            self._blocks.close()
        if self._under_way is not None:
            self._under_way.answer.set_exception(ConfigError(_ENDED))

    def run(self) -> bool:
        """Go until the tape ends (True) or the run is to end before (False)."""
        if self._steering is not None:
            self._mark()
        while True:
            self._obey()
            if self._ended:
                return False
            rest = self._ahead()
            if rest is None:
                self._arrive()
                if not self._paused or self._steering is None:
                    return True
                self._steering.wait()
                continue
            limit = len(rest) if self._until is None else self._until.rows(rest)
            if not limit:
                self._arrive()
                return False
            self._go(rest, limit)

    def _go(self, rest: FrameBlock, limit: int) -> None:
        if self._target is not None:
            count = min(limit, self._target.rows(rest))
            if count:
                self._take(count)
            else:
                self._arrive()
        elif self._steps:
            count = min(limit, self._steps)
            self._take(count)
            self._steps -= count
            if not self._steps:
                self._arrive()
        elif self._paused and self._steering is not None:
            self._report()
            self._steering.wait()
        else:
            self._take(self._pacer.due(rest.time_ns[:limit]))

    def _arrive(self) -> None:
        """The step or seek under way is over: here."""
        if self._under_way is None:
            return
        self._pacer.jump(max(self._last[0], self._target.time_ns if self._target is not None else 0))
        request, self._under_way, self._target, self._steps = self._under_way, None, None, 0
        request.answer.set_result(self._report())

    def _ahead(self) -> FrameBlock | None:
        """The frames that come next, None at the end of the tape."""
        if self._rest is None and self._blocks is not None:
            self._rest, self._decode = next(self._blocks, (None, None))
        return self._rest

    def _reopen(self) -> None:
        if self._blocks is not None:
            self._blocks.close()
        self._blocks, self._rest = self._source(self._engine.frames), None

    def _take(self, count: int) -> None:
        rest = self._rest
        if not count or rest is None:
            return
        piece, self._rest = (rest, None) if count == len(rest) else (rest.slice(0, count), rest.slice(count, len(rest)))
        step = self.block_rows or count
        for start in range(0, count, step):
            self._engine.feed(piece if step >= count else piece.slice(start, min(start + step, count)), self._decode)
        if self._engine.undrained >= _DRAIN_ROWS:
            self.drain()
        if (piece.kind == FrameKind.ALARM).any():
            self.alarms.update(alarms_in(piece))
        self.place = self.place.after(piece)
        self._last = (int(piece.time_ns[-1]), int(piece.seq[-1]))
        if self._steering is not None:
            self._report(moving=True)
            if self._marks.is_due(self.place.frames):
                self._mark()
        for look in self.watchers:
            look()

    def drain(self) -> None:
        """Hand the new events of the engine on."""
        events = self._engine.drain()
        self._kpi.add(events)
        if self.log is not None:
            self.log.write(events)

    def _report(self, *, moving: bool = False) -> Position:
        """Say where the run is. While it moves, edges and positions are looked at a few times a second only."""
        now_s = time.monotonic()
        if not moving or now_s - self._looked_s >= _LOOK_S:
            self._looked_s, self._pairs = (
                now_s,
                tuple(self._pair(symbol) for symbol in self._engine.universe.symbols[:_MOST_PAIRS]),
            )
        position = Position(
            *self._last,
            self.place.frames,
            self.total,
            str(self._pacer.speed),
            self._paused,
            self._pacer.late_ms,
            self._pairs,
        )
        if self._steering is not None:
            self._steering.position = position
        return position

    def _pair(self, symbol: str) -> Pair:
        seen = self._engine.aggregator.snapshot(symbol)
        held = self._engine.state.pairs[self._engine.universe.symbols.index(symbol)]["position_e8"]
        return Pair(symbol, seen.sell_upbit_bps, seen.buy_upbit_bps, int(held[UPBIT]), int(held[BINANCE]))

    def _obey(self) -> None:
        while self._steering is not None and (request := self._steering.next_request()) is not None:
            try:
                self._do(request)
            except ConfigError as error:
                request.answer.set_exception(error)
                continue
            except BaseException:
                request.answer.set_exception(ConfigError(_ENDED))
                raise
            if self._under_way is not request:
                request.answer.set_result(self._report())

    def _do(self, request: Request) -> None:
        match request.name:
            case "pause":
                self._arrive()
                self._paused = True
                self._pacer.hold()
            case "resume":
                self._paused = False
            case "speed":
                self._pacer.speed = request.value
            case "until":
                goal = Goal.of(request.value, self._first_ns)
                if goal.is_behind(self.place):
                    raise ConfigError("that is over already. Seek back first.")
                self._until = goal
            case "stop":
                self._arrive()
                self._ended = True
            case "step":
                self._arrive()
                self._paused = True
                self._pacer.hold()
                self._steps, self._under_way = request.value, request
            case "seek":
                goal = Goal.of(request.value, self._first_ns)
                self._arrive()
                if goal.is_behind(self.place):
                    self._go_back(goal)
                self._target, self._under_way = goal, request

    def _mark(self) -> None:
        """Keep where the run is, to go back to."""
        if self._no_marks is None:
            try:
                self._marks.add(self.place.frames, self.place, self.snapshot().pack())
            except ConfigError as error:
                self._no_marks = error

    def _go_back(self, goal: Goal) -> None:
        if self._no_marks is not None:
            raise self._no_marks
        packed = self._marks.before(lambda place: not goal.is_behind(place))
        if packed is None:
            raise ConfigError("that is before the checkpoint that this run was resumed from. Replay from the beginning.")
        self.restore(Snapshot.unpack(packed))
        self._reopen()

    def snapshot(self) -> Snapshot:
        """The run as it is now. Raises ConfigError for a policy whose memory cannot be kept."""
        self.drain()
        checkpoint = self._engine.checkpoint()
        meta = {
            "engine": checkpoint.meta,
            "policy": type(self._engine.policy).__qualname__,
            "kpi": self._kpi.pack(),
            "alarms": dict(self.alarms),
            "first_ns": self._first_ns,
            "last": self._last,
            "place": {"frames": self.place.frames, "last_ns": self.place.last_ns, "seqs": sorted(self.place.seqs.items())},
            "rows": dict(self.log.rows) if self.log is not None else None,
        }
        return Snapshot(meta, checkpoint.arrays)

    def restore(self, snapshot: Snapshot) -> None:
        """Be as the run was then. Raises ConfigError for a snapshot of another run."""
        meta = snapshot.meta
        try:
            if meta["policy"] != type(self._engine.policy).__qualname__:
                raise ConfigError(f"the checkpoint is of another policy ({meta['policy']}). Resume with that one.")
            self._engine.resume(Checkpoint(meta["engine"], snapshot.arrays))
            self._kpi.unpack(meta["kpi"])
            self.alarms = Counter(meta["alarms"])
            self._first_ns = int(meta["first_ns"])
            self._last = (int(meta["last"][0]), int(meta["last"][1]))
            place = meta["place"]
            self.place = Place(int(place["frames"]), int(place["last_ns"]), {int(k): int(seq) for k, seq in place["seqs"]})
            if self.log is not None and meta["rows"] is not None:
                self.log.go_back(meta["rows"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"the checkpoint does not fit this run ({error}). Make a new one.") from None


class _Alarm(msgspec.Struct):
    alarm: str = "unnamed"


def alarms_in(block: FrameBlock) -> list[str]:
    """Names of the alarms that the recorder left in a block."""
    names = []
    for i in np.flatnonzero(block.kind == FrameKind.ALARM).tolist():
        try:
            names.append(msgspec.json.decode(block.payload(i), type=_Alarm).alarm[:40])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            names.append("not of arbl2's making")
    return names
