"""The rule on arbl2 and in the plain loop: ``python -m benchmarks.peers.ours raw|decoded|build|plain SESSION``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from arbl2.config import AggregatorConfig, PaperConfig, PolicyConfig, RunConfig
from arbl2.events import Direction
from arbl2.tape import TapeReader
from arbl2_replay import RunResult, replay
from benchmarks import plain
from benchmarks.market import tape
from benchmarks.peers.decisions import (
    ENTRY_BPS,
    FEES,
    FX_STALE_NS,
    LATENCY_NS,
    SIZE_KRW,
    STALE_NS,
    WARM_UP_MESSAGES,
    Decisions,
    checksum,
)
from benchmarks.peers.probe import Probe

RICH = "1000000000"


def run_config(entry_bps: float = ENTRY_BPS) -> RunConfig:
    """The rule of ``decisions.py`` in arbl2's words, with accounts that never run dry."""
    return RunConfig(
        aggregator=AggregatorConfig(stale_s=STALE_NS / 1e9, fx_stale_s=FX_STALE_NS / 1e9),
        policy=PolicyConfig(entry_bps=entry_bps, tp_bps=2 * entry_bps, size_krw=str(SIZE_KRW), max_position_krw=RICH),
        paper=PaperConfig(
            upbit_latency_ms=LATENCY_NS / 1e6,
            binance_latency_ms=LATENCY_NS / 1e6,
            upbit_fee_bps=FEES[0] * 1e4,
            binance_fee_bps=FEES[1] * 1e4,
            upbit_krw=RICH,
            binance_usdt=RICH,
            upbit_coins={"BTC": "1000"},
            binance_coins={"BTC": "1000"},
        ),
    )


CONFIG = run_config()


def run(session: Path, *, decoded: bool, out: Path | None = None) -> RunResult:
    """One replay, from Parquet to key figures, with the hashes of the tape checked."""
    return replay(session, CONFIG, out=out, decoded=decoded)


def kept(session: Path, *, decoded: bool) -> tuple[str, Decisions, float]:
    """The digest of a run that writes its events, its decisions, and the coins it filled."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(session, decoded=decoded, out=Path(folder))
        rows = result.decisions()
        filled = int(result.fills()["filled_e8"].sum())
    if set(rows["outcome"].to_list()) - {"accepted"}:
        raise SystemExit(
            f"arbl2 refused asks ({result.kpi['refused_asks']}), which the other engines would not; change ours.CONFIG."
        )
    directions = (Direction[name.upper()] for name in rows["direction"].to_list())
    return result.digest, list(zip(rows["time_ns"].to_list(), map(int, directions), strict=True)), filled / 1e8


def replayed(session: Path, *, decoded: bool) -> None:
    """Warm up on a short tape, run timed, then again to keep what was decided: the digests say that all did the same."""
    probe = Probe()
    run(tape(WARM_UP_MESSAGES), decoded=decoded)
    for name in probe.turns():
        with probe.timed(name):
            result = run(session, decoded=decoded)
    digest, decisions, filled = kept(session, decoded=decoded)
    if digest != result.digest:
        raise SystemExit(f"two runs of one tape gave the digests {digest} and {result.digest}.")
    tell(probe, len(decisions), checksum(decisions), filled, ("arbl2", "numba", "pyarrow"))


def looped(session: Path) -> None:
    """The plain loop, with pyarrow and orjson imported and used once before."""
    probe = Probe()

    def run(session: Path, trace: Decisions) -> plain.Result:
        anchor = TapeReader(session).anchor
        return plain.run(session, CONFIG, anchor.wall_ns - anchor.mono_ns, trace)

    run(tape(WARM_UP_MESSAGES), [])
    for name in probe.turns():
        decisions: Decisions = []
        with probe.timed(name):
            result = run(session, decisions)
    tell(probe, result.decisions, checksum(decisions), result.filled_e8 / 1e8, ("orjson", "pyarrow"))


def tell(probe: Probe, decisions: int, hashed: str, filled: float, packages: tuple[str, ...]) -> None:
    """Hand the figures to the parent."""
    versions = {name: version(name) for name in packages}
    probe.tell(decisions=decisions, checksum=hashed, filled=filled, versions=versions)


def built(session: Path) -> None:
    """The first replay of a tape that has no decoded store yet, on a copy: it makes the store."""
    probe = Probe()
    run(tape(WARM_UP_MESSAGES), decoded=False)
    with tempfile.TemporaryDirectory(dir=session.parent) as folder:
        fresh = shutil.copytree(session / "segments", Path(folder) / session.name / "segments").parent
        shutil.copy(session / "manifest.json", fresh)
        with probe.timed():
            run(fresh, decoded=True)
    probe.tell()


def main(engine: str, session: Path) -> None:
    """Run one of the engines, or ``build`` a decoded store."""
    if engine == "build":
        built(session)
    elif engine == "plain":
        looped(session)
    else:
        replayed(session, decoded=engine == "decoded")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
