"""A whole day: ``python -m benchmarks.scale``.

A tape of 24 hours, ten coins on both venues and more than 20 million messages (``benchmarks/day.py``) is replayed in a process of
its own, while another looks at its memory every second. Asked: less than 500 MB at any time, flat, and a message of the last
hours costs what one of the first hours costs.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arbl2.config import RunConfig
from arbl2.tape import Manifest, load_manifest
from arbl2_replay import replay
from benchmarks.day import COINS, SECOND_NS, START_NS, Day, tape
from benchmarks.document import write
from benchmarks.measure import machine
from benchmarks.record import _answer, _peak_rss_mb, _run, verdict

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from numpy.typing import NDArray

BEGIN, END = "<!-- figures of a day: written by `python -m benchmarks.scale --write` -->", "<!-- end of figures -->"
HOUR_NS = 3_600 * SECOND_NS
PARTS = 24
"""Hours of a whole day; a shorter tape is cut into as many parts."""
MOST_RSS_MB = 500.0
MOST_GROWTH = 1.15
MOST_SLOPE_MB_PER_H = 2.0
SLOPE_FROM_H = 6.0
"""In a shorter run, what is allocated once looks like a slope."""
BUSY = 0.7


# ------------------------------------------------------------------------------------------------------------ the processes


@dataclass(frozen=True, slots=True)
class Done:
    """What the replaying process tells: ``marks`` are (monotonic seconds, CPU seconds of all its threads, frames done)."""

    seconds: float
    frames: int
    digest: str
    decisions: int
    peak_mb: float
    marks: list[tuple[float, float, int]]


@dataclass(frozen=True, slots=True)
class Measured:
    """A replay, and what its process held: resident MB at monotonic seconds."""

    done: Done
    at_s: list[float]
    rss_mb: list[float]


def _replay(pipe: Connection, folder: str, symbols: tuple[str, ...], options: dict[str, Any]) -> None:
    """Process: the call behind `arbl2 replay`, all of it."""
    marks: list[tuple[float, float, int]] = []

    def mark(frames: int, _: int) -> None:
        marks.append((time.monotonic(), time.process_time(), frames))

    started = time.monotonic()
    result = replay(folder, RunConfig(symbols=symbols), on_progress=mark, **options)
    seconds = time.monotonic() - started
    decisions = sum(symbol["decisions"]["accepted"] + symbol["decisions"]["refused"] for symbol in result.kpi["symbols"])
    pipe.send(Done(seconds, result.frames, result.digest, decisions, _peak_rss_mb(), marks))


def measured(folder: Path, symbols: tuple[str, ...] = (), **options: Any) -> Measured:
    """Replay in a process of its own, looking at its memory every second."""
    process, pipe = _run(_replay, str(folder), symbols, options)
    status = Path(f"/proc/{process.pid}/status")
    at_s: list[float] = []
    rss_mb: list[float] = []
    while not pipe.poll(1.0) and process.is_alive():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS"):
                at_s.append(time.monotonic())
                rss_mb.append(int(line.split()[1]) / 1024)
    done = _answer(pipe, 1.0, "the replay")
    process.join()
    return Measured(done, at_s, rss_mb)


def others(folder: Path, day: Day) -> list[tuple[str, Measured]]:
    """The same tape in other ways."""
    middle_ns = START_NS + day.end_ns // 2
    return [
        ("one coin: `symbols = BTC`", measured(folder, ("BTC",), decoded=False)),
        ("one hour from the middle of the tape", measured(folder, start=middle_ns, stop=middle_ns + HOUR_NS, decoded=False)),
        ("decoded store, built first if there is none", measured(folder, decoded=True)),
        ("decoded store again", measured(folder, decoded=True)),
        ("decoded store, one coin", measured(folder, ("BTC",), decoded=True)),
    ]


# --------------------------------------------------------------------------------------------------------------- the figures


@dataclass(frozen=True, slots=True)
class Course:
    """By part of the tape: microseconds per frame by the clock and in CPU time, memory at its end in MB.

    ``slope_mb_per_h`` is the straight line through all samples of memory after the first tenth, per hour of tape.
    """

    wall_us: NDArray[np.float64]
    cpu_us: NDArray[np.float64]
    rss_mb: NDArray[np.float64]
    slope_mb_per_h: float

    @classmethod
    def of(cls, run: Measured, manifest: Manifest) -> Course:
        """Frames become hours of tape by the stamps of the segments."""
        at_s, cpu_s, frames = (np.array(column, np.float64) for column in zip(*run.done.marks, strict=True))
        stamps = [*(segment.first_recv_ns for segment in manifest.segments), manifest.segments[-1].last_recv_ns]
        hours = (np.array(stamps) - stamps[0]) / HOUR_NS
        seqs = np.array([*(segment.first_seq for segment in manifest.segments), manifest.rows])
        # What the process does before its first block is no part's cost.
        edges = np.maximum(np.interp(np.linspace(0.0, hours[-1], PARTS + 1), hours, seqs), frames[0])
        wall, cpu = (np.diff(np.interp(edges, frames, column)) / np.diff(edges) * 1e6 for column in (at_s, cpu_s))
        sampled, rss_mb = np.array(run.at_s), np.array(run.rss_mb)
        at_h = np.interp(np.interp(sampled, at_s, frames), seqs, hours)
        counted = (at_h > hours[-1] / 10) & (at_h < hours[-1])
        slope = float(np.polyfit(at_h[counted], rss_mb[counted], 1)[0]) if np.count_nonzero(counted) > 2 else 0.0
        return cls(wall, cpu, np.interp(np.interp(edges[1:], frames, at_s), sampled, rss_mb), slope)


def growth(parts: NDArray[np.float64]) -> float:
    """Median of the last quarter over that of the first."""
    quarter = len(parts) // 4
    return float(np.median(parts[-quarter:]) / np.median(parts[:quarter]))


def report(manifest: Manifest, runs: list[tuple[str, Measured]], course: Course, load: float) -> str:
    messages = sum(count for name, count in manifest.counts.items() if name.endswith(".message"))
    on_disk = sum(segment.bytes for segment in manifest.segments)
    payload = sum(segment.payload_bytes for segment in manifest.segments)
    hours = (manifest.segments[-1].last_recv_ns - manifest.segments[0].first_recv_ns) / HOUR_NS
    coins = len(manifest.instruments["binance"])
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    size = f"{on_disk / 1e9:.2f} GB ({on_disk / manifest.rows:.0f} bytes a message)"
    mean = f"{messages:,} messages of {payload / manifest.rows:,.0f} bytes on average"
    lines = [
        f"{hours:.1f} hours of {coins} coins on both venues: {mean}; {len(manifest.segments)} segments, {size}.",
        "",
        "| replay | frames | seconds | us per frame | CPU us per frame | peak RSS, MB | decisions | digest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs:
        done = run.done
        us, cpu_us = (seconds / done.frames * 1e6 for seconds in (done.seconds, done.marks[-1][1]))
        figures = f"{done.frames:,} | {done.seconds:.1f} | {us:.2f} | {cpu_us:.2f} | {done.peak_mb:.0f}"
        lines.append(f"| {name} | {figures} | {done.decisions:,} | {done.digest[:8]} |")
    lines += [
        "",
        f"| part of the tape ({hours / PARTS:.2g} h each) | us per frame | CPU us per frame | RSS at its end, MB |",
        "|---|---|---|---|",
    ]
    for k, row in enumerate(zip(course.wall_us, course.cpu_us, course.rss_mb, strict=True), 1):
        lines.append(f"| {k} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.0f} |")
    grown = f"{growth(course.cpu_us):.3f} in CPU time (asked: at most {MOST_GROWTH:g}), {growth(course.wall_us):.3f} by the clock"
    busy = "; the machine was busy, so read times by the clock as upper bounds" if load > BUSY else ""
    lines += [
        "",
        f"Last quarter over the first: {grown}. Memory after the first tenth: {course.slope_mb_per_h:+.2f} MB per hour of tape.",
        "",
        f"Measured on: {where}; load before the start {load:.2f}{busy}.",
    ]
    return "\n".join(lines)


def judge(whole: Measured, course: Course, hours: float) -> bool:
    """Print what was asked and whether it holds. Time is CPU time: by the clock, whoever else works here is measured too."""
    peak_mb, slope, grown = whole.done.peak_mb, course.slope_mb_per_h, growth(course.cpu_us)
    holds = verdict("memory", peak_mb < MOST_RSS_MB, f"{peak_mb:.0f} MB at most (asked: below {MOST_RSS_MB:g})")
    flat = slope < MOST_SLOPE_MB_PER_H or hours < SLOPE_FROM_H
    said = f"{slope:+.2f} MB per hour of tape (asked: below {MOST_SLOPE_MB_PER_H:g}, from {SLOPE_FROM_H:g} hours on)"
    holds &= verdict("memory flat", flat, said)
    said = f"{grown:.3f} times the first quarter's in the last (asked: at most {MOST_GROWTH:g})"
    return holds & verdict("CPU time per message", grown <= MOST_GROWTH, said)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description="Replay a whole day.")
    parser.add_argument("--hours", type=float, default=24.0, help="length of the tape (default: 24)")
    parser.add_argument("--symbols", type=int, default=len(COINS), help=f"coins on it, up to {len(COINS)} (default: all)")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/performance.md")
    options = parser.parse_args()
    day = Day(hours=options.hours, symbols=options.symbols)
    folder = tape(day)
    manifest = load_manifest(folder)
    load = os.getloadavg()[0]
    whole = measured(folder, decoded=False)
    course = Course.of(whole, manifest)
    runs = others(folder, day)
    text = report(manifest, [("all of it", whole), *runs], course, load)
    print(f"{text}\n")
    if options.write:
        write(text, BEGIN, END)
    raise SystemExit(not judge(whole, course, day.hours))


if __name__ == "__main__":
    main()
