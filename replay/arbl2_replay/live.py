"""A paper run on frames as they are recorded: the engine of a replay, fed blocks of one.

``LiveRun`` is what a recorder hands its frames to, in a thread that no socket waits for. The same engine, key figures and sinks
as in a replay make the same run of them; ``finish`` writes it when the tape is sealed. Clocks are read here only to measure, and
to say how old books are to whoever asks: nothing that is decided depends on them.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.errors import EngineError
from arbl2.events import Direction, Intent
from arbl2.frames import Anchor, ExchangeId, FrameBlock
from arbl2.policy import Ask
from arbl2.tape import write_atomically
from arbl2_replay.calibrated import beside
from arbl2_replay.course import alarms_in
from arbl2_replay.driver import RunResult, summary_of
from arbl2_replay.histogram import Histogram
from arbl2_replay.journal import LIVE_JSON, FedDigest, Journal, Mark
from arbl2_replay.kpi import Kpi
from arbl2_replay.reading import open_reading
from arbl2_replay.sinks import EarlierRows, RunSink
from arbl2_replay.synth import SYMBOLS, SynthConfig, synth_frames, synth_manifest
from arbl2_replay.warm import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from arbl2.aggregator import MultiExchangeL2Snapshot
    from arbl2.engine import Events
    from arbl2.frames import Frame
    from arbl2.policy import Policy, View
    from arbl2.tape import Manifest
    from arbl2.zones import CalibrationTable
    from arbl2_replay.histogram import Latency

_LOG = logging.getLogger("arbl2.live")
MARK_NS, LATEST_MARK_NS = 1_000_000_000, 1_250_000_000
"""The journal is written this often, once no frame waits or else a little later: a kill costs at most the events since then,
which the replay makes again."""
_WARM = SynthConfig(duration_s=1.0, symbols=(SYMBOLS["BTC"],))


@dataclass(frozen=True, slots=True)
class Latencies:
    """``decision``: arrival of the frame in the process (its stamp) to the engine's answer, where it decided something.

    ``frame``: the same for every frame; ``feed``: the engine's part of it; ``stamp``: from arrival to ``seq``.
    """

    decision: Latency
    frame: Latency
    feed: Latency
    stamp: Latency

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: {part: getattr(getattr(self, name), part) for part in _PARTS} for name in self.__slots__}


_PARTS = ("count", "p50_us", "p99_us", "max_us")


@dataclass(frozen=True, slots=True)
class LiveResult:
    """A live run that has ended: what a replay of its tape gives too, and what was measured."""

    run: RunResult
    latency: Latencies

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.run.to_json() | {"latency": self.latency.to_json()}


@dataclass(frozen=True, slots=True)
class Trading:
    """A live run now, for whoever looks on. Amounts as in ``Kpi.result``, positions in 10^-8 of the coin by venue."""

    session: str
    frames: int
    books: tuple[MultiExchangeL2Snapshot, ...]
    positions: dict[str, dict[str, int]]
    kpi: dict[str, Any]
    latency: Latencies
    problem: str


class LiveRun:
    """One paper run on one session of a recording.

    The recorder's thread calls ``begin``, ``feed`` and ``idle``; any other may ``look`` or ask for a ``snapshot``. What goes
    wrong in here ends the run and not the recording: it is logged at once and raised by ``finish``.
    """

    def __init__(self, config: RunConfig, root: Path, *, policy: Policy | None = None) -> None:
        """``root`` is the folder of runs; compiles the kernels, so that no frame waits for that."""
        self.config = config
        self.calibration: CalibrationTable | None = None
        """What it says of the orders is compared with what came, when the run has ended; may be set until then."""
        self.error: Exception | None = None
        self.begun = threading.Event()
        """Set once there is an engine, or there will be none."""
        self._root = root
        self._policy = policy
        self._lock = threading.Lock()
        self._anchor = Anchor(0, 0)
        self._session = ""
        self._alarms: Counter[str] = Counter()
        self._first_ns = self._last_ns = 0
        self._marked_ns = 0
        self._unsettled: list[tuple[FrameBlock, int, int]] = []
        self._events: list[Events] = []
        self._fed = FedDigest()
        self._decision, self._frame, self._feed, self._stamp = (Histogram() for _ in range(4))
        _warm()

    _engine: Engine
    _kpi: Kpi
    _journal: Journal | None = None

    def begin(self, path: Path, manifest: Manifest, logged_seq: Callable[[], int]) -> None:
        """The frames that come are those of this session; ``logged_seq`` says up to which of them no kill can take."""
        if self._session:
            raise EngineError("a live run is one session. Record it without a limit of session hours.")
        self._session = manifest.session
        self._anchor = manifest.anchor
        self._engine = Engine(manifest.instruments, self.config, policy=self._policy)
        self._kpi = Kpi(self._engine)
        self._journal = Journal(
            self._root / f"{manifest.session}-live",
            session=manifest.session,
            tape=path,
            config=self.config,
            policy=type(self._engine.policy).__name__,
            symbols=self._engine.universe.symbols,
            logged_seq=logged_seq,
        )
        self._marked_ns = time.monotonic_ns()
        self.begun.set()

    def take(self, frames: Sequence[Frame]) -> None:
        """The next frames of the tape, in their one-at-a-time form."""
        self.feed(FrameBlock.from_frames(frames, self._anchor))

    def feed(self, block: FrameBlock) -> None:
        """The next frames of the tape: one, or more where the run is behind."""
        with self._lock:
            started_ns = time.monotonic_ns()
            self._engine.feed(block)
            ended_ns = time.monotonic_ns()
            self._unsettled.append((block, started_ns, ended_ns))
        if ended_ns - self._marked_ns >= LATEST_MARK_NS:
            self.mark()

    def idle(self) -> None:
        """No frame waits now: time for what would make one wait."""
        if time.monotonic_ns() - self._marked_ns >= MARK_NS:
            self.mark()

    def mark(self) -> None:
        """Let the journal have what came of the frames so far; done by itself every second. Raises what the journal met."""
        assert self._journal is not None
        self._marked_ns = time.monotonic_ns()
        if self._journal.error is not None:
            raise self._journal.error
        with self._lock:
            self._settle()
            events, self._events = self._events, []
        self._journal.put(Mark(self._fed.fed(), self._engine.digest()), events, self.latencies().to_json())

    def _settle(self) -> None:
        """Add up what was fed since the last time. Together it takes a small part of what it takes block by block."""
        fed, self._unsettled = self._unsettled, []
        if not fed:
            return
        block = FrameBlock.joined([each for each, _, _ in fed])
        started_ns, ended_ns = (np.array([times[which] for times in fed]) for which in (1, 2))
        took_ns = np.repeat(ended_ns, [len(each) for each, _, _ in fed]) - block.mono_ns
        events = self._engine.drain()
        if len(events.decisions) or len(events.fills):
            self._kpi.add(events)
            self._events.append(events)
            at = np.unique(events.decisions["seq"]) - block.seq[0]
            self._decision.add(took_ns[at[at < len(block)]])  # the others are of a block at which the engine failed
        self._frame.add(took_ns)
        self._feed.add(ended_ns - started_ns)
        self._stamp.add(block.queue_us * np.int64(1_000))
        self._fed.add(block)
        self._alarms.update(alarms_in(block))
        self._first_ns = self._first_ns or int(block.time_ns[0])
        self._last_ns = max(self._last_ns, int(block.time_ns.max()))

    def lost(self, error: Exception) -> None:
        """The run has failed; the recording goes on."""
        self.error = error
        self.begun.set()
        _LOG.error("the live run has stopped, the recording goes on: %s", error)

    def latencies(self) -> Latencies:
        """What was measured so far."""
        return Latencies(*(each.latency() for each in (self._decision, self._frame, self._feed, self._stamp)))

    def snapshot(self, symbol: str) -> MultiExchangeL2Snapshot:
        """Both books of a coin and the edges between them, with ages as of now. Raises ConfigError for a coin that is not traded.

        Takes some ten microseconds, and waits at most for the one frame that the engine is at.
        """
        now_ns = self._anchor.time_ns(time.monotonic_ns())
        with self._lock:
            return self._engine.aggregator.snapshot(symbol, max(now_ns, self._engine.aggregator.time_ns))

    def look(self) -> Trading | None:
        """The run now; None before it has begun."""
        if not self._session or self._journal is None:
            return None
        engine = self._engine
        books = tuple(self.snapshot(symbol) for symbol in engine.universe.symbols)
        with self._lock:
            self._settle()
            changes = engine.ledger.changes()
            kpi = self._kpi.result()
            frames = engine.frames
        return Trading(
            session=self._session,
            frames=frames,
            books=books,
            positions={s: {str(venue): changes[venue][s] for venue in ExchangeId} for s in engine.universe.symbols},
            kpi=kpi,
            latency=self.latencies(),
            problem=str(self.error or ""),
        )

    def finish(self, tape: Path, elapsed_s: float) -> LiveResult:
        """The recording has ended and its tape is sealed: execute what has arrived, write tables and ``run.json``.

        Raises what ended the run before, EngineError if the ledger does not add up, StorageError.
        """
        if self.error is not None or self._journal is None:
            raise self.error or EngineError("the recorder handed on no session. Please report this.")
        engine, journal = self._engine, self._journal
        self.mark()
        mark = Mark(self._fed.fed(), engine.digest())
        rows = journal.close()
        latency = self.latencies()
        sink = RunSink(self._root, engine.universe.symbols, earlier=EarlierRows(journal.folder, rows))
        try:
            engine.finish()
            events = engine.drain()
            self._kpi.add(events)
            sink.write(events)
            result = self._result(elapsed_s)
            if self.calibration is not None:
                compared = beside(self.calibration, engine, sink.log, (self._first_ns, self._last_ns))
                result = dataclasses.replace(result, calibration=compared)
            summary = summary_of(open_reading([tape], decoded=False, check_hashes=False), self.config, engine, result)
            run_dir = sink.commit(f"{self._session}-live-{result.digest[:8]}", summary)
        finally:
            sink.discard()
        write_atomically(run_dir / LIVE_JSON, journal.ended(msgspec.structs.replace(mark, rows=rows), latency.to_json()))
        journal.remove()
        return LiveResult(dataclasses.replace(result, run_dir=run_dir), latency)

    def abandon(self) -> None:
        """The recording has failed: keep the journal as it is."""
        if self._journal is not None:
            self._journal.abandon()

    def _result(self, elapsed_s: float) -> RunResult:
        engine = self._engine
        return RunResult(
            session=self._session,
            digest=engine.digest(),
            frames=engine.frames,
            elapsed_s=elapsed_s,
            tape_s=(self._last_ns - self._first_ns) / 1e9,
            kpi=self._kpi.result(),
            reasons=engine.reasons(),
            books=engine.books(),
            alarms=dict(sorted(self._alarms.items())),
            lateness=None,
            run_dir=None,
        )


class _Asks:
    """A policy that calls what a Python policy can call."""

    def decide(self, view: View) -> Ask:
        """Ask for what is refused."""
        return Ask(Direction.SELL_UPBIT, Intent.ENTRY, -1, -1)


def _warm() -> None:
    """Compile or load all that a run and its onlookers call, by taking real messages through it once."""
    warm_up()
    manifest = synth_manifest(_WARM)
    frames = list(synth_frames(_WARM))
    for policy in (None, _Asks()):
        engine = Engine(manifest.instruments, RunConfig(), policy=policy)
        for frame in frames:
            engine.feed(FrameBlock.from_frames([frame], manifest.anchor))
        engine.aggregator.snapshot("BTC")
        Kpi(engine).result()
        engine.digest()
        engine.finish()
