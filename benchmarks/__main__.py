"""Run the benchmarks: ``python -m benchmarks [--write]``."""

from __future__ import annotations

import argparse
import os

from benchmarks.changes import Changes
from benchmarks.document import write
from benchmarks.market import tape
from benchmarks.measure import Figure, Stages, machine, starts

BEGIN, END = "<!-- figures: written by `python -m benchmarks --write` -->", "<!-- end of figures -->"
BUSY = 0.7


def table(title: str, figures: list[Figure], digits: int) -> list[str]:
    lines = [f"| {title} | median | fastest | slowest |", "|---|---|---|---|"]
    for figure in figures:
        numbers = (figure.median, min(figure.values), max(figure.values))
        lines.append(f"| {figure.name} | {' | '.join(f'{number:.{digits}f}' for number in numbers)} |")
    return lines


def report(messages: int, rounds: int, cold_rounds: int) -> str:
    load = os.getloadavg()[0]
    stages = Stages(tape(messages), messages)
    same = stages.check()
    figures = stages.rounds(rounds)
    _, loop, replayed, decoded, plain = figures
    scale = f"{messages:,} messages of {_mean_bytes(stages):,.0f} bytes on average, {rounds} rounds in turn"
    done = f"{same.decisions:,} decisions and {same.fills:,} fills, the same in both ways"
    against = f"Replay from raw is {plain.median / replayed.median:.1f} times as fast as the plain loop (asked: at least 3)"
    kept = f"from the decoded store it takes {decoded.median:.2f} us (asked: at most 0.25)"
    alone = f"the loop alone takes {loop.median:.2f} us per update (asked: at most 0.3)"
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    busy = "; the machine was busy, so read these figures as upper bounds" if load > BUSY else ""
    lines = [
        f"{scale}; {done}.",
        "",
        *table("microseconds per message", figures, 2),
        "",
        f"{against}; {kept}; {alone}.",
        "",
        *_changes(messages // 10, rounds),
        "",
        *table("seconds", starts(cold_rounds), 1),
        "",
        f"Measured on: {where}; load before the start {load:.2f}{busy}.",
    ]
    return "\n".join(lines)


def _changes(count: int, rounds: int) -> list[str]:
    changes = Changes(count)
    levels = changes.check()
    figures = changes.rounds(rounds)
    ours, theirs = figures
    scale = (
        f"{count:,} depth changes of {changes.mean_bytes:,.0f} bytes on average into a book that has {levels:,} levels at the end"
    )
    faster = (
        f"arbl2 is {theirs.median / ours.median:.1f} times as fast, with a sorted book, its window and the origin of every level"
    )
    return [*table("microseconds per depth change", figures, 2), "", f"{scale}; {faster}."]


def _mean_bytes(stages: Stages) -> float:
    frames = sum(len(block) for block in stages.blocks)
    return sum(int(block.offsets[-1] - block.offsets[0]) for block in stages.blocks) / frames


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What a message costs on this machine.")
    parser.add_argument("--messages", type=int, default=200_000, help="length of the tape (default: 200,000)")
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured (default: 7)")
    parser.add_argument("--cold-rounds", type=int, default=3, help="how often a cold start is measured (default: 3)")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/performance.md")
    options = parser.parse_args()
    text = report(options.messages, options.rounds, options.cold_rounds)
    print(text)
    if options.write:
        write(text, BEGIN, END)


if __name__ == "__main__":
    main()
