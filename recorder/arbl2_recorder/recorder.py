"""A recording from start to end: lock, recover, connect, mind, drain, seal.

``arecord`` owns the event loop's side; the disk, the sealing and a consumer have threads of their own and report failures
through one door (``_Run.end``). Nothing that goes wrong with a venue ends a recording; what goes wrong with the machine does,
after everything that can still be saved was saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import threading
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from arbl2.errors import VenueError
from arbl2_recorder import clock
from arbl2_recorder.chores import Chores
from arbl2_recorder.consumer import Consumer
from arbl2_recorder.files import SessionFiles
from arbl2_recorder.recovery import recover_locked
from arbl2_recorder.retention import Retention
from arbl2_recorder.session import BEAT_S, Session
from arbl2_recorder.ship import Shipper
from arbl2_recorder.status import RecordResult, Status, StreamStatus
from arbl2_recorder.storage import RootLock
from arbl2_recorder.venue import Venue
from arbl2_recorder.venues import feeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2.frames import Anchor, Frame, FrameBlock
    from arbl2_recorder.clock import ClockOffset
    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.consumer import OnSession
    from arbl2_recorder.recovery import RecoveryReport

_logger = logging.getLogger("arbl2.recorder")
TICK_S = 0.05
OFFSET_S = 60.0
SHIP_PATIENCE_S = 30.0
RATE_SAMPLES, RATE_NS = 6, 1_500_000_000
SWITCH_INTERVAL_S = 0.0005
LISTENER_INTERVAL_S = 0.0002
"""The thread of a listener wants to go on as soon as a frame is there, and waits this long whenever another one computes. With
less it would interrupt the thread that stamps in the middle of a burst, and each would wait for the other again and again."""
# A clock that is only slewed moves at most 500 ppm: 5 ms between two samples 10 s apart.
CLOCK_STEP_NS = 5_000_000


class Stop(Protocol):
    """Anything with ``is_set``, such as ``threading.Event``: asked several times a second."""

    def is_set(self) -> bool:
        """Whether to stop."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Who takes the frames of a recording while it is made, in a thread of its own.

    ``on_frames`` gets every frame after it got its ``seq`` and was queued for the log, in blocks of one while it keeps up;
    ``on_session`` is called before the first one of each session, ``on_idle`` when a burst of frames is over. If one of them
    raises, or more than ``queue_bytes`` wait for them, they get nothing any more; the recording then ends with the error, or goes
    on if there is an ``on_error`` to take it.
    """

    on_frames: Callable[[FrameBlock], None]
    on_session: OnSession | None = None
    on_idle: Callable[[], None] | None = None
    on_error: Callable[[Exception], None] | None = None


def record(
    config: RecordConfig,
    *,
    on_status: Callable[[Status], None] | None = None,
    on_frame: Callable[[Frame], None] | Listener | None = None,
    stop: Stop | None = None,
) -> RecordResult:
    """Record until the duration is over, ``stop`` is set, or SIGINT or SIGTERM comes; then seal, and return what was recorded.

    ``on_status`` is called in this thread every ``status_s``; ``on_frame`` is a ``Listener``, or its hook alone. Raises
    StorageError if the folder cannot be used or the disk fails (what was logged stays and can be recovered), VenueError if no
    venue delivered anything, and whatever ``on_frame`` raised, after sealing.
    """
    # A thread that computes keeps the others waiting for this long: with the default 5 ms, drawing the status or packing a
    # batch would delay stamps by as much.
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S if on_frame is None else LISTENER_INTERVAL_S)
    try:
        return asyncio.run(arecord(config, on_status=on_status, on_frame=on_frame, stop=stop))
    finally:
        sys.setswitchinterval(usual_s)


async def arecord(
    config: RecordConfig,
    *,
    on_status: Callable[[Status], None] | None = None,
    on_frame: Callable[[Frame], None] | Listener | None = None,
    stop: Stop | None = None,
) -> RecordResult:
    """As ``record``, inside a running event loop (signals are handled only if that is the main thread's)."""
    with RootLock(config.out):
        recovered = recover_locked(config.out)
        for report in recovered:
            _logger.info("recovered %s: %s frames", report.session, report.frames_recovered)
        run = _Run(config, on_status, on_frame, stop)
        return await run.work(tuple(recovered))


@dataclass(frozen=True, slots=True)
class _Ended:
    """What the result says of a session that is sealed."""

    session: str
    frames: int
    sealed_bytes: int
    counts: dict[str, int]
    gaps: dict[str, int]


class _Run:
    def __init__(
        self,
        config: RecordConfig,
        on_status: Callable[[Status], None] | None,
        on_frame: Callable[[Frame], None] | Listener | None,
        stop: Stop | None,
    ) -> None:
        self._config = config
        self._on_status = on_status
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._ended = ""
        self._ended_ns = 0
        self._error: Exception | None = None
        self._phase = "recording"
        self._feeds = feeds(config)
        self._shipper = Shipper(config.out, config.ship, delete_local=config.ship_delete) if config.ship else None
        self._files = self._new_files()
        self._ended_sessions: list[_Ended] = []
        self._making: asyncio.Future[SessionFiles] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._started_ns = self._files.started_ns
        self._consumer = self._new_consumer(on_frame) if on_frame is not None else None
        self._introduce(self._files)
        self._session = Session(self._files.log, queue_bytes=config.queue_bytes, consumer=self._consumer)
        self._venues = [Venue(list(part), self._session, config) for _, part in groupby(self._feeds, lambda feed: feed.name)]
        self._rated_ns = self._started_ns
        self._offset: ClockOffset | None = None
        self._latest: Status | None = None
        self._told: dict[tuple[str, str], deque[tuple[int, int]]] = {}
        self._chores = Chores(config.out, lambda: self._latest, _retention(config))

    def _new_files(self) -> SessionFiles:
        return SessionFiles(self._config, self._feeds, on_error=self._fail, on_wanted=self._want_snapshots)

    def _new_consumer(self, on_frame: Callable[[Frame], None] | Listener) -> Consumer:
        listener = on_frame if isinstance(on_frame, Listener) else Listener(partial(_one_by_one, on_frame))
        return Consumer(
            listener.on_frames,
            listener.on_error or self._fail,
            limit_bytes=self._config.queue_bytes,
            on_session=listener.on_session,
            on_idle=listener.on_idle,
        )

    def _introduce(self, files: SessionFiles) -> None:
        """Tell the consumer whose frames come next."""
        if self._consumer is not None:
            self._consumer.begin(files.path, files.manifest, lambda: files.log.logged_seq)

    async def _roll_over(self) -> None:
        """Whole sessions can be kept, shipped and deleted: a recording of months is many of them, without a hole between."""
        while True:
            await asyncio.sleep(self._config.session_s)
            self._making = asyncio.ensure_future(asyncio.to_thread(self._new_files))
            files, ended = await asyncio.shield(self._making), self._files
            self._files, self._making = files, None
            self._session.go_on_in(files.log)
            self._introduce(files)
            self._session.clock_sample(self._offset)
            for venue in self._venues:
                venue.restate()
            self._closing = asyncio.ensure_future(
                asyncio.to_thread(self._close, ended, self._notes(f"goes on in {files.path.name}"))
            )
            await asyncio.shield(self._closing)
            self._chores.prune_soon()

    def _close(self, files: SessionFiles, notes: list[str]) -> None:
        files.close(notes)
        if files.error is not None:
            raise files.error
        self._ended_sessions.append(
            _Ended(files.manifest.session, files.manifest.rows, files.sealed_bytes, files.manifest.counts, files.sealer.gaps)
        )

    def _notes(self, end: str) -> list[str]:
        alarms = sorted(self._session.take_alarms().items())
        return [end, *(f"alarm {name}: {n}" for name, n in alarms)]

    async def _ask_time(self) -> None:
        while True:
            self._offset = await asyncio.to_thread(clock.offset)
            await asyncio.sleep(OFFSET_S)

    def _end(self, why: str, error: Exception | None = None) -> None:
        self._error = self._error or error
        self._ended = self._ended or why

    def _fail(self, error: Exception) -> None:
        """From any thread: the recording cannot go on."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: whoever waits looks at the error itself
            self._loop.call_soon_threadsafe(self._end, "failed", error)

    def _want_snapshots(self, symbols: tuple[str, ...]) -> None:
        """From the sealer's thread: diff chains are broken."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ask_snapshots, symbols)

    def _ask_snapshots(self, symbols: tuple[str, ...]) -> None:
        for venue in self._venues:
            venue.ask_snapshots(symbols)

    async def work(self, recovered: tuple[RecoveryReport, ...]) -> RecordResult:
        """Record until something ends it, then drain and seal."""
        handled = self._catch_signals()
        tasks = [asyncio.create_task(leg.run()) for venue in self._venues for leg in venue.legs]
        tasks += [asyncio.create_task(venue.desk.run()) for venue in self._venues]
        tasks += [asyncio.create_task(self._beat()), asyncio.create_task(self._ask_time())]
        tasks.append(asyncio.create_task(self._roll_over()))
        for task in tasks:
            task.add_done_callback(self._task_done)
        try:
            await self._mind()
        finally:
            self._ended_ns = clock.mono_ns()
            for venue in self._venues:
                for leg in venue.legs:
                    leg.finish()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._drain()
            if self._shipper is not None:
                await asyncio.to_thread(self._shipper.close, SHIP_PATIENCE_S)
            self._chores.close()
            for number in handled:
                self._loop.remove_signal_handler(number)
        return self._result(recovered)

    def _catch_signals(self) -> list[signal.Signals]:
        if threading.current_thread() is not threading.main_thread():
            return []
        caught = [signal.SIGINT, signal.SIGTERM]
        for number in caught:
            self._loop.add_signal_handler(number, self._end, "signal")
        return caught

    def _task_done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end("failed", error if isinstance(error, Exception) else RuntimeError(str(error)))

    async def _beat(self) -> None:
        while True:
            self._session.beat()
            await asyncio.sleep(BEAT_S)

    async def _mind(self) -> None:
        """Everything that is due by time: clock samples, rules, alarms, the status, the end."""
        config, session = self._config, self._session
        sampled = session.clock_sample()
        status_ns = self._started_ns
        rules_ns = 0
        while not self._ended:
            await asyncio.sleep(TICK_S)
            now_ns = clock.mono_ns()
            stepped = _stepped(sampled)
            if stepped or now_ns - sampled.mono_ns >= config.clock_s * 1e9:
                earlier, sampled = sampled, session.clock_sample(self._offset)
                if stepped:
                    session.alarm("clock_step", moved_ns=clock.drift_ns(earlier, sampled))
            if not rules_ns or now_ns - rules_ns >= config.rules_s * 1e9:
                rules_ns = now_ns
                for venue in self._venues:
                    venue.ask_rules()
            for venue in self._venues:
                for leg in venue.legs:
                    leg.check(now_ns)
            if now_ns - status_ns >= config.status_s * 1e9:
                status_ns = now_ns
                self._tell(now_ns)
            self._look_for_end((now_ns - self._started_ns) / 1e9)

    def _look_for_end(self, elapsed_s: float) -> None:
        if self._stop is not None and self._stop.is_set():
            self._end("stop")
        elif self._config.duration_s is not None and elapsed_s >= self._config.duration_s:
            self._end("duration")
        elif elapsed_s >= self._config.first_connect_s and not any(venue.delivered for venue in self._venues):
            self._end("failed", self._nothing_came())

    def _nothing_came(self) -> VenueError:
        reasons = "; ".join(f"{venue.name} ({venue.url}): {venue.problem or 'no data'}" for venue in self._venues)
        return VenueError(
            f"no venue delivered anything. {reasons}. Check the network and the endpoints; "
            f"the attempts are in {self._files.path}."
        )

    async def _drain(self) -> None:
        """Close the log and seal it. A failed disk leaves the session to be recovered."""
        # Like every frame that is not a message it is never dropped, and declares first what was.
        self._session.clock_sample()
        self._phase = "sealing"
        if self._consumer is not None:
            await asyncio.to_thread(self._consumer.close)
        notes = self._notes(f"ended by {self._ended or 'cancellation'}")
        await self._settle(self._closing)
        if self._making is not None and await self._settle(self._making):
            # Made for a session that never began.
            unused = self._making.result()
            await self._settle(asyncio.ensure_future(asyncio.to_thread(unused.discard)))
        closing = asyncio.ensure_future(asyncio.to_thread(self._close, self._files, notes))
        while not closing.done():
            await asyncio.wait([closing], timeout=self._config.status_s)
            with contextlib.suppress(Exception):  # whoever looks on must not keep the session from being sealed
                self._tell(clock.mono_ns())
        await self._settle(closing)

    async def _settle(self, work: asyncio.Future[Any] | None) -> bool:
        """Wait for work in a thread; what went wrong there is what the recording ends with."""
        if work is None:
            return True
        await asyncio.wait([work])
        error = work.exception()
        if isinstance(error, Exception):
            self._error = self._error or error
        return error is None

    def _result(self, recovered: tuple[RecoveryReport, ...]) -> RecordResult:
        error = self._files.error or self._error
        if error is not None:
            raise error
        if not any(venue.delivered for venue in self._venues):
            raise self._nothing_came()
        ended, session, sealer = self._ended_sessions, self._session, self._files.sealer
        counts: Counter[str] = Counter()
        gaps: Counter[str] = Counter()
        for each in ended:
            counts.update(each.counts)
            gaps.update(each.gaps)
        return RecordResult(
            session=self._files.manifest.session,
            path=self._files.path,
            sessions=tuple(each.session for each in ended),
            frames=sum(each.frames for each in ended),
            payload_bytes=session.payload_bytes,
            sealed_bytes=sum(each.sealed_bytes for each in ended),
            messages={venue.name: venue.messages for venue in self._venues},
            counts=dict(sorted(counts.items())),
            alarms=dict(sorted(session.alarms.items())),
            silent=tuple(sorted(session.silent)),
            longest_silence_s={venue.name: venue.longest_silence_s(self._started_ns, self._ended_ns) for venue in self._venues},
            dropped=session.dropped,
            queue=sealer.queue_us,
            late_frames=session.late_frames,
            gaps=dict(sorted(gaps.items())),
            shipped_segments=self._shipper.segments if self._shipper else 0,
            ship_problem=self._shipper.problem if self._shipper else "",
            reconnects={venue.name: venue.reconnects for venue in self._venues},
            duration_s=(self._ended_ns - self._started_ns) / 1e9,
            ended=self._ended,
            clean=session.dropped == 0,
            recovered=recovered,
        )

    def _streams(self, now_ns: int) -> tuple[StreamStatus, ...]:
        found = []
        for venue, name, messages, last_ns in self._files.sealer.streams:
            past = self._told.setdefault((venue, name), deque(maxlen=RATE_SAMPLES))
            # The sealer counts about once a second: two looks in between see the same.
            if not past or messages != past[-1][1] or now_ns - past[-1][0] > RATE_NS:
                past.append((now_ns, messages))
            (then_ns, before), (until_ns, after) = past[0], past[-1]
            rate_per_s = max(0, after - before) / max((until_ns - then_ns) / 1e9, 1e-9) if len(past) > 1 else 0.0
            found.append(StreamStatus(venue, name, messages, rate_per_s, (now_ns - last_ns) / 1e9))
        return tuple(found)

    def _tell(self, now_ns: int) -> None:
        span_s = max((now_ns - self._rated_ns) / 1e9, 1e-9)
        venues = tuple(venue.status(now_ns, span_s) for venue in self._venues)
        self._rated_ns = now_ns
        files, sealer, session = self._files, self._files.sealer, self._session
        self._latest = Status(
            session=files.path.name,
            phase=self._phase,
            elapsed_s=(now_ns - self._started_ns) / 1e9,
            venues=venues,
            frames=session.seq,
            queued_bytes=files.log.queued_bytes,
            logged_bytes=files.log.logged_bytes,
            sealed_bytes=files.sealed_bytes,
            segments=len(files.manifest.segments),
            waiting_logs=sealer.waiting,
            dropped=session.dropped,
            alarms=session.alarms.total(),
            last_alarm=session.last_alarm,
            queue=sealer.queue_us,
            late_frames=session.late_frames,
            streams=self._streams(now_ns),
            shipped_segments=self._shipper.segments if self._shipper else 0,
            ship_problem=self._shipper.problem if self._shipper else "",
            gaps=sealer.gaps,
            last_gap=sealer.last_gap,
            last_drop_s=(now_ns - session.last_drop_ns) / 1e9 if session.last_drop_ns else None,
            disk_free_bytes=self._chores.disk_free_bytes,
            clock=self._offset,
            wall_ns=clock.wall_ns(),
        )
        if self._on_status is not None:
            self._on_status(self._latest)


def _one_by_one(on_frame: Callable[[Frame], None], block: FrameBlock) -> None:
    for frame in block.frames():
        on_frame(frame)


def _retention(config: RecordConfig) -> Retention | None:
    if config.keep_days is None and config.keep_bytes is None:
        return None
    return Retention(keep_days=config.keep_days, keep_bytes=config.keep_bytes, only_shipped=config.ship is not None)


def _stepped(earlier: Anchor) -> bool:
    """Whether the wall clock was set since. Looked at twice: a thread that is held up between two reads sees a step too."""
    return all(abs(clock.drift_ns(earlier, clock.sample())) > CLOCK_STEP_NS for _ in range(2))
