"""A recording from start to end: lock, recover, connect, mind, drain, seal.

``arecord`` owns the event loop's side; the disk, the sealing and a consumer have threads of their own and report failures
through one door (``_Run.end``). Nothing that goes wrong with a venue ends a recording; what goes wrong with the machine does,
after everything that can still be saved was saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import secrets
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from arbl2.errors import VenueError
from arbl2.frames import FrameKind, Op
from arbl2.tape import LOG, TAPE_VERSION, Manifest, save_manifest
from arbl2_recorder import clock, rest
from arbl2_recorder.consumer import Consumer
from arbl2_recorder.leg import Leg
from arbl2_recorder.recovery import recover_locked
from arbl2_recorder.seal import Sealer
from arbl2_recorder.session import Session
from arbl2_recorder.status import RecordResult, Status
from arbl2_recorder.storage import RootLock, storage_error
from arbl2_recorder.venues import feeds
from arbl2_recorder.writer import LogWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from arbl2.frames import Frame
    from arbl2_recorder.config import RecordConfig
    from arbl2_recorder.recovery import RecoveryReport
    from arbl2_recorder.venues import VenueFeed

_logger = logging.getLogger("arbl2.recorder")
TICK_S = 0.05
SWITCH_INTERVAL_S = 0.0005
# A clock that is only slewed moves at most 500 ppm: 5 ms between two samples 10 s apart.
CLOCK_STEP_NS = 5_000_000


class Stop(Protocol):
    """Anything with ``is_set``, such as ``threading.Event``: asked several times a second."""

    def is_set(self) -> bool:
        """Whether to stop."""


def record(
    config: RecordConfig,
    *,
    on_status: Callable[[Status], None] | None = None,
    on_frame: Callable[[Frame], None] | None = None,
    stop: Stop | None = None,
) -> RecordResult:
    """Record until the duration is over, ``stop`` is set, or SIGINT or SIGTERM comes; then seal, and return what was recorded.

    ``on_status`` is called in this thread every ``status_s``; ``on_frame`` in a thread of its own with every frame after it got
    its ``seq`` and was queued for the log. Raises StorageError if the folder cannot be used or the disk fails (what was logged
    stays and can be recovered), VenueError if no venue delivered anything, and whatever ``on_frame`` raised, after sealing.
    """
    # A thread that computes keeps the others waiting for this long: with the default 5 ms, drawing the status or packing a
    # batch would delay stamps by as much.
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        return asyncio.run(arecord(config, on_status=on_status, on_frame=on_frame, stop=stop))
    finally:
        sys.setswitchinterval(usual_s)


async def arecord(
    config: RecordConfig,
    *,
    on_status: Callable[[Status], None] | None = None,
    on_frame: Callable[[Frame], None] | None = None,
    stop: Stop | None = None,
) -> RecordResult:
    """As ``record``, inside a running event loop (signals are handled only if that is the main thread's)."""
    with RootLock(config.out):
        recovered = recover_locked(config.out)
        for report in recovered:
            _logger.info("recovered %s: %s frames", report.session, report.frames_recovered)
        run = _Run(config, on_status, on_frame, stop)
        return await run.work(tuple(recovered))


class _Run:
    def __init__(
        self,
        config: RecordConfig,
        on_status: Callable[[Status], None] | None,
        on_frame: Callable[[Frame], None] | None,
        stop: Stop | None,
    ) -> None:
        self._config = config
        self._on_status = on_status
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self._ended = ""
        self._ended_ns = 0
        self._error: Exception | None = None
        self._phase = "recording"
        self._feeds = feeds(config)
        self._path, manifest = _create(config, self._feeds)
        self._started_ns = manifest.anchor_mono_ns
        self._sealer = Sealer(self._path, manifest, self._fail)
        self._log = LogWriter(
            self._path,
            flush_ms=config.flush_ms,
            fsync=config.fsync,
            segment_seconds=config.segment_seconds,
            segment_bytes=config.segment_bytes,
            on_rotated=self._sealer.put,
            on_error=self._fail,
        )
        self._consumer = Consumer(on_frame, self._fail, limit_bytes=config.queue_bytes) if on_frame is not None else None
        self._session = Session(self._log, queue_bytes=config.queue_bytes, consumer=self._consumer)
        self._legs = [Leg(feed, self._session, config) for feed in self._feeds]
        self._rated = {leg.feed.name: 0 for leg in self._legs}
        self._rated_ns = self._started_ns

    def _end(self, why: str, error: Exception | None = None) -> None:
        if not self._ended:
            self._ended, self._error = why, error
            self._over.set()

    def _fail(self, error: Exception) -> None:
        """From any thread: the recording cannot go on."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: whoever waits looks at the error itself
            self._loop.call_soon_threadsafe(self._end, "failed", error)

    async def work(self, recovered: tuple[RecoveryReport, ...]) -> RecordResult:
        """Record until something ends it, then drain and seal."""
        handled = self._catch_signals()
        tasks = [asyncio.create_task(leg.run()) for leg in self._legs]
        tasks += [asyncio.create_task(self._fetch(feed)) for feed in self._feeds]
        for task in tasks:
            task.add_done_callback(self._task_done)
        try:
            await self._mind()
        finally:
            self._ended_ns = clock.mono_ns()
            for leg in self._legs:
                leg.finish()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await self._drain()
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

    async def _mind(self) -> None:
        """Everything that is due by time: clock samples, alarms, the status, the end."""
        config, session = self._config, self._session
        sampled = session.clock_sample()
        status_ns = self._started_ns
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), TICK_S)
            now_ns = clock.mono_ns()
            if now_ns - sampled.mono_ns >= config.clock_s * 1e9:
                earlier, sampled = sampled, session.clock_sample()
                moved_ns = clock.drift_ns(earlier, sampled)
                if abs(moved_ns) > CLOCK_STEP_NS:
                    session.alarm("clock_step", moved_ns=moved_ns)
            for leg in self._legs:
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
        elif elapsed_s >= self._config.first_connect_s and not any(leg.delivered for leg in self._legs):
            self._end("failed", self._nothing_came())

    def _nothing_came(self) -> VenueError:
        reasons = "; ".join(f"{leg.feed.name} ({leg.feed.url}): {leg.problem or 'no data'}" for leg in self._legs)
        return VenueError(
            f"no venue delivered anything. {reasons}. Check the network and the endpoints; the attempts are in {self._path}."
        )

    async def _fetch(self, feed: VenueFeed) -> None:
        session = self._session
        for url in feed.rest_urls:
            session.record(feed.venue, 0, FrameKind.REQUEST, {"method": "GET", "url": url}, *clock.stamp())
            try:
                body = await rest.fetch(url, self._config.rest_timeout_s)
            except VenueError as error:
                session.alarm("rest_failed", venue=feed.venue, url=url, said=str(error))
            else:
                session.accept(feed.venue, 0, FrameKind.RESPONSE, Op.NONE, body, *clock.stamp())

    async def _drain(self) -> None:
        """Close the log and seal it. A failed disk leaves the session to be recovered."""
        # Like every frame that is not a message it is never dropped, and declares first what was.
        self._session.clock_sample()
        self._phase = "sealing"
        if self._consumer is not None:
            await asyncio.to_thread(self._consumer.close)
        closing = asyncio.ensure_future(asyncio.to_thread(self._close_disk))
        while not closing.done():
            await asyncio.wait([closing], timeout=self._config.status_s)
            self._tell(clock.mono_ns())
        await closing

    def _close_disk(self) -> None:
        self._log.close()
        self._sealer.close()
        if self._log.error is not None or self._sealer.error is not None:
            return
        manifest = self._sealer.manifest
        notes = [
            f"ended by {self._ended or 'cancellation'}",
            *(f"alarm {name}: {n}" for name, n in sorted(self._session.alarms.items())),
        ]
        self._sealer.manifest = msgspec.structs.replace(manifest, state="sealed", notes=[*manifest.notes, *notes])
        save_manifest(self._path, self._sealer.manifest)
        (self._path / LOG).rmdir()

    def _result(self, recovered: tuple[RecoveryReport, ...]) -> RecordResult:
        error = self._log.error or self._sealer.error or self._error
        if error is not None:
            raise error
        if not any(leg.delivered for leg in self._legs):
            raise self._nothing_came()
        manifest, session = self._sealer.manifest, self._session
        return RecordResult(
            session=manifest.session,
            path=self._path,
            frames=manifest.rows,
            payload_bytes=session.payload_bytes,
            sealed_bytes=sum(segment.bytes for segment in manifest.segments),
            messages={leg.feed.name: leg.messages for leg in self._legs},
            counts=manifest.counts,
            alarms=dict(sorted(session.alarms.items())),
            silent=tuple(sorted(session.silent)),
            longest_silence_s={leg.feed.name: leg.longest_silence_s(self._started_ns, self._ended_ns) for leg in self._legs},
            dropped=session.dropped,
            duration_s=(clock.mono_ns() - self._started_ns) / 1e9,
            ended=self._ended,
            clean=session.dropped == 0,
            recovered=recovered,
        )

    def _tell(self, now_ns: int) -> None:
        if self._on_status is None:
            return
        span_s = max((now_ns - self._rated_ns) / 1e9, 1e-9)
        venues = []
        for leg in self._legs:
            messages = leg.messages
            venues.append(leg.status(now_ns, (messages - self._rated[leg.feed.name]) / span_s))
            self._rated[leg.feed.name] = messages
        self._rated_ns = now_ns
        segments, session = self._sealer.manifest.segments, self._session
        self._on_status(
            Status(
                session=self._path.name,
                phase=self._phase,
                elapsed_s=(now_ns - self._started_ns) / 1e9,
                venues=tuple(venues),
                frames=session.seq,
                queued_bytes=self._log.queued_bytes,
                logged_bytes=self._log.logged_bytes,
                sealed_bytes=sum(segment.bytes for segment in segments),
                segments=len(segments),
                waiting_logs=self._sealer.waiting,
                dropped=session.dropped,
                alarms=session.alarms.total(),
                last_alarm=session.last_alarm,
            )
        )


def _create(config: RecordConfig, venue_feeds: list[VenueFeed]) -> tuple[Path, Manifest]:
    """A new session folder with its first manifest."""
    anchor = clock.sample()
    try:
        while True:
            path = config.out / f"{clock.utc_name(anchor.wall_ns)}-{secrets.token_hex(2)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
    except OSError as error:
        raise storage_error(config.out, error) from error
    manifest = Manifest(
        tape_version=TAPE_VERSION,
        session=path.name,
        state="recording",
        anchor_wall_ns=anchor.wall_ns,
        anchor_mono_ns=anchor.mono_ns,
        versions={
            "arbl2": version("arbl2"),
            "python": platform.python_version(),
            "websockets": version("websockets"),
            "pyarrow": version("pyarrow"),
        },
        host=_host(),
        endpoints={
            f"{feed.name}_{kind}": url
            for feed in venue_feeds
            for kind, url in (("ws", feed.url), ("rest", getattr(config.endpoints, f"{feed.name}_rest")))
        },
        instruments=config.instruments(),
        subscriptions={feed.name: msgspec.json.decode(feed.subscription("")) for feed in venue_feeds},
    )
    save_manifest(path, manifest)
    return path, manifest


def _host() -> dict[str, str]:
    host = {
        "name": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": str(os.cpu_count() or 0),
        "pid": str(os.getpid()),
    }
    # Monotonic stamps of two sessions can be compared only within one boot.
    with contextlib.suppress(OSError):
        host["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return host
