"""Steering a replay while it runs: pause, step, seek, speed, stop - from any thread.

A ``Steering`` is given to ``replay``. Each method returns a future of the position that was reached; the run looks for requests
between the pieces of frames that it takes. Whatever is asked, the run decides and fills as if nobody had asked: only the time
that it takes differs, and where it ends.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arbl2.errors import ConfigError
from arbl2_replay.clock import Speed
from arbl2_replay.moments import Kind, Moment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from arbl2.frames import FrameBlock

SESSION_BITS = 40
"""In a run of several sessions the bits of ``seq`` above these say which."""


@dataclass(frozen=True, slots=True)
class Place:
    """How far a run is: frames taken, the latest of their times, and the last ``seq`` by session."""

    frames: int = 0
    last_ns: int = 0
    seqs: Mapping[int, int] = field(default_factory=dict)

    def after(self, block: FrameBlock) -> Place:
        """When these frames have been taken too."""
        if len(block) == 1:
            seq, time_ns = int(block.seq[0]), int(block.time_ns[0])
            return Place(self.frames + 1, max(self.last_ns, time_ns), {**self.seqs, seq >> SESSION_BITS: seq})
        sessions = block.seq >> SESSION_BITS
        if sessions.min() == sessions.max():
            seqs = {**self.seqs, int(sessions[0]): int(block.seq[-1])}
        else:
            seqs = {**self.seqs, **dict(zip(sessions.tolist(), block.seq.tolist(), strict=True))}
        return Place(self.frames + len(block), max(self.last_ns, int(block.time_ns.max())), seqs)


@dataclass(frozen=True, slots=True)
class Goal:
    """A moment on a tape that begins at a known time; the frames up to it belong to a run that ends there."""

    moment: Moment

    @classmethod
    def of(cls, moment: Moment, first_ns: int) -> Goal:
        """``first_ns``: engine time of the first frame."""
        return cls(Moment(Kind.NS, first_ns + moment.value) if moment.kind is Kind.SINCE else moment)

    @property
    def time_ns(self) -> int:
        """Its engine time, 0 if that is not known."""
        return self.moment.value if self.moment.kind is Kind.NS else 0

    def rows(self, block: FrameBlock) -> int:
        """How many frames at the head of a block come before the first that is beyond it."""
        kind, value = self.moment.kind, self.moment.value
        if kind is Kind.END:
            return len(block)
        if kind is Kind.SEQ:
            beyond = (block.seq > value) & (block.seq >> SESSION_BITS == value >> SESSION_BITS)
        else:
            beyond = block.time_ns > value
        return int(beyond.argmax()) if beyond.any() else len(block)

    def is_behind(self, place: Place) -> bool:
        """Whether a run at this place has taken a frame that is beyond it."""
        kind, value = self.moment.kind, self.moment.value
        if kind is Kind.SEQ:
            return place.seqs.get(value >> SESSION_BITS, 0) > value
        return kind is not Kind.END and place.frames > 0 and place.last_ns > value


@dataclass(frozen=True, slots=True)
class Pair:
    """One symbol: gross edges after FX (None where a book is not usable) and the coin bought (+) or sold (-) by venue, 10^-8."""

    symbol: str
    sell_upbit_bps: float | None
    buy_upbit_bps: float | None
    held_upbit_e8: int
    held_binance_e8: int


@dataclass(frozen=True, slots=True)
class Position:
    """What a run is at: the engine time and seq of the last frame taken (0 before the first), frames taken of how many."""

    time_ns: int
    seq: int
    frames: int
    total: int
    speed: str
    paused: bool
    late_ms: float
    pairs: tuple[Pair, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of a run, for the run. ``value`` is what the method of this name was given."""

    name: str
    value: Any
    answer: Future[Position]


class Steering:
    """The wheel of one replay.

    Futures raise ConfigError for what cannot be done; ``step`` and ``seek`` are done when the run is there, or was asked for
    something else on the way.
    """

    def __init__(self, *, paused: bool = False) -> None:
        self.starts_paused = paused
        self.position: Position | None = None
        """Where the run is; None before it has begun."""
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._bell = threading.Event()
        self._over = False
        self._breaks: BaseException | None = None

    def pause(self) -> Future[Position]:
        """Stand still."""
        return self._ask("pause")

    def resume(self) -> Future[Position]:
        """Go on at the speed that was set."""
        return self._ask("resume")

    def step(self, frames: int = 1) -> Future[Position]:
        """Take the next frames, as fast as it goes, and stand still."""
        if frames < 1:
            raise ConfigError(f"a step of {frames} frames leads nowhere. Use seek to go back.")
        return self._ask("step", frames)

    def seek(self, moment: Moment | str) -> Future[Position]:
        """Go there as fast as it goes, forward or back, and then on as before: at the speed that was set, or paused."""
        return self._ask("seek", Moment.parse(moment) if isinstance(moment, str) else moment)

    def until(self, moment: Moment | str) -> Future[Position]:
        """End the run there."""
        return self._ask("until", Moment.parse(moment) if isinstance(moment, str) else moment)

    def set_speed(self, speed: Speed | str) -> Future[Position]:
        """Go at this speed from here on."""
        return self._ask("speed", Speed.parse(speed) if isinstance(speed, str) else speed)

    def status(self) -> Future[Position]:
        """Say where the run is, once it is between two pieces."""
        return self._ask("status")

    def stop(self) -> Future[Position]:
        """End the run here; what was replayed is written like any other run."""
        return self._ask("stop")

    def _ask(self, name: str, value: Any = None) -> Future[Position]:
        request = Request(name, value, Future())
        with self._lock:
            if self._over:
                request.answer.set_exception(ConfigError("the replay is over."))
                return request.answer
            self._waiting.append(request)
        self._bell.set()
        return request.answer

    def abort(self, error: BaseException) -> None:
        """Break the run off with this error, after the piece that it is at.

        For signal handlers: it takes no lock, so it does not wake a run that waits.
        """
        self._breaks = error

    def wait(self, seconds: float | None = None) -> bool:
        """For the run: wait until something is asked, at most so long; whether it was."""
        return self._bell.wait(seconds)

    def next_request(self) -> Request | None:
        """For the run: what was asked first of all that waits, None if nothing does. Raises what ``abort`` was given."""
        if self._breaks is not None:
            raise self._breaks
        if not self._bell.is_set():
            return None
        with self._lock:
            while self._waiting:
                request = self._waiting.popleft()
                if request.answer.set_running_or_notify_cancel():
                    return request
            self._bell.clear()
        return None

    def close(self) -> None:
        """For the run: it is over, and nothing can be asked of it any more."""
        with self._lock:
            self._over = True
            left, self._waiting = self._waiting, deque()
        for request in left:
            if request.answer.set_running_or_notify_cancel():
                request.answer.set_exception(ConfigError("the replay is over."))
