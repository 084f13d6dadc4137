"""The long run: ``python -m benchmarks.live --minutes 20`` (``make long-run MINUTES=20``).

Both exchanges run in a process of their own at real pace; ``arbl2 live`` in another one records them and trades on paper. Then
``arbl2 verify`` replays the tape and compares to the bit. The figures are those that the origin's acceptance runs asked for: fill
events, fatal exceptions, how much the available volume varies on both legs; and the latency from the arrival of a frame to the
order intent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from arbl2.frames import ExchangeId
from benchmarks.record import _answer, _run, here, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection

COINS = ("BTC", "ETH", "XRP", "SOL")
STREAMS = "depth,trade"
EVENTS = 100
DISPERSION = 0.1
P99_MS = 1.0
EXCURSION_S = 14.0
CUTS, JITTERS = 5, 20
LEAST_EVENTS = 10
"""A coin with fewer fill events on a venue says nothing about how its volume varies."""


def _exchange(pipe: Connection, seed: int, faults: Sequence[str]) -> None:
    """Process: both exchanges, until told to end."""
    from arbl2_replay.faults import fault_config  # noqa: PLC0415 - only here needed
    from arbl2_replay.server import ExchangeServer, ServerOptions, SyntheticSource  # noqa: PLC0415
    from arbl2_replay.synth import SYMBOLS, SynthConfig  # noqa: PLC0415

    # venues have machines of their own: what theirs computes must not take a core from the run
    os.nice(19)

    async def work() -> None:
        market = SynthConfig(
            seed=seed, duration_s=86_400.0, symbols=tuple(SYMBOLS[coin] for coin in COINS), excursion_every_s=EXCURSION_S
        )
        options = ServerOptions(faults=fault_config(faults, seed) if faults else None)
        async with ExchangeServer(SyntheticSource(market), options) as server:
            pipe.send((server.upbit_ws_url, server.upbit_rest_url, server.binance_ws_url, server.binance_rest_url))
            while not pipe.poll():  # noqa: ASYNC110 - another process asks
                await asyncio.sleep(0.1)

    asyncio.run(work())


def _arbl2(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "arbl2", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def dispersion(run_dir: Path) -> dict[str, float]:
    """Standard deviation over mean of the size displayed at the touch when a leg was sent, by venue and coin."""
    fills = pl.read_parquet(run_dir / "fills.parquet", columns=["symbol", "venue", "depth_e8"])
    found = fills.group_by("venue", "symbol").agg(
        events=pl.len(), varies=pl.col("depth_e8").cast(pl.Float64).std() / pl.col("depth_e8").cast(pl.Float64).mean()
    )
    rows = found.filter(pl.col("events") >= LEAST_EVENTS).sort("venue", "symbol", descending=[True, False]).to_dicts()
    return {f"{row['venue']} {row['symbol']}": row["varies"] for row in rows}


def long_run(minutes: float, seed: int, faults: Sequence[str], folder: Path) -> bool:
    """One run with its figures; whether all hold."""
    process, pipe = _run(_exchange, seed, faults)
    urls = _answer(pipe, 30.0, "the exchange server")
    names = ("--upbit-ws", "--upbit-rest", "--binance-ws", "--binance-rest")
    options = [part for pair in zip(names, urls, strict=True) for part in pair]
    limits = ["--duration", f"{minutes * 60:g}", "--symbols", ",".join(COINS), "--streams", STREAMS]
    # larger than much of what is displayed, so that partial fills and missed legs show
    policy = ["--size-krw", "20000000", "--max-position-krw", "60000000"]
    began = time.monotonic()
    done = _arbl2("live", "--l2-source", "multi", *options, *limits, *policy, "--json", folder=folder)
    lasted_s = time.monotonic() - began
    pipe.send("end")
    process.join(10)
    fatal = done.returncode != 0 or "Traceback" in done.stderr
    if fatal:
        print(done.stderr)
        return verdict("zero fatal exceptions", holds=False, said=f"arbl2 live ended with {done.returncode}")
    told = json.loads(done.stdout)
    run_dir = folder / told["run_dir"]
    holds = [verdict("zero fatal exceptions", holds=True, said=f"`arbl2 live` ended with 0 after {lasted_s / 60:.1f} minutes")]
    holds += _figures(told, run_dir, minutes)
    holds.append(_verified(folder, told["session"]))
    return all(holds)


def _figures(told: dict[str, Any], run_dir: Path, minutes: float) -> list[bool]:
    rate = told["frames"] / told["tape_s"]
    kpi, latency = told["kpi"], told["latency"]
    print(f"        {told['frames']:,} frames, {rate:.0f} a second; {kpi['decisions']:,} decisions, PnL {kpi['pnl_krw']} KRW")
    print(f"        refused: {kpi['refused_asks'] or 'none'}; reconnects {told['reconnects']}; alarms {told['alarms'] or 'none'}")
    varies = dispersion(run_dir)
    upbit, binance = (min((v for name, v in varies.items() if name.startswith(venue)), default=0.0) for venue in ExchangeId)
    said = ", ".join(f"{name} {value:.2f}" for name, value in varies.items())
    decision, frame = latency["decision"], latency["frame"]
    for name, each in latency.items():
        count, *figures = (f"{each[part]:,.0f}" for part in ("count", "p50_us", "p99_us", "max_us"))
        print("        {:8} p50 {:>7}  p99 {:>7}  max {:>7} us".format(name, *figures), f" ({count})")
    return [
        verdict("minutes", holds=told["tape_s"] >= minutes * 60 * 0.98, said=f"{told['tape_s'] / 60:.1f}"),
        verdict("fill events", holds=kpi["legs"] >= EVENTS, said=f"{kpi['legs']:,} (asked: {EVENTS})"),
        verdict(
            "std / mean of the available volume, both legs",
            holds=min(upbit, binance) >= DISPERSION,
            said=f"at least {upbit:.2f} and {binance:.2f} (asked: {DISPERSION}); {said}",
        ),
        verdict("every message that arrived is on the tape", holds=told["clean"], said=str(told["clean"])),
        verdict(
            "decision latency",
            holds=decision["p99_us"] < P99_MS * 1e3,
            said=f"p99 {decision['p99_us'] / 1e3:.2f} ms of {decision['count']:,} decisions, "
            f"{frame['p99_us'] / 1e3:.2f} ms of {frame['count']:,} frames (asked: below {P99_MS:g})",
        ),
    ]  # fmt: skip


def _verified(folder: Path, session: str) -> bool:
    done = _arbl2("verify", session, "--truncate", str(CUTS), "--jitter-ties", str(JITTERS), "--json", folder=folder)
    if done.returncode not in (0, 1):
        return verdict("verified by replay", holds=False, said=done.stderr.strip())
    told = json.loads(done.stdout)
    cuts, jitter = told["cuts"], told["jitter"]
    print(
        f"        order across venues within {jitter['window_ms']:g} ms permuted {jitter['times']} times ({jitter['ties']:,} of "
        f"{jitter['frames']:,} frames): flips {jitter['flips']} of {jitter['decisions']:,} decisions, PnL {jitter['pnl_krw']} KRW"
    )
    looked = cuts["looked_ahead"] or "never"
    print(f"        {len(cuts['seqs'])} cuts, {cuts['decisions']:,} decisions before them; looked ahead: {looked}")
    compared = "; ".join(f"{check['name']}: {check['compared']}" for check in told["checks"])
    return verdict("verified by replay, to the bit", holds=told["same"], said=f"digest {told['digest'][:16]}..., {compared}")


def main() -> None:
    """Parse, run, say what holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live", description="A long paper run, verified by its replay.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", action="append", default=[], metavar="NAME=SECONDS", help="as for `arbl2 serve`")
    parser.add_argument("--keep", type=Path, help="keep tape and run in this folder")
    given = parser.parse_args()
    print(f"{here()}\n")
    with tempfile.TemporaryDirectory(prefix="arbl2-long-run-") as aside:
        folder = given.keep or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        holds = long_run(given.minutes, given.seed, given.fault, folder)
    raise SystemExit(0 if holds else 1)


if __name__ == "__main__":
    main()
