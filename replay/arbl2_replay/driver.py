"""The driver: tape, pacer, engine and sink joined, and taken along a ``Course``, the only loop that replays.

Reading and unpacking the next block happens in one other thread while the engine works on this one (``reading``); at most two
are in memory, whatever the length of the tape.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec

from arbl2.config import RunConfig
from arbl2.engine import Engine
from arbl2.errors import ConfigError
from arbl2_replay import memory
from arbl2_replay.calibrated import beside
from arbl2_replay.checkpoint import Keeper, load
from arbl2_replay.clock import Lateness, Pacer, Speed, punctual
from arbl2_replay.course import Course
from arbl2_replay.kpi import Kpi
from arbl2_replay.moments import Moment
from arbl2_replay.reading import open_reading, tape_summary
from arbl2_replay.sinks import DECISIONS, FILLS, OUTCOME_SOURCE, EarlierRows, EventLog, RunSink
from arbl2_replay.warm import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import polars as pl

    from arbl2.policy import Policy
    from arbl2.zones import CalibrationTable
    from arbl2_replay.reading import Reading
    from arbl2_replay.steering import Steering

_PROGRESS_S = 0.05


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a replay gave. ``kpi``, ``reasons`` and ``books`` are plain JSON values; ``run_dir`` is None if nothing was kept."""

    session: str
    digest: str
    frames: int
    elapsed_s: float
    tape_s: float
    kpi: dict[str, Any]
    reasons: dict[str, dict[str, int]]
    books: list[dict[str, int | str]]
    alarms: dict[str, int]
    lateness: Lateness | None
    run_dir: Path | None
    checkpoint: Path | None = None
    """Where the run was kept in the middle instead; then ``digest`` and ``kpi`` are those so far, with orders still open."""
    reading: dict[str, int] = dataclasses.field(default_factory=dict)
    """What was read: segments from raw bytes and from decoded stores, row groups read and left out."""
    calibration: dict[str, Any] | None = None
    """What the calibration that was named says of the orders, and what came (``calibrated.beside``); None: none was named."""

    def decisions(self) -> pl.DataFrame:
        """The decisions that were kept (``out=``), one row each. Raises ConfigError if none were."""
        return self._table(DECISIONS)

    def fills(self) -> pl.DataFrame:
        """The fill events that were kept (``out=``), one row a leg. Raises ConfigError if none were."""
        return self._table(FILLS)

    def _table(self, name: str) -> pl.DataFrame:
        import polars as pl

        if self.run_dir is None:
            raise ConfigError("this run kept no events: replay with out=, the folder of runs.")
        return pl.read_parquet(self.run_dir / name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = _fields(self)
        values["run_dir"] = str(self.run_dir) if self.run_dir else None
        values["checkpoint"] = str(self.checkpoint) if self.checkpoint else None
        values["lateness"] = dataclasses.asdict(self.lateness) if self.lateness else None
        return values


def replay(
    tape: Path | str | Sequence[Path | str],
    config: RunConfig | None = None,
    *,
    out: Path | None = None,
    speed: Speed | str = "max",
    policy: Policy | None = None,
    block_rows: int | None = None,
    scanner: bool = True,
    check_hashes: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    until: Moment | str | None = None,
    steering: Steering | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: str | None = None,
    resume: Path | None = None,
    start: Moment | str | int | None = None,
    stop: Moment | str | int | None = None,
    venues: Sequence[str] = (),
    decoded: bool | None = None,
    calibration: CalibrationTable | None = None,
) -> RunResult:
    """Replay one or several session folders, here or at URLs; with ``out``, keep the figures in ``out/<session>-<digest>``.

    From ``start`` to before ``stop`` (engine time, ns or ``Moment.parse``), with empty books at the start; of ``venues`` only, if
    any are named. ``decoded``: None uses decoded stores where they are, True makes them first, False reads raw bytes; the run is
    the same.

    ``block_rows`` caps the frames fed at once (a row group by default); it changes nothing but speed, like ``speed``,
    ``scanner`` and ``steering``. ``until`` ends the run there (``Moment.parse``). With the folder ``checkpoint`` a run that ends
    before its tape is kept there in the middle, to be taken up by ``resume``; every ``checkpoint_every`` of tape time (``10m``)
    it is kept while it goes on, in case it is killed. What ``calibration`` says of the orders is compared with what came when the
    run has ended, and changes nothing of it. Raises TapeError, ConfigError, StorageError.
    """
    with closing(steering) if steering is not None else nullcontext(), ExitStack() as stack:
        memory.settle()
        pacer = Pacer(Speed.parse(speed) if isinstance(speed, str) else speed, time.sleep if steering is None else steering.wait)
        if checkpoint_every is not None and checkpoint is None:
            raise ConfigError("--checkpoint-every needs a folder to keep checkpoints in: --checkpoint FOLDER.")
        every_ns = _span_ns(checkpoint_every) if checkpoint_every is not None else 0
        reading = open_reading(
            [tape] if isinstance(tape, str | Path) else tape,
            start=start,
            stop=stop,
            venues=venues,
            decoded=decoded if scanner else False,
            check_hashes=check_hashes,
        )
        identity = reading.identity
        earlier = load(resume, identity) if resume is not None else None
        config = config or RunConfig()
        engine = Engine(reading.instruments, config, policy=policy, scanner=scanner)
        kpi = Kpi(engine)
        # Who is paced or steered takes a few frames at a time, and is early anyway.
        flat_out = not pacer.speed.factor and steering is None and scanner and block_rows is None
        source = partial(reading.batches, engine.universe, decoded_ahead=flat_out)
        course = Course(source, engine, kpi, pacer, steering, total=reading.total)
        stack.callback(course.close)
        course.block_rows = block_rows or 0
        course.open(Moment.parse(until) if isinstance(until, str) else until, earlier)
        keeper = Keeper(checkpoint, identity, every_ns, course, resume) if checkpoint is not None else None
        rows = EarlierRows(resume, earlier.meta["events"]) if resume is not None and earlier is not None else None
        sink = None
        if out is not None:
            sink = RunSink(out, engine.universe.symbols, checkpoint, rows)
            stack.callback(sink.discard)
            course.log = sink.log
        elif checkpoint is not None or calibration is not None:
            course.log = EventLog(checkpoint or Path(stack.enter_context(TemporaryDirectory(prefix="arbl2-"))), rows)
            stack.callback(course.log.close)
        if keeper is not None:
            stack.callback(keeper.tidy)
            course.watchers.append(keeper.look)
        if on_progress is not None:
            course.watchers.append(_Progress(on_progress, course).look)
        warm_up()
        started = time.perf_counter()
        with nullcontext() if steering is None and not pacer.speed.factor else punctual():
            in_the_middle = not course.run() and keeper is not None
        if not in_the_middle:
            engine.finish()
        course.drain()
        result = RunResult(
            session=reading.name,
            digest=engine.digest(),
            frames=engine.frames,
            elapsed_s=time.perf_counter() - started,
            tape_s=course.tape_s,
            kpi=kpi.result(),
            reasons=engine.reasons(),
            books=engine.books(),
            alarms=dict(sorted(course.alarms.items())),
            lateness=pacer.lateness(),
            run_dir=None,
            checkpoint=checkpoint if in_the_middle else None,
            reading=reading.counts.to_json(),
            calibration=beside(calibration, engine, course.log, course.span_ns) if calibration and course.log else None,
        )
        if keeper is not None and in_the_middle:
            keeper.keep()
            return result
        run_dir = None
        if sink is not None:
            run_dir = sink.commit(f"{result.session}-{result.digest[:8]}", summary_of(reading, config, engine, result))
        if keeper is not None:
            keeper.forget()
    return RunResult(**{**_fields(result), "run_dir": run_dir})


def _span_ns(text: str) -> int:
    try:
        return Moment.parse(f"+{text.strip()}").value
    except ConfigError:
        raise ConfigError(f"--checkpoint-every {text!r} is no length of time. Write 10m, 90s or 1h30m.") from None


def _fields(result: RunResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__slots__}


class _Progress:
    """Tells how far a run is, but not so often that it holds it up."""

    def __init__(self, tell: Callable[[int, int], None], course: Course) -> None:
        self._tell = tell
        self._course = course
        self._told_s = 0.0

    def look(self) -> None:
        now_s = time.perf_counter()
        done, total = self._course.place.frames, self._course.total
        if now_s - self._told_s >= _PROGRESS_S or done == total:
            self._told_s = now_s
            self._tell(done, total)


def summary_of(reading: Reading, config: RunConfig, engine: Engine, result: RunResult) -> dict[str, Any]:
    """What ``run.json`` says of a run."""
    pairs = engine.state.pairs
    part = reading.part
    # below "run", which is what came of it: a calibration is no input, and two runs are one with and without it
    calibration = {"calibration": result.calibration} if result.calibration is not None else {}
    return {
        "run": {"frames": result.frames, "tape_s": result.tape_s, "symbols": list(engine.universe.symbols), **calibration},
        "tape": tape_summary(reading),
        "part": {"start_ns": part.start_ns, "stop_ns": part.stop_ns, "venues": list(part.venues)},
        "digest": result.digest,
        "outcome_source": OUTCOME_SOURCE,
        "config": msgspec.to_builtins(config),
        "rules": {
            name: {"lot_e8": int(pairs[k]["lot_e8"]), "min_notional_e8": [int(v) for v in pairs[k]["min_notional_e8"]]}
            for k, name in enumerate(engine.universe.symbols)
        },
        "reasons": result.reasons,
        "alarms": result.alarms,
        "books": result.books,
        "kpi": result.kpi,
    }
