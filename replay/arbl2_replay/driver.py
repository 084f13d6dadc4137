"""The driver: tape, pacer, engine and sink joined; the only loop that replays.

Reading and unpacking the next row group happens in one other thread while the engine works on this one; at most two are in
memory, whatever the length of the tape.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from arbl2.config import RunConfig
from arbl2.engine import Engine, warm_up
from arbl2.errors import ConfigError, TapeError
from arbl2.frames import FrameKind
from arbl2.tape import RECORDING, TapeReader
from arbl2_replay.clock import Lateness, Pacer, Speed
from arbl2_replay.kpi import Kpi
from arbl2_replay.sinks import DECISIONS, FILLS, OUTCOME_SOURCE, RunSink

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    import polars as pl

    from arbl2.frames import FrameBlock
    from arbl2.policy import Policy
    from arbl2.tape import Manifest


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
        values["lateness"] = dataclasses.asdict(self.lateness) if self.lateness else None
        return values


def replay(
    tape: Path | str,
    config: RunConfig | None = None,
    *,
    out: Path | None = None,
    speed: Speed | str = "max",
    policy: Policy | None = None,
    block_rows: int | None = None,
    scanner: bool = True,
    check_hashes: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Replay one session folder, here or at a URL, and return its figures; with ``out``, keep them in ``out/<session>-<digest>``.

    ``block_rows`` caps the frames fed at once (a row group by default); it changes nothing but speed, like ``speed`` and
    ``scanner``. Raises TapeError, ConfigError, StorageError.
    """
    config = config or RunConfig()
    pacer = Pacer(Speed.parse(speed) if isinstance(speed, str) else speed)
    reader = TapeReader(tape)
    if reader.manifest.state == RECORDING:
        mend = "ship it again" if reader.place.local is None else f"run `arbl2 recover {reader.place.local.parent}`"
        raise TapeError(f"{reader.place} is being recorded, or its recorder was killed. Stop it, or {mend}.")
    if check_hashes:
        reader.verify_hashes()
    blocks = read_ahead(reader)
    first_block = next(blocks, None)
    if first_block is None:
        raise TapeError(f"{tape} holds no frames. Was the recorder stopped before anything arrived?")
    engine = Engine(reader.manifest.instruments, config, policy=policy, scanner=scanner)
    kpi = Kpi(engine)
    sink = RunSink(out, engine.universe.symbols) if out is not None else None
    total = reader.manifest.rows
    warm_up()
    started = time.perf_counter()
    first_ns = last_ns = int(first_block.time_ns[0])
    alarms: Counter[str] = Counter()
    try:
        for block in _chain(first_block, blocks):
            for piece in pacer.pieces(block):
                step = block_rows or len(piece)
                for start in range(0, len(piece), step):
                    engine.feed(piece.slice(start, min(start + step, len(piece))))
                if on_progress is not None:
                    on_progress(engine.frames, total)
            alarms.update(_alarms(block))
            last_ns = max(last_ns, int(block.time_ns[-1]))
            _drain(engine, kpi, sink)
        engine.finish()
        _drain(engine, kpi, sink)
        result = RunResult(
            session=reader.manifest.session,
            digest=engine.digest(),
            frames=engine.frames,
            elapsed_s=time.perf_counter() - started,
            tape_s=(last_ns - first_ns) / 1e9,
            kpi=kpi.result(),
            reasons=engine.reasons(),
            books=engine.books(),
            alarms=dict(sorted(alarms.items())),
            lateness=pacer.lateness(),
            run_dir=None,
        )
        if sink is None:
            return result
        run_dir = sink.commit(f"{result.session}-{result.digest[:8]}", _summary(reader.manifest, config, engine, result))
    except BaseException:
        blocks.close()
        if sink is not None:
            sink.discard()
        raise
    return RunResult(**{**_fields(result), "run_dir": run_dir})


def _fields(result: RunResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__slots__}


def _drain(engine: Engine, kpi: Kpi, sink: RunSink | None) -> None:
    events = engine.drain()
    kpi.add(events)
    if sink is not None:
        sink.write(events)


def _chain(first: FrameBlock, rest: Iterator[FrameBlock]) -> Iterator[FrameBlock]:
    yield first
    yield from rest


def read_ahead(reader: TapeReader) -> Generator[FrameBlock]:
    """The reader's blocks, with the next one read and unpacked while the caller works on the current one."""
    blocks = reader.blocks()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="arbl2-read") as pool:
        waiting = pool.submit(next, blocks, None)
        while (block := waiting.result()) is not None:
            waiting = pool.submit(next, blocks, None)
            yield block


class _Alarm(msgspec.Struct):
    alarm: str = "unnamed"


def _alarms(block: FrameBlock) -> list[str]:
    """Names of the alarms that the recorder left in a block."""
    names = []
    for i in np.flatnonzero(block.kind == FrameKind.ALARM).tolist():
        try:
            names.append(msgspec.json.decode(block.payload(i), type=_Alarm).alarm[:40])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            names.append("not of arbl2's making")
    return names


def tape_sha256(manifest: Manifest) -> str:
    """One hash over the segment hashes of a tape."""
    return hashlib.sha256("".join(segment.sha256 for segment in manifest.segments).encode()).hexdigest()


def _summary(manifest: Manifest, config: RunConfig, engine: Engine, result: RunResult) -> dict[str, Any]:
    pairs = engine.state.pairs
    return {
        "run": {"frames": result.frames, "tape_s": result.tape_s, "symbols": list(engine.universe.symbols)},
        "tape": {"session": manifest.session, "sha256": tape_sha256(manifest), "state": manifest.state},
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
