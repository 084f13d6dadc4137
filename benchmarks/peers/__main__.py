"""``python -m benchmarks.peers [--write]``: every engine once a round, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.document import write
from benchmarks.market import DATA, tape
from benchmarks.measure import ROOT, machine
from benchmarks.peers import books, environments
from benchmarks.peers.decisions import BINANCE, ENTRY_BPS, FX, LATENCY_NS, UPBIT, checksum, decide
from benchmarks.peers.report import BEGIN, BUILD, CONVERT, END, Engine, Figures, conversion_table, ratios, table

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = DATA / "peers"
BUSY = 0.7
ENGINES = (
    Engine("raw", "arbl2 raw (Parquet, hashes and key figures included)", "", "ours", ("raw",)),
    Engine("decoded", "arbl2 decoded (the same from its decoded store)", "", "ours", ("decoded",)),
    Engine("plain", "plain Python loop, pyarrow and orjson (Parquet included)", "", "ours", ("plain",)),
    *(
        Engine(f"{depth}-{feed}", f"hftbacktest, {kind} depth, {fed}", "hft", "hft", (depth, feed), feed)
        for depth, kind in (("roivec", "ROI vector"), ("hashmap", "hash map"))
        for feed, fed in (("diff", "differences"), ("snap", "whole windows"))
    ),
    Engine("deltas", "nautilus_trader, deltas", "nautilus", "nautilus", ("deltas",), "diff"),
    Engine("depth10", "nautilus_trader, OrderBookDepth10", "nautilus", "nautilus", ("depth10",)),
)


def call(python: Path | str, module: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a module of this package in a process of its own; its last line of output is JSON. Raises SystemExit if it fails."""
    command = [python, "-m", f"benchmarks.peers.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2_000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(session: Path, folder: Path, engines: list[Engine], messages: int, rounds: int) -> dict[str, Figures]:
    """Figures by engine, of ``CONVERT``, and of ``BUILD`` if there is a decoded store. Every second round goes backwards."""
    pythons: dict[str, Path | str] = {peer: environments.python_of(peer, FOLDER) for peer in ("hft", "nautilus")}
    pythons[""] = sys.executable
    figures = {key: Figures(messages) for key in (CONVERT, BUILD, *(engine.key for engine in engines))}
    if "decoded" in figures:
        call(sys.executable, "ours", "decoded", session)  # so that no run that counts has to make the store
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        figures[CONVERT].rounds.append(call(sys.executable, "convert", session, folder))
        if "decoded" in figures:
            figures[BUILD].rounds.append(call(sys.executable, "ours", BUILD, session))
        for engine in engines if number % 2 == 0 else reversed(engines):
            reads = folder if engine.peer else session
            figures[engine.key].rounds.append(call(pythons[engine.peer], engine.module, *engine.arguments, reads))
    return figures


def compare(engines: list[Engine], figures: dict[str, Figures], folder: Path) -> str:
    """All engines in all rounds decided what the rule in plain Python decides. Raises SystemExit naming those that did not."""
    decisions = decide({book: books.load(folder, book) for book in (UPBIT, BINANCE, FX)})
    expected = (len(decisions), checksum(decisions))
    for engine in engines:
        found = {(figure["decisions"], figure["checksum"]) for figure in figures[engine.key].rounds}
        if found != {expected}:
            raise SystemExit(
                f"{engine.name} decided {sorted(found)}, the rule says {expected}: nothing can be claimed from this run."
            )
    return f"{expected[0]:,} decisions in every engine and round, checksum over their times and directions {expected[1]}"


def main() -> None:
    """Measure, print, write; exit 1 if a ratio that is asked for does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="arbl2 beside other engines, on one tape.")
    parser.add_argument("--messages", type=int, default=200_000, help="length of the tape (default: 200,000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often every engine runs (default: 5)")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/performance.md")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    session, folder = tape(options.messages), FOLDER / f"feed-{options.messages}"
    folder.mkdir(parents=True, exist_ok=True)
    engines = list(ENGINES)
    figures = measure(session, folder, engines, options.messages, options.rounds)
    same = compare(engines, figures, folder)
    claims = ratios(engines, figures)
    text = "\n".join(
        [
            f"{options.messages:,} messages, {options.rounds} rounds in turn, each engine in a process of its own.",
            f"The rule: both legs IOC where an edge reaches {ENTRY_BPS:g} bps, {LATENCY_NS / 1e6:g} ms latency; {same}.",
            "",
            *table(engines, figures),
            "",
            *conversion_table(figures[CONVERT]),
            "",
            *(claim.line() for claim in claims),
            "",
            f"Measured on: {_where(figures)}; load before the start {load:.2f}"
            + ("; the machine was busy, so read these figures as upper bounds." if load > BUSY else "."),
        ]
    )
    print(text)
    if options.write:
        write(text, BEGIN, END)
    if not all(claim.holds for claim in claims):
        raise SystemExit(1)


def _where(figures: dict[str, Figures]) -> str:
    """The machine, and the versions that every engine's processes reported."""
    parts = [f"{name} {value}" for name, value in machine().items()]
    for key in ("roivec-diff", "deltas"):
        first, *rest = figures[key].rounds[0]["versions"].items()
        parts.append(f"{' '.join(first)} (with {', '.join(' '.join(one) for one in rest)})")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
